"""What the wheels and source distributions hold."""

from __future__ import annotations

import configparser
import hashlib
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = [pytest.mark.packaging, pytest.mark.slow]

REPOSITORY = Path(__file__).parents[2]
PACKAGES = sorted(p.parent for p in REPOSITORY.glob("packages/*/pyproject.toml"))
every_package = pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
FAMILIES = sorted(p.name for p in PACKAGES if p.name != "nshtrainer-core")


def project(package: Path) -> dict[str, Any]:
    return tomllib.loads((package / "pyproject.toml").read_text())


def imports(package: Path) -> set[str]:
    """The import packages in the source tree."""
    return {p.name for p in (package / "src").iterdir() if (p / "__init__.py").is_file()}


def open_wheel(wheels: Path, package: Path) -> zipfile.ZipFile:
    (found,) = wheels.glob(f"{package.name.replace('-', '_')}-*.whl")
    return zipfile.ZipFile(found)


def metadata(wheel: zipfile.ZipFile) -> Message:
    (name,) = [n for n in wheel.namelist() if n.endswith(".dist-info/METADATA")]
    return Parser().parsestr(wheel.read(name).decode())


def requirements(wheel: zipfile.ZipFile) -> list[Requirement]:
    return [Requirement(text) for text in metadata(wheel).get_all("Requires-Dist", [])]


@every_package
def test_a_wheel_holds_its_import_packages_and_nothing_else(wheels, tree, package):
    """Every module of the source tree is in the wheel; tests and other files are not."""
    with open_wheel(wheels, package) as wheel:
        names = {n for n in wheel.namelist() if not n.endswith("/")}

    source = tree / "packages" / package.name / "src"
    files = {p.relative_to(source).as_posix() for p in source.rglob("*") if p.is_file()}
    assert {n for n in names if ".dist-info/" not in n} == files
    assert {n.partition("/")[0] for n in files} == imports(package)
    assert {f"{name}/py.typed" for name in imports(package)} <= names
    assert not [n for n in names if "/tests/" in n or "/test_" in n or "conftest" in n]


@every_package
def test_a_wheel_says_what_it_is(wheels, package):
    """Version, licence, README and supported Pythons are in the metadata."""
    with open_wheel(wheels, package) as wheel:
        found = metadata(wheel)

    assert found["Name"] == package.name
    assert found["Version"] == project(package)["project"]["version"]
    assert found["License-Expression"] == "MIT"
    assert found["Requires-Python"] == ">=3.10"
    assert found.get_payload().strip() == (package / "README.md").read_text().strip()
    assert package.name in found.get_payload()


@every_package
def test_a_wheel_has_the_entry_points_of_its_project(wheels, package):
    """What makes a package a plugin reaches who installs it, and names classes that exist."""
    parser = configparser.ConfigParser(delimiters="=")
    parser.optionxform = str
    with open_wheel(wheels, package) as wheel:
        names = wheel.namelist()
        (file,) = [n for n in names if n.endswith(".dist-info/entry_points.txt")]
        parser.read_string(wheel.read(file).decode())
    declared = project(package)["project"]

    found = {section: dict(parser[section]) for section in parser.sections()}
    assert found.pop("console_scripts", {}) == declared.get("scripts", {})
    assert found == declared["entry-points"]
    for group in declared["entry-points"].values():
        for value in group.values():
            module = value.partition(":")[0].replace(".", "/")
            assert {f"{module}.py", f"{module}/__init__.py"} & set(names), value


@every_package
def test_every_requirement_has_bounds(wheels, package):
    """Third parties have a lower bound; our own packages fit only the same release series."""
    with open_wheel(wheels, package) as wheel:
        found = requirements(wheel)
    major, minor = project(package)["project"]["version"].split(".")[:2]
    series = {f">={major}.{minor}", f"<{major}.{int(minor) + 1}"}

    for requirement in found:
        bounds = {str(s) for s in requirement.specifier}
        if requirement.name in {p.name for p in PACKAGES}:
            assert bounds == series or requirement.extras, requirement
        else:
            assert any(b.startswith(">=") for b in bounds), requirement
    needed = {r.name for r in found if r.marker is None}
    assert ("nshtrainer-core" in needed) is (package.name != "nshtrainer-core")
    assert not needed & set(FAMILIES)


def test_the_extras_of_the_core_bring_the_families(wheels):
    """There is an extra for each family, and `all` is all of them."""
    with open_wheel(wheels, REPOSITORY / "packages" / "nshtrainer-core") as wheel:
        found = requirements(wheel)

    def of(extra: str) -> list[Requirement]:
        return [r for r in found if r.marker and r.marker.evaluate({"extra": extra})]

    short = [name.removeprefix("nshtrainer-") for name in FAMILIES]
    for extra, family in zip(short, FAMILIES, strict=True):
        assert family in {r.name for r in of(extra)}
    (all_of_them,) = [r for r in of("all") if r.name == "nshtrainer-core"]
    assert all_of_them.extras == set(short)


@every_package
def test_a_source_distribution_builds_the_same_wheel(wheels, direct_wheels, package):
    """The wheel made from the source distribution is, file by file, that of the source tree."""
    assert len(list(wheels.glob(f"{package.name.replace('-', '_')}-*.tar.gz"))) == 1

    contents = []
    for folder in (wheels, direct_wheels):
        with open_wheel(folder, package) as wheel:
            contents.append({n: hashlib.sha256(wheel.read(n)).digest() for n in wheel.namelist()})
    assert contents[0] == contents[1]
