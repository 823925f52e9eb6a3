"""`nshtrainer ema`, from snapshots on disk to a model that is loaded with the average."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from nshtrainer.cli.app import app
from nshtrainer_ema.ema.snapshots import reconstruct, write_snapshot

WIDTHS = (0.05, 0.1)
STEPS = range(100, 1001, 100)


class Tied(LightningModule):
    """A buffer, a frozen parameter, and one tensor under two names."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(size, size, bias=False)
        self.second = nn.Linear(size, size, bias=False)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(size)
        self.frozen = nn.Parameter(torch.full((size,), 5.0), requires_grad=False)
        self.loaded: dict[str, Any] = {}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.loaded = checkpoint


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["ema", *map(str, args)])


def data(*args: object) -> Any:
    result = run(*args, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def averages(value: float) -> dict[str, Tensor]:
    return {
        "first.weight": torch.full((3, 3), value),
        "norm.weight": torch.full((3,), value),
        "norm.bias": torch.full((3,), -value),
    }


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with ten snapshots of two widths, of weights that grow with the step."""
    folder = tmp_path / "nshtrainer_logs" / "mine"
    for step in STEPS:
        for width in WIDTHS:
            write_snapshot(
                folder / "ema", step=step, sigma_rel=width, tensors=averages(step * (1 - width))
            )
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of the run, as Lightning writes it while an average is kept."""
    model = Tied(3)
    model.norm.running_mean.fill_(2.0)
    path = tmp_path / "last.ckpt"
    content = {
        "epoch": 3,
        "global_step": 1000,
        "pytorch-lightning_version": "2.6.0",
        "state_dict": model.state_dict(),
        "hyper_parameters": {"size": 3},
        "hparams_name": "kwargs",
        "optimizer_states": [{"state": {}}],
        "lr_schedulers": [],
        "callbacks": {"nshtrainer.ema": {}},
        "nshtrainer_average": {"version": 1, "state_dict": "average", "weights": {}},
        "mine": {"of the module": 1},
    }
    torch.save(content, path)
    return path


# ---- list --------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", "ema"], ids=["run", "folder"])
def test_list_shows_the_snapshots_newest_first(run_dir, place):
    """Step, width, size and age, for people and for programs."""
    shown = data("list", run_dir / place)

    assert [(one["step"], one["sigma_rel"]) for one in shown] == [
        (t, w) for t in reversed(STEPS) for w in reversed(WIDTHS)
    ]
    first = shown[0]
    assert Path(first["path"]) == run_dir / "ema" / "ema-step0000001000-sigma0.1.pt"
    assert first["size_bytes"] == Path(first["path"]).stat().st_size
    assert 0 <= first["age_seconds"] < 600

    lines = run("list", run_dir / place).stdout.splitlines()
    assert lines[0].split() == ["step", "sigma_rel", "size", "age", "file"]
    assert lines[1].split()[:2] == ["1000", "0.1"]
    assert lines[1].endswith("ema-step0000001000-sigma0.1.pt")
    assert lines[-1].startswith("20 snapshots, ")


def test_list_costs_no_torch(run_dir):
    """Neither does the help of the command line."""
    code = (
        "import sys; from nshtrainer_cli import main\n"
        "for args in (['ema', 'list', sys.argv[1]], ['--help']):\n"
        "    try: main(args)\n"
        "    except SystemExit as end: assert not end.code\n"
        "print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == "[]"
    assert "ema  " in done.stdout


@pytest.mark.parametrize(
    ("place", "said"),
    [("", "has no snapshot of an average; give"), ("none", "does not exist; give")],
    ids=["empty", "missing"],
)
def test_a_place_without_snapshots_is_an_error(tmp_path, place, said):
    """Of both commands, with what to give."""
    for rest in (["list"], ["reconstruct", "--sigma-rel", "0.1", "--output", tmp_path / "a.pt"]):
        result = run(rest[0], tmp_path / place, *rest[1:])
        assert result.exit_code == 1
        assert said in result.stderr.replace("\n", " ")


def test_a_url_is_refused():
    """What lies in a store has to be fetched."""
    result = run("list", "s3://bucket/run")

    assert result.exit_code == 2
    assert "is a URL" in result.stderr


# ---- reconstruct -------------------------------------------------------------------------------


def test_reconstruct_writes_the_averaged_tensors(run_dir, tmp_path):
    """The values are those of the library; the report has the weights of the snapshots."""
    out = tmp_path / "new" / "a.pt"
    report = data("reconstruct", run_dir, "--sigma-rel", 0.08, "--output", out)

    expected = reconstruct(run_dir / "ema", sigma_rel=0.08)
    torch.testing.assert_close(torch.load(out, weights_only=True), expected, rtol=0, atol=0)
    assert report["step"] == 1000
    assert report["sigma_rel"] == 0.08
    assert 0 < report["profile_error"] < 0.1
    assert report["tensors"] == 3
    assert report["size_bytes"] == out.stat().st_size
    assert report["output"] == str(out)
    assert len(report["snapshots"]) == 20
    assert sum(one["weight"] for one in report["snapshots"]) == pytest.approx(1)


def test_reconstruct_tells_what_it_has_done(run_dir, tmp_path):
    """On stderr: results of programs go to stdout, and there is none."""
    args = ("--step", 500, "--output", tmp_path / "a.ckpt")
    result = run("reconstruct", run_dir, "--sigma-rel", 0.08, *args)

    assert result.exit_code == 0, result.output
    assert not result.stdout
    assert "3 tensors" in result.stderr
    assert "sigma_rel=0.08 at step 500 from 20 snapshots" in result.stderr
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["state_dict"].keys() == averages(0).keys()
    assert content["nshtrainer_reconstruction"]["step"] == 500

    result = run("reconstruct", run_dir, "--sigma-rel", 0.1, *args, "--force")
    assert "the snapshot itself" in result.stderr
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(state, averages(450.0))


def test_a_checkpoint_is_filled_so_that_the_model_loads(run_dir, base, tmp_path):
    """Averages under all names; buffers, frozen weights and the module's own data from the checkpoint."""
    out = tmp_path / "average.ckpt"
    options = ("--output", out, "--checkpoint", base)
    report = data("reconstruct", run_dir, "--sigma-rel", 0.08, *options)

    model = Tied.load_from_checkpoint(out, map_location="cpu")
    expected = reconstruct(run_dir / "ema", sigma_rel=0.08)
    assert torch.equal(model.first.weight, expected["first.weight"])
    assert torch.equal(model.second.weight, expected["first.weight"])
    assert torch.equal(model.norm.bias, expected["norm.bias"])
    assert torch.equal(model.norm.running_mean, torch.full((3,), 2.0))
    assert torch.equal(model.frozen, torch.full((3,), 5.0))
    assert model.loaded["mine"] == {"of the module": 1}
    assert not {"optimizer_states", "callbacks", "nshtrainer_average"} & model.loaded.keys()
    assert model.loaded["nshtrainer_reconstruction"]["sigma_rel"] == 0.08
    assert report["tensors"] == len(model.state_dict())


@pytest.mark.skipif(not importlib.util.find_spec("safetensors"), reason="safetensors is optional")
def test_safetensors_and_pt_hold_names_and_tensors(run_dir, base, tmp_path):
    """With a checkpoint, all of its `state_dict`; tied weights are there twice."""
    from safetensors.torch import load_file

    for name in ("a.safetensors", "a.pt"):
        options = ("--output", tmp_path / name, "--checkpoint", base)
        data("reconstruct", run_dir, "--sigma-rel", 0.08, *options)
    loaded = load_file(tmp_path / "a.safetensors")

    assert loaded.keys() == Tied(3).state_dict().keys()
    assert torch.equal(loaded["second.weight"], loaded["first.weight"])
    torch.testing.assert_close(loaded, dict(torch.load(tmp_path / "a.pt", weights_only=True)))


def test_the_average_is_in_the_dtype_of_the_checkpoint(run_dir, base, tmp_path):
    """As every other checkpoint of the run."""
    content = torch.load(base, weights_only=True)
    content["state_dict"] = {
        n: t.bfloat16() if t.is_floating_point() else t for n, t in content["state_dict"].items()
    }
    torch.save(content, base)
    options = ("--output", tmp_path / "a.pt", "--checkpoint", base)
    data("reconstruct", run_dir, "--sigma-rel", 0.1, *options)

    assert torch.load(tmp_path / "a.pt", weights_only=True)["norm.bias"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--sigma-rel", "0.5"], "sigma_rel=0.5 is no width"),
        (["--sigma-rel", "0.01"], "the nearest is off by"),
        (["--sigma-rel", "0.1", "--step", "2000"], "last snapshot is of step 1000"),
        (["--sigma-rel", "0.08", "--max-error", "0"], "at most 0.0% is accepted"),
        (["--sigma-rel", "0.1", "--output", "a.bin"], "choose one of .ckpt, .pt, .safetensors"),
        (["--sigma-rel", "0.1", "--output", "there.pt"], "is there already; choose another name"),
        (["--sigma-rel", "0.1", "--output", "there.pt/a.pt", "--force"], "cannot be written"),
        (["--sigma-rel", "0.1", "--checkpoint", "none.ckpt"], "does not exist; give a checkpoint"),
        (["--sigma-rel", "0.1", "--checkpoint", "."], "is a folder; give a checkpoint"),
        (["--sigma-rel", "0.1", "--checkpoint", "there.pt"], "without running code from it"),
        (["--sigma-rel", "0.1", "--checkpoint", "list.ckpt"], "has no `state_dict`"),
        (["--sigma-rel", "0.1", "--checkpoint", "other.ckpt"], "is missing there"),
        (["--sigma-rel", "0.1", "--checkpoint", "small.ckpt"], r"is of shape [2, 2] there"),
    ],
)
def test_what_cannot_be_done_is_one_line(run_dir, tmp_path, monkeypatch, options, said):
    """No traceback, exit status 1, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    Path("there.pt").write_text("text")
    torch.save([1], "list.ckpt")
    torch.save({"state_dict": {}}, "other.ckpt")
    torch.save({"state_dict": {"first.weight": torch.ones(2, 2)}}, "small.ckpt")
    before = sorted(tmp_path.rglob("*"))

    output = [] if "--output" in options else ["--output", "a.pt"]
    result = run("reconstruct", run_dir, *options, *output)

    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert said in " ".join(result.stderr.split())
    assert sorted(tmp_path.rglob("*")) == before
    assert Path("there.pt").read_text() == "text"


def test_a_missing_safetensors_is_noticed_before_the_work(run_dir, tmp_path, monkeypatch):
    """With the command that installs it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = ("--output", tmp_path / "a.safetensors")
    result = run("reconstruct", run_dir, "--sigma-rel", 0.1, *options)

    assert result.exit_code == 1
    assert "pip install safetensors" in result.stderr
