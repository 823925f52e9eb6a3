from __future__ import annotations

import errno
import hashlib
import io
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from nshtrainer_checkpoint.digesting import DigestingFile, lasting_memory

LARGE = 300_000


def written(path: Path, value: Any, lasting: dict[int, int]) -> DigestingFile:
    """*value* saved at *path*."""
    with path.open("wb") as file, DigestingFile(file, lasting) as digesting:
        torch.save(value, digesting)
    return digesting


def states() -> dict[str, Any]:
    """Small tensors, one of many pieces, an empty one, two that share memory, and no tensor."""
    large = torch.randn(3 * (1 << 20))
    small: dict[str, Any] = {str(n): torch.randn(n) for n in range(50)}
    return {
        **small,
        "large": large,
        "view": large[5:100],
        "middle": torch.randn(LARGE),
        "text": "x",
    }


@pytest.mark.parametrize("knows_memory", [True, False])
def test_size_and_digest_are_those_of_the_file(tmp_path: Path, knows_memory: bool):
    """Whether the memory is known to last or not, in small pieces and large ones."""
    state, path = states(), tmp_path / "a.ckpt"

    digesting = written(path, state, lasting_memory(state) if knows_memory else {})

    content = path.read_bytes()
    assert digesting.size == len(content)
    assert digesting.sha256 == hashlib.sha256(content).hexdigest()


def test_the_file_is_what_torch_writes(tmp_path: Path):
    """Bit for bit what `torch.save` makes of the same state."""
    state, path, expected = states(), tmp_path / "a.ckpt", io.BytesIO()
    torch.save(state, expected)

    written(path, state, lasting_memory(state))

    assert path.read_bytes() == expected.getvalue()


def test_memory_that_may_go_is_hashed_before_write_returns(tmp_path: Path):
    """A buffer that is overwritten at once, like a copy from an accelerator, counts as it was."""
    buffer, total = bytearray(LARGE), hashlib.sha256()

    with (tmp_path / "a").open("wb") as file, DigestingFile(file, {}) as digesting:
        for number in range(50):
            buffer[:] = bytes([number]) * LARGE
            total.update(buffer)
            digesting.write(memoryview(buffer))

    assert digesting.sha256 == total.hexdigest()


def test_a_failed_write_keeps_its_error_and_ends_the_thread(tmp_path: Path):
    """Torch's own error does not say why; what is left to hash is left."""

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            raise OSError(errno.ENOSPC, "full")

    state, before = states(), threading.active_count()
    digesting = DigestingFile(Full(), lasting_memory(state))

    with pytest.raises((OSError, RuntimeError)), digesting:
        torch.save(state, digesting)

    assert digesting.error is not None
    assert digesting.error.errno == errno.ENOSPC
    assert threading.active_count() == before


def test_lasting_memory_is_that_of_plain_tensors_on_the_cpu():
    """By storage, however deep; what converts itself while it is saved is not among it."""
    a, b, tied = torch.zeros(3), torch.nn.Parameter(torch.zeros(4)), torch.zeros(10)
    nested: dict[str, Any] = {"a": a, "list": [{"b": b}, (tied[2:4],)], "meta": a.to("meta")}
    nested["itself"] = nested

    assert lasting_memory(nested) == {
        a.data_ptr(): 12,
        b.data_ptr(): 16,
        tied.untyped_storage().data_ptr(): 40,
    }


SAVING_LATE = """
import concurrent.futures.thread as futures
import sys, time
import torch
from pathlib import Path
from nshtrainer_checkpoint.background import Background
from nshtrainer_checkpoint.streaming import StreamingCheckpointIO

def save():
    while not futures._shutdown:
        time.sleep(0.01)  # the interpreter has begun to end
    stream = StreamingCheckpointIO(None, {"w"})
    stream.save_checkpoint({"state_dict": {"w": torch.ones(100_000)}}, sys.argv[1])
    size, sha256 = stream.finish()
    Path(sys.argv[1] + ".sha256").write_text(sha256)

background = Background()
background.submit(save)
"""


def test_a_save_is_finished_while_the_interpreter_waits_for_it(tmp_path):
    """No executor takes work then, and from Python 3.12 on no thread starts."""
    path = tmp_path / "late.ckpt"
    done = subprocess.run(
        [sys.executable, "-c", SAVING_LATE, str(path)],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    assert torch.load(path, weights_only=True)["state_dict"]["w"].sum() == 100_000
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert Path(f"{path}.sha256").read_text() == digest
