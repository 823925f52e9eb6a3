"""The demo with everything of W&B on, in a repository full of secrets; all that it wrote is read back."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nshtrainer import Trainer, TrainerConfig
from nshtrainer.demo.config import demo_config
from nshtrainer.demo.digits import DigitsData, DigitsModel
from nshtrainer_wandb import ActSaveConfig, WandbLoggerConfig, WandbWatchCallbackConfig

from .upload_code.secrets import BY_CONTENT, BY_NAME, MARK

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning with new torch
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

_CODE = {"train.py": "x = 1\n", "pkg/model.py": "y = 2\n", "README.md": "# demo\n"}
_TRACE = "stands beside each planted secret"
_SECRET = "Wv5" * 11


def _git(root: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
    subprocess.run(["git", "-C", root, *identity, *arguments], check=True, capture_output=True)


def _repository(root: Path) -> set[str]:
    """Make a repository of code and secrets, all tracked, one of them changed; return the secrets."""
    secrets = dict.fromkeys(BY_NAME, f"{_TRACE}\n")
    for number, content in enumerate(BY_CONTENT.values()):
        secrets[f"pkg/s{number}.py"] = f"{content}\n# {_TRACE}\n"
    for path, content in {**secrets, **_CODE}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(content)
    _git(root, "init", "-q")
    _git(root, "remote", "add", "origin", f"https://user:{_SECRET}@example.com/me/x.git")
    _git(root, "add", "-f", ".")
    _git(root, "commit", "-qm", "all of it")
    with (root / "pkg" / "s0.py").open("a") as file:
        file.write(f"# {_TRACE} {MARK}\n")
    return set(secrets)


def _files_with(root: Path, *texts: str) -> set[str]:
    files = [p for p in root.rglob("*") if p.is_file() and ".git" not in p.parts]
    wanted = [text.encode() for text in texts]
    return {
        p.relative_to(root).as_posix() for p in files if any(t in p.read_bytes() for t in wanted)
    }


def _config(root: Path) -> TrainerConfig:
    config, _ = demo_config(root, max_epochs=1)
    watch = WandbWatchCallbackConfig(log="all", log_freq=20)
    config.loggers = [WandbLoggerConfig(offline=True, watch=watch)]
    act_save = ActSaveConfig(include=["net.*"], reduce=["mean", "histogram"], every_n_steps=20)
    config.callbacks = [*config.callbacks, act_save]
    config.enable_progress_bar = False
    return config


def test_everything_is_in_the_run_but_secrets(project: Path, written, monkeypatch):
    """Metrics, configuration, histograms, code and activations; no secret of any kind, anywhere."""
    planted = _repository(project)
    assert len(planted) >= 40
    monkeypatch.setenv("MY_API_KEY", _SECRET)
    monkeypatch.setattr(sys, "argv", ["train.py", f"--api-key={_SECRET}", "--lr=1"])
    trainer = Trainer(_config(project))

    trainer.fit(DigitsModel(), datamodule=DigitsData())

    (run,) = written()
    keys = {key for row in run.history for key in row}
    logged = set(trainer.logged_metrics)
    assert {"train_loss", "val_loss", "val_acc"} <= logged <= keys
    assert {"gradients/net.0.weight/_type", "parameters/net.0.weight/_type"} <= keys
    assert run.config["width"] == 24
    assert set(run.artifacts["code"]) == set(_CODE)
    stored = trainer.config.run.directory.root.rglob("0000/train.net.0.mean/*.npy")
    assert len(list(stored)) == 3
    assert _files_with(project, _TRACE) == planted
    assert _files_with(project, _SECRET, MARK) <= planted
    kept = Path(os.environ["WANDB_DATA_DIR"]).parent  # where `wandb sync` finds the code
    assert _files_with(kept, _TRACE, _SECRET, MARK) == set()
    assert len(_files_with(kept, *_CODE.values())) >= len(_CODE)
