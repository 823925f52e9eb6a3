"""What holds for the whole workspace: arrows, names, documentation, releases."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nshtrainer import hookspecs
from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.field_docs import field_docs
from nshtrainer.loggers.base import LoggerConfigBase, logger_registry
from nshtrainer.plugins import catalogue
from nshtrainer.runtime import events

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPOSITORY = Path(__file__).parents[1]
PACKAGES = {p.parent.name: p.parent for p in sorted(REPOSITORY.glob("packages/*/pyproject.toml"))}
SATELLITES = {name.replace("-", "_") for name in PACKAGES if name != catalogue.CORE}
MAX_LINES = 500
CLASSES = {
    name: (dist, cls)
    for table in (catalogue.CALLBACKS, catalogue.LOGGERS)
    for name, (dist, cls) in table.items()
}
EXAMPLE = REPOSITORY / "examples" / "nshtrainer-hello"


def project(dist: str) -> dict[str, Any]:
    return tomllib.loads((PACKAGES[dist] / "pyproject.toml").read_text())["project"]


def sources(dist: str) -> list[Path]:
    return sorted((PACKAGES[dist] / "src").rglob("*.py"))


def import_packages() -> list[str]:
    found = {f.parent.name for d in PACKAGES.values() for f in d.glob("src/*/__init__.py")}
    return sorted(found)


def modules() -> list[str]:
    """Every module of every package, `__main__` apart."""
    found: list[str] = []
    for top in import_packages():
        package = importlib.import_module(top)
        walked = pkgutil.walk_packages(package.__path__, f"{top}.")
        found += [top, *(m.name for m in walked if not m.name.endswith("__main__"))]
    return found


def registered() -> list[tuple[str, type[Any]]]:
    """Name and class of every first-party callback and logger that has an entry point."""
    return [
        (name, registry[name])
        for registry, table in (
            (callback_registry, catalogue.CALLBACKS),
            (logger_registry, catalogue.LOGGERS),
        )
        for name in table
    ]


# ---- modules -----------------------------------------------------------------------------------


def test_all_packages_are_looked_at() -> None:
    """The tests below would pass for an empty list."""
    assert len(PACKAGES) == len(catalogue.FAMILIES) + 1
    assert PACKAGES.keys() == {catalogue.CORE, *catalogue.FAMILIES}
    assert len(modules()) > 100


def _sorting_key(name: str) -> tuple[int, str]:
    """Constants, classes, the rest: the order in which names are sorted in a Python import."""
    return (0 if name.isupper() and len(name) > 1 else 1 if name[0].isupper() else 2, name)


@pytest.mark.parametrize("name", modules())
def test_what_a_module_promises_is_there(name) -> None:
    """`__all__` is sorted, has no name twice, and each name in it can be imported."""
    module = importlib.import_module(name)
    promised: list[str] = list(getattr(module, "__all__", []))

    assert module.__doc__, f"{name} has no docstring"
    assert promised == sorted(set(promised), key=_sorting_key)
    for each in promised:
        assert getattr(module, each, None) is not None, f"{name}.{each}"


class _RunTimeImports(ast.NodeVisitor):
    """Collects what is imported outside `if TYPE_CHECKING:`, with line numbers."""

    def __init__(self) -> None:
        self.found: list[tuple[str, int]] = []

    def visit_If(self, node: ast.If) -> None:
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)
            return
        for child in node.orelse:
            self.visit(child)

    def visit_Import(self, node: ast.Import) -> None:
        self.found += [(alias.name, node.lineno) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        if node.level == 0 and node.module:
            self.found.append((node.module, node.lineno))

    def visit_Constant(self, node: ast.Constant) -> None:
        """A module named in text may be an argument of `import_module`."""
        if isinstance(node.value, str) and re.fullmatch(r"nshtrainer_\w+(\.\w+)*", node.value):
            self.found.append((node.value, node.lineno))


@pytest.mark.parametrize("dist", PACKAGES)
def test_satellites_know_the_core_and_never_each_other(dist) -> None:
    """No module imports a family other than its own, at the top, in a function or by name."""
    own = dist.replace("-", "_")
    wrong: list[str] = []
    for file in sources(dist):
        visitor = _RunTimeImports()
        visitor.visit(ast.parse(file.read_text()))
        wrong += [
            f"{file.name}:{line} imports {name}"
            for name, line in visitor.found
            if (top := name.partition(".")[0]) in SATELLITES and top != own
        ]

    assert not wrong


@pytest.mark.parametrize("dist", PACKAGES)
def test_no_file_is_too_long(dist) -> None:
    """A module that has grown beyond 500 lines holds more than one idea."""
    lengths = {file: len(file.read_text().splitlines()) for file in sources(dist)}

    assert lengths
    assert not {file.name: n for file, n in lengths.items() if n > MAX_LINES}


def test_no_path_of_one_machine_is_in_the_tree() -> None:
    """What is committed works for everyone: no home, scratch or mount of who wrote it."""
    folders = r"/(?:home|Users|root|work|mnt|scratch)/\w+"
    suffixes = {".py", ".md", ".toml", ".yaml", ".json", ".sh"}
    places = [REPOSITORY / p for p in ("docs", "examples", "scripts", "benchmarks", ".ci")]
    places += [package / "src" for package in PACKAGES.values()]
    files = [f for place in places for f in place.rglob("*") if f.suffix in suffixes]
    files += [*PACKAGES[catalogue.CORE].parent.glob("*/*.*"), *REPOSITORY.glob("*.md")]
    found = {
        f"{file.relative_to(REPOSITORY)}: {match[0]}"
        for file in files
        for match in re.finditer(rf"(?<![\w.:/~}}]){folders}", file.read_text())
    }

    assert len(files) > len(modules())
    assert not found


# ---- callbacks and loggers ---------------------------------------------------------------------


def test_the_catalogue_is_what_the_entry_points_say() -> None:
    """Names, classes and distributions in `plugins/catalogue.py` are those of the projects."""
    found: dict[str, dict[str, tuple[str, str]]] = {"callbacks": {}, "loggers": {}}
    for dist in PACKAGES:
        for group, members in found.items():
            declared = project(dist)["entry-points"].get(f"nshtrainer.{group}", {})
            members.update({n: (dist, value.rpartition(":")[2]) for n, value in declared.items()})

    assert found == {"callbacks": catalogue.CALLBACKS, "loggers": catalogue.LOGGERS}


@pytest.mark.parametrize(("name", "cls"), registered(), ids=[n for n, _ in registered()])
def test_every_configuration_is_loaded_from_its_entry_point(name, cls) -> None:
    """A name gives the class, of the base and with the name, that the catalogue has for it."""
    base = LoggerConfigBase if name in catalogue.LOGGERS else CallbackConfigBase

    assert cls.__name__ == CLASSES[name][1]
    assert issubclass(cls, base)
    assert cls.model_fields["name"].default == name


@pytest.mark.parametrize(("name", "cls"), registered(), ids=[n for n, _ in registered()])
def test_every_option_is_documented(name, cls) -> None:
    """Each class has a docstring, each field a text below it."""
    documented = field_docs(cls)
    silent = [n for n in cls.model_fields if n != "name" and n not in documented]

    assert cls.__doc__
    assert not silent


def test_the_configurations_of_the_core_are_documented() -> None:
    """So are the fields of `TrainerConfig` and what it holds."""
    from nshtrainer import configs

    core = ("CallbackMetadataConfig", "DirectoryConfig", "MetricConfig", "PluginsConfig")
    silent = [
        f"{cls}.{name}"
        for cls in (*core, "TrainerConfig")
        for name in getattr(configs, cls).model_fields
        if name not in field_docs(getattr(configs, cls))
    ]

    assert not silent


def _conformance_classes(dist: str) -> Iterator[ast.ClassDef]:
    """Subclasses of the kit's classes, and theirs in the same file."""
    for file in sorted((PACKAGES[dist] / "tests").rglob("*.py")):
        kit = {"CallbackConformance", "LoggerConformance"}
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.ClassDef) and kit & {ast.unparse(b) for b in node.bases}:
                kit.add(node.name)
                yield node


