"""The example of a third party's plugin, installed from its folder as a user would."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "examples" / "nshtrainer-hello"
TUTORIAL = REPOSITORY / "docs" / "writing-a-plugin.md"


@pytest.fixture
def plugin(environment) -> Path:
    """A copy of the example's folder, which is installed."""
    folder = environment.work / "nshtrainer-hello"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".*"))
    environment.install(folder)
    return folder


def test_the_plugin_is_found_and_used_by_name(environment, plugin):
    """It is listed with its hooks, and a file can use its callback."""
    file = environment.file("run.yaml", "callbacks:\n- {name: hello, every_n_epochs: 2}\n")

    plugins = environment.run("nshtrainer", "plugins", "--load")

    assert "nshtrainer-hello 0.1.0" in plugins
    assert "implements nshtrainer_default_callbacks, nshtrainer_run_metadata" in plugins
    assert "0 of them with a fault" in plugins
    assert "1 callback (hello)" in environment.run("nshtrainer", "validate", file)
    code = "from nshtrainer.configs import HelloCallbackConfig as C; print(C().greeting)"
    assert environment.python(code).strip() == "Hello"


def test_an_option_of_the_plugin_is_checked(environment, plugin):
    """A third party's option is checked with file, line and field like one of our own."""
    file = environment.file("run.yaml", "callbacks:\n- {name: hello, every_n_epochs: 0}\n")

    output = environment.run("nshtrainer", "validate", file, check=False)

    assert "every_n_epochs" in output
    assert "greater than" in output


def test_the_plugin_passes_its_own_tests(environment, plugin):
    """Its tests, the whole contract among them, pass with what is installed here."""
    environment.install("pytest", "pytest-timeout")

    output = environment.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", plugin / "tests"
    )

    assert " passed" in output
    assert "skipped" not in output


def test_uninstalling_the_plugin_leaves_the_rest(environment, plugin):
    """Without it, its name is unknown, and everything else works as before."""
    environment.uninstall("nshtrainer-hello")
    environment.file("run.yaml", "callbacks:\n- name: hello\n")
    environment.file("plain.yaml", "max_epochs: 1\n")

    output = environment.run("nshtrainer", "validate", "run.yaml", check=False)

    assert "no callback is named 'hello'" in output
    assert environment.run("nshtrainer", "validate", "plain.yaml").startswith("ok")
    assert "nshtrainer-hello" not in environment.run("nshtrainer", "plugins")


def steps_of_tutorial() -> list[dict[str, str]]:
    """For each numbered step of the tutorial, the files that it shows: path -> text."""
    named = re.compile(
        r"`((?:src/\w+|tests)/\w+\.py|pyproject\.toml)`|^```(?:python|toml)\n(.*?)^```", re.S | re.M
    )
    steps: list[dict[str, str]] = []
    for section in re.split(r"^## (?=\d)", TUTORIAL.read_text(encoding="utf-8"), flags=re.M)[1:]:
        name, files = "", dict[str, str]()
        for found in named.finditer(re.sub(r"<!---.*?-->", "", section, flags=re.S)):
            if found[1]:
                name = found[1]
            elif name:  # the first block behind a name is the file
                files[name], name = found[2], ""
        steps.append(files)
    return steps


def test_the_tutorial_followed_to_the_letter_works(environment):
    """Written into a fresh folder step by step, the plugin works wherever the tutorial looks at it."""
    folder = environment.work / "followed"

    def follow(*numbers: int) -> None:
        for number in numbers:
            for name, text in steps[number - 1].items():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        (folder / "README.md").write_text("")
        environment.install("-e", folder)

    steps = steps_of_tutorial()
    follow(2, 3, 4)
    listed = environment.run("nshtrainer", "plugins", "--load")
    assert "0 of them with a fault" in listed
    assert re.search(r"hello +loaded", listed)

    follow(6)
    assert "implements nshtrainer_default_callbacks" in environment.run(
        "nshtrainer", "plugins", "--load"
    )

    follow(7)
    environment.install("pytest", "pytest-timeout")
    output = environment.run(
        "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", folder / "tests"
    )
    assert " passed" in output
    assert "failed" not in output
