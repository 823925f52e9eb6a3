"""Round trips: any valid `TrainerConfig` comes back unchanged from files, pickle and copies."""

from __future__ import annotations

import contextlib
import copy
import enum
import pickle
import re
import string
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from nshtrainer import (
    CallbackConfigBase,
    Config,
    ConfigFileError,
    TrainerConfig,
    callback_registry,
    logger_registry,
    manifest,
)
from nshtrainer.trainer.config import SLOTS

pytestmark = pytest.mark.filterwarnings("ignore:`plugins:UserWarning")  # names of nothing

quick = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
deep = settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))

# ---- a third-party callback --------------------------------------------------------------------


class Shade(enum.Enum):
    """A choice."""

    LIGHT = "light"
    DARK = "on"  # a word that YAML 1.1 reads as true


class Nested(Config):
    """A configuration inside another one."""

    weights: dict[str, float] = Field(default_factory=dict)
    where: Path | None = None


class PaintCallbackConfig(CallbackConfigBase):
    """What a third party may write: every kind of field that has a form in files."""

    name: Literal["paint"] = "paint"
    shade: Shade = Shade.LIGHT
    nested: Nested = Field(default_factory=Nested)
    others: list[Nested] = Field(default_factory=list)
    pair: tuple[int, str] = (0, "")
    many: tuple[float, ...] = ()
    at: datetime | None = None
    lasts: timedelta | None = None
    words: dict[str, list[str]] = Field(default_factory=dict)
    chosen: frozenset[Literal["a", "b", "c"]] = frozenset()
    either: bool | int | float | str | None = None

    def create_callbacks(self, trainer_config):
        return ()


# ---- values ------------------------------------------------------------------------------------

AMBIGUOUS = (
    "on", "off", "yes", "no", "Yes", "NO", "y", "n", "true", "True", "false", "null", "Null", "~", "", " ",
    "1e-4", "1E5", "1e5", ".5", "5.", "0x10", "0o17", "017", "0b1", "1_000", "+1", "-0", "1:30", "12:30:45",
    "2020-01-01", "2020-01-01T00:00:00Z", ".inf", "-.inf", ".nan", "NaN", "inf", "Infinity", "=", "<<", "-", "--- a",
    "...", "- a", "a: b", "a:", ": a", "#a", "a #b", "? a", "[a", "{a}", "&a", "*a", "!a", "!!str a", "|", ">", "%a",
    "@a", "`a", "'", '"', "'a", '"a', "\\", "\\n", " a", "a ", "\ta", "a\n", "\na", "a\n\n", "a\r\nb", "\r", "a\n b",
    "\x00", "\x07", "\x1b[0m", "\x7f", "\x85", "\xa0", "\u2028", "\ufeff", "\ufffe", "\U0001f600", "e\u0301", "x" * 5000,
    "word " * 60, "{text}", "{0}", "%s", "${HOME}", "$schema",
)  # fmt: skip

texts = st.sampled_from(AMBIGUOUS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
filled = texts.filter(lambda t: t.strip())
file_names = st.text(string.ascii_letters + string.digits + "_-", min_size=1, max_size=20)
urls = st.sampled_from(["s3://bucket/run", "gs://bucket/a b", "memory://run"])
paths = st.sampled_from(
    [".", "a", "/a/b", "a b/c", "on", "~", "1e5", "null", "ä/ö", "a\nb", "2020-01-01"]
).map(Path)
int64 = st.integers(-(2**63) + 1, 2**63 - 1)
positive = st.integers(1, 2**63 - 1) | st.integers(1, 20)
non_negative = st.integers(0, 2**63 - 1) | st.integers(0, 20)
reals = st.floats(allow_nan=False)
positive_reals = st.floats(min_value=0, exclude_min=True, allow_nan=False)
non_negative_reals = st.floats(min_value=0, allow_nan=False)
fractions = st.floats(0, 1)
durations = st.timedeltas(min_value=timedelta(microseconds=1), max_value=timedelta(days=10_000))
labels = file_names | st.sampled_from(["on", "1e5", "null", "1.0", "no"])
plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**80), 2**80)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
metrics = st.fixed_dictionaries(
    {"name": filled.map(str.strip).filter(bool), "mode": st.sampled_from(["min", "max"])}
)
templates = st.sampled_from(["{epoch}", "{step:05d}-x", "{{a}}", "on", "{val/loss:.3f}", "1e5"])
norms = st.booleans() | positive_reals | st.sampled_from(["2", "inf"])
actions = st.sampled_from(["ignore", "warn", "raise", "stop", "skip", True, False])
batches = st.integers(0, 1000) | fractions


