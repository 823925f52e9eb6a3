"""Checks of losses, gradients and parameters."""

from __future__ import annotations
