"""The weights of the best checkpoint are what the module has when early stopping has ended training."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

from nshtrainer.errors import ConfigError
from nshtrainer_ema import EarlyStoppingCallback
from nshtrainer_ema.early_stopping import restoring

SAVES = {"enable_checkpointing": True}
VALUES = [3.0, 1.0, 2.0, 2.0, 2.0]  # the second is the best, and training ends after the fourth


class Weights(Callback):
    """Keeps the weights after each epoch, and those that the module's own last hook sees."""

    def __init__(self) -> None:
        self.after: list[dict[str, Tensor]] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self.after.append(weights_of(pl_module))


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.fixture
def stopper(metric) -> EarlyStoppingCallback:
    return EarlyStoppingCallback(metric=metric, patience=2, restore_best_weights=True)


@pytest.fixture
def lightnings(tmp_path) -> ModelCheckpoint:
    return ModelCheckpoint(tmp_path / "best", "{epoch}", monitor="val/metric", save_last=True)


@pytest.fixture
def train(fit, stopper, make_model) -> Any:
    """Trains; returns the module and its weights after each epoch."""

    def run(
        *callbacks: Callback, values: list[float] = VALUES, model: Any = None, **options: Any
    ) -> tuple[Any, list[dict[str, Tensor]], Trainer]:
        weights, model = Weights(), make_model() if model is None else model
        options = {"enable_checkpointing": True, **options}
        trainer = fit(stopper, values, weights, *callbacks, model=model, **options)
        return model, weights.after, trainer

    return run


def ours(folder: Path, metric: Any, **options: Any) -> Callback:
    checkpoint = pytest.importorskip("nshtrainer_checkpoint")
    return checkpoint.BestCheckpointCallback(metric=metric, dirpath=folder, **options)


@pytest.mark.parametrize("kind", ["lightning", "ours", "ours, in the background", "weights only"])
def test_the_best_weights_are_loaded(kind, train, stopper, lightnings, metric, tmp_path):
    """Whoever saved them; the path is told, and it is the best one."""
    saver = {
        "lightning": lambda: lightnings,
        "ours": lambda: ours(tmp_path, metric),
        "ours, in the background": lambda: ours(tmp_path, metric, async_save=True),
        "weights only": lambda: ours(tmp_path, metric, save_weights_only=True),
    }[kind]()
    model, after, trainer = train(saver)

    assert len(after) == trainer.current_epoch == 4
    assert same(weights_of(model), after[1])
    assert not same(after[1], after[3])
    assert stopper.restored_path == str(saver.best_model_path)
    assert torch.load(saver.best_model_path, weights_only=True)["epoch"] == 1


def test_a_plugin_that_saves_in_the_background_is_waited_for(train, lightnings):
    """What is on its way to the disk is the best one here."""
    model, after, _ = train(lightnings, values=[3.0, 1.0, 2.0, 2.0], plugins=[AsyncCheckpointIO()])

    assert same(weights_of(model), after[1])


