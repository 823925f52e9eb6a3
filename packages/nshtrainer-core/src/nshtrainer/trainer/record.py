"""`RunRecord`: what every run says about itself, beside its logs and inside its checkpoints."""

from __future__ import annotations

import functools
import json
import logging
import pickle
import threading
from typing import TYPE_CHECKING, Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from nshtrainer.callbacks.callback import silence_unused_hooks
from nshtrainer.config_files import as_data, dump_yaml
from nshtrainer.errors import NshTrainerError
from nshtrainer.files import atomic_write_text
from nshtrainer.loggers.base import RunDescriber
from nshtrainer.loggers.csv_logger import MergingCSVLogger
from nshtrainer.plugins.hooks import plugin_manager
from nshtrainer.plugins.manifest import Manifest, manifest
from nshtrainer.plugins.policy import using_policy
from nshtrainer.run.environment import EnvironmentSnapshot
from nshtrainer.run.redaction import redact
from nshtrainer.runtime import driver
from nshtrainer.runtime.process_group import close_at_exit
from nshtrainer.runtime.step_metrics import batches_that_stepped

if TYPE_CHECKING:
    from .config import TrainerConfig

__all__ = ["RunRecord", "describe_run"]

log = logging.getLogger(__name__)


class RunRecord(Callback):
    """Settles the run's id over all ranks and records configuration, plugins and environment.

    Files, written by rank zero in the background when the first batch has started, which waits for
    none of them, and at the end: `<run>/config.yaml` and `<run>/run.json`. Every checkpoint carries the configuration and the versions of the plugins in use.

    Args:
        config: The run.
        objects: What was given to the trainer beside it; named in the record.
    """

    CONFIG_KEY = "trainer_hyper_parameters"
    RUN_KEY = "nshtrainer"

    def __init__(self, config: TrainerConfig, objects: dict[str, Any] | None = None) -> None:
        self.config = config
        self.objects = {name: _kind(value) for name, value in (objects or {}).items()}
        self._environment: EnvironmentSnapshot | None = None
        self._writing: threading.Thread | None = None
        self._is_due = False
        """Whether training has started, and the record has not."""
        self._are_logs_old = False
        """Whether they may have rows of steps that are made again."""
        self._dumped: dict[str, Any] | None = None
        self._redacted = b""
        """What may be told of `_dumped`, pickled: each reader gets a copy of its own, fast."""
        silence_unused_hooks(self)

    @property
    @override
    def state_key(self) -> str:
        return "nshtrainer.run_record"

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        close_at_exit()
        self.config.run.settle(trainer)
        _check_ranks_agree(trainer)
        if stage != "fit" or self.config.barebones or self.config.fast_dev_run:
            return
        driver.attach(trainer, "the run record").enable_saving(trainer)
        if trainer.is_global_zero:
            if self._environment is None:
                self._environment = EnvironmentSnapshot()
            for logger in trainer.loggers:
                logger.log_hyperparams({"trainer": self._config_as_data()})

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero and self._environment is not None:
            self._are_logs_old = trainer.global_step > 0
            self._is_due = True
            self.__dict__.pop("on_train_batch_start", None)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was saved before a validation goes on with it; the last step's row is complete.
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._rewind_logs(trainer, batches_that_stepped(trainer) + 1)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At the first batch: begin to write the record."""
        silence_unused_hooks(self, "on_train_batch_start")
        self._rewind_logs(trainer, batches_that_stepped(trainer))
        if self._is_due:
            self._is_due = False
            config, metadata = self._config_as_data(), self._metadata()
            self._writing = threading.Thread(
                target=self._begin,
                args=(trainer, config, metadata),
                name="nshtrainer-record",
                daemon=True,
            )
            self._writing.start()

    def _rewind_logs(self, trainer: Trainer, step: int) -> None:
        """A resumed run logs the steps after its checkpoint again; each step keeps one row.

        Not in `on_train_start`: there Lightning has not yet counted the batch of the checkpoint.
        """
        if not self._are_logs_old:
            return
        self._are_logs_old = False
        for logger in trainer.loggers:
            if isinstance(logger, MergingCSVLogger):
                logger.rewind(step)

    def _begin(self, trainer: Trainer, config: dict[str, Any], metadata: dict[str, Any]) -> None:
        try:
            root = self.config.run.directory.ensure()
            atomic_write_text(root / "config.yaml", dump_yaml(config))
            self._write(trainer, metadata, environment=None)
            if self._environment is not None:
                self._environment.start()
        except Exception as error:  # noqa: BLE001 -- a record must not fail a run
            log.warning("the run's record cannot be written: %s", error)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self._finish(trainer, "finished")

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        if trainer.state.fn == TrainerFn.FITTING:
            self._finish(trainer, f"stopped by {type(exception).__name__}")

    def _finish(self, trainer: Trainer, status: str) -> None:
        writing, self._writing = self._writing, None
        if self._is_due:  # it ends before its first batch
            self._is_due = False
            self._begin(trainer, self._config_as_data(), self._metadata())
        elif writing is not None:
            writing.join()
        else:
            return
        if self._environment is None:
            return
        try:
            environment = self._environment.result(timeout=5)
            self._write(trainer, self._metadata(), environment=environment, status=status)
        except Exception as error:  # noqa: BLE001 -- a record must not fail a run, nor hide its error
            log.warning("the run's record cannot be written: %s", error)

    def _write(
        self,
        trainer: Trainer,
        metadata: dict[str, Any],
        *,
        environment: Any,
        status: str = "running",
    ) -> None:
        root = self.config.run.directory.root
        if not root.is_dir():
            return
        names = [type(c).__name__ for c in trainer.callbacks]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType, reportUnknownArgumentType, reportUnknownMemberType] -- set in Lightning's connector
        record = {
            "id": self.config.run.id,
            "status": status,
            "name": self.config.full_name,
            "project": self.config.project,
            "plugins": active_plugins(),
            "callbacks": [n for n in names if not n.startswith("_")],
            "objects": self.objects,
            "metadata": metadata,
        }
        # The snapshot is redacted already, and a package's name must not cost its version.
        whole = {**redact(record), "environment": environment}
        text = json.dumps(whole, indent=2, default=str)
        atomic_write_text(root / "run.json", text + "\n")

    def _config_as_data(self) -> dict[str, Any]:
        """The configuration with the settled id, as plain data without secrets."""
        data = {**as_data(self.config), "id": self.config.run.id}
        if data != self._dumped:  # redacting takes longer than writing a small checkpoint
            self._dumped, self._redacted = data, pickle.dumps(redact(data))
        return self._known_config()

    def _known_config(self) -> dict[str, Any]:
        return pickle.loads(self._redacted)  # noqa: S301 -- what we have pickled ourselves

    def description(self) -> dict[str, Any]:
        """The run as plain data without secrets; see `describe_run`."""
        # The configuration as the checkpoint holds it that was prepared just now, if one was.
        known = self._known_config() if self._redacted else self._config_as_data()
        return {
            "name": self.config.full_name or None,
            "project": self.config.project,
            "trainer_config": known,
            **_surroundings(self._environment),
        }

    def _metadata(self) -> dict[str, Any]:
        with using_policy(self.config.plugins):
            found = plugin_manager.call("nshtrainer_run_metadata", config=self.config)
        return {dist: data for dist, data in found if data}

    def on_checkpoint_prepare(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        checkpoint: dict[str, Any],
        weights_only: bool,
    ) -> None:
        """Put the configuration, as plain data, and the plugins' versions into *checkpoint*."""
        checkpoint[self.CONFIG_KEY] = self._config_as_data()
        checkpoint[self.RUN_KEY] = {"run_id": self.config.run.id, "plugins": active_plugins()}


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_kind, cast("list[Any]", value)))
    return repr(type(value).__qualname__)


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """Return what a file beside a checkpoint says of the run: plain data, small, without secrets.

    Keys: `plugins` (distribution -> version), `environment` (parts of `EnvironmentSnapshot`, those
    that are known already; of the packages only the ones that training depends on), `loggers` (what
    those say that are a `RunDescriber`: ids and addresses), and where the trainer was made from a
    configuration `name`, `project` and `trainer_config`. Waits for nothing.
    """
    return {**_run_of(trainer), "loggers": _loggers_of(trainer)}


