from __future__ import annotations

import errno
import logging
import os
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.background import Background
from nshtrainer_checkpoint.metadata import SidecarReader, is_intact
from nshtrainer_checkpoint.retry import retrying
from nshtrainer_checkpoint.snapshot import Snapshot

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]

MIN = {"name": "val/loss", "mode": "min"}
BEST = {"name": "best_checkpoint", "metric": MIN, "topk": "all"}
LAST = {"name": "last_checkpoint", "topk": "all"}


def saving(*configs: dict[str, Any], **shared: Any) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": list(configs), **shared}}


def steps(folder: Path) -> list[int]:
    return sorted(r.step for r in SidecarReader().records(folder))


class Listener(Callback):
    """Remembers what it is told, and in which thread."""

    def __init__(self) -> None:
        self.saved: list[tuple[str, bool, str]] = []

    def on_checkpoint_saved(self, trainer, pl_module, path, metadata) -> None:
        whole = path.with_name(path.name + ".metadata.json").exists()
        self.saved.append((path.parent.name, whole, threading.current_thread().name))


class BreakFolder(Callback):
    """Puts a file where the folder of checkpoints is, after the first save, for one save."""

    def __init__(self, folder: Path, batch: int) -> None:
        self.folder, self.batch = folder, batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        aside = self.folder.with_name("aside")
        if trainer.global_step == self.batch:
            self.folder.rename(aside)
            self.folder.write_text("no folder")
        elif aside.exists():
            self.folder.unlink()
            aside.rename(self.folder)


def test_best_and_last_share_one_dump(fit, model, folder: Path):
    """Two policies, one moment: one file on disk under two names, each with its own sidecar."""
    fit(model([3.0, 2.0]), **saving(BEST, LAST))

    best = {r.step: r for r in SidecarReader().records(folder / "best_val_loss")}
    last = {r.step: r for r in SidecarReader().records(folder / "last")}
    assert set(best) == set(last) == {4, 8}
    for step, record in best.items():
        assert os.path.samefile(record.path, last[step].path)
        assert record.sha256 == last[step].sha256
        assert record.save_number != last[step].save_number


def test_the_shared_file_counts_every_decision_of_its_moment(fit, model, folder: Path):
    """Resuming from it, best and last both know the save that the file itself is."""
    fit(model([3.0, 2.0]), **saving(BEST, LAST))
    (record,) = [r for r in SidecarReader().records(folder / "last") if r.step == 8]
    states = torch.load(record.path, weights_only=True)["callbacks"]

    saved = [s["last_saved_step"] for s in states.values() if "last_saved_step" in s]
    assert saved == [8, 8]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_steps": 3}, [3, 4, 6, 8]),
        ({"every_n_steps": 3, "on_validation_end": False}, [3, 6, 8]),
        ({"every_n_steps": 3, "on_validation_end": False, "on_train_end": False}, [3, 6]),
        ({"every_n_epochs": 2, "on_validation_end": False, "on_train_end": False}, [8]),
        ({"before_validation": True, "on_validation_end": False}, [4, 8]),
    ],
)
def test_triggers_add_up(fit, model, folder: Path, options: dict[str, Any], expected: list[int]):
    """Each trigger adds its moments; none saves one state twice."""
    fit(model(), **saving({**LAST, **options}))
    assert steps(folder / "last") == expected


def test_best_acts_at_steps_only_on_a_metric_of_that_step(fit, model, folder: Path):
    """A validation metric of an earlier step never ranks later weights."""
    fit(model([3.0, 1.0]), **saving({**BEST, "every_n_steps": 1}))
    assert steps(folder / "best_val_loss") == [4, 8]


def test_an_asynchronous_save_is_the_synchronous_one(fit, model, tmp_path: Path, folder: Path):
    """The same files with the same tensors; committed before they are told of; none is open after."""
    fit(model(), id="sync", **saving(BEST, LAST))
    listener = Listener()
    fit(model(), objects={"callbacks": [listener]}, **saving(BEST, LAST, async_save=True))

    other = folder.parent.parent / "sync" / "checkpoint"
    for name in ("best_val_loss", "last"):
        ours = {r.step: r for r in SidecarReader().records(folder / name)}
        theirs = {r.step: r for r in SidecarReader().records(other / name)}
        assert set(ours) == set(theirs) == {4, 8}
        for step, record in ours.items():
            assert is_intact(record)
            a = torch.load(record.path, weights_only=True)
            b = torch.load(theirs[step].path, weights_only=True)
            for key, value in a["state_dict"].items():
                assert torch.equal(value, b["state_dict"][key])
            assert a["optimizer_states"][0]["state"][0]["step"] == step
    assert (folder / "last.ckpt").resolve() == max(
        SidecarReader().records(folder / "last"), key=lambda r: r.step
    ).path
    assert sorted(name for name, _, _ in listener.saved) == ["best_val_loss"] * 2 + ["last"] * 2
    assert all(whole and thread.startswith("nshtrainer") for _, whole, thread in listener.saved)
    assert not [t for t in threading.enumerate() if t.name.startswith("nshtrainer-checkpoint")]


