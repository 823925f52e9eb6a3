"""Checkpoints as artifacts."""

from __future__ import annotations
