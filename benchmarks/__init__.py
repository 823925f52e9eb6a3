"""Side-by-side ratios: `python -m benchmarks [NAME ...] [--quick] [--json FILE]`.

Times of one machine mean nothing on another, and drift on the same one; so everything here is a
ratio of two things that were measured in turn in one process. `method` says how.
"""

from __future__ import annotations