def test_the_file_is_told(train, lightnings, stopper):
    """In a line that is shown where no logging was set up."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    try:
        train(lightnings)
    finally:
        logger.removeHandler(handler)

    assert [x for x in lines if "best checkpoint" in x and str(stopper.restored_path) in x]


def test_the_modules_own_last_hooks_see_the_best_weights(train, lightnings, make_model):
    """Not only who comes after `fit`."""
    seen: list[dict[str, Tensor]] = []

    class Looks(make_model):
        def on_train_end(self) -> None:
            seen.append(weights_of(self))

    _, after, _ = train(lightnings, model=Looks())

    assert same(seen[0], after[1])


def test_checkpoints_that_are_saved_last_have_the_trained_weights(
    train, lightnings, metric, tmp_path
):
    """A run that is resumed from them goes on, and not back."""
    checkpoint = pytest.importorskip("nshtrainer_checkpoint")
    last = checkpoint.LastCheckpointCallback(
        dirpath=tmp_path, on_validation_end=False, async_save=True
    )
    model, after, _ = train(ours(tmp_path, metric), last)

    file = torch.load(last.last_model_path, weights_only=True)
    assert same(file["state_dict"], after[3])
    assert same(weights_of(model), after[1])


class Asks(Callback):
    """Ends training by itself, after the third epoch."""

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.should_stop = trainer.current_epoch == 2


@pytest.mark.parametrize("by", ["max_epochs", "somebody else"])
def test_what_ends_otherwise_is_left_as_trained(by, train, lightnings, stopper):
    """Only what this callback ends is restored."""
    others = [Asks()] if by == "somebody else" else []
    values = VALUES if others else VALUES[:3]
    model, after, _ = train(lightnings, *others, values=values)

    assert same(weights_of(model), after[2])
    assert len(after) == 3
    assert stopper.restored_path is None


def test_off_is_the_default(fit, metric, make_model, lightnings):
    """Then the module has the weights of the last step."""
    weights, model = Weights(), make_model()
    stopper = EarlyStoppingCallback(metric=metric, patience=2)
    fit(stopper, VALUES, weights, lightnings, model=model, enable_checkpointing=True)

    assert same(weights_of(model), weights.after[3])


def test_with_an_average_the_weights_that_were_evaluated_are_loaded(train, lightnings, make_loader):
    """That is the average of the best epoch, and what is tested after."""
    from nshtrainer_ema import EMACallback

    ema = EMACallback(decay=0.8)
    averages: list[dict[str, Tensor]] = []

    class Keeps(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            averages.append({k: v.clone() for k, v in ema.average.items()})

    model, after, trainer = train(ema, Keeps(), lightnings)
    assert same(weights_of(model), averages[1])
    assert not same(averages[1], after[1])

    model.probe.clear()
    trainer.test(model, make_loader(1), verbose=False)
    assert torch.equal(model.probe[0], averages[1]["second.weight"])


class Damages(Callback):
    """Does something to the best file when training has ended."""

    def __init__(self, damage: Any) -> None:
        self.damage = damage

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.damage(Path(trainer.checkpoint_callback.best_model_path))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def replace(edit: Any) -> Any:
    def damage(path: Path) -> None:
        file = torch.load(path, weights_only=True)
        edit(file["state_dict"])
        torch.save(file, path)

    return damage


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (Path.unlink, "FileNotFoundError: "),
        (cut, "could not be loaded: "),
        (replace(lambda s: s.update({"first.weight": torch.ones(3)})), "not fit.* at first.weight"),
        (replace(lambda s: s.pop("first.weight")), "does not fit the module at first.weight"),
        (replace(lambda s: s.update(more=torch.ones(3))), "does not fit the module at more"),
        (lambda path: path.write_bytes(b""), "could not be loaded: "),
    ],
    ids=["missing", "cut", "shape", "lacks one", "one too many", "empty"],
)
def test_a_checkpoint_that_cannot_be_loaded_is_told_and_nothing_changes(
    damage, why, train, lightnings, stopper, caplog
):
    """The module keeps what was trained, all of it."""
    model, after, trainer = train(lightnings, Damages(damage))

    assert same(weights_of(model), after[3])
    assert stopper.restored_path is None
    [warned] = [r.getMessage() for r in caplog.records if "restore_best_weights" in r.getMessage()]
    assert "keeps the weights of the last step" in warned
    assert str(lightnings.best_model_path) in warned

    assert re.search(why, warned), warned
    assert trainer.state.finished


@pytest.mark.parametrize(("damage", "what"), [(flip, "SHA-256"), (cut, "size")])
def test_rot_in_our_files_is_found(damage, what, train, metric, tmp_path, caplog):
    """By the checksum beside them, where torch would load anything."""
    model, after, _ = train(ours(tmp_path, metric), Damages(damage))

    assert same(weights_of(model), after[3])
    assert f"its {what} is not that of what was saved" in caplog.text


def test_a_load_that_fails_half_way_is_taken_back(train, lightnings, make_model, caplog):
    """Parameters and buffers are as trained."""

    class Fragile(make_model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(1))

        def on_train_epoch_end(self) -> None:
            self.count += 1

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            super().load_state_dict(state, strict, assign)
            raise RuntimeError("half way\nand more")

    model, after, _ = train(lightnings, model=Fragile())

    assert same(weights_of(model), after[3])
    assert model.count == 4
    assert "RuntimeError: half way." in caplog.text


def test_the_modules_own_say_in_loading_is_heard(train, lightnings, make_model):
    """`on_load_checkpoint` edits the file's content, and `strict_loading=False` takes part of it."""

    class Renames(make_model):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            state["renamed"] = state.pop("first.weight")
            del state["second.bias"]

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            state["first.weight"] = state.pop("renamed")

    model = Renames()
    model.strict_loading = False
    model, after, _ = train(lightnings, model=model)

    assert torch.equal(model.first.weight, after[1]["first.weight"])
    assert torch.equal(model.second.bias, after[3]["second.bias"])


