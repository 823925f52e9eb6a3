"""`Config` as a value and as a file: strict, documented, and with errors that point."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import (
    Field,
    SecretStr,
    ValidationError,
    computed_field,
    field_validator,
    model_validator,
)

from nshtrainer import (
    CallbackConfigBase,
    CallbackMetadataConfig,
    Config,
    ConfigFileError,
    DirectoryConfig,
    LoggerConfigBase,
    MetricConfig,
    PluginsConfig,
    TrainerConfig,
)
from nshtrainer.loggers.csv import CSVLoggerConfig
from nshtrainer.loggers.tensorboard import TensorboardLoggerConfig

OWN = (
    CallbackConfigBase,
    CallbackMetadataConfig,
    DirectoryConfig,
    LoggerConfigBase,
    MetricConfig,
    PluginsConfig,
    TrainerConfig,
    CSVLoggerConfig,
    TensorboardLoggerConfig,
)
OFF = {"loggers": [], "callbacks": []}


class Inner(Config):
    """A configuration inside another one."""

    numbers: list[int] = Field(default_factory=list)
    """Some numbers."""


class Outer(Config):
    """A configuration of a test."""

    inner: Inner = Field(default_factory=Inner)
    """Another one."""

    low: float = 0.0
    """Below `high`."""

    high: float | None = 1.0
    """Above `low`."""

    kind: int | Literal["all"] | list[Literal["a", "b"]] = 1
    """A choice of types."""

    @model_validator(mode="after")
    def _ordered(self) -> Outer:
        if self.high is not None and self.low > self.high:
            raise ValueError("`low` is above `high`; exchange them")
        return self


class Odd(Config):
    """What pydantic allows in a configuration, and a third party may use."""

    lr: float = Field(0.1, alias="learningRate")
    """Has another name outside."""

    hidden: int = Field(1, exclude=True)
    """Stands in no file."""

    secret: SecretStr = SecretStr("")
    """Does not show itself."""

    checked: int = 0
    """Has a validator with a mistake."""

    @computed_field
    @property
    def double(self) -> float:
        """Is no field."""
        return 2 * self.lr

    @field_validator("checked")
    @classmethod
    def _look_up(cls, value: int) -> int:
        return {0: 0}[value]


class HoldsOdd(Config):
    """Such configurations further inside."""

    odd: Odd = Field(default_factory=Odd)
    """One."""

    many: dict[str, list[Odd]] = Field(default_factory=dict)
    """More."""


# ---- as a value --------------------------------------------------------------------------------


def test_a_field_that_does_not_exist_is_refused_however_it_is_given():
    """A misspelt option is never ignored: in the constructor, in `replace`, by assignment."""
    for attempt in (
        lambda: Outer(lwo=1),
        lambda: Outer().replace(lwo=1),
        lambda: Outer.model_validate({"lwo": 1}),
        lambda: setattr(Outer(), "lwo", 1),
    ):
        with pytest.raises(ValidationError, match="lwo"):
            attempt()
    with pytest.raises(ValidationError, match="there is no such field; did you mean 'low'"):
        Outer(lwo=1)


def test_an_assignment_is_validated_and_a_refused_one_changes_nothing():
    """The types and the rules across fields hold after construction too."""
    config = Outer(low=0.5)

    with pytest.raises(ValidationError, match="number"):
        config.low = "x"
    with pytest.raises(ValidationError, match="exchange them"):
        config.low = 2.0
    assert config == Outer(low=0.5)
    config.low = 1
    assert config.low == 1.0


def test_replace_gives_a_validated_copy_that_shares_nothing():
    """The original stays as it was, whatever is done to the copy."""
    config = Outer(inner=Inner(numbers=[1]))
    copy = config.replace(low=0.5)
    copy.inner.numbers.append(2)

    assert (config.low, config.inner.numbers) == (0.0, [1])
    assert (copy.low, copy.inner.numbers) == (0.5, [1, 2])
    with pytest.raises(ValidationError, match="exchange them"):
        config.replace(low=3.0)


def test_revalidated_finds_what_was_put_in_unchecked():
    """A list does not check what is appended to it; the configuration does when it is used."""
    config = Outer(inner=Inner(numbers=[1]))
    config.inner.numbers.append("x")

    with pytest.raises(ValidationError) as caught:
        config.revalidated()

    assert caught.value.errors()[0]["loc"] == ("inner", "numbers", 1)


@pytest.mark.parametrize("value", [1.5, "some", None], ids=repr)
def test_a_value_that_fits_none_of_several_types_is_one_problem(value: Any):
    """Its place is the field, not pydantic's names of the types; each type has its say."""
    with pytest.raises(ValidationError) as caught:
        Outer(kind=value)

    (problem,) = caught.value.errors()
    assert problem["loc"] == ("kind",)
    assert "; or: Input should be 'all'; or: Input should be a valid list" in problem["msg"]
    assert Outer(kind=["a"]).kind == ["a"]