def maybe(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """A value or null."""
    return st.none() | values


metadata = st.fixed_dictionaries(
    {},
    optional={
        "priority": int64,
        "ignore_if_exists": st.booleans(),
        "enabled_for_barebones": st.booleans(),
    },
)
COMMON = {"metadata": metadata, "label": maybe(labels), "added_by": maybe(texts)}
_checkpoint = {"dirpath": maybe(paths | urls), "filename": maybe(templates)}
_signals = st.lists(
    st.sampled_from(["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU"]), max_size=3
)
_shared = {
    "async_save": st.booleans(),
    "on_save_error": st.sampled_from(["raise", "warn"]),
    "trial": st.booleans(),
    "links": st.sampled_from(["symlink", "hardlink", "copy", "pointer", "none"]),
}
_kept = {
    **_checkpoint,
    **{option: maybe(values) for option, values in _shared.items()},
    "every_n_steps": maybe(positive),
    "every_n_epochs": maybe(positive),
    "on_validation_end": st.booleans(),
    "topk": positive | st.just("all"),
    "save_weights_only": st.booleans(),
    "save_symlink": st.booleans(),
    "max_total_bytes": maybe(positive),
}
_globs = st.lists(filled, max_size=3)
_ranges = st.tuples(reals, st.none()) | st.tuples(reals, reals).map(sorted)

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "act_save": {
        "enabled": st.booleans(), "save_dir": maybe(paths),
        "include": st.lists(filled, min_size=1, max_size=3), "exclude": _globs,
        "reduce": st.lists(st.sampled_from(["mean", "l2_norm", "histogram"]), unique=True),
        "every_n_steps": positive, "max_bytes": maybe(positive),
        "ranks": st.sampled_from(["zero", "all"]) | st.lists(non_negative, min_size=1, max_size=3),
    },
    "best_checkpoint": {**_kept, "metric": maybe(metrics), "throw_on_no_metric": st.booleans()},
    "checkpoint_saving": {"enabled": st.booleans(), **_shared, "preemption_signals": _signals},
    "debug_flag": {"enabled": st.booleans()},
    "early_stopping": {
        "metric": maybe(metrics), "patience": non_negative, "min_delta": non_negative_reals,
        "min_lr": maybe(non_negative_reals), "skip_first_n_epochs": non_negative, "strict": st.booleans(),
        "check_finite": st.booleans(), "stopping_threshold": maybe(reals), "divergence_threshold": maybe(reals),
        "patience_unit": st.sampled_from(["checks", "steps", "seconds"]), "restore_best_weights": st.booleans(),
        "min_delta_mode": st.sampled_from(["absolute", "relative"]), "log_metrics": st.booleans(),
    },
    "ema": {
        "decay": fractions, "every_n_steps": positive, "validate_original_weights": st.booleans(),
        "cpu_offload": st.booleans(), "validate_both": st.booleans(), "average_after_fit": st.booleans(), "start_step": non_negative,
        "warmup": st.sampled_from([None, "inverse_power", "tensorflow", "bias_correction", "half_life"]),
        "buffers": st.sampled_from(["copy", "average", "keep"]), "include": maybe(_globs), "exclude": _globs,
        "dtype": st.sampled_from([None, "float32", "bfloat16"]), "snapshot_dir": maybe(paths),
        "profiles": st.lists(st.floats(0.01, 0.28), max_size=2, unique=True),
        # What excludes one another, or needs one another.
        "half_life_steps": st.none(), "half_life_samples": st.none(), "snapshot_every_n_steps": st.none(),
        "warmup_power": st.just(2 / 3), "warmup_inv_gamma": st.just(1.0), "warmup_ratio": st.just(0.05),
        "warmup_steps": st.none(), "extra_decays": st.just([]),
    },
    "epoch_timer": {
        "log_step_times": st.booleans(), "log_throughput": st.booleans(), "log_eta": st.booleans(),
        "synchronize_device": st.booleans(), "prog_bar": st.booleans(),
    },
    "finite_checks": {
        "nonfinite_grads": actions, "none_grads": actions, "nonfinite_loss": actions,
        "nonfinite_params": st.sampled_from(["ignore", "warn", "raise", "stop", True, False]),
        # What needs one another.
        "find_module": st.just(False), "dump": st.just(False), "dump_dir": st.none(),
    },
    "gradient_skipping": {
        "threshold": positive_reals, "norm_type": positive_reals | st.sampled_from(["2", "inf"]),
        "start_after_n_steps": maybe(non_negative), "skip_non_finite": st.booleans(),
        "policy": st.sampled_from([None, "zscore", "sigma"]), "action": st.sampled_from(["skip", "clip", "raise"]),
        # What belongs to one policy or action.
        "sigmas": st.none(), "statistics_decay": st.none(), "window": st.none(), "percentile": st.none(),
        "percentile_factor": st.none(), "warmup_steps": st.none(), "max_consecutive": st.none(),
        "hold_scheduler": st.just(False), "prog_bar": st.booleans(),
    },
    "last_checkpoint": {
        **_kept, "save_on_time_interval": maybe(durations), "on_train_end": st.booleans(),
        "before_validation": st.booleans(), "preemption_signals": maybe(_signals),
        "keep_every_n_steps": maybe(positive),
    },
    "learning_rate_monitor": {
        "logging_interval": st.sampled_from(["step", "epoch", None]), "log_momentum": st.booleans(),
        "log_weight_decay": st.booleans(), "prefix": texts,
    },
    "log_epoch": {"metric_name": filled, "train": st.booleans(), "val": st.booleans(), "test": st.booleans()},
    "metric_validation": {
        "metrics": st.lists(metrics | filled, max_size=3), "error_behavior": st.sampled_from(["raise", "warn"]),
        "validate_default_metric": st.booleans(), "check_finite": st.booleans(),
        "check_ranks_agree": st.booleans(), "ranges": st.dictionaries(filled, _ranges, max_size=3),
    },
    "norm_logging": {
        **{
            f"log_{what}{per}": norms
            for what in ("grad_norm", "param_norm", "update_norm", "update_ratio", "moment_norm")
            for per in ("", "_per_param", "_per_module")
        },
        "module_depth": positive, "prog_bar": st.booleans(),
        # What needs single norms.
        "include": st.none(), "exclude": st.just([]),
    },
    "on_exception_checkpoint": _checkpoint,
    "paint": {
        "shade": st.sampled_from(Shade),
        "nested": st.fixed_dictionaries({"weights": st.dictionaries(texts, reals, max_size=3), "where": maybe(paths)}),
        "others": st.lists(st.fixed_dictionaries({"where": maybe(paths)}), max_size=2),
        "pair": st.tuples(int64, texts), "many": st.lists(reals, max_size=3).map(tuple), "at": maybe(st.datetimes()),
        "lasts": maybe(durations), "words": st.dictionaries(texts, st.lists(texts, max_size=2), max_size=3),
        "chosen": st.frozensets(st.sampled_from("abc")), "either": maybe(st.booleans() | int64 | filled),
    },
    "print_table_metrics": {
        "enabled": st.booleans(), "metric_patterns": maybe(st.lists(filled, max_size=3)),
        "metrics": st.lists(metrics, max_size=3), "show_change": st.booleans(), "max_rows": positive,
    },
    "shared_parameters": {"detect_ties": st.booleans()},
    "wandb_upload_code": {
        "enabled": st.booleans(), "directory": maybe(paths), "include": maybe(_globs), "exclude": _globs,
        "max_file_bytes": positive, "max_total_bytes": positive,
    },
    "wandb_checkpoints": {
        "enabled": st.booleans(), "upload": st.sampled_from(["all", "latest"]),
    },
    "wandb_watch": {
        "enabled": st.booleans(), "log": st.sampled_from(["gradients", "parameters", "all", None]),
        "log_graph": st.booleans(), "log_freq": positive,
        "method": st.sampled_from(["optimizer_step", "hooks"]),
    },
}  # fmt: skip
"""The options of every callback; a test says that none is missing."""

