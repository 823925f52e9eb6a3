"""The clauses of runs that fail: the user's exception surfaces, and the module is left as found."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.model_helpers import is_overridden

from .harness import Harness
from .probes import Observer, plant_failure
from .promises import promise
from .traces import differences, facts, same, weights_of

__all__ = ["FailureClauses"]


class FailureClauses(Harness):
    """Exceptions in the user's steps; Lightning calls `on_exception` then, and no `teardown`."""

    def test_exception_in_training_step_leaves_no_trace(self, tmp_path: Path) -> None:
        """The exception of a training step surfaces, and the module is as without the callbacks."""
        self._fails_cleanly("training_step", self.batches + 1, tmp_path)

    def test_exception_in_validation_step_leaves_no_trace(self, tmp_path: Path) -> None:
        """The exception of a validation step surfaces, and the module is as without the callbacks."""
        self._fails_cleanly("validation_step", 1, tmp_path)

    def test_exception_in_sanity_check_leaves_no_trace(self, tmp_path: Path) -> None:
        """The exception of a sanity check surfaces, and the module is as without the callbacks."""
        self._fails_cleanly("validation_step", 0, tmp_path, num_sanity_val_steps=2)

    def _fails_cleanly(self, hook: str, at: int, folder: Path, **fields: Any) -> None:
        if not is_overridden(hook, self.module()):
            pytest.skip(f"the module has no {hook}")
        expected, plain_module = self._failed(folder / "without", hook, at, False, fields)
        found, module = self._failed(folder / "with", hook, at, True, fields)
        left = differences(found, expected)
        promise(
            not left,
            f"{self._name} leaves behind, after an exception in {hook}: {'; '.join(left)}; undo it in "
            f"on_exception too, Lightning calls no teardown then",
        )
        promise(
            self.changes_training or same(weights_of(module), weights_of(plain_module)),
            f"after an exception in {hook} the module has other weights than without {self._name}; "
            f"put the trained ones back in on_exception",
        )

    def _failed(
        self,
        folder: Path,
        hook: str,
        at: int,
        with_callbacks: bool,
        fields: dict[str, Any],
    ) -> tuple[dict[str, Any], LightningModule]:
        config = self.trainer_config(folder, with_callbacks=with_callbacks, **fields)
        observer, module = Observer(), self.module()
        trainer = self.plain_trainer(config, self.callbacks_of(config), [observer])
        error = plant_failure(module, hook, at)
        surfaced: BaseException | None = None
        try:
            self.fit(trainer, module)
        except BaseException as caught:  # noqa: BLE001 -- whatever surfaces is compared
            surfaced = caught
        if surfaced is not None and error not in _chain(surfaced):
            raise surfaced  # it failed before it came to that
        promise(
            surfaced is error,
            f"{surfaced!r} surfaces from a run with {self._name}, not the {error!r} that the module "
            f"raised in {hook}; let hooks that run on an exception raise nothing",
        )
        return facts(module, trainer, observer.optimizers), module


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__
