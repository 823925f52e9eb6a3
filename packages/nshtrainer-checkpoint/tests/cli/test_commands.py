"""`nshtrainer checkpoint` on what real training has left, and on what accidents make of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from nshtrainer.cli.app import app
from nshtrainer_checkpoint.metadata import SidecarReader, sidecar_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),
]

MIN = {"name": "val/loss", "mode": "min"}
VALUES = [0.5, 0.1, 0.4, 0.3]


class Hostile:
    """Unpickled, it leaves a file."""

    def __init__(self, flag: Path) -> None:
        self.flag = flag

    def __reduce__(self) -> Any:
        return Path.touch, (self.flag,)


def run(*args: object, answer: str | None = None) -> Result:
    return CliRunner().invoke(app, ["checkpoint", *map(str, args)], input=answer)


def data(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    assert result.stdout, result.output
    return json.loads(result.stdout)


@pytest.fixture
def trained(fit: Callable[..., Any], model: Any, folder: Path) -> Path:
    """A run with four checkpoints by value and four by time, at steps 4, 8, 12 and 16."""
    saving = [
        {"name": "best_checkpoint", "topk": "all"},
        {"name": "last_checkpoint", "topk": "all", "on_train_end": False},
    ]
    fit(
        model(VALUES),
        max_epochs=4,
        primary_metric=MIN,
        checkpoint_saving={"checkpoint_callbacks": saving},
    )
    return folder


def steps(paths: list[str], callback: str) -> list[int]:
    chosen = [Path(p) for p in paths if Path(p).parent.name == callback]
    return sorted(int(p.name.partition("-step")[2].partition("-")[0]) for p in chosen)


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # best and last share one file
    path.write_bytes(content)


def newest(folder: Path) -> Path:
    return max(SidecarReader().records(folder), key=lambda r: r.order).path


def test_list_shows_what_training_left(trained: Path):
    """Step, epoch, value, size, state, links; newest first; found from any folder above."""
    shown = data("list", trained.parent.parent)

    assert len(shown) == 8
    assert [one["step"] for one in shown] == sorted((o["step"] for o in shown), reverse=True)
    by_link = {link: one for one in shown for link in one["links"]}
    assert by_link["last.ckpt"]["step"] == 16
    assert by_link["best_val_loss.ckpt"]["metadata"]["metrics"]["val/loss"] == pytest.approx(0.1)
    assert {one["state"] for one in shown} == {"ok"}

    text = run("list", trained).stdout
    assert "run r" in text
    assert "<- last.ckpt" in text
    assert "val/loss=0.1" in text
    assert "8 checkpoints" in text


@pytest.mark.parametrize("where", ["last", "last.ckpt", "file"])
def test_list_takes_a_folder_a_link_or_a_file(trained: Path, where: str):
    """What is pointed at is what is shown."""
    path = newest(trained / "last") if where == "file" else trained / where
    assert {Path(one["path"]).parent.name for one in data("list", path)} == {"last"}


def test_list_says_what_is_not_whole(trained: Path):
    """Unfinished, without metadata, without file, cut short: each is told apart."""
    one, two, three, four = sorted((trained / "last").glob("*.ckpt"))
    sidecar_of(one).unlink()
    two.unlink()
    three.write_bytes(three.read_bytes()[:-1])
    sidecar_of(four).write_text("{")

    states = {Path(o["path"]): o["state"] for o in data("list", trained / "last")}
    assert states == {
        one: "no metadata",
        two: "file missing",
        three: "size differs",
        four: "bad metadata",
    }


def test_verify_names_the_damage_and_the_good_one_before(trained: Path):
    """One flipped bit: exit status 1, and the newest whole checkpoint before it."""
    assert run("verify", trained).exit_code == 0
    broken = newest(trained / "last")
    os.unlink(broken.parent.parent / "last.ckpt")
    damage(broken)

    result = run("verify", trained)
    assert result.exit_code == 1
    assert "SHA-256" in result.stdout
    (told,) = [v for v in data("verify", trained) if v["verdict"] == "damaged"]
    assert told["path"] == str(broken)
    assert "step16" in told["good_one_before"]  # best has kept that step as well
    assert run("verify", trained, "--fast").exit_code == 0


def test_prune_deletes_what_nothing_keeps_and_no_more(trained: Path):
    """The newest, the best, milestones and what links lead to stay; a preview changes nothing."""
    before = sorted(trained.rglob("*"))
    wish = ("prune", trained, "--keep-last", 1, "--keep-every", 8)
    preview = data(*wish, "--dry-run")
    assert sorted(trained.rglob("*")) == before
    assert preview["dry_run"]

    done = data(*wish, "--yes")
    assert done["removed"] == preview["removed"]
    assert not [p for p in done["removed"] if Path(p).exists() or sidecar_of(Path(p)).exists()]
    assert steps(done["kept"], "last") == [8, 16]
    assert steps(done["kept"], "best_val_loss") == [8, 16]
    assert run("verify", trained).exit_code == 0


def test_prune_keeps_the_best_by_the_runs_own_metric(trained: Path):
    """Values 0.5, 0.1, 0.4 and 0.3 at steps 4 to 16: the best two are those of 8 and 16."""
    done = data("prune", trained, "--keep-best", 2, "--yes")
    kept = {int(Path(p).name.partition("-step")[2].partition("-")[0]) for p in done["kept"]}
    assert kept == {8, 16}


def test_prune_to_a_size_starts_with_the_oldest(trained: Path):
    """Deleted until the run fits; what links lead to stays even so."""
    size = sum(
        r.size for f in ("last", "best_val_loss") for r in SidecarReader().records(trained / f)
    )
    done = data("prune", trained, "--max-size", int(size * 0.55), "--yes")
    assert {4} <= set(steps(done["removed"], "last")) <= {4, 8, 12}
    assert steps(done["kept"], "best_val_loss")[0] == 8

    tiny = data("prune", trained, "--max-size", "1", "--yes")
    assert {Path(p).name for p in tiny["kept"]} == {
        (trained / link).resolve().name for link in ("last.ckpt", "best_val_loss.ckpt")
    }


def test_prune_asks_and_takes_no_for_an_answer(trained: Path):
    """Without --yes a person is asked; programs must say it."""
    before = sorted(trained.rglob("*"))
    refused = run("prune", trained, "--keep-last", 1, answer="n\n")
    assert refused.exit_code == 1
    assert "Delete" in refused.stdout
    assert run("prune", trained, "--keep-last", 1, "--json").exit_code == 2
    assert run("prune", trained).exit_code == 2
    assert sorted(trained.rglob("*")) == before


def test_prune_leaves_alone_what_is_not_whole_or_not_ours(trained: Path, tmp_path: Path):
    """Foreign files, unfinished ones, and those outside of the folder."""
    foreign = trained / "last" / "theirs.ckpt"
    foreign.write_bytes(b"x")
    unfinished = sorted((trained / "last").glob("epoch*.ckpt"))[0]
    sidecar_of(unfinished).unlink()
    outside = tmp_path / "outside"
    shutil.copytree(trained, outside, symlinks=True)

    run("prune", trained / "last", "--keep-last", 1, "--yes")
    assert foreign.exists()
    assert unfinished.exists()
    assert len(list((trained / "best_val_loss").glob("*.ckpt"))) == 4
    assert len(list((outside / "last").glob("epoch*.ckpt"))) == 4


def test_prune_counts_the_bytes_that_come_free(trained: Path):
    """Best and last share files by hard link: deleting one name frees nothing."""
    first = min(SidecarReader().records(trained / "last"), key=lambda r: r.order)
    twin = min(SidecarReader().records(trained / "best_val_loss"), key=lambda r: r.order)
    assert first.path.samefile(twin.path)
    both = data("prune", trained, "--keep-last", 3, "--dry-run")
    assert both["freed_bytes"] == first.size
    one = data("prune", trained / "last", "--keep-last", 3, "--dry-run")
    assert one["freed_bytes"] == 0


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (["list", "nowhere"], "does not exist"),
        (["list", "s3://bucket/run"], "is a URL"),
        (["prune", ".", "--keep-last", "0"], "0 is not in the range"),
        (["prune", ".", "--max-size", "much"], "is no size"),
    ],
)
def test_errors_are_one_clear_message(args: list[str], what: str):
    """No traceback, the cause and an exit status."""
    result = run(*args)
    assert result.exit_code in (1, 2)
    assert what in result.output
    assert "Traceback" not in result.output


def test_what_is_best_has_to_be_known(trained: Path):
    """A metric that nobody logged is refused, and those that there are are named."""
    result = run("prune", trained, "--keep-best", 1, "--metric", "acc", "--mode", "max", "--yes")
    assert result.exit_code == 1
    assert "val/loss" in result.output


def test_no_command_runs_code_of_a_checkpoint(trained: Path, tmp_path: Path):
    """A hostile pickle in the place of a checkpoint, its metadata forged to match."""
    from nshtrainer_checkpoint.metadata import digest

    victim, flag = newest(trained / "last"), tmp_path / "flag"
    victim.unlink()
    victim.write_bytes(pickle.dumps({"state_dict": Hostile(flag)}))
    size, sha256 = digest(victim)
    sidecar = json.loads(sidecar_of(victim).read_text())
    sidecar.update(checkpoint_size_bytes=size, checkpoint_checksum=sha256)
    sidecar_of(victim).write_text(json.dumps(sidecar))

    assert run("list", trained).exit_code == 0
    assert run("verify", trained).exit_code == 0
    assert run("prune", trained, "--keep-last", 1, "--yes").exit_code == 0
    refused = run("export", victim, tmp_path / "out.pt")
    assert refused.exit_code == 1
    assert "without running code" in refused.output
    assert not flag.exists()
    assert not (tmp_path / "out.pt").exists()


def test_torch_is_not_imported_to_list_verify_or_prune(trained: Path):
    """They start at once, and work where torch is broken."""
    code = (
        "import sys; from click.testing import CliRunner; from nshtrainer.cli.app import app\n"
        "for a in (['list'], ['verify'], ['prune', '--keep-last', '1', '--dry-run']):\n"
        "    r = CliRunner().invoke(app, ['checkpoint', a[0], sys.argv[1], *a[1:]])\n"
        "    assert r.exit_code == 0, r.output\n"
        "assert not {'torch', 'lightning', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(trained)], check=True)


def test_export_writes_the_weights_alone(trained: Path, tmp_path: Path):
    """As a torch file and as safetensors, the same tensors; an existing file is not replaced."""
    safetensors = pytest.importorskip("safetensors.torch")
    source = newest(trained / "last")
    state = torch.load(source, weights_only=True)["state_dict"]

    for name, load in (("w.pt", torch.load), ("w.safetensors", safetensors.load_file)):
        assert run("export", trained / "last.ckpt", tmp_path / name).exit_code == 0
        loaded = load(tmp_path / name)
        assert loaded.keys() == state.keys()
        assert all(torch.equal(loaded[k], v) for k, v in state.items())
    assert run("export", source, tmp_path / "w.pt").exit_code == 1
    assert run("export", source, tmp_path / "w.pt", "--force").exit_code == 0
    assert (
        "no moving average" in run("export", source, tmp_path / "e.pt", "--weights", "ema").output
    )
    assert sorted(p.name for p in tmp_path.glob("*.*")) == ["w.pt", "w.safetensors"]


def test_export_refuses_a_damaged_checkpoint(trained: Path, tmp_path: Path):
    """A flipped bit is not handed on."""
    broken = newest(trained / "last")
    damage(broken)
    result = run("export", broken, tmp_path / "w.pt")
    assert result.exit_code == 1
    assert "damaged" in result.output