LOGGERS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "csv": {"prefix": texts, "flush_logs_every_n_steps": positive},
    "tensorboard": {"prefix": texts, "log_graph": st.booleans(), "default_hp_metric": st.booleans()},
    "wandb": {
        "project": maybe(filled), "entity": maybe(texts), "group": maybe(texts), "job_type": maybe(texts),
        "prefix": texts, "log_model": st.sampled_from(["all", "latest", "none", True, False]),
        "offline": maybe(st.booleans()),
    },
}  # fmt: skip
"""The options of every logger."""

REQUIRED = {
    "act_save": {"include"},  # without it, `exclude` and `reduce` are refused
    "ema": {"decay"},
    "early_stopping": {"patience"},
    "gradient_skipping": {"threshold"},
}


def options(
    name: str, table: dict[str, st.SearchStrategy[Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    """A mapping that validates as the config called *name*."""
    needed = {k: v for k, v in table.items() if k in REQUIRED.get(name, ())}
    others = {k: v for k, v in table.items() if k not in needed}
    return st.fixed_dictionaries({"name": st.just(name), **needed}, optional=others)


def callback(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A valid callback called *name*."""
    found = options(name, {**COMMON, **OPTIONS[name]})
    if name != "checkpoint_saving":
        return found
    inner = st.sampled_from(
        ["best_checkpoint", "last_checkpoint", "on_exception_checkpoint"]
    ).flatmap(callback)
    held = st.fixed_dictionaries({}, optional={"checkpoint_callbacks": st.lists(inner, max_size=3)})
    return st.builds(lambda a, b: {**a, **b}, found, held)


def logger(name: str) -> st.SearchStrategy[dict[str, Any]]:
    """A valid logger called *name*."""
    table = {"enabled": st.booleans(), "priority": int64, "log_dir": maybe(paths), **LOGGERS[name]}
    if name == "wandb":
        table |= {
            "watch": st.booleans() | st.none() | callback("wandb_watch"),
            "log_code": st.booleans() | st.none() | callback("wandb_upload_code"),
        }
    return options(name, table)


any_callback = st.sampled_from(sorted(OPTIONS)).flatmap(callback)
any_logger = st.sampled_from(sorted(LOGGERS)).flatmap(logger)

FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "id": maybe(st.sampled_from(["a", "1e5", "null", "on", "2020-01-01", "0x10", "_x"])),
    "name": texts | st.lists(texts, max_size=3),
    "project": maybe(texts), "tags": st.lists(texts, max_size=3), "notes": st.lists(texts, max_size=3),
    "meta": st.dictionaries(texts, plain, max_size=4),
    "debug": st.booleans(), "seed": maybe(st.integers(0, 2**32 - 1)), "seed_workers": st.booleans(),
    "directory": st.fixed_dictionaries({}, optional={"project_root": maybe(paths), "logdir_basename": file_names}),
    "primary_metric": maybe(metrics), "ckpt_path": maybe(filled),
    "loggers": maybe(st.lists(any_logger, max_size=3)), "callbacks": st.lists(any_callback, max_size=4),
    "plugins": st.fixed_dictionaries({}, optional={
        "allow": st.just(["nshtrainer-checkpoint", "nshtrainer-ema", "nshtrainer-monitoring", "nshtrainer-wandb"]),
        "prefer": st.dictionaries(file_names, file_names, max_size=2), "defaults": st.lists(file_names, max_size=2),
        "require": st.just(["nshtrainer-core"]),
    }),
    **{slot: st.sampled_from([None, False]) | callback(name) for slot, name in SLOTS.items()},
    "set_float32_matmul_precision": st.sampled_from(["medium", "high", "highest", None]),
    "accelerator": maybe(texts), "strategy": maybe(texts),
    "devices": maybe(positive | st.sampled_from(["auto", "all", "-1", "0,1", -1]) | st.lists(st.integers(0, 8), min_size=1)),
    "num_nodes": maybe(positive), "precision": st.sampled_from([None, 16, 32, "16", "16-mixed", "bf16-true"]),
    "fast_dev_run": maybe(st.booleans() | non_negative), "max_epochs": maybe(st.integers(-1, 9)),
    "min_epochs": maybe(non_negative), "max_steps": maybe(st.integers(-1, 2**63 - 1)), "min_steps": maybe(non_negative),
    "max_time": maybe(durations | st.sampled_from(["00:12:00:00", "PT1H"])),
    **{f"limit_{stage}_batches": maybe(batches) for stage in ("train", "val", "test", "predict")},
    "overfit_batches": maybe(batches),
    "val_check_interval": maybe(positive | durations | st.floats(0, 1, exclude_min=True)),
    "check_val_every_n_epoch": maybe(positive | st.just(value=False)),
    "num_sanity_val_steps": maybe(st.integers(-1, 9)), "log_every_n_steps": maybe(non_negative),
    **{name: maybe(st.booleans()) for name in (
        "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "benchmark", "inference_mode",
        "use_distributed_sampler", "detect_anomaly", "barebones", "sync_batchnorm", "enable_autolog_hparams",
    )},
    "accumulate_grad_batches": maybe(positive), "gradient_clip_val": maybe(non_negative_reals),
    "gradient_clip_algorithm": st.sampled_from(["norm", "value", None]),
    "deterministic": maybe(st.booleans() | st.just("warn")),
    "profiler": st.sampled_from(["simple", "advanced", "pytorch", "xla", None]),
    "reload_dataloaders_every_n_epochs": maybe(non_negative), "model_registry": maybe(texts),
}  # fmt: skip
"""The fields of `TrainerConfig`; a test says that none is missing."""

_CHANGING = ("meta", "callbacks", "loggers", "name", "notes", *SLOTS)


@st.composite
def trainer_data(draw: st.DrawFn) -> dict[str, Any]:
    """A mapping that validates as a `TrainerConfig`, with some of its fields."""
    chosen = draw(st.sets(st.sampled_from(_CHANGING), max_size=4) | st.just({"callbacks"}))
    chosen |= draw(st.sets(st.sampled_from(sorted(FIELDS)), max_size=8))
    data = {name: draw(FIELDS[name]) for name in sorted(chosen)}
    if (data.get("plugins") or {}).get("allow"):  # the test's own callback has no distribution
        data["callbacks"] = [c for c in data.get("callbacks", ()) if c["name"] != "paint"]
    return data


def trainer_configs() -> st.SearchStrategy[TrainerConfig]:
    """Valid configurations."""
    return trainer_data().map(TrainerConfig.model_validate)


# ---- tests -------------------------------------------------------------------------------------


@pytest.fixture(autouse=True, scope="module")
def _paint():
    callback_registry.register(PaintCallbackConfig)
    yield
    callback_registry.unregister("paint")


def typed(value: Any) -> Any:
    """*value* with the types of all its parts, so that True, 1 and 1.0 differ, and -0.0 and 0.0."""
    if isinstance(value, BaseModel):
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if isinstance(value, dict):  # TOML writes tables last, so the order of keys is not kept there
        return {k: typed(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [type(value), *map(typed, value)]
    return type(value), repr(value) if isinstance(value, float) else value


def assert_same(back: TrainerConfig, config: TrainerConfig) -> None:
    assert back == config
    assert typed(back) == typed(config)


def survives_text(config: TrainerConfig, format_: str) -> None:
    text = config.to_text(format_)
    back = TrainerConfig.from_text(text, format_)
    assert_same(back, config)


class TomlHasNoNullError(Exception):
    """The documented refusal."""


def survives_toml(config: TrainerConfig) -> None:
    try:
        survives_text(config, "toml")
    except ConfigFileError as error:
        if not re.search(
            r"is null, which TOML cannot say; write the .* as YAML or JSON", str(error)
        ):
            raise
        raise TomlHasNoNullError from error


def survives_everything(config: TrainerConfig) -> None:
    for format_ in ("yaml", "json"):
        survives_text(config, format_)
    with contextlib.suppress(TomlHasNoNullError):
        survives_toml(config)
    for back in (
        pickle.loads(pickle.dumps(config)),
        copy.deepcopy(config),
        config.revalidated(),
        config.replace(),
        TrainerConfig.model_validate(config.model_dump()),
        TrainerConfig.model_validate_json(config.model_dump_json()),
    ):
        assert_same(back, config)


@quick
@given(trainer_configs())
def test_any_config_survives_files_pickle_and_copies(config: TrainerConfig):
    """YAML, JSON, pickle, deepcopy and dumps give it back, to the type; TOML too unless a null is lost."""
    survives_everything(config)


@pytest.mark.slow
@deep
@given(trainer_configs())
def test_hundreds_of_configs_survive(config: TrainerConfig):
    """The same, searched for longer."""
    survives_everything(config)


@pytest.mark.parametrize("text", AMBIGUOUS, ids=range(len(AMBIGUOUS)))
def test_words_that_formats_take_for_something_else_stay_text(text: str):
    """Text is text as a value and as a key, in every format, whatever a parser may see in it."""
    config = TrainerConfig(
        project=text, notes=[text, text], meta={text: text, "list": [text, {text: [text]}]}, callbacks=[
            {"name": "paint", "words": {text: [text]}, "either": text, "pair": (1, text)}
        ]
    )  # fmt: skip

    for format_ in ("yaml", "json", "toml"):
        survives_text(config, format_)


@pytest.mark.parametrize("format_", ["yaml", "json", "toml"])
def test_files_on_disk_survive_too(tmp_path: Path, format_: str):
    """`to_file` and `from_file` agree with the text, on every character that text may hold."""
    config = TrainerConfig(notes=list(AMBIGUOUS), max_time=timedelta(hours=1), loggers=[])
    path = config.to_file(tmp_path / "deep" / f"run.{format_}")

    assert_same(TrainerConfig.from_file(path), config)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_every_option_of_a_callback_survives(name: str):
    """Each callback, alone in a config, with options of all kinds."""

    @settings(quick, max_examples=8)
    @given(callback(name))
    def survives(data: dict[str, Any]) -> None:
        config = TrainerConfig(**dict.fromkeys(SLOTS), loggers=[], callbacks=[data])
        for format_ in ("yaml", "json"):
            survives_text(config, format_)
        assert_same(pickle.loads(pickle.dumps(config)), config)

    survives()


def test_no_installed_callback_logger_or_field_is_left_out():
    """A new callback, logger, option or field must be put into the tables of this file."""
    common = {"name", *COMMON}
    installed = manifest().of("nshtrainer.callbacks")  # not what other tests register
    callbacks = {n: set(callback_registry[n].model_fields) - common for n in installed}
    loggers = {n: set(logger_registry[n].model_fields) for n in manifest().of("nshtrainer.loggers")}

    callbacks["checkpoint_saving"] -= {"checkpoint_callbacks"}
    assert callbacks == {n: set(table) for n, table in OPTIONS.items() if n != "paint"}
    base = {"name", "enabled", "priority", "log_dir"}
    assert loggers.pop("wandb") - {"watch", "log_code"} == {*LOGGERS["wandb"], *base}
    assert loggers == {n: {*LOGGERS[n], *base} for n in ("csv", "tensorboard")}
    assert set(TrainerConfig.model_fields) == set(FIELDS)


def test_the_json_schema_names_every_installed_callback_and_logger():
    """The schema that editors and sweeps read is a choice over all names, in both modes."""
    for mode in ("validation", "serialization"):
        schema = TrainerConfig.model_json_schema(mode=mode)

        for field, registry in (("callbacks", callback_registry), ("loggers", logger_registry)):
            items = schema["properties"][field]["items"]
            assert sorted(items["discriminator"]["mapping"]) == sorted(registry.load_all())
            for reference in items["discriminator"]["mapping"].values():
                assert reference.removeprefix("#/$defs/") in schema["$defs"]
