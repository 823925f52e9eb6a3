"""Snapshots on disk, and the averages that are made of them, against averages that were tracked."""

from __future__ import annotations

import functools
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nshtrainer import ConfigError
from nshtrainer_ema.ema.power_function import ReconstructionError, decay_over, gamma_of
from nshtrainer_ema.ema.snapshots import (
    Snapshot,
    SnapshotError,
    SnapshotNotFoundError,
    discard_after,
    list_snapshots,
    plan_reconstruction,
    reconstruct,
    write_snapshot,
)

WIDTHS = (0.05, 0.1)


@functools.cache
def weights(steps: int) -> list[dict[str, Tensor]]:
    """Weights of a small network, after each step of a noisy training that has not settled."""
    generator = torch.Generator().manual_seed(0)
    found: list[dict[str, Tensor]] = []
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) / 2
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        x = torch.randn(8, 4, generator=generator)
        y = x[:, :2].sin() + torch.randn(8, 2, generator=generator)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
        found.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return found


class Tracker:
    """An average of one profile, moved every few steps, in a plain loop."""

    def __init__(self, sigma_rel: float, every: int = 1) -> None:
        self.gamma, self.every = gamma_of(sigma_rel), every
        self.average: dict[str, Tensor] = {}

    def update(self, step: int, now: dict[str, Tensor]) -> None:
        if step % self.every:
            return
        decay = decay_over(step, self.every, self.gamma)
        for name, value in now.items():
            self.average.setdefault(name, torch.zeros_like(value)).lerp_(value, 1 - decay)


def train(
    folder: Path,
    *,
    steps: int,
    every: int,
    interval: int,
    third: float,
    dtype: torch.dtype | None = None,
    widths: tuple[float, ...] = WIDTHS,
) -> dict[int, dict[str, Tensor]]:
    """Write snapshots of *widths* while training; return the average of width *third* at each."""
    trackers = {w: Tracker(w, every) for w in (*widths, third)}
    tracked: dict[int, dict[str, Tensor]] = {}
    for step, now in enumerate(weights(steps), 1):
        for tracker in trackers.values():
            tracker.update(step, now)
        if step % interval == 0:
            tracked[step] = {n: a.clone() for n, a in trackers[third].average.items()}
            for w in widths:
                average = trackers[w].average
                write_snapshot(folder, step=step, sigma_rel=w, tensors=average, dtype=dtype)
    return tracked


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative, in L2 over all tensors."""
    difference = sum(float((one[n].double() - other[n].double()).square().sum()) for n in other)
    return (difference / sum(float(t.double().square().sum()) for t in other.values())) ** 0.5


def write(folder: Path, step: int = 10, sigma_rel: float = 0.1, **tensors: Tensor) -> Path:
    """One snapshot, of a single weight unless others are given."""
    tensors = tensors or {"weight": torch.full((3,), float(step))}
    return write_snapshot(folder, step=step, sigma_rel=sigma_rel, tensors=tensors)


# ---- what is reconstructed ---------------------------------------------------------------------


@pytest.mark.parametrize("third", [0.03, 0.075, 0.15])
@pytest.mark.parametrize("every", [1, 5])
def test_a_third_width_is_that_of_an_average_that_was_tracked(tmp_path, third, every):
    """Narrower, between and wider: within 2 %, and ten times as near as any snapshot of that step."""
    tracked = train(tmp_path, steps=600, every=every, interval=20, third=third)

    for step in (600, 400):
        made = reconstruct(tmp_path, sigma_rel=third, step=step)
        near = distance(made, tracked[step])
        snapshots = [reconstruct(tmp_path, sigma_rel=w, step=step) for w in WIDTHS]
        assert near < 0.02
        assert near < min(distance(s, tracked[step]) for s in snapshots) / 10


def test_snapshots_in_half_precision_are_good_enough(tmp_path):
    """The error stays in the order of fp16's own, and the result is fp32."""
    tracked = train(tmp_path, steps=600, every=1, interval=20, third=0.075, dtype=torch.float16)
    made = reconstruct(tmp_path, sigma_rel=0.075)

    assert distance(made, tracked[600]) < 5e-3
    assert {t.dtype for t in made.values()} == {torch.float32}
    stored = torch.load(list_snapshots(tmp_path)[0].path, weights_only=True)["tensors"]
    assert {t.dtype for t in stored.values()} == {torch.float16}


def test_what_stays_constant_comes_out_unchanged(tmp_path):
    """The weights of the sum add up to 1, where the profile is hit less well, too."""
    for step in (100, 200, 300, 400):
        for width in WIDTHS:
            write(tmp_path, step, width, weight=torch.full((3,), 7.0))
    plan = plan_reconstruction(tmp_path, sigma_rel=0.13, max_error=1)

    assert plan.error > 1e-3
    torch.testing.assert_close(plan.tensors()["weight"], torch.full((3,), 7.0), rtol=1e-6, atol=0)


