from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from nshtrainer.files import (
    atomic_symlink,
    atomic_write,
    atomic_write_bytes,
    atomic_write_text,
    put_in_place,
    remove_leftovers,
    temporary_path,
)

posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals, permissions and limits")


def run_child(code: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_text_and_bytes_arrive_as_they_were_given(tmp_path: Path):
    """What is written is what is read, newlines and all, and nothing else is left."""
    atomic_write_text(tmp_path / "a.txt", "one\ntwo \u00e9\n")
    atomic_write_bytes(tmp_path / "b.bin", b"\r\n\x00\xff")

    assert (tmp_path / "a.txt").read_bytes() == "one\ntwo \u00e9\n".encode()
    assert (tmp_path / "b.bin").read_bytes() == b"\r\n\x00\xff"
    assert names(tmp_path) == ["a.txt", "b.bin"]


def test_the_old_content_stays_until_the_block_ends(tmp_path: Path):
    """A reader sees the old file while the new one is being written."""
    path = tmp_path / "file"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"

    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), SystemExit(3)])
def test_an_error_leaves_the_target_and_no_temporary_file(tmp_path: Path, error: BaseException):
    """Whatever ends the block early, the old file stays and the new one is gone."""
    path = tmp_path / "file"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("moment", ["writing", "renaming"])
def test_a_kill_in_the_middle_leaves_the_old_file_and_a_leftover_that_is_cleaned(
    tmp_path: Path, moment: str
):
    """SIGKILL before the rename, or while the file is written: the old content is intact."""
    path = tmp_path / "file"
    path.write_text("old")
    child = run_child(
        """
        import os, signal, sys
        from nshtrainer.files import atomic_write
        path, moment = sys.argv[1:]
        def hook(name, arguments):
            if name == "os.rename" and moment == "renaming":
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        with atomic_write(path) as file:
            file.write(b"new" * 100_000)
            if moment == "writing":
                os.kill(os.getpid(), signal.SIGKILL)
        """,
        path,
        Path(moment),
    )

    assert child.returncode == -signal.SIGKILL, child.stderr
    assert path.read_text() == "old"
    leftover = [name for name in names(tmp_path) if name != "file"]
    assert len(leftover) == 1
    assert remove_leftovers(tmp_path) == [tmp_path / leftover[0]]
    assert names(tmp_path) == ["file"]


@posix
def test_a_full_disk_leaves_the_old_file_and_shows_its_own_error(tmp_path: Path):
    """When the bytes do not fit, the error is the disk's and nothing is left behind."""
    path = tmp_path / "file"
    path.write_text("old")
    child = run_child(
        """
        import resource, signal, sys
        from nshtrainer.files import atomic_write_bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        try:
            atomic_write_bytes(sys.argv[1], b"x" * 5000)
        except OSError as error:
            print(error.errno)
        """,
        path,
    )

    assert child.stdout.strip() == str(errno.EFBIG), child.stderr
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


@posix
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_a_new_file_has_the_permissions_of_the_umask(tmp_path: Path, umask: int):
    """A new file is as readable as any other the user makes, not private as temporary files are."""
    before = os.umask(umask)
    try:
        atomic_write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)

    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


@posix
@pytest.mark.parametrize("mode", [0o600, 0o664, 0o755])
def test_a_replaced_file_keeps_its_permissions(tmp_path: Path, mode: int):
    """Replacing a private file does not publish it, nor the reverse."""
    path = tmp_path / "file"
    path.write_text("old")
    path.chmod(mode)
    atomic_write_text(path, "new")

    assert path.read_text() == "new"
    assert path.stat().st_mode & 0o777 == mode


def test_a_link_is_replaced_and_not_followed(tmp_path: Path):
    """Writing to a link leaves the file it pointed to alone."""
    (tmp_path / "kept").write_text("kept")
    (tmp_path / "link").symlink_to("kept")
    atomic_write_text(tmp_path / "link", "new")

    assert (tmp_path / "kept").read_text() == "kept"
    assert not (tmp_path / "link").is_symlink()
    assert (tmp_path / "link").read_text() == "new"


def test_a_directory_in_the_way_and_a_missing_one_are_told(tmp_path: Path):
    """The two mistakes a caller can make are reported with the path concerned."""
    (tmp_path / "taken").mkdir()
    with pytest.raises(IsADirectoryError, match=r"choose another name.*taken"):
        atomic_write_text(tmp_path / "taken", "x")
    with pytest.raises(FileNotFoundError, match=r"create it.*absent'"):
        atomic_write_text(tmp_path / "absent" / "file", "x")
    with pytest.raises(FileNotFoundError, match=r"create it.*absent'"):
        atomic_symlink(tmp_path / "taken", tmp_path / "absent" / "link")

    assert names(tmp_path) == ["taken"]


def test_an_unknown_mode_is_refused(tmp_path: Path):
    """Appending cannot be atomic."""
    with pytest.raises(ValueError, match="use 'wb' or 'w'"):
        atomic_write(tmp_path / "file", "a")  # type: ignore[call-overload] -- the mistake


