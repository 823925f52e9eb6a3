"""`nshtrainer ema`: list snapshots of averaged weights, and reconstruct averages from them."""

from __future__ import annotations
