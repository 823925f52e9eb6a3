"""Storing of activations with nshutils."""

from __future__ import annotations
