"""Reading and writing configurations as YAML 1.2, JSON and TOML, with errors that point."""

from __future__ import annotations

import io
import json
import reprlib
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from .config import Config, values_beside
from .errors import ConfigFileError, NshTrainerError

__all__ = [
    "ConfigFileNotFoundError",
    "as_data",
    "load_data",
    "load_mapping",
    "parse",
    "read",
    "read_text",
    "render",
    "validated",
    "write",
]

C = TypeVar("C", bound=Config)
_FORMATS = {".yaml": "yaml", ".yml": "yaml", ".json": "json", ".toml": "toml"}


class ConfigFileNotFoundError(ConfigFileError, FileNotFoundError):
    """The configuration file does not exist."""


def format_of(path: Path, source: str | None = None) -> str:
    """The format that the suffix of *path* names; *source* is what errors call it.

    Raises:
        ConfigFileError: The suffix is not one of ours.
    """
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise ConfigFileError(
            f"{source or path}: the suffix {path.suffix!r} names no known format; expected one of "
            f"{', '.join(_FORMATS)}; rename the file"
        ) from None


def read(cls: type[C], path: Path) -> C:
    """Read *path* as a *cls*; see `Config.from_file`."""
    format_ = format_of(path)
    return parse(cls, read_text(path), format_, source=str(path))


def parse(cls: type[C], text: str, format_: str, *, source: str) -> C:
    """Read *text* as a *cls*; *source* names it in errors."""
    data = load_mapping(text, format_, source=source)
    data.pop("$schema", None)
    return validated(cls, data, lambda error: describe(error, source, text, format_), source)


def validated(
    cls: type[C], data: Any, describe: Callable[[ValidationError], str], source: str
) -> C:
    """*data* as a *cls*; *describe* puts pydantic's error into words, *source* names the file.

    Raises:
        ConfigFileError: It does not fit, or a validator of a plugin fails.
    """
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        raise ConfigFileError(describe(error)) from error
    except (NshTrainerError, Warning):  # ours; a warning that a test made an error
        raise
    except Exception as error:
        raise ConfigFileError(
            f"{source}: a plugin raised {type(error).__name__}: {error} ({_origin(error)}); report it "
            "to the plugin's author, or give the field that it checks another value"
        ) from error


