"""Damaged and hostile checkpoints and metadata: never used, never run, and the next best is found."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.metadata import SidecarReader

SIDECAR = ".metadata.json"
SAVED = [2, 4, 6]  # steps with a checkpoint, before anything is damaged
LAST, BEST = "last", "best_val_loss"


class Model(pl.LightningModule):
    """Its metric falls with each step, so that the newest checkpoint is the best one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Linear(64, 64)
        self.started_at: int | None = None

    def on_train_start(self) -> None:
        self.started_at = self.trainer.global_step

    def training_step(self, batch, batch_idx):
        return self.layer(batch[0]).pow(2).mean()

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", 1 / (1 + self.trainer.global_step))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


def fit(root: Path, epochs: int, ckpt_path: str | Path | None = None) -> Trainer:
    config = TrainerConfig.model_validate(
        {
            "id": "r",
            "max_epochs": epochs,
            "loggers": [],
            "primary_metric": {"name": "val/loss", "mode": "min"},
            "directory": {"project_root": root},
            "checkpoint_saving": {
                "checkpoint_callbacks": [
                    {"name": "best_checkpoint", "topk": 3},
                    {"name": "last_checkpoint", "topk": 3},
                ]
            },
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
    )
    data = DataLoader(TensorDataset(torch.ones(2, 64)), batch_size=1)
    trainer = Trainer(config)
    trainer.fit(Model(), data, data, ckpt_path=ckpt_path)
    return trainer


def start_of(trainer: Trainer) -> int:
    model = trainer.lightning_module
    assert isinstance(model, Model)
    assert model.started_at is not None
    return model.started_at


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs, moved away afterwards: paths that the checkpoints hold lead nowhere."""
    base = tmp_path_factory.mktemp("trained")
    fit(base / "made", 3)
    return (base / "made").rename(base / "kept")


@pytest.fixture
def root(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, with three checkpoints of each kind, no two of which share a file."""
    shutil.copytree(trained, tmp_path / "project", symlinks=True)
    return tmp_path / "project"


def checkpoints(root: Path, kind: str = LAST) -> list[Path]:
    """The committed ones, by step."""
    folder = root / "nshtrainer_logs" / "r" / "checkpoint" / kind
    return [r.path for r in sorted(SidecarReader().records(folder), key=lambda r: r.step)]


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self):
        return (Path.touch, (self.flag,))


