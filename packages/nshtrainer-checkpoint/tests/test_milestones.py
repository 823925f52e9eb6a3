from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nshtrainer_checkpoint import LastCheckpointCallbackConfig
from nshtrainer_checkpoint.metadata import SidecarReader

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]


def saving(**options: Any) -> dict[str, Any]:
    last = {"name": "last_checkpoint", **options}
    return {"checkpoint_saving": {"checkpoint_callbacks": [last]}}


def steps(folder: Path) -> list[int]:
    return sorted(r.step for r in SidecarReader().records(folder / "last"))


def test_milestones_are_saved_at_their_steps_and_stay(fit, model, folder: Path):
    """Beside the newest one, also after a resume, and `last` leads to the newest."""
    fit(model(), max_epochs=2, **saving(keep_every_n_steps=3))
    assert steps(folder) == [3, 6, 8]
    fit(model(), max_epochs=3, ckpt_path="last", **saving(keep_every_n_steps=3))

    assert steps(folder) == [3, 6, 8, 9, 12]  # 8 was resumed from
    assert "step12" in str((folder / "last.ckpt").resolve())


def test_a_size_budget_keeps_fewer_than_topk(fit, model, folder: Path):
    """As many of the newest as fit, and always the newest."""
    fit(model(), id="probe", max_epochs=1, **saving())
    (record,) = SidecarReader().records(folder.parents[1] / "probe" / "checkpoint" / "last")
    room = int(2.5 * record.size)

    fit(model(), max_epochs=4, **saving(topk=3, max_total_bytes=room))
    assert steps(folder) == [12, 16]
    fit(model(), id="tiny", max_epochs=4, **saving(topk=3, max_total_bytes=1))
    assert steps(folder.parents[1] / "tiny" / "checkpoint") == [16]


@pytest.mark.parametrize(
    ("text", "size"), [("20GB", 20 * 10**9), (1024, 1024), ("1.5 MiB", 1572864)]
)
def test_a_size_may_be_text_with_a_unit(text: str | int, size: int):
    """And survives a file."""
    config = LastCheckpointCallbackConfig.model_validate({"max_total_bytes": text})

    assert config.max_total_bytes == size
    assert LastCheckpointCallbackConfig.from_text(config.to_text("yaml"), "yaml") == config


@pytest.mark.parametrize("size", [0, -1, "", "20 apples", True, float("nan")])
def test_a_size_that_is_none_is_refused(size: Any):
    """Nothing could be kept, or nobody knows how much is meant."""
    with pytest.raises(ValueError, match="max_total_bytes"):
        LastCheckpointCallbackConfig.model_validate({"max_total_bytes": size})
