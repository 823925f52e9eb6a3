"""What Lightning's checkpoints lack for a resumed run to be the uninterrupted one, bit for bit."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch.trainer.states import TrainerFn

from . import rng
from .moments import classify, plateau_due, prepare, take_over
from .position import (
    DataPosition,
    can_replay,
    describe,
    differences,
    keeps_workers,
    resumes_itself,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping, MutableMapping

    from lightning.pytorch import Trainer

__all__ = ["KEY", "ResumeState"]

log = logging.getLogger(__name__)

KEY = "nshtrainer_resume"
"""Where it lies in a checkpoint."""

_VERSION = 1
_NEW_EPOCH = ("epoch_start", "epoch_end", "epoch_done")

_attached: WeakKeyDictionary[Trainer, ResumeState] = WeakKeyDictionary()


class ResumeState:
    """Random states, place in the data, metrics and half-accumulated gradients of one trainer.

    Once it is attached, callbacks that have them get two more calls, `(trainer, pl_module)` each:
    `on_train_batch_settled` and `on_validation_settled`. Lightning calls a callback's
    `on_train_batch_end` and `on_validation_end` before the module's; what the module does there is
    in a checkpoint only if that is saved in these.
    """

    def __init__(self) -> None:
        self._position = DataPosition()
        self._loaded: dict[str, Any] | None = None
        """The file's state, until training goes on from it."""
        self._pending: dict[str, Any] | None = None
        """This rank's part of it."""
        self._is_prepared = False
        self._take_over: str | None = None
        self._before_validation: dict[str, Any] | None = None
        self._before_batch: Callable[[], dict[str, Any]] | None = None
        self.notes_batches = False
        """Whether the random states are read before each batch, for a save in the middle of one."""
        self._in_epoch = False
        self._is_batch_over = False
        """Between a batch with all its hooks and the validation that may follow."""
        self._warned = False
        self._put: list[tuple[Any, str, Any, Any]] = []
        """Owner, name, what we put there and what had been there, if the class's own was not."""
        self.is_alone = False
        """Whether this rank is saving without the others."""

    @classmethod
    def attach(cls, trainer: Trainer) -> ResumeState:
        """Return the state of *trainer*, made when it is first asked for; call it in `setup`.

        It forgets what was loaded for an earlier fit.
        """
        state = _attached.setdefault(trainer, cls())
        state._loaded = state._pending = None
        state._watch(trainer)
        return state

    @staticmethod
    def detach(trainer: Trainer) -> None:
        """Leave Lightning's loops as they were; call it on every way out, more than once if need be."""
        state = _attached.get(trainer)
        while state is not None and state._put:
            owner, name, call, below = state._put.pop()
            held = cast("dict[str, Any]", vars(owner))
            if held.get(name) is not call:  # somebody has wrapped it since
                continue
            if below is None:
                delattr(owner, name)
            else:
                setattr(owner, name, below)

    @staticmethod
    def write(trainer: Trainer, checkpoint: MutableMapping[str, Any]) -> None:
        """Add the state to *checkpoint*, once; call it in `on_save_checkpoint`, on every rank."""
        state = _attached.get(trainer)
        if state is not None and KEY not in checkpoint:
            checkpoint[KEY] = state.collect(trainer, alone=state.is_alone)

    @staticmethod
    def read(trainer: Trainer, checkpoint: Mapping[str, Any]) -> None:
        """Take over what `write` has added, if it has; call it in `on_load_checkpoint`."""
        state = _attached.get(trainer)
        if state is not None and KEY in checkpoint:
            state.restore(trainer, checkpoint[KEY])

    @staticmethod
    @contextlib.contextmanager
    def alone(trainer: Trainer) -> Generator[None]:
        """While this rank saves by itself: `write` waits for no other."""
        state = _attached.get(trainer)
        if state is None:
            yield
            return
        state.is_alone = True
        try:
            yield
        finally:
            state.is_alone = False

    # ---- saving -----------------------------------------------------------------------------

    def collect(self, trainer: Trainer, *, alone: bool = False) -> dict[str, Any]:
        """Return plain data for a checkpoint that is being written; every rank calls it.

        Args:
            trainer: The trainer that saves.
            alone: This rank saves by itself and must wait for no other; the file then knows the
                random states of this rank only.
        """
        if self._loaded is not None:
            return self._loaded
        own = self._own(trainer, alone=alone)
        ranks = {trainer.global_rank: own}
        if not alone and trainer.world_size > 1:
            everyone: list[Any] = [None] * trainer.world_size
            torch.distributed.all_gather_object(everyone, own)
            ranks = dict(enumerate(everyone))
        return {"version": _VERSION, "world_size": trainer.world_size, "ranks": ranks}

    def _own(self, trainer: Trainer, *, alone: bool) -> dict[str, Any]:
        fit_loop = cast("Any", trainer.fit_loop)
        moment = classify(trainer, in_epoch=self._in_epoch)
        if self._is_batch_over:
            moment = "batch_end"
        progress = fit_loop.epoch_loop.batch_progress.current
        loaders = _train_loaders(trainer)
        now = self._read(trainer)
        if moment == "validation_start" and self._before_validation is not None:
            now = self._before_validation
        if moment == "mid_batch" and self._before_batch is not None:
            now = self._before_batch()  # the batch that failed is made anew
        metrics = {} if alone else trainer.callback_metrics
        return {
            "moment": moment,
            "consumed": progress.completed if moment == "mid_batch" else progress.ready,
            "now": now,
            "data": None if moment in _NEW_EPOCH else self._position.to_state(),
            "loaders": describe(loaders),
            "metrics": {k: v.detach().cpu().clone() for k, v in metrics.items()},
            "gradients": self._gradients(trainer, moment),
        }

    def _read(self, trainer: Trainer) -> dict[str, Any]:
        return self._take(trainer)()

    def _take(self, trainer: Trainer) -> Callable[[], dict[str, Any]]:
        states = rng.take(rng.generators_of(_train_loaders(trainer)))
        validation = [g.get_state() for g in rng.generators_of(_val_loaders(trainer))]
        return lambda: {"rng": states(), "validation_generators": validation}

    def _gradients(self, trainer: Trainer, moment: str) -> dict[str, torch.Tensor]:
        """What has been accumulated towards the next optimizer step."""
        loop = cast("Any", trainer.fit_loop.epoch_loop)
        if moment in (*_NEW_EPOCH, "mid_batch") or not loop._should_accumulate():
            return {}
        if trainer.world_size > 1:
            if not self._warned:
                self._warned = True
                log.warning(
                    "a checkpoint was saved between two optimizer steps (accumulate_grad_batches="
                    "%s); over %s ranks the gradients in between are not kept, and resuming from it"
                    " loses them. Validate and save at multiples of the accumulation.",
                    trainer.accumulate_grad_batches,
                    trainer.world_size,
                )
            return {}
        named = trainer.lightning_module.named_parameters()
        return {name: p.grad.detach().cpu() for name, p in named if p.grad is not None}

    # ---- loading ----------------------------------------------------------------------------

    def restore(self, trainer: Trainer, state: dict[str, Any]) -> None:
        """Take over what `collect` returned, to be applied when the training loop starts."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if state.get("version") != _VERSION:
            log.warning(
                "the checkpoint's resume state has version %r and this release reads %r; random "
                "states and the place in the epoch's data are not restored. Resume with the "
                "release that wrote it for an exact continuation.",
                state.get("version"),
                _VERSION,
            )
            return
        before, now = state["world_size"], trainer.world_size
        if before != now and trainer.is_global_zero:
            log.warning(
                "the checkpoint was written by %s ranks and is resumed by %s; the data is split "
                "differently, and ranks that it does not know keep their own random states.",
                before,
                now,
            )
        self._loaded = state
        ranks: dict[int, dict[str, Any]] = state["ranks"]
        # The loops of all ranks must go on at the same place, or they wait for one another.
        unknown: dict[str, Any] = {**ranks[min(ranks)], "now": None, "gradients": {}}
        self._pending = ranks.get(trainer.global_rank, unknown)
        self._is_prepared = False

    # ---- Lightning's loops ------------------------------------------------------------------

    def _watch(self, trainer: Trainer) -> None:
        """Put our calls around those of the loops that no hook reaches; once for each trainer."""
        fit_loop = cast("Any", trainer.fit_loop)
        if self._put:
            return
        epoch_loop = fit_loop.epoch_loop
        wrap = {
            (fit_loop, "setup_data"): self._setup_data,
            (fit_loop, "_load_combined_loader_states"): self._make_iterator,
            (fit_loop, "on_advance_start"): self._advance_start,
            (epoch_loop, "on_run_start"): self._run_start,
            (epoch_loop, "advance"): self._advance,
            (epoch_loop, "on_advance_end"): self._advance_end,
            (epoch_loop, "_on_before_fetch"): self._before_fetch,
            (epoch_loop, "_on_after_fetch"): self._after_fetch,
            (epoch_loop.val_loop, "reset"): self._validation,
            (trainer.strategy, "on_validation_end"): self._validation_end,
        }
        for (owner, name), around in wrap.items():
            below = vars(owner).get(name)
            call = _around(around, trainer, getattr(owner, name))
            setattr(owner, name, call)
            self._put.append((owner, name, call, below))

    def _setup_data(self, trainer: Trainer, original: Callable[[], None]) -> None:
        original()
        if self._pending is not None and not self._is_prepared:
            self._is_prepared = True
            moment = self._pending["moment"]
            cast("Any", trainer)._logger_connector._callback_metrics.update(
                self._pending["metrics"]
            )
            if moment == "epoch_end":
                plateau_due(trainer)
            self._take_over = prepare(trainer, moment)

    def _make_iterator(self, trainer: Trainer, original: Callable[[], None]) -> None:
        """Called just before the first iterator of a fit is made."""
        original()
        self._position.close()
        self._position.begin(rng.read(rng.generators_of(_train_loaders(trainer))))
        self._position.close()

    def _advance_start(self, trainer: Trainer, original: Callable[[], None]) -> None:
        self._in_epoch = False
        if self._pending is not None and self._pending["now"] is not None:
            self._put_back(trainer, self._pending["now"])
        original()

    def _run_start(self, trainer: Trainer, original: Callable[[Any], None], fetcher: Any) -> None:
        before = rng.read(rng.generators_of(_train_loaders(trainer)))
        iterator = fetcher.combined_loader._iterator
        self._position.close()
        pending, self._pending, self._loaded = self._pending, None, None
        original(fetcher)
        if pending is not None:
            now = pending["now"] or self._read(trainer)
            if not resumes_itself(fetcher.combined_loader):
                self._find_place(trainer, fetcher, pending, before)
            if pending["moment"] not in _NEW_EPOCH:
                self._put_back(trainer, now)
            _put_gradients(trainer, pending["gradients"])
        elif fetcher.combined_loader._iterator is not iterator:
            self._position.begin(before)
        self._position.begin(None)
        self._in_epoch = True

    def _find_place(
        self, trainer: Trainer, fetcher: Any, pending: dict[str, Any], before: dict[str, Any]
    ) -> None:
        loaders = _train_loaders(trainer)
        if keeps_workers(loaders):
            log.warning(
                "the training loader has persistent_workers=True; random numbers that are drawn in "
                "its workers differ from an uninterrupted run's, the order of samples does not. "
                "Use persistent_workers=False for an exact resume."
            )
        if pending["moment"] in _NEW_EPOCH:
            iter(fetcher)  # anew: Lightning's was made before the hooks that open an epoch
            self._position.begin(before)
            return
        loop = cast("Any", trainer.fit_loop.epoch_loop)
        consumed, data = pending["consumed"], pending["data"]
        if data is None or loop._num_ready_batches_reached():
            return
        different = differences(pending["loaders"], describe(loaders))
        if not different and can_replay(fetcher):
            log.info("resuming inside an epoch: %s batches are read and dropped", consumed)
            if self._position.replay(fetcher, data, consumed):
                return
            different = f"more than {consumed} batches then, fewer now"
        log.warning(
            "the place in the epoch's data cannot be found again (%s); the data starts over, and "
            "training differs from an uninterrupted run until the next epoch. Resume with the "
            "loaders that the checkpoint was saved with, or from the end of an epoch.",
            different or "training_step takes a dataloader_iter",
        )
        iter(fetcher)
        fetcher.fetched += loop.batch_progress.current.ready

    def _advance(self, trainer: Trainer, original: Callable[[Any], None], fetcher: Any) -> None:
        how, self._take_over = self._take_over, None
        if self.notes_batches:
            self._before_batch = self._take(trainer)
        if how is None or take_over(trainer, how):
            original(fetcher)

    def _advance_end(self, trainer: Trainer, original: Callable[[Any], None], fetcher: Any) -> None:
        self._is_batch_over = True
        try:
            _tell(trainer, "on_train_batch_settled")
        finally:
            self._is_batch_over = False
        original(fetcher)

    def _validation_end(self, trainer: Trainer, original: Callable[[], None]) -> None:
        original()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            _tell(trainer, "on_validation_settled")

    def _before_fetch(self, trainer: Trainer, original: Callable[[], None]) -> None:
        self._position.before_fetch(cast("Any", trainer.fit_loop)._data_fetcher)
        original()

    def _after_fetch(self, trainer: Trainer, original: Callable[[], None]) -> None:
        original()
        self._position.after_fetch(cast("Any", trainer.fit_loop)._data_fetcher)

    def _validation(self, trainer: Trainer, original: Callable[[], None]) -> None:
        """Called when validation starts; its loaders draw before any hook of it."""
        if not trainer.sanity_checking:
            self._before_validation = self._read(trainer)
        original()

    def _put_back(self, trainer: Trainer, state: dict[str, Any]) -> None:
        rng.put_back(state["rng"], rng.generators_of(_train_loaders(trainer)))
        for generator, one in zip(
            rng.generators_of(_val_loaders(trainer)), state["validation_generators"], strict=False
        ):
            generator.set_state(one.cpu())


def _around(around: Callable[..., None], trainer: Trainer, original: Callable[..., None]) -> Any:
    def call(*args: Any) -> None:
        around(trainer, original, *args)

    return call


def _tell(trainer: Trainer, event: str) -> None:
    """Call the method *event* of the callbacks that have it, after the module's own hooks."""
    for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType, reportUnknownVariableType] -- set in Lightning's __init__
        method = getattr(callback, event, None)  # pyright: ignore[reportUnknownArgumentType] -- as above
        if method is not None:
            method(trainer, trainer.lightning_module)


def _train_loaders(trainer: Trainer) -> list[Any]:
    combined = cast("Any", trainer.fit_loop)._combined_loader
    return [] if combined is None else list(combined.flattened)


def _val_loaders(trainer: Trainer) -> list[Any]:
    combined = cast("Any", trainer.fit_loop.epoch_loop.val_loop)._combined_loader
    return [] if combined is None else list(combined.flattened)


def _put_gradients(trainer: Trainer, gradients: dict[str, torch.Tensor]) -> None:
    for name, parameter in trainer.lightning_module.named_parameters():
        if name in gradients:
            parameter.grad = gradients[name].to(parameter.device)
