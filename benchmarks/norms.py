"""What norms of gradients cost beside one kernel call for all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from .method import Comparison, Settings, filling
from .registry import benchmark

if TYPE_CHECKING:
    from nshtrainer.runtime.gradients import GradientStep

_LIMIT = 1.3
_BASELINE = "torch._foreach_norm"
_TWO = (2.0,)
_WANTED = {
    "a total": {"totals": _TWO},
    "a total, finite, with evidence": {"totals": _TWO, "finite": True, "evidence": True},
    "a total and each": {"totals": _TWO, "per_parameter": _TWO},
}


@benchmark(
    "norms", "norms of gradients: a total, and of each parameter, against torch._foreach_norm"
)
def norms(settings: Settings) -> Iterator[Comparison]:
    """The gradients of a real optimizer step, in fp32, on one thread."""
    import torch

    from .ema_weights import NETS, QUICK_NETS
    from .norms_step import step_of

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for net, shapes in (QUICK_NETS if settings.is_quick else NETS).items():
            step = step_of(list(shapes()))
            calls = _calls(step)
            yield Comparison(
                case=f"{net}: norms",
                baseline=_BASELINE,
                samplers={name: filling(call, settings.sample_s) for name, call in calls.items()},
                limits=dict.fromkeys(calls.keys() - {_BASELINE}, _LIMIT),
            )
    finally:
        torch.set_num_threads(threads)


def _calls(step: GradientStep) -> dict[str, Callable[[], object]]:
    import torch

    from nshtrainer.runtime.gradient_norms import measure_norms
    from nshtrainer.runtime.gradients import GradientRequest

    grads = [grad for grad in step.grads if grad is not None]
    foreach: Any = torch._foreach_norm
    calls: dict[str, Callable[[], object]] = {_BASELINE: partial(foreach, grads, 2.0)}
    nothing = {"totals": (), "per_parameter": (), "finite": False}
    for name, wanted in _WANTED.items():
        options: Any = {**nothing, **wanted, "scale": None, "device": grads[0].device}
        calls[name] = partial(measure_norms, step.names, grads, **options)

    def measure(request: GradientRequest) -> object:
        step.request = request
        return step.measure()

    for name, wanted in _WANTED.items():
        options = wanted
        calls[f"{name}, of a step"] = partial(measure, GradientRequest(**options))
    return calls
