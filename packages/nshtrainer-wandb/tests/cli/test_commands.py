from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from nshtrainer.cli import app


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app.app, ["wandb", "code", *map(str, arguments)])


@pytest.fixture
def code(project: Path) -> Path:
    """A folder with code, a secret and data."""
    (project / "pkg").mkdir()
    (project / "pkg" / "train.py").write_text("x = 1\n")
    (project / "secrets.toml").write_text("a = 1\n")
    (project / "big.py").write_text("#" * 2000)
    return project


def test_listing_names_what_goes_up_and_what_stays(code: Path):
    """Sizes and paths for people, then what is left out and why; secrets are marked."""
    result = _run()

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert "    6  pkg/train.py" in lines
    assert "  ! secrets.toml: its name is that of a secret" in lines
    assert lines[-1] == f"2 files, 2.0 kB, from {code}; 1 left out, 1 of them as secrets (!)"


def test_json_is_for_programs(code: Path):
    """The same, with every fact in a field of its own."""
    report = json.loads(_run("--json", code).stdout)

    assert report == {
        "root": str(code),
        "size_bytes": 2006,
        "files": [
            {"path": "big.py", "size_bytes": 2000},
            {"path": "pkg/train.py", "size_bytes": 6},
        ],
        "left_out": [
            {"path": "secrets.toml", "reason": "its name is that of a secret", "is_secret": True}
        ],
    }


@pytest.mark.parametrize(
    "text",
    [
        "loggers: [{name: wandb, log_code: {directory: pkg, exclude: [x*], max_file_bytes: 1000}}]",
        "{loggers: [{name: wandb}], callbacks: [{name: wandb_upload_code, directory: pkg}]}",
    ],
)
def test_configuration_of_a_run_is_used(code: Path, text: str):
    """Its folder, patterns and sizes are those that the run will use, wherever they stand."""
    (code / "run.yaml").write_text(text)

    report = json.loads(_run("--config", "run.yaml", "--json").stdout)

    assert [f["path"] for f in report["files"]] == ["train.py"]


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("loggers: []", "no logger `wandb`"),
        ("loggers: [{name: wandb, log_code: null}]", "`log_code: null`"),
    ],
)
def test_run_that_uploads_nothing_is_said_to(code: Path, text: str, missing: str):
    """An empty list would look like a mistake in the patterns."""
    (code / "run.yaml").write_text(text)

    result = _run("--config", "run.yaml")

    assert result.exit_code == 1
    assert missing in result.stderr


def test_neither_torch_nor_wandb_is_imported(code: Path):
    """The listing is there at once."""
    program = (
        "import sys\nfrom nshtrainer.cli import main\n"
        "try: main(['wandb', 'code'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'lightning', 'wandb', 'numpy', 'nshutils'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout.splitlines()[-1] == "[]"
