from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nshtrainer_checkpoint import LastCheckpointCallback
from nshtrainer_checkpoint.metadata import SidecarReader, sidecar_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # one process is the point
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # Lightning 2.6, torch 2.15
    pytest.mark.filterwarnings("ignore:.*multiple `ModelCheckpoint` callbacks"),  # ours is first
]


def sidecar_in(folder: Path) -> dict[str, Any]:
    (record,) = SidecarReader().records(folder)
    return json.loads(sidecar_of(record.path).read_text())


def test_a_sidecar_says_what_made_the_checkpoint(fit, model, folder: Path):
    """Run, place in training, metrics, configuration, plugins, surroundings and checksum."""
    fit(model(), max_epochs=1, name=["a", "b"], project="p", tags=["t"])
    data = sidecar_in(folder / "last")

    assert (data["run_id"], data["name"], data["project"]) == ("r", "a b", "p")
    assert (data["epoch"], data["global_step"]) == (0, 4)
    assert data["training_time_s"] > 0
    assert "val/loss" in data["metrics"]
    assert data["trainer_config"]["tags"] == ["t"]
    assert data["plugins"]["nshtrainer-checkpoint"]
    assert {"python", "packages", "git", "hardware", "command_line"} <= data["environment"].keys()
    assert len(data["checkpoint_checksum"]) == 64
    assert len(json.dumps(data)) < 20_000


def test_a_sidecar_holds_no_secrets(fit, model, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither those in the configuration nor those on the command line."""
    monkeypatch.setattr(sys, "argv", ["train.py", "--api-key=sk-abcdef1234567890"])
    fit(model(), max_epochs=1, meta={"wandb_api_key": "sk-0987654321fedcba"})
    text = json.dumps(sidecar_in(folder / "last"))

    assert "sk-abcdef1234567890" not in text
    assert "sk-0987654321fedcba" not in text


def test_a_plain_trainer_has_plugins_and_surroundings_too(plain_fit, model, tmp_path: Path):
    """There is no configuration there, but all else is known."""
    plain_fit(model(), [LastCheckpointCallback()], max_epochs=1)
    data = sidecar_in(tmp_path / "checkpoint" / "last")

    assert "trainer_config" not in data
    assert data["plugins"]["nshtrainer-core"]
    assert "python" in data["environment"]


def test_sidecars_are_read_without_torch(fit, model, folder: Path):
    """A program that looks at a thousand runs must not wait for torch a thousand times."""
    fit(model(), max_epochs=1)
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from nshtrainer_checkpoint.metadata import SidecarReader\n"
        "(record,) = SidecarReader().records(Path(sys.argv[1]))\n"
        "assert record.step == 4\n"
        "assert not {'torch', 'lightning'} & sys.modules.keys()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder / "last")], check=True)
