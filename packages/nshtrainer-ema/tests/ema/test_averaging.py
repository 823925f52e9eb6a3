"""The arithmetic of the average, against a float64 loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nshtrainer_ema.ema.averaging import update_average
from nshtrainer_ema.ema.weight_ema import UnsupportedParameterError, WeightEMA


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_average_follows_its_formula(dtype):
    """decay*average + (1-decay)*weights, over many steps, whatever the dtype of the weights."""
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).to(dtype)
    average = WeightEMA(decay=0.9)
    average.track(0, list(module.parameters()), module)
    expected = {n: p.detach().double() for n, p in module.named_parameters()}
    for _ in range(50):
        for name, parameter in module.named_parameters():
            parameter.data = torch.randn_like(parameter)
            expected[name] = 0.9 * expected[name] + 0.1 * parameter.detach().double()
        average.update(0, skipped=False)

    for name, tensor in average.averages.items():
        assert tensor.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(tensor.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_a_high_decay_moves_the_average_of_bf16_weights():
    """In bf16 the average would stay at 1.0000; the closed form says 1.4966."""
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.ones_(module.weight)
    average = WeightEMA(decay=0.999)
    average.track(0, [module.weight], module)
    nn.init.constant_(module.weight, 1.5)
    for _ in range(5000):
        average.update(0, skipped=False)

    assert average.averages["weight"].item() == pytest.approx(1.5 - 0.5 * 0.999**5000, rel=1e-4)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_flag_on_the_device_counts_as_a_flag_on_the_host(every, dtype):
    """A step whose skip only the device knows neither moves the average nor counts."""
    pattern = [False, True, False, False, True, True, False, False, False]
    results = []
    for as_tensor in (False, True):
        module = nn.Linear(3, 2).to(dtype)
        for parameter in module.parameters():
            parameter.data.fill_(0.5)
        average = WeightEMA(decay=0.75, every_n_steps=every)
        average.track(0, list(module.parameters()), module)
        for value, skipped in enumerate(pattern):
            for parameter in module.parameters():
                parameter.data.fill_(value)
            average.update(0, torch.tensor(skipped) if as_tensor else skipped)
        results.append(average)
        if as_tensor:
            average.update(0, skipped=True)
            average.update(0, skipped=False)
            assert average.steps == {0: 7}
        else:
            assert average.steps == {0: 6}
            before = {n: a.clone() for n, a in average.averages.items()}
    if every == 1:
        for name, tensor in before.items():
            expected = 0.75 * tensor + 0.25 * 8
            torch.testing.assert_close(results[1].averages[name], expected)
    else:
        torch.testing.assert_close(results[1].averages, before)


def test_a_skipped_step_keeps_the_average_bit_for_bit():
    """Also where only the device knows of the skip."""
    average, source = [torch.randn(100)], [torch.randn(100)]
    before = average[0].clone()
    update_average(average, source, 0.9, where=torch.tensor(False))

    assert torch.equal(average[0], before)


def test_large_mixed_weights_are_averaged_piece_by_piece(monkeypatch):
    """Every tensor of a list longer than one piece is moved, exactly once."""
    monkeypatch.setattr("nshtrainer_ema.ema.plan._PIECE", 10)
    sizes = [3, 9, 1, 30, 2, 2]
    average = [torch.zeros(n) for n in sizes]
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.bfloat16, torch.float32]
    source = [torch.ones(n, dtype=d) for n, d in zip(sizes, [*dtypes, torch.bfloat16], strict=True)]
    update_average(average, source, 0.5)

    assert all(torch.equal(a, torch.full_like(a, 0.5)) for a in average)


@pytest.mark.parametrize(("decay", "expected"), [(0.0, 3.0), (1.0, 2.0)])
def test_the_ends_of_the_range_are_exact(decay, expected):
    """0 follows the weights, 1 never moves."""
    average = [torch.full((4,), 2.0)]
    update_average(average, [torch.full((4,), 3.0)], decay)

    assert torch.equal(average[0], torch.full((4,), expected))


def test_tied_frozen_and_foreign_parameters():
    """Tied ones are averaged once; what is not trained or not the module's is left alone."""
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2), "c": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    module["c"].requires_grad_(False)
    listed = [*module["a"].parameters(), *module["b"].parameters(), *module["c"].parameters()]
    average = WeightEMA(decay=0.5)
    average.track(0, [*{id(p): p for p in listed}.values(), torch.zeros(2)], module)

    assert sorted(average.averages) == ["a.bias", "a.weight", "b.bias"]


def test_an_unfrozen_parameter_begins_as_it_is_then():
    """What was averaged before goes on; what is frozen again is still followed."""
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module["b"].requires_grad_(False)
    average = WeightEMA(decay=0.5)
    average.track(0, list(module.parameters()), module)
    kept = average.averages["a.weight"]
    module["b"].requires_grad_(True)
    module["a"].requires_grad_(False)
    average.track(0, list(module.parameters()), module)

    assert average.averages["a.weight"] is kept
    assert torch.equal(average.averages["b.weight"], module["b"].weight)
    assert len(average.averages) == 4


