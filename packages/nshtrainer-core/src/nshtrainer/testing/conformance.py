"""`CallbackConformance`: the clauses of a callback, as a test class to inherit.

    class TestMyCallback(CallbackConformance):
        config = MyCallbackConfig(threshold=0.5)

Each test is one clause and its docstring the law. Everything runs for real, on the CPU, in this
process, with a tiny model.
"""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from nshtrainer.callbacks.base import callback_registry

from .config_clauses import ConfigClauses
from .failure_clauses import FailureClauses
from .fit_clauses import FitClauses
from .promises import promise
from .sharing import mutable_parts, top_package
from .state_clauses import StateClauses

__all__ = ["CallbackConformance"]


def _pickled(callback: Callback) -> Callback:
    return pickle.loads(pickle.dumps(callback))  # noqa: S301 -- our own bytes


class CallbackConformance(FitClauses, StateClauses, FailureClauses, ConfigClauses):
    """What nshtrainer expects of a callback and its configuration; inherit and set `config`.

    Attributes:
        config: The configuration under test, with options at which its callbacks do something.
        trainer_fields: More fields of `TrainerConfig`, such as `primary_metric`.
        changes_training: Whether the callbacks mean to change what is trained (skip or change
            gradients, stop early). If not, weights and random numbers must be as without them.
        resumes_exactly: Whether their state is the same after a run that was interrupted and
            resumed as after one that was not; False for what holds wall times.
        not_compared: Names inside a callback's state that no clause compares: wall times, what is
            saved for readers only.
        syncs_every_step: Whether they mean to make the host wait for the device at every step.
        supports_manual_optimization: Whether they work in a module that steps by itself.
        epochs: How long the runs are.
        batches: Training batches of an epoch.
    """

    registry = callback_registry
    field = "callbacks"

    def test_makes_fresh_callbacks(self, tmp_path: Path) -> None:
        """Each call of `create_callbacks` makes new callbacks that share no mutable object.

        The configuration itself, which a trainer has a copy of, may be shared.
        """
        config, one, other = self._built_twice(tmp_path)
        made: list[Any] = [*one]
        for callback in made:
            promise(
                isinstance(callback, Callback),
                f"{self._cls}.create_callbacks yields {callback!r}; a lightning.pytorch Callback is "
                f"expected (pytorch_lightning's is another class)",
            )
        packages = {top_package(part) for part in (config, *one)} - {"lightning"}
        allowed = mutable_parts(config, packages).keys()
        mine, theirs = mutable_parts(one, packages), mutable_parts(other, packages)
        shared = [mine[i][0] for i in mine.keys() & theirs.keys() if i not in allowed]
        promise(
            not shared,
            f"two calls of {self._cls}.create_callbacks share {', '.join(sorted(shared))}; make "
            f"callbacks and what they hold anew in each call",
        )

    def test_has_unique_and_stable_state_keys(self, tmp_path: Path) -> None:
        """No two callbacks of one build share a state key, and every build has the same ones."""
        _, one, other = self._built_twice(tmp_path)
        keys, again = ([c.state_key for c in build] for build in (one, other))
        promise(
            keys == again,
            f"{self._cls} makes callbacks with the state keys {keys}, then {again}; a checkpoint "
            f"could not be restored. Derive the key from the configuration",
        )
        stateful = [c.state_key for c in one if self._keeps_state(c)]
        promise(
            len(stateful) == len(set(stateful)),
            f"{self._cls} makes callbacks that share a state key: {sorted(stateful)}; one would get "
            f"the other's state. Give each its own",
        )

    @staticmethod
    def _keeps_state(callback: Callback) -> bool:
        has_state = type(callback).state_dict is not Callback.state_dict
        return has_state or callback.state_key.startswith("nshtrainer.")

    def test_callbacks_can_be_pickled(self, tmp_path: Path) -> None:
        """Callbacks reach processes that are spawned, and their copies train."""
        trainer_config = self.trainer_config(tmp_path)
        for how, copied in (("pickle", _pickled), ("deepcopy", copy.deepcopy)):
            callbacks = self.callbacks_of(trainer_config)
            copies: list[Callback] = [copied(c) for c in callbacks]
            promise(
                [c.state_key for c in copies] == [c.state_key for c in callbacks],
                f"a copy by {how} of a callback of {self._cls} has another state key",
            )
            self.expect_fit(self.plain_trainer(trainer_config, copies))

    def _built_twice(self, folder: Path) -> tuple[Any, list[Callback], list[Callback]]:
        config = self.own_config()
        one, other = (list(config.create_callbacks(self.trainer_config(folder))) for _ in "12")
        return config, one, other
