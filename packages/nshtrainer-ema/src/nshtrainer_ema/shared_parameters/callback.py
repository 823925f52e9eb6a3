"""Divides the gradients of parameters that are used several times, once per optimizer step."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from typing_extensions import override

from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.runtime.driver import attach
from nshtrainer.runtime.gradients import GradientStep

from .config import SharedParametersCallbackConfig
from .factors import (
    SharedParameter,
    SharedParametersError,
    declared_parameters,
    tied_parameters,
)

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["SharedParametersCallback", "SharedParametersError"]

log = logging.getLogger(__name__)

_SHOWN = 10
"""So many parameters are named in the log; the rest is a number."""


class SharedParametersCallback(ConfiguredCallback[SharedParametersCallbackConfig]):
    """Divides the gradient of each shared parameter by its factor.

    The module's property `shared_parameters` gives pairs of a parameter and a factor; without the
    property, each parameter that the module has under several names is divided by their number.
    Both are read once, when training starts, and what is done is logged then, on rank zero. The
    division happens once per optimizer step, after accumulation and before clipping, for the
    parameters of that optimizer; it needs no communication and no wait for the device.
    """

    config_class = SharedParametersCallbackConfig

    def __init__(
        self, config: SharedParametersCallbackConfig | None = None, **options: Any
    ) -> None:
        super().__init__(config, **options)
        self._forget()

    def _forget(self) -> None:
        self._shared: dict[int, SharedParameter] = {}
        self._of_optimizer: dict[int, tuple[list[Tensor], list[SharedParameter]]] = {}
        self._without_gradient: set[str] = set()

    @property
    def factors(self) -> dict[str, float]:
        """Name of each shared parameter to what its gradient is divided by; empty unless training."""
        return {shared.name: shared.factor for shared in self._shared.values()}

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
        self._forget()
        shared, report = find_shared_parameters(pl_module, detect_ties=self.config.detect_ties)
        self._shared = {id(each.parameter): each for each in shared}
        if trainer.is_global_zero:
            log.log(logging.INFO if shared else logging.WARNING, "%s", report)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._forget()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._forget()

    def _transform(self, step: GradientStep) -> None:
        grads: dict[float, list[Tensor]] = {}
        missing: list[str] = []
        for shared in self._stepped(step):
            parameter = shared.parameter
            if parameter.grad is not None:
                grads.setdefault(shared.factor, []).append(parameter.grad)
            elif parameter.requires_grad:
                missing.append(shared.name)
        for factor, divided in grads.items():
            divide(divided, factor)
        if missing:
            self._warn_of_missing(step, missing)

    def _stepped(self, step: GradientStep) -> list[SharedParameter]:
        """The shared parameters among those of the step; kept while they are the same list."""
        known = self._of_optimizer.get(step.optimizer_index)
        if known is not None and known[0] is step.parameters:
            return known[1]
        ids = map(id, step.parameters)
        shared = [self._shared[number] for number in ids if number in self._shared]
        self._of_optimizer[step.optimizer_index] = step.parameters, shared
        return shared

    def _warn_of_missing(self, step: GradientStep, missing: list[str]) -> None:
        new = [name for name in missing if name not in self._without_gradient]
        self._without_gradient.update(new)
        if new and step.trainer.is_global_zero:
            log.warning(
                "shared parameters without a gradient at step %d: %s; they are not scaled "
                "there. Take them out of shared_parameters if they are never used.",
                step.step,
                ", ".join(new),
            )


def find_shared_parameters(
    module: LightningModule, *, detect_ties: bool
) -> tuple[list[SharedParameter], str]:
    """Return the shared parameters of *module*, and a sentence that says what is done and why.

    Raises:
        SharedParametersError: There are none, or they are not what they should be.
    """
    owner = type(module).__qualname__
    declared, tied = declared_parameters(module), tied_parameters(module)
    if declared is None:
        if not (tied and detect_ties):
            raise SharedParametersError(_nothing_to_scale(owner, tied))
        why = "which the module has under several names"
        return tied, f"gradients divided at each optimizer step: {_listed(tied)}; {why}"
    report = f"gradients divided at each optimizer step: {_listed(declared)}"
    if not declared:
        report = f"{owner}.shared_parameters is empty: no gradient is scaled"
    listed = {id(each.parameter) for each in declared}
    if unlisted := [each.names for each in tied if id(each.parameter) not in listed]:
        more = ", ".join(" = ".join(names) for names in unlisted[:_SHOWN])
        report += f"; tied, but not in {owner}.shared_parameters, and left alone: {more}"
    return declared, report


@torch.no_grad()
def divide(grads: list[Tensor], factor: float) -> None:
    """Divide *grads* in place: plain dense ones in one call, sparse ones and DTensors each by itself."""
    plain: list[Tensor] = []
    for grad in grads:
        if type(grad) is Tensor and grad.layout == torch.strided:
            plain.append(grad)
        else:
            grad.div_(factor)
    if plain:
        torch._foreach_div_(plain, factor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] -- public only through optimizers


def _listed(shared: list[SharedParameter]) -> str:
    texts = [f"{' = '.join(each.names)} by {each.factor:g}" for each in shared[:_SHOWN]]
    if len(shared) > _SHOWN:
        texts.append(f"and {len(shared) - _SHOWN} more")
    return ", ".join(texts)


def _nothing_to_scale(owner: str, tied: list[SharedParameter]) -> str:
    if tied:
        why = f"and detect_ties is off ({_listed(tied)} would be divided with it)"
    else:
        why = "and none of its parameters has a second name"
    return (
        f"{owner} has no `shared_parameters`, {why}, so the callback shared_parameters has nothing "
        "to do; give it a property of that name:\n"
        "    @property\n"
        "    def shared_parameters(self):\n"
        "        return [(self.embedding.weight, 2)]\n"
        "or switch the callback off."
    )
