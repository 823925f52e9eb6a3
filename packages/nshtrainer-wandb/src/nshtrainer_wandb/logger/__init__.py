"""The Weights & Biases logger."""

from __future__ import annotations
