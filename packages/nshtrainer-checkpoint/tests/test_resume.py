from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from nshtrainer_checkpoint.metadata import SidecarReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]

MIN = {"name": "val/loss", "mode": "min"}


def only(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"checkpoint_saving": {"checkpoint_callbacks": list(configs)}}


BEST = {"name": "best_checkpoint", "metric": MIN}
LAST = {"name": "last_checkpoint"}


def steps(folder: Path) -> list[int]:
    return sorted(r.step for r in SidecarReader().records(folder))


def equal(a: Any, b: Any) -> bool:
    """Bitwise."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


class _Stop(Callback):
    """Dies at the start of an epoch, as a killed process would, without saving."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, pl_module) -> None:
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("killed")


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(fit, model, tmp_path: Path, k: int):
    """N epochs = k epochs, an interruption, N - k epochs: weights, moments, schedule, best list."""
    fields = {"max_epochs": 5, **only({**BEST, "topk": 2}, LAST)}
    straight = fit(model(scheduler=True), id="straight", **fields)
    with pytest.raises(RuntimeError, match="killed"):
        fit(model(scheduler=True), objects={"callbacks": [_Stop(k)]}, **fields)
    resumed = fit(model(scheduler=True), ckpt_path="last", **fields)

    assert resumed.global_step == straight.global_step == 20
    files = [Path(t.checkpoint_callbacks[1].last_model_path) for t in (straight, resumed)]
    a, b = (torch.load(f, weights_only=True) for f in files)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step"):
        assert equal(a[part], b[part]), part
    kept = [
        sorted(Path(p).name for p in t.checkpoint_callback.best_k_models)
        for t in (straight, resumed)
    ]
    assert kept[0] == kept[1]


def test_last_is_found_by_a_new_process_of_the_run(fit, model, folder: Path):
    """`ckpt_path="last"` needs nothing but the run's id; without any checkpoint it starts anew."""
    with pytest.warns(UserWarning, match="no last checkpoint"):
        fit(model(), ckpt_path="last", max_epochs=1, **only(LAST))
    trainer = fit(model(), ckpt_path="last", max_epochs=3, **only(LAST))

    assert trainer.global_step == 12
    assert "step12" in os.readlink(folder / "last.ckpt")


def test_the_best_is_found_by_a_new_process_of_the_run(fit, model, loader, folder: Path):
    """`test(ckpt_path="best")` works without having trained in this process."""
    from nshtrainer import Trainer

    trained = fit(model([0.1, 0.2]), **only(BEST, LAST))
    trainer = Trainer(trained.config)
    trainer.test(model(), loader(), ckpt_path="best", verbose=False)

    assert trainer.ckpt_path == str(
        folder
        / "best_val_loss"
        / "epoch0-step4-val_loss0.1.ckpt".replace("0.1", "0.10000000149011612")
    )


def test_a_worse_model_does_not_become_best_after_a_resume(fit, model, folder: Path):
    """The best of before the interruption counts, under the same id."""
    fit(model([0.1]), max_epochs=1, **only(BEST, LAST))
    fit(model([0.5, 0.4]), max_epochs=3, ckpt_path="last", **only(BEST, LAST))

    assert steps(folder / "best_val_loss") == [4]


def test_a_worse_model_does_not_become_best_under_a_new_id(
    fit, model, folder: Path, tmp_path: Path
):
    """Resumed as another run, the old run's best still counts, and is never deleted."""
    fit(model([0.1]), max_epochs=1, id="old", **only(BEST, LAST))
    old = tmp_path / "nshtrainer_logs" / "old" / "checkpoint"
    trainer = fit(
        model([0.5]), max_epochs=2, ckpt_path=(old / "last.ckpt").resolve(), **only(BEST, LAST)
    )
    assert steps(folder / "best_val_loss") == []
    assert Path(trainer.checkpoint_callback.best_model_path).is_relative_to(old)

    fit(model([0.01]), max_epochs=3, ckpt_path="last", **only(BEST, LAST))
    assert steps(folder / "best_val_loss") == [12]
    assert steps(old / "best_val_loss") == [4]


def test_the_file_resumed_from_outlives_the_resumed_run(fit, model, folder: Path):
    """It may be the only good one: a later run may prune it, this one does not."""
    fit(model(), max_epochs=1, **only(LAST))
    fit(model(), max_epochs=3, ckpt_path="last", **only(LAST))
    assert steps(folder / "last") == [4, 12]

    fit(model(), max_epochs=4, ckpt_path="last", **only(LAST))
    assert steps(folder / "last") == [12, 16]


