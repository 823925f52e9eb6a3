"""Bad input: one clear error that says what, where and what to do, before anything starts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from nshtrainer import ConfigFileError, TrainerConfig, callback_registry, logger_registry
from nshtrainer.cli.app import app


@dataclass
class Bad:
    """An input and what the message about it must say: `where` literally, `says` as a pattern."""

    text: str
    where: str
    says: str
    format: str = "yaml"


EMA = "callbacks: [{name: ema, decay: 0.9, %s}]"
SAVE = "checkpoint_saving: {checkpoint_callbacks: [{name: %s}]}"
SAVED = "checkpoint_saving.checkpoint_callbacks[0]."
FILES = {
    # Names and fields
    "unknown callback": Bad("callbacks: [{name: emma}]", "line 1, callbacks[0]", "no callback is named 'emma'. Did you mean 'ema'.*Known: act_save, "),
    "unlike any callback": Bad("callbacks: [{name: qqqq}]", "callbacks[0]", "no callback is named 'qqqq'. Known: "),
    "unknown logger": Bad("loggers: [{name: wnadb}]", "loggers[0]", "no logger is named 'wnadb'. Did you mean 'wandb'"),
    "callback without a name": Bad("callbacks: [{decay: 0.9}]", "callbacks[0]", "the field `name` is missing.*Known: act_save"),
    "name that is a number": Bad("callbacks: [{name: 3}]", "callbacks[0]", "`name` must be text, not int"),
    "callback as text": Bad("callbacks: [ema]", "callbacks[0]", "a mapping with the field `name`.* is expected, not str.*'ema'"),
    "callback that is null": Bad("callbacks: [null]", "callbacks[0]", "a mapping with the field `name`.* not NoneType"),
    "callbacks that are no list": Bad("callbacks: {name: ema}", "callbacks:", "valid list"),
    "loggers that are no list": Bad("loggers: csv", "loggers:", "valid list.*'csv'"),
    "misspelt field": Bad("seed: 1\ndebugg: true", "line 2, debugg", "no such field; did you mean 'debug'"),
    "field of another tool": Bad("zzz: 1", "zzz", "no such field; known: accelerator, "),
    "misspelt option": Bad(EMA % "every_n_step: 2", "callbacks[0].ema.every_n_step", "no such field; did you mean 'every_n_steps'"),
    "misspelt nested option": Bad("directory: {project_rot: x}", "directory.project_rot", "did you mean 'project_root'"),
    "missing option": Bad("callbacks: [{name: ema}]", "callbacks[0].ema", "nothing says how fast the average moves; give `decay`"),
    "missing option of a slot": Bad("early_stopping: {}", "early_stopping.patience", "Field required"),
    "slot with another callback": Bad("early_stopping: {name: ema, decay: 0.9}", "early_stopping", "'ema' has no place here; expected 'early_stopping'"),
    "slot that is true": Bad("early_stopping: true", "early_stopping", "a mapping of options.* is expected, not bool"),
    "saving what is no checkpoint": Bad(SAVE % "ema, decay: 0.9", "checkpoint_saving", "'ema' has no place here; expected 'best_checkpoint' or 'last_checkpoint' or"),
    # Values that are easily taken silently, and hurt in the middle of a run
    "EMA never": Bad(EMA % "every_n_steps: 0", "callbacks[0].ema.every_n_steps", "greater than 0.*given: 0"),
    "EMA backwards": Bad(EMA % "every_n_steps: -1", "callbacks[0].ema.every_n_steps", "greater than 0.*given: -1"),
    "EMA at half steps": Bad(EMA % "every_n_steps: 1.5", "ema.every_n_steps", "valid integer.*1.5"),
    "decay above 1": Bad("callbacks: [{name: ema, decay: 2}]", "callbacks[0].ema.decay", "less than or equal to 1"),
    "decay below 0": Bad("callbacks: [{name: ema, decay: -0.1}]", "callbacks[0].ema.decay", "greater than or equal to 0"),
    "decay NaN": Bad("callbacks: [{name: ema, decay: .nan}]", "callbacks[0].ema.decay", "NaN cannot be compared with anything; give a number"),
    "decay true": Bad("callbacks: [{name: ema, decay: true}]", "callbacks[0].ema.decay", "a number is expected, not True"),
    "decay in quotes": Bad("callbacks: [{name: ema, decay: '0.9'}]", "callbacks[0].ema.decay", "not the text '0.9'; remove the quotes"),
    "negative threshold": Bad("callbacks: [{name: gradient_skipping, threshold: -1}]", "gradient_skipping.threshold", "greater than 0.*-1"),
    "threshold 0 never trains": Bad("callbacks: [{name: gradient_skipping, threshold: 0}]", "gradient_skipping.threshold", "greater than 0"),
    "threshold NaN": Bad("callbacks: [{name: gradient_skipping, threshold: .nan}]", "gradient_skipping.threshold", "NaN cannot be compared"),
    "norm type in words": Bad("callbacks: [{name: gradient_skipping, threshold: 1, norm_type: two}]", "gradient_skipping.norm_type", "not the text 'two'"),
    "norm type 0": Bad("callbacks: [{name: gradient_skipping, threshold: 1, norm_type: 0}]", "gradient_skipping.norm_type", "greater than 0"),
    "negative start": Bad("callbacks: [{name: gradient_skipping, threshold: 1, start_after_n_steps: -1}]", "start_after_n_steps", "greater than or equal to 0"),
    "norm to log in words": Bad("log_norms: {log_grad_norm: everything}", "log_norms.log_grad_norm: ", "not the text 'everything'"),
    "negative norm to log": Bad("log_norms: {log_grad_norm: -2}", "log_norms.log_grad_norm: ", "greater than 0"),
    "negative patience": Bad("early_stopping: {patience: -1}", "early_stopping.patience", "greater than or equal to 0"),
    "negative min_delta": Bad("early_stopping: {patience: 1, min_delta: -1}", "early_stopping.min_delta", "greater than or equal to 0"),
    "empty metric name": Bad("early_stopping: {patience: 3, metric: {name: '', mode: min}}", "early_stopping.metric.name", "at least 1 character"),
    "blank metric name": Bad("primary_metric: {monitor: ' ', mode: min}", "primary_metric.monitor", "at least 1 character"),
    "unknown mode": Bad("primary_metric: {name: loss, mode: least}", "primary_metric.mode", "'min' or 'max'.*'least'"),
    "metric without a mode": Bad("primary_metric: {name: loss}", "primary_metric.mode", "Field required"),
    "metric as text": Bad("primary_metric: val/loss", "primary_metric", "MetricConfig.*'val/loss'"),
    "epoch metric without a name": Bad("log_epoch: {metric_name: ''}", "log_epoch.metric_name", "at least 1 character"),
    "keep none": Bad(SAVE % "best_checkpoint, topk: 0", SAVED + "best_checkpoint.topk: ", "greater than 0; or: .*'all'.*given: 0"),
    "keep less than none": Bad(SAVE % "best_checkpoint, topk: -1", SAVED + "best_checkpoint.topk: ", "greater than 0; or: .*'all'.*given: -1"),
    "keep true": Bad(SAVE % "last_checkpoint, topk: true", SAVED + "last_checkpoint.topk: ", "valid integer; or: .*'all'.*given: True"),
    "negative interval": Bad(SAVE % "last_checkpoint, save_on_time_interval: -PT1H", SAVED + "last_checkpoint.save_on_time_interval", "greater than"),
    "interval without a unit": Bad(SAVE % "last_checkpoint, save_on_time_interval: 60", SAVED + "last_checkpoint.save_on_time_interval", "60 has no unit; give .*'01:30:00'"),
    "bad file name template": Bad(SAVE % "last_checkpoint, filename: '{epoch'", SAVED + "last_checkpoint.filename", "lone '{'.*Write '{{'"),
    "file name with a folder": Bad(SAVE % "best_checkpoint, filename: ../x", SAVED + "best_checkpoint.filename", "Use `dirpath`"),
    "remote folder": Bad(SAVE % "best_checkpoint, dirpath: 's3://'", SAVED + "best_checkpoint.dirpath", "names no folder"),
    "watch everything": Bad("loggers: [{name: wandb, watch: {log: everything}}]", "loggers[0].wandb.watch.log", "'gradients', 'parameters' or 'all'.*'everything'"),
    "watch never": Bad("callbacks: [{name: wandb_watch, log_freq: 0}]", "wandb_watch.log_freq", "greater than 0"),
    "watch by magic": Bad("callbacks: [{name: wandb_watch, method: magic}]", "wandb_watch.method", "'optimizer_step' or 'hooks'.*'magic'"),
    "upload some": Bad("callbacks: [{name: wandb_checkpoints, upload: some}]", "wandb_checkpoints.upload", "'all' or 'latest'.*'some'"),
    "upload no pattern": Bad("callbacks: [{name: wandb_upload_code, exclude: ['']}]", "wandb_upload_code.exclude[0]", "at least 1 character"),
    "reduce outputs of nothing": Bad("callbacks: [{name: act_save, reduce: [mean]}]", "callbacks[0].act_save", "`include` names none; set it"),
    "store on no rank": Bad("callbacks: [{name: act_save, ranks: []}]", "act_save.ranks", "at least one rank"),
    "flush never": Bad("loggers: [{name: csv, flush_logs_every_n_steps: 0}]", "loggers[0].csv.flush_logs_every_n_steps", "greater than 0"),
    "monitor sometimes": Bad("lr_monitor: {logging_interval: sometimes}", "lr_monitor.logging_interval", "'step' or 'epoch'"),
    "check loudly": Bad("callbacks: [{name: finite_checks, none_grads: shout}]", "finite_checks.none_grads", "'ignore', 'warn', 'raise', 'stop' or 'skip'"),
    "priority in words": Bad(EMA % "metadata: {priority: high}", "callbacks[0].ema.metadata.priority", "valid integer.*'high'"),
    "label with a blank": Bad(EMA % "label: a b", "callbacks[0].ema.label", "a label is made of letters.*'a b'"),
    # The trainer's own fields
    "epochs in words": Bad("max_epochs: many", "max_epochs", "valid integer.*'many'"),
    "epochs below -1": Bad("max_epochs: -2", "max_epochs", "greater than or equal to -1"),
    "more steps than 64 bits": Bad("max_steps: 99999999999999999999", "max_steps", "less than or equal to 9223372036854775807"),
    "time without a unit": Bad("max_time: 60", "max_time", 'needs a unit: write "00:12:00:00"'),
    "time in words": Bad("max_time: soon", "max_time", "duration.*'soon'"),
    "time of ages": Bad("max_time: '99999999999999:00:00:00'", "max_time", "no duration"),
    "validate often": Bad("val_check_interval: often", "val_check_interval: ", 'a fraction of an epoch.*"00:01:00:00" is expected.*\'often\''),
    "validate at infinity": Bad("val_check_interval: inf", "val_check_interval: ", "a number of batches from 1.*'inf'"),
    "validate one and a half times": Bad("val_check_interval: 1.5", "val_check_interval: ", "a fraction of an epoch.*1.5"),
    "more than all batches": Bad("limit_train_batches: 2.5", "limit_train_batches: ", "a fraction from 0.0 to 1.0"),
    "unknown precision": Bad("precision: 8", "precision", "'bf16-mixed'.*given: 8"),
    "no device": Bad("devices: 0", "devices: ", 'a number of devices, "auto"'),
    "negative clipping": Bad("gradient_clip_val: -1", "gradient_clip_val", "greater than or equal to 0"),
    "unknown clipping": Bad("gradient_clip_algorithm: max", "gradient_clip_algorithm", "'norm' or 'value'"),
    "accumulate nothing": Bad("accumulate_grad_batches: 0", "accumulate_grad_batches", "greater than 0"),
    "negative seed": Bad("seed: -1", "seed", "greater than or equal to 0"),
    "id that leaves its folder": Bad("id: ../up", "id: the run id '../up'", "Change it, or leave it out"),
    "id that is a device": Bad("id: con", "id: the run id 'con'", "Change it, or leave it out"),
    "maybe debug": Bad("debug: maybe", "debug", "valid boolean"),
    "folder that is a path": Bad("directory: {logdir_basename: a/b}", "directory.logdir_basename", "the name of one folder.*`project_root`"),
    "folder that is a dot": Bad("directory: {logdir_basename: '..'}", "directory.logdir_basename", "the name of one folder"),
    "unknown matmul precision": Bad("set_float32_matmul_precision: low", "set_float32_matmul_precision", "'medium', 'high' or 'highest'"),
    "tag that is a number": Bad("tags: [1]", "tags[0]", "valid string.*given: 1"),
    "date as a note": Bad("notes: [2020-01-01]", "notes[0]", "valid string.*date"),
    "date in meta": Bad("meta: {when: 2020-01-01}", "meta.when", "plain data is expected .* not date"),
    "NaN in meta": Bad("meta: {x: .nan}", "meta.x", "no JSON form; write it as text"),
    "meta that holds itself": Bad("meta: &a {b: *a}", "not valid YAML", "an alias stands inside of what it names; write the value out"),
    "meta that explodes": Bad("meta:\n  a: &a [" + "x, " * 99 + "x]\n  b: &b [" + "*a, " * 99 + "*a]\n  c: &c [" + "*b, " * 99 + "*b]\n  d: [" + "*c, " * 99 + "*c]", "not valid YAML", "its aliases stand for .* values, and 1000000 are the limit"),
    "key that is a number": Bad("1: 2", "[1]", "Keys should be strings"),
    "requirement that is not met": Bad("plugins: {require: ['acme>=1']}", "plugins.require", "not installed: pip install 'acme>=1'"),
    "requirement that is none": Bad("plugins: {require: ['==']}", "plugins.require", "is no requirement; write `dist`"),
    "switch as text": Bad("plugins: {disable: ema}", "plugins.disable", "valid list.*'ema'"),
    # Files that cannot be read at all
    "YAML that ends early": Bad("seed: 1\na: [", "not valid YAML: line 2, column 5", "expected the node content"),
    "YAML with a tab": Bad("\tseed: 1", "line 1, column 1", "not valid YAML"),
    "YAML with a key twice": Bad("seed: 1\nseed: 2", "line 2, column 1", 'duplicate key "seed"'),
    "YAML with code": Bad("id: !!python/object:os.system x", "line 1, column 5", "not valid YAML.*could not determine a constructor"),
    "YAML with two documents": Bad("seed: 1\n---\nseed: 2", "line 2", "another document"),
    "YAML that is a list": Bad("- 1", "<text>", "a mapping of field names to values is expected at the top, not list"),
    "YAML that is a word": Bad("hello", "<text>", "a mapping .* is expected at the top, not str"),
    "JSON with a comma too many": Bad('{"seed": 1,}', "not valid JSON", "line 1 column 1[12]", "json"),
    "JSON with a key twice": Bad('{"seed": 1, "seed": 2}', "not valid JSON", "'seed' stands twice.*remove one", "json"),
    "JSON with a wrong value": Bad('{\n "seed": 1,\n "max_epochs": "x"\n}', "line 3, max_epochs", "valid integer", "json"),
    "JSON that is a list": Bad("[1]", "<text>", "a mapping of field names", "json"),
    "JSON nested without end": Bad("[" * 100_000, "not valid JSON", "nested too deeply", "json"),
    "JSON with an endless number": Bad('{"seed": ' + "9" * 5000 + "}", "not valid JSON", "4300", "json"),
    "TOML without a value": Bad("seed = ", "not valid TOML", "Invalid value", "toml"),
    "TOML with a key twice": Bad("seed = 1\nseed = 2", "not valid TOML", "overwrite a value", "toml"),
    "TOML with a table for a list": Bad('[callbacks]\nname = "ema"', "callbacks", "valid list", "toml"),
    "TOML with a wrong value": Bad("seed = -1", "seed", "greater than or equal to 0", "toml"),
    "unknown format": Bad("seed = 1", "the format 'ini' is not known", "expected one of yaml, json, toml", "ini"),
}  # fmt: skip


@pytest.mark.parametrize("bad", FILES.values(), ids=FILES.keys())
def test_what_is_wrong_in_a_file_is_said_once_with_its_place(bad: Bad):
    """One `ConfigFileError`, with the place, what is wrong and what would be right."""
    with pytest.raises(ConfigFileError) as caught:
        TrainerConfig.from_text(bad.text, bad.format)

    message = str(caught.value)
    assert bad.where in message
    assert re.search(bad.says, message), message
    assert "1 problem\n" in message or "\n" not in message
    assert "function-" not in message  # nothing of pydantic's inner names
    assert "constrained-" not in message


def test_several_mistakes_are_all_said_with_their_lines():
    """Whoever corrects a file need not run it once for each mistake."""
    text = "seed: -1\ncallbacks:\n  - name: ema\n    decay: 2\n    evry: 3\nmax_epoch: 3\n"

    with pytest.raises(ConfigFileError) as caught:
        TrainerConfig.from_text(text)

    lines = str(caught.value).splitlines()
    assert lines[0] == "<text>: 4 problems"
    assert [line.split(",")[0].strip() for line in lines[1:]] == [
        "line 1",
        "line 4",
        "line 5",
        "line 6",
    ]


NESTED: list[Any] = []
NESTED.append(NESTED)

OBJECTS = {
    "bytes": ({"project": b"\xff"}, "project", "valid UTF-8|valid string"),
    "half a surrogate pair": ({"project": "\ud800"}, "project", "unicode"),
    "half a surrogate pair in meta": ({"meta": {"a": ["\ud800"]}}, "meta.a", "UTF-8"),
    "object in meta": ({"meta": {"a": object()}}, "meta.a", "plain data is expected .* not object"),
    "endless number in meta": ({"meta": {"a": 10**5000}}, "meta.a", "at most 1024 bits"),
    "meta that is too deep": ({"meta": {"a": NESTED}}, "meta.a", "at most 64 levels"),
    "number as a key in meta": ({"meta": {"a": {1: 2}}}, "meta.a", "a key of type int"),
    "set of callbacks": ({"callbacks": {"ema"}}, "callbacks.0", "a mapping with the field"),
    "class of a callback": ({"callbacks": [callback_registry["ema"]]}, "callbacks.0", "not "),
    "logger among callbacks": ({"callbacks": [logger_registry["csv"]()]}, "callbacks.0", "CallbackConfigBase, is expected, not CSVLoggerConfig"),
    "callback among loggers": ({"loggers": [callback_registry["ema"](decay=0.5)]}, "loggers.0", "LoggerConfigBase, is expected, not EMACallbackConfig"),
    "time that runs backwards": ({"max_time": timedelta(-1)}, "max_time", "above zero"),
    "endless number": ({"max_epochs": 10**5000}, "max_epochs", "less than or equal"),
}  # fmt: skip


@pytest.mark.parametrize(("data", "where", "says"), OBJECTS.values(), ids=OBJECTS.keys())
def test_what_only_python_can_say_wrongly_is_a_validation_error(data: Any, where: str, says: str):
    """Objects that no file can hold are refused with their place, when built and when assigned."""
    (field, value), *_ = data.items()

    for attempt in (
        lambda: TrainerConfig(**data),
        lambda: TrainerConfig().replace(**data),
        lambda: setattr(TrainerConfig(), field, value),
    ):
        with pytest.raises(ValidationError) as caught:
            attempt()
        error = caught.value.errors()[0]
        assert ".".join(map(str, error["loc"])).startswith(where)
        assert re.search(says, error["msg"])


def test_a_missing_family_is_named_with_its_command():
    """Where a family is not installed, its names say which command installs it."""
    code = """
