"""`WandbUploadCodeCallback`: the source code of the run, as a W&B artifact."""

from __future__ import annotations

import logging
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer.run.redaction import secrets_in_environment

from .collect import Selection, collect, find_root
from .config import WandbUploadCodeCallbackConfig

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbUploadCodeCallback"]

log = logging.getLogger(__name__)


class WandbUploadCodeCallback(ConfiguredCallback[WandbUploadCodeCallbackConfig]):
    """Hands the source files to the W&B run when it starts, once for each run, on rank zero.

    The files are copied first, so what goes up is what was there at the start. A failure is a
    warning: it never fails the run.

    Args:
        config: The configuration.
        options: Its fields, if no configuration is given.
    """

    config_class: ClassVar[type[CallbackConfigBase]] = WandbUploadCodeCallbackConfig

    def __init__(self, config: WandbUploadCodeCallbackConfig | None = None, **options: Any) -> None:
        super().__init__(config, **options)
        self._uploaded_to: str | None = None

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if not self.config.enabled or trainer.fast_dev_run or not trainer.is_global_zero:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] -- set by Lightning's connector
            return
        logger = next((item for item in trainer.loggers if isinstance(item, WandbLogger)), None)
        if logger is None:
            log.warning(
                "the callback 'wandb_upload_code' uploads nothing: the trainer has no W&B logger; "
                "add one, or remove the callback"
            )
            return
        run = cast("Run", logger.experiment)
        if getattr(run, "disabled", False) or run.id == self._uploaded_to:
            return
        self._uploaded_to = run.id
        try:
            self._upload(run)
        except Exception as error:  # noqa: BLE001 -- a copy of the code is no reason to fail a run
            log.warning("the source code is not uploaded to W&B: %s", error)

    def _upload(self, run: Run) -> None:
        root = self.config.directory or find_root(Path.cwd())
        selection = self.selection(root)
        for path, reason in selection.left_out.items():
            log.debug("%s is not uploaded: %s", path, reason)
        if not selection.files:
            log.warning("no source code is uploaded to W&B: none was found in %s", root)
            return
        # `log_code` walks all it is shown, so it is shown the chosen files only.
        with tempfile.TemporaryDirectory(prefix="nshtrainer-code-") as folder:
            for path in selection.files:
                copy = Path(folder, path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(root / path, copy)
            run.log_code(folder, include_fn=lambda _: True, exclude_fn=lambda _: False)
        log.info(
            "the source code is uploaded to W&B: %d files, %.0f kB, from %s (%d left out)",
            len(selection.files),
            sum(selection.files.values()) / 1000,
            root,
            len(selection.left_out),
        )

    def selection(self, root: Path) -> Selection:
        """Return what would be uploaded from *root*; nothing is sent.

        Raises:
            SourceUnknownError: See `collect`.
        """
        config = self.config
        return collect(
            root,
            include=config.include,
            exclude=config.exclude,
            max_file_bytes=config.max_file_bytes,
            max_total_bytes=config.max_total_bytes,
            known_secrets=secrets_in_environment(),
        )
