"""Shared parameters: gradients are divided once per optimizer step, and mistakes are named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from nshtrainer_ema import GradientSkippingCallback, SharedParametersCallback
from nshtrainer_ema.shared_parameters.callback import SharedParametersError, divide


@pytest.fixture
def make(make_model: Any, make_trainer: Any, make_loader: Any) -> dict[str, Any]:
    class Shared(make_model):
        """Plain SGD at lr 1, so that a step is minus the gradient."""

        factors: dict[str, float] = {"first.weight": 2, "second.bias": 4.0}

        def __init__(self, **options: Any) -> None:
            super().__init__(torch.optim.SGD, **{"lr": 1e-3, **options})

        @property
        def shared_parameters(self) -> list[tuple[Tensor, float]]:
            return [(self.get_parameter(name), factor) for name, factor in self.factors.items()]

    return {"model": Shared, "plain": make_model, "trainer": make_trainer, "loader": make_loader}


def moves(model: Any, start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: p.detach() - start[name] for name, p in model.named_parameters()}


def first_step(make: Any, *callbacks: Any, batches: int = 1, **options: Any) -> dict[str, Tensor]:
    model = make["model"]()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make["trainer"](*callbacks, limit_val_batches=0, max_steps=1, **options)
    trainer.fit(model, make["loader"](batches))
    return moves(model, start)


@pytest.mark.parametrize(
    ("options", "batches"),
    [({}, 1), ({"accumulate_grad_batches": 4}, 4), ({"precision": "bf16-mixed"}, 1)],
    ids=["32", "accumulated", "bf16"],
)
def test_each_gradient_is_divided_once_per_optimizer_step(options, batches, make):
    """By its factor; with four accumulated batches too, not four times over."""
    plain = first_step(make, batches=batches, **options)
    scaled = first_step(make, SharedParametersCallback(), batches=batches, **options)

    for name, move in plain.items():
        factor = make["model"].factors.get(name, 1)
        torch.testing.assert_close(scaled[name], move / factor, rtol=1e-3, atol=1e-7)
        assert move.abs().sum() > 0


def test_under_a_loss_scaler_too(make, scaled):
    """16-mixed."""
    plain = first_step(make, plugins=[scaled()])
    divided = first_step(make, SharedParametersCallback(), plugins=[scaled()])

    torch.testing.assert_close(
        divided["first.weight"], plain["first.weight"] / 2, rtol=1e-3, atol=1e-7
    )


def test_what_is_measured_is_the_divided_gradient(make):
    """Wherever the callbacks stand in the list: the transform comes before the decision."""
    make["model"].factors = dict.fromkeys(
        ("first.weight", "first.bias", "second.weight", "second.bias"), 1e9
    )
    for order in (1, -1):
        skipping = GradientSkippingCallback(threshold=1e-3, start_after_n_steps=0)
        first_step(make, *(SharedParametersCallback(), skipping)[::order])
        assert (skipping.skipped_steps, skipping.seen_steps) == (0, 1)


def test_with_several_optimizers_each_divides_its_own(make):
    """A parameter is divided at its own optimizer's step, whatever others do before."""

    class Two(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            self.manual_backward(self.loss(batch))
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(m.parameters(), lr=1e-3) for m in (self.first, self.second)]

    plain = first_step(make)
    model = Two()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    trainer.fit(model, make["loader"](1))

    for name, move in moves(model, start).items():
        factor = model.factors.get(name, 1)
        torch.testing.assert_close(move, plain[name] / factor, rtol=1e-3, atol=1e-7)


def test_parameters_without_gradient_are_named_once(make, caplog):
    """A warning, not one per step."""

    class Unused(make["model"]):
        factors = {"unused": 2, "first.weight": 2}

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(1))

    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    trainer.fit(Unused(), make["loader"](4))
    warned = [r.getMessage() for r in caplog.records if "without a gradient" in r.getMessage()]

    assert len(warned) == 1
    assert "unused" in warned[0]
    assert "first.weight" not in warned[0]


