"""EMA in training: what is averaged, and when it stands in for the weights."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from nshtrainer import Trainer, TrainerConfig, create_callbacks
from nshtrainer.errors import ConfigError
from nshtrainer_ema import EMACallback, EMACallbackConfig, GradientSkippingCallback
from nshtrainer_ema.ema.snapshots import list_snapshots, reconstruct

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


def close(left: list[Tensor], right: list[Tensor]) -> None:
    torch.testing.assert_close(
        [t.double() for t in left], [t.double() for t in right], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("options", [{}, {"cpu_offload": True}])
@pytest.mark.parametrize(
    "trainer", [{}, {"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}]
)
def test_the_average_moves_once_per_optimizer_step(options, trainer, make):
    """Also with accumulation, mixed precision, and the average in main memory."""
    model, ema = make["model"](), EMACallback(decay=DECAY, **options)
    start = weights(model)
    make["trainer"](ema, max_epochs=2, limit_val_batches=0, **trainer).fit(model, make["loader"](4))
    every = trainer.get("accumulate_grad_batches", 1)

    close(averages(ema), oracle(start, model.trained[every - 1 :: every]))


def test_every_n_steps_leaves_steps_out_and_moves_as_far(make):
    """With 3, the weights after steps 3 and 6 count, by as much as three updates move."""
    model, ema = make["model"](), EMACallback(decay=DECAY, every_n_steps=3)
    start = weights(model)
    make["trainer"](ema, limit_val_batches=0).fit(model, make["loader"](8))

    close(averages(ema), oracle(start, model.trained[2::3], DECAY**3))


def test_training_is_the_same_with_and_without(make):
    """Weights and validation of the trained weights are bitwise untouched by averaging."""
    runs = []
    for callbacks in ([], [EMACallback(decay=DECAY)]):
        model = make["model"]()
        make["trainer"](*callbacks, max_epochs=3, val_check_interval=2).fit(
            model, make["loader"](4), make["loader"](2)
        )
        runs.append(weights(model))

    assert equal(*runs)


def test_a_step_that_the_scaler_skips_does_not_count(make, scaled):
    """16-mixed, an infinite loss at step 2: neither weights nor average move."""
    model, ema = make["model"](batch_losses={2: float("inf")}), EMACallback(decay=DECAY)
    start = weights(model)
    make["trainer"](ema, plugins=[scaled()], limit_val_batches=0).fit(model, make["loader"](5))

    assert equal(model.trained[1], model.trained[2])
    assert ema.state_dict()["steps"] == {0: 4}
    close(averages(ema), oracle(start, [w for i, w in enumerate(model.trained) if i != 2]))


@pytest.mark.parametrize("scaler", [False, True])
def test_a_step_that_only_the_device_knows_to_be_skipped_does_not_count(scaler, make, scaled):
    """A fused optimizer, with gradient skipping and with a GradScaler."""
    model = make["model"](batch_losses={2: 1e3 if not scaler else float("inf")}, fused=True)
    ema = EMACallback(decay=DECAY)
    skipping = GradientSkippingCallback(threshold=200.0, start_after_n_steps=0)
    start = weights(model)
    plugins = {"plugins": [scaled()]} if scaler else {}
    make["trainer"](ema, skipping, limit_val_batches=0, **plugins).fit(model, make["loader"](5))

    assert equal(model.trained[1], model.trained[2])
    assert ema.state_dict()["steps"] == {0: 4}
    close(averages(ema), oracle(start, [w for i, w in enumerate(model.trained) if i != 2]))


def test_each_optimizer_moves_its_own_parameters(make):
    """Manual optimization with two optimizers that step at different times; one steps unwrapped."""

    class Two(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.history: dict[str, list[list[Tensor]]] = {"first": [], "second": []}

        def training_step(self, batch: Any, batch_idx: int) -> None:
            first, second = self.optimizers()
            self.manual_backward(self.loss(batch))
            for name, optimizer in (("first", first), ("second", second.optimizer)):
                if name == "first" or batch_idx % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    self.history[name].append(weights(getattr(self, name)))

        def configure_optimizers(self) -> Any:
            return [
                torch.optim.SGD(self.first.parameters(), lr=0.1),
                torch.optim.SGD(self.second.parameters(), lr=0.1),
            ]

    model, ema = Two(), EMACallback(decay=DECAY)
    start = {"first": weights(model.first), "second": weights(model.second)}
    make["trainer"](ema, max_epochs=2, limit_val_batches=0).fit(model, make["loader"](4))

    for name in ("first", "second"):
        mine = [t for n, t in ema.average.items() if n.startswith(name)]
        close(mine, oracle(start[name], model.history[name]))
    assert ema.state_dict()["steps"] == {0: 8, 1: 4}


def test_validation_test_and_prediction_see_the_average(make):
    """In the fit and after it; the module itself keeps the trained weights."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, num_sanity_val_steps=1)
    trainer.fit(model, make["loader"](4), make["loader"](1))
    average, trained = ema.average["second.weight"].clone(), weights(model)
    for run in (trainer.validate, trainer.test, trainer.predict):
        run(model, make["loader"](1))

    sanity, *seen = model.probe
    assert len(seen) == 4
    assert all(torch.equal(w, average) for w in seen)
    assert not torch.equal(sanity, average)
    assert not torch.equal(average, trained[2])
    assert equal(weights(model), trained)
    assert equal(weights(model), model.trained[-1])


