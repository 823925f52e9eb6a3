from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import enum
import io
from pathlib import Path

import pytest
import torch

from nshtrainer.config import Config
from nshtrainer_checkpoint.plain import foreign_values, make_plain


class Color(enum.Enum):
    RED = "red"


class Text(str):
    pass


@dataclasses.dataclass
class Point:
    x: Path


class Settings(Config):
    path: Path = Path("a")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Path("a/b"), "a/b"),
        (Color.RED, "red"),
        (dt.timedelta(minutes=1), 60.0),
        (dt.date(2020, 1, 2), "2020-01-02"),
        (Settings(), {"path": "a"}),
        (Point(Path("p")), {"x": "p"}),
        ({Text("k"): {1}}, {"k": [1]}),
        ((1, [Path("x")]), (1, ["x"])),
    ],
)
def test_hyper_parameters_read_back_as_plain_data(value: object, plain: object):
    """What torch would refuse is stored as data that it reads."""
    checkpoint = {"hyper_parameters": {"v": value}, "state_dict": {"w": torch.ones(2)}}
    make_plain(checkpoint)
    file = io.BytesIO()
    torch.save(checkpoint, file)
    file.seek(0)

    assert torch.load(file, weights_only=True)["hyper_parameters"]["v"] == plain
    assert not list(foreign_values(checkpoint))


def test_foreign_values_are_named_by_place():
    """The place and class of what torch would refuse are told."""
    checkpoint = {"mine": {"a": [1, Path("x")]}, "ok": collections.OrderedDict(b=torch.Size([1]))}

    assert [(p, k.__mro__[1].__name__) for p, k in foreign_values(checkpoint)] == [
        ("checkpoint['mine']['a'][1]", "Path")
    ]
