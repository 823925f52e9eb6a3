"""`CallbackConfigBase`: the configuration of a callback, found by its `name`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import AfterValidator, Field, field_validator
from pydantic._internal._model_construction import ModelMetaclass
from pydantic_core import PydanticCustomError
from typing_extensions import dataclass_transform

from nshtrainer.config import Config
from nshtrainer.plugins import catalogue
from nshtrainer.plugins.manifest import CALLBACKS
from nshtrainer.registry import Registry
from nshtrainer.types import Int

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

    from nshtrainer.trainer.config import TrainerConfig

__all__ = ["CallbackConfigBase", "CallbackMetadataConfig", "callback_registry"]


def _label(value: str) -> str:
    if re.fullmatch(r"[\w.-]+", value) is None:
        raise PydanticCustomError(
            "label",
            "a label is made of letters, digits, `_`, `.` and `-`, which {value} is not",
            {"value": repr(value)},
        )
    return value


class CallbackMetadataConfig(Config):
    """How a callback takes its place among the others."""

    priority: Int = 0
    """Loading order: higher comes earlier; equal ones keep the order in which they were given.
    Lightning moves checkpoint callbacks behind all others; priority orders them among themselves."""

    ignore_if_exists: bool = False
    """Leave this callback out if there is another one of its class; of several such, one stays."""

    enabled_for_barebones: bool = False
    """Keep this callback when the trainer runs in barebones mode."""


@dataclass_transform(kw_only_default=True, field_specifiers=(Field,))
class _CallbackConfigMeta(ModelMetaclass):
    """Lets a class state `metadata` as a field, a class variable, a plain value or a dict alike."""

    def __new__(
        mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **kwargs: Any
    ) -> type:
        if "metadata" in namespace and any(isinstance(b, _CallbackConfigMeta) for b in bases):
            namespace.setdefault("__annotations__", {})["metadata"] = CallbackMetadataConfig
        return super().__new__(mcs, name, bases, namespace, **kwargs)


class CallbackConfigBase(Config, metaclass=_CallbackConfigMeta):
    """Base of every callback configuration.

    A subclass has a line `name: Literal["my_callback"] = "my_callback"`, is registered by
    `@callback_registry.register` or an entry point, and implements `create_callbacks`.
    """

    metadata: CallbackMetadataConfig = Field(default_factory=CallbackMetadataConfig)
    """Place among the other callbacks; a class sets its own default, a file overrides parts of it."""

    label: Annotated[str, AfterValidator(_label)] | None = None
    """Tells this callback from a second one of the same name: its state is kept under `name#label`."""

    added_by: str | None = None
    """The distribution that added this callback, if it was not the user."""

    @field_validator("metadata", mode="before")
    @classmethod
    def _merge_metadata(cls, value: Any) -> Any:
        if isinstance(value, dict):
            default: Any = cls.model_fields["metadata"].get_default(
                call_default_factory=True, validated_data={}
            )
            known = CallbackMetadataConfig.model_validate(default).model_dump()
            return {**known, **cast("dict[str, Any]", value)}
        return value

    @property
    def identity(self) -> str:
        """What must differ between two callbacks of one run: `name`, or `name#label`."""
        name = str(getattr(self, "name", type(self).__name__))
        return f"{name}#{self.label}" if self.label else name

    def create_callbacks(self, trainer_config: TrainerConfig) -> Iterable[Callback]:
        """Yield the Lightning callbacks that this configuration stands for, none if switched off.

        Called once for each trainer; import the callback here, so that reading a configuration
        never imports torch.
        """
        raise NotImplementedError(f"{type(self).__qualname__} does not implement create_callbacks")

    def build(self, trainer_config: TrainerConfig) -> Iterator[Callback]:
        """Yield the callbacks with this configuration's metadata attached.

        A configuration that holds others calls this on them, so that theirs is honoured too.

        Raises:
            PluginContractError: `create_callbacks` gave something else than callbacks, or called
                `sys.exit`.
        """
        from .creation import created

        for callback in created(self, trainer_config):
            if metadata_of(callback) is None:
                self.with_metadata(callback)
            yield callback

    def with_metadata(self, callback: Callback, **overrides: Any) -> Callback:
        """Attach this configuration's metadata with *overrides* to one callback that it yields."""
        callback.__dict__[_ATTRIBUTE] = self.metadata.replace(**overrides)
        return callback


_ATTRIBUTE = "_nshtrainer_metadata"


def metadata_of(callback: Callback) -> CallbackMetadataConfig | None:
    """The metadata that a configuration attached to *callback*; None for one made by hand."""
    return callback.__dict__.get(_ATTRIBUTE)


callback_registry: Registry[CallbackConfigBase] = Registry(
    CALLBACKS, CallbackConfigBase, what="callback", known=catalogue.CALLBACKS
)
"""Callback name -> configuration class."""