def _flip(path: Path, flag: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _cut(path: Path, flag: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _zeros(path: Path, flag: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4096:8192] = bytes(4096)
    path.write_bytes(content)


def _empty(path: Path, flag: Path) -> None:
    path.write_bytes(b"")


def _other(path: Path, flag: Path) -> None:
    other = torch.load(path, weights_only=True)
    torch.save({**other, "state_dict": {"layer.weight": torch.zeros(1)}}, path)


def _hostile(path: Path, flag: Path) -> None:
    content = {**torch.load(path, weights_only=True), "extra": Hostile(flag)}
    torch.save(content, path)


DAMAGES = [_flip, _cut, _zeros, _empty, _other, _hostile]
Damage = Callable[[Path, Path], None]


@pytest.fixture(params=DAMAGES, ids=lambda d: d.__name__.strip("_"))
def damage(request: pytest.FixtureRequest) -> Damage:
    return request.param


def damage_newest(root: Path, damage: Damage) -> None:
    """All files of the last step, so that no undamaged twin of it is left."""
    for kind in (LAST, BEST):
        damage(checkpoints(root, kind)[-1], root / "flag")


@pytest.mark.parametrize("source", ["last", "auto"])
def test_a_damaged_newest_checkpoint_is_passed_over(root, damage, source, caplog):
    """Training goes on from the newest whole one; the log names the damaged one, which stays."""
    damage_newest(root, damage)
    damaged = checkpoints(root)[-1]
    content = damaged.read_bytes()

    with caplog.at_level(logging.WARNING, logger="nshtrainer_checkpoint"):
        trainer = fit(root, 4, source)

    assert start_of(trainer) == SAVED[-2]
    assert trainer.global_step == 8
    assert any(str(path) in caplog.text for path in (damaged, checkpoints(root, BEST)[-1]))
    assert damaged.read_bytes() == content
    assert not (root / "flag").exists()


def test_a_damaged_file_that_was_asked_for_is_refused(root, damage):
    """The error names it, says what is wrong, and names the newest good one beside it."""
    *_, good, damaged = checkpoints(root)
    damage(damaged, root / "flag")

    with pytest.raises(ConfigError) as caught:
        fit(root, 4, damaged)

    text = str(caught.value)
    assert str(damaged) in text
    assert "damaged" in text
    assert str(good) in text
    assert not (root / "flag").exists()


def test_a_damaged_best_is_never_loaded(root, damage):
    """`"best"` refuses it, or takes the next best; what it never does is use it."""
    *_, good, damaged = checkpoints(root, BEST)
    damage(damaged, root / "flag")

    try:
        trainer = fit(root, 4, "best")
    except ConfigError as error:
        assert "damaged" in str(error)
        assert str(good) in str(error)
    else:
        assert start_of(trainer) == SAVED[-2]
    assert not (root / "flag").exists()


def test_a_hostile_file_with_matching_metadata_runs_nothing(root):
    """Whoever can write the file can write its metadata: then `weights_only` is what protects."""
    for kind in (LAST, BEST):
        for path in checkpoints(root, kind):
            _hostile(path, root / "flag")
            _claim(path)

    for source in ("last", "best", "auto", checkpoints(root)[-1]):
        with pytest.raises((pickle.UnpicklingError, ConfigError)):
            fit(root, 4, source)
    with pytest.raises(pickle.UnpicklingError):
        Model.load_from_checkpoint(checkpoints(root)[-1])
    assert not (root / "flag").exists()

    torch.load(checkpoints(root)[-1], weights_only=False)
    assert (root / "flag").exists()  # the file is a real one


def test_a_hostile_file_from_elsewhere_runs_nothing(root):
    """One without metadata of ours is left to torch, which refuses what is no plain data."""
    foreign = root / "foreign.ckpt"
    shutil.copyfile(checkpoints(root)[-1], foreign)
    _hostile(foreign, root / "flag")

    with pytest.raises(pickle.UnpicklingError):
        fit(root, 4, foreign)
    assert not (root / "flag").exists()


def _claim(path: Path) -> None:
    content = path.read_bytes()
    edit(
        path,
        checkpoint_size_bytes=len(content),
        checkpoint_checksum=hashlib.sha256(content).hexdigest(),
    )


def edit(path: Path, **changes: Any) -> None:
    """Change the sidecar of *path*; None takes a key away."""
    sidecar = Path(f"{path}{SIDECAR}")
    values = {**json.loads(sidecar.read_text()), **changes}
    sidecar.write_text(json.dumps({k: v for k, v in values.items() if v is not None}))


def _metadata_cut(path: Path) -> None:
    sidecar = Path(f"{path}{SIDECAR}")
    sidecar.write_bytes(sidecar.read_bytes()[:100])


def _metadata_empty(path: Path) -> None:
    Path(f"{path}{SIDECAR}").write_bytes(b"")


def _metadata_without_step(path: Path) -> None:
    edit(path, global_step=None)


def _metadata_of_text(path: Path) -> None:
    edit(path, global_step="six", epoch=[], monitor="val/loss")


def _metadata_of_outside(path: Path) -> None:
    edit(path, checkpoint_filename="../../../outside.ckpt")


UNUSABLE = [
    _metadata_cut,
    _metadata_empty,
    _metadata_without_step,
    _metadata_of_text,
    _metadata_of_outside,
]


@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda s: s.__name__.removeprefix("_metadata_"))
@pytest.mark.parametrize("source", ["last", "auto"])
def test_a_checkpoint_with_unusable_metadata_does_not_exist(root, spoil, source, caplog):
    """The next one is resumed from, the log names the sidecar, and nothing of it is deleted."""
    outside = root / "nshtrainer_logs" / "outside.ckpt"
    outside.write_bytes(b"somebody's")
    newest = [checkpoints(root, kind)[-1] for kind in (LAST, BEST)]
    for path in newest:
        spoil(path)

    with caplog.at_level(logging.WARNING, logger="nshtrainer_checkpoint"):
        trainer = fit(root, 4, source)

    assert start_of(trainer) == SAVED[-2]
    assert trainer.global_step == 8
    assert all(f"{path}{SIDECAR}" in caplog.text for path in newest)
    assert all(path.exists() for path in newest)
    assert outside.read_bytes() == b"somebody's"


def test_a_copy_of_a_run_keeps_its_own_checkpoints(tmp_path):
    """The original lies elsewhere and may be deleted: it takes no place among those that are kept."""
    fit(tmp_path / "original", 3)
    shutil.copytree(tmp_path / "original", tmp_path / "copy", symlinks=True)

    fit(tmp_path / "copy", 4, "last")

    assert len(checkpoints(tmp_path / "copy", BEST)) == 3
    assert len(checkpoints(tmp_path / "original", BEST)) == 3


def test_metadata_whose_checkpoint_vanished_is_passed_over_and_cleared(root):
    """A file that somebody deleted takes no place among those that are kept."""
    gone = [checkpoints(root, kind)[-1] for kind in (LAST, BEST)]
    for path in gone:
        path.unlink()

    trainer = fit(root, 4, "last")

    assert start_of(trainer) == SAVED[-2]
    assert all(path.exists() == Path(f"{path}{SIDECAR}").exists() for path in gone)
    assert [len(checkpoints(root, kind)) for kind in (LAST, BEST)] == [3, 3]


@pytest.mark.parametrize("value", [None, "nan", "NaN", "inf"])
def test_a_metric_that_is_no_number_ranks_last(root, value):
    """JSON has no NaN: null and text stand for it, and training goes on."""
    spoilt = checkpoints(root, BEST)[-1]
    monitor = {"name": "val/loss", "mode": "min", "value": value}
    edit(spoilt, monitor=monitor)

    trainer = fit(root, 4, "last")

    assert start_of(trainer) == SAVED[-1]
    assert trainer.global_step == 8
    kept = [path.name.split("-")[1] for path in checkpoints(root, BEST)]
    assert kept == ["step2", "step4", "step8"]


@pytest.mark.parametrize("stamp", ["2099-01-01T00:00:00+00:00", "1970-01-01T00:00:00+00:00", "no"])
def test_the_clock_decides_nothing(root, stamp):
    """Whatever stamp the oldest one or the newest one has: step and save number tell which is newer."""
    oldest, *_, newest = checkpoints(root)
    edit(oldest if stamp.startswith("2099") else newest, checkpoint_timestamp=stamp)

    trainer = fit(root, 4, "last")

    assert start_of(trainer) == SAVED[-1]
    steps = [path.name.split("-")[1] for path in checkpoints(root)]
    assert steps == ["step4", "step6", "step8"]