def test_validate_original_weights_evaluates_those(make):
    """And the average is kept all the same."""
    model, ema = make["model"](), EMACallback(decay=DECAY, validate_original_weights=True)
    trainer = make["trainer"](ema)
    trainer.fit(model, make["loader"](4), make["loader"](1))
    trainer.test(model, make["loader"](1))

    assert all(torch.equal(w, model.second.weight) for w in model.probe)
    assert not torch.equal(ema.average["second.weight"], model.second.weight)


def test_weights_loaded_by_hand_are_what_is_evaluated(make, caplog):
    """After load_state_dict the average belongs to other weights; a log line says so."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(model, make["loader"](4))
    other = make["model"]()
    model.load_state_dict(other.state_dict())
    trainer.test(model, make["loader"](1))

    assert torch.equal(model.probe[0], other.second.weight)
    assert "changed after training" in caplog.text


def test_another_module_is_not_evaluated_with_this_average(make):
    """A callback that trained one module leaves a second one alone."""
    ema = EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(make["model"](), make["loader"](4))
    other = make["model"](lr=0.0)
    trainer.test(other, make["loader"](1))

    assert torch.equal(other.probe[0], other.second.weight)


def test_a_second_module_begins_an_average_of_its_own(make):
    """One callback and trainer, two modules in turn: nothing of the first is in the second's."""
    ema, second = EMACallback(decay=DECAY), make["model"](lr=0.01)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(make["model"](), make["loader"](4))
    start = weights(second)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(second, make["loader"](4))

    close(averages(ema), oracle(start, second.trained))
    assert ema.state_dict()["steps"] == {0: 4}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_an_exception_in_evaluation_leaves_the_trained_weights(error, stage, make):
    """Whatever comes out of a step, Ctrl-C too, the module holds what was trained."""

    class Fails(make["model"]):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            raise error("in evaluation")

        def test_step(self, batch: Any, batch_idx: int) -> None:
            raise error("in evaluation")

    model, ema = Fails(), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=int(stage == "fit"))

    def train_and_test() -> None:
        trainer.fit(model, make["loader"](4), make["loader"](1))
        trainer.test(model, make["loader"](1))

    with pytest.raises((RuntimeError, KeyboardInterrupt, SystemExit)):
        train_and_test()

    assert equal(weights(model), model.trained[-1])
    if stage == "fit":
        assert torch.equal(model.probe[0], ema.average["second.weight"])


