"""Ending the training when a metric has stopped getting better."""

from __future__ import annotations