@pytest.mark.parametrize("cls", OWN, ids=lambda c: c.__name__)
def test_the_string_below_a_field_is_its_description(cls: type[Config]):
    """Every field of every configuration of the core is documented in its JSON schema."""
    properties = cls.model_json_schema().get("properties", {})
    undocumented = [n for n, p in properties.items() if n != "name" and not p.get("description")]

    assert not undocumented
    assert cls.__doc__


# ---- as a file ---------------------------------------------------------------------------------


def test_a_field_with_an_alias_is_read_under_both_names():
    """And changed under both; it is written under its own."""
    made = HoldsOdd.model_validate({"odd": {"learningRate": 3}})

    assert made == HoldsOdd.model_validate({"odd": {"lr": 3}})
    assert made.revalidated() == made
    assert made.odd.replace(learningRate=4).lr == made.odd.replace(lr=4).lr == 4
    assert MetricConfig(name="a", mode="min").replace(monitor="b").name == "b"
    assert "lr: 3.0" in made.to_text()
    assert "learningRate" not in made.to_text()
    assert {"lr", "learningRate"} <= Odd.model_json_schema()["properties"].keys()


@pytest.mark.parametrize("format_", ["yaml", "json", "toml"])
def test_what_is_computed_is_in_no_file(format_: str):
    """So the file can be read again."""
    made = HoldsOdd.model_validate({"odd": {"lr": 3}, "many": {"a": [{"lr": 4}]}})

    assert "double" not in made.to_text(format_)
    assert HoldsOdd.from_text(made.to_text(format_), format_) == made


def test_a_hidden_field_survives_a_new_validation():
    """However deep it is: `revalidated` and `replace` give an equal configuration; a file has none."""
    hides = Odd(hidden=5)
    made = HoldsOdd(odd=hides, many={"a": [hides, Odd()]})
    again = made.revalidated()

    assert again == made.replace() == made
    assert again.many["a"][0] is not hides
    assert again.odd.hidden == again.many["a"][0].hidden == 5
    assert "hidden" not in made.to_text()


@pytest.mark.parametrize("format_", ["yaml", "json", "toml"])
def test_a_secret_type_is_redacted_in_every_file(format_: str):
    """With the words that stand for every secret; one that is empty stays empty."""
    text = HoldsOdd(odd=Odd(secret=SecretStr("hunter2")), many={"a": [Odd()]}).to_text(format_)

    assert text.count("[redacted]") == 1
    assert "hunter2" not in text
    assert "***" not in text


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".toml", ".YAML"])
def test_the_suffix_names_the_format(tmp_path: Path, suffix: str):
    """What is written to a file is what is read from it; folders are made."""
    config = TrainerConfig(max_epochs=3, meta={"a": "on"}, **OFF)
    path = config.to_file(tmp_path / "new" / f"run{suffix}")

    assert path.is_file()
    assert TrainerConfig.from_file(path) == config
    assert TrainerConfig.from_file(str(path)) == config


@pytest.mark.parametrize("name", ["run.ini", "run", "yaml"])
def test_an_unknown_suffix_is_refused_before_anything_is_touched(tmp_path: Path, name: str):
    """Both ways, with the suffixes that are known."""
    path = tmp_path / name

    for attempt in (lambda: TrainerConfig.from_file(path), lambda: TrainerConfig().to_file(path)):
        with pytest.raises(
            ConfigFileError, match=r"expected one of .yaml, .yml, .json, .toml; rename"
        ):
            attempt()
    assert not path.exists()


@pytest.mark.parametrize(
    ("suffix", "text"), [(".yaml", "seed: 3"), (".json", '{"seed": 3}'), (".toml", "seed = 3")]
)
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, suffix: str, text: str):
    """Some editors of Windows write one."""
    path = tmp_path / f"run{suffix}"
    path.write_text(text, encoding="utf-8-sig")

    assert TrainerConfig.from_file(path).seed == 3


def test_a_path_that_cannot_be_is_a_config_file_error(tmp_path: Path):
    """A NUL, or a file where a folder is needed, to read from and to write to."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigFileError, match=r"a\\x00.yaml': cannot be read: embedded null"):
        TrainerConfig.from_file("a\0.yaml")
    with pytest.raises(ConfigFileError, match=r"a\\x00.yaml': cannot be written: embedded null"):
        TrainerConfig().to_file(tmp_path / "a\0.yaml")
    with pytest.raises(ConfigFileError, match=r"run\.yaml: cannot be written: "):
        TrainerConfig().to_file(tmp_path / "file" / "run.yaml")


def test_a_validator_that_fails_is_told_with_file_and_place(tmp_path: Path):
    """A third party's mistake is one clear error too; its own exception is the cause."""
    path = tmp_path / "run.yaml"
    path.write_text("checked: 7")

    with pytest.raises(
        ConfigFileError, match=r"run\.yaml: a plugin raised KeyError: 7 \("
    ) as caught:
        Odd.from_file(path)
    assert "in _look_up" in str(caught.value)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_redacted_value_that_no_longer_fits_says_so():
    """Records of runs hold `[redacted]` for a secret; where that is no number, a person must act."""
    with pytest.raises(
        ConfigFileError, match=r"line 1, checked: the value was a secret .* put it in"
    ):
        Odd.from_text("checked: '[redacted]'")


