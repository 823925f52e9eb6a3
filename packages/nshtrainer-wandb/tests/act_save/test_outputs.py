from __future__ import annotations

import gc
import logging
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch import Trainer as LightningTrainer
from torch import nn
from torch.utils.checkpoint import checkpoint

from nshtrainer.callbacks.callback import HOT_HOOKS
from nshtrainer.errors import ConfigError
from nshtrainer_wandb import ActSaveCallback
from nshtrainer_wandb.act_save.outputs import ModuleOutputs
from nshtrainer_wandb.act_save.session import Session

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # new torch
    # torch looks at `.grad` of what goes into code that is compiled behind an interruption.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


class TwoHeads(nn.Module):
    """Gives a mapping with a tensor and a list of one."""

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"a": x, "rest": [x * 2], "name": "x"}


class Net(LightningModule):
    """An encoder, and heads whose output is no tensor; nothing of ActSave in its code."""

    def __init__(self, *, checkpoints: bool = False, compile_with: dict[str, Any] | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3))
        self.heads = TwoHeads()
        self.unused = nn.Linear(2, 2)
        self.checkpoints = checkpoints
        self.fail_at: int | None = None
        self.failure: BaseException = RuntimeError("the model failed")
        if compile_with is not None:
            self.encoder = torch.compile(self.encoder, **compile_with)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        encoded = (
            checkpoint(self.encoder, batch, use_reentrant=False)
            if self.checkpoints
            else self.encoder(batch)
        )
        return self.heads(encoded)["rest"][0].square().mean()

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        if batch_idx == self.fail_at:
            raise self.failure
        return self(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class ValidatedNet(Net):
    """The same, for trainings with validation; Lightning warns of a step without data."""

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self(batch)


def _train(model, batches, folder: Path, *others: Callback, val=None, trainer=None, **options: Any):
    """Train on a plain trainer."""
    callback = ActSaveCallback(save_dir=folder, **options)
    fields: dict[str, Any] = {"max_epochs": 1, **(trainer or {})}
    LightningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback, *others], **fields,
    ).fit(model, batches, val)  # fmt: skip


def _fit(model, batches, folder: Path, *others: Callback, **options: Any):
    """Train; return what was stored by name, in order."""
    _train(model, batches, folder, *others, **options)
    return _stored(folder)


def _stored(folder: Path) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for file in sorted(folder.rglob("*.npy"), key=lambda p: (p.parent, int(p.stem))):
        found.setdefault(file.parent.name, []).append(np.load(file))
    return found


def _num_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) for m in model.modules())


def _is_off() -> bool:
    from nshutils.actsave import ActSave

    return not ActSave.is_initialized and ActSave._prefixes == [] and ActSave._disable_count == 0


class Reference(Callback):
    """Notes the encoder's outputs and the steps with a hook of its own."""

    def on_fit_start(self, trainer, pl_module):
        self.outputs: list[np.ndarray] = []
        pl_module.encoder.register_forward_hook(
            lambda module, args, output: self.outputs.append(output.detach().numpy().copy())
        )


def test_outputs_are_those_of_the_modules(batches, tmp_path: Path):
    """Bit for bit, by the module's name and the place in its output; the model's code is as it was."""
    reference = Reference()
    stored = _fit(Net(), batches, tmp_path, reference, include=["encoder*", "heads"])

    assert set(stored) == {
        f"train.{name}"
        for name in (
            "step",
            "encoder",
            "encoder.0",
            "encoder.1",
            "encoder.2",
            "heads.a",
            "heads.rest.0",
        )
    }
    assert len(reference.outputs) == 4
    for ours, theirs in zip(stored["train.encoder"], reference.outputs, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(stored["train.heads.rest.0"][3], 2 * stored["train.heads.a"][3])


def test_outputs_of_test_and_prediction_are_stored_at_every_nth_batch(batches, tmp_path: Path):
    """Each call under its stage's name, by the same rule as in training."""

    class Tested(Net):
        def test_step(self, batch: torch.Tensor, batch_idx: int) -> None:
            self(batch)

    callback = ActSaveCallback(save_dir=tmp_path, include=["encoder"], every_n_steps=2)
    trainer = LightningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, callbacks=[callback]
    )
    model = Tested()
    trainer.test(model, batches, verbose=False)
    trainer.predict(model, batches)

    counts = {name: len(values) for name, values in _stored(tmp_path).items()}
    stored = (f"{s}.{n}" for s in ("test", "predict") for n in ("encoder", "step"))
    assert counts == dict.fromkeys(stored, 2)
    assert _num_hooks(model) == 0


