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
from .traces import first_difference

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
            left = first_difference(self._compared(restored), self._compared(saved))
            promise(
                left is None,
                f"the callback {key!r} of {self._name} has another state after load_state_dict than "
                f"was saved: {left}; restore all of it, or name it in not_compared",
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
            one = self._compared_checkpoint(key, found.get(key), interrupted)
            other = self._compared_checkpoint(key, expected.get(key), straight)
            left = first_difference(one, other, f"[{key!r}]")
            promise(
                left is None,
                f"a checkpoint of a resumed run with {self._name} differs from that of a run that was "
                f"not interrupted: {left}; save and restore what it depends on, name it in "
                f"not_compared, or set resumes_exactly = False and document it",
            )

    def test_sanity_check_does_not_count(self, tmp_path: Path) -> None:
        """It works with a sanity check, which leaves its state as if there had been none.

        States are compared if `resumes_exactly` is set.
        """
        without, _, _ = self.observed(tmp_path / "without", num_sanity_val_steps=0)
        with_it, _, _ = self.observed(tmp_path / "with", num_sanity_val_steps=2)
        one = self._compared_checkpoint("callbacks", with_it.states, tmp_path / "with")
        other = self._compared_checkpoint("callbacks", without.states, tmp_path / "without")
        left = first_difference(one, other)
        promise(
            not self.resumes_exactly or left is None,
            f"{self._name} remembers something else after a run with a sanity check than after one "
            f"without: {left}; ignore what happens while trainer.sanity_checking",
        )

    def _compared(self, state: Any) -> Any:
        if not isinstance(state, Mapping):
            return state
        items = cast("Mapping[Any, Any]", state).items()
        return {k: v for k, v in items if k not in self.not_compared}

    def _compared_checkpoint(self, key: str, value: Any, folder: Path) -> Any:
        """One entry of a checkpoint; paths are taken out, so that two runs can be compared."""
        if key == "callbacks" and value is not None:
            value = {name: self._compared(state) for name, state in value.items()}
        return _relative(value, folder)

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
