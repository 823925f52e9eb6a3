from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint import OnExceptionCheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader, is_intact

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*ended before the epoch ended"),  # resumed in mid-epoch
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),
]

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "devices": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
LAST = {"name": "last_checkpoint"}
EMERGENCY = {"name": "on_exception_checkpoint"}


def only(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": list(configs)}}


class Fail(Callback):
    """Raises in a hook, once a step has been made."""

    def __init__(self, hook: str, step: int, error: type[BaseException] = RuntimeError) -> None:
        def raise_at(trainer, *args, **kwargs):
            if trainer.global_step >= step:
                raise error("the user's error")

        setattr(self, hook, raise_at)


@pytest.mark.parametrize(
    ("hook", "step", "saved"),
    [
        ("on_train_batch_end", 3, 3),
        ("on_train_batch_start", 2, 2),
        ("on_validation_batch_end", 4, 4),
        ("on_train_epoch_end", 4, 4),
        ("on_train_batch_start", 0, None),
        ("on_train_start", 0, None),
        ("setup", 0, None),
    ],
)
def test_an_exception_after_a_step_saves(fit, model, folder: Path, hook, step: int, saved):
    """One whole checkpoint of the right step; before the first step none."""
    with pytest.raises(RuntimeError, match="the user's error"):
        fit(model(), objects={"callbacks": [Fail(hook, step)]}, **only(EMERGENCY))

    records = SidecarReader().records(folder / "on_exception")
    assert [(r.path.name, r.step) for r in records] == (
        [("on_exception_r.ckpt", saved)] if saved else []
    )
    assert all(is_intact(r) for r in records)


def test_ctrl_c_saves_too(fit, model, folder: Path):
    """KeyboardInterrupt leaves a checkpoint; Lightning then exits."""
    with pytest.raises(SystemExit):
        fit(
            model(),
            objects={"callbacks": [Fail("on_train_batch_end", 2, KeyboardInterrupt)]},
            **only(EMERGENCY),
        )

    assert [r.step for r in SidecarReader().records(folder / "on_exception")] == [2]


def test_neither_test_nor_validate_saves(fit, model, loader, folder: Path):
    """Only training is worth saving."""
    failing = Fail("on_test_start", 0)
    trainer = fit(model(), objects={"callbacks": [failing]}, **only(EMERGENCY))
    with pytest.raises(RuntimeError, match="the user's error"):
        trainer.test(model(), loader())

    assert not (folder / "on_exception").exists()


def test_the_sanity_check_does_not_save(fit, model, folder: Path):
    """Its weights are untrained."""
    with pytest.raises(RuntimeError):
        fit(
            model(),
            num_sanity_val_steps=1,
            objects={"callbacks": [Fail("on_validation_batch_end", 0)]},
            **only(EMERGENCY),
        )

    assert not (folder / "on_exception").exists()


class Unsaveable(Callback):
    def state_dict(self) -> dict[str, Any]:
        raise ValueError("this state cannot be saved")


def test_what_another_callback_cannot_save_is_left_out_and_named(fit, model, folder: Path, caplog):
    """The rest is saved, the culprit is named, and the user's error is the one raised."""
    with pytest.raises(RuntimeError, match="the user's error"), caplog.at_level(logging.ERROR):
        fit(
            model(),
            objects={"callbacks": [Fail("on_train_batch_end", 2), Unsaveable()]},
            **only(EMERGENCY),
        )

    assert "Unsaveable.state_dict failed" in caplog.text
    assert [r.step for r in SidecarReader().records(folder / "on_exception")] == [2]


class Unpicklable(Callback):
    def state_dict(self) -> dict[str, Any]:
        return {"open": threading.Lock()}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        checkpoint["mine"] = threading.Lock()
        checkpoint["plain"] = 1


def test_what_cannot_be_written_is_left_out_and_named(fit, model, folder: Path, caplog):
    """A state that no file can hold costs that state only; the file resumes."""
    with pytest.raises(RuntimeError, match="the user's error"), caplog.at_level(logging.ERROR):
        fit(
            model(),
            objects={"callbacks": [Fail("on_train_batch_end", 2), Unpicklable()]},
            **only(EMERGENCY),
        )

    assert "'Unpicklable' cannot be written" in caplog.text
    assert "'mine' cannot be written" in caplog.text
    (record,) = SidecarReader().records(folder / "on_exception")
    loaded = torch.load(record.path, weights_only=True)
    assert "mine" not in loaded
    assert loaded["plain"] == 1
    assert fit(model(), ckpt_path=str(record.path), **only(EMERGENCY)).global_step == 8


class FailAgain(Callback):
    """Its own clean-up fails, and it comes before the checkpoint callbacks."""

    def on_exception(self, trainer, pl_module, exception) -> None:
        raise OSError("the clean-up failed")


class FailingData(LightningDataModule):
    def __init__(self, make) -> None:
        super().__init__()
        self.make = make

    def train_dataloader(self):
        return self.make()

    def on_exception(self, exception) -> None:
        raise OSError("the data's clean-up failed")


def test_a_failing_on_exception_neither_hides_the_error_nor_stops_the_save(
    plain_fit, model, loader, tmp_path: Path, caplog
):
    """The user's error is raised, the others are named, and the next fit knows nothing of it."""
    failing, data, look = FailAgain(), FailingData(loader), Look()
    ours = OnExceptionCheckpointCallback()
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        callbacks=[failing, Fail("on_train_batch_end", 2), ours, look],
        logger=False,
        max_epochs=2,
        **QUIET,
    )
    with (
        pytest.raises(RuntimeError, match="the user's error") as caught,
        caplog.at_level(logging.ERROR),
        pytest.warns(UserWarning, match="no `val_dataloader`"),
    ):
        trainer.fit(model(), datamodule=data)

    assert caught.value.__context__ is None
    assert "FailAgain.on_exception failed" in caplog.text
    assert "FailingData.on_exception failed" in caplog.text
    assert [r.step for r in SidecarReader().records(ours.writer.folder)] == [2]
    assert "on_exception" not in {**vars(failing), **vars(data), **vars(look)}