def test_a_parameter_split_over_processes_is_refused():
    """With a message that says what to do, instead of an average of a shard."""
    module = nn.Linear(2, 2)
    module.weight._fsdp_flattened = True

    with pytest.raises(UnsupportedParameterError, match=r"'weight'.*FSDP2"):
        WeightEMA(decay=0.5).track(0, [module.weight], module)


class Mixed(nn.Module):
    """Small and large weights of many shapes, of one dtype or of several."""

    def __init__(self, dtypes: list[torch.dtype]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = [(3,), (), (5, 7), (2, 3, 3, 3), (40_000,), (0,), (1,), (11,), (300, 200), (6,)]
        for number, shape in enumerate(shapes):
            weight = torch.randn(shape, generator=generator).to(dtypes[number % len(dtypes)])
            self.register_parameter(f"w{number}", nn.Parameter(weight))

    def step(self, number: int) -> None:
        """Put other values in, as an optimizer would."""
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


DTYPES = {
    "fp32": [torch.float32],
    "bf16": [torch.bfloat16],
    "fp32 and bf16": [torch.float32, torch.bfloat16],
    "mostly bf16": [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32],
    "fp16 and fp64": [torch.float16, torch.float64],
}


@pytest.mark.parametrize("flag", [None, "host", "device"])
@pytest.mark.parametrize("block", [1 << 18, 50, "as on a GPU", "as on a GPU, in blocks"])
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
def test_weights_that_are_moved_together_move_as_each_by_itself(dtypes, block, flag, monkeypatch):
    """Bit for bit, in whatever company and blocks."""
    by_device = {"cpu": block} if isinstance(block, int) else {}
    monkeypatch.setattr("nshtrainer_ema.ema.plan._BLOCK", by_device)
    if block == "as on a GPU, in blocks":
        monkeypatch.setattr("nshtrainer_ema.ema.plan._PIECE", 50_000)
    module = Mixed(dtypes)
    ema = WeightEMA(module, decay=0.9)
    expected = {n: t.clone() for n, t in ema.averages.items()}
    for number in range(4):
        module.step(number)
        skips = flag is not None and number == 2
        ema.update(skipped=torch.tensor(skips) if flag == "device" else skips)
        for name, parameter in module.named_parameters():
            if not skips:
                expected[name].lerp_(parameter.detach().to(expected[name].dtype), 1 - 0.9)

    for name, tensor in ema.averages.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.5, 0.7, 0.9999, 1.0])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_decision_of_the_device_changes_no_bit(decay, order):
    """Of an average that is moved; one that is not stays as it is, whatever the weights are."""
    torch.manual_seed(0)
    module = nn.Conv2d(16, 32, 3).to(memory_format=order)
    host, device = (WeightEMA(module, decay=decay) for _ in range(2))
    for number in range(4):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn_like(parameter))
                parameter.mul_(float("nan") if number == 2 and decay > 0.5 else 1.0)
        host.update(skipped=number == 2)
        device.update(skipped=torch.tensor(number == 2))
    for name, average in host.averages.items():
        assert average.isfinite().all()
        assert torch.equal(average, device.averages[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_averages_lie_side_by_side_in_no_more_memory(dtype):
    """They share one storage, which is as large as they are."""
    module = nn.ModuleList(nn.Linear(4, 4) for _ in range(3)).to(dtype)
    ema = WeightEMA(module, decay=0.9)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in ema.averages.values()}

    assert len(storages) == 1
    assert sum(s.nbytes() for s in storages.values()) == 4 * sum(
        p.numel() for p in module.parameters()
    )


def test_an_optimizer_finds_averages_that_another_one_has_laid_elsewhere():
    """A parameter may be stepped by two optimizers, one of which was seen later."""
    module = nn.ModuleDict({name: nn.Linear(2, 2, bias=False) for name in "abc"})
    ema = WeightEMA(decay=0.5)
    listed = [module["a"].weight], [module[name].weight for name in "abc"]
    for index, parameters in enumerate(listed):
        ema.track(index, parameters, module)
    start = module["a"].weight.detach().clone()
    with torch.no_grad():
        module["a"].weight.add_(1)
    for index, parameters in enumerate(listed):
        if not ema.tracks(index, parameters):
            ema.track(index, parameters, module)
        ema.update(index)

    assert torch.equal(ema.averages["a.weight"], start.lerp(start + 1, 0.5).lerp(start + 1, 0.5))


@pytest.mark.parametrize("change", ["cast", "replace", "channels_last", "transposed"])
def test_weights_that_are_changed_in_place_are_followed(change):
    """A module that is cast keeps its parameters, and so its average."""
    module = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3), nn.Linear(6, 5))
    ema = WeightEMA(module, decay=0.5)
    expected = {n: t.clone() for n, t in ema.averages.items()}
    for number in range(3):
        if number == 1 and change == "cast":
            module.to(torch.bfloat16)
        elif number == 1 and change == "channels_last":
            module.to(memory_format=torch.channels_last)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if change == "replace":
                    parameter.data = torch.randn_like(parameter)
                elif change == "transposed" and parameter.dim() == 2:
                    parameter.data = torch.randn(parameter.shape[::-1]).t()
                else:
                    parameter.copy_(torch.randn(parameter.shape))
                expected[name].lerp_(parameter.float(), 0.5)
        ema.update()

    torch.testing.assert_close(ema.averages, expected, rtol=0, atol=0)