def test_two_fits_in_a_row_continue_the_average(make):
    """The same trainer and module: the average goes on where it was."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    start = weights(model)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(model, make["loader"](4))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, make["loader"](4))

    assert len(model.trained) == 8
    close(averages(ema), oracle(start, model.trained))


def test_a_copy_takes_the_average_along(make):
    """Deepcopy and pickle, as spawning strategies and sweeps do."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    make["trainer"](ema, limit_val_batches=0).fit(model, make["loader"](4))

    for twin in (copy.deepcopy(ema), pickle.loads(pickle.dumps(ema))):
        assert equal(averages(twin), averages(ema))
        assert twin.config == ema.config


def test_parameters_unfrozen_later_are_averaged_from_then_on(make):
    """Evaluation never sees a mixture of averaged and trained weights."""

    class Thaws(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.first.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.first.requires_grad_(self.current_epoch >= 1)

    model, ema = Thaws(), EMACallback(decay=DECAY)
    start = weights(model)
    make["trainer"](ema, max_epochs=2, limit_val_batches=0).fit(model, make["loader"](4))

    expected = oracle(start, model.trained)[2:] + oracle(start, model.trained[4:])[:2]
    close(averages(ema), expected)


def test_lazy_parameters_are_averaged_from_their_first_values_on(make):
    """They have no values before the first forward pass, which comes after training has started."""

    class Lazy(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.LazyLinear(8)
            self.begins: list[Tensor] = []

        def on_before_backward(self, loss: Tensor) -> None:
            self.begins = self.begins or weights(self)

    model, ema = Lazy(), EMACallback(decay=DECAY)
    make["trainer"](ema, limit_val_batches=0).fit(model, make["loader"](4))

    assert set(ema.average) == {name for name, _ in model.named_parameters()}
    expected = oracle(model.begins, model.trained)
    close([ema.average[name] for name, _ in model.named_parameters()], expected)


def test_two_averages_are_refused(make):
    """One module cannot be evaluated with two; labels do not change that."""
    configs = [EMACallbackConfig(decay=0.9), EMACallbackConfig(decay=0.8, label="second")]
    with pytest.raises(ConfigError, match="keep one of them"):
        create_callbacks(configs)
    with pytest.raises(ConfigError, match="keep one of them"):
        make["trainer"](*(EMACallback(c) for c in configs)).fit(make["model"](), make["loader"](1))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 2},
        {"decay": -0.1},
        {"decay": float("nan")},
        {"decay": True},
        {"decay": 0.9, "every_n_steps": 0},
        {"decay": 0.9, "every_n_steps": -1},
        {"decay": 0.9, "every_n_steps": 1.5},
    ],
)
def test_what_makes_no_sense_is_refused(options):
    """Before any training."""
    with pytest.raises(ValidationError):
        EMACallbackConfig(**options)


def test_snapshots_of_profiles_make_another_width_after_training(make, tmp_path):
    """At every so many steps and at the end; the sum of them is near to that width's own average."""
    folder = tmp_path / "snapshots"
    options = {"profiles": [0.05, 0.1, 0.15], "snapshot_every_n_steps": 4, "snapshot_dir": folder}
    model, ema = make["model"](lr=0.01), EMACallback(**options)
    make["trainer"](ema, max_epochs=10, limit_val_batches=0).fit(model, make["loader"](5))
    for path in folder.glob("*sigma0.1.pt"):
        path.unlink()
    made = reconstruct(folder, sigma_rel=0.1)

    assert {s.step for s in list_snapshots(folder)} == set(range(4, 51, 4)) | {50}
    own = ema.ema.of("sigma_rel=0.1")
    near = sum((made[n] - own[n]).square().sum() for n in own).sqrt()
    other = sum((ema.average[n] - own[n]).square().sum() for n in own).sqrt()
    assert near < 0.1 * other


def test_snapshots_of_another_run_are_not_overwritten(make, tmp_path):
    """A run that starts anew in their folder is refused, before it has trained."""
    options = {"profiles": [0.1], "snapshot_every_n_steps": 2, "snapshot_dir": tmp_path / "s"}
    make["trainer"](EMACallback(**options)).fit(make["model"](), make["loader"](4))
    before = sorted((tmp_path / "s").iterdir())
    model = make["model"]()
    with pytest.raises(ConfigError, match="has snapshots, and this run starts anew"):
        make["trainer"](EMACallback(**options)).fit(model, make["loader"](4))

    assert sorted((tmp_path / "s").iterdir()) == before
    assert model.trained == []


