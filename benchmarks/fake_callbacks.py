"""Any number of callback configurations, as plugins would provide them."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import create_model

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.types import Fraction, MetricName, PositiveInt

__all__ = ["fake_classes", "registered"]


def fake_classes(count: int) -> list[type[CallbackConfigBase]]:
    """*count* configuration classes, `benchmark_0` and so on, with four options each."""
    return [_fake_class(f"benchmark_{i}") for i in range(count)]


def _fake_class(name: str) -> type[CallbackConfigBase]:
    literal: Any = Literal[name]
    fields: dict[str, Any] = {
        "name": (literal, name),
        "every_n_steps": (PositiveInt, 1),
        "decay": (Fraction, 0.999),
        "metric": (MetricName, "loss"),
        "enabled": (bool, True),
    }
    return create_model(
        f"{name.title().replace('_', '')}Config", __base__=CallbackConfigBase, **fields
    )


@contextmanager
def registered(classes: list[type[CallbackConfigBase]]) -> Generator[None]:
    """Register *classes* while the block runs."""
    for cls in classes:
        callback_registry.register(cls)
    try:
        yield
    finally:
        for cls in classes:
            callback_registry.unregister(callback_registry.name_of(cls))
