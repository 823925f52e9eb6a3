"""`WandbUploadCodeCallback`: the source code of the run, as a W&B artifact."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, cast

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from nshtrainer.callbacks.base import CallbackConfigBase
from nshtrainer.callbacks.callback import ConfiguredCallback
from nshtrainer_wandb.logger.finding import find_wandb_logger

from .collect import Selection, read_plain_file, select
from .config import WandbUploadCodeCallbackConfig

if TYPE_CHECKING:
    from wandb import Run

__all__ = ["WandbUploadCodeCallback"]

log = logging.getLogger(__name__)

_NAMED: Final = 5


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
        logger = find_wandb_logger(trainer, "the callback 'wandb_upload_code' uploads nothing")
        if logger is None:
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
        root, selection = select(self.config)
        _say_what_stays(selection)
        if not selection.files:
            log.warning("no source code is uploaded to W&B: none was found in %s", root)
            return
        # `log_code` walks all it is shown, so it is shown copies of the chosen files only.
        with tempfile.TemporaryDirectory(prefix="nshtrainer-code-") as folder:
            for path, size in selection.files.items():
                copy = Path(folder, path)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(read_plain_file(root, path, max_bytes=size))
            run.log_code(folder, include_fn=lambda _: True, exclude_fn=lambda _: False)
        log.info(
            "the source code is uploaded to W&B: %d files, %.0f kB, from %s (%d left out)",
            len(selection.files),
            sum(selection.files.values()) / 1000,
            root,
            len(selection.left_out),
        )

    def selection(self, root: Path | None = None) -> Selection:
        """Return what would be uploaded from *root*, by default the configured place; nothing is sent.

        Raises:
            SourceUnknownError: See `collect`.
        """
        return select(self.config, root)[1]


def _say_what_stays(selection: Selection) -> None:
    for path, reason in selection.left_out.items():
        log.debug("%s is not uploaded: %s", path, reason)
    if not selection.secrets:
        return
    named = [f"{path} ({selection.left_out[path]})" for path in selection.secrets[:_NAMED]]
    log.warning(
        "%d files look like secrets and are not uploaded to W&B: %s%s; `nshtrainer wandb code` lists all",
        len(selection.secrets),
        ", ".join(named),
        ", ..." if len(selection.secrets) > _NAMED else "",
    )