def test_without_an_exception_nothing_is_left_on_other_callbacks(plain_fit, model):
    """What was put around them for the fit is gone."""
    failing = FailAgain()
    plain_fit(model(), [OnExceptionCheckpointCallback(), failing], max_epochs=1)

    assert "on_exception" not in vars(failing)


def test_a_folder_that_cannot_be_made_is_told_and_the_users_error_raised(
    plain_fit, model, tmp_path: Path, caplog
):
    """A file in the way of the folder."""
    (tmp_path / "checkpoint").write_text("in the way")
    with pytest.raises(RuntimeError, match="the user's error"), caplog.at_level(logging.ERROR):
        plain_fit(model(), [OnExceptionCheckpointCallback(), Fail("on_train_batch_end", 2)])

    assert "no checkpoint could be saved on RuntimeError" in caplog.text
    assert (tmp_path / "checkpoint").read_text() == "in the way"


@pytest.mark.parametrize("path", ["auto", "last"])
def test_alone_it_is_found_by_every_documented_name(fit, model, folder: Path, path: str):
    """With no other checkpoint callback; damaged, it is not."""
    with pytest.raises(RuntimeError):
        fit(
            model(),
            max_epochs=3,
            objects={"callbacks": [Fail("on_train_batch_end", 6)]},
            **only(EMERGENCY),
        )

    trainer = fit(model(), ckpt_path=path, max_epochs=3, **only(EMERGENCY))
    assert Path(trainer.ckpt_path) == folder / "on_exception" / "on_exception_r.ckpt"
    assert trainer.global_step == 12


def test_a_damaged_one_is_refused_when_it_is_alone(fit, model, folder: Path):
    """As beside other checkpoint callbacks."""
    with pytest.raises(RuntimeError):
        fit(model(), objects={"callbacks": [Fail("on_train_batch_end", 6)]}, **only(EMERGENCY))
    path = folder / "on_exception" / "on_exception_r.ckpt"
    path.write_bytes(path.read_bytes()[:-1])

    with pytest.raises(ConfigError, match="damaged"):
        fit(model(), ckpt_path=str(path), **only(EMERGENCY))


def test_every_hook_of_lightnings_class_is_ours():
    """A hook that a later Lightning adds would act behind our back: this notices."""
    theirs = {n for n in vars(ModelCheckpoint) if n.startswith("on_") or n in vars(Callback)}
    theirs -= {"__module__", "__doc__", "__dict__", "__weakref__"}

    assert not {n for n in theirs if n not in vars(OnExceptionCheckpointCallback)}


def test_last_means_the_emergency_checkpoint_only_if_it_is_the_newest(fit, model, folder: Path):
    """Resumed from it when it is ahead; once training went further, it is not."""
    saving = only(LAST, EMERGENCY)
    with pytest.raises(RuntimeError):
        fit(model(), objects={"callbacks": [Fail("on_train_batch_end", 6)]}, **saving)
    trainer = fit(model(), ckpt_path="last", max_epochs=3, **saving)
    assert Path(trainer.ckpt_path) == folder / "on_exception" / "on_exception_r.ckpt"
    assert trainer.global_step == 12

    trainer = fit(model(), ckpt_path="last", max_epochs=4, **saving)
    assert Path(trainer.ckpt_path).parent.name == "last"


def test_a_fit_without_ckpt_path_starts_from_scratch(fit, model):
    """The callback does not turn `ckpt_path=None` into `"last"`."""
    with pytest.raises(RuntimeError):
        fit(model(), objects={"callbacks": [Fail("on_train_batch_end", 2)]}, **only(EMERGENCY))

    assert fit(model(), max_epochs=1, **only(EMERGENCY)).global_step == 4


def test_repeated_crashes_do_not_pile_up(fit, model, folder: Path):
    """Each crash replaces the emergency file, except the one that training resumed from."""
    saving = only(LAST, EMERGENCY)
    for step in (2, 3, 6, 7):
        with pytest.raises(RuntimeError):
            fit(
                model(),
                ckpt_path="last" if step > 2 else None,
                objects={"callbacks": [Fail("on_train_batch_end", step)]},
                **saving,
            )

        records = SidecarReader().records(folder / "on_exception")
        assert max(r.step for r in records) == step
        assert all(is_intact(r) for r in records)
        assert len(records) <= 2


def test_the_strategy_is_as_before(plain_fit, model, tmp_path: Path):
    """By hand on a plain trainer; the barrier that was set aside is back."""
    look = Look()
    with pytest.raises(RuntimeError):
        plain_fit(model(), [OnExceptionCheckpointCallback(), Fail("on_train_batch_end", 1), look])

    assert "barrier" not in vars(look.trainer.strategy)
    assert (tmp_path / "checkpoint" / "on_exception" / "on_exception.ckpt").exists()


class Look(Callback):
    """Keeps the trainer to look at."""

    def setup(self, trainer, pl_module, stage: str) -> None:
        self.trainer = trainer
