"""`nshtrainer wandb`: see what a run would send, before it does."""

from __future__ import annotations
