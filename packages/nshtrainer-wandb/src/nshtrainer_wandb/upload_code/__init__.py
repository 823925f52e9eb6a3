"""Upload of the source code."""

from __future__ import annotations
