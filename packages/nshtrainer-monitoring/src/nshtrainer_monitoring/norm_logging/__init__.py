"""Norms of gradients, parameters, updates and moments."""

from __future__ import annotations