def test_a_save_after_the_weights_were_changed_holds_those(make, tmp_path):
    """The average is of other weights: neither the file nor a second fit goes on with it."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(model, make["loader"](4))
    other = make["model"](lr=0.01)
    model.load_state_dict(other.state_dict())
    trainer.save_checkpoint(tmp_path / "by-hand.ckpt")
    file = torch.load(tmp_path / "by-hand.ckpt", weights_only=True)

    assert equal(list(file["state_dict"].values()), weights(other))
    assert "nshtrainer_average" not in file


def test_a_fit_after_the_weights_were_changed_begins_anew(make, caplog):
    """From the weights that it begins with."""
    model, ema = make["model"](), EMACallback(decay=DECAY)
    trainer = make["trainer"](ema, limit_val_batches=0)
    trainer.fit(model, make["loader"](4))
    model.load_state_dict(make["model"]().state_dict())
    start, model.trained = weights(model), []
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, make["loader"](4))

    assert "changed after training" in caplog.text
    close(averages(ema), oracle(start, model.trained))


def test_a_run_that_was_killed_before_its_first_save_starts_again_in_its_folder(make, tmp_path):
    """What the attempt left of snapshots is its own, and goes; a requeued job must start."""
    for steps in (4, 2):
        config = TrainerConfig.model_validate(
            {
                "id": "mine", "max_steps": steps, "accelerator": "cpu", "loggers": [],
                "directory": {"project_root": tmp_path}, "enable_progress_bar": False,
                "enable_model_summary": False, "enable_checkpointing": False, "lr_monitor": None,
                "callbacks": [{"name": "ema", "profiles": [0.1], "snapshot_every_n_steps": 1}],
            }
        )  # fmt: skip
        Trainer(config).fit(make["model"](), make["loader"](4))

    assert [s.step for s in list_snapshots(tmp_path / "nshtrainer_logs" / "mine" / "ema")] == [1, 2]


def test_a_half_life_in_samples_counts_those_since_the_last_update(make):
    """Four to a batch, two batches to a step, two steps to an update: sixteen."""
    model, ema = make["model"](), EMACallback(half_life_samples=32.0, every_n_steps=2)
    start = weights(model)
    trainer = make["trainer"](ema, limit_val_batches=0, accumulate_grad_batches=2)
    trainer.fit(model, make["loader"](12))

    close(averages(ema), oracle(start, model.trained[3::4], 0.5 ** (16 / 32)))


# Dynamo looks at the .grad of tensors in the middle of a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_part_is_evaluated_at_the_addresses_that_it_knows(make):
    """The average is copied in; exchanged pointers would be of no use to compiled code."""

    class Compiled(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.second = torch.compile(self.second, backend="eager")
            self.addresses: list[int] = []

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.addresses.append(self.second.weight.data_ptr())
            super().validation_step(batch, batch_idx)

    model, ema = Compiled(), EMACallback(decay=DECAY)
    make["trainer"](ema).fit(model, make["loader"](4), make["loader"](1))

    assert model.addresses == [model.second.weight.data_ptr()]
    assert torch.equal(model.probe[0], ema.average["second._orig_mod.weight"])
    assert equal(weights(model), model.trained[-1])


def test_snapshots_leave_buffers_out(make, tmp_path):
    """A sum with negative weights of running variances would be no variance."""

    class Normed(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.norm(self.first(x)))

    options = {"profiles": [0.1], "snapshot_every_n_steps": 2, "snapshot_dir": tmp_path / "s"}
    ema = EMACallback(buffers="average", **options)
    make["trainer"](ema, limit_val_batches=0).fit(Normed(), make["loader"](4))

    assert "norm.running_var" in ema.average
    assert set(reconstruct(tmp_path / "s", sigma_rel=0.1)) == {
        name for name, _ in Normed().named_parameters()
    }
