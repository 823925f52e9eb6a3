"""Each clause about configurations rejects one that breaks it, and says what to do."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from pydantic import ConfigDict, Field, PrivateAttr

from nshtrainer.callbacks.base import CallbackConfigBase, callback_registry
from nshtrainer.testing import BrokenPromiseError, CallbackConformance


class Faulty(CallbackConformance):
    """Not collected: its clauses are called by hand."""

    def __init__(self, config: CallbackConfigBase) -> None:
        self.__dict__.update(config=config)


class UnregisteredConfig(CallbackConfigBase):
    """Nobody finds it."""

    name: Literal["conformance_unregistered"] = "conformance_unregistered"


@callback_registry.register
class LosesOptionConfig(CallbackConfigBase):
    """Writes less than it has."""

    name: Literal["conformance_loses_option"] = "conformance_loses_option"

    hidden: int = Field(default=1, exclude=True)
    """Not written."""


class LosesInCopiesConfig(CallbackConfigBase):
    """Loses an option in copies."""

    name: Literal["conformance_loses_in_copies"] = "conformance_loses_in_copies"

    kept: int = 1
    """Not copied."""
    _extra: int = PrivateAttr(default=0)

    def __getstate__(self):
        return {**super().__getstate__(), "__dict__": {**self.__dict__, "kept": 1}}


class UndocumentedConfig(CallbackConfigBase):
    """Says nothing about an option."""

    name: Literal["conformance_undocumented"] = "conformance_undocumented"
    told: int = 1
    """What it does."""
    untold: int = 2


class NoDocstringConfig(CallbackConfigBase):
    name: Literal["conformance_no_docstring"] = "conformance_no_docstring"


class AcceptsAnythingConfig(CallbackConfigBase):
    """Ignores misspelt options."""

    model_config = ConfigDict(extra="ignore")
    name: Literal["conformance_accepts_anything"] = "conformance_accepts_anything"


@callback_registry.register
class FunctionOptionConfig(CallbackConfigBase):
    """Has an option that no file can say."""

    name: Literal["conformance_function_option"] = "conformance_function_option"

    pair: Any = None
    """A value of any type."""


@pytest.mark.parametrize(
    ("config", "clause", "says"),
    [
        (UnregisteredConfig(), "is_found_by_its_name", "entry point"),
        (LosesOptionConfig(hidden=2), "survives_json", "keep every option in a field"),
        (LosesOptionConfig(hidden=2), "survives_yaml", "keep every option in a field"),
        (FunctionOptionConfig(pair=(1, 2)), "survives_json", "a type that json can say"),
        (LosesInCopiesConfig(kept=2), "survives_pickle_and_deepcopy", "after pickle"),
        (UndocumentedConfig(), "documents_every_field", "does not describe untold;"),
        (NoDocstringConfig(), "documents_every_field", "no docstring"),
        (AcceptsAnythingConfig(), "refuses_unknown_options", "accepts 'no_such_option'"),
    ],
)
def test_a_broken_config_is_rejected(config: CallbackConfigBase, clause: str, says: str):
    """The clause fails with a message that says what to do."""
    with pytest.raises(BrokenPromiseError, match=says):
        getattr(Faulty(config), f"test_{clause}")()


CONFIG_MODULE = """
    from typing import Literal
    {imports}
    from nshtrainer import CallbackConfigBase

    class AcmeConfig(CallbackConfigBase):
        "A config in a module of its own."
        name: Literal["acme"] = "acme"
"""


@pytest.mark.parametrize("heavy", ["numpy", "torch"])
def test_a_config_module_that_imports_a_framework_is_rejected(heavy: str, fake_distribution):
    """What only training needs must not be imported to read a configuration."""
    source = CONFIG_MODULE.format(imports=f"import {heavy}")
    entry_points = {"nshtrainer.callbacks": "acme = acme_heavy:AcmeConfig"}
    fake_distribution("acme", entry_points, modules={"acme_heavy": source})
    with pytest.raises(BrokenPromiseError, match=f"imports .*{heavy}.*; import them inside"):
        Faulty(callback_registry["acme"]()).test_config_module_is_light()


def test_a_light_config_module_is_accepted(fake_distribution):
    """It is imported by a process of its own, so what this one has imported does not count."""
    source = CONFIG_MODULE.format(imports="")
    entry_points = {"nshtrainer.callbacks": "acme = acme_light:AcmeConfig"}
    fake_distribution("acme", entry_points, modules={"acme_light": source})
    Faulty(callback_registry["acme"]()).test_config_module_is_light()
