"""The documentation says what is: configurations, commands, options, links and fields exist.

Python blocks are run by Sybil; see the root `conftest.py`.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from nshtrainer import TrainerConfig
from nshtrainer.callbacks.from_file import callbacks_from_file
from nshtrainer.cli.app import COMMANDS, app
from nshtrainer.config_files import load_data

REPOSITORY = Path(__file__).parents[1]
PAGES = sorted(
    {
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("docs/*.md"),
        *REPOSITORY.glob("packages/*/README.md"),
        *REPOSITORY.glob("examples/**/README.md"),
    }
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
COMMANDS_OF_EXAMPLES = {"greet"}  # what a page about hooks makes up
NOT_OURS = "<!--- not a configuration -->\n"


def name_of(page: Path) -> str:
    return page.relative_to(REPOSITORY).as_posix()


def blocks(page: Path, *languages: str) -> Iterator[str]:
    """The fenced blocks of *page* in one of *languages*, without those that are marked."""
    text = re.sub(re.escape(NOT_OURS) + r"```.*?^```", "", page.read_text(), flags=re.S | re.M)
    yield from (body for language, body in FENCE.findall(text) if language in languages)


def yaml_blocks() -> list[object]:
    return [
        pytest.param(text, id=f"{name_of(page)}-{number}")
        for page in PAGES
        for number, text in enumerate(blocks(page, "yaml"))
        if "hello" not in text  # the example plugin, which is not installed here
    ]


def command_lines() -> list[list[str]]:
    """Every line of a shell block that runs `nshtrainer`, split into words."""
    lines = (
        line.removeprefix("$ ").removeprefix("uv run ")
        for page in PAGES
        for block in blocks(page, "sh", "console", "bash")
        for part in block.splitlines()
        for line in part.split("&& ")
    )
    ours = (shlex.split(line, comments=True) for line in lines if line.startswith("nshtrainer "))
    return sorted({tuple(w): w for w in ours if w[1] not in COMMANDS_OF_EXAMPLES}.values())


def help_of_doctor() -> str:
    done = subprocess.run(
        [sys.executable, "-m", "nshtrainer_cli", "doctor", "--help"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout


@pytest.mark.parametrize("text", yaml_blocks())
def test_yaml_blocks_are_valid(text, tmp_path):
    """A YAML block is a configuration, or a list of callbacks as for `NSHTRAINER_CALLBACKS`."""
    if isinstance(load_data(text, "yaml", source="block"), list):
        (tmp_path / "callbacks.yaml").write_text(text)
        assert callbacks_from_file(tmp_path / "callbacks.yaml")
    else:
        assert TrainerConfig.from_text(text)


def commands(name: str, inner: str = "") -> list[click.Command]:
    """The command, or those of the group, of this name; of a group only *inner*, if it is given."""
    found = app.get_command(click.Context(app), name)
    assert found is not None, name
    if not isinstance(found, click.Group):
        return [found]
    return [found.commands[inner]] if inner else list(found.commands.values())


def test_there_are_blocks_to_check():
    """The patterns above find something."""
    assert len(yaml_blocks()) >= 5
    assert len(command_lines()) >= 15


@pytest.mark.parametrize("words", command_lines(), ids=" ".join)
def test_commands_exist_with_their_options(words):
    """Every command line in the documentation names a command and options that there are."""
    options = [w.partition("=")[0] for w in words[2:] if w.startswith("-")]
    (found,) = commands(words[1], words[2] if len(words) > 2 else "")
    there = [o for p in found.params for o in p.opts]
    if words[1] == "doctor":  # has a parser of its own
        there = re.findall(r"--\w+", help_of_doctor())

    assert [o for o in options if o not in {*there, "--help"}] == []


@pytest.mark.parametrize(
    "command", [*sorted(set(COMMANDS) - {"doctor"}), "checkpoint", "ema", "report", "wandb"]
)
def test_every_option_is_documented(command):
    """`docs/command-line.md` has every option of every command in that command's section."""
    page = (REPOSITORY / "docs" / "command-line.md").read_text()
    section = page.partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    options = [o for c in commands(command) for p in c.params for o in p.opts if o.startswith("--")]
    assert options

    assert [o for o in options if o not in section] == []


def test_every_field_is_documented():
    """`docs/configuration.md` names every field of `TrainerConfig`."""
    page = (REPOSITORY / "docs" / "configuration.md").read_text()

    assert [f for f in TrainerConfig.model_fields if f"`{f}`" not in page] == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """Every link to a file of the repository has a target, and the anchor is one of its headings."""
    dead = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if "://" in target:
            continue
        file = page if not path else page.parent / path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            dead.append(target)

    assert dead == []


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of *page*."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h).strip().lower().replace(" ", "-") for h in headings}


def test_every_page_is_in_the_index():
    """`docs/index.md` links every page of `docs`."""
    index = (REPOSITORY / "docs" / "index.md").read_text()
    pages = {p.name for p in REPOSITORY.glob("docs/*.md")} - {"index.md"}

    assert {p for p in pages if f"({p})" not in index} == set()


def test_ci_runs_the_test_command_of_the_readme():
    """What the README tells people to run is what CI runs."""
    command = "pip install uv && uv run pytest"

    assert command in (REPOSITORY / "README.md").read_text().splitlines()
    assert command in (REPOSITORY / ".ci" / "run").read_text().splitlines()


def test_the_readme_lists_every_distribution():
    """The table of packages in the README is complete."""
    readme = (REPOSITORY / "README.md").read_text()

    assert [p.name for p in REPOSITORY.glob("packages/*/") if f"| `{p.name}` |" not in readme] == []


def test_the_tutorial_names_only_modules_that_it_has_shown():
    """At each look at the plugin, every module of its `pyproject.toml` so far has been written."""
    page = (REPOSITORY / "docs" / "writing-a-plugin.md").read_text()
    looks = [
        found.start() for found in re.finditer(r"^\$ .*nshtrainer plugins", page, re.MULTILINE)
    ]
    assert len(looks) == 2

    for look in looks:
        before = page[:look]
        project = before.rpartition("```toml\n")[2].partition("```")[0]
        modules = set(re.findall(r'"nshtrainer_hello\.(\w+)', project)) | {"__init__"}
        assert {m for m in modules if f"`src/nshtrainer_hello/{m}.py`" not in before} == set()


@pytest.mark.parametrize("file", ["__init__.py", "config.py", "callback.py", "hooks.py"])
def test_the_tutorial_shows_every_file_of_the_package(file):
    """Each file of the example's package stands in the tutorial as it is."""
    page = (REPOSITORY / "docs" / "writing-a-plugin.md").read_text()
    source = REPOSITORY / "examples" / "nshtrainer-hello" / "src" / "nshtrainer_hello" / file

    assert f"```python\n{source.read_text()}```" in page
