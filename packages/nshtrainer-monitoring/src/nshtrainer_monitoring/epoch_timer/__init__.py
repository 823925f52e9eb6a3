"""Durations of epochs."""

from __future__ import annotations
