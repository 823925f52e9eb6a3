"""Histograms of gradients and parameters."""

from __future__ import annotations
