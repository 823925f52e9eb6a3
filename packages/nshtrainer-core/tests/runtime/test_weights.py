from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nshtrainer.runtime.weights import WeightSwap, WeightSwapError, swap_weights


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def others(params: list[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.rand(p.shape, generator=generator).to(dtype or p.dtype)
        if p.is_floating_point()
        else torch.full_like(p, 7)
        for p in (param.detach() for param in params)
    ]


def state(params: list[Tensor]) -> list[tuple[Tensor, int, torch.dtype, tuple[int, ...]]]:
    return [(p.detach().clone(), p.data_ptr(), p.dtype, p.stride()) for p in params]


def assert_same(params: list[Tensor], before: list[tuple[Tensor, int, torch.dtype, Any]]) -> None:
    for param, (value, address, dtype, stride) in zip(params, before, strict=True):
        assert torch.equal(param.detach(), value)
        assert (param.data_ptr(), param.dtype, param.stride()) == (address, dtype, stride)


def holds(params: list[Tensor], values: list[Tensor]) -> bool:
    return all(torch.equal(p.detach(), v.to(p.dtype)) for p, v in zip(params, values, strict=True))


class Subclass(Tensor):
    pass


def make_inference(value: Tensor) -> Tensor:
    with torch.inference_mode():
        return value.clone()


@pytest.mark.parametrize("allow_pointer", [True, False])
def test_a_swap_shows_the_other_weights_and_leaves_both_sets_as_they_were(allow_pointer: bool):
    """Parameters and buffers hold the values inside; after, both sets are bit for bit as before."""
    model = make_model()
    params = tensors(model)
    values = others(params)
    before, values_before = state(params), state(values)
    swap = WeightSwap()
    swap.swap_in(params, values, allow_pointer=allow_pointer)

    assert swap.active
    assert swap.mode == ("pointer" if allow_pointer else "copy")
    assert holds(params, values)
    for original, (value, *_) in zip(swap.originals, before, strict=True):
        assert torch.equal(original, value)
    addresses = [v.data_ptr() for v in values]
    assert ([p.data_ptr() for p in params] == addresses) is allow_pointer
    swap.swap_out()
    assert_same(params, before)
    assert_same(values, values_before)
    assert (swap.active, swap.mode, swap.originals, swap.copy_reasons) == (False, None, (), {})


@pytest.mark.parametrize(
    ("reason", "change"),
    [
        ("dtype", lambda v: v.double()),
        ("strides", lambda v: v.t().contiguous().t()),
        ("inference tensor", make_inference),
        ("tensor subclass", lambda v: v.as_subclass(Subclass)),
    ],
)
def test_values_of_another_kind_are_copied(reason: str, change: Callable[[Tensor], Tensor]):
    """What cannot be exchanged legally is copied, and the reason is told."""
    layer = nn.Linear(3, 2)
    params = list(layer.parameters())
    values: list[Tensor] = [change(torch.rand(2, 3)), torch.rand(2)]
    before = state(params)
    swap = WeightSwap()
    with swap.swap_in(params, values):
        assert swap.mode == "copy"
        assert swap.copy_reasons == {reason: 1}
        assert params[0].data_ptr() == before[0][1]
        assert params[1].data_ptr() == values[1].data_ptr()
        assert torch.equal(params[0].detach(), values[0].float().as_subclass(Tensor))
    assert_same(params, before)
    layer(torch.rand(1, 3)).sum().backward()


def test_a_wide_shadow_of_narrow_weights_is_copied_and_restored():
    """bf16 parameters show the rounded fp32 average, then their own bits again."""
    model = nn.Linear(4, 4).bfloat16()
    params = list(model.parameters())
    values = others(params, torch.float32)
    before, values_before = state(params), state(values)
    with swap_weights(params, values) as swap:
        assert swap.copy_reasons == {"dtype": 2}
        assert holds(params, values)
        assert params[0].dtype == torch.bfloat16
    assert_same(params, before)
    assert_same(values, values_before)


def test_channels_last_weights_of_equal_strides_go_by_pointer():
    """Not being contiguous is no obstacle where both sets are laid out alike."""
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload] -- missing from the stubs
    params = list(conv.parameters())
    values = [p.detach().clone() + 1 for p in params]
    before = state(params)
    with swap_weights(params, values) as swap:
        assert swap.mode == "pointer"
        assert not params[0].is_contiguous()
        assert holds(params, values)
    assert_same(params, before)