@pytest.mark.parametrize("async_save", [False, True])
def test_a_save_that_fails_stops_training_with_its_error(
    fit, model, folder: Path, async_save: bool
):
    """By default; what was saved before is as it was."""
    fit(model(), max_epochs=1, **saving(LAST))
    (before,) = SidecarReader().records(folder / "last")
    with pytest.raises(OSError, match=r"last"):
        fit(
            model(),
            max_epochs=3,
            ckpt_path=before.path,
            objects={"callbacks": [BreakFolder(folder / "last", 8)]},
            **saving(LAST, async_save=async_save),
        )
    aside = folder / "aside"
    assert [is_intact(r) for r in SidecarReader().records(aside)] == [True]


@pytest.mark.parametrize("async_save", [False, True])
def test_with_warn_training_goes_on_after_a_save_that_fails(
    fit, model, folder: Path, caplog, async_save: bool
):
    """The error is logged, the next save succeeds, and the list of checkpoints tells the truth."""
    with caplog.at_level(logging.ERROR):
        trainer = fit(
            model(),
            max_epochs=3,
            objects={"callbacks": [BreakFolder(folder / "last", 8)]},
            **saving(LAST, on_save_error="warn", async_save=async_save),
        )
    assert trainer.global_step == 12
    failed = sum("could not be written" in r.message for r in caplog.records)
    if async_save:  # the save of step 4 may be under way when its folder goes
        assert steps(folder / "last") in ([4, 12], [12])
        assert failed >= 1
    else:
        assert steps(folder / "last") == [4, 12]
        assert failed == 1
    shown = {Path(p).name for p in trainer.checkpoint_callback.best_k_models}
    assert shown == {r.path.name for r in SidecarReader().records(folder / "last")}


def test_a_damaged_checkpoint_is_refused_with_the_good_one_named(fit, model, folder: Path):
    """One flipped bit: the error says file, damage and what to use instead."""
    fit(model(), **saving(LAST))
    good, bad = sorted(SidecarReader().records(folder / "last"), key=lambda r: r.step)
    content = bytearray(bad.path.read_bytes())
    content[len(content) // 2] ^= 1
    bad.path.write_bytes(content)

    with pytest.raises(ConfigError, match=r"SHA-256") as error:
        fit(model(), max_epochs=3, ckpt_path=bad.path, **saving(LAST))
    assert str(bad.path) in str(error.value)
    assert str(good.path) in str(error.value)


def test_a_cause_that_passes_is_waited_for():
    """A full disk for a moment costs a moment; a missing permission is said at once."""
    outcomes: list[int] = [errno.ENOSPC, errno.EIO]

    def action() -> str:
        if outcomes:
            raise OSError(outcomes.pop(0), "no")
        return "written"

    assert retrying(action, "x", waits=(0, 0, 0)) == "written"
    outcomes[:] = [errno.EACCES]
    with pytest.raises(PermissionError):
        retrying(action, "x", waits=(0, 0, 0))
    outcomes[:] = [errno.ENOSPC] * 4
    with pytest.raises(OSError, match="no"):
        retrying(action, "x", waits=(0, 0, 0))


def test_a_snapshot_keeps_what_training_changes():
    """Later changes of the originals do not reach it, and tied tensors stay tied."""
    weight = torch.arange(6.0).reshape(2, 3)
    model = torch.nn.Linear(2, 2)
    live = {"a": weight, "tied": weight, "part": weight[1:], "t": weight.T, "n": (1, [weight[0]])}
    live["module"] = model.state_dict()
    snapshot = Snapshot()
    taken = snapshot.take(live)
    expected = weight.clone()
    weight.zero_()

    assert torch.equal(taken["a"], expected)
    assert torch.equal(taken["t"], expected.T)
    assert torch.equal(taken["part"], expected[1:])
    assert torch.equal(taken["n"][1][0], expected[0])
    assert taken["tied"].data_ptr() == taken["a"].data_ptr()
    assert taken["module"]._metadata == live["module"]._metadata

    again = snapshot.take(live)
    assert again["a"].data_ptr() == taken["a"].data_ptr()  # the buffer serves again
    assert not again["a"].any()


def test_a_job_in_the_background_raises_once():
    """Its error reaches who waits next, and only that one."""
    background = Background()
    background.submit(lambda: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        background.wait()
    background.wait()
    background.close()
