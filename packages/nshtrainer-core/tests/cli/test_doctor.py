"""`nshtrainer doctor`: it runs where nothing else does, and names what is wrong."""

from __future__ import annotations

import json

import pytest

from nshtrainer_cli import doctor
from nshtrainer_cli.doctor.finding import Finding, worst
from nshtrainer_cli.doctor.importing import importers, parse_import_times
from nshtrainer_cli.doctor.installed import installed
from nshtrainer_cli.doctor.metadata import check_metadata
from nshtrainer_cli.doctor.plugins import check_plugins
from nshtrainer_cli.doctor.surroundings import check_log_folder, check_switches
from nshtrainer_cli.doctor.versions import check_versions, meets

CORE = (
    "Metadata-Version: 2.1\nName: nshtrainer-core\nVersion: 0.3.0\nRequires-Python: >=3.10\n"
    "Requires-Dist: torch>=2.5\n"
    "Requires-Dist: tomli>=2.0 ; python_full_version < '3.11'\n"
    "Requires-Dist: nshtrainer-ema>=0.3,<0.4 ; extra == 'ema'\n"
    "Requires-Dist: nshtrainer-wandb>=0.3,<0.4 ; extra == 'wandb'\n\nVersion: not a header\n"
)


def found(site):
    return installed([str(site.folder)])


def faults(findings):
    """Everything that is not in order, as one text for each."""
    return [f"{f.status}: {f.what} | {f.why} | {f.do}" for f in findings if f.status != "ok"]


def core(site, **versions):
    """Install the metadata of a core 0.3.0 and of *versions*."""
    site.distribution("nshtrainer-core", metadata=CORE, version="0.3.0")
    for name, version in versions.items():
        site.distribution(name.replace("_", "-"), version=version)


# ---- as a program ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[console_scripts]\nno equals sign\n", "line 2 is 'no equals sign'"),
        (b"[console_scripts]\nx = \xff:y\n", "is not UTF-8 (byte 22)"),
    ],
    ids=["syntax", "encoding"],
)
def test_doctor_names_who_breaks_everything(site, content, said):
    """One malformed entry_points.txt stops pydantic, not doctor, which names file and remedy."""
    info = site.distribution("sinner")
    (info / "entry_points.txt").write_bytes(content)

    done = site.run("doctor", "--json")

    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["status"] == "fail"
    failed = {f["check"]: f for f in report["findings"] if f["status"] == "fail"}
    assert said in failed["metadata"]["what"]
    assert str(info) in failed["metadata"]["what"]
    assert "uninstall sinner" in failed["metadata"]["do"]
    assert "`import nshtrainer` fails" in failed["import"]["what"]
    assert site.run("plugins").returncode == 1  # and it is true that nothing else works


def test_text_puts_failures_first_and_counts(site):
    """For people, what failed comes first with why and what to do; the last line counts."""
    site.distribution("sinner", "[console_scripts]\nno equals sign\n")

    lines = site.run("doctor").stdout.splitlines()

    assert lines[0].startswith("FAIL")
    assert lines[1].strip().startswith("why:")
    assert lines[2].strip().startswith("do:")
    assert " failed, " in lines[-1]


@pytest.mark.slow
def test_deep_names_who_imports_torch(site):
    """`--deep` names the module that loads torch at config time, and clears the others."""
    site.callback("acme", "acme")
    site.callback("heavy", "heavy")
    (site.folder / "heavy.py").write_text(
        "import torch_user\n" + (site.folder / "heavy.py").read_text()
    )
    (site.folder / "torch_user.py").write_text("import torch\n")
    (site.folder / "torch.py").write_text("")  # as heavy as need be

    report = json.loads(site.run("doctor", "--deep", "--json").stdout)

    said = {f["what"]: f["status"] for f in report["findings"] if f["check"] == "config time"}
    assert any(
        w.startswith("heavy (heavy 1.0) imports torch") and s == "warn" for w, s in said.items()
    )
    assert any(w.startswith("acme 1.0:") and s == "ok" for w, s in said.items())
    assert any(w.startswith("nshtrainer-core ") and s == "ok" for w, s in said.items())


