"""Checkpoint callbacks for nshtrainer."""

from __future__ import annotations
