from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nshtrainer_checkpoint.lineage import Lineage
from nshtrainer_checkpoint.retention import Keep, best_first, decide, newest_first


@dataclass(frozen=True, eq=False)
class Item:
    value: float | None
    order: tuple[int, int, int]
    size: int = 0


def run(values: list[float | None], topk: int | None, mode: str = "min") -> list[float | None]:
    """What is left on disk when *values* come one after another."""
    disk: list[Item] = []
    for n, value in enumerate(values):
        new = Item(value, (1, n, n))
        decision = decide(disk, Keep("best", mode, topk), new=new)
        if decision.saves:
            disk = [i for i in [*disk, new] if i not in decision.removed]
    return [i.value for i in best_first(disk, mode)]


@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf, None])
def test_what_is_no_number_ranks_last_in_every_order(mode: str, odd: float | None):
    """In all orders of `[3, odd, 1, 2]` the best is the best number, and top-3 are the numbers."""
    for values in itertools.permutations([3.0, odd, 1.0, 2.0]):
        best = 1.0 if mode == "min" else 3.0
        assert run(list(values), 1, mode) == [best]
        assert sorted(run(list(values), 3, mode)) == [1.0, 2.0, 3.0]


def test_no_number_at_all_still_keeps_one():
    """A run that only logs NaN has a checkpoint: the earliest, before it went further astray."""
    assert run([None, math.nan, math.nan], 1) == [None]


def test_of_equal_values_the_earlier_stays():
    """A value that is not better does not replace."""
    a, b = Item(1.0, (1, 1, 1)), Item(1.0, (1, 2, 2))

    assert best_first([b, a], "min") == [a, b]
    assert not decide([a], Keep("best", topk=1), new=b).saves


@given(
    st.lists(st.none() | st.floats()),
    st.integers(1, 4) | st.none(),
    st.sampled_from(["min", "max"]),
)
def test_top_k_agrees_with_sorting_everything(values: list, topk: int | None, mode: str):
    """One at a time gives what sorting all at once would, and never more than asked."""
    finite = sorted(
        (v for v in values if v is not None and math.isfinite(v)), reverse=mode == "max"
    )
    kept = run(values, topk, mode)

    expected = finite[:topk]
    assert kept[: len(expected)] == expected
    assert len(kept) == (len(values) if topk is None else min(topk, len(values)))


@given(st.data())
def test_the_new_one_is_never_removed(data: st.DataObject):
    """Nor is one that may not be removed, nor anything at all if nothing is written."""
    old = [
        Item(data.draw(st.floats() | st.none()), (1, n, n))
        for n in range(data.draw(st.integers(0, 5)))
    ]
    new = Item(data.draw(st.floats() | st.none()), (1, 9, 9))
    protected = set(data.draw(st.lists(st.sampled_from(old)))) if old else set()
    keep = Keep("best", topk=data.draw(st.integers(1, 3)))
    decision = decide(old, keep, new=new, may_remove=lambda i: i not in protected)

    assert new not in decision.removed
    assert not protected & set(decision.removed)
    assert decision.saves or not decision.removed


def every_keep() -> list[Keep]:
    return [
        Keep(order, mode, topk, every, budget)
        for order, mode in (("newest", "min"), ("best", "min"), ("best", "max"))
        for topk in (1, 2, None)
        for every in (None, 2)
        for budget in (None, 1, 20, 35)
    ]


@pytest.mark.parametrize("keep", every_keep(), ids=repr)
def test_every_short_list_is_decided_soundly(keep: Keep):
    """All lists of up to three by value, with each one protected or not, and a new one behind them."""
    for length in range(4):
        for values in itertools.product([1.0, 2.0, math.nan], repeat=length + 1):
            items = [Item(v, (1, n + 1, n + 1), 10) for n, v in enumerate(values)]
            old, new = items[:-1], items[-1]
            for chosen in itertools.product([False, True], repeat=length):
                protected = {id(i) for i, is_chosen in zip(old, chosen, strict=True) if is_chosen}
                check(old, new, keep, protected)


def check(old: list[Item], new: Item, keep: Keep, protected: set[int]) -> None:
    def may_remove(item: Item) -> bool:
        return id(item) not in protected

    decision = decide(old, keep, new=new, may_remove=may_remove)
    removed, kept = list(decision.removed), list(decision.kept)
    milestones = [i for i in [*old, new] if keep.is_milestone(i)]
    first = keep.rank([*old, new])[0]

    assert decide(old[::-1], keep, new=new, may_remove=may_remove) == decision
    assert decision.saves == (new in kept)
    if not decision.saves:
        assert not removed
        assert new is not first
        assert new not in milestones
        return
    assert not [i for i in removed if i in (new, first, *milestones, *kept) or not may_remove(i)]
    assert kept == [i for i in keep.rank([*old, new]) if i in kept]
    if keep.topk is not None:
        assert len([i for i in kept if i not in milestones]) <= keep.topk
    there = [i for i in [*old, new] if i not in removed]
    if keep.max_bytes is not None and sum(i.size for i in there) > keep.max_bytes:
        # Too much is left only of what has to stay.
        assert all(i in (new, first, *milestones) or not may_remove(i) for i in there)
    again = decide(there, keep, may_remove=may_remove)
    assert not again.removed


def test_newest_is_by_attempt_step_and_number():
    """No clock: attempt first, then step, then save number."""
    items = [Item(None, o) for o in ((1, 100, 9), (2, 5, 10), (2, 5, 11), (2, 4, 12))]

    assert [i.order for i in newest_first(items)] == [
        (2, 5, 11),
        (2, 5, 10),
        (2, 4, 12),
        (1, 100, 9),
    ]


def test_resuming_from_the_newest_is_the_same_attempt():
    """And what that attempt has saved counts."""
    lineage = Lineage(1).resumed(10, [(1, 5), (1, 10)])

    assert lineage == Lineage(1)
    assert lineage.includes(1, 5)


def test_going_back_leaves_the_later_ones_out():
    """Checkpoints beyond the step that was gone back to belong to another way, for good."""
    back = Lineage(1).resumed(50, [(1, 50), (1, 100)])

    assert back.attempt == 2
    assert back.includes(1, 50)
    assert not back.includes(1, 100)
    assert back.includes(2, 120)
    again = Lineage.from_state(back.to_state()).resumed(120, [(1, 50), (1, 100), (2, 120)])
    assert again == back


def test_a_fresh_start_counts_nothing_of_before():
    """Training from scratch in a used folder competes with none of what is there."""
    fresh = Lineage.fresh([(1, 126), (2, 3)])

    assert fresh.attempt == 3
    assert not any(fresh.includes(a, s) for a, s in [(1, 126), (2, 3)])


@pytest.mark.parametrize("state", [None, {}, {"attempt": "x", "ancestors": []}, {"attempt": 1}])
def test_a_strange_state_is_no_lineage(state: object):
    """A checkpoint of another program gives none."""
    assert Lineage.from_state(state) is None