@pytest.mark.slow
def test_deep_finds_what_cannot_be_imported(site):
    """`--deep` reports a plugin whose module fails, with its last word."""
    entry = "[nshtrainer.callbacks]\nbad = bad:Config\n"
    site.distribution("bad", entry, {"bad": "class Config: pass\nraise RuntimeError('boom')"})

    done = site.run("doctor", "--deep", "--json")

    assert done.returncode == 1
    said = [f["what"] for f in json.loads(done.stdout)["findings"] if f["status"] == "fail"]
    assert "bad 1.0 cannot be imported: RuntimeError: boom" in said


def test_a_look_that_fails_does_not_end_the_examination(monkeypatch):
    """Should a check itself break, the others still report (a fault put in by hand)."""

    def breaks(found):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(doctor, "check_versions", breaks)

    findings = doctor.examine()

    assert any(f.check == "versions" and "ZeroDivisionError: oops" in f.what for f in findings)
    assert {"metadata", "plugins", "switches", "import"} <= {f.check for f in findings}


# ---- metadata ----------------------------------------------------------------------------------


def test_good_metadata_is_in_order(site):
    """Well-formed distributions, comments and blank lines included, are no findings."""
    core(site)
    site.distribution("acme", "# a comment\n\n[console_scripts]\nx = a.b:c [extra]\n[empty]\n")

    assert faults(f for f in check_metadata(found(site)) if f.check == "metadata") == []


def test_leftover_folder_of_ours_is_a_failure(site):
    """An empty folder that hides one of our distributions fails; a stranger's is a warning."""
    core(site)
    for name in ("nshtrainer_ema", "stranger"):
        (site.folder / f"{name}-0.3.0.dist-info").mkdir()

    said = faults(check_metadata(found(site)))

    assert any(
        s.startswith("fail") and "nshtrainer_ema-0.3.0.dist-info is an empty" in s for s in said
    )
    assert any(s.startswith("warn") and "stranger-0.3.0.dist-info is an empty" in s for s in said)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [("Metadata-Version: 2.1\n", "no name and no version"), ("Name: acme\n", "has no version")],
)
def test_incomplete_metadata_is_found(site, metadata, said):
    """METADATA without name or version is named."""
    site.distribution("acme", metadata=metadata)

    assert any(said in s and "acme-1.0.dist-info" in s for s in faults(check_metadata(found(site))))


def test_two_versions_in_one_folder_are_a_failure(site, tmp_path):
    """Twice in one folder is chance and fails; in two folders the first counts, a warning."""
    core(site, nshtrainer_ema="0.3.0")
    site.distribution("nshtrainer-ema", version="0.2.0")
    one_folder = faults(check_metadata(found(site)))
    (tmp_path / "later").mkdir()
    (site.folder / "nshtrainer_ema-0.2.0.dist-info").rename(
        tmp_path / "later" / "nshtrainer_ema-0.2.0.dist-info"
    )

    two_folders = faults(check_metadata(installed([str(site.folder), str(tmp_path / "later")])))

    assert any(s.startswith("fail") and "nshtrainer-ema is there 2 times" in s for s in one_folder)
    assert any(s.startswith("warn") and "which is 0.3.0" in s for s in two_folders)


def test_monolith_beside_the_core_is_a_failure(site):
    """A distribution `nshtrainer` owns the core's folder: both commands are given."""
    core(site, nshtrainer="1.5.4")

    said = faults(check_metadata(found(site)))

    assert any("pip uninstall nshtrainer, then pip install --force-reinstall" in s for s in said)


def test_shadowed_package_is_a_failure(site):
    """A file in the way of the real package is named."""
    (site.folder / "nshtrainer.py").write_text("")

    done = site.run("doctor", "--json")

    failed = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "package"]
    assert failed[0]["status"] == "fail"
    assert str(site.folder / "nshtrainer.py") in failed[0]["what"]


