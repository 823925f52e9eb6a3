"""`Config`: a validated, serializable value; assignment is validated too."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema
from typing_extensions import Self, override

from .validation_errors import clarified

__all__ = ["Config", "input_of", "values_beside"]


class Config(BaseModel):
    """Base of every configuration: unknown fields are errors, and so are invalid assignments.

    A field with an alias is read under both names, and written under its own.

    A string literal below a field is its documentation, in editors, JSON schema and command line
    (`nshtrainer.field_docs.field_docs` reads it).
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        ser_json_inf_nan="strings",  # JSON has no other way; YAML and TOML write .inf and inf
        protected_namespaces=(),
        validate_by_name=True,  # what is written under a field's own name is read back
        str_min_length=0,  # any length; but half a surrogate pair, which no file can hold, is refused
    )

    @model_validator(mode="wrap")
    @classmethod
    def _say_what_was_meant(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        """A misspelt field names the nearest one, and a value of no type that fits is one error."""
        try:
            return handler(data)
        except ValidationError as error:
            clear = clarified(error, cls.model_fields, data)
            if clear is error:
                raise
            raise clear from None

    if not TYPE_CHECKING:  # a checker that sees it allows every attribute

        def __setattr__(self, name: str, value: Any) -> None:
            """Assign; what a rule across fields refuses is undone (pydantic would leave it)."""
            kept, given = dict(self.__dict__), set(self.model_fields_set)
            try:
                super().__setattr__(name, value)
            except ValidationError:
                object.__setattr__(self, "__dict__", kept)
                object.__setattr__(self, "__pydantic_fields_set__", given)
                raise

    @classmethod
    @override
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        from .field_docs import field_docs

        schema = handler(core_schema)
        fields = handler.resolve_ref_schema(schema).get("properties", {})
        for name, field in cls.model_fields.items():
            _allow_own_name(schema, fields, name, field)
        for name, text in field_docs(cls).items():
            if name in fields:
                fields[name].setdefault("description", text)
        return schema

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with *changes*; the original is untouched and nothing is shared.

        Raises:
            pydantic.ValidationError: A change names no field, or its value does not fit.
        """
        fields = type(self).model_fields
        others = changes.keys() - fields.keys()  # aliases, or mistakes
        kept = {
            name: getattr(self, name)
            for name, field in fields.items()
            if name not in changes and not (others and others & _aliases(field))
        }
        return type(self).model_validate({**copy.deepcopy(kept), **changes})

    def revalidated(self) -> Self:
        """Return a deep copy that was validated anew, as if it had been read from a file.

        What was appended to a list or put into a mapping was not checked when it was put there. Fields
        that no file shows (`exclude=True`) are kept.

        Raises:
            pydantic.ValidationError: Something that was put in does not fit.
        """
        return type(self).model_validate(input_of(self))

    @classmethod
    def from_file(cls, path: str | Path) -> Self:
        """Read a configuration from a YAML, JSON or TOML file; the suffix says which.

        YAML is read as version 1.2 (`1e-4` is a number, `on` is text). A top-level `$schema` key is
        for editors and ignored.

        Raises:
            nshtrainer.errors.ConfigFileError: The file is missing, unreadable or not valid; the
                message names the file, the line where the format gives one, and each field.
        """
        from .config_files import read

        return read(cls, Path(path))

    @classmethod
    def from_text(cls, text: str, format: str = "yaml") -> Self:  # noqa: A002 -- the plain word
        """Read a configuration from *text*, which is `yaml`, `json` or `toml`.

        Raises:
            nshtrainer.errors.ConfigFileError: As `from_file`.
        """
        from .config_files import parse

        return parse(cls, text, format, source="<text>")

    def to_file(self, path: str | Path) -> Path:
        """Write the configuration as YAML, JSON or TOML; the suffix says which.

        The file is replaced as a whole: a reader never sees half of it. Missing folders are made.
        pydantic's secret types (`SecretStr`) are written as `[redacted]`.

        Raises:
            nshtrainer.errors.ConfigFileError: The suffix is unknown, TOML would lose a null, or the file
                cannot be written.
        """
        from .config_files import write

        return write(self, Path(path))

    def to_text(self, format: str = "yaml") -> str:  # noqa: A002 -- the plain word
        """Return the configuration as `yaml`, `json` or `toml` text.

        Raises:
            nshtrainer.errors.ConfigFileError: TOML would lose a null.
        """
        from .config_files import render

        return render(self, format)


def _aliases(field: FieldInfo) -> set[str]:
    """The other names under which *field* is read."""
    alias = field.validation_alias
    choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
    return {choice for choice in choices if isinstance(choice, str)}


def _allow_own_name(
    schema: dict[str, Any], fields: dict[str, Any], name: str, field: FieldInfo
) -> None:
    """Let a file use the field's own name: the JSON schema of pydantic has its alias only."""
    alias = field.validation_alias
    if isinstance(alias, str) and alias in fields and name not in fields:
        fields[name] = copy.deepcopy(fields[alias])
        if alias in schema.get("required", ()):  # one of the two is; pydantic says which is missing
            schema["required"].remove(alias)


def input_of(config: BaseModel) -> dict[str, Any]:
    """*config* as data of its own that validates to an equal one, hidden fields included."""
    data = copy.deepcopy(config.model_dump(round_trip=True, by_alias=False, warnings="none"))
    _put_hidden(config, data)
    for holder, key, live in values_beside(config, data):
        if isinstance(holder[key], dict) and isinstance(live, BaseModel):
            _put_hidden(live, holder[key])
    return data


def _put_hidden(live: BaseModel, data: dict[str, Any]) -> None:
    """Put into *data* what a dump of *live* leaves out (`Field(exclude=True)`)."""
    for name, field in type(live).model_fields.items():
        if name not in data and (field.exclude or field.exclude_if is not None):
            data[name] = copy.deepcopy(getattr(live, name))


def values_beside(live: Any, data: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Each value in *data*, a dump of *live*: what holds it, its key there, and the living value."""
    left: list[tuple[Any, Any]] = [(live, data)]
    while left:
        live, data = left.pop()
        for key, value in _parts(live, data):
            yield data, key, value
            if isinstance(data[key], (dict, list, tuple)):
                left.append((value, data[key]))


def _parts(live: Any, data: Any) -> Iterable[tuple[Any, Any]]:
    """The keys of *data* with the values of *live* that stand behind them."""
    if isinstance(data, dict):
        keys = [*cast("dict[Any, Any]", data)]
        if isinstance(live, BaseModel):
            fields = type(live).model_fields
            return [(key, getattr(live, key)) for key in keys if key in fields]
        values = [*cast("Mapping[Any, Any]", live).values()] if isinstance(live, Mapping) else []
        return zip(keys, values, strict=True) if len(values) == len(keys) else ()
    if isinstance(live, (list, tuple)):
        items = cast("list[Any]", live)
        return enumerate(items) if len(items) == len(data) else ()
    return ()
