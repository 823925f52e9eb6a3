"""`WeightEMA` in a plain PyTorch loop."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nshtrainer.errors import ConfigError
from nshtrainer_ema import WeightEMA


def net(norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    middle = nn.BatchNorm1d(8) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 8), middle, nn.Linear(8, 1))


def train(model: nn.Module, ema: WeightEMA, steps: int, *, seed: int = 1) -> list[dict[str, Any]]:
    """Train, and return the state after each step."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    generator, states = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        x = torch.randn(16, 4, generator=generator)
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        ema.update()
        states.append({n: t.detach().clone() for n, t in model.state_dict().items()})
    return states


def oracle(
    start: dict[str, Tensor], states: list[dict[str, Tensor]], decay: float, name: str
) -> Tensor:
    average = start[name].double()
    for state in states:
        average = decay * average + (1 - decay) * state[name].double()
    return average


def close(left: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(left.double(), right.double(), rtol=1e-5, atol=1e-6)


def test_it_works_in_a_plain_loop():
    """Update after each step; the module holds the average inside of `applied`, and nowhere else."""
    model = net()
    start = copy.deepcopy(model.state_dict())
    ema = WeightEMA(model, decay=0.8)
    states = train(model, ema, 10)
    trained = copy.deepcopy(model.state_dict())
    with ema.applied():
        inside = copy.deepcopy(model.state_dict())

    for name in trained:
        close(inside[name], oracle(start, states, 0.8, name))
        assert torch.equal(model.state_dict()[name], trained[name])


def test_an_exception_inside_brings_the_weights_back():
    """`applied` is a context like any other."""
    model = net()
    ema = WeightEMA(model, decay=0.8)
    train(model, ema, 3)
    trained = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="inside"), ema.applied():
        raise RuntimeError("inside")

    assert all(torch.equal(t, trained[n]) for n, t in model.state_dict().items())


def test_copy_to_writes_for_good():
    """Into the module itself or a copy of it, of another precision too."""
    model = net()
    ema = WeightEMA(model, decay=0.8)
    train(model, ema, 3)
    twin = net().to(torch.bfloat16)
    ema.copy_to(twin)

    assert torch.equal(twin[0].weight, ema.averages["0.weight"].bfloat16())