def _origin(error: Exception) -> str:
    """The innermost line of Python that *error* passed: pydantic's own are not Python."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(last.filename).name}, line {last.lineno}, in {last.name}"


def read_text(path: Path, source: str | None = None) -> str:
    """The text of *path*; *source* is what errors call it.

    Raises:
        ConfigFileError: It is missing, unreadable or not UTF-8.
    """
    source = source or str(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigFileNotFoundError(f"{source}: there is no such file") from None
    except UnicodeDecodeError as error:
        raise ConfigFileError(
            f"{source}: not a text file in UTF-8 (byte {error.start}); save it as UTF-8"
        ) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigFileError(f"{_printable(source)}: cannot be read: {_reason(error)}") from error


def _printable(path: str) -> str:
    return path if path.isprintable() else repr(path)


def _reason(error: OSError | ValueError) -> str:
    return str(getattr(error, "strerror", None) or error)


# ---- text to data ------------------------------------------------------------------------------


def load_mapping(text: str, format_: str, *, source: str) -> dict[str, Any]:
    """Parse *text* into a mapping; an empty file is an empty mapping.

    Raises:
        ConfigFileError: The text is not *format_*, repeats a key, or is not a mapping.
    """
    data = load_data(text, format_, source=source)
    if not isinstance(data, dict):
        raise ConfigFileError(
            f"{source}: a mapping of field names to values is expected at the top, "
            f"not {type(data).__name__}"
        )
    return cast("dict[str, Any]", data)


def load_data(text: str, format_: str, *, source: str) -> Any:
    """Parse *text*, whatever is at its top; nothing at all is an empty mapping.

    Raises:
        ConfigFileError: The text is not *format_*, or repeats a key.
    """
    loaders: dict[str, Callable[[str], Any]] = {
        "yaml": _load_yaml,
        "json": _load_json,
        "toml": _load_toml,
    }
    if format_ not in loaders:
        raise ConfigFileError(
            f"the format {format_!r} is not known; expected one of {', '.join(loaders)}"
        )
    try:
        data = loaders[format_](text)
    except Exception as error:
        raise ConfigFileError(
            f"{source}: not valid {format_.upper()}: {_parser_message(error)}"
        ) from error
    return {} if data is None else data


def _load_yaml(text: str) -> Any:
    from ruamel.yaml import YAML

    data: Any = YAML(typ="safe", pure=True).load(text)  # pyright: ignore[reportUnknownMemberType] -- ruamel is untyped here
    if "*" in text:
        _check_aliases(data)
    return data


_MAX_VALUES = 1_000_000


def _check_aliases(data: Any) -> None:
    """A few lines of aliases to aliases stand for more values than fit into memory, or for themselves.

    Raises:
        ValueError: They do.
    """
    sizes: dict[int, int | None] = {}  # None: the value is being counted, so it holds itself

    def size(value: Any) -> int:
        held = _held_by(value)
        if held is None:
            return 1
        known = sizes.get(id(value), -1)
        if known is None:
            raise ValueError("an alias stands inside of what it names; write the value out")
        if known < 0:
            sizes[id(value)] = None
            sizes[id(value)] = known = 1 + sum(map(size, held))
        return known

    if (count := size(data)) > _MAX_VALUES:
        raise ValueError(f"its aliases stand for {count} values, and {_MAX_VALUES} are the limit")


def _held_by(value: Any) -> list[Any] | None:
    if isinstance(value, dict):
        return list(cast("dict[Any, Any]", value).values())
    return cast("list[Any]", value) if isinstance(value, list) else None


def _load_json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique) if text.strip() else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [k for k, _ in pairs]
        twice = next(k for k in keys if keys.count(k) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one mapping; remove one")
    return result


def _load_toml(text: str) -> Any:
    if sys.version_info >= (3, 11):
        import tomllib

        return tomllib.loads(text)
    import tomli  # pyright: ignore[reportMissingImports] -- installed where it is needed

    return tomli.loads(text)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType] -- as above


def _parser_message(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is not None:  # ruamel: its own text repeats the source over many lines
        problem = str(getattr(error, "problem", None) or error).strip().splitlines()[0]
        return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# ---- errors ------------------------------------------------------------------------------------


def describe(
    error: ValidationError, source: str, text: str = "", format_: str = "", *, top: str = ""
) -> str:
    """One line for each problem in *error*: line in the file, field, what is wrong, what was given.

    Args:
        error: What pydantic says.
        source: What to call the file.
        text: What was read, for the numbers of lines.
        format_: Its format.
        top: The field whose value is the whole of *text*; "" if *text* has the fields.
    """
    locate = _line_finder(text, format_)
    problems = error.errors(include_url=False, include_context=False)
    lines = [f"{source}: {len(problems)} problem{'s' if len(problems) > 1 else ''}"]
    for problem in problems:
        loc = problem["loc"]
        line = locate(loc[1:] if top and loc[:1] == (top,) else loc)
        where = f"line {line}, " if line else ""
        message = problem["msg"].removeprefix("Value error, ")
        given = problem["input"]
        if _is_redacted(given):
            message = "the value was a secret and was not written to the file; put it in again"
        shown = (
            ""
            if problem["type"] in {"missing", "extra_forbidden"}
            or isinstance(given, (Mapping, BaseModel))
            else f" (given: {_short(given)})"
        )
        lines.append(f"  {where}{dotted(loc)}: {message}{shown}")
    return "\n".join(lines)


def _is_redacted(value: Any) -> bool:
    from .run.redaction import REDACTED

    return isinstance(value, str) and REDACTED in value


def _short(value: Any) -> str:
    text = _SHORT.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


_SHORT = reprlib.Repr()  # never writes out a large value only to cut it off
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def dotted(loc: tuple[int | str, ...]) -> str:
    """A location as people write it: `callbacks[0].decay`."""
    out = ""
    for part in loc:
        out += f"[{part}]" if isinstance(part, int) else f".{part}" if out else str(part)
    return out or "(top)"


def _line_finder(text: str, format_: str) -> Callable[[tuple[int | str, ...]], int | None]:
    """A function from a location to its line; JSON is YAML 1.2, TOML's reader gives no lines."""
    if format_ not in {"yaml", "json"} or not text.strip():
        return lambda _loc: None
    from ruamel.yaml import YAML

    try:
        root: Any = YAML(pure=True).compose(text)  # pyright: ignore[reportUnknownMemberType] -- ruamel's is half typed
    except Exception:  # noqa: BLE001 -- the line is a courtesy; the message stands without it
        return lambda _loc: None

    def find(loc: tuple[int | str, ...]) -> int | None:
        node, line = root, None
        for part in loc:
            node, line = _child(node, part, line)
        return line

    return find


def _child(node: Any, part: int | str, line: int | None) -> tuple[Any, int | None]:
    """The node below *node* at *part*; itself if there is none (a tag, or a missing field)."""
    children: Any = getattr(node, "value", None)
    if node.id == "sequence" and isinstance(part, int) and part < len(children):
        return children[part], children[part].start_mark.line + 1
    if node.id == "mapping":
        for key, value in children:
            if key.value == part:
                return value, key.start_mark.line + 1
    return node, line


