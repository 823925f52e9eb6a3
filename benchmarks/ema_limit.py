"""What no update can be faster than: one loop that reads p, reads e and writes e."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch

__all__ = ["Loop", "limit_loop"]

_SOURCE = """
#include <stdint.h>
#include <string.h>

void from_float32(float *e, const float *p, int64_t n, float w, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) e[i] += w * (p[i] - e[i]);
}

void from_bfloat16(float *e, const uint16_t *p, int64_t n, float w, int threads) {
    #pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)p[i] << 16;
        float value;
        memcpy(&value, &bits, sizeof value);
        e[i] += w * (value - e[i]);
    }
}
"""
_NAMES = {torch.float32: "from_float32", torch.bfloat16: "from_bfloat16"}
_BLOCK = 1 << 16


Loop = Callable[[torch.Tensor, torch.Tensor, float], object]
"""Moves a flat fp32 average toward flat weights by a part, on as many threads as torch has."""


@contextmanager
def limit_loop() -> Generator[tuple[str, Loop]]:
    """The loop and its name: compiled C, or torch on flat tensors where there is no compiler."""
    with tempfile.TemporaryDirectory(prefix="nshtrainer-benchmark-") as folder:
        library = _compiled(Path(folder))
        if library is None:
            print("no C compiler: torch on flat tensors stands in for the limit", file=sys.stderr)
            yield "flat torch", _torch_loop
        else:
            yield "limit", _c_loop(library)


def _compiled(folder: Path) -> ctypes.CDLL | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    source, library = folder / "loop.c", folder / "loop.so"
    source.write_text(_SOURCE, encoding="utf-8")
    options = ["-O3", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    try:
        command = [compiler, *options, str(source), "-o", str(library)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"cc failed: {getattr(error, 'stderr', None) or error}", file=sys.stderr)
        return None


def _c_loop(library: ctypes.CDLL) -> Loop:
    functions: dict[torch.dtype, Callable[..., object]] = {}
    for dtype, name in _NAMES.items():
        function = functions[dtype] = getattr(library, name)
        pointer = ctypes.c_void_p
        function.argtypes = [pointer, pointer, ctypes.c_int64, ctypes.c_float, ctypes.c_int]  # pyright: ignore[reportFunctionMemberAccess] -- of ctypes
        function.restype = None  # pyright: ignore[reportFunctionMemberAccess] -- of ctypes

    def loop(average: torch.Tensor, weights: torch.Tensor, weight: float) -> None:
        pointers = average.data_ptr(), weights.data_ptr()
        functions[weights.dtype](*pointers, average.numel(), weight, torch.get_num_threads())

    return loop


def _torch_loop(average: torch.Tensor, weights: torch.Tensor, weight: float) -> None:
    if average.dtype == weights.dtype:
        average.lerp_(weights, weight)
        return
    for part, source in zip(average.split(_BLOCK), weights.split(_BLOCK), strict=True):
        part.lerp_(source.to(part.dtype), weight)
