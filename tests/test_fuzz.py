"""Fuzzing: whatever is put in, out comes a valid configuration or a validation error."""

from __future__ import annotations

import copy
import math
import types
from collections import OrderedDict, UserDict
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nshtrainer import (
    CallbackConfigBase,
    ConfigFileError,
    LoggerConfigBase,
    TrainerConfig,
    manifest,
)

quick = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
deep = settings(max_examples=800, deadline=None, suppress_health_check=list(HealthCheck))
FORMATS = ("yaml", "json", "toml")

# ---- junk --------------------------------------------------------------------------------------


class Hostile:
    """An object on which everything that Python may try of itself fails."""

    def _fail(self, *args: Any) -> Any:
        raise RuntimeError("touched")

    __repr__ = __str__ = __bool__ = __len__ = __iter__ = __float__ = __index__ = __fspath__ = _fail
    __eq__ = __hash__ = __lt__ = __getitem__ = __contains__ = __int__ = __bytes__ = _fail


class Dodgy:
    """An object that fails when it is asked for anything."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


def around_itself() -> list[Any]:
    """A list and a mapping that hold themselves and each other."""
    items: list[Any] = []
    items += [items, {"name": items}]
    return items


def nested(depth: int) -> Any:
    """A value below many lists."""
    value: Any = 1
    for _ in range(depth):
        value = [value] if depth % 2 else {"name": value}
    return value


JUNK: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**400, -(10**5000), 10**5000, 0.0, -0.0, 1.0, 1.5, -1e-300,
    5e-324, 1e308, math.nan, math.inf, -math.inf, 1j, Decimal("NaN"), Decimal("1e999999"), "", " ", "a", "\x00", "\ud800",
    "\udcff" * 3, "\U0010ffff", "x" * 100_000, "nan", "inf", "1e999", "0x10", "true", "none", "all", "{", "}", "{}",
    "{0}{text}", "%s%d", "../..", "/", "://", "s3://x", "[", "(", "\\", "\n", "P9999999999Y", "99999999999:0:0:0",
    "-PT1S", "PT0S", "1" * 5000, b"", b"\xff\xfe", bytearray(b"x"), (), (1, "a"), [], [[]], {}, {"": ""}, {"name": ""},
    {"name": None}, {"name": "ema"}, {"name": "emma"}, {"name": "\ud800"}, {"name": "csv"}, {"name": "x" * 10_000},
    {1: 2}, {None: 1}, {("a",): 1}, {"a": {1: {2: 3}}}, {"$schema": 1}, {"__class__": 1}, {"model_config": 1},
    {"days": math.nan}, {"days": 1e300}, {"days": "x"}, {"weeks": 10**400}, {1, 2}, frozenset("ab"), range(3),
    OrderedDict(name="ema"), UserDict(name="ema", decay=0.5), types.MappingProxyType({"name": "ema"}), date(1, 1, 1),
    datetime(9999, 12, 31, tzinfo=timezone.utc), timedelta.max, timedelta.min, timedelta(microseconds=1), Path(), Path("\udcff"),
    Path("a\x00b"), UUID(int=0), object(), int, len, Ellipsis, NotImplemented, types, ValueError("x"), Hostile(), Dodgy(),
    around_itself(), around_itself()[1], nested(70), nested(5001), nested(20_000), TrainerConfig, CallbackConfigBase(),
    LoggerConfigBase(), lambda: None,
)  # fmt: skip

odd = st.integers(0, len(JUNK) - 1).map(JUNK.__getitem__)  # by index: some have no `repr`
junk = odd | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
CALLBACK_NAMES = sorted(manifest().of("nshtrainer.callbacks"))  # not what other tests register
LOGGER_NAMES = sorted(manifest().of("nshtrainer.loggers"))
names = sorted({*CALLBACK_NAMES, *LOGGER_NAMES})
words = st.sampled_from([*TrainerConfig.model_fields, *names, "name", "decay", "metadata", "label"])
documents = st.recursive(
    junk | words,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=5),
    max_leaves=15,
)
NEEDED = {
    "ema": {"decay": 0.9},
    "early_stopping": {"patience": 3},
    "gradient_skipping": {"threshold": 1.0},
}


def full_data() -> dict[str, Any]:
    """A valid configuration in which every slot is on and every callback and logger stands once."""
    slots = (
        "checkpoint_saving",
        "early_stopping",
        "lr_monitor",
        "log_epoch",
        "log_norms",
        "shared_parameters",
    )
    data: dict[str, Any] = {slot: NEEDED.get(slot, {}) for slot in slots}
    data |= {"auto_set_debug_flag": {}, "auto_validate_metrics": {"metrics": ["val/loss"]}}
    data["callbacks"] = [{"name": n, **NEEDED.get(n, {})} for n in CALLBACK_NAMES]
    data["loggers"] = [{"name": n} for n in LOGGER_NAMES]
    data |= {
        "primary_metric": {"name": "val/loss", "mode": "min"},
        "meta": {"a": [1, {"b": "c"}]},
        "id": "run1",
    }
    data |= {
        "max_time": "00:01:00:00",
        "devices": [0, 1],
        "val_check_interval": 0.5,
        "tags": ["a"],
        "seed": 1,
    }
    return TrainerConfig.model_validate(data).model_dump(mode="json")


FULL = full_data()
MINIMAL = TrainerConfig.model_validate(FULL)


# ---- what is allowed ---------------------------------------------------------------------------


def reads(data: Any) -> TrainerConfig | None:
    """The configuration that *data* is, None if it is refused; a refusal can be shown."""
    try:
        config = TrainerConfig.model_validate(data)
    except ValidationError as error:
        shows(error)
        return None
    return config


def shows(error: ValidationError) -> None:
    assert error.errors(include_url=False)
    assert str(error)
    assert len({p["loc"] for p in error.errors()}) >= 1


def writes(config: TrainerConfig) -> None:
    """A valid configuration can be written, and reads back equal; else the refusal says why."""
    for format_ in FORMATS:
        try:
            text = config.to_text(format_)
        except ConfigFileError:
            continue  # a null in TOML, or a path that UTF-8 cannot hold
        again = TrainerConfig.from_text(text, format_)
        fields = TrainerConfig.model_fields
        assert [n for n in fields if getattr(again, n) != getattr(config, n)] == []


def is_read_or_refused(text: str, format_: str) -> None:
    """Text is a configuration, or a `ConfigFileError` with a message of a bearable length."""
    try:
        config = TrainerConfig.from_text(text, format_)
    except ConfigFileError as error:
        message = str(error)
        assert message.startswith("<text>: ")
        assert max(map(len, message.splitlines())) < 5000
    else:
        writes(config)


# ---- text --------------------------------------------------------------------------------------

fragments = st.sampled_from(
    ["\n", "  ", "- ", ": ", ", ", "{", "}", "[", "]", "'", '"', "&a ", "*a", "|\n", ">\n", "!!", "---\n", "...", "#", "<<: ",
     "? ", "%YAML 1.1\n", "name", "ema", "callbacks", "meta", "seed", "1", "-1", "1e400", ".nan", "null", "true", "= ", "[[",
     "]]", "\t", "\x00", "\ufeff", "2020-01-01", "!!binary |\n  /w==\n", "!!set {a}", "!!omap [a: 1]", "\\u", "\\ud800", "0x"]
)  # fmt: skip
soup = st.lists(fragments | st.text(max_size=4), max_size=25).map("".join)
TEXTS = {format_: MINIMAL.to_text(format_) for format_ in FORMATS}


@st.composite
def damaged(draw: st.DrawFn) -> tuple[str, str]:
    """A valid file in which something was cut out, doubled or put in."""
    format_ = draw(st.sampled_from(FORMATS))
    text = TEXTS[format_]
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 30)))
        text = text[:start] + draw(fragments | st.just(text[start:end] * 2)) + text[end:]
    return text, format_


@quick
@given(st.text() | soup, st.sampled_from(FORMATS))
@example("meta: {a: &a [*a]}", "yaml")
@example("? {a: b}\n: c", "yaml")
@example("a: !!binary x", "yaml")
@example("[" * 3000, "yaml")
@example("{" * 3000, "json")
@example("a=" + "[" * 3000, "toml")
@example('{"id": "\\ud800"}', "json")
@example("seed: 1\r\n\x00", "yaml")
@example("- " * 2000, "yaml")
def test_any_text_is_read_or_refused(text: str, format_: str):
    """Text of any kind ends in a configuration or in one `ConfigFileError`."""
    is_read_or_refused(text, format_)


@quick
@given(damaged())
def test_a_damaged_file_is_read_or_refused(damage: tuple[str, str]):
    """A file that was half written or badly edited does, too."""
    is_read_or_refused(*damage)


# ---- data --------------------------------------------------------------------------------------


@quick
@given(documents)
def test_any_data_is_read_or_refused(data: Any):
    """Data of any kind ends in a configuration that can be written, or in a validation error."""
    if (config := reads(data)) is not None:
        writes(config)


@st.composite
def mutated(draw: st.DrawFn) -> dict[str, Any]:
    """The full configuration in which keys were dropped, renamed or given other values."""
    data = copy.deepcopy(FULL)
    shared = {id(value) for value in JUNK}  # to be put in, never to be changed
    for _ in range(draw(st.integers(1, 3))):
        node: Any = data
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            is_leaf = not isinstance(node[key], (dict, list)) or id(node[key]) in shared
            if is_leaf or draw(st.integers(0, 3)) == 0:
                mutate(draw, node, key)
                break
            node = node[key]
    return data


def mutate(draw: st.DrawFn, node: Any, key: Any) -> None:
    how = draw(st.sampled_from(["value", "value", "value", "drop", "rename", "add", "wrap"]))
    if how == "value":
        node[key] = draw(junk)
    elif how == "drop":
        del node[key]
    elif how == "wrap":
        node[key] = [node[key]]
    elif isinstance(node, list):
        node.append(draw(junk))
    elif how == "rename":
        node[draw(words | st.text(max_size=5) | st.integers() | st.none())] = node.pop(key)
    else:
        node[draw(words)] = draw(junk)


@quick
@given(mutated())
def test_any_mutation_of_a_valid_config_is_read_or_refused(data: dict[str, Any]):
    """A valid configuration with something wrong in it, however deep, does, too."""
    if (config := reads(data)) is not None:
        writes(config)


def each_model() -> list[tuple[str, Any]]:
    """Every configuration that is installed, by a readable name."""
    models: list[tuple[str, Any]] = [("trainer", MINIMAL)]
    models += [(f"callback {c.name}", c) for c in MINIMAL.callbacks]
    models += [(f"logger {c.name}", c) for c in MINIMAL.loggers]
    models += [
        ("metric", MINIMAL.primary_metric),
        ("directory", MINIMAL.directory),
        ("plugins", MINIMAL.plugins),
    ]
    return [*models, ("metadata", MINIMAL.callbacks[0].metadata)]


@pytest.mark.parametrize("model", [m for _, m in each_model()], ids=[n for n, _ in each_model()])
@pytest.mark.filterwarnings("ignore:`plugins:UserWarning")  # names of nothing, in `plugins`
def test_every_field_takes_every_kind_of_junk_or_refuses_it(model: Any):
    """All of `JUNK`, plain and inside a list and a mapping, assigned to each field of each config."""
    original = model.model_dump()
    for field in type(model).model_fields:
        for value in JUNK:
            for given_value in (value, [value], {"a": value}):
                config = model.model_copy()
                try:
                    setattr(config, field, given_value)
                except ValidationError as error:
                    shows(error)
                    assert config.model_dump() == original, field  # refused means unchanged
                else:
                    writable = (
                        config.model_dump_json if not has_odd_path(config) else config.model_dump
                    )
                    assert writable()


def has_odd_path(config: Any) -> bool:
    """Whether a path in *config* holds what UTF-8 cannot say; Linux has such file names."""
    found = (getattr(config, name) for name in type(config).model_fields)
    return any(isinstance(v, Path) and "\udcff" in str(v) for v in found)


@pytest.mark.parametrize("name", ["replace", "constructor"])
@pytest.mark.parametrize("value", [1, "x", None, Hostile()], ids=["int", "text", "null", "hostile"])
def test_an_unknown_keyword_is_a_validation_error(name: str, value: Any):
    """Whatever its value is."""
    make: Any = MINIMAL.replace if name == "replace" else TrainerConfig

    with pytest.raises(ValidationError, match="there is no such field"):
        make(no_such_field=value)


# ---- longer ------------------------------------------------------------------------------------


@pytest.mark.slow
@deep
@given(st.text() | soup, st.sampled_from(FORMATS))
def test_hundreds_of_texts(text: str, format_: str):
    """The search in text, for longer."""
    is_read_or_refused(text, format_)


@pytest.mark.slow
@deep
@given(documents | mutated())
def test_hundreds_of_documents(data: Any):
    """The search in data, for longer."""
    if (config := reads(data)) is not None:
        writes(config)


@pytest.mark.slow
@settings(deep, max_examples=400)
@given(damaged())
def test_hundreds_of_damaged_files(damage: tuple[str, str]):
    """The search in damaged files, for longer."""
    is_read_or_refused(*damage)