@pytest.mark.parametrize(
    "options",
    [
        {"decay": 0.8},
        {"decay": 0.8, "every_n_steps": 3, "warmup": "inverse_power"},
        {"decay": 0.8, "buffers": "average", "extra_decays": [0.5]},
        {"decay": 0.8, "buffers": "copy", "start_step": 3},
        {"profiles": [0.05, 0.1]},
    ],
)
def test_its_state_goes_on_bitwise(options):
    """Through a file, between any two steps."""
    whole, parts = net(norm=True), net(norm=True)
    ema, first = WeightEMA(whole, **options), WeightEMA(parts, **options)
    train(whole, ema, 4)
    train(whole, ema, 5, seed=2)
    train(parts, first, 4)
    file = io.BytesIO()
    torch.save({"model": parts.state_dict(), "ema": first.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    again = net(norm=True)
    again.load_state_dict(loaded["model"])
    second = WeightEMA(again, **options)
    second.load_state_dict(loaded["ema"])
    train(again, second, 5, seed=2)

    for label in ema.labels:
        for name, tensor in ema.of(label).items():
            assert torch.equal(second.of(label)[name], tensor), (label, name)
    assert second.steps == ema.steps


@pytest.mark.parametrize("buffers", ["keep", "copy", "average"])
def test_buffers_are_kept_copied_or_averaged(buffers):
    """Of BatchNorm: running statistics and the count of batches, a whole number."""
    model = net(norm=True)
    start = copy.deepcopy(model.state_dict())
    ema = WeightEMA(model, decay=0.8, buffers=buffers)
    states = train(model, ema, 5)
    model(torch.randn(16, 4))  # moves the module's own statistics once more
    live = copy.deepcopy(model.state_dict())
    with ema.applied():
        inside = copy.deepcopy(model.state_dict())

    mean, count = inside["1.running_mean"], inside["1.num_batches_tracked"]
    expected = {
        "keep": live["1.running_mean"],
        "copy": states[-1]["1.running_mean"],
        "average": oracle(start, states, 0.8, "1.running_mean"),
    }
    close(mean, expected[buffers])
    assert int(count) == (6 if buffers == "keep" else 5)
    assert count.dtype == torch.int64
    assert all(torch.equal(t, live[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize("buffers", ["copy", "average"])
def test_what_evaluation_writes_into_a_buffer_does_not_reach_the_average(buffers):
    """Nor does it stay in the module."""
    model = net(norm=True)
    ema = WeightEMA(model, decay=0.8, buffers=buffers)
    train(model, ema, 2)
    before = ema.averages["1.running_mean"].clone()
    with ema.applied():
        model[1].running_mean.fill_(7.0)

    assert torch.equal(ema.averages["1.running_mean"], before)
    assert not (model[1].running_mean == 7.0).any()


@pytest.mark.parametrize(
    "wrap",
    [nn.utils.parametrizations.spectral_norm, nn.utils.spectral_norm],
    ids=["parametrization", "hook"],
)
def test_vectors_of_spectral_norm_are_copied_and_not_averaged(wrap):
    """An average of unit vectors has another length, and the weights divided by it blow up."""
    torch.manual_seed(0)
    model = nn.Sequential(wrap(nn.Linear(4, 4)), nn.Linear(4, 1))
    ema = WeightEMA(model, decay=0.9, buffers="average")
    states = train(model, ema, 20)
    vectors = [n for n in states[-1] if n.endswith(("_u", "_v", ".0._u", ".0._v"))]

    assert len(vectors) == 2
    for name in vectors:
        assert torch.equal(ema.averages[name], states[-1][name])
        assert ema.averages[name].norm().item() == pytest.approx(1.0, abs=1e-4)


def test_a_mask_of_infinities_is_copied():
    """The average of -inf and -inf would be NaN."""
    model = net()
    model.register_buffer("mask", torch.full((3,), -torch.inf))
    model.register_buffer("cache", torch.ones(3), persistent=False)
    ema = WeightEMA(model, decay=0.9, buffers="average")
    train(model, ema, 3)

    assert torch.equal(ema.averages["mask"], model.mask)
    assert "cache" not in ema.averages


def test_include_and_exclude_choose_by_name():
    """The rest is evaluated as it is."""
    model = net(norm=True)
    ema = WeightEMA(model, decay=0.8, include=["0.*", "1.*"], exclude=["*.bias"], buffers="copy")

    assert sorted(ema.averages) == [
        "0.weight",
        "1.num_batches_tracked",
        "1.running_mean",
        "1.running_var",
        "1.weight",
    ]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_glob_that_matches_nothing_is_refused(option):
    """It was written with some tensor in mind."""
    with pytest.raises(ConfigError, match=r"'encoder\.\*', which matches no parameter"):
        WeightEMA(net(), decay=0.8, **{option: ["encoder.*"]})


def test_a_choice_that_leaves_nothing_is_refused():
    """An average of nothing is not what anybody wants."""
    with pytest.raises(ConfigError, match="leave no parameter or buffer"):
        WeightEMA(net(), decay=0.8, exclude=["*"])


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_dtype_of_the_average_can_be_chosen(dtype):
    """Whatever that of the weights."""
    model = net()
    ema = WeightEMA(model, decay=0.8, dtype=dtype)
    start = copy.deepcopy(model.state_dict())
    states = train(model, ema, 4)

    assert ema.averages["0.weight"].dtype == getattr(torch, dtype)
    torch.testing.assert_close(
        ema.averages["0.weight"].double(),
        oracle(start, states, 0.8, "0.weight"),
        rtol=2e-2 if dtype == "bfloat16" else 1e-5,
        atol=2e-2 if dtype == "bfloat16" else 1e-6,
    )


def test_several_decays_are_kept_at_once():
    """Each follows its own formula; the first is evaluated."""
    model = net()
    start = copy.deepcopy(model.state_dict())
    ema = WeightEMA(model, decay=0.8, extra_decays=[0.5, 0.95])
    states = train(model, ema, 6)

    close(ema.averages["0.weight"], oracle(start, states, 0.8, "0.weight"))
    for decay in (0.5, 0.95):
        close(ema.of(f"decay={decay}")["0.weight"], oracle(start, states, decay, "0.weight"))


def test_a_parameter_that_is_thawed_begins_then():
    """And one that is frozen again is still followed."""
    model = net()
    model[0].requires_grad_(False)
    ema = WeightEMA(model, decay=0.8)
    train(model, ema, 2)
    assert "0.weight" not in ema.averages
    model[0].requires_grad_(True)
    begin = copy.deepcopy(model.state_dict())
    states = train(model, ema, 3)
    # Seen first after the first step with it.
    close(ema.averages["0.weight"], oracle(states[0], states[1:], 0.8, "0.weight"))
    model[0].requires_grad_(False)
    kept = train(model, ema, 1)
    close(ema.averages["0.weight"], oracle(states[0], [*states[1:], *kept], 0.8, "0.weight"))
    assert begin


def test_half_life_in_samples_needs_the_samples():
    """Said at the first update, not by a wrong decay."""
    model = net()
    ema = WeightEMA(model, half_life_samples=32.0)
    with pytest.raises(ValueError, match=r"update\(samples=\.\.\.\)"):
        ema.update()
    before = ema.averages["0.weight"].clone()
    nn.init.zeros_(model[0].weight)
    ema.update(samples=32)

    close(ema.averages["0.weight"], before / 2)


@pytest.mark.parametrize("take", [copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
def test_a_copy_takes_the_averages_along(take):
    """And nothing of the module."""
    model = net()
    ema = WeightEMA(model, decay=0.8)
    train(model, ema, 2)
    twin = take(ema)

    assert all(torch.equal(t, ema.averages[n]) for n, t in twin.averages.items())
    with pytest.raises(RuntimeError, match="does not exist"):
        twin.applied()


def test_a_compiled_module_is_averaged():
    """By the wrapper or by what it wraps; the weights in use are those of the average."""
    model = net()
    compiled = torch.compile(model, backend="eager")
    ema = WeightEMA(compiled, decay=0.5)
    train(compiled, ema, 3)
    x = torch.randn(2, 4)
    twin = net()
    twin.load_state_dict({n.removeprefix("_orig_mod."): t for n, t in ema.averages.items()})
    with ema.applied():
        assert torch.equal(compiled(x), twin(x))


def test_memory_is_one_shadow():
    """One number for each weight and average, and nothing that grows with the steps."""
    model = net()
    ema = WeightEMA(model, decay=0.8, extra_decays=[0.5])
    train(model, ema, 5)
    numbers = sum(t.numel() for label in ema.labels for t in ema.of(label).values())

    assert numbers == 2 * sum(p.numel() for p in model.parameters())
