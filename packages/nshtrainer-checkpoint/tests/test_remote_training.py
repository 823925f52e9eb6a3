"""Training whose checkpoints lie in a store: in memory, and on a real S3 server on loopback."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
import torch
from upath import UPath

from nshtrainer.errors import ConfigError
from nshtrainer_checkpoint import BestCheckpointCallback, LastCheckpointCallback
from nshtrainer_checkpoint.links import follow
from nshtrainer_checkpoint.metadata import Record, SidecarReader, is_intact, sidecar_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before"),
]

METRIC = {"name": "val/loss", "mode": "min"}


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", pytest.param("s3", marks=pytest.mark.slow)])
def url(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[str]:
    """An empty folder in a store; temporary files lie in `tmp_path`."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "staging"))
    (tmp_path / "staging").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    if request.param == "memory":
        yield f"memory://{uuid4().hex}/run"
        return
    options = {
        "endpoint_url": request.getfixturevalue("s3_endpoint"),
        "key": "testing",
        "secret": "testing",
    }
    # What FSSPEC_S3_ENDPOINT_URL and the others set when fsspec is imported.
    monkeypatch.setitem(fsspec.config.conf, "s3", options)
    bucket = f"bucket-{uuid4().hex}"
    fsspec.filesystem("s3").mkdir(bucket)
    yield f"s3://{bucket}/run"


def records(folder: str) -> list[Record]:
    return sorted(SidecarReader().records(UPath(folder)), key=lambda r: r.step)


def callbacks(url: str, **options: Any) -> list[Any]:
    return [
        BestCheckpointCallback(metric=METRIC, dirpath=url, topk=2),
        LastCheckpointCallback(dirpath=url, topk=2, **options),
    ]


def staged(tmp_path: Path) -> list[Path]:
    return [p for p in (tmp_path / "staging").rglob("*") if p.is_file()]


@pytest.mark.parametrize("options", [{}, {"async_save": True}], ids=["sync", "async"])
def test_training_keeps_its_checkpoints_in_the_store(
    plain_fit, model, url: str, tmp_path: Path, options: dict[str, Any]
):
    """Committed whole, pruned to topk, pointed at; nothing stays on this machine."""
    trainer = plain_fit(model([0.4, 0.1, 0.3]), callbacks(url, **options), max_epochs=3)

    assert [r.step for r in records(f"{url}/last")] == [8, 12]
    assert [r.step for r in records(f"{url}/best_val_loss")] == [8, 12]
    assert all(is_intact(r) for f in ("last", "best_val_loss") for r in records(f"{url}/{f}"))
    best = follow(UPath(f"{url}/best_val_loss.ckpt"))
    assert best is not None
    assert str(best) == trainer.checkpoint_callback.best_model_path
    assert "step8" in best.name
    last = follow(UPath(f"{url}/last.ckpt"))
    assert last is not None
    assert "step12" in last.name
    assert json.loads(sidecar_of(last).read_text())["metrics"]["val/loss"] == pytest.approx(0.3)
    assert staged(tmp_path) == []
    assert not (tmp_path / "checkpoint").exists()


@pytest.mark.parametrize("source", ["last", "pointer", "file"])
def test_training_resumes_from_the_store(plain_fit, model, url: str, source: str):
    """By Lightning's name, by the documented name, by the file itself: as if never stopped."""
    straight = plain_fit(model(), [], max_epochs=3, enable_checkpointing=False)
    plain_fit(model(), callbacks(url), max_epochs=2)
    path = {"pointer": f"{url}/last.ckpt", "file": str(records(f"{url}/last")[-1].path)}

    resumed = plain_fit(model(), callbacks(url), max_epochs=3, ckpt_path=path.get(source, source))

    assert resumed.global_step == 12
    weights = straight.lightning_module.state_dict()
    for name, value in resumed.lightning_module.state_dict().items():
        assert torch.equal(value, weights[name])
    assert [r.step for r in records(f"{url}/last")][-1] == 12


def test_what_was_resumed_from_is_kept(plain_fit, model, url: str):
    """By its pointer too, which leads elsewhere after the first save."""
    plain_fit(model(), [LastCheckpointCallback(dirpath=url)], max_epochs=1)
    plain_fit(
        model(), [LastCheckpointCallback(dirpath=url)], max_epochs=3, ckpt_path=f"{url}/last.ckpt"
    )
    assert [r.step for r in records(f"{url}/last")] == [4, 12]


def test_a_damaged_one_in_the_store_is_refused_and_passed_over(plain_fit, model, url: str, caplog):
    """The error names the good one; `last` takes that."""
    plain_fit(model(), [LastCheckpointCallback(dirpath=url, topk=2)], max_epochs=2)
    good, bad = records(f"{url}/last")
    content = bytearray(bad.path.read_bytes())
    content[len(content) // 2] ^= 1
    bad.path.write_bytes(bytes(content))

    with pytest.raises(ConfigError, match="is damaged: its content differs") as caught:
        plain_fit(
            model(), [LastCheckpointCallback(dirpath=url)], max_epochs=3, ckpt_path=str(bad.path)
        )
    assert str(good.path) in str(caught.value)
    with caplog.at_level(logging.WARNING):
        trainer = plain_fit(
            model(), [LastCheckpointCallback(dirpath=url)], max_epochs=3, ckpt_path="last"
        )
    assert "is damaged" in caplog.text
    assert trainer.global_step == 12


def test_our_trainer_resumes_by_itself(fit, model, url: str):
    """`ckpt_path="auto"` with a store in the configuration: nothing there, then the newest."""
    saving = {"checkpoint_callbacks": [{"name": "last_checkpoint", "dirpath": url}]}
    fit(model(), checkpoint_saving=saving, ckpt_path="auto", max_epochs=1)
    trainer = fit(model(), checkpoint_saving=saving, ckpt_path="auto", max_epochs=2)
    assert trainer.global_step == 8
    assert [r.step for r in records(f"{url}/last")] == [4, 8]  # what was resumed from stays


@pytest.mark.slow
def test_a_store_that_cannot_be_reached_stops_the_run_before_it_starts(tmp_path: Path):
    """Nobody listens at that port: told before the first step, by the name of the place."""
    script = (
        "import sys, lightning.pytorch as pl\n"
        "from nshtrainer_checkpoint import LastCheckpointCallback\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "class Model(BoringModel):\n"
        "    def training_step(self, *a):\n"
        "        print('TRAINED'); return super().training_step(*a)\n"
        "pl.Trainer(max_steps=1, accelerator='cpu', logger=False, default_root_dir=sys.argv[1],\n"
        "    callbacks=[LastCheckpointCallback(dirpath='s3://bucket/run')]).fit(Model())\n"
    )
    environment = {
        **os.environ,
        "FSSPEC_S3_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_MAX_ATTEMPTS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, str(tmp_path)],
        check=False, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "TRAINED" not in done.stdout
    assert "s3://bucket/run" in done.stderr.splitlines()[-1], done.stderr
