"""What runs at training time: gradient pipeline, step metrics, events, saves and weight swaps.

Everything here may import torch and Lightning; nothing at config time may import this package.
"""

from __future__ import annotations
