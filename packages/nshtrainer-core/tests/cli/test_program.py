"""The program as a whole: starting it, its list of commands, and commands of plugins."""

from __future__ import annotations

import errno
import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from nshtrainer.cli.app import COMMANDS, app
from nshtrainer_cli.streams import with_output

HOOKS = """
import click
from nshtrainer import hookimpl

@hookimpl
def nshtrainer_cli(app):
    @app.command()
    def greet():
        '''Say hello.'''
        click.echo("hello from acme")

    @app.command()
    def validate():
        click.echo("shadowed")
"""
ENTRY = "[nshtrainer.plugins]\nacme = acme_hooks\n"


@pytest.mark.parametrize(
    "args", [("--help",), ("--version",), ("plugins",), ("schema",), ("config",), ("doctor",)]
)
def test_no_command_needs_torch_to_start(site, args):
    """Help, listing, schema, config and doctor run without torch, Lightning, NumPy or wandb."""
    imported = site.imported_by(*args)

    assert not imported & {"torch", "lightning", "numpy", "wandb"}


def test_a_command_imports_only_its_own_module(site):
    """What one command needs is not loaded for another."""
    imported = site.imported_by("plugins")

    assert "nshtrainer.cli.plugins" in imported
    assert not imported & {"nshtrainer.cli.schema", "nshtrainer.cli.config", "nshtrainer.demo"}


@pytest.mark.parametrize("args", [("--help",), ("plugins",), ("doctor",)])
def test_callback_plugins_are_not_imported_to_be_listed(site, args):
    """Help, `plugins` and `doctor` import no callback plugin, so a broken one cannot stop them."""
    site.callback("acme", "acme")

    assert "acme" not in site.imported_by(*args)


def test_doctor_needs_only_the_standard_library(site):
    """`doctor` imports neither nshtrainer nor anything that it depends on."""
    imported = site.imported_by("doctor")

    assert "nshtrainer_cli.doctor" in imported
    assert not imported & {"nshtrainer", "pydantic", "click", "pluggy", "importlib_metadata"}


def test_malformed_metadata_leads_to_doctor(site):
    """Where pydantic cannot define a model, one line says to run `doctor`; no traceback."""
    site.distribution("sinner", "[console_scripts]\nthis is no entry point\n")

    done = site.run("plugins")

    assert done.returncode == 1
    assert "run `nshtrainer doctor`" in done.stderr
    assert "Traceback" not in done.stderr


def test_version_is_that_of_the_core(site):
    """`--version` names the installed version."""
    version = importlib.metadata.version("nshtrainer-core")

    assert site.run("--version").stdout.strip() == f"nshtrainer {version}"


def test_help_lists_every_command():
    """Each command stands in the help with one line."""
    result = CliRunner().invoke(app, ["--help"])

    assert result.exit_code == 0
    for name, (_, line) in COMMANDS.items():
        assert name in result.output
        assert line in result.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_listed_command_has_help_of_its_own(name):
    """What the list promises can be loaded, and explains itself."""
    result = CliRunner().invoke(app, [name, "--help"])

    assert result.exit_code == 0
    assert "usage" in result.output.lower()


def test_misspelt_command_names_the_nearest():
    """A misspelt command is an error that suggests the right one."""
    result = CliRunner().invoke(app, ["valdate"])

    assert result.exit_code == 2
    assert "no command is named 'valdate'; did you mean 'validate'?" in result.output


def test_plugins_add_commands(site):
    """A command from the hook `nshtrainer_cli` is listed and runs."""
    site.distribution("acme", ENTRY, {"acme_hooks": HOOKS})

    assert re.search(r"greet +Say hello\.", site.run("--help").stdout)
    done = site.run("greet")
    assert (done.returncode, done.stdout) == (0, "hello from acme\n")


def test_plugins_cannot_shadow_core_commands(site):
    """A plugin's command with the name of a core command is left out, with a warning."""
    site.distribution("acme", ENTRY, {"acme_hooks": HOOKS})
    (site.cwd / "run.yaml").write_text("debug: true\n")

    done = site.run("validate", "run.yaml")
    assert done.stdout.startswith("ok: ")
    listed = site.run("--help")
    assert listed.stdout.count("validate") == 1
    assert "'validate' of acme is left out: nshtrainer-core has one of that name" in listed.stderr


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError('boom')",
        "import sys; sys.exit(3)",
        HOOKS + "    raise RuntimeError('boom')",
    ],
    ids=["import", "exit", "call"],
)
@pytest.mark.parametrize("strict", ["0", "1"])
def test_broken_plugin_does_not_break_help(site, source, strict):
    """Help is complete, exits with 0 and shows no traceback, whatever a plugin does."""
    site.distribution("acme", ENTRY, {"acme_hooks": source})

    done = site.run("--help", NSHTRAINER_PLUGINS_STRICT=strict)

    assert done.returncode == 0
    assert all(name in done.stdout for name in COMMANDS)
    assert "greet" not in done.stdout
    assert "acme" in done.stderr
    assert "Traceback" not in done.stderr


def test_commands_of_one_plugin_survive_another(site):
    """Beside a broken plugin the commands of a good one work."""
    site.distribution("acme", ENTRY, {"acme_hooks": HOOKS})
    site.distribution("a-bad", "[nshtrainer.plugins]\na_bad = a_bad\n", {"a_bad": "1 / 0"})

    done = site.run("greet")

    assert (done.returncode, done.stdout) == (0, "hello from acme\n")
    assert "a-bad" in done.stderr


def redirected(site, redirection, *args):
    """Run `nshtrainer ARGS` from a shell that redirects its streams."""
    (site.cwd / "good.yaml").write_text("seed: 1\n")
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -m nshtrainer_cli "$@" {redirection}', sys.executable, *args],
        cwd=site.cwd, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


LOST = {">&-": "it is closed", ">/dev/full": "No space left on device"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("redirection", LOST)
@pytest.mark.parametrize(
    "args",
    [("doctor",), ("doctor", "--help"), ("plugins",), ("schema",), ("validate", "good.yaml")],
    ids=" ".join,
)
def test_lost_output_is_one_line_and_a_status(site, args, redirection):
    """Where stdout takes nothing, stderr says so in one line and the status is 1; no traceback."""
    done = redirected(site, redirection, *args)

    assert done.returncode == 1
    assert done.stderr == (
        f"Error: stdout cannot be written to: {LOST[redirection]}; send the output elsewhere\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("redirection", [">&- 2>&-", "2>/dev/full >&2"])
def test_lost_output_without_anywhere_to_say_so_is_a_status(site, redirection):
    """Where stderr takes nothing either, the status alone tells."""
    done = redirected(site, redirection, "doctor")

    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_a_closed_stdout_is_no_fault_where_nothing_is_printed(site):
    """A command that writes a file needs no stdout."""
    done = redirected(site, ">&-", "config", "--out", "new.yaml")

    assert done.returncode == 0, done.stderr
    assert (site.cwd / "new.yaml").is_file()


def test_a_reader_that_has_seen_enough_is_no_fault(site):
    """In `nshtrainer ... | head` nothing is said about the closed pipe."""
    done = redirected(site, "| head -c 1", "schema")

    assert (done.stdout, done.stderr) == ("{", "")


def test_other_errors_are_not_blamed_on_stdout():
    """An error about another file passes as it is."""

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "checkpoint")

    with pytest.raises(OSError, match="checkpoint"):
        with_output(fail)
