"""`CheckpointUploads`: which checkpoints are versions of a run's artifact, and which wait."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from nshtrainer.sidecar import CHECKSUM_KEY

from .staging import add_checkpoint, staging_of

if TYPE_CHECKING:
    from wandb import Artifact, Run

__all__ = ["CheckpointUploads"]

log = logging.getLogger(__name__)

_WAIT_S: Final = 600
"""How long an upload may take before its version is left where it is."""

_SHOWN: Final = (
    "run_id", "callback", "attempt", "save_number", "epoch", "global_step", "monitor", "metrics",
    "save_weights_only", "weights_finite", CHECKSUM_KEY,
)  # fmt: skip
"""What of a checkpoint's metadata an artifact shows; the configuration is the run's."""


@dataclass
class _Version:
    """One content, which may lie under several paths: best and last of one step are the same file."""

    paths: list[Path]
    metadata: Mapping[str, Any]
    artifact: Artifact | None = None
    """What was logged."""
    aliases: set[str] = field(default_factory=set[str])
    staged: Path | None = None

    @property
    def order(self) -> tuple[int, int, int]:
        """The later checkpoint has the greater one."""
        known = self.metadata
        return known.get("attempt", 0), known.get("global_step", 0), known.get("save_number", 0)


class CheckpointUploads:
    """The checkpoints of one W&B run.

    Args:
        run: An open run.
        at_once: Whether each is uploaded when it is saved, by a thread: W&B reads all of a file
            before it starts. Otherwise, and offline, `finish` does it.
    """

    def __init__(self, run: Run, *, at_once: bool) -> None:
        self._run = run
        self._at_once = at_once and not run.offline
        self._is_ending = False
        self._versions: dict[str, _Version] = {}
        self._number = 0
        self._thread: ThreadPoolExecutor | None = None

    def saved(self, path: Path, metadata: Mapping[str, Any], *, best: set[str]) -> None:
        """Take note of a complete checkpoint; *best* are the paths of those that rank first."""
        key = str(metadata.get(CHECKSUM_KEY) or path)
        version = self._versions.setdefault(key, _Version([], metadata))
        if path not in version.paths:
            version.paths.append(path)
        if self._at_once or self._is_ending:
            aliases = {"latest", *(["best"] if str(path) in best else [])}
            self._do(lambda: self._upload(version, aliases))

    def removed(self, path: Path) -> None:
        """Forget a checkpoint that was deleted; a version that is nobody's any more is deleted."""
        for key, version in list(self._versions.items()):
            if path in version.paths:
                version.paths.remove(path)
                if not version.paths:
                    del self._versions[key]
                    self._do(lambda version=version: self._take_back(version))

    def finish(self, *, best: set[str]) -> None:
        """Upload what is left, oldest first, and wait for the thread; what is saved later goes up at once."""
        for version in sorted(self._versions.values(), key=lambda version: version.order):
            is_best = any(str(path) in best for path in version.paths)
            wanted = {"latest", *(["best"] if is_best else [])}
            if not self._is_ending and not self._at_once:
                self._do(lambda version=version, wanted=wanted: self._upload(version, wanted))
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.shutdown()
        self._is_ending = True

    def _do(self, job: Callable[[], None]) -> None:
        """Run *job*: in the thread while training goes on, and here when it has ended."""
        if self._is_ending or not self._at_once:
            _guarded(job)
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="nshtrainer-wandb")
        self._thread.submit(_guarded, job)

    def _upload(self, version: _Version, aliases: set[str]) -> None:
        if not version.paths or aliases <= version.aliases:
            return  # deleted before its turn came, or the same content under another name
        import wandb

        path = version.paths[0]
        shown = {key: version.metadata[key] for key in _SHOWN if key in version.metadata}
        artifact = wandb.Artifact(
            f"model-{self._run.id}", "model", metadata={**shown, "original_filename": path.name}
        )
        self._number += 1
        staged = staging_of(self._run) / str(self._number)
        add_checkpoint(artifact, path, staged)
        # Content that W&B has already becomes no new version, and only gets the aliases.
        version.artifact = self._run.log_artifact(artifact, aliases=sorted(aliases))
        version.aliases |= aliases
        version.staged = staged
        log.debug("%s goes to W&B as %s", path, sorted(aliases))

    def _take_back(self, version: _Version) -> None:
        artifact = version.artifact
        if artifact is None or self._run.offline:
            return  # never logged, or in a file that cannot be changed any more
        artifact.wait(timeout=_WAIT_S).delete(delete_aliases=True)
        if version.staged is not None:
            if version.staged.is_dir():
                shutil.rmtree(version.staged, ignore_errors=True)
            else:
                version.staged.unlink(missing_ok=True)


def _guarded(job: Callable[[], None]) -> None:
    try:
        job()
    except Exception as error:  # noqa: BLE001 -- a logging problem must not end a run, nor hide why it ends
        log.warning(
            "a checkpoint could not be uploaded to W&B, or not be removed there: %s: %s; on disk "
            "everything is as it was",
            type(error).__name__,
            error,
        )
