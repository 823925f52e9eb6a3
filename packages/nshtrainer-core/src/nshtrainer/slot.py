"""The annotation half of the registry: how a field that holds a registered config is validated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from pydantic import BaseModel, GetCoreSchemaHandler, GetJsonSchemaHandler, ValidationError
from pydantic_core import PydanticCustomError, core_schema, to_json

from .validation_errors import relocated

if TYPE_CHECKING:
    from .registry import Registry

__all__ = ["Slot"]

T = TypeVar("T", bound=BaseModel)


class Slot(Generic[T]):
    """Validates, serializes and describes a registered config; see `Registry.slot`."""

    def __init__(self, registry: Registry[T], names: tuple[str, ...], default: str | None) -> None:
        self.registry, self.names, self.default = registry, names, default

    def __copy__(self) -> Slot[T]:
        return self

    def __deepcopy__(self, memo: Any) -> Slot[T]:
        return self

    def _validate(self, value: Any, info: core_schema.ValidationInfo, *, strict: bool) -> T:
        if isinstance(value, self.registry.base):
            cls, value, name = self._instance(value)
        elif isinstance(value, Mapping):
            mapping = cast("Mapping[str, Any]", value)
            cls, name = self._class_for(mapping)
        else:
            field = self.registry.discriminator
            needed = "of options" if self.default else f"with the field `{field}`"
            raise PydanticCustomError(
                "config_type",
                "a mapping {needed}, or a {base}, is expected, not {type}",
                {
                    "needed": needed,
                    "base": self.registry.base.__qualname__,
                    "type": type(value).__name__,
                },
            )
        validator = cls.__pydantic_validator__
        try:
            if strict and info.mode == "json":  # keep JSON's own rules of strictness
                return validator.validate_json(to_json(value), strict=True, context=info.context)
            return validator.validate_python(value, strict=strict or None, context=info.context)
        except ValidationError as error:  # only on the way out: put the name into the location
            tag = () if len(self.names) == 1 else (name,)
            raise relocated(error, *tag) from None

    def _instance(self, value: T) -> tuple[type[T], Any, str]:
        """The class to validate *value* with; an instance of a redefined class as its dump."""
        from .config import input_of
        from .registry import origin_of

        cls = type(value)
        name = str(getattr(value, self.registry.discriminator, ""))
        self._check_allowed(name)
        current = self.registry.resolve(name)
        if current is cls:
            return cls, value, name
        if isinstance(current, type) and origin_of(current) == origin_of(cls):
            return current, input_of(value), name
        if current is not None and not isinstance(current, type):
            raise self.registry.problem(name)
        raise PydanticCustomError(
            "not_registered",
            "{cls} is not registered under the name {name}; decorate the class with "
            "@{what}_registry.register",
            {"cls": cls.__qualname__, "name": repr(name), "what": self.registry.what},
        )

    def _class_for(self, value: Mapping[str, Any]) -> tuple[type[T], str]:
        registry = self.registry
        name = value.get(registry.discriminator, self.default)
        if name is None:
            raise PydanticCustomError(
                "name_missing",
                "the field `{field}` is missing; it says which {what} is meant. Known: {known}",
                {
                    "field": registry.discriminator,
                    "what": registry.what,
                    "known": ", ".join(self.names or registry.names()),
                },
            )
        cls = registry.get(name) if isinstance(name, str) else None
        if cls is None:
            raise registry.problem(name)
        self._check_allowed(name)
        return cls, name

    def _check_allowed(self, name: str) -> None:
        if self.names and name not in self.names:
            raise PydanticCustomError(
                "wrong_name",
                "{name} has no place here; expected {allowed}",
                {"name": repr(name), "allowed": " or ".join(map(repr, self.names))},
            )

    def _serialize(
        self, value: Any, handler: core_schema.SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        out: dict[str, Any] = handler(value)
        field = self.registry.discriminator
        if isinstance(value, BaseModel) and field not in out:  # exclude_unset and the like
            return {field: getattr(value, field), **out}
        return out

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> core_schema.CoreSchema:
        serializer = core_schema.wrap_serializer_function_ser_schema(
            self._serialize, schema=core_schema.any_schema()
        )
        return core_schema.lax_or_strict_schema(
            core_schema.with_info_plain_validator_function(
                lambda v, info: self._validate(v, info, strict=False)
            ),
            core_schema.with_info_plain_validator_function(
                lambda v, info: self._validate(v, info, strict=True)
            ),
            serialization=serializer,
        )

    def __get_pydantic_json_schema__(
        self, schema: Any, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        registry = self.registry
        names = self.names or registry.names()
        classes = {n: c for n in names if (c := registry.get(n)) is not None}
        if not classes:
            missing = ", ".join(self.names) or f"any {registry.what}"
            return {"not": {}, "description": f"needs a distribution that provides {missing}"}
        choices = {n: c.__pydantic_core_schema__ for n, c in classes.items()}
        out = handler(core_schema.tagged_union_schema(choices, registry.discriminator))
        if (
            self.default is None and "oneOf" in out
        ):  # pydantic leaves the name optional: it has a default
            out["oneOf"] = [{**c, "required": [registry.discriminator]} for c in out["oneOf"]]
        return out
