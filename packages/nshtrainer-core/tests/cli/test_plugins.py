"""`nshtrainer plugins`: what is installed, and in which state it is."""

from __future__ import annotations

import json

HOOKS = """
from nshtrainer import hookimpl

@hookimpl
def nshtrainer_run_metadata(config):
    return {}
"""


def rows(done):
    """Name -> row of the JSON report."""
    return {row["name"]: row for row in json.loads(done.stdout)["plugins"]}


def test_each_entry_is_listed_with_its_origin(site):
    """Kind, class, distribution, version, place and state are told without importing anything."""
    site.callback("acme", "shiny", version="2.5")

    done = site.run("plugins", "--json")

    row = rows(done)["shiny"]
    assert done.returncode == 0
    assert row | {"path": ""} == {
        "distribution": "acme", "version": "2.5", "kind": "callback", "name": "shiny",
        "value": "acme:Config", "path": "", "editable": False, "state": "available",
        "what": "", "remedy": "", "hooks": [],
    }  # fmt: skip
    assert row["path"] == str(site.folder)


def test_editable_install_shows_its_sources(site, tmp_path):
    """An editable install is marked, with the folder of its sources."""
    info = site.callback("acme", "shiny")
    source = tmp_path / "my sources"
    (info / "direct_url.json").write_text(
        json.dumps({"url": source.as_uri(), "dir_info": {"editable": True}})
    )

    row = rows(site.run("plugins", "--json"))["shiny"]

    assert (row["editable"], row["path"]) == (True, str(source))


def test_people_see_entries_by_distribution(site):
    """The text groups entries below their distribution, the core first."""
    site.callback("acme", "shiny")

    lines = site.run("plugins").stdout.splitlines()

    assert lines[0].startswith("nshtrainer-core ")
    at = next(i for i, line in enumerate(lines) if line.startswith("acme 1.0"))
    assert lines[at + 1].split() == ["callback", "shiny", "available", "acme:Config"]


def test_load_finds_what_is_broken(site):
    """`--load` shows the fault of a broken plugin with what to do, and exits with 1."""
    site.callback("acme", "shiny")
    entry = "[nshtrainer.callbacks]\nbad = bad:Config\n"
    site.distribution("bad", entry, {"bad": "print('noise')\nraise RuntimeError('boom')"})

    before, after = site.run("plugins", "--json"), site.run("plugins", "--json", "--load")

    assert (before.returncode, rows(before)["bad"]["state"]) == (0, "available")
    assert (after.returncode, rows(after)["bad"]["state"]) == (1, "broken")
    assert "RuntimeError: boom" in rows(after)["bad"]["what"]
    assert "uninstall bad" in rows(after)["bad"]["remedy"]
    assert rows(after)["shiny"]["state"] == "loaded"


def test_load_shows_all_in_strict_mode_too(site):
    """Strict mode does not keep `--load` from showing every broken plugin."""
    for name in ("bad_one", "bad_two"):
        entry = f"[nshtrainer.callbacks]\n{name} = {name}:Config\n"
        site.distribution(name, entry, {name: "1 / 0"})

    done = site.run("plugins", "--json", "--load", NSHTRAINER_PLUGINS_STRICT="1")

    assert done.returncode == 1
    assert {rows(done)[name]["state"] for name in ("bad_one", "bad_two")} == {"broken"}


def test_load_names_the_hooks_of_a_module(site):
    """For a hook module, `--load` names the hooks that it implements."""
    site.distribution("acme", "[nshtrainer.plugins]\nacme = acme\n", {"acme": HOOKS})

    row = rows(site.run("plugins", "--json", "--load"))["acme"]

    assert (row["kind"], row["state"], row["hooks"]) == (
        "hooks",
        "loaded",
        ["nshtrainer_run_metadata"],
    )


def test_load_is_content_with_switched_off_plugins(site):
    """What is switched off is shown as such, with the switch, and is no fault."""
    site.distribution("bad", "[nshtrainer.callbacks]\nbad = bad:Config\n", {"bad": "1 / 0"})

    done = site.run("plugins", "--json", "--load", NSHTRAINER_DISABLE_PLUGINS="bad")

    assert rows(done)["bad"]["state"] == "disabled"
    assert json.loads(done.stdout)["switches"] == {"NSHTRAINER_DISABLE_PLUGINS": "bad"}


def test_clashing_names_are_shown(site):
    """One name of two distributions is a clash that names both, loaded or not."""
    site.callback("acme", "shiny")
    site.callback("bolt", "shiny")

    done = site.run("plugins", "--json", "--load")

    clash = rows(done)["shiny"]
    assert (done.returncode, clash["state"]) == (1, "clash")
    assert "acme" in clash["what"]
    assert "bolt" in clash["what"]


def test_missing_families_have_their_command(site):
    """Each first-party family that is not installed is named with the command that installs it."""
    report = json.loads(site.run("plugins", "--json").stdout)

    have = {row["distribution"] for row in report["plugins"]}
    missing = {m["distribution"]: m["install"] for m in report["missing"]}
    families = {f"nshtrainer-{name}" for name in ("checkpoint", "ema", "monitoring", "wandb")}
    assert set(missing) == families - have
    assert all(command == f"pip install {dist}" for dist, command in missing.items())
