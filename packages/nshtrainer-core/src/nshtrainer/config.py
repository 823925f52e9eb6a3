"""`Config`: a validated, serializable value; assignment is validated too."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    ValidationError,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler
from pydantic_core import CoreSchema
from typing_extensions import Self, override

from .validation_errors import clarified

__all__ = ["Config"]


class Config(BaseModel):
    """Base of every configuration: unknown fields are errors, and so are invalid assignments.

    A string literal below a field is its documentation, in editors, JSON schema and command line
    (`nshtrainer.field_docs.field_docs` reads it).
    """

    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=True,
        validate_default=True,
        ser_json_inf_nan="strings",  # JSON has no other way; YAML and TOML write .inf and inf
        protected_namespaces=(),
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
        for name, text in field_docs(cls).items():
            if name in fields:
                fields[name].setdefault("description", text)
        return schema

    def replace(self, **changes: Any) -> Self:
        """Return a validated copy with *changes*; the original is untouched and nothing is shared.

        Raises:
            pydantic.ValidationError: A change names no field, or its value does not fit.
        """
        kept = {k: getattr(self, k) for k in type(self).model_fields if k not in changes}
        return type(self).model_validate({**copy.deepcopy(kept), **changes})

    def revalidated(self) -> Self:
        """Return a deep copy that was validated anew, as if it had been read from a file.

        What was appended to a list or put into a mapping was not checked when it was put there.

        Raises:
            pydantic.ValidationError: Something that was put in does not fit.
        """
        return type(self).model_validate(
            copy.deepcopy(self.model_dump(round_trip=True, warnings="none"))
        )

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

        Raises:
            nshtrainer.errors.ConfigFileError: The suffix is unknown, or TOML would lose a null.
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
