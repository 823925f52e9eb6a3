"""Weights and Biases for nshtrainer."""

from __future__ import annotations
