"""Validating a configuration: however many classes are registered, it must cost the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union

from pydantic import Field, create_model

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.config import Config
from nshtrainer.trainer.config import TrainerConfig

from .fake_callbacks import fake_classes, registered
from .method import Comparison, Sampler, Settings, filling
from .registry import benchmark

_USED, _CALLBACKS, _LIMIT = 5, 20, 1.2


@benchmark("validation", "validate 20 callbacks with 5, 50 and 500 classes registered")
def validation(settings: Settings) -> Iterator[Comparison]:
    """The same 20 callbacks of 5 classes each time; only the number of registered ones differs."""
    counts = (_USED, 10, 20) if settings.is_quick else (_USED, 50, 500)
    classes = fake_classes(counts[-1])
    entries = [
        {"name": f"benchmark_{i % _USED}", "every_n_steps": 1 + i, "decay": 0.99, "metric": "loss"}
        for i in range(_CALLBACKS)
    ]
    data: dict[str, Any] = {"max_epochs": 3, "callbacks": entries}
    few, *more = (f"{n} classes" for n in counts)
    yield Comparison(
        case=f"TrainerConfig with {_CALLBACKS} callbacks",
        baseline=few,
        samplers={
            f"{n} classes": _with(classes[:n], lambda: TrainerConfig.model_validate(data), settings)
            for n in counts
        },
        limits=dict.fromkeys(more, _LIMIT),
    )
    yield _against_union(classes, entries, settings)


def _against_union(
    classes: list[type[CallbackConfigBase]], entries: list[dict[str, Any]], settings: Settings
) -> Comparison:
    """The registry's slot against what it stands for: pydantic's own union, fixed when compiled."""
    used = tuple(classes[:_USED])
    union: Any = Union[used]  # noqa: UP007 -- made at run time
    on_union = _model(Annotated[union, Field(discriminator="name")])
    on_registry = _model(Annotated[CallbackConfigBase, callback_registry])
    data = {"callbacks": entries}
    return Comparison(
        case=f"a list of {_CALLBACKS} callbacks",
        baseline=f"pydantic union of {_USED}",
        samplers={
            f"pydantic union of {_USED}": _with(
                classes, lambda: on_union.model_validate(data), settings
            ),
            f"registry of {len(classes)}": _with(
                classes, lambda: on_registry.model_validate(data), settings
            ),
        },
    )


def _model(annotation: Any) -> type[Config]:
    fields: dict[str, Any] = {"callbacks": (list[annotation], ...)}
    return create_model("Holder", __base__=Config, **fields)


def _with(
    classes: list[type[CallbackConfigBase]], call: Callable[[], object], settings: Settings
) -> Sampler:
    """Measure *call* while just *classes* are registered; registering them does not count."""
    timed = filling(call, settings.sample_s)

    def sample() -> Any:
        with registered(classes):
            call()  # the first use looks each name up; the following ones are what is promised
            return timed()

    return sample