import json, sys
import importlib_metadata
real = importlib_metadata.distributions
importlib_metadata.distributions = lambda: (d for d in real() if d.name != "nshtrainer-ema")
from nshtrainer import ConfigFileError, TrainerConfig
for text in ("callbacks: [{name: ema, decay: 0.9}]", "early_stopping: {patience: 3}"):
    try:
        TrainerConfig.from_text(text)
    except ConfigFileError as error:
        print(error)
print(TrainerConfig().early_stopping, sorted({"torch", "lightning", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)

    for what in (
        "line 1, callbacks[0]: the callback 'ema'",
        "line 1, early_stopping: the callback 'early_stopping'",
    ):
        assert (
            f"{what} is provided by nshtrainer-ema, which is not installed; run `pip install nshtrainer-ema`"
            in done.stdout
        )
    assert done.stdout.splitlines()[-1] == "None []", done.stderr


def test_no_bad_file_needs_torch_to_be_refused(tmp_path: Path):
    """All of the above are refused in a process that never imports torch, Lightning, wandb or numpy."""
    (tmp_path / "bad.json").write_text(json.dumps([[b.text, b.format] for b in FILES.values()]))
    code = """
import json, sys
from nshtrainer import ConfigFileError, TrainerConfig
refused = 0
for text, format_ in json.load(open(sys.argv[1])):
    try:
        TrainerConfig.from_text(text, format_)
    except ConfigFileError:
        refused += 1
print(refused, sorted({"torch", "lightning", "wandb", "numpy"} & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "bad.json")],
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.stdout.split("\n")[0] == f"{len(FILES)} []", done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "misspelt option",
        "YAML with a tab",
        "keep none",
        "JSON with a key twice",
        "TOML without a value",
    ],
)
def test_the_command_line_says_the_same_without_a_traceback(tmp_path: Path, name: str):
    """`nshtrainer validate` ends with status 1 and the message on stderr."""
    bad = FILES[name]
    file = tmp_path / f"run.{bad.format}"
    file.write_text(bad.text)

    result = CliRunner().invoke(app, ["validate", str(file)])

    assert result.exit_code == 1
    assert result.stdout == ""
    assert str(file) in result.stderr
    assert re.search(bad.says, result.stderr)
    assert "Traceback" not in result.stderr


def test_there_are_enough_of_them():
    """The table is the promise of more than sixty inputs."""
    assert len(FILES) + len(OBJECTS) >= 100
