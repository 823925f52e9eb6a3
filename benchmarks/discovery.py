"""Finding plugins: our scan against the standard library's `entry_points`."""

from __future__ import annotations

import importlib.metadata
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import importlib_metadata

from nshtrainer.plugins.manifest import CALLBACKS, GROUPS, scan

from .method import Comparison, Sample, Sampler, Settings, filling
from .registry import benchmark

_OURS = "nshtrainer's scan: three groups, each distribution guarded"
_ONE = "entry_points: one group"
_THREE = "entry_points: three groups, one after the other"


@benchmark("discovery", "find plugins among 20, 100 and 400 distributions, against entry_points")
def discovery(settings: Settings) -> Iterator[Comparison]:
    """For each number of distributions, what a process pays at first, and again."""
    for count in (5, 10) if settings.is_quick else (20, 100, 400):
        with tempfile.TemporaryDirectory() as folder:
            _install(Path(folder), count)
            _check(folder, count)
            for when, forget in (("the first time", _forget), ("again", _keep)):
                yield Comparison(
                    case=f"{count} distributions, {when}",
                    baseline=_ONE,
                    samplers={
                        _ONE: _on_path(folder, forget, _one_group, settings),
                        _THREE: _on_path(folder, forget, _three_groups, settings),
                        _OURS: _on_path(folder, forget, scan, settings),
                    },
                )


def _one_group() -> object:
    return importlib.metadata.entry_points(group=CALLBACKS)


def _three_groups() -> object:
    return [importlib.metadata.entry_points(group=group) for group in GROUPS]


def _forget() -> None:
    """Let both libraries list the folder anew, as in a process that has just started."""
    importlib.metadata.MetadataPathFinder().invalidate_caches()  # an instance: before 3.12 it is no class method
    importlib_metadata.MetadataPathFinder().invalidate_caches()


def _keep() -> None:
    """Leave what both libraries remember."""


def _on_path(
    folder: str, forget: Callable[[], None], find: Callable[[], object], settings: Settings
) -> Sampler:
    """Measure *find* while *folder* is all there is on the path."""

    def call() -> object:
        forget()
        return find()

    timed = filling(call, settings.sample_s)

    def sample() -> Sample:
        call()  # with the whole path: what is imported late is imported here
        path = sys.path[:]
        sys.path[:] = [folder]
        try:
            return timed()
        finally:
            sys.path[:] = path

    return sample


def _check(folder: str, count: int) -> None:
    """Both find the same, or the comparison would be worth nothing."""
    path = sys.path[:]
    scan()
    sys.path[:] = [folder]
    try:
        _forget()
        ours = {(e.name, e.value) for e in scan() if e.group == CALLBACKS}
        theirs = {(e.name, e.value) for e in importlib.metadata.entry_points(group=CALLBACKS)}
    finally:
        sys.path[:] = path
    if ours != theirs or not ours:
        raise RuntimeError(f"of {count} distributions, we find {ours}, entry_points {theirs}")


def _install(folder: Path, count: int) -> None:
    """Distributions as they are met: one in five has plugins of ours, two in five other ones."""
    for number in range(count):
        name = f"benchmark_{number}"
        info = folder / f"{name}-1.0.dist-info"
        info.mkdir()
        requires = "".join(f"Requires-Dist: other-{i}>=1.0\n" for i in range(10))
        about = "A line of a README, as long as they usually are.\n" * 60
        header = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        (info / "METADATA").write_text(f"{header}{requires}\n{about}")
        files = "".join(f"{name}/module_{i}.py,sha256=0,100\n" for i in range(30))
        (info / "RECORD").write_text(files)
        lines = f"[console_scripts]\n{name} = {name}.cli:main\n"
        if number % 5 == 0:
            lines += f"\n[{CALLBACKS}]\n{name} = {name}.config:Config\n"
        if number % 5 < 3:
            (info / "entry_points.txt").write_text(lines)
