"""A printed table of metrics."""

from __future__ import annotations
