from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint.metadata import SidecarReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]


class Usage(NamedTuple):
    """What `shutil.disk_usage` returns."""

    total: int
    used: int
    free: int


def saving(**options: Any) -> dict[str, Any]:
    last = {"name": "last_checkpoint", "topk": 2}
    return {"checkpoint_saving": {"checkpoint_callbacks": [last], **options}}


class Wide:
    """Makes the model large enough for its state to outweigh what surrounds it."""

    def __init__(self, model: Any) -> None:
        self.module = model()
        self.module.layer = torch.nn.Linear(4, 20_000)


def test_a_trial_tells_how_large_a_checkpoint_will_be(fit, model, folder: Path, caplog):
    """Before the first step, with the state that the optimizer does not have yet."""
    with caplog.at_level(logging.INFO, logger="nshtrainer_checkpoint"):
        fit(Wide(model).module, max_epochs=1, **saving(trial=True))
    (record,) = SidecarReader().records(folder / "last")
    (line,) = [r.getMessage() for r in caplog.records if "a trial took" in r.getMessage()]

    assert record.size > 3 * 20_000 * 5 * 4
    number, unit = line.partition("about ")[2].split(",")[0].split()
    assert unit == "MB"
    assert float(number) == pytest.approx(record.size / 1e6, rel=0.05)
    assert "up to 3 are kept at once" in line
    assert [p.name for p in folder.iterdir() if p.name.startswith(".")] == []
    assert len(list((folder / "last").iterdir())) == 2  # the checkpoint and its sidecar


def test_a_trial_stops_a_run_that_would_fill_the_disk(
    fit, model, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Not one step is made, and the message says how much is needed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 0, 2_000_000))
    module = Wide(model).module
    with pytest.raises(ConfigError, match=r"needs 3\.\d MB, but 2\.0 MB are free"):
        fit(module, max_epochs=1, **saving(trial=True))

    assert module.trainer.global_step == 0
    assert list((folder / "last").iterdir()) == []


def test_with_warn_a_failed_trial_is_only_said(fit, model, monkeypatch: pytest.MonkeyPatch, caplog):
    """Who wants to train in spite of failing saves can."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: Usage(10**9, 0, 1_000))
    trainer = fit(model(), max_epochs=1, **saving(trial=True, on_save_error="warn"))

    assert trainer.global_step == 4
    assert "are free" in caplog.text


def test_no_trial_is_made_unless_asked_for(fit, model, monkeypatch: pytest.MonkeyPatch):
    """A large model's save takes minutes."""
    saves: list[int] = []

    def on_save_checkpoint(self: Any, checkpoint: dict[str, Any]) -> None:
        saves.append(self.trainer.global_step)

    monkeypatch.setattr(model, "on_save_checkpoint", on_save_checkpoint)
    fit(model(), max_epochs=1, **saving())
    assert saves == [4]
    fit(model(), id="s", max_epochs=1, **saving(trial=True))
    assert saves == [4, 0, 4]


def test_a_trial_changes_nothing_of_the_training(fit, model):
    """Weights are bitwise what they are without it."""
    a, b = model(), model()
    fit(a, id="a", max_epochs=2, **saving(trial=True))
    fit(b, id="b", max_epochs=2, **saving())

    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("trial", [True, False])
def test_a_place_that_cannot_be_written_to_is_found_before_the_first_step(
    fit, model, tmp_path: Path, trial: bool
):
    """A file where a folder should be, as with any other cause."""
    (tmp_path / "taken").write_text("a file")
    module = model()
    last = {"name": "last_checkpoint", "dirpath": str(tmp_path / "taken")}
    with pytest.raises(ConfigError, match="cannot write to"):
        fit(module, checkpoint_saving={"checkpoint_callbacks": [last], "trial": trial})

    assert module.trainer.global_step == 0


def test_nothing_is_made_in_a_run_that_ends_before_its_first_save(fit, model, folder: Path):
    """Looking whether a folder can be made does not make it."""
    fit(model(), max_epochs=0, **saving())

    assert not (folder / "last").exists()
