"""The clauses of ordinary runs: every trainer, mode and stage, and no influence that is not meant."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden

from nshtrainer.errors import NshTrainerError

from .harness import Harness
from .probes import EndOfStep, StartOfStep, quiet_and_seeded
from .promises import promise
from .syncs import HostSyncs
from .traces import differences, facts, same, weights_of

__all__ = ["FitClauses"]

_STEPS = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}


class FitClauses(Harness):
    """Runs that go well."""

    def test_fits_on_our_trainer(self, tmp_path: Path) -> None:
        """`nshtrainer.Trainer` trains with it, with a logger."""
        trainer = self.our_trainer(self.trainer_config(tmp_path, loggers=[{"name": "csv"}]))
        self.expect_fit(trainer)

        self._has_all(trainer, tmp_path)

    def test_fits_on_a_plain_trainer(self, tmp_path: Path) -> None:
        """`lightning.pytorch.Trainer` trains with what `create_callbacks` returns."""
        config = self.trainer_config(tmp_path)
        self.expect_fit(self.plain_trainer(config, self.callbacks_of(config)))

    def test_fits_without_loggers(self, tmp_path: Path) -> None:
        """`nshtrainer.Trainer` trains with it when metrics go nowhere."""
        self.expect_fit(self.our_trainer(self.trainer_config(tmp_path, loggers=[])))

    def test_fits_twice(self, tmp_path: Path) -> None:
        """A second `fit`, and a second trainer with the same callbacks, work like the first.

        Nothing piles up on the module.
        """
        config = self.trainer_config(tmp_path)
        callbacks = self.callbacks_of(config)
        trainer = self.plain_trainer(config, callbacks)
        module = self.expect_fit(trainer)
        after_one = facts(module, trainer)
        assert trainer.fit_loop.max_epochs is not None  # noqa: S101 -- ours, for the type checker
        trainer.fit_loop.max_epochs += self.epochs
        self.expect_fit(trainer, module, steps=2 * self.epochs * self.batches)
        left = differences(facts(module, trainer), after_one)
        promise(
            not left,
            f"a second fit with {self._name} leaves more behind than the first: {'; '.join(left)}",
        )
        self.expect_fit(self.plain_trainer(config, callbacks))

    def test_fits_while_accumulating(self, tmp_path: Path) -> None:
        """It works when only some batches end in an optimizer step."""
        config = self.trainer_config(tmp_path, accumulate_grad_batches=2)
        steps = self.epochs * -(-self.batches // 2)
        self.expect_fit(self.plain_trainer(config, self.callbacks_of(config)), steps=steps)

    def test_fits_with_manual_optimization(self, tmp_path: Path) -> None:
        """It works when the module steps two optimizers by itself, or refuses with our error."""
        config = self.trainer_config(
            tmp_path,
            gradient_clip_val=None,
            gradient_clip_algorithm=None,
            accumulate_grad_batches=None,
        )
        trainer = self.plain_trainer(config, self.callbacks_of(config))
        if self.supports_manual_optimization:
            self.expect_fit(trainer, self.manual_module(), steps=2 * self.epochs * self.batches)
            return
        with pytest.raises(NshTrainerError):
            self.fit(trainer, self.manual_module())
        promise(trainer.global_step == 0, f"{self._name} refuses manual optimization too late")

    @pytest.mark.parametrize("stage", list(_STEPS))
    def test_runs_every_stage(self, stage: str, tmp_path: Path) -> None:
        """`validate`, `test` and `predict` work without any training."""
        module = self.module()
        if not is_overridden(_STEPS[stage], module):
            pytest.skip(f"the module has no {_STEPS[stage]}")
        config = self.trainer_config(tmp_path)
        trainer = self.plain_trainer(config, self.callbacks_of(config))
        with quiet_and_seeded():
            getattr(trainer, stage)(module, datamodule=self.datamodule())
        promise(trainer.state.finished, f"trainer.{stage} with {self._name} did not finish")

    def test_runs_in_fast_dev_run(self, tmp_path: Path) -> None:
        """A fast dev run, in which Lightning takes away loggers and checkpoints, goes to its end."""
        config = self.trainer_config(tmp_path, loggers=[{"name": "csv"}], fast_dev_run=True)
        self.expect_fit(self.our_trainer(config))

    def test_runs_in_barebones_mode(self, tmp_path: Path) -> None:
        """Barebones mode leaves it out, or keeps it if its metadata says so; nothing fails."""
        config = self.trainer_config(
            tmp_path, barebones=True, log_every_n_steps=None, enable_checkpointing=None
        )
        trainer = self.our_trainer(config)
        self.expect_fit(trainer)

        if self.config.metadata.enabled_for_barebones:
            self._has_all(trainer, tmp_path)

    def test_leaves_training_alone(self, tmp_path: Path) -> None:
        """After a run everything is as without the callbacks: hooks, flags, weights, random numbers.

        Weights and random numbers are compared unless `changes_training` is set.
        """
        plain, plain_trainer, plain_module = self.observed(
            tmp_path / "without", with_callbacks=False
        )
        expected = facts(plain_module, plain_trainer, plain.optimizers)
        seen, trainer, module = self.observed(tmp_path / "with")
        left = differences(facts(module, trainer, seen.optimizers), expected)
        promise(not left, f"{self._name} leaves behind, after a run: {'; '.join(left)}")
        if self.changes_training:
            return
        promise(
            same(weights_of(module), weights_of(plain_module)),
            f"{self._name} changes what is trained; set changes_training = True if that is meant",
        )
        moved = [name for name in plain.random if not same(seen.random[name], plain.random[name])]
        promise(
            not moved,
            f"{self._name} draws from the global random generator of {', '.join(moved)}, so a run "
            f"with it has other data and dropout; use a generator of its own",
        )

    def test_adds_no_host_sync(self, tmp_path: Path) -> None:
        """At a step at which nothing is logged, it never makes the host wait for the device."""
        if self.syncs_every_step:
            pytest.skip("syncs_every_step documents that it does")
        expected = self._syncs(tmp_path / "without", with_callbacks=False)
        found = self._syncs(tmp_path / "with", with_callbacks=True)
        added = {s: dict(n - expected.get(s, Counter())) for s, n in found.items()}
        bad = {step: names for step, names in added.items() if names}
        promise(
            not bad,
            f"{self._name} reads tensors on the host at steps at which nothing is logged "
            f"(step -> operation -> count): {bad}; keep the value on its device until a logging step, "
            f"or set syncs_every_step = True and document it",
        )

    def _syncs(self, folder: Path, *, with_callbacks: bool) -> dict[Any, Counter[str]]:
        config = self.trainer_config(
            folder,
            with_callbacks=with_callbacks,
            max_epochs=1,
            log_every_n_steps=10_000,
        )
        syncs = HostSyncs()
        trainer = self.plain_trainer(
            config, self.callbacks_of(config), [StartOfStep(syncs)], [EndOfStep(syncs)]
        )
        with syncs:
            self.fit(trainer)
        return syncs.counts

    def _has_all(self, trainer: Trainer, folder: Path) -> None:
        expected = {c.state_key for c in self.callbacks_of(self.trainer_config(folder))}
        callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set by Lightning's connector
        missing = expected.difference(c.state_key for c in callbacks)  # pyright: ignore[reportUnknownMemberType, reportUnknownVariableType, reportUnknownArgumentType] -- as above
        promise(not missing, f"the trainer lacks the callbacks {sorted(missing)} of {self._name}")
