"""Checks of gradients."""

from __future__ import annotations
