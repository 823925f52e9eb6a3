"""Divides the gradients of parameters that are used several times, once per optimizer step."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Iterable
from types import FunctionType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.errors import NshTrainerError
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientStep

from .config import SharedParametersCallbackConfig

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SharedParametersCallback", "SharedParametersError"]

log = logging.getLogger(__name__)


class SharedParametersError(NshTrainerError, ValueError):
    """A module's `shared_parameters` is missing or does not say what it should."""


class SharedParametersCallback(ConfiguredCallback[SharedParametersCallbackConfig]):
    """Divides the gradient of each shared parameter by its factor.

    The module's property `shared_parameters` gives pairs of a parameter and a factor. It is read
    once, when training starts. The division happens once per optimizer step, after accumulation
    and before clipping, for the parameters of that optimizer.
    """

    config_class = SharedParametersCallbackConfig

    def __init__(
        self, config: SharedParametersCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._factors: dict[int, tuple[str, float]] = {}
        self._without_gradient: set[str] = set()

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            attach(trainer, self.state_key).gradients.register(
                self.state_key, transform=self._transform
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the module's shared parameters.

        Raises:
            SharedParametersError: There are none, or they are not what they should be.
        """
        self._factors = read_shared_parameters(pl_module)
        self._without_gradient = set()
        log.debug("gradients are divided by: %s", dict(self._factors.values()))

    def _transform(self, step: GradientStep) -> None:
        missing: list[str] = []
        for parameter in step.parameters:
            found = self._factors.get(id(parameter))
            if found is None:
                continue
            name, factor = found
            if parameter.grad is None:
                missing.append(name)
            else:
                parameter.grad.div_(factor)
        if new := [name for name in missing if name not in self._without_gradient]:
            self._without_gradient.update(new)
            if step.trainer.is_global_zero:
                log.warning(
                    "shared parameters without a gradient at step %d: %s; they are not scaled "
                    "there. Take them out of shared_parameters if they are never used.",
                    step.step,
                    ", ".join(new),
                )


def read_shared_parameters(module: nn.Module) -> dict[int, tuple[str, float]]:
    """Return name and factor of each shared parameter of *module*, by the parameter's id.

    Raises:
        SharedParametersError: The property is missing, raises, or is a method; an entry is not a
            pair; a parameter is not the module's own; a factor is not a finite number above 0; or
            a parameter is listed twice with different factors.
    """
    owner = type(module).__qualname__
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    factors: dict[int, tuple[str, float]] = {}
    for position, entry in enumerate(_entries(module, owner)):
        where = f"entry {position} of {owner}.shared_parameters"
        is_sequence = isinstance(entry, (tuple, list))
        pair: list[Any] = [*cast("Iterable[Any]", entry)] if is_sequence else []
        if len(pair) != 2:
            raise SharedParametersError(
                f"{where} is a {type(entry).__name__}; give pairs of a parameter and a factor, "
                "such as (self.embedding.weight, 2)."
            )
        parameter, factor = pair
        if not isinstance(parameter, Tensor):
            raise SharedParametersError(
                f"{where} begins with a {type(parameter).__name__}; give a parameter of the module, "
                "such as self.embedding.weight."
            )
        name = names.get(id(parameter))
        if name is None:
            raise SharedParametersError(
                f"{where} is a tensor of shape {tuple(parameter.shape)} that is not among the "
                "module's parameters; give the parameter itself, not a view or a copy of it."
            )
        factor = _checked_factor(factor, f"the factor of {name!r}, {where},")
        known = factors.setdefault(id(parameter), (name, factor))
        if known[1] != factor:
            raise SharedParametersError(
                f"{name!r} is listed in {owner}.shared_parameters with the factors {known[1]:g} "
                f"and {factor:g}; give one factor for each parameter."
            )
    return factors


def _checked_factor(factor: Any, what: str) -> float:
    if not isinstance(factor, (int, float)) or isinstance(factor, bool):
        raise SharedParametersError(f"{what} is {factor!r}; give a number, such as 2.")
    if not (factor > 0 and math.isfinite(factor)):
        raise SharedParametersError(
            f"{what} is {factor}; gradients are divided by it, so give a finite number above 0."
        )
    return float(factor)


def _entries(module: nn.Module, owner: str) -> Iterable[Any]:
    example = (
        "give it a property of that name:\n"
        "    @property\n"
        "    def shared_parameters(self):\n"
        "        return [(self.embedding.weight, 2)]"
    )
    declared = inspect.getattr_static(module, "shared_parameters", None)
    if declared is None:
        raise SharedParametersError(
            f"{owner} has no `shared_parameters`, which the callback shared_parameters needs; "
            f"{example}\nor switch the callback off."
        )
    if isinstance(declared, (FunctionType, staticmethod, classmethod)):
        raise SharedParametersError(
            f"{owner}.shared_parameters is a method and should be a property; put @property above it."
        )
    try:
        # Not by getattr: nn.Module turns an AttributeError inside of a property into a message
        # that the property itself does not exist.
        value: Any = (
            declared.__get__(module, type(module)) if hasattr(declared, "__get__") else declared
        )
        entries: list[Any] = list(value)
    except Exception as error:
        raise SharedParametersError(
            f"{owner}.shared_parameters raises {type(error).__name__}: {error}; "
            "it should return pairs of a parameter and a factor. Repair the property."
        ) from error
    if not entries:
        log.warning("%s.shared_parameters is empty: no gradient is scaled", owner)
    return entries
