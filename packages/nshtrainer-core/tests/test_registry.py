"""The late-bound registry: names to classes, whenever they are registered."""

from __future__ import annotations

import copy
import pickle
import sys
from types import ModuleType
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ValidationError

from nshtrainer import (
    CallbackConfigBase,
    Config,
    DuplicateNameError,
    PluginLoadError,
    PluginNotInstalledError,
    TrainerConfig,
    callback_registry,
)
from nshtrainer.registry import Registry

pytestmark = pytest.mark.usefixtures("clean_registry")


def define(
    tag: str = "mine", qualname: str = "Mine", default: float = 0.5
) -> type[CallbackConfigBase]:
    """A new class object with the given name, as a notebook cell that is run makes one."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(  # noqa: S102 -- a cell
        f"from typing import Literal\n"
        f"from nshtrainer import CallbackConfigBase\n"
        f"class {qualname}(CallbackConfigBase):\n"
        f"    name: Literal[{tag!r}] = {tag!r}\n"
        f"    threshold: float = {default}\n"
        f"    def create_callbacks(self, trainer_config):\n"
        f"        return ()\n",
        namespace,
    )
    return namespace[qualname]


def test_a_class_registered_after_the_config_was_defined_works_everywhere():
    """TrainerConfig, its subclasses, models that nest it, dicts and files know a late class."""

    class Study(Config):
        runs: list[TrainerConfig]

    class MyTrainerConfig(TrainerConfig):
        extra: int = 0

    late = callback_registry.register(define())
    entry = {"name": "mine", "threshold": 2.0}

    assert isinstance(TrainerConfig(callbacks=[late()]).callbacks[0], late)
    assert TrainerConfig.model_validate({"callbacks": [entry]}).callbacks == [late(threshold=2.0)]
    assert MyTrainerConfig(callbacks=[entry]).callbacks == [late(threshold=2.0)]
    assert Study(runs=[{"callbacks": [entry]}]).runs[0].callbacks == [late(threshold=2.0)]
    assert TrainerConfig.from_text("callbacks: [{name: mine, threshold: 2}]").callbacks == [
        late(threshold=2.0)
    ]
    assert TrainerConfig.model_validate_json('{"callbacks": [{"name": "mine"}]}').callbacks == [
        late()
    ]


def test_a_cell_that_is_run_twice_replaces_its_class():
    """The newest definition counts, and instances of the old one are taken over by their values."""
    old = callback_registry.register(define(default=0.5))
    held = old(threshold=0.75)
    new = callback_registry.register(define(default=9.0))

    config = TrainerConfig(callbacks=[held])

    assert type(config.callbacks[0]) is new
    assert config.callbacks[0].threshold == 0.75
    assert TrainerConfig(callbacks=[{"name": "mine"}]).callbacks[0].threshold == 9.0


def test_two_classes_with_one_name_are_refused_at_once():
    """The second decorator raises and names both; the first class stays in use."""
    first = callback_registry.register(define(qualname="First"))

    with pytest.raises(
        DuplicateNameError, match=r"'mine' is taken by __main__:First.*override=True"
    ):
        callback_registry.register(define(qualname="Second"))

    assert callback_registry["mine"] is first


def test_override_takes_a_name_over():
    """`register(override=True)` replaces whoever has the name, a first-party class too."""
    callback_registry.register(define(qualname="First"))
    second = callback_registry.register(override=True)(define(qualname="Second"))

    assert callback_registry["mine"] is second


def test_a_subclass_of_a_builtin_may_be_defined_without_registering():
    """Defining a subclass changes nothing; using it unregistered says what to do."""
    base = callback_registry.register(define())

    class Special(base):
        extra: int = 1

    assert callback_registry["mine"] is base
    with pytest.raises(
        ValidationError, match=r"Special is not registered.*@callback_registry.register"
    ):
        TrainerConfig(callbacks=[Special()])


@pytest.mark.parametrize("how", ["no name", "no literal", "two values", "other default", "no base"])
def test_a_class_that_cannot_be_registered_is_refused_with_the_line_to_write(how: str):
    """The error shows what a registrable class looks like."""
    bodies: dict[str, dict[str, Any]] = {
        "no name": {"__annotations__": {}},
        "no literal": {"__annotations__": {"name": str}, "name": "x"},
        "two values": {"__annotations__": {"name": Literal["x", "y"]}, "name": "x"},
        "other default": {"__annotations__": {"name": Literal["x"]}},
        "no base": {},
    }
    base = BaseModel if how == "no base" else CallbackConfigBase
    cls = type(base)("Odd", (base,), {"__module__": __name__, **bodies[how]})

    with pytest.raises(
        TypeError, match="not a subclass" if how == "no base" else "needs a line such as"
    ):
        callback_registry.register(cls)


def test_registering_a_function_is_refused():
    """A decorator on the wrong thing says so."""
    with pytest.raises(TypeError, match="not a subclass of CallbackConfigBase"):
        callback_registry.register(lambda: None)


def test_an_unknown_name_lists_what_exists_and_the_nearest():
    """The message has the closest name and all known ones."""
    callback_registry.register(define())

    with pytest.raises(
        ValidationError, match=r"no callback is named 'mien'. Did you mean 'mine'\?.*Known:"
    ):
        TrainerConfig(callbacks=[{"name": "mien"}])
    with pytest.raises(KeyError, match="Did you mean 'mine'"):
        callback_registry["mien"]


def test_a_missing_name_and_a_wrong_kind_of_value_are_explained():
    """Neither a mapping without a name nor a bare number ends in another traceback."""
    with pytest.raises(ValidationError, match="the field `name` is missing"):
        TrainerConfig(callbacks=[{"threshold": 1}])
    with pytest.raises(ValidationError, match=r"a mapping with the field `name`.*not int"):
        TrainerConfig(callbacks=[3])
    with pytest.raises(ValidationError, match="`name` must be text, not list"):
        TrainerConfig(callbacks=[{"name": ["ema"]}])


def test_the_error_of_a_nested_field_says_where_it_is():
    """The location goes through the list index and the name to the field."""
    callback_registry.register(define())

    with pytest.raises(ValidationError) as caught:
        TrainerConfig(callbacks=[{"name": "mine"}, {"name": "mine", "threshold": "x"}])

    assert caught.value.errors()[0]["loc"] == ("callbacks", 1, "mine", "threshold")


def test_subclass_fields_are_serialized_and_the_name_is_never_lost():
    """A dump has the subclass's own fields; `exclude_unset` and `exclude_defaults` keep the name."""
    cls = callback_registry.register(define())
    config = TrainerConfig(callbacks=[cls(threshold=3.0)])

    assert config.model_dump()["callbacks"][0]["threshold"] == 3.0
    for options in ({"exclude_unset": True}, {"exclude_defaults": True}):
        dump = config.model_dump(**options)["callbacks"][0]
        assert dump["name"] == "mine"
    assert TrainerConfig.model_validate(config.model_dump(exclude_unset=True)) == config


