"""The way into an unmodified Lightning script: `NSHTRAINER_CALLBACKS=file.yaml python train.py`.

Lightning calls this factory in every `Trainer.__init__` of every program in the environment. It is
a package of its own, so that a program that does not set the variable pays and risks nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lightning.pytorch.callbacks import Callback

__all__ = ["callbacks_from_environment"]

VARIABLE = "NSHTRAINER_CALLBACKS"


def callbacks_from_environment() -> list[Callback]:
    """The callbacks that the file named by `NSHTRAINER_CALLBACKS` describes; none if it is not set.

    The file holds a list of callbacks, or a mapping with `callbacks`, slots and other fields of
    `TrainerConfig` that callbacks look at. `nshtrainer.Trainer` ignores the variable. A relative path
    counts from the working directory of the first trainer, and is made absolute in the environment:
    later trainers and the processes of other ranks find the same file wherever they stand.

    Raises:
        nshtrainer.ConfigError: The file is missing or not valid: a run that was asked to have
            callbacks does not start without them.
    """
    path = os.environ.get(VARIABLE, "").strip()
    if not path:
        return []
    from nshtrainer.callbacks.from_file import callbacks_from_file
    from nshtrainer.factory_guard import factories_are_off

    if factories_are_off():
        return []
    absolute = os.path.abspath(os.path.expanduser(path))
    where = "" if path == absolute else f" ({absolute})"
    callbacks = callbacks_from_file(absolute, f"{VARIABLE}={path}{where}")
    os.environ[VARIABLE] = absolute
    return callbacks
