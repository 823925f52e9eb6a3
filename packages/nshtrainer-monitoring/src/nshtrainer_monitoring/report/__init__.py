"""`nshtrainer report`: a run as one page, from its files alone; neither torch nor numpy is read."""

from __future__ import annotations