def test_a_snapshot_that_is_asked_for_is_returned_as_it_is(tmp_path):
    """Bit for bit, at the last step or an earlier one, and no other file is read."""
    value = torch.randn(5)
    write(tmp_path, 10, 0.1, weight=value)
    write(tmp_path, 20, 0.05).write_bytes(b"nothing")
    write(tmp_path, 20, 0.1)

    assert torch.equal(reconstruct(tmp_path, sigma_rel=0.1, step=10)["weight"], value)
    assert torch.equal(reconstruct(tmp_path, sigma_rel=0.1)["weight"], torch.full((3,), 20.0))
    assert plan_reconstruction(tmp_path, sigma_rel=0.1, step=10).error == 0


def test_the_result_outlives_its_files(tmp_path):
    """Its memory is its own, not that of the mapped files."""
    path = write(tmp_path, weight=torch.ones(4, dtype=torch.float64), count=torch.tensor(3))
    made = reconstruct(tmp_path, sigma_rel=0.1)
    path.write_bytes(b"")

    assert torch.equal(made["weight"], torch.ones(4, dtype=torch.float64))
    assert made["count"].item() == 3


def test_whole_numbers_are_not_averaged(tmp_path):
    """They are those of the snapshot nearest to the step; complex numbers are averaged."""
    for step in range(100, 1001, 100):
        for width in WIDTHS:
            write(tmp_path, step, width, count=torch.tensor(step), phase=torch.tensor([1j]))

    made = reconstruct(tmp_path, sigma_rel=0.08, step=700)
    assert made["count"].item() == 700
    torch.testing.assert_close(made["phase"], torch.tensor([1j]))


def test_progress_is_told_after_each_file(tmp_path):
    """How many were read, and of how many."""
    for step in range(100, 1001, 100):
        for width in WIDTHS:
            write(tmp_path, step, width)
    seen: list[tuple[int, int]] = []
    reconstruct(tmp_path, sigma_rel=0.08, progress=lambda done, total: seen.append((done, total)))

    assert seen == [(i, 20) for i in range(1, 21)]


def test_what_cannot_be_made_is_refused(tmp_path):
    """A width that none has, a step that is to come, a profile out of reach, a folder without files."""
    with pytest.raises(SnapshotNotFoundError, match=r"no snapshot of an average in .*none; give"):
        reconstruct(tmp_path / "none", sigma_rel=0.1)
    write(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"sigma_rel=0\.5 is no width"):
        reconstruct(tmp_path, sigma_rel=0.5)
    with pytest.raises(ReconstructionError, match="step 101 cannot be reconstructed"):
        reconstruct(tmp_path, sigma_rel=0.1, step=101)
    with pytest.raises(ReconstructionError, match=r"profile of sigma_rel=0\.05 at step 100"):
        reconstruct(tmp_path, sigma_rel=0.05)
    with pytest.raises(ValueError, match="counted from 1"):
        reconstruct(tmp_path, sigma_rel=0.1, step=0)


# ---- files -------------------------------------------------------------------------------------


def test_a_snapshot_is_plain_data_for_torch(tmp_path):
    """`torch.load(weights_only=True)` reads it, with what the writer adds."""
    path = write_snapshot(
        tmp_path / "new",
        step=12000,
        sigma_rel=0.1,
        tensors={"w": nn.Parameter(torch.ones(2)), "n": torch.tensor(1)},
        dtype=torch.bfloat16,
        metadata={"every_n_steps": 4, "run": "a"},
    )

    content = torch.load(path, weights_only=True)
    assert path.name == "ema-step0000012000-sigma0.1.pt"
    assert (content["version"], content["step"], content["sigma_rel"]) == (1, 12000, 0.1)
    assert content["metadata"] == {"every_n_steps": 4, "run": "a"}
    assert type(content["tensors"]["w"]) is Tensor
    assert content["tensors"]["w"].dtype == torch.bfloat16
    assert content["tensors"]["n"].dtype == torch.int64


def test_a_part_of_a_large_tensor_is_stored_alone(tmp_path):
    """Averages that share one buffer do not each bring all of it."""
    buffer = torch.zeros(1_000_000)
    path = write(tmp_path, a=buffer[:10], b=buffer[10:20].view(2, 5).t())

    assert path.stat().st_size < 10_000
    assert reconstruct(tmp_path, sigma_rel=0.1)["b"].shape == (5, 2)


@pytest.mark.parametrize("step", [0, -5])
def test_what_is_no_snapshot_is_not_written(tmp_path, step):
    """A step below 1, a width that no profile has, metadata that torch would not read."""
    with pytest.raises(ValueError, match="counted from 1"):
        write(tmp_path, step)
    with pytest.raises(ConfigError, match="is no width"):
        write(tmp_path, 1, 0.3)
    with pytest.raises(ConfigError, match="not plain data"):
        write_snapshot(tmp_path, step=1, sigma_rel=0.1, tensors={}, metadata={"folder": object()})

    assert not list(tmp_path.iterdir())


