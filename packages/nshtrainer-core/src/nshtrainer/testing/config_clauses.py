"""The clauses that every configuration keeps, of a callback or of a logger; no run is needed."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, ClassVar, cast

import pytest
from pydantic import ValidationError

from nshtrainer.config import Config
from nshtrainer.field_docs import field_docs
from nshtrainer.registry import Registry

from .promises import BrokenPromiseError, promise

__all__ = ["ConfigClauses"]

_IMPORT = """
import importlib, json, sys
path, module, heavy = json.loads(sys.argv[1])
sys.path[:] = path
before = set(sys.modules)
try:
    importlib.import_module(module)
except ModuleNotFoundError as error:
    if error.name and (module + ".").startswith(error.name + "."):
        print(json.dumps(None))
        sys.exit()
    raise
print(json.dumps(sorted({m.partition(".")[0] for m in set(sys.modules) - before} & set(heavy))))
"""


class ConfigClauses:
    """What a configuration promises by itself.

    Attributes:
        config: The configuration under test, with options at which it does something.
        registry: Where it is found by its name.
        field: The field of `TrainerConfig` that holds a list of such.
        run_time_only: Packages that its module must not import.
    """

    config: ClassVar[Any]
    registry: ClassVar[Registry[Any]]
    field: ClassVar[str]
    run_time_only: ClassVar[tuple[str, ...]] = (
        "torch",
        "lightning",
        "pytorch_lightning",
        "numpy",
        "wandb",
    )

    def own_config(self) -> Any:
        """A copy of `config` that the clause may keep."""
        return self.config.revalidated()

    def in_trainer_config(self, **fields: Any) -> Any:
        """A `TrainerConfig` that holds the configuration in its list."""
        from nshtrainer.trainer.config import SLOTS, TrainerConfig

        values: Mapping[str, Any] = {
            **dict.fromkeys(SLOTS),
            "loggers": [],
            self.field: [self.own_config()],
            **fields,
        }
        return TrainerConfig.model_validate(values)

    def test_is_found_by_its_name(self) -> None:
        """The registry gives the configuration's class for its `name`."""
        cls = self._class
        name = getattr(self.config, "name", None)
        found = self.registry.resolve(str(name))
        promise(
            found is cls,
            f"the {self.registry.what} name {name!r} gives {found}, not {cls.__qualname__}; decorate "
            f"the class with @{self.registry.what}_registry.register, or install its entry point",
        )

    def test_survives_json(self) -> None:
        """A configuration read back from JSON is equal, by itself and inside a TrainerConfig."""
        self._survives_text("json")

    def test_survives_yaml(self) -> None:
        """A configuration read back from YAML is equal, by itself and inside a TrainerConfig."""
        self._survives_text("yaml")

    def _survives_text(self, format_: str) -> None:
        for whole in (self.config, self.in_trainer_config()):
            text = whole.to_text(format_)
            try:
                back = cast("Config", whole).from_text(text, format_)
            except ValueError as error:
                raise BrokenPromiseError(
                    f"{self._cls} writes {format_} that it does not read: {error}"
                ) from error
            promise(
                back == whole,
                f"{self._cls} is {back!r} after a round trip through {format_}, not {whole!r}; keep "
                f"every option in a field, with a type that {format_} can say",
            )

    def test_survives_pickle_and_deepcopy(self) -> None:
        """Copies by pickle (processes that are spawned) and deepcopy are equal."""
        whole = self.config
        for how, back in (
            ("pickle", pickle.loads(pickle.dumps(whole))),  # noqa: S301 -- our own bytes
            ("deepcopy", copy.deepcopy(whole)),
        ):
            promise(back == whole, f"{self._cls} is {back!r} after {how}, not {whole!r}")

    def test_documents_every_field(self) -> None:
        """The class and each field of its own have a description, for editors and the schema."""
        cls = self._class
        promise(cls.__doc__, f"{self._cls} has no docstring; say what it does")
        skipped = {*self.registry.base.model_fields, self.registry.discriminator}
        documented = field_docs(cls)
        missing = [n for n in cls.model_fields if n not in skipped and n not in documented]
        promise(
            not missing,
            f"{self._cls} does not describe {', '.join(missing)}; put a string literal below the field",
        )

    def test_refuses_unknown_options(self) -> None:
        """A misspelt option is an error when it is read and when it is assigned."""
        data = {**self.own_config().model_dump(), "no_such_option": 1}
        try:
            self._class.model_validate(data)
        except ValidationError:
            pass
        else:
            raise BrokenPromiseError(f"{self._cls} accepts 'no_such_option'; leave extra='forbid'")
        with pytest.raises(ValueError, match="no_such_option"):
            self.own_config().no_such_option = 1

    def test_config_module_is_light(self) -> None:
        """Importing the configuration's module imports nothing that only training needs.

        Skipped for a class that is defined in a test or a script: no other process can import it.
        """
        module = type(self.config).__module__
        if module in {"__main__", type(self).__module__}:
            pytest.skip(f"{self._cls} is not defined in a module of its own")
        argument = json.dumps([[p or os.curdir for p in sys.path], module, self.run_time_only])
        done = subprocess.run(  # noqa: S603 -- this interpreter, our own program
            [sys.executable, "-c", _IMPORT, argument],
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        promise(done.returncode == 0, f"{module} cannot be imported by itself:\n{done.stderr}")
        heavy = json.loads(done.stdout.splitlines()[-1])
        if heavy is None:
            pytest.skip(f"{module} cannot be imported by another process")
        promise(
            not heavy,
            f"importing {module} imports {', '.join(heavy)}; import them inside the function that "
            f"makes the {self.registry.what}, or under TYPE_CHECKING",
        )

    @property
    def _class(self) -> type[Config]:
        return type(cast("Config", self.config))

    @property
    def _cls(self) -> str:
        return type(self.config).__qualname__