def test_a_missing_file_is_also_a_file_not_found_error(tmp_path: Path):
    """Who catches the builtin gets it; the message has the path."""
    with pytest.raises(FileNotFoundError, match=r"none\.yaml: there is no such file"):
        TrainerConfig.from_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"seed: \xff", r"not a text file in UTF-8 \(byte 6\); save it as UTF-8"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_config_file_error(
    tmp_path: Path, content: bytes | None, says: str
):
    """With its path and what to do."""
    path = tmp_path / "run.yaml"
    path.mkdir() if content is None else path.write_bytes(content)

    with pytest.raises(ConfigFileError, match=rf"run\.yaml: {says}"):
        TrainerConfig.from_file(path)


@pytest.mark.parametrize(
    ("suffix", "text", "says"),
    [
        (
            ".yaml",
            "seed: 1\nmax_epochs: x\n",
            "  line 2, max_epochs: Input should be a valid integer",
        ),
        (".yaml", "directory:\n  a: 1\n", "  line 2, directory.a: there is no such field"),
        (
            ".yaml",
            "loggers:\n- name: csv\n- name: csv\n  x: 1\n",
            "  line 4, loggers[1].csv.x: there is no such",
        ),
        (
            ".yaml",
            "loggers:\n- name: csv\n- nam: csv\n",
            "  line 3, loggers[1]: the field `name` is missing",
        ),
        (
            ".json",
            '{\n"seed": 1,\n"max_epochs": "x"}',
            "  line 3, max_epochs: Input should be a valid integer",
        ),
        (".toml", 'seed = 1\nmax_epochs = "x"', "  max_epochs: Input should be a valid integer"),
    ],
)
def test_an_error_names_file_line_and_field(tmp_path: Path, suffix: str, text: str, says: str):
    """The line is that of the value, or of what holds it; TOML's reader gives none."""
    path = tmp_path / f"run{suffix}"
    path.write_text(text)

    with pytest.raises(ConfigFileError) as caught:
        TrainerConfig.from_file(path)

    first, second = str(caught.value).splitlines()
    assert first == f"{path}: 1 problem"
    assert second.startswith(says)


def test_a_long_value_is_not_repeated_in_full():
    """The message stays readable whatever was given."""
    with pytest.raises(ConfigFileError) as caught:
        TrainerConfig.from_text(json.dumps({"seed": ["x" * 10_000] * 1000}), "json")

    assert len(str(caught.value)) < 500


def test_yaml_is_version_1_2():
    """`1e-4` is a number and `on` is text; in 1.1 it is the other way round."""
    meta = TrainerConfig.from_text("meta: {a: 1e-4, b: on, c: no, d: 010, e: 0o10, f: 1_0}").meta

    assert meta == {"a": 1e-4, "b": "on", "c": "no", "d": 10, "e": 8, "f": 10}


@pytest.mark.parametrize(
    ("text", "format_"),
    [("", "yaml"), ("# nothing\n", "yaml"), ("", "json"), (" \n", "json"), ("", "toml")],
)
def test_an_empty_file_is_the_defaults(text: str, format_: str):
    """Nothing was said, so everything is as it is by itself."""
    assert TrainerConfig.from_text(text, format_) == TrainerConfig()


def test_the_schema_key_is_for_editors(tmp_path: Path):
    """`$schema` at the top is ignored, further down it is an unknown field."""
    assert TrainerConfig.from_text('{"$schema": "x.json", "seed": 3}', "json").seed == 3
    with pytest.raises(ConfigFileError, match=r"directory\.\$schema: there is no such field"):
        TrainerConfig.from_text("directory: {$schema: x}")


def test_toml_says_where_it_would_lose_a_null():
    """A null in a list or mapping, or where the default is another value, is refused with its place."""
    for config, place in (
        (TrainerConfig(meta={"a": [1, None]}), r"meta\.a\[1\]"),
        (TrainerConfig(meta={"a": {"b": None}}), r"meta\.a\.b"),
        (Outer(high=None), "high"),
    ):
        with pytest.raises(
            ConfigFileError, match=rf"^{place} is null, which TOML cannot say; write .* as YAML"
        ):
            config.to_text("toml")


def test_a_slot_that_is_off_survives_toml():
    """None in a slot that is on by default is written as `false`, and read as None."""
    config = TrainerConfig(lr_monitor=None, checkpoint_saving=None)
    text = config.to_text("toml")

    assert "lr_monitor = false" in text
    assert TrainerConfig.from_text(text, "toml") == config


@pytest.mark.parametrize("format_", ["yaml", "json", "toml"])
def test_a_path_that_utf8_cannot_hold_is_refused_when_it_is_written(tmp_path: Path, format_: str):
    """Linux has such names; the error says so, and no half-written file is left."""
    config = TrainerConfig(directory={"project_root": Path("\udcff")}, **OFF)

    with pytest.raises(
        ConfigFileError, match=f"cannot be written as {format_.upper()}.*change the path"
    ):
        config.to_file(tmp_path / f"run.{format_}")
    assert not list(tmp_path.iterdir())