class Tied(nn.Module):
    """An embedding whose transpose is the head: two uses of one weight."""

    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse=sparse)
        self.head = nn.Linear(4, 6, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(torch.linspace(-1, 1, 24).reshape(6, 4))
        self.head.weight = self.embedding.weight


@pytest.fixture
def make_tied(make_model: Any) -> Any:
    class Language(make_model):
        def __init__(self) -> None:
            super().__init__(torch.optim.SGD, lr=1e-3)
            del self.first, self.second
            self.net = Tied()

        def loss(self, batch: Any) -> Tensor:
            hidden = self.net.embedding(torch.arange(5))
            return nn.functional.cross_entropy(self.net.head(hidden), torch.arange(1, 6))

    return Language


@pytest.mark.parametrize("listed", [None, 2, 5], ids=["found", "listed", "another factor"])
def test_a_tie_is_divided_by_the_number_of_its_names(listed, make, make_tied):
    """Where the module lists none; what it lists is its word."""

    def step(*callbacks: Any, **attributes: Any) -> Tensor:
        model = type("Mine", (make_tied,), attributes)()
        start = model.net.head.weight.detach().clone()
        trainer = make["trainer"](*callbacks, limit_val_batches=0, max_steps=1)
        trainer.fit(model, make["loader"](1))
        assert model.net.head.weight is model.net.embedding.weight
        return model.net.head.weight.detach() - start

    attributes = {}
    if listed is not None:
        attributes["shared_parameters"] = property(lambda self: [(self.net.head.weight, listed)])
    plain = step()

    torch.testing.assert_close(
        step(SharedParametersCallback(), **attributes), plain / (listed or 2), rtol=1e-3, atol=1e-7
    )
    assert plain.abs().sum() > 0


def reported(caplog: Any) -> list[str]:
    return [r.getMessage() for r in caplog.records if "divided at each" in r.getMessage()]


def test_what_is_done_is_said_once(make, make_tied, caplog):
    """With all names of each parameter, its factor, and where that is from."""
    caplog.set_level("INFO", logger="nshtrainer_ema")
    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0, max_epochs=2)
    trainer.fit(make_tied(), make["loader"](3))

    assert reported(caplog) == [
        "gradients divided at each optimizer step: net.embedding.weight = net.head.weight by 2; "
        "which the module has under several names"
    ]


def test_a_tie_that_is_not_listed_is_left_alone_and_said(make, make_tied, caplog):
    """The property has the last word, and an empty one is a warning."""
    caplog.set_level("INFO", logger="nshtrainer_ema")
    model = type("Mine", (make_tied,), {"shared_parameters": property(lambda self: [])})()
    callback = SharedParametersCallback()
    make["trainer"](callback, limit_val_batches=0).fit(model, make["loader"](1))

    [said] = [r for r in caplog.records if "is empty" in r.getMessage()]
    assert said.levelname == "WARNING"
    assert "left alone: net.embedding.weight = net.head.weight" in said.getMessage()


def test_no_property_and_no_tie_is_an_error_when_training_starts(make, make_tied):
    """Not silence; and with detection off, a tie does not help."""
    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    with pytest.raises(
        SharedParametersError, match=r"(?s)no `shared_parameters`.*second name.*@prop"
    ):
        trainer.fit(make["plain"](), make["loader"](1))
    assert trainer.global_step == 0

    trainer = make["trainer"](SharedParametersCallback(detect_ties=False), limit_val_batches=0)
    with pytest.raises(SharedParametersError, match=r"(?s)detect_ties is off \(net\.embedding"):
        trainer.fit(make_tied(), make["loader"](1))