def test_exclude_leaves_modules_out(batches, tmp_path: Path):
    """`exclude` wins over `include`."""
    stored = _fit(Net(), batches, tmp_path, include=["encoder*"], exclude=["encoder.*"])

    assert set(stored) == {"train.encoder", "train.step"}


@pytest.mark.parametrize(
    "options", [{"include": ["decoder.*"]}, {"include": ["*"], "exclude": ["x"]}]
)
def test_glob_that_matches_no_submodule_is_refused(batches, tmp_path: Path, options):
    """Before training, with names that there are."""
    model = Net()
    with pytest.raises(
        ConfigError, match=r"act_save: .* matches no submodule .* encoder, encoder.0"
    ):
        _fit(model, batches, tmp_path, **options)

    assert model.trainer.global_step == 0
    assert _is_off()


def test_modules_of_configure_model_are_found(batches, tmp_path: Path):
    """They are made after `setup`."""

    class Late(Net):
        def configure_model(self) -> None:
            self.late = nn.Identity()

        def forward(self, batch):
            return self.late(super().forward(batch))

    assert len(_fit(Late(), batches, tmp_path, include=["late"])["train.late"]) == 4


def test_every_nth_step_is_stored_and_the_others_have_no_hooks(batches, tmp_path: Path):
    """The steps are counted through epochs, and said beside the tensors."""
    hooks: list[int] = []

    class Look(Callback):
        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            hooks.append(_num_hooks(pl_module))

    stored = _fit(
        Net(), batches, tmp_path, Look(), include=["encoder"], every_n_steps=3, trainer={"max_epochs": 2}
    )  # fmt: skip

    assert [int(x) for x in stored["train.step"]] == [0, 3, 6]
    assert len(stored["train.encoder"]) == 3
    assert hooks == [1, 0, 0, 1, 0, 0, 1, 0]


def test_all_batches_of_an_accumulated_step_are_stored(batches, tmp_path: Path):
    """A step of two batches is stored as a whole, or not at all."""
    trainer = {"accumulate_grad_batches": 2}
    stored = _fit(Net(), batches, tmp_path, include=["encoder"], every_n_steps=2, trainer=trainer)

    assert [int(x) for x in stored["train.step"]] == [0, 0]


def test_steps_of_manual_optimization_are_counted(batches, tmp_path: Path):
    """Each batch is one."""

    class Manual(Net):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self(batch))
            optimizer.step()

    stored = _fit(Manual(), batches, tmp_path, include=["encoder"], every_n_steps=2)

    assert [int(x) for x in stored["train.step"]] == [0, 2]


def test_forward_passes_of_activation_checkpointing_are_not_stored_twice(batches, tmp_path: Path):
    """They are repeated while gradients are computed."""
    stored = _fit(Net(checkpoints=True), batches, tmp_path, include=["encoder.0"])

    assert len(stored["train.encoder.0"]) == 4


def test_reducers_are_those_of_numpy(batches, tmp_path: Path):
    """Mean, L2 norm and histogram in fp32, in place of the tensor."""
    whole = _fit(Net(), batches, tmp_path / "a", include=["encoder"])["train.encoder"]
    names = ["mean", "l2_norm", "histogram"]
    stored = _fit(Net(), batches, tmp_path / "b", include=["encoder"], reduce=names)

    kinds = ("mean", "l2_norm", "histogram.counts", "histogram.edges")
    assert set(stored) == {"train.step", *(f"train.encoder.{kind}" for kind in kinds)}
    for i, tensor in enumerate(whole):
        exact = tensor.astype(np.float64)
        counts, edges = (stored[f"train.encoder.histogram.{x}"][i] for x in ("counts", "edges"))
        assert stored["train.encoder.mean"][i] == pytest.approx(exact.mean(), rel=1e-5)
        assert stored["train.encoder.l2_norm"][i] == pytest.approx(np.linalg.norm(exact), rel=1e-5)
        assert counts.sum() == tensor.size
        assert edges[[0, -1]] == pytest.approx([exact.min(), exact.max()])
        assert counts.shape == (64,)
        assert edges.shape == (65,)


