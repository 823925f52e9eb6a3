"""`ConfiguredCallback`: base of callbacks that are described by a configuration."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from lightning.pytorch.callbacks import Callback
from typing_extensions import override

from .base import CallbackConfigBase

__all__ = ["HOT_HOOKS", "ConfiguredCallback", "resolve_config", "silence_unused_hooks"]

C = TypeVar("C", bound=CallbackConfigBase)

HOT_HOOKS = (
    "on_after_backward",
    "on_before_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
    "on_predict_batch_end",
    "on_predict_batch_start",
    "on_test_batch_end",
    "on_test_batch_start",
    "on_train_batch_end",
    "on_train_batch_start",
    "on_validation_batch_end",
    "on_validation_batch_start",
)


def silence_unused_hooks(callback: Callback, *unused: str) -> None:
    """Set the per-batch hooks that *callback* does not implement, and *unused*, to None.

    Lightning skips what is not callable; otherwise it walks, profiles and calls every empty method
    at every batch.
    """
    for hook in HOT_HOOKS:
        if getattr(type(callback), hook) is getattr(Callback, hook):
            callback.__dict__[hook] = None
    for hook in unused:
        callback.__dict__[hook] = None


def resolve_config(config_class: type[C], config: C | None, options: dict[str, Any]) -> C:
    """The configuration of a callback that takes one, or the options of one as keywords.

    Raises:
        TypeError: Both were given, or *config* is of another class.
        pydantic.ValidationError: An option does not fit.
    """
    if config is None:
        return config_class.model_validate(options)
    if options:
        raise TypeError(
            f"give a {config_class.__name__} or its options as keywords, not both "
            f"(got {', '.join(sorted(options))} as well)"
        )
    if not isinstance(config, config_class):
        raise TypeError(f"a {config_class.__name__} is expected, not {type(config).__name__}")
    return config


class ConfiguredCallback(Callback, Generic[C]):
    """A Lightning callback that takes its configuration, or that configuration's options.

    A subclass sets `config_class` and writes its own `__init__`, so that editors and LightningCLI
    see the configuration's class:

        def __init__(self, config: MyConfig | None = None, **options: Any) -> None:
            super().__init__(config, **options)

    Args:
        config: The configuration.
        options: Its fields, if no configuration is given.

    Raises:
        TypeError: Both were given.
        pydantic.ValidationError: An option does not fit.
    """

    config_class: ClassVar[type[CallbackConfigBase]]
    """The class of the configuration."""

    config: C
    """The configuration; not shared with any other run."""

    def __init__(self, config: C | None = None, **options: Any) -> None:
        self.config = resolve_config(self.config_class, config, options)  # pyright: ignore[reportAttributeAccessIssue] -- the class variable cannot carry C
        silence_unused_hooks(self)

    @property
    @override
    def state_key(self) -> str:
        """`nshtrainer.<name>` or `nshtrainer.<name>#<label>`: survives renamed classes."""
        return f"nshtrainer.{self.config.identity}"