def test_factors_are_known_while_training_and_forgotten_after(make):
    """No tensor is held once the run is over, by an exception or not."""
    seen: list[dict[str, float]] = []

    class Stops(make["model"]):
        def on_train_batch_end(self, *args: Any) -> None:
            seen.append(callback.factors)
            if len(seen) == 2:
                raise RuntimeError("enough")

    callback = SharedParametersCallback()
    trainer = make["trainer"](callback, limit_val_batches=0, max_steps=1)
    trainer.fit(Stops(), make["loader"](1))
    assert (seen, callback.factors) == ([Stops.factors], {})

    trainer = make["trainer"](callback, limit_val_batches=0, max_steps=1)
    with pytest.raises(RuntimeError, match="enough"):
        trainer.fit(Stops(), make["loader"](1))
    assert callback.factors == {}


def test_frozen_parameters_are_no_cause_for_a_warning(make, caplog):
    """They have no gradient on purpose."""

    class Frozen(make["model"]):
        def __init__(self) -> None:
            super().__init__()
            self.first.weight.requires_grad_(False)

    trainer = make["trainer"](SharedParametersCallback(), limit_val_batches=0)
    trainer.fit(Frozen(), make["loader"](2))

    assert "without a gradient" not in caplog.text


def test_sparse_and_dense_gradients_are_divided_alike():
    """In one call or each by itself: by the same factor, in place."""
    dense = [torch.arange(4.0), torch.ones(2, 2, dtype=torch.bfloat16)]
    sparse = torch.sparse_coo_tensor(  # not coalesced
        [[0, 2, 2]], [1.0, 2.0, 4.0], (3,), check_invariants=True
    )
    before = [grad.clone() for grad in (*dense, sparse)]
    divide([dense[0], sparse, dense[1]], 4.0)

    for grad, old in zip((*dense, sparse), before, strict=True):
        torch.testing.assert_close(grad.to_dense(), old.to_dense() / 4)


def test_a_sparse_embedding_trains_with_divided_gradients(make):
    """SparseAdam and SGD take sparse gradients; a tied weight has a dense one."""

    class Sparse(make["plain"]):
        def __init__(self) -> None:
            super().__init__(torch.optim.SGD, lr=1e-3)
            self.table = nn.Embedding(6, 4, sparse=True)
            self.table.weight.data = torch.linspace(-1, 1, 24).reshape(6, 4)

        @property
        def shared_parameters(self) -> list[tuple[Tensor, float]]:
            return [(self.table.weight, 2), (self.first.weight, 2)]

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.mse_loss(self(x + self.table(torch.arange(4))), y)

    def step(*callbacks: Any) -> dict[str, Tensor]:
        model = Sparse()
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        trainer = make["trainer"](*callbacks, limit_val_batches=0, max_steps=1)
        trainer.fit(model, make["loader"](1))
        assert model.table.weight.grad.is_sparse
        return moves(model, start)

    plain, scaled = step(), step(SharedParametersCallback())
    for name in ("table.weight", "first.weight"):
        torch.testing.assert_close(scaled[name], plain[name] / 2, rtol=1e-3, atol=1e-7)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dtensor_gradient_is_divided(mesh):
    """As FSDP2 has them, beside plain ones."""
    whole, plain = torch.arange(6.0), torch.ones(3)
    sharded = distribute_tensor(whole.clone(), mesh, [Shard(0)])
    divide([sharded, plain], 2.0)

    torch.testing.assert_close(sharded.full_tensor(), whole / 2)
    torch.testing.assert_close(plain, torch.full((3,), 0.5))


def test_a_compiled_part_of_the_module_is_divided(make, make_tied):
    """`torch.compile` keeps the parameters; `eager` is its plainest backend."""

    class Compiled(make_tied):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, backend="eager")

    callback = SharedParametersCallback()
    moved: list[Tensor] = []
    for model, callbacks in ((make_tied(), []), (Compiled(), [callback])):
        [start] = [p.detach().clone() for p in model.parameters()]
        trainer = make["trainer"](*callbacks, limit_val_batches=0, max_steps=1)
        trainer.fit(model, make["loader"](1))
        moved += [p.detach() - start for p in model.parameters()]

    torch.testing.assert_close(moved[1], moved[0] / 2, rtol=1e-3, atol=1e-7)