def test_bf16_outputs_are_stored_as_fp32(batches, tmp_path: Path):
    """NumPy has no bf16; no value changes by that."""
    trainer = {"precision": "bf16-mixed"}
    stored = _fit(Net(), batches, tmp_path, include=["encoder.0"], trainer=trainer)

    assert {x.dtype for x in stored["train.encoder.0"]} == {np.dtype("float32")}


def test_budget_stops_storing_and_says_so_once(batches, tmp_path: Path, caplog):
    """No file goes beyond it, the training goes on, and a second one stores nothing either."""
    model = Net()
    callback = ActSaveCallback(save_dir=tmp_path, include=["encoder*"], max_bytes=2000)
    trainer = LightningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=2,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        trainer.fit(model, batches)
        trainer.fit_loop.max_epochs = 3
        trainer.fit(model, batches)

    assert trainer.global_step == 12
    sizes = [file.stat().st_size for file in tmp_path.rglob("*.npy")]
    assert 1000 < sum(sizes) <= 2000
    assert sum(sizes) == callback._budget.used
    assert caplog.text.count("act_save stores nothing more") == 1
    assert "above `max_bytes`, 2000" in caplog.text


def test_disk_that_takes_no_more_ends_no_training(batches, tmp_path: Path, caplog):
    """The folder is replaced by a file while the model is trained."""

    class Break(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1:
                (tmp_path / "a").rename(tmp_path / "moved")
                (tmp_path / "a").write_text("no folder")

    model = Net()
    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        _fit(model, batches, tmp_path / "a", Break(), include=["encoder"])

    assert model.trainer.global_step == 4
    assert len(_stored(tmp_path / "moved")["train.encoder"]) == 2
    assert caplog.text.count("act_save stores nothing more") == 1


def test_folder_that_cannot_be_made_ends_no_training(batches, tmp_path: Path, caplog):
    """It is said, and nothing is stored."""
    (tmp_path / "a").write_text("no folder")
    model = Net()
    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        _fit(model, batches, tmp_path / "a", include=["encoder"])

    assert model.trainer.global_step == 4
    assert "act_save stores nothing: " in caplog.text


def test_submodules_that_are_not_called_are_named(batches, tmp_path: Path, caplog):
    """What was asked for and is not there is not found out weeks later; the sanity check says nothing."""
    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        _fit(ValidatedNet(), batches, tmp_path, val=batches, include=["unused", "encoder"])

    assert caplog.text.count("has stored no output of 1 submodules") == 1
    assert "unused" in caplog.text


@pytest.mark.parametrize("failure", [RuntimeError("x"), KeyboardInterrupt(), SystemExit(3)])
def test_every_way_out_takes_back_hooks_and_contexts(batches, tmp_path: Path, failure):
    """An exception, Ctrl-C and an exit in the middle of a stored batch."""
    model = Net()
    model.fail_at, model.failure = 2, failure
    with pytest.raises((RuntimeError, SystemExit)):  # Lightning exits after a KeyboardInterrupt
        _fit(model, batches, tmp_path, include=["encoder*"])

    assert _is_off()
    assert _num_hooks(model) == 0
    assert len(_stored(tmp_path)["train.encoder"]) == 2


def test_what_a_broken_callback_left_behind_is_closed_by_the_next_run(batches, tmp_path: Path):
    """If another callback fails while an exception is handled, ours is not told of it."""

    class Broken(Callback):
        def on_exception(self, trainer, pl_module, exception):
            raise ValueError("broken")

    model = Net()
    model.fail_at = 2
    callback = ActSaveCallback(save_dir=tmp_path / "a", include=["encoder"])
    trainer = LightningTrainer(
        accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_epochs=1,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[Broken(), callback],
    )  # fmt: skip
    with pytest.raises(ValueError, match="broken"):
        trainer.fit(model, batches)

    stored = _fit(Net(), batches, tmp_path / "b", include=["encoder"])

    assert len(stored["train.encoder"]) == 4
    assert len(_stored(tmp_path / "a")["train.encoder"]) == 2
    assert _num_hooks(model) == 0
    assert _is_off()


@pytest.mark.parametrize("before", [False, True])
def test_compiled_submodules_are_stored(batches, tmp_path: Path, before: bool):
    """Inside and outside; compiled names are those of the code. Steps between run the whole graph."""
    plain = _fit(Net(), batches, tmp_path / "a", include=["encoder*"], every_n_steps=2)
    torch.compiler.reset()
    model = Net(compile_with={"backend": "eager"})
    if before:
        with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            model.encoder(torch.ones(2, 4))
    stored = _fit(model, batches, tmp_path / "b", include=["encoder*"], every_n_steps=2)

    assert {k: len(v) for k, v in stored.items()} == {k: len(v) for k, v in plain.items()}
    for name, tensors in plain.items():
        np.testing.assert_allclose(np.stack(stored[name]), np.stack(tensors), rtol=1e-5)


def test_compiled_module_is_stored(batches, tmp_path: Path):
    """The way Lightning takes a whole compiled module."""
    torch.compiler.reset()
    stored = _fit(torch.compile(Net(), backend="eager"), batches, tmp_path, include=["encoder.0"])

    assert len(stored["train.encoder.0"]) == 4


def test_compilation_that_may_not_be_interrupted_is_named(batches, tmp_path: Path):
    """`fullgraph=True` and hooks inside exclude each other, and the error says what to change."""
    torch.compiler.reset()
    model = Net(compile_with={"backend": "eager", "fullgraph": True})

    with pytest.raises(
        torch._dynamo.exc.Unsupported, match="take the submodules inside out of act_save"
    ):
        _fit(model, batches, tmp_path / "a", include=["encoder.0"])
    stored = _fit(model, batches, tmp_path / "b", include=["encoder"])

    assert len(stored["train.encoder"]) == 4


def test_module_compiled_earlier_is_named(batches, tmp_path: Path, caplog):
    """Torch looks for no hooks in what it has compiled; the person is told."""
    torch.compiler.reset()
    model = Net(compile_with={"backend": "eager"})
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            model.encoder(torch.ones(2, 4))

    with caplog.at_level(logging.WARNING, "nshtrainer_wandb"):
        stored = _fit(model, batches, tmp_path, include=["encoder.0", "heads"])

    assert "train.encoder.0" not in stored
    assert "compiled before the trainer ran: encoder.0" in caplog.text


def test_switched_off_no_hook_can_be_called(batches, tmp_path: Path):
    """Lightning skips what is not callable; and there is no folder, nor a hook on the model."""
    callback = ActSaveCallback(enabled=False)
    assert [hook for hook in HOT_HOOKS if callable(getattr(callback, hook))] == []

    model = Net()
    stored = _fit(model, batches, tmp_path / "a", enabled=False, include=["encoder"])

    assert stored == {}
    assert not (tmp_path / "a").exists()
    assert model._forward_hooks == {}


def _held() -> tuple[int, int, int]:
    """Threads, open files, and objects of ours that are alive."""
    gc.collect()
    ours = sum(type(x) in (ModuleOutputs, Session, ActSaveCallback) for x in gc.get_objects())
    return threading.active_count(), len(os.listdir("/dev/fd")), ours


def _trains_without_leaks(num_fits: int, batches, folder: Path) -> None:
    model = ValidatedNet()
    _train(model, batches, folder, include=["encoder*"], val=batches)
    before = _held()
    for _ in range(num_fits):
        _train(model, batches, folder, include=["encoder*"], val=batches)

    assert _held() == before
    assert _is_off()
    assert _num_hooks(model) == 0
    assert len(list(folder.glob("[0-9]*"))) == num_fits + 1


def test_fits_one_after_another_leave_nothing_behind(batches, tmp_path: Path):
    """No hooks, contexts, threads or open files."""
    _trains_without_leaks(8, batches, tmp_path)


@pytest.mark.slow
def test_many_fits_leave_nothing_behind(batches, tmp_path: Path):
    """The same, longer."""
    _trains_without_leaks(50, batches, tmp_path)
