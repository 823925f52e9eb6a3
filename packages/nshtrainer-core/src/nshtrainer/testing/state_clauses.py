"""The clauses of what callbacks remember: plain data that is restored, and resumed as if never stopped."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from .harness import Harness
from .probes import SaveEachEpoch
from .promises import BrokenPromiseError, promise
from .traces import same

__all__ = ["StateClauses"]

_NOT_OURS = ("hyper_parameters", "datamodule_hyper_parameters", "hparams_name", "hparams_type")
_NOT_COMPARED = (*_NOT_OURS, "loops", "pytorch-lightning_version")


class StateClauses(Harness):
    """Checkpoints, resuming, and the sanity check, which must not count."""

    def test_state_is_plain_data_and_restored(self, tmp_path: Path) -> None:
        """What it puts into a checkpoint loads with `weights_only=True`, and is restored as saved."""
        path, checkpoint = self._first_epoch(tmp_path)
        mine = {k: v for k, v in checkpoint.items() if k not in _NOT_OURS}
        buffer = io.BytesIO()
        torch.save(mine, buffer)
        buffer.seek(0)
        try:
            torch.load(buffer, weights_only=True)
        except Exception as error:
            raise BrokenPromiseError(
                f"a checkpoint of a run with {self._name} does not load with weights_only=True: "
                f"{error}\nUse tensors, text, numbers, booleans, None, lists, tuples and dicts"
            ) from error

        observer, _, _ = self.observed(tmp_path, ckpt_path=path)
        for key, saved in cast("dict[str, Any]", checkpoint["callbacks"]).items():
            restored = observer.restored.get(key)
            promise(
                same(self._restorable(restored), self._restorable(saved)),
                f"the callback {key!r} of {self._name} saves {saved!r} and has {restored!r} after "
                f"load_state_dict; restore all of it",
            )

    def test_resumes_as_if_never_interrupted(self, tmp_path: Path) -> None:
        """A run that is stopped after an epoch and resumed saves, bitwise, what a straight one does.

        Only if `resumes_exactly` is set.
        """
        if not self.resumes_exactly:
            pytest.skip("resumes_exactly = False documents that it does not")
        straight, interrupted = tmp_path / "straight", tmp_path / "interrupted"
        self._saved(straight, epochs=2)
        first, _ = self._first_epoch(interrupted)
        self._saved(interrupted, epochs=2, ckpt_path=first)
        expected, found = self._read(straight, 1), self._read(interrupted, 1)
        for key in sorted({*expected, *found} - {*_NOT_COMPARED}):
            one = _relative(found.get(key), interrupted)
            other = _relative(expected.get(key), straight)
            promise(
                same(one, other),
                f"after resuming with {self._name}, {key!r} in the checkpoint is {one!r}, in a run "
                f"that was not interrupted {other!r}; save and restore what it depends on, or set "
                f"resumes_exactly = False and document it",
            )

    def test_sanity_check_does_not_count(self, tmp_path: Path) -> None:
        """It works with a sanity check, which leaves its state as if there had been none.

        States are compared if `resumes_exactly` is set.
        """
        without, _, _ = self.observed(tmp_path / "without", num_sanity_val_steps=0)
        with_it, _, _ = self.observed(tmp_path / "with", num_sanity_val_steps=2)
        one = _relative(with_it.states, tmp_path / "with")
        other = _relative(without.states, tmp_path / "without")
        promise(
            not self.resumes_exactly or same(one, other),
            f"{self._name} remembers {one} after a run with a sanity check, {other} after one "
            f"without; ignore what happens while trainer.sanity_checking",
        )

    def _restorable(self, state: Any) -> Any:
        if not isinstance(state, Mapping):
            return state
        items = cast("Mapping[Any, Any]", state).items()
        return {k: v for k, v in items if k not in self.not_restored}

    def _saved(self, folder: Path, epochs: int, ckpt_path: Path | None = None) -> None:
        save = SaveEachEpoch(folder)
        self.observed(folder, last=[save], max_epochs=epochs, ckpt_path=ckpt_path)

    def _first_epoch(self, folder: Path) -> tuple[Path, dict[str, Any]]:
        self._saved(folder, epochs=1)
        return SaveEachEpoch(folder).path(0), self._read(folder, 0)

    def _read(self, folder: Path, epoch: int) -> dict[str, Any]:
        path = SaveEachEpoch(folder).path(epoch)
        promise(
            path.is_file(),
            f"the run with {self._name} ended before epoch {epoch}; choose options with which it "
            f"trains two epochs",
        )
        return torch.load(path, weights_only=False)


def _relative(value: Any, folder: Path) -> Any:
    """*value* with the path of *folder* taken out of every text, so that two runs can be compared."""
    if isinstance(value, str):
        return value.replace(str(folder), "<folder>")
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return {_relative(k, folder): _relative(v, folder) for k, v in items}
    if isinstance(value, (list, tuple)):
        values = [_relative(v, folder) for v in cast("list[Any]", value)]
        return values if isinstance(value, list) else tuple(values)
    return value