@pytest.mark.parametrize("dist", catalogue.FAMILIES)
def test_every_callback_is_held_to_the_contract(dist) -> None:
    """The tests of each family have a conformance class for each of its configurations."""
    mine = {cls for d, cls in CLASSES.values() if d == dist}
    tested = {
        node.id
        for held in _conformance_classes(dist)
        for line in held.body
        if isinstance(line, ast.Assign | ast.AnnAssign)
        for node in ast.walk(line)
        if isinstance(node, ast.Name)
    }

    assert not mine - tested


def test_editors_see_every_configuration() -> None:
    """`nshtrainer.configs` finds classes when asked; the type checker has them in writing."""
    file = PACKAGES[catalogue.CORE] / "src" / "nshtrainer" / "configs.py"
    written = {
        alias.name
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert not {cls for _, cls in CLASSES.values()} - written


# ---- documentation -----------------------------------------------------------------------------


def test_every_callback_is_in_the_documentation() -> None:
    """`docs/callbacks.md` names each callback, or its class."""
    page = (REPOSITORY / "docs" / "callbacks.md").read_text()
    missing = [
        name
        for name, (_, cls) in catalogue.CALLBACKS.items()
        if f"`{name}`" not in page and cls not in page
    ]

    assert not missing


def _section(page: str, title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


@pytest.mark.parametrize("hook", [h for h in hookspecs.__all__ if h.startswith("nshtrainer_")])
def test_every_hook_is_documented_with_an_example(hook) -> None:
    """`docs/hooks.md` has a section for each hook, with a block that implements it."""
    section = _section((REPOSITORY / "docs" / "hooks.md").read_text(), hook)
    blocks = "".join(re.findall(r"```python\n(.*?)```", section, re.DOTALL))

    assert f"`{hook}(" in section
    assert f"@hookimpl\ndef {hook}(" in blocks


@pytest.mark.parametrize("event", [n for n in events.__all__ if n.isupper()])
def test_every_event_is_documented(event) -> None:
    """`docs/hooks.md` has each event of callbacks with its arguments."""
    section = _section((REPOSITORY / "docs" / "hooks.md").read_text(), "Events")

    assert f"`{getattr(events, event)}(trainer, pl_module, " in section


@pytest.mark.parametrize("file", ["config.py", "callback.py", "hooks.py"])
def test_the_tutorial_shows_the_files_of_the_example(file) -> None:
    """`docs/writing-a-plugin.md` builds exactly what lies in `examples/nshtrainer-hello`."""
    page = (REPOSITORY / "docs" / "writing-a-plugin.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)

    assert (EXAMPLE / "src" / "nshtrainer_hello" / file).read_text() in blocks


def test_the_tutorial_shows_the_project_of_the_example() -> None:
    """So does its `pyproject.toml`, which is no member of the workspace."""
    page = (REPOSITORY / "docs" / "writing-a-plugin.md").read_text()
    text = (EXAMPLE / "pyproject.toml").read_text()
    members = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["uv"]["workspace"]

    assert f"```toml\n{text}```" in page
    assert members["members"] == ["packages/*"]


# ---- releases ----------------------------------------------------------------------------------


def test_all_packages_are_released_together() -> None:
    """They have one version, and ask for one another in the same series only."""
    versions = {project(dist)["version"] for dist in PACKAGES}
    assert len(versions) == 1
    major, minor = versions.pop().split(".")[:2]
    series = f">={major}.{minor},<{major}.{int(minor) + 1}"

    core = project(catalogue.CORE)
    for family in catalogue.FAMILIES:
        extra = family.removeprefix("nshtrainer-")
        assert f"{catalogue.CORE}{series}" in project(family)["dependencies"]
        assert f"{family}{series}" in core["optional-dependencies"][extra]


@pytest.mark.parametrize("field", ["requires-python", "license", "authors", "classifiers"])
def test_packages_say_the_same_of_themselves(field) -> None:
    """Metadata that is common to the project is the same everywhere."""
    known = {
        dist: [c for c in project(dist)[field] if "Framework" not in str(c)] for dist in PACKAGES
    }

    assert all(value == known[catalogue.CORE] for value in known.values())