def test_starting_over_deletes_nothing_of_before(fit, model, folder: Path, caplog):
    """The same id trained again from scratch keeps the old files, says so, and is the last one."""
    fit(model([0.1, 0.1, 0.1]), max_epochs=3, **only(BEST, LAST))
    with caplog.at_level(logging.WARNING):
        trainer = fit(model([0.9]), max_epochs=1, **only(BEST, LAST))

    assert steps(folder / "last") == [4, 12]
    assert steps(folder / "best_val_loss") == [4, 4]
    assert trainer.checkpoint_callback.best_model_score == pytest.approx(0.9)
    assert "up to step 12" in caplog.text
    assert "step4" in os.readlink(folder / "last.ckpt")


def test_going_back_makes_the_new_way_the_last_one(fit, model, folder: Path):
    """Resumed from an earlier checkpoint, `last` is what was trained from there."""
    keep = {**LAST, "topk": "all"}
    fit(model(), max_epochs=4, **only(keep))
    early = next(r.path for r in SidecarReader().records(folder / "last") if r.step == 4)
    fit(model(), max_epochs=2, ckpt_path=early, **only(LAST))
    assert steps(folder / "last") == [4, 8, 8, 12, 16]
    assert "step8" in os.readlink(folder / "last.ckpt")

    trainer = fit(model(), max_epochs=3, ckpt_path="last", **only(LAST))
    assert Path(trainer.ckpt_path).name.startswith("epoch1-step8")


def test_clocks_have_no_say(fit, model, folder: Path):
    """Files and time stamps of the future or past change nothing."""
    fit(model(), max_epochs=1, **only({**LAST, "topk": "all"}))
    for path in (folder / "last").iterdir():
        os.utime(path, (4e9, 4e9))
    fit(model(), max_epochs=2, ckpt_path="last", **only({**LAST, "topk": "all"}))
    trainer = fit(model(), max_epochs=3, ckpt_path="last", **only({**LAST, "topk": 1}))

    assert Path(trainer.ckpt_path).name.startswith("epoch1-step8")
    assert steps(folder / "last") == [8, 12]


def test_a_damaged_last_is_passed_over(fit, model, folder: Path, caplog):
    """One flipped bit: the checkpoint before it is used, and the damaged one named."""
    keep = only({**LAST, "topk": "all"})
    fit(model(), max_epochs=2, **keep)
    newest = (folder / "last.ckpt").resolve()
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 1
    newest.write_bytes(data)
    trainer = fit(model(), max_epochs=3, ckpt_path="last", **keep)

    assert Path(trainer.ckpt_path).name.startswith("epoch0-step4")
    assert f"{newest} is damaged" in caplog.text


def test_bad_metadata_ends_no_run(fit, model, folder: Path):
    """A half-written sidecar of a former writer is passed over in the resumed run."""
    fit(model(), max_epochs=2, **only({**LAST, "topk": "all"}))
    sidecar = Path(f"{(folder / 'last.ckpt').resolve()}.metadata.json")
    sidecar.write_text(sidecar.read_text()[:40])
    trainer = fit(model(), max_epochs=3, ckpt_path="last", **only(LAST))

    assert Path(trainer.ckpt_path).name.startswith("epoch0-step4")
    assert trainer.global_step == 12


def test_the_config_wins_over_the_checkpoint(fit, model, folder: Path):
    """A new `topk` holds from the first save of the resumed run on."""
    fit(model([0.4, 0.3]), max_epochs=2, **only({**BEST, "topk": 2}, LAST))
    fit(model([0.2]), max_epochs=3, ckpt_path="last", **only(BEST, LAST))

    assert steps(folder / "best_val_loss") == [12]


def test_a_link_left_behind_is_put_right_at_the_start(fit, model, folder: Path):
    """Killed between commit and link: the next start repairs the link."""
    fit(model(), max_epochs=1, **only(LAST))
    (folder / "last.ckpt").unlink()
    fit(model(), max_epochs=1, ckpt_path=next((folder / "last").glob("*.ckpt")), **only(LAST))
    with pytest.raises(RuntimeError, match="killed"):
        fit(
            model(), max_epochs=2, ckpt_path="last", objects={"callbacks": [_Stop(1)]}, **only(LAST)
        )

    assert "step4" in os.readlink(folder / "last.ckpt")


def test_a_second_fit_of_one_trainer_goes_on(fit, model, loader, folder: Path):
    """The same trainer trained further keeps ranking what it saved."""
    module = model([0.1, 0.3])
    trainer = fit(module, max_epochs=1, **only(BEST, LAST))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader(), loader())

    assert steps(folder / "best_val_loss") == [4]
    assert steps(folder / "last") == [8]


def test_callbacks_of_another_trainer_start_anew(plain_fit, model, tmp_path: Path):
    """One callback object used in a second trainer saves its first steps as well."""
    from nshtrainer_checkpoint import LastCheckpointCallback

    callback = LastCheckpointCallback(topk="all")
    plain_fit(model(), [callback], max_epochs=1)
    plain_fit(model(), [callback], max_epochs=1)

    assert steps(tmp_path / "checkpoint" / "last") == [4, 4]