def test_threads_writing_one_file_leave_one_whole_content(tmp_path: Path):
    """Writers never mix; the last to finish wins."""
    path = tmp_path / "file"
    contents = [bytes([65 + i]) * 200_000 for i in range(8)]
    seen: set[bytes] = set()

    def write(data: bytes) -> None:
        for _ in range(5):
            atomic_write_bytes(path, data)
            seen.add(path.read_bytes())

    threads = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen <= set(contents)
    assert names(tmp_path) == ["file"]


def test_a_long_name_can_be_written(tmp_path: Path):
    """The temporary name does not make a legal name too long."""
    path = tmp_path / ("n" * 255)
    atomic_write_text(path, "x")

    assert path.read_text() == "x"


def test_a_link_is_relative_and_replaced_in_place(tmp_path: Path):
    """A link survives moving the tree, and a second call re-points it."""
    (tmp_path / "run" / "last").mkdir(parents=True)
    link = tmp_path / "run" / "last.ckpt"
    for name in ("one", "two"):
        (tmp_path / "run" / "last" / name).write_text(name)
        atomic_symlink(tmp_path / "run" / "last" / name, link)

    assert os.readlink(link) == os.path.join("last", "two")
    (tmp_path / "run").rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "last.ckpt").read_text() == "two"
    assert names(tmp_path / "moved") == ["last", "last.ckpt"]


def test_a_link_through_a_linked_directory_reaches_its_target(tmp_path: Path):
    """Where the link's directory is reached by a link itself, the way up is the real one."""
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "short").symlink_to(tmp_path / "deep" / "er")
    (tmp_path / "target").write_text("x")
    atomic_symlink(tmp_path / "target", tmp_path / "short" / "link")

    assert (tmp_path / "short" / "link").read_text() == "x"


def test_a_link_never_replaces_a_directory_or_points_to_itself(tmp_path: Path):
    """A directory with the link's name keeps its content."""
    (tmp_path / "last.ckpt").mkdir()
    (tmp_path / "last.ckpt" / "shard").write_text("x")
    (tmp_path / "file").write_text("x")
    with pytest.raises(IsADirectoryError, match="choose another name"):
        atomic_symlink(tmp_path / "file", tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="give another name"):
        atomic_symlink(tmp_path / "file", tmp_path / "file")

    assert (tmp_path / "last.ckpt" / "shard").read_text() == "x"
    assert (tmp_path / "file").read_text() == "x"
    assert names(tmp_path) == ["file", "last.ckpt"]


def test_a_file_written_elsewhere_is_put_in_place(tmp_path: Path):
    """A writer that opens its own file can still commit it by rename."""
    temporary = temporary_path(tmp_path / "file")
    assert not temporary.exists()
    temporary.write_text("new")
    (tmp_path / "file").write_text("old")
    put_in_place(temporary, tmp_path / "file")

    assert (tmp_path / "file").read_text() == "new"
    assert names(tmp_path) == ["file"]


@posix
def test_leftovers_of_living_writers_and_files_of_others_stay(tmp_path: Path):
    """Cleaning takes only our own files, and only those whose writer is gone."""
    mine = temporary_path(tmp_path / "file")
    mine.write_text("being written")
    (tmp_path / ".nshtrainer-notes.tmp").write_text("the user's")
    (tmp_path / "model.tmp").write_text("the user's")
    script = (
        "import sys; from nshtrainer.files import temporary_path\n"
        "p = temporary_path(sys.argv[1]); p.write_text('x'); print(p, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "other")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        theirs = Path(child.stdout.readline().strip())

        assert remove_leftovers(tmp_path) == []
        child.kill()
        assert child.wait() == -signal.SIGKILL

    assert remove_leftovers(tmp_path) == [theirs]
    assert names(tmp_path) == sorted([mine.name, ".nshtrainer-notes.tmp", "model.tmp"])


@posix
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux's /proc")
def test_a_process_number_given_again_does_not_protect_a_leftover(tmp_path: Path):
    """A file of a dead process is cleaned even if its number belongs to a living one now."""
    name = temporary_path(tmp_path / "file").name
    identity, _, token = name.rpartition("-")
    stale = tmp_path / f"{identity.rpartition('-')[0]}-1-{token}"
    stale.write_text("x")

    assert remove_leftovers(tmp_path) == [stale]


def test_leftovers_of_other_hosts_are_removed_only_on_request(tmp_path: Path):
    """Whether a writer on another machine lives cannot be seen from here."""
    file = tmp_path / ".nshtrainer-elsewhere_4026531836@17-5-0123456789abcdef.tmp"
    file.write_text("x")
    directory = tmp_path / ".nshtrainer-elsewhere_4026531836@18-5-0123456789abcdef.tmp"
    directory.mkdir()
    (directory / "shard").write_text("x")

    assert remove_leftovers(tmp_path) == []
    assert remove_leftovers(tmp_path, foreign=True) == [file, directory]
    assert names(tmp_path) == []
    assert remove_leftovers(tmp_path / "absent") == []


def test_files_need_only_the_standard_library():
    """Config time may write files: no heavy import comes along."""
    child = run_child(
        """
        import sys, nshtrainer.files, nshtrainer.run
        print([m for m in ("torch", "lightning", "numpy", "wandb") if m in sys.modules])
        """
    )

    assert child.stdout.strip() == "[]", child.stderr
