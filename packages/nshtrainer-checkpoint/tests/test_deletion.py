"""What may never be deleted is not, whatever is there and whatever is asked for."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nshtrainer_checkpoint import BestCheckpointCallback, LastCheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader, sidecar_of
from nshtrainer_checkpoint.storage import commit, remove

METRIC = {"name": "loss", "mode": "min"}
OWNERS = ["ours", "another run", "another callback", "another program", "unfinished"]

present = st.lists(
    st.tuples(st.sampled_from(OWNERS), st.integers(0, 9), st.sampled_from([0.1, 0.5, None])),
    max_size=5,
)
saves = st.lists(st.sampled_from([0.05, 0.3, 0.7, float("nan")]), min_size=1, max_size=5)


def at_step(trainer: pl.Trainer, step: int) -> None:
    loop: Any = trainer.fit_loop.epoch_loop
    loop.automatic_optimization.optim_progress.optimizer.step.total.completed = step


def put(
    folder: Path, number: int, owner: str, step: int, value: float | None, callback: Any
) -> Path:
    """A checkpoint as *owner* would have left it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"old{number}.ckpt"
    path.write_bytes(b"x" * 10)
    if owner in ("another program", "unfinished"):
        return path
    sidecar: dict[str, Any] = {
        "run_id": "other" if owner == "another run" else None,
        "callback": "x" if owner == "another callback" else callback.writer.identity,
        "attempt": 1, "save_number": number + 1, "epoch": 0, "global_step": step,
        "save_weights_only": False,
        "monitor": {"name": "loss", "mode": "min", "value": value},
    }  # fmt: skip
    temporary = folder / "temporary"
    path.rename(temporary)
    commit(temporary, path, sidecar)
    return path


def tree(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    present=present,
    saves=saves,
    topk=st.sampled_from([1, 2, "all"]),
    budget=st.sampled_from([None, 1, 25]),
    best=st.booleans(),
    source=st.integers(0, 9),
)
def test_only_ours_of_this_run_goes_and_never_the_source(
    present: list[Any], saves: list[float], topk: Any, budget: int | None, best: bool, source: int
):
    """Files outside, of other runs, callbacks and programs, and what was resumed from, stay as they are."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kind: Any = BestCheckpointCallback if best else LastCheckpointCallback
        options = {"metric": METRIC} if best else {}
        callback = kind(dirpath=root / "run", topk=topk, max_total_bytes=budget, **options)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, logger=False, callbacks=[callback],
            enable_progress_bar=False, enable_model_summary=False, barebones=False,
        )  # fmt: skip
        writer = callback.writer
        writer._parent = root / "run"
        folder = writer.folder
        old = [
            (put(folder, i, owner, step, value, callback), owner)
            for i, (owner, step, value) in enumerate(present)
        ]
        outside = put(root / "elsewhere", 99, "ours", 1, 0.9, callback)
        loaded = old[source % len(old)][0] if old else None
        before = tree(root)
        # Resumed from step 9 of the attempt that left them: all of ours compete.
        at_step(trainer, 9)
        writer.load_state_dict({"run_id": writer.run_id, "attempt": 1, "ancestors": []})
        writer.begin(trainer)
        if loaded is not None:
            writer.sources.add(str(loaded.resolve()))

        for step, value in enumerate(saves, start=10):
            at_step(trainer, step)
            plan = callback.plan(trainer, {"loss": value}, step)
            if plan is None:
                continue
            plan.temporary.write_bytes(b"y" * 10)
            commit(plan.temporary, plan.record.path, plan.metadata)
            for record in plan.removed:
                assert remove(record)
            assert plan.record.path.exists()  # what was just written

        after = tree(root)
        allowed = {p for p, owner in old if owner == "ours" and p != loaded}
        gone = {root / name for name in before if name not in after}
        assert gone <= allowed | {sidecar_of(p) for p in allowed}
        assert {n: before[n] for n in before if n in after} == {
            n: after[n] for n in before if n in after
        }
        assert outside.exists()
        for record in SidecarReader().records(folder):
            assert json.loads(sidecar_of(record.path).read_text())["checkpoint_filename"]
