"""The exponential moving average of the weights."""

from __future__ import annotations
