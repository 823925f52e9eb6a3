"""Scaling the gradients of parameters that are used several times."""

from __future__ import annotations