def test_odd_values_are_found(site):
    """An entry point that is not `module:object` fails in our groups and warns in others."""
    site.distribution("acme", "[nshtrainer.callbacks]\nx = a b c\n[others]\ny = a-b\n")

    said = faults(check_metadata(found(site)))

    assert any(s.startswith("fail") and "'a b c'" in s for s in said)
    assert any(s.startswith("warn") and "'a-b'" in s for s in said)


# ---- versions ----------------------------------------------------------------------------------


def test_matching_versions_are_in_order(site):
    """Requirements met and families in lockstep are no findings; absent families are named."""
    core(site, torch="2.15.0+cpu", nshtrainer_ema="0.3.0")

    findings = list(check_versions(found(site)))

    assert faults(findings) == []
    assert any("not installed: nshtrainer-wandb" in f.what for f in findings)


@pytest.mark.parametrize(
    ("versions", "said"),
    [
        ({}, "fail: torch is not installed"),
        ({"torch": "2.4.1"}, "fail: torch 2.4.1 is installed"),
        (
            {"torch": "2.5", "nshtrainer_ema": "0.2.9"},
            "fail: nshtrainer-ema 0.2.9 is installed beside",
        ),
        (
            {"torch": "2.5", "nshtrainer_ema": "0.4.0"},
            "fail: nshtrainer-ema 0.4.0 is installed beside",
        ),
        (
            {"torch": "2.5", "nshtrainer_ema": "0.3.1"},
            "warn: nshtrainer-ema 0.3.1 is installed beside",
        ),
    ],
)
def test_versions_that_do_not_go_together_are_found(site, versions, said):
    """Missing or old requirements and families out of step are named with a command."""
    core(site, **versions)

    (fault,) = faults(check_versions(found(site)))

    assert fault.startswith(said)
    assert "pip install" in fault


def test_family_made_for_another_core_is_found(site):
    """A family's own requirement on the core counts too."""
    core(site, torch="2.5")
    site.distribution(
        "nshtrainer-ema", version="0.3.5",
        metadata="Name: nshtrainer-ema\nVersion: 0.3.5\nRequires-Dist: nshtrainer-core>=0.3.5,<0.4\n",
    )  # fmt: skip

    (fault,) = faults(check_versions(found(site)))

    assert "nshtrainer-ema 0.3.5 was made for nshtrainer-core>=0.3.5,<0.4" in fault


@pytest.mark.parametrize(
    ("version", "wanted", "is_met"),
    [
        ("2.10", ">=2.9", True), ("2.9", ">=2.10", False), ("1.0", "==1", True),
        ("1.0.1", "==1", False), ("2.0", "<2", False), ("1.9.9", ">1,<2", True),
        ("3.1", "<=3.1.0", True), ("1.0", "", True), ("odd", ">=1", True), ("1.5", "~=2.0", True),
    ],
)  # fmt: skip
def test_versions_compare_by_number(version, wanted, is_met):
    """Ranges are compared as numbers; what cannot be compared counts as met."""
    assert meets(version, wanted) is is_met


# ---- plugins -----------------------------------------------------------------------------------


def test_clash_is_a_failure_until_a_switch_settles_it(site):
    """A name of two distributions fails, unless NSHTRAINER_PREFER or a switch-off decides."""
    for dist in ("acme", "bolt"):
        site.callback(dist, "shiny")
    names = found(site)

    assert any("'shiny'" in s and "acme and by bolt" in s for s in faults(check_plugins(names, {})))
    for switch in (
        {"NSHTRAINER_PREFER": "shiny=bolt"},
        {"NSHTRAINER_DISABLE_PLUGINS": "acme"},
        {"NSHTRAINER_PLUGINS": "bolt"},
    ):
        assert not any("provided by" in s for s in faults(check_plugins(names, switch)))