# ---- data to text ------------------------------------------------------------------------------


def write(config: Config, path: Path) -> Path:
    """Write *config* to *path*; see `Config.to_file`."""
    from .files import atomic_write_text

    text = render(config, format_of(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ConfigFileError(
            f"{_printable(str(path))}: cannot be written: {_reason(error)}"
        ) from error
    return path


def as_data(config: Config) -> dict[str, Any]:
    """*config* as the plain data that a file holds: names of fields, nothing that is computed.

    pydantic hides the value of a secret type behind stars; `[redacted]` is what all our files say.
    """
    from pydantic import Secret, SecretBytes, SecretStr

    data = config.model_dump(mode="json", by_alias=False, round_trip=True)
    for holder, key, live in values_beside(config, data):
        if isinstance(live, (Secret, SecretBytes, SecretStr)) and live.get_secret_value():
            from .run.redaction import REDACTED

            holder[key] = REDACTED
    return data


def render(config: Config, format_: str) -> str:
    """*config* as text; see `Config.to_text`."""
    writers: dict[str, Callable[[Config], str]] = {
        "yaml": lambda c: dump_yaml(as_data(c)),
        "json": lambda c: to_json(as_data(c), indent=2, inf_nan_mode="strings").decode() + "\n",
        "toml": _dump_toml,
    }
    if format_ not in writers:
        raise ConfigFileError(
            f"the format {format_!r} is not known; expected one of {', '.join(writers)}"
        )
    try:
        text = writers[format_](config)
        text.encode()
    except (UnicodeEncodeError, PydanticSerializationError) as error:
        raise ConfigFileError(
            f"the configuration cannot be written as {format_.upper()}: {error}; change the path or "
            "value that has no such form"
        ) from error
    return text


def _dump_toml(config: Config) -> str:
    import tomli_w

    return tomli_w.dumps(_without_null(config, as_data(config), ()))


def dump_yaml(data: Any) -> str:
    """*data* as YAML 1.2, in the order given, in block style."""
    from ruamel.yaml import YAML
    from ruamel.yaml.representer import SafeRepresenter

    representer: Any = type("Representer", (SafeRepresenter,), {})  # the class of all is left alone
    representer.add_representer(str, _yaml_text)
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.Representer = representer
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False
    yaml.width = 100
    yaml.allow_unicode = True
    buffer = io.StringIO()
    yaml.dump(data, buffer)
    return buffer.getvalue()


def _yaml_text(representer: Any, text: str) -> Any:
    """Line breaks and what cannot be seen stand in double quotes, where they have escapes."""
    text.encode()  # an escape could say half a surrogate pair, but no reader takes it back
    style = None if text.isprintable() else '"'
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _without_null(config: BaseModel, data: dict[str, Any], loc: tuple[int | str, ...]) -> Any:
    """TOML has no null: leave out what is null by default, write `false` for an optional slot."""
    out: dict[str, Any] = {}
    for key, value in data.items():
        field = type(config).model_fields.get(key)
        if value is not None:
            out[key] = _toml_value(getattr(config, key, None), value, (*loc, key))
        elif field is not None and (field.default is not None or field.default_factory is not None):
            if not _reads_false_as_null(config, key):
                raise _null_error((*loc, key))
            out[key] = False
    return out


def _reads_false_as_null(config: BaseModel, field: str) -> bool:
    """Whether false is a way to write null there, as in the slots of a `TrainerConfig`."""
    probe = config.model_copy()
    try:
        type(config).__pydantic_validator__.validate_assignment(probe, field, False)
    except ValidationError:
        return False
    return getattr(probe, field) is None


def _toml_value(live: Any, value: Any, loc: tuple[int | str, ...]) -> Any:
    if isinstance(value, dict):
        mapping = cast("dict[str, Any]", value)
        if isinstance(live, BaseModel):
            return _without_null(live, mapping, loc)
        return {k: _toml_value(None, v, (*loc, k)) for k, v in mapping.items()}
    if isinstance(value, list):
        items = cast("list[Any]", value)
        lives = (
            cast("list[Any]", list(live))  # pyright: ignore[reportUnknownArgumentType] -- of whatever
            if isinstance(live, (list, tuple))
            else [None] * len(items)
        )
        return [
            _toml_value(a, b, (*loc, i)) for i, (a, b) in enumerate(zip(lives, items, strict=True))
        ]
    if value is None:
        raise _null_error(loc)
    return value


def _null_error(loc: tuple[int | str, ...]) -> ConfigFileError:
    return ConfigFileError(
        f"{dotted(loc)} is null, which TOML cannot say; write the configuration as YAML or JSON"
    )