def test_the_json_schema_is_a_choice_over_what_is_registered_when_asked():
    """A class appears in the schema once it is registered, with the name as discriminator."""
    before = TrainerConfig.model_json_schema()["properties"]["callbacks"]["items"]
    callback_registry.register(define())
    after = TrainerConfig.model_json_schema()["properties"]["callbacks"]["items"]

    assert "mine" not in before["discriminator"]["mapping"]
    assert "mine" in after["discriminator"]["mapping"]
    assert all("name" in choice["required"] for choice in after["oneOf"])


def test_the_registry_survives_copies_and_pickle_as_itself():
    """Fields' metadata is copied and model classes are pickled; the registry must stay one object."""
    assert copy.deepcopy(callback_registry) is callback_registry
    assert copy.copy(callback_registry) is callback_registry
    assert pickle.loads(pickle.dumps(callback_registry)) is callback_registry


def test_an_annotation_that_is_defined_later_is_resolved_at_the_first_use():
    """A class that is registered before a type it names is whole when it is used."""
    module = ModuleType("acme_cells")
    source = """
from typing import Literal
from nshtrainer import CallbackConfigBase, Config, callback_registry

@callback_registry.register
class Late(CallbackConfigBase):
    name: Literal["late"] = "late"
    inner: "Inner | None" = None
"""
    sys.modules["acme_cells"] = module
    try:
        exec(source, vars(module))  # noqa: S102 -- a module
        with pytest.raises(ValidationError, match=r"acme_cells:Late.*names 'Inner'.*at run time"):
            TrainerConfig(callbacks=[{"name": "late"}])
        with pytest.raises(PluginLoadError, match="acme_cells:Late"):
            callback_registry["late"]
        assert "late" not in callback_registry.load_all()
        exec("class Inner(Config):\n    x: int = 1", vars(module))  # noqa: S102 -- the rest of it
        config = TrainerConfig(callbacks=[{"name": "late", "inner": {"x": 2}}])
    finally:
        del sys.modules["acme_cells"]

    assert config.callbacks[0].inner.x == 2


def test_a_registry_of_ones_own_works_the_same():
    """Third parties can open a registry for their own family of configs."""

    class Shape(Config):
        pass

    shapes: Registry[Shape] = Registry(
        "acme.shapes", Shape, what="shape", known={"cone": ("acme-cones", "Cone")}
    )

    @shapes.register
    class Square(Shape):
        name: Literal["square"] = "square"
        side: float = 1.0

    class Drawing(Config):
        shape: Annotated[Shape, shapes]
        only_square: Annotated[Shape, shapes.slot("square")] | None = None

    drawing = Drawing(shape={"name": "square", "side": 2}, only_square={"side": 3})

    assert drawing.shape == Square(side=2.0)
    assert drawing.only_square == Square(side=3.0)
    with pytest.raises(ValidationError, match="run `pip install acme-cones`"):
        Drawing(shape={"name": "cone"})
    with pytest.raises(PluginNotInstalledError, match="acme-cones"):
        shapes["cone"]


def test_a_slot_takes_only_its_own_name():
    """Another callback in a slot is refused, and the slot's own needs no name."""
    callback_registry.register(define())

    with pytest.raises(
        ValidationError, match=r"'mine' has no place here; expected 'early_stopping'"
    ):
        TrainerConfig(early_stopping={"name": "mine"})