def test_ill_formed_names_and_unknown_groups_are_found(site):
    """A name that no config can use fails; a misspelt group is a warning that lists ours."""
    site.distribution(
        "acme", "[nshtrainer.callbacks]\nMy-Name = os:path\n[nshtrainer.callback]\nx = os\n"
    )

    said = faults(check_plugins(found(site), {}))

    assert any(s.startswith("fail") and "'My-Name'" in s for s in said)
    assert any(s.startswith("warn") and "'nshtrainer.callback'" in s for s in said)


def test_targets_are_looked_up_without_an_import(site, monkeypatch):
    """Missing modules and objects are found though the packages above them would blow up."""
    monkeypatch.syspath_prepend(str(site.folder))
    site.distribution(
        "acme",
        "[nshtrainer.callbacks]\n"
        "gone = acme_pkg.gone:Config\nrenamed = acme_pkg.here:Old\nfine = acme_pkg.here:New\n"
        "star = acme_pkg.star:Whatever\n",
        {
            "acme_pkg.__init__": "raise SystemExit(5)",
            "acme_pkg.here": "class New: pass",
            "acme_pkg.star": "from acme_pkg.here import *",
        },
    )

    said = faults(check_plugins(found(site), {}))

    assert len(said) == 2
    assert any("'gone' of acme 1.0 names the module 'acme_pkg.gone'" in s for s in said)
    assert any("has no 'Old'" in s and "reinstall acme" in s for s in said)


# ---- surroundings ------------------------------------------------------------------------------


def test_switches_in_force_are_told(site):
    """Each switch that is set is shown with what it means."""
    core(site)
    environ = {
        "NSHTRAINER_PLUGINS_STRICT": "1",
        "NSHTRAINER_PLUGINS": "",
        "PYDANTIC_DISABLE_PLUGINS": "1",
    }

    findings = list(check_switches(found(site), environ))

    assert faults(findings) == []
    assert {f.what.partition("=")[0] for f in findings} == set(environ)


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("NSHTRAINER_DISABLE_PLUGINS", "acmee", "warn: NSHTRAINER_DISABLE_PLUGINS names 'acmee'"),
        ("NSHTRAINER_PLUGINS", "shinny", "did you mean 'shiny'?"),
        ("NSHTRAINER_PREFER", "shiny", "`name=distribution` is expected"),
        ("NSHTRAINER_PREFER", "other=acme", "no effect"),
        ("NSHTRAINER_CALLBACKS", "/no/such/file.yaml", "fail: NSHTRAINER_CALLBACKS"),
    ],
)
def test_switches_without_effect_are_found(site, variable, value, said):
    """A switch that names what is not there is pointed out."""
    site.callback("acme", "shiny")

    assert any(said in s for s in faults(check_switches(found(site), {variable: value})))


def test_log_folder_that_cannot_be_written_is_a_failure(tmp_path, monkeypatch):
    """Where a run cannot write, doctor says so; where it can, it leaves nothing behind."""
    monkeypatch.chdir(tmp_path)
    writable = faults(f for f in check_log_folder() if f.status == "fail")
    left = list(tmp_path.iterdir())
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()

    assert (writable, left) == ([], [])
    assert any(s.startswith("fail") for s in faults(check_log_folder()))


# ---- the parts ---------------------------------------------------------------------------------


def test_import_times_tell_who_imported_whom():
    """The importers of a module are found by indentation, nearest first."""
    lines = parse_import_times(
        "import time: self [us] | cumulative | imported package\n"
        "import time:       100 |        100 |     torch\n"
        "import time:        10 |        110 |   acme.tools\n"
        "import time:         5 |          5 |   acme.other\n"
        "import time:         1 |        116 | acme\n"
        "import time:         1 |          1 | unrelated\n"
    )

    assert importers(lines, "torch") == ["acme.tools", "acme"]
    assert importers(lines, "numpy") is None


def test_worst_status_wins():
    """One failure makes the whole a failure, a warning does not."""
    ok, warn, fail = (Finding("x", status, "") for status in ("ok", "warn", "fail"))

    assert [worst(x) for x in ([], [ok], [ok, warn], [warn, fail, ok])] == [
        "ok",
        "ok",
        "warn",
        "fail",
    ]
