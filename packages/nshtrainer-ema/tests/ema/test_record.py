"""What checkpoints hold of both sets of weights, and how runs go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn

from nshtrainer_ema import EMACallback
from nshtrainer_ema.ema.record import RecordVersionError

DECAY = 0.8


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    return {"model": make_model, "trainer": make_trainer, "loader": make_loader}


def oracle(start: list[Tensor], trained: list[list[Tensor]], decay: float = DECAY) -> list[Tensor]:
    """The average of the recorded weights, in float64."""
    average = [p.double() for p in start]
    for weights in trained:
        average = [
            decay * a + (1 - decay) * w.double() for a, w in zip(average, weights, strict=True)
        ]
    return average


def weights(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def equal(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def averages(callback: EMACallback) -> list[Tensor]:
    return list(callback.average.values())


class Saves(Callback):
    """Saves a checkpoint from a given hook, once, and remembers the trained weights of then."""

    def __init__(self, path: Path, hook: str, *, weights_only: bool = False) -> None:
        self.path, self.weights_only = path, weights_only
        setattr(self, hook, self.save)

    def save(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.sanity_checking and not self.path.exists() and trainer.global_step >= 4:
            trainer.save_checkpoint(self.path, weights_only=self.weights_only)


def close(left: list[Tensor], right: list[Tensor]) -> None:
    torch.testing.assert_close(
        [t.double() for t in left], [t.double() for t in right], rtol=1e-5, atol=1e-6
    )


HOOKS = [
    "on_train_batch_end",
    "on_validation_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
]


@pytest.mark.parametrize("weights_only", [False, True])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("hook", HOOKS)
def test_a_file_holds_what_is_evaluated_and_the_rest_beside_it(
    hook, before, original, weights_only, make, tmp_path
):
    """Whatever hook saves it, on either side of EMA in the list, complete or weights-only."""
    path = tmp_path / "saved.ckpt"
    saver = Saves(path, hook, weights_only=weights_only)
    model, ema = make["model"](), EMACallback(decay=DECAY, validate_original_weights=original)
    start = weights(model)
    trainer = make["trainer"](*((saver, ema) if before else (ema, saver)))
    trainer.fit(model, make["loader"](4), make["loader"](1))
    file = torch.load(path, weights_only=True)

    record = file["nshtrainer_average"]
    assert record["version"] == 1
    trained, average = model.trained[3], oracle(start, model.trained[:4])
    close(list(file["state_dict"].values()), trained if original else average)
    assert record["state_dict"] == ("weights" if original else "average")
    if original:
        close(list(record["average"].values()), average)
    else:
        assert equal(list(record["weights"].values()), trained)
    assert equal(weights(model), model.trained[-1])
    make["model"]().load_state_dict(file["state_dict"])


def run(
    make: Any,
    tmp_path: Path,
    name: str,
    hook: str,
    *,
    epochs: int,
    ckpt: Path | None = None,
    **options: Any,
) -> dict[str, Any]:
    torch.manual_seed(0)
    model_options = options.pop("model", {})
    trainer_options = options.pop("trainer", {})
    original = options.pop("original", False)
    model = make["model"](**model_options)
    ema = EMACallback(decay=DECAY, every_n_steps=3, validate_original_weights=original)
    trainer = make["trainer"](
        ema, Saves(tmp_path / name, hook), max_epochs=epochs, **trainer_options
    )
    trainer.fit(model, make["loader"](4), make["loader"](2), ckpt_path=ckpt)
    optimizer = trainer.optimizers[0].state_dict()["state"]
    moments = [v for s in optimizer.values() for v in s.values() if isinstance(v, Tensor)]
    state = {"weights": weights(model), "average": averages(ema), "moments": moments}
    return {**state, "metric": [trainer.callback_metrics["val/loss"]]}


@pytest.mark.parametrize("original", [False, True])
@pytest.mark.parametrize("trainer", [{}, {"precision": "bf16-true"}, {"precision": "bf16-mixed"}])
@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_epoch_end"])
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(hook, trainer, original, make, tmp_path):
    """Both sets, the moments and the metric; saved while the average is in, and while it is not."""
    options = {"trainer": trainer, "original": original}
    whole = run(make, tmp_path, "whole", hook, epochs=3, **options)
    run(make, tmp_path, "half", hook, epochs=1, **options)
    resumed = run(make, tmp_path, "rest", hook, epochs=3, ckpt=tmp_path / "half", **options)

    for part, tensors in whole.items():
        assert equal(tensors, resumed[part]), part
    assert not equal(whole["weights"], whole["average"])


@pytest.mark.parametrize("weights_only", [False, True])
def test_a_named_checkpoint_is_the_one_that_is_tested(weights_only, make, tmp_path):
    """Its weights as they are in the file, not the average that the fit ended with, nor both."""
    saver = ModelCheckpoint(
        tmp_path,
        "{epoch}",
        save_top_k=-1,
        save_weights_only=weights_only,
        save_on_train_epoch_end=False,
    )
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, saver, max_epochs=3, enable_checkpointing=True)
    trainer.fit(model, make["loader"](4), make["loader"](1))
    fitted, path = list(model.probe), tmp_path / "epoch=0.ckpt"
    trainer.test(model, make["loader"](1), ckpt_path=path, weights_only=True)
    fresh = make["model"]()
    make["trainer"](EMACallback(decay=DECAY)).test(
        fresh, make["loader"](1), ckpt_path=path, weights_only=True
    )

    assert torch.equal(model.probe[-1], fitted[0])
    assert torch.equal(fresh.probe[-1], fitted[0])
    assert not torch.equal(fitted[0], fitted[-1])


def test_averaging_can_be_switched_on_between_runs(make, tmp_path, caplog):
    """A checkpoint without an average resumes with a warning; the average begins from its weights."""
    path = tmp_path / "plain.ckpt"
    make["trainer"](Saves(path, "on_train_epoch_end")).fit(
        make["model"](), make["loader"](4), make["loader"](1)
    )
    saved = torch.load(path, weights_only=True)["state_dict"]
    model, ema = make["model"](), EMACallback(decay=DECAY)
    make["trainer"](ema, max_epochs=2).fit(
        model, make["loader"](4), make["loader"](1), ckpt_path=path
    )

    assert "has no average" in caplog.text
    close(averages(ema), oracle(list(saved.values()), model.trained))


def test_averaging_can_be_switched_off_between_runs(make, tmp_path):
    """Lightning names the callback that is missing, and goes on from the weights it finds."""
    path = tmp_path / "averaged.ckpt"
    ema = EMACallback(decay=DECAY)
    make["trainer"](ema, Saves(path, "on_train_epoch_end")).fit(
        make["model"](), make["loader"](4), make["loader"](1)
    )
    model = make["model"](lr=0.0)
    with pytest.warns(UserWarning, match=r"nshtrainer\.ema"):
        make["trainer"](max_epochs=2).fit(
            model, make["loader"](4), make["loader"](1), ckpt_path=path
        )

    assert len(model.trained) == 4


@pytest.mark.parametrize(("saved", "now"), [(False, True), (True, False)])
def test_which_weights_are_evaluated_can_change_between_runs(saved, now, make, tmp_path):
    """The file says which set it holds where, so both come back."""
    path = tmp_path / "saved.ckpt"
    ema, model = EMACallback(decay=DECAY, validate_original_weights=saved), make["model"]()
    make["trainer"](ema, Saves(path, "on_validation_end")).fit(
        model, make["loader"](4), make["loader"](1)
    )
    resumed, again = EMACallback(decay=DECAY, validate_original_weights=now), make["model"]()
    trainer = make["trainer"](resumed, max_epochs=1)
    trainer.fit(again, make["loader"](4), make["loader"](1), ckpt_path=path)

    assert equal(weights(again), weights(model))
    assert equal(averages(resumed), averages(ema))


def test_the_decay_of_the_new_configuration_wins(make, tmp_path, caplog):
    """And the log says so."""
    path = tmp_path / "saved.ckpt"
    make["trainer"](EMACallback(decay=0.5), Saves(path, "on_train_epoch_end")).fit(
        make["model"](), make["loader"](4), make["loader"](1)
    )
    average = list(torch.load(path, weights_only=True)["state_dict"].values())
    model, ema = make["model"](), EMACallback(decay=DECAY)
    caplog.set_level("INFO", logger="nshtrainer_ema")
    make["trainer"](ema, max_epochs=2).fit(
        model, make["loader"](4), make["loader"](1), ckpt_path=path
    )

    close(averages(ema), oracle(average, model.trained))
    assert "goes on with decay=0.8; it was 0.5" in caplog.text


def test_a_file_of_a_newer_version_is_refused(make, tmp_path):
    """Rather than read wrongly."""
    path = tmp_path / "saved.ckpt"
    make["trainer"](EMACallback(decay=0.5), Saves(path, "on_train_epoch_end")).fit(
        make["model"](), make["loader"](4), make["loader"](1)
    )
    file = torch.load(path, weights_only=True)
    file["nshtrainer_average"]["version"] = 2
    torch.save(file, path)

    with pytest.raises(RecordVersionError, match="update nshtrainer-ema"):
        make["trainer"](EMACallback(decay=0.5)).fit(
            make["model"](), make["loader"](4), ckpt_path=path
        )


def test_a_module_that_leaves_weights_out_of_its_files_resumes_exactly(make, tmp_path):
    """on_save_checkpoint drops one tensor and rounds another; nothing of either set is lost."""

    class Trims(make["model"]):
        strict_loading = False

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            state = checkpoint["state_dict"]
            del state["first.bias"]
            state["first.weight"] = state["first.weight"].half()

    path, model, ema = tmp_path / "saved.ckpt", Trims(), EMACallback(decay=DECAY)
    make["trainer"](ema, Saves(path, "on_validation_end")).fit(
        model, make["loader"](4), make["loader"](1)
    )
    again, resumed = Trims(), EMACallback(decay=DECAY)
    make["trainer"](resumed).fit(again, make["loader"](4), make["loader"](1), ckpt_path=path)
    file = torch.load(path, weights_only=True)["state_dict"]

    assert "first.bias" not in file
    assert file["first.weight"].dtype == torch.float16
    assert equal(weights(again), weights(model))
    assert equal(averages(resumed), averages(ema))


def test_tied_weights_stay_tied_in_files_and_evaluation(make, tmp_path):
    """One average for both names, in the module and in the file."""

    class Tied(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(8, 1)
            self.third.weight = self.second.weight

    path, model, ema = tmp_path / "saved.ckpt", Tied(), EMACallback(decay=DECAY)
    make["trainer"](ema, Saves(path, "on_validation_end")).fit(
        model, make["loader"](4), make["loader"](1)
    )
    state = torch.load(path, weights_only=True)["state_dict"]

    assert torch.equal(state["second.weight"], ema.average["second.weight"])
    assert state["third.weight"].data_ptr() == state["second.weight"].data_ptr()
    assert model.third.weight is model.second.weight


def test_saving_after_the_fit_keeps_both_sets(make, tmp_path):
    """trainer.save_checkpoint by hand, when training is over."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(model, make["loader"](4))
    trainer.save_checkpoint(tmp_path / "final.ckpt")
    file = torch.load(tmp_path / "final.ckpt", weights_only=True)

    assert equal(list(file["state_dict"].values()), averages(ema))
    assert equal(list(file["nshtrainer_average"]["weights"].values()), weights(model))