def test_view_of_a_tensor_that_is_not_swapped_is_copied():
    """Whoever holds the whole of it, of which only a part is in the module, sees the weights."""
    whole = torch.rand(6)
    part, plain = whole[2:], nn.Parameter(torch.rand(3))
    with swap_weights([part, plain], [torch.ones(4), torch.zeros(3)]) as swap:
        assert swap.copy_reasons == {"shared storage": 1}
        assert torch.equal(whole[2:], torch.ones(4))


def test_sparse_buffer_is_copied():
    """It has no strides that could be compared."""
    buffer, plain = torch.eye(3).to_sparse(), nn.Parameter(torch.rand(3))
    before = buffer.to_dense()
    value = (2 * torch.eye(3)).to_sparse()
    with swap_weights([buffer, plain], [value, torch.zeros(3)]) as swap:
        assert swap.copy_reasons == {"layout": 1}
        assert torch.equal(buffer.to_dense(), value.to_dense())
    assert torch.equal(buffer.to_dense(), before)


def test_different_parameters_in_one_storage_are_copied():
    """Views of one flat buffer stay views of it: whoever holds the buffer sees the weights."""
    flat = torch.rand(6)
    params = [nn.Parameter(flat[:2]), nn.Parameter(flat[2:])]
    before = state(list(params))
    with swap_weights(params, [torch.ones(2), torch.zeros(4)]) as swap:
        assert swap.copy_reasons == {"shared storage": 2}
        assert flat.tolist() == [1, 1, 0, 0, 0, 0]
    assert_same(list(params), before)


def test_values_in_one_flat_buffer_go_by_pointer():
    """A flat average can be lent in slices."""
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(4))]
    flat = torch.rand(6)
    with swap_weights(params, [flat[:2], flat[2:]]) as swap:
        assert swap.mode == "pointer"
        assert torch.equal(torch.cat([p.detach() for p in params]), flat)
    assert not torch.cat([p.detach() for p in params]).any()


def test_a_tied_parameter_may_be_listed_twice():
    """The same tensor with the same value is one; with two values it is a mistake."""
    weight, bias = nn.Parameter(torch.rand(3)), nn.Parameter(torch.rand(1))
    value, other = torch.rand(3), torch.rand(1)
    before = state([weight])
    with swap_weights([weight, bias, weight], [value, other, value]) as swap:
        assert swap.mode == "pointer"
        assert torch.equal(weight.detach(), value)
        assert [o.numel() for o in swap.originals] == [3, 1, 3]
    assert_same([weight], before)
    with pytest.raises(WeightSwapError, match="list a tied parameter once"):
        WeightSwap().swap_in([weight, weight], [value, value.clone()])


def test_an_error_inside_brings_the_weights_back():
    """The user's exception comes through and finds the training weights in place."""
    params = tensors(make_model())
    before = state(params)

    def evaluate() -> None:
        with swap_weights(params, others(params)):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate()
    assert_same(params, before)


