"""A real run in under a minute: a small CNN on scikit-learn's handwritten digits."""

from __future__ import annotations
