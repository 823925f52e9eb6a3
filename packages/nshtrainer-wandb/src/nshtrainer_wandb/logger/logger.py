"""Lightning's W&B logger, opened when the run starts and finished on every way out."""

from __future__ import annotations

import logging
import os
import sys
from argparse import Namespace
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, cast

from lightning.fabric.loggers.logger import (
    rank_zero_experiment,  # pyright: ignore[reportUnknownVariableType] -- typed loosely by Lightning
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import WandbLogger
from pydantic import BaseModel
from typing_extensions import override

from nshtrainer.loggers.base import ANNOUNCES_CHECKPOINTS
from nshtrainer.run.redaction import redact, secrets_in_environment
from nshtrainer.run.run import project_root
from nshtrainer_wandb.checkpoints.staging import clear_staged
from nshtrainer_wandb.client import import_wandb

from .choices import check_tags, choose_mode, choose_project, has_credentials

if TYPE_CHECKING:
    from wandb import Run

    from nshtrainer.trainer.config import TrainerConfig

    from .config import WandbLoggerConfig

__all__ = ["LateWandbLogger"]

log = logging.getLogger(__name__)

_LOG_MODEL: dict[str | bool, Any] = {
    "all": "all", "latest": True, True: True, "none": False, False: False,
}  # fmt: skip


class LateWandbLogger(WandbLogger):
    """Opens the W&B run when it is first asked for, which Lightning does as a stage starts.

    Without network the run is kept offline. `finalize`, which Lightning calls at the end of a stage
    and after an exception, uploads the checkpoints that are left and finishes the run; the next
    stage continues it. Hyper-parameters are sent without secrets.

    Args:
        config: The logger's options.
        trainer_config: The run; its id and directory are read when the W&B run is opened.

    Raises:
        ConfigError: W&B would not take the project's name or a tag.
    """

    _active: ClassVar[LateWandbLogger | None] = None
    """The logger whose run is `wandb.run`; None if that is nobody's or somebody else's."""

    def __init__(self, config: WandbLoggerConfig, trainer_config: TrainerConfig) -> None:
        root = project_root(trainer_config.directory)
        super().__init__(
            name=trainer_config.full_name or None,
            project=choose_project(config.project, trainer_config.project, root),
            log_model=_LOG_MODEL[config.log_model],
            prefix=config.prefix,
            entity=config.entity,
            group=config.group,
            job_type=config.job_type,
            tags=check_tags(trainer_config.tags),
            notes="\n".join(trainer_config.notes) or None,
        )
        self._config, self._trainer_config = config, trainer_config
        self._described: dict[str, Any] = {}
        """What the open run is, or the last one was."""

    @override
    def __getstate__(self) -> dict[str, Any]:
        """A copy in another process opens the run itself: copying must not open one here."""
        return {**self.__dict__, "_experiment": None}

    @property
    @override
    def save_dir(self) -> str:
        """Where W&B's files are."""
        if (chosen := self._config.log_dir) is not None:
            return os.fspath(chosen.expanduser())
        return os.fspath(self._trainer_config.run.directory.subdirectory("log") / "wandb")

    @property
    @override
    def version(self) -> str:
        """The id of the run."""
        return self._trainer_config.run.id if self._experiment is None else str(self._experiment.id)

    @property
    @override
    @rank_zero_experiment
    def experiment(self) -> Run:
        """The W&B run, opened when first asked for; a dummy on other ranks."""
        if self._experiment is None:
            self._experiment = self._open()
        return self._experiment

    @override
    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Add *params* to the run's config, without secrets and with configurations as mappings."""
        plain = _plain(vars(params) if isinstance(params, Namespace) else params)
        super().log_hyperparams(redact(plain, known=secrets_in_environment()))

    @override
    def after_save_checkpoint(self, checkpoint_callback: ModelCheckpoint) -> None:
        """Take note of Lightning's own checkpoints; ours are uploaded by `wandb_checkpoints`."""
        if not getattr(checkpoint_callback, ANNOUNCES_CHECKPOINTS, False):
            super().after_save_checkpoint(checkpoint_callback)

    @override
    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Upload the checkpoints that are left, after a failure too, and finish the run."""
        if self._experiment is None:
            return
        try:
            super().finalize("success")
        except Exception as error:  # noqa: BLE001 -- must neither fail a run nor hide why it failed
            log.warning("checkpoints could not be uploaded to W&B: %s", error)
        self._close(exit_code=None if status == "success" else 1)

    def describe_run(self) -> dict[str, Any]:
        """Return id, project and address of the W&B run for the metadata of checkpoints."""
        return {"wandb": dict(self._described)} if self._described else {}

    def _open(self) -> Run:
        wandb = import_wandb()
        if (previous := LateWandbLogger._active) not in (None, self):
            # Left open, because another callback failed while an exception was handled, or because
            # this trainer runs inside another one; that one's logger then opens its run again.
            previous._close()
        if wandb.run is not None:
            log.info("logging to the open W&B run %s, which is left open", wandb.run.id)
            self._described = _description(wandb.run)
            return wandb.run
        with _without_secret_arguments():
            run = self._init()
        self._described = _description(run)
        LateWandbLogger._active = self
        # The x-axis that Lightning's logger writes
        run.define_metric("trainer/global_step")
        run.define_metric("*", step_metric="trainer/global_step", step_sync=True)
        return run

    def _init(self) -> Run:
        wandb = import_wandb()
        from wandb.errors import CommError

        options: dict[str, Any] = {
            **self._wandb_init,
            "id": self._trainer_config.run.id,
            "dir": self._made_directory(),
            "mode": self._mode(),
        }
        offline: dict[str, Any] = {**options, "mode": "offline", "resume": None}
        if options["mode"] == "offline":  # joining what is of one run is up to `wandb sync`
            return wandb.init(**offline)
        try:
            return wandb.init(**options)
        except CommError as error:
            log.warning(
                "W&B cannot be reached (%s); the run is kept offline in %s and `wandb sync` "
                "uploads it. Set `offline: true` to start without trying.",
                error,
                self.save_dir,
            )
            wandb.teardown()  # else W&B's service takes the run's id for one in use
            return wandb.init(**offline)

    def _mode(self) -> str:
        wandb = import_wandb()
        settings = wandb.setup().settings
        kept = settings.mode if settings.mode != "online" else None  # by `wandb offline`
        base_url = os.environ.get("WANDB_BASE_URL") or settings.base_url
        has_key = bool(settings.api_key) or has_credentials(base_url)
        mode = choose_mode(
            self._config.offline,
            wandb_mode=os.environ.get("WANDB_MODE") or kept,
            has_key=has_key,
        )
        mode = "offline" if mode == "dryrun" else mode
        if mode == "offline" and not has_key and self._config.offline is None:
            log.info(
                "the W&B run is kept offline in %s; `wandb sync` uploads it, `wandb login` makes "
                "the next ones go online",
                self.save_dir,
            )
        return mode

    def _made_directory(self) -> str:
        """W&B makes a folder `wandb` in this one; its service may have another current directory."""
        if (chosen := self._config.log_dir) is not None:
            chosen = chosen.expanduser()
            chosen.mkdir(parents=True, exist_ok=True)
            return os.fspath(chosen.absolute())
        return os.fspath(self._trainer_config.run.directory.ensure("log"))

    def _close(self, exit_code: int | None = None) -> None:
        run, self._experiment = self._experiment, None
        if LateWandbLogger._active is not self:
            return  # somebody else opened it, and finishes it
        LateWandbLogger._active = None
        run = cast("Run", run)
        try:
            run.finish(exit_code=exit_code)
            clear_staged(run)
        except Exception as error:  # noqa: BLE001 -- must neither fail a run nor hide why it failed
            log.warning("the W&B run could not be finished: %s", error)


def _description(run: Run) -> dict[str, Any]:
    """Return what finds *run* again; what is not known offline is None. Nothing if W&B is disabled."""
    if run.disabled:
        return {}
    return {
        "id": run.id,
        "project": run.project or None,
        "entity": run.entity or None,
        "url": run.url,
        "is_offline": run.offline,
    }


@contextmanager
def _without_secret_arguments() -> Generator[None]:
    """W&B records the program's arguments as they are; inside, `--api-key=...` is `[redacted]`."""
    before = sys.argv
    sys.argv = [*before[:1], *redact(before[1:], known=secrets_in_environment())]
    try:
        yield
    finally:
        sys.argv = before


def _plain(value: Any) -> Any:
    """Turn pydantic models inside mappings into mappings."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    return value
