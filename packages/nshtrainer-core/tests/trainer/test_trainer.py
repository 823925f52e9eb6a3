"""`Trainer`: a Lightning trainer made from a configuration."""

from __future__ import annotations

import csv
import json
import os
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import SingleDeviceStrategy

from nshtrainer import CallbackConfigBase, ConfigError, Trainer, TrainerConfig, callback_registry
from nshtrainer.testing import TinyDataModule, TinyModule
from nshtrainer.trainer.config import SLOTS


@pytest.fixture(autouse=True)
def only_core(isolated_plugins: Any) -> None:
    """The core alone: what the families add is tested elsewhere."""


def config(folder: Path, **fields: Any) -> TrainerConfig:
    return TrainerConfig(
        **{
            "directory": {"project_root": folder},
            "max_epochs": 2,
            "accelerator": "cpu",
            "devices": 1,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            **fields,
        }
    )


def rows(trainer: Trainer) -> list[dict[str, str]]:
    (path,) = trainer.config.run.directory.root.glob("log/csv/**/metrics.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_trains_logs_and_records_itself(tmp_path: Path):
    """Metrics, configuration and facts of the run lie in its folder; the config read back is the run's."""
    trainer = Trainer(config(tmp_path, name=["my", "run"], meta={"token": "ghp_" + "a" * 36}))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    root = tmp_path / "nshtrainer_logs" / trainer.config.run.id
    record = json.loads((root / "run.json").read_text())

    assert [r for r in rows(trainer) if r["val_loss"]]
    assert (root / "log" / "csv" / "my run" / trainer.config.run.id / "metrics.csv").is_file()
    assert TrainerConfig.from_file(root / "config.yaml").id == trainer.config.run.id
    assert record["status"] == "finished"
    assert record["environment"]["python"]["version"]
    assert "nshtrainer-core" in record["plugins"]
    assert (tmp_path / "nshtrainer_logs" / ".gitignore").read_text().splitlines()[-1] == "*"


def test_a_run_that_fails_before_its_first_batch_is_recorded_too(tmp_path: Path):
    """Otherwise nobody could tell what it was that failed."""

    class Failing(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            raise RuntimeError("no data")

    trainer = Trainer(config(tmp_path), callbacks=[Failing()])
    with pytest.raises(RuntimeError, match="no data"):
        trainer.fit(TinyModule(), datamodule=TinyDataModule())

    root = trainer.config.run.directory.root
    assert json.loads((root / "run.json").read_text())["status"] == "stopped by RuntimeError"
    assert TrainerConfig.from_file(root / "config.yaml").id == trainer.config.run.id


def test_no_secret_reaches_any_file_of_the_run(tmp_path: Path):
    """A token in the config is redacted in the record, the hyper-parameters and the config."""
    secret = "ghp_" + "Zx9" * 12
    trainer = Trainer(
        config(tmp_path, meta={"api_token": secret, "url": f"https://me:{secret}@host/x"})
    )
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "x.ckpt")

    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert written
    assert [p for p in written if secret.encode() in p.read_bytes()] == []


def test_building_a_trainer_creates_nothing_and_a_missing_root_is_made(tmp_path: Path):
    """Folders are made at the first write, parents too."""
    root = tmp_path / "not" / "there"
    trainer = Trainer(config(root))
    assert not root.exists()

    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    assert (root / "nshtrainer_logs" / trainer.config.run.id).is_dir()


def test_the_trainers_config_is_its_own(tmp_path: Path):
    """Later changes of the given config do not reach the run; what was appended is checked."""
    given = config(tmp_path, tags=["a"])
    trainer = Trainer(given)
    given.tags.append("b")

    assert trainer.config.tags == ["a"]
    given.meta["x"] = object()
    with pytest.raises(ValueError, match="plain data is expected"):
        Trainer(given)


def test_a_mapping_is_a_config_too(tmp_path: Path):
    """`Trainer({...})` validates; another object is refused with a hint."""
    assert Trainer({"max_epochs": 3, "loggers": []}).config.max_epochs == 3
    with pytest.raises(TypeError, match="a TrainerConfig or a mapping is expected, not int"):
        Trainer(3)


def test_objects_are_keywords_and_plain_values_belong_in_the_config(tmp_path: Path):
    """A strategy object is taken; max_epochs=3, a typo and a value given twice are refused."""
    trainer = Trainer(
        config(tmp_path, loggers=[]), strategy=SingleDeviceStrategy(device=torch.device("cpu"))
    )
    assert isinstance(trainer.strategy, SingleDeviceStrategy)

    with pytest.raises(TypeError, match=r"max_epochs=3 belongs in the config"):
        Trainer(config(tmp_path), max_epochs=3)
    with pytest.raises(TypeError, match="'max_epoch' is no argument"):
        Trainer(config(tmp_path), max_epoch=3)
    with pytest.raises(TypeError, match="'strategy' is given twice"):
        Trainer(config(tmp_path, strategy="auto"), strategy=SingleDeviceStrategy())
    with pytest.raises(TypeError, match=r"default_root_dir.*directory"):
        Trainer(config(tmp_path), default_root_dir=tmp_path)


def test_loggers_given_as_objects_join_the_configured_ones(tmp_path: Path):
    """Both log; the record names the object."""
    trainer = Trainer(config(tmp_path), logger=CSVLogger(tmp_path / "mine"))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    record = json.loads((trainer.config.run.directory.root / "run.json").read_text())

    assert len(trainer.loggers) == 2
    assert list((tmp_path / "mine").rglob("metrics.csv"))
    assert record["objects"] == {"logger": "'CSVLogger'"}


def test_loggers_are_sorted_by_priority_and_a_disabled_one_is_not_made(tmp_path: Path):
    """The order is the priority's; what is switched off leaves no trace."""
    loggers = [
        {"name": "csv", "prefix": "low"},
        {"name": "csv", "prefix": "high", "priority": 5, "log_dir": tmp_path / "high"},
        {"name": "csv", "enabled": False},
    ]
    trainer = Trainer(config(tmp_path, loggers=loggers))

    assert [logger._prefix for logger in trainer.loggers] == ["high", "low"]


@pytest.mark.parametrize("name", ["csv", "tensorboard"])
def test_two_loggers_that_would_write_the_same_files_are_refused(tmp_path: Path, name: str):
    """Also with prefixes; in folders of their own, or where one is switched off, they are fine."""
    twice: list[dict[str, Any]] = [{"name": name, "prefix": "a"}, {"name": name, "prefix": "b"}]

    with pytest.raises(ConfigError, match=rf"loggers\[0\] and loggers\[1\] are both '{name}'"):
        Trainer(config(tmp_path, loggers=twice))
    for harmless in ({"enabled": False}, {"log_dir": tmp_path / "own"}):
        fine = TrainerConfig(loggers=[twice[0], {**twice[1], **harmless}])
        pytest.importorskip(name, reason="the extra tensorboard is not installed")
        assert Trainer(fine).loggers


def test_tensorboard_writes_into_the_runs_folder(tmp_path: Path):
    """Event files lie below the run's log folder."""
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    trainer = Trainer(config(tmp_path, loggers=[{"name": "tensorboard"}]))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert list(trainer.config.run.directory.root.glob("log/tensorboard/**/events.out.tfevents.*"))


def test_metrics_work_without_any_logger(tmp_path: Path):
    """Callbacks see the metrics although nothing is logged."""
    trainer = Trainer(config(tmp_path, loggers=[]))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert {"train_loss", "val_loss"} <= set(trainer.callback_metrics)


def test_what_is_logged_at_one_step_is_one_row(tmp_path: Path):
    """A callback's metrics and the module's, at the same step, share a row of the CSV file."""

    class Extra(Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.logger.log_metrics(
                {"extra": 1.0}, step=trainer.fit_loop.epoch_loop._batches_that_stepped
            )

    trainer = Trainer(config(tmp_path, max_epochs=1), callbacks=[Extra()])
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    found = rows(trainer)

    assert len({r["step"] for r in found}) == len(found)
    assert any(r["extra"] and r["train_loss"] for r in found)


def test_a_second_session_of_a_run_adds_rows_and_loses_none(tmp_path: Path):
    """Lightning's CSV logger deletes the earlier file; a resumed run keeps its curve."""
    for _ in range(2):
        trainer = Trainer(config(tmp_path, id="one", max_epochs=1))
        trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert len([r for r in rows(trainer) if r["val_loss"]]) == 2


def test_a_resumed_run_has_one_row_for_each_step(tmp_path: Path):
    """What a session logged after its last checkpoint, before it was killed, is not there twice."""
    first = Trainer(config(tmp_path, id="one", max_epochs=1))
    first.fit(TinyModule(), datamodule=TinyDataModule())
    first.save_checkpoint(tmp_path / "x.ckpt")
    lost = Trainer(config(tmp_path, id="one", max_epochs=3, ckpt_path=str(tmp_path / "x.ckpt")))
    lost.fit(TinyModule(), datamodule=TinyDataModule())
    again = Trainer(config(tmp_path, id="one", max_epochs=2, ckpt_path=str(tmp_path / "x.ckpt")))
    again.fit(TinyModule(), datamodule=TinyDataModule())
    steps = [int(r["step"]) for r in rows(again)]

    assert steps == list(range(8))


def test_the_configs_checkpoint_counts_for_one_fit(tmp_path: Path):
    """It is not loaded over the weights by test() or a second fit()."""
    start = Trainer(config(tmp_path, max_epochs=1, loggers=[]))
    start.fit(TinyModule(), datamodule=TinyDataModule())
    start.save_checkpoint(tmp_path / "start.ckpt")
    module = TinyModule()
    trainer = Trainer(
        config(tmp_path, max_epochs=2, loggers=[], ckpt_path=str(tmp_path / "start.ckpt"))
    )
    trainer.fit(module, datamodule=TinyDataModule())
    trained = [p.detach().clone() for p in module.parameters()]

    assert trainer.global_step == 8  # four steps were in the checkpoint
    trainer.test(module, datamodule=TinyDataModule(), verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, datamodule=TinyDataModule())
    assert trainer.global_step == 12
    assert not all(torch.equal(a, b) for a, b in zip(trained, module.parameters(), strict=True))


def test_a_checkpoint_carries_the_config_as_plain_data(tmp_path: Path):
    """It loads with `weights_only=True`, and gives the run's configuration back."""
    trainer = Trainer(config(tmp_path, max_epochs=1, loggers=[], max_time="00:01:00:00"))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    loaded = torch.load(tmp_path / "x.ckpt", weights_only=True)
    again = Trainer.config_from_checkpoint(tmp_path / "x.ckpt")

    assert loaded["nshtrainer"]["run_id"] == trainer.config.run.id
    assert again == trainer.config.replace(id=trainer.config.run.id)


def test_nothing_is_saved_when_no_checkpoint_callback_was_asked_for(tmp_path: Path):
    """Lightning does not add its own ModelCheckpoint behind our back."""
    trainer = Trainer(config(tmp_path))
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert trainer.checkpoint_callbacks == []
    assert list(tmp_path.rglob("*.ckpt")) == []


def test_lightnings_environment_variables_stay_in_force(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`PL_TRAINER_*` fills what the config leaves open, and only that."""
    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "7")
    monkeypatch.setenv("PL_TRAINER_LOG_EVERY_N_STEPS", "3")

    assert Trainer(TrainerConfig(loggers=[])).max_epochs == 7
    assert Trainer(TrainerConfig(loggers=[])).log_every_n_steps == 3
    assert Trainer(TrainerConfig(loggers=[], max_epochs=2)).max_epochs == 2


def test_a_lightning_variable_that_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch):
    """The error says which variable; an empty one is none, as with Lightning."""
    monkeypatch.setenv("PL_TRAINER_MIN_EPOCHS", "")
    assert Trainer(TrainerConfig(loggers=[])).min_epochs is None

    monkeypatch.setenv("PL_TRAINER_MAX_EPOCHS", "abc")
    with pytest.raises(ConfigError, match=r"PL_TRAINER_MAX_EPOCHS='abc'.*valid integer"):
        Trainer(TrainerConfig(loggers=[]))


def test_a_keyword_wins_over_a_lightning_variable(monkeypatch: pytest.MonkeyPatch):
    """As with Lightning; nothing was given twice."""
    monkeypatch.setenv("PL_TRAINER_STRATEGY", "ddp")
    strategy = SingleDeviceStrategy(device=torch.device("cpu"))

    assert Trainer(TrainerConfig(loggers=[]), strategy=strategy).strategy is strategy


@pytest.mark.parametrize("name", ["LOGGER", "DEFAULT_ROOT_DIR", "CALLBACKS", "PLUGINS"])
def test_a_lightning_variable_without_effect_is_told(name: str, monkeypatch: pytest.MonkeyPatch):
    """What the config decides by itself is not silently kept from it."""
    monkeypatch.setenv(f"PL_TRAINER_{name}", "x")

    with pytest.warns(UserWarning, match=f"PL_TRAINER_{name} has no effect") as caught:
        Trainer(TrainerConfig(loggers=[]))
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["strategy", "profiler", "logger", "plugins", "default_root_dir"])
def test_a_keyword_that_is_none_is_not_given(name: str):
    """`strategy=None` is Lightning's default, and how a script says nothing."""
    assert Trainer(TrainerConfig(loggers=[]), **{name: None}).loggers == []


def test_a_file_in_the_place_of_a_folder_is_told_before_training(tmp_path: Path):
    """At the trainer, and not when the first record is written."""
    (tmp_path / "file").touch()

    with pytest.raises(ConfigError, match=r"file is a file; name another folder"):
        Trainer(config(tmp_path / "file" / "below"))


class SavingConfig(CallbackConfigBase):
    """Yields Lightning's checkpoint callback."""

    name: Literal["saving"] = "saving"

    def create_callbacks(self, trainer_config: TrainerConfig) -> Any:
        yield ModelCheckpoint()


def test_what_barebones_mode_cannot_have_is_refused_by_name(tmp_path: Path):
    """A logger object, and a checkpoint callback that asks to stay."""
    callback_registry.register(SavingConfig)
    kept = SavingConfig(metadata={"enabled_for_barebones": True})

    with pytest.raises(ConfigError, match=r"CSVLogger.* does not go with barebones=True"):
        Trainer(TrainerConfig(barebones=True), logger=CSVLogger(tmp_path))
    with pytest.raises(ConfigError, match="but ModelCheckpoint has enabled_for_barebones=true"):
        Trainer(TrainerConfig(barebones=True, callbacks=[kept]))


@pytest.mark.parametrize("loggers", [["csv"], ["csv", "tensorboard"]])
def test_a_trainer_can_be_pickled(tmp_path: Path, loggers: list[str]):
    """Processes that are spawned get it that way; the copy is the same run."""
    for name in loggers:
        pytest.importorskip(name, reason="the extra tensorboard is not installed")
    trainer = Trainer(config(tmp_path, id="one", loggers=[{"name": name} for name in loggers]))
    copy = pickle.loads(pickle.dumps(trainer))

    assert [x.log_dir for x in copy.loggers] == [x.log_dir for x in trainer.loggers]
    assert copy.config == trainer.config


@pytest.mark.filterwarnings("ignore:You are trying to `self.log:UserWarning")
def test_barebones_runs(tmp_path: Path):
    """Lightning refuses loggers and bars there, so none is passed."""
    trainer = Trainer(
        TrainerConfig(
            barebones=True, max_epochs=1, accelerator="cpu", directory={"project_root": tmp_path}
        )
    )
    trainer.fit(TinyModule(), datamodule=TinyDataModule())

    assert trainer.global_step == 4
    assert list(tmp_path.iterdir()) == []


def test_a_seed_makes_two_runs_equal(tmp_path: Path):
    """`seed` is set before anything random is made by the trainer."""
    numbers = []
    for _ in range(2):
        Trainer(config(tmp_path, loggers=[], seed=5))
        numbers.append(torch.rand(3))

    assert torch.equal(*numbers)


def test_the_record_survives_an_exception_and_says_so(tmp_path: Path):
    """A run that died is recorded as such, and the user's exception is the one that is raised."""

    class Dies(TinyModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if batch_idx == 2:
                raise RuntimeError("mine")
            return super().training_step(batch, batch_idx)

    trainer = Trainer(config(tmp_path))
    with pytest.raises(RuntimeError, match=r"^mine$"):
        trainer.fit(Dies(), datamodule=TinyDataModule())
    record = json.loads((trainer.config.run.directory.root / "run.json").read_text())

    assert record["status"] == "stopped by RuntimeError"
    assert [r for r in rows(trainer) if r["train_loss"]]


def test_a_model_without_source_code_trains(tmp_path: Path):
    """A class made by `exec`, as in a notebook or `python -c`, has no file to look into."""
    namespace: dict[str, Any] = {"TinyModule": TinyModule}
    exec("class Mine(TinyModule):\n    pass", namespace)  # noqa: S102 -- no source file
    trainer = Trainer(config(tmp_path, max_epochs=1))
    trainer.fit(namespace["Mine"](), datamodule=TinyDataModule())

    assert trainer.global_step == 4


def test_an_evaluation_after_another_stage_keeps_what_was_recorded(tmp_path: Path):
    """The surroundings are looked at once, in the background; later stages change nothing."""
    trainer = Trainer(config(tmp_path, max_epochs=1))
    module = TinyModule()
    trainer.fit(module, datamodule=TinyDataModule())
    first = (trainer.config.run.directory.root / "run.json").read_text()
    trainer.validate(module, datamodule=TinyDataModule(), verbose=False)
    trainer.test(module, datamodule=TinyDataModule(), verbose=False)

    assert json.loads((trainer.config.run.directory.root / "run.json").read_text()) == json.loads(
        first
    )
    assert len(first) < 100_000


RANKS = """
import sys
from pathlib import Path
from nshtrainer import CallbackConfigBase, ConfigError, Trainer, TrainerConfig, callback_registry
from nshtrainer.testing import TinyDataModule, TinyModule
config = TrainerConfig(
    directory={"project_root": sys.argv[1]}, max_epochs=1, accelerator="cpu", devices=2, strategy="ddp",
    enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
)
trainer = Trainer(config)
trainer.fit(TinyModule(), datamodule=TinyDataModule())
Path(sys.argv[1], f"rank{trainer.global_rank}").write_text(trainer.config.run.id + " " + trainer.default_root_dir)
"""

AT_EXIT = """
import atexit
from torch import distributed
atexit.register(lambda: print("open at exit:", distributed.is_initialized(), flush=True))
"""
"""Registered before all others, so that it is called after them."""


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("launcher", ["lightning", "torchrun"])
def test_all_ranks_share_one_run(tmp_path: Path, launcher: str):
    """Without an id in the config, both ranks get the one that rank zero made: one run folder.

    At exit the process group is closed, since gloo's threads may abort a process that shuts down.
    """
    script = tmp_path / "train.py"
    script.write_text(AT_EXIT + textwrap.dedent(RANKS))
    command = (
        [sys.executable]
        if launcher == "lightning"
        else [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    )
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("open at exit: False") == 2
    ranks = [(tmp_path / "out" / f"rank{i}").read_text() for i in range(2)]
    assert ranks[0] == ranks[1]
    assert len(list((tmp_path / "out" / "nshtrainer_logs").glob("[!.]*"))) == 1


SPAWNED = f"""
{RANKS.split("config = ", maxsplit=1)[0]}
if __name__ == "__main__":
    config = TrainerConfig(
        directory={{"project_root": sys.argv[1]}}, max_epochs=1, accelerator="cpu", devices=2,
        strategy="ddp_spawn", enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, log_every_n_steps=1,
    )
    trainer = Trainer(config)
    trainer.fit(TinyModule(), datamodule=TinyDataModule())
    print("run", trainer.config.run.id)
"""


@pytest.mark.slow
@pytest.mark.distributed
def test_spawned_ranks_train_and_write_one_run(tmp_path: Path):
    """`ddp_spawn` with the default loggers: the processes get the trainer pickled."""
    script = tmp_path / "train.py"
    script.write_text(SPAWNED)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "out")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-3000:]
    run_id = done.stdout.split("run ")[1].strip()
    (root,) = (tmp_path / "out" / "nshtrainer_logs").glob("[!.]*")
    assert root.name == run_id
    assert json.loads((root / "run.json").read_text())["status"] == "finished"
    (metrics,) = root.rglob("metrics.csv")
    assert "train_loss" in metrics.read_text()


def test_every_slot_is_off_where_no_family_may_be_used():
    """Core alone: defaults that need a family are None, and the rest works."""
    made = TrainerConfig()

    assert {slot: getattr(made, slot) for slot in SLOTS} == dict.fromkeys(SLOTS)


def test_a_plain_lightning_module_needs_no_change(tmp_path: Path):
    """Our Trainer is a Lightning trainer."""
    assert issubclass(Trainer, pl.Trainer)