def test_a_failure_half_way_changes_nothing():
    """If a tensor cannot be written, those before it are put back and the swap is not active."""

    class Unwritable(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is Tensor.detach:
                raise MemoryError("no room for a backup")
            return super().__torch_function__(func, types, args, kwargs or {})

    params = [nn.Parameter(torch.rand(2)), torch.rand(2).as_subclass(Unwritable)]
    first = state([params[0]])
    swap = WeightSwap()
    with pytest.raises(MemoryError):
        swap.swap_in(params, [torch.rand(2), torch.rand(2)])

    assert not swap.active
    assert_same([params[0]], first)
    with swap.swap_in([params[0]], [torch.zeros(2)]):
        assert not params[0].detach().any()


def test_swapping_in_twice_is_an_error_and_out_twice_is_not():
    """A second set would lose the first; every way out may call swap_out."""
    param = nn.Parameter(torch.rand(2))
    before = state([param])
    swap = WeightSwap()
    swap.swap_out()
    swap.swap_in([param], [torch.zeros(2)])
    with pytest.raises(WeightSwapError, match="call swap_out before"):
        swap.swap_in([param], [torch.ones(2)])
    assert not param.detach().any()
    swap.swap_out()
    swap.swap_out()

    assert_same([param], before)
    with pytest.raises(WeightSwapError, match="call swap_in first"), swap:
        pass


@pytest.mark.parametrize(
    ("params", "values", "advice"),
    [
        (1, [], "one value for each"),
        (1, [torch.zeros(3)], "same shapes"),
        (1, ["itself"], "leave the pair out"),
        ("computed", [torch.zeros(2)], "parameters and buffers"),
    ],
)
def test_what_cannot_be_swapped_is_refused_before_anything_changes(
    params: Any, values: list[Any], advice: str
):
    """The error says what to give instead."""
    param: Tensor = nn.Parameter(torch.rand(2))
    before = state([param])
    listed = [param * 2] if params == "computed" else [param]
    with pytest.raises(WeightSwapError, match=advice):
        WeightSwap().swap_in(listed, [param.detach() if v == "itself" else v for v in values])
    assert_same([param], before)


def train(steps: int, *, swap_at: tuple[int, ...], allow_pointer: bool = True) -> list[Tensor]:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    batch = torch.arange(24.0).reshape(6, 4) / 24
    params = tensors(model)
    values = others(params)
    for step in range(steps):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if step in swap_at:
            swap = WeightSwap()
            with torch.inference_mode():  # Lightning's validation
                swap.swap_in(params, values, allow_pointer=allow_pointer)
                model.eval()
                model(batch)
                model.train()
            swap.swap_out()
    return [*params, *(s for group in optimizer.state.values() for s in group.values())]


@pytest.mark.parametrize("allow_pointer", [True, False])
def test_training_goes_on_as_if_nothing_had_been_swapped(allow_pointer: bool):
    """Weights, buffers and moments are bitwise those of a run that never evaluated otherwise."""
    plain = train(6, swap_at=())
    swapped = train(6, swap_at=(1, 2, 4), allow_pointer=allow_pointer)

    assert all(torch.equal(a, b) for a, b in zip(plain, swapped, strict=True))


@pytest.mark.parametrize("allow_pointer", [True, False])
@pytest.mark.parametrize("leave_in_inference_mode", [True, False])
def test_it_works_in_and_out_of_inference_mode(allow_pointer: bool, leave_in_inference_mode: bool):
    """Weights swapped in by validation can come back in `on_exception`, outside its mode."""
    layer = nn.Linear(3, 2)
    params = list(layer.parameters())
    before = state(params)
    swap = WeightSwap()
    with torch.inference_mode():
        swap.swap_in(params, others(params), allow_pointer=allow_pointer)
        assert not any(original.is_inference() for original in swap.originals)
        if leave_in_inference_mode:
            swap.swap_out()
    swap.swap_out()

    assert_same(params, before)
    layer(torch.rand(1, 3)).sum().backward()
    assert params[0].grad is not None
    assert not params[0].is_inference()


def test_a_copy_is_noticed_by_an_autograd_graph_that_waits():
    """By copy, a backward pass over saved weights fails loudly; it never uses the wrong ones."""
    first, second = nn.Linear(3, 3), nn.Linear(3, 1)
    loss = second(first(torch.rand(2, 3))).sum()
    with swap_weights([second.weight], [torch.rand(1, 3)], allow_pointer=False):
        pass
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("allow_pointer", [True, False])
@pytest.mark.slow
def test_a_compiled_module_sees_the_swapped_weights(backend: str, allow_pointer: bool):
    """Compiled code reads the weights that are in, and the old ones after, with no recompilation."""
    torch._dynamo.reset()
    model = make_model().eval()
    compiled = torch.compile(model, backend=backend)
    batch = torch.rand(5, 4)
    params = tensors(model)
    values = others(params)
    reference = make_model().eval()
    for param, value in zip(tensors(reference), values, strict=True):
        param.data.copy_(value)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        plain = compiled(batch)
        with swap_weights(params, values, allow_pointer=allow_pointer):
            inside = compiled(batch)
        after = compiled(batch)

        assert torch.equal(inside, reference(batch))
        assert torch.equal(plain, after)
        assert not torch.equal(plain, inside)


def test_a_module_moved_meanwhile_gets_its_content_back_where_it_is():
    """A cast in between keeps its effect; only the content returns."""
    param = nn.Parameter(torch.tensor([1.5, 2.5]))
    swap = WeightSwap().swap_in([param], [torch.zeros(2)])
    param.data = param.data.double()
    swap.swap_out()

    assert param.dtype == torch.float64
    assert param.tolist() == [1.5, 2.5]


def test_an_idle_swap_can_be_copied():
    """Callbacks that hold one are copied and pickled with the trainer."""
    twin = copy.deepcopy(WeightSwap())
    param = nn.Parameter(torch.rand(2))
    with twin.swap_in([param], [torch.zeros(2)]):
        assert not param.detach().any()


def test_tensors_without_a_device_memory_and_empty_ones_are_no_obstacle():
    """Empty tensors share no storage, though they all have the address 0."""
    params = [nn.Parameter(torch.empty(0)), nn.Parameter(torch.empty(0))]
    with swap_weights(params, [torch.empty(0), torch.empty(0)]) as swap:
        assert swap.mode == "pointer"