def test_snapshots_are_listed_by_step_and_width(tmp_path):
    """As numbers, however they are written; other files are not among them."""
    widths = (0.1, 0.05, 1e-05, 0.125)
    for step in (1000, 20):
        for width in widths:
            write(tmp_path, step, width)
    for name in ("ema-step1-sigma0.1.pt.tmp", "notes.txt", ".ema-step1-sigma0.1.pt"):
        (tmp_path / name).touch()

    found = list_snapshots(tmp_path)
    assert [(s.step, s.sigma_rel) for s in found] == [
        (t, w) for t in (20, 1000) for w in sorted(widths)
    ]
    assert found[0] == Snapshot(20, 1e-05, tmp_path / "ema-step0000000020-sigma1e-05.pt")
    assert list_snapshots(tmp_path / "none") == []


def test_the_same_snapshot_replaces_the_one_before(tmp_path):
    """A run that passes a step again leaves one file, its own."""
    write(tmp_path, weight=torch.zeros(3))
    write(tmp_path, weight=torch.ones(3))

    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(reconstruct(tmp_path, sigma_rel=0.1)["weight"], torch.ones(3))


def test_a_write_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    """Nor does it leave a part of itself."""
    write(tmp_path, weight=torch.zeros(3))

    def fail(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, weight=torch.ones(3))

    assert len(list(tmp_path.iterdir())) == 1
    assert torch.equal(reconstruct(tmp_path, sigma_rel=0.1)["weight"], torch.zeros(3))


def test_a_resumed_run_discards_what_came_after(tmp_path):
    """Later steps of the old history go; what is left is what the new one continues."""
    for step in (10, 20, 30):
        for width in WIDTHS:
            write(tmp_path, step, width)
    (tmp_path / "notes.txt").touch()

    removed = discard_after(tmp_path, 20)
    assert [p.name for p in removed] == [
        "ema-step0000000030-sigma0.05.pt",
        "ema-step0000000030-sigma0.1.pt",
    ]
    assert {s.step for s in list_snapshots(tmp_path)} == {10, 20}
    assert discard_after(tmp_path, 20) == []
    assert len(discard_after(tmp_path, 0)) == 4
    assert (tmp_path / "notes.txt").exists()
    assert discard_after(tmp_path / "none", 5) == []


# ---- damage ------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    """In the middle of the largest tensor."""
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
        content = archive.read(largest)
    data = bytearray(path.read_bytes())
    data[data.find(content) + len(content) // 2] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def hold_something_else(path: Path) -> None:
    torch.save({"state_dict": {}}, path)


def hold_a_list(path: Path) -> None:
    torch.save([1], path)


def hold_code(path: Path) -> None:
    torch.save({"tensors": Path}, path)


def be_another_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", "b")


def be_newer(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "version": 2}, path)


def be_of_another_step(path: Path) -> None:
    torch.save({**torch.load(path, weights_only=True), "step": 301}, path)


def be_of_another_shape(path: Path) -> None:
    write(path.parent, 300, 0.05, weight=torch.zeros(2, 2))


def have_other_names(path: Path) -> None:
    write(path.parent, 300, 0.05, weights=torch.zeros(3000))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (flip_a_bit, r"is damaged: the checksum of .* differs; remove it"),
        (cut_short, "is damaged: .*; remove it"),
        (empty, "is damaged: .*; remove it"),
        (hold_code, "is damaged: .*; remove it"),
        (be_another_zip, "is damaged: .*; remove it"),
        (hold_something_else, "is no snapshot of an average; move it"),
        (hold_a_list, "is no snapshot of an average; move it"),
        (be_newer, "format version 2.*update nshtrainer-ema"),
        (be_of_another_step, "holds step 301 .* its name says otherwise"),
        (be_of_another_shape, r"'weight' is of shape \[2, 2\] in the one and of shape \[3000\]"),
        (have_other_names, "'weight' is missing in the one"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_file_that_does_not_fit_is_named(tmp_path, harm, said):
    """With its path, what is wrong and what to do; nothing is made of the others."""
    for step in range(100, 1001, 100):
        for width in WIDTHS:
            write(tmp_path, step, width, weight=torch.zeros(3000))
    path = tmp_path / "ema-step0000000300-sigma0.05.pt"
    harm(path)

    with pytest.raises(SnapshotError, match=f"{path.name} .*{said}"):
        reconstruct(tmp_path, sigma_rel=0.08)


def test_a_file_that_goes_meanwhile_is_named(tmp_path):
    """A resumed run may remove it between two reads."""
    for step in range(100, 1001, 100):
        for width in WIDTHS:
            write(tmp_path, step, width)
    plan = plan_reconstruction(tmp_path, sigma_rel=0.08)
    plan.parts[3][0].path.unlink()

    with pytest.raises(SnapshotNotFoundError, match=r"ema-step0000000200-sigma0\.1\.pt has gone"):
        plan.tensors()


def test_checksums_are_written_for_programs_that_do_without(tmp_path):
    """Their own setting is as it was afterwards."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = write(tmp_path, weight=torch.ones(3000))
        assert torch.serialization.get_crc32_options() is False
    finally:
        torch.serialization.set_crc32_options(before)

    assert reconstruct(tmp_path, sigma_rel=0.1)["weight"].sum() == 3000
    flip_a_bit(path)
    with pytest.raises(SnapshotError, match="checksum"):
        reconstruct(tmp_path, sigma_rel=0.1)
