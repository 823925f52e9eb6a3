"""The automatic debug flag."""

from __future__ import annotations
