"""Names and values of learning rates, momenta and weight decays; names are those of Lightning."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Source", "name_sources", "read"]


@dataclass(frozen=True)
class Source:
    """An optimizer, under a name."""

    optimizer: Optimizer
    name: str
    """`lr-<class>`, or the scheduler's own name."""
    interval: str | None
    """`step` or `epoch`, from its scheduler; None without one, or where it does not count."""


def name_sources(
    schedulers: Iterable[tuple[Optimizer, str | None, str | None]], optimizers: Iterable[Optimizer]
) -> list[Source]:
    """Name every scheduler's optimizer, then the optimizers without a scheduler.

    Args:
        schedulers: Optimizer, own name or None, and interval of each scheduler, None where it does
            not count.
        optimizers: All optimizers, wrapped or not.

    The second of one class without a name of its own gets `-1` behind its name, the third `-2`.
    """
    counts: Counter[type] = Counter()
    sources: list[Source] = []

    def add(optimizer: Optimizer, own_name: str | None, interval: str | None) -> None:
        kind = type(optimizer)
        name = own_name
        if name is None:
            name = f"lr-{kind.__name__}" + (f"-{counts[kind]}" if counts[kind] else "")
            counts[kind] += 1
        sources.append(Source(optimizer, name, interval))

    for optimizer, own_name, interval in schedulers:
        add(_unwrapped(optimizer), own_name, interval)
    scheduled = {id(source.optimizer) for source in sources}
    for optimizer in map(_unwrapped, optimizers):
        if id(optimizer) not in scheduled:
            add(optimizer, None, None)
    return sources


def read(source: Source, *, momentum: bool, weight_decay: bool) -> dict[str, float]:
    """Return the present values of one optimizer: one learning rate per parameter group.

    Waits for the device where a learning rate is a tensor (capturable optimizers).
    """
    values: dict[str, float] = {}
    for name, group in _named_groups(source):
        values[name] = float(group["lr"])
        if momentum:
            betas = group.get("betas")
            values[f"{name}-momentum"] = float(betas[0] if betas else group.get("momentum") or 0)
        if weight_decay:
            values[f"{name}-weight_decay"] = float(group.get("weight_decay") or 0)
    return values


def _named_groups(source: Source) -> Iterator[tuple[str, Mapping[str, Any]]]:
    groups: list[dict[str, Any]] = source.optimizer.param_groups
    given = Counter(str(group["name"]) for group in groups if group.get("name"))
    for index, group in enumerate(groups, start=1):
        name = str(group["name"]) if group.get("name") else None
        if name is None or given[name] > 1:  # equal names would hide all but the last
            name = f"pg{index}" if len(groups) > 1 else None
        yield (source.name if name is None else f"{source.name}/{name}"), group


def _unwrapped(optimizer: Any) -> Any:
    """The torch optimizer inside of Lightning's, DeepSpeed's or another wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