@pytest.mark.parametrize("kind", ["none", "other metric", "other mode", "keeps none"])
def test_nothing_to_restore_from_is_an_error_before_training(
    kind, fit, stopper, make_model, tmp_path
):
    """It says what there is, and what to add."""
    saver = {
        "none": list,
        "other metric": lambda: [ModelCheckpoint(tmp_path, monitor="val/loss")],
        "other mode": lambda: [ModelCheckpoint(tmp_path, monitor="val/metric", mode="max")],
        "keeps none": lambda: [ModelCheckpoint(tmp_path, monitor="val/metric", save_top_k=0)],
    }[kind]()
    model = make_model()

    with pytest.raises(ConfigError, match=r"best by 'val/metric' \(min\).*Add Best") as raised:
        fit(stopper, VALUES, *saver, model=model, enable_checkpointing=bool(saver))
    assert not model.trained
    found = {"none": "none at all", "other metric": "'val/loss' (min)", "other mode": "(max)"}
    assert found.get(kind, "ModelCheckpoint") in str(raised.value)


def test_a_strategy_that_reads_in_its_own_way_is_refused(fit, stopper, lightnings):
    """Before training; nothing could be promised."""

    class Own(SingleDeviceStrategy):
        def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
            return super().load_checkpoint(*args, **kwargs)

    with pytest.raises(ConfigError, match=r"does not work with Own.*switch it off"):
        fit(stopper, VALUES, lightnings, strategy=Own(torch.device("cpu")), **SAVES)


def test_a_fast_dev_run_needs_no_checkpoints(fit, stopper):
    """Lightning takes them away there."""
    assert fit(stopper, VALUES, fast_dev_run=1).state.finished


def test_no_checkpoint_was_saved(train, stopper, tmp_path, caplog):
    """Too rare a saver: told, and the trained weights stay."""
    saver = ModelCheckpoint(tmp_path / "b", monitor="val/metric", every_n_epochs=9)
    model, after, _ = train(saver)

    assert same(weights_of(model), after[3])
    assert "since no checkpoint was saved for it" in caplog.text


def test_of_several_that_end_training_the_first_restores(fit, metric, make_model, tmp_path):
    """One module cannot have the weights of two files."""
    options: dict[str, Any] = {"patience": 2, "restore_best_weights": True}
    train_metric = metric.replace(name="val/other")

    class Other(Callback):
        def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            pl_module.log("val/other", float([1, 2, 2, 2][trainer.current_epoch]))

    one = EarlyStoppingCallback(metric=metric, **options)
    two = EarlyStoppingCallback(metric=train_metric, **options, label="b")
    two.patience = 3
    savers = [
        ModelCheckpoint(tmp_path / name.name[4:], "{epoch}", monitor=name.name)
        for name in (metric, train_metric)
    ]
    weights, model = Weights(), make_model()
    fit([one, two], VALUES, Other(), weights, *savers, model=model, enable_checkpointing=True)

    assert one.stopping_reason == two.stopping_reason
    assert same(weights_of(model), weights.after[1])
    assert two.restored_path is None


def test_nothing_is_left_on_the_trainer(train, lightnings):
    """After a run, and after one that failed."""
    _, _, trainer = train(lightnings)
    assert not [c for c in trainer.callbacks if isinstance(c, restoring.RestoreAtEnd)]

    class Fails(Callback):
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            trainers.append(trainer)
            raise RuntimeError("no")

    trainers: list[Trainer] = []
    with pytest.raises(RuntimeError, match="no"):
        train(lightnings, Fails())
    [trainer] = trainers
    assert not [c for c in trainer.callbacks if isinstance(c, restoring.RestoreAtEnd)]


def test_a_second_fit_restores_its_own_best(train, lightnings, stopper, make_loader):
    """Which is the best of both."""
    model, after, trainer = train(lightnings, values=[3, 1, 2, 2, 0.5, 4, 4, 4, 4])
    assert same(weights_of(model), after[1])
    trainer.fit(model, make_loader(2), make_loader(1))

    assert trainer.current_epoch == 7
    assert same(weights_of(model), after[4])
    assert stopper.restored_path == str(lightnings.best_model_path)
