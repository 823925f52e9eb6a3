"""From a configuration to callbacks, against calling their constructors by hand."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .method import Comparison, Settings, filling
from .registry import benchmark


@benchmark("resolve", "make the demo's callbacks from its config, against making them by hand")
def resolve(settings: Settings) -> Iterator[Comparison]:
    """The same objects, with and without what the configuration adds: a validated copy, an order."""
    from nshtrainer.callbacks.assembly import resolve_callbacks
    from nshtrainer.demo.config import demo_config

    with tempfile.TemporaryDirectory() as folder:
        config, _ = demo_config(Path(folder))
        made: list[Any] = resolve_callbacks(config)
        parts: list[tuple[Any, Any]] = [(type(callback), callback.config) for callback in made]
        by_hand = "by hand"
        yield Comparison(
            case=f"the demo's {len(made)} callbacks",
            baseline=by_hand,
            samplers={
                by_hand: filling(lambda: [cls(part) for cls, part in parts], settings.sample_s),
                "resolve_callbacks": filling(lambda: resolve_callbacks(config), settings.sample_s),
            },
        )
