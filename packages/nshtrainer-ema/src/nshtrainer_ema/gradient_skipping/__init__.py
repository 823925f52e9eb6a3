"""Leaving out optimizer steps with exploding gradients."""

from __future__ import annotations