def _run_of(trainer: Trainer) -> dict[str, Any]:
    callbacks = cast("list[Any]", cast("Any", trainer).callbacks)  # set in Lightning's connector
    record = next((c for c in callbacks if isinstance(c, RunRecord)), None)
    if record is not None:
        return record.description()
    return _surroundings(_snapshot_of_process())


def _loggers_of(trainer: Trainer) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for logger in trainer.loggers:
        if isinstance(logger, RunDescriber):
            try:
                found.update(logger.describe_run())
            except Exception as error:  # noqa: BLE001 -- what a logger cannot say must not cost a checkpoint
                log.warning("%s does not say where its run is: %s", type(logger).__name__, error)
    return found


@functools.lru_cache(maxsize=1)
def _snapshot_of_process() -> EnvironmentSnapshot:
    """For trainers that were not made from a configuration; gathered once."""
    snapshot = EnvironmentSnapshot()
    snapshot.start()
    return snapshot


_TRAINING_PACKAGES = ("lightning", "numpy", "nshtrainer", "pytorch-lightning", "torch")


def _surroundings(environment: EnvironmentSnapshot | None) -> dict[str, Any]:
    found = (
        {} if environment is None else environment.result(timeout=0, packages=_TRAINING_PACKAGES)
    )
    return {"plugins": active_plugins(), "environment": found}


def active_plugins() -> dict[str, str]:
    """Distribution -> version of every plugin installed here."""
    return dict(_versions(manifest()))


@functools.lru_cache(maxsize=4)
def _versions(found: Manifest) -> dict[str, str]:
    one_of_each = {entry.dist: entry for entry in found}  # reading a version takes a millisecond
    return {dist: one_of_each[dist].version for dist in sorted(one_of_each)}


def _check_ranks_agree(trainer: Trainer) -> None:
    """Ranks that see other plugins would build other callbacks and hang in a collective.

    Raises:
        NshTrainerError: The manifests differ.
    """
    mine = manifest().digest
    first = trainer.strategy.broadcast(mine)
    differs = trainer.strategy.reduce_boolean_decision(mine != first, all=False)
    if differs:
        raise NshTrainerError(
            f"rank {trainer.global_rank} and others do not see the same plugins as rank 0; "
            f"make the environments equal (compare `nshtrainer plugins` on each machine)"
        )