@pytest.mark.parametrize(("saved", "now"), [(True, False), (False, True)])
def test_a_named_checkpoint_is_evaluated_with_the_set_that_is_asked_for(saved, now, make, tmp_path):
    """Saved with the other set as its model, it has the one that is asked for beside it."""
    path = tmp_path / "saved.ckpt"
    ema, model = EMACallback(decay=DECAY, validate_original_weights=saved), make["model"]()
    make["trainer"](ema, Saves(path, "on_validation_end")).fit(
        model, make["loader"](4), make["loader"](1)
    )
    fresh = make["model"]()
    make["trainer"](EMACallback(decay=DECAY, validate_original_weights=now)).test(
        fresh, make["loader"](1), ckpt_path=path
    )

    expected = model.second.weight if now else ema.average["second.weight"]
    assert torch.equal(fresh.probe[-1], expected)


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_buffers_resume_bitwise(buffers, make, tmp_path):
    """BatchNorm: the module's own statistics and those of the average."""

    class Normed(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    def train(epochs: int, name: str, ckpt: Path | None = None) -> list[Tensor]:
        torch.manual_seed(0)
        model, ema = Normed(), EMACallback(decay=DECAY, buffers=buffers, every_n_steps=3)
        trainer = make["trainer"](
            ema, Saves(tmp_path / name, "on_validation_end"), max_epochs=epochs
        )
        trainer.fit(model, make["loader"](4), make["loader"](1), ckpt_path=ckpt)
        return [*(t.clone() for t in model.state_dict().values()), *averages(ema)]

    whole = train(3, "whole")
    train(1, "half")
    file = torch.load(tmp_path / "half", weights_only=True)
    resumed = train(3, "rest", tmp_path / "half")

    assert equal(whole, resumed)
    mean = file["state_dict"]["norm.running_mean"]
    assert not torch.equal(mean, file["nshtrainer_average"]["weights"]["norm.running_mean"])


@pytest.mark.parametrize("options", [{}, {"warmup": "inverse_power", "start_step": 2}])
def test_further_averages_and_counts_resume_bitwise(options, make, tmp_path):
    """Several decays and a half-life in samples, saved between two updates."""
    options = {"half_life_samples": 40.0, "extra_decays": [0.5, 0.9], "every_n_steps": 3, **options}

    def train(epochs: int, name: str, ckpt: Path | None = None) -> dict[str, list[Tensor]]:
        model, ema = make["model"](), EMACallback(**options)
        trainer = make["trainer"](
            ema, Saves(tmp_path / name, "on_validation_end"), max_epochs=epochs
        )
        trainer.fit(model, make["loader"](4), make["loader"](1), ckpt_path=ckpt)
        return {label: list(ema.ema.of(label).values()) for label in ema.ema.labels}

    whole = train(3, "whole")
    train(1, "half")
    resumed = train(3, "rest", tmp_path / "half")

    assert list(whole) == ["average", "decay=0.5", "decay=0.9"]
    assert all(equal(whole[label], resumed[label]) for label in whole)
