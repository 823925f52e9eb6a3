"""Swaps of sharded parameters on two gloo ranks. This file is also what each rank runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nshtrainer.runtime.weights import WeightSwap, WeightSwapError, swap_weights

CASES = ["dtensor", "fully_shard", "flat_fsdp", "ddp"]


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES)
def test_sharded_weights_are_swapped_and_come_back(tmp_path: Path, case: str):
    """Each rank evaluates with the other weights and trains on bit for bit as if it had not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, case, str(tmp_path / "rendezvous")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()

    for rank, output in zip(ranks, outputs, strict=True):
        assert rank.returncode == 0, output
        assert output.strip().endswith("all promises kept"), output


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def whole_values() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(p.shape, generator=generator) for p in make_model().parameters()]


def reference(batch: torch.Tensor) -> torch.Tensor:
    model = make_model()
    for param, value in zip(model.parameters(), whole_values(), strict=True):
        param.data.copy_(value)
    return model(batch).detach()


def dtensor(rank: int) -> None:
    """A DTensor takes DTensors and plain local shards, always by copy into its own storage."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    whole, other = torch.rand(6, 2), torch.arange(12.0).reshape(6, 2)
    param = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
    sharded = distribute_tensor(other, mesh, [Shard(0)])
    assert isinstance(param.data, DTensor)
    local = param.data.to_local()
    before, address = local.clone(), local.data_ptr()
    for value in (sharded, sharded.to_local().double(), sharded.to_local()):
        with swap_weights([param], [value]) as swap:
            assert swap.mode == "copy"
            assert swap.copy_reasons == {"tensor subclass": 1}
            assert param.full_tensor().equal(other)
            assert swap.originals[0].full_tensor().equal(param.full_tensor()) is False
        assert param.to_local().equal(before)
        assert param.to_local().data_ptr() == address
    replicated = distribute_tensor(other, mesh, [Replicate()])
    for wrong in (replicated, other):
        with pytest.raises(WeightSwapError, match="same mesh and placement, or the local shard"):
            WeightSwap().swap_in([param], [wrong])
    with pytest.raises(WeightSwapError, match="same mesh and placement"):
        WeightSwap().swap_in([nn.Parameter(torch.rand(6, 2))], [sharded])
    assert param.to_local().equal(before)
    assert rank in (0, 1)


def train(wrap: object, batch: torch.Tensor, *, swap_after: int | None) -> list[torch.Tensor]:
    """Train three steps, in one of them evaluating with other weights; return the shards."""
    model = make_model()
    model = wrap(model)  # type: ignore[operator] -- a function of the case
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        if step == swap_after:
            with torch.no_grad():
                plain = model(batch)  # leaves the gathered parameters of the root in memory
                with swap_weights(params, shards_of(params), module=model):
                    assert model(batch).allclose(reference(batch), atol=1e-6)
                assert model(batch).equal(plain)
    return [getattr(p, "to_local", lambda p=p: p)().detach().clone() for p in params]


def shards_of(params: list[nn.Parameter]) -> list[torch.Tensor]:
    """Lay the whole values out as the parameters are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    values = whole_values()
    result: list[torch.Tensor] = []
    for param, value in zip(params, values, strict=True):
        if isinstance(param, DTensor):
            result.append(distribute_tensor(value, param.device_mesh, param.placements))
        elif param.shape == value.shape:
            result.append(value)
        else:  # FSDP's first version: this rank's part of the flat parameter
            flat = torch.cat([v.flatten() for v in values])
            parts = [torch.full((v.numel(),), float(i)) for i, v in enumerate(values)]
            half = (len(flat) + 1) // 2
            mine = slice(half * dist.get_rank(), half * (dist.get_rank() + 1))
            result.append(flat[mine][torch.cat(parts)[mine] == len(result)])
    return result


def same_as_plain(wrap: object) -> None:
    batch = torch.arange(24.0).reshape(6, 4) / 24
    plain = train(wrap, batch, swap_after=None)
    swapped = train(wrap, batch, swap_after=1)
    assert all(a.equal(b) for a, b in zip(plain, swapped, strict=True))


def fully_shard(_: int) -> None:
    """FSDP2: the gathered copy is dropped, so that the next forward pass uses the new shards."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard as shard

    mesh = init_device_mesh("cpu", (2,))
    same_as_plain(lambda model: shard(model, mesh=mesh))


def flat_fsdp(_: int) -> None:
    """FSDP's first version: parameters that are views of a flat one are never exchanged."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    same_as_plain(
        lambda model: FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
    )


def ddp(_: int) -> None:
    """Under DDP parameters are plain: pointers are exchanged and the reducer does not mind."""
    from torch.nn.parallel import DistributedDataParallel

    same_as_plain(DistributedDataParallel)


def main(case: str, rendezvous: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    {"dtensor": dtensor, "fully_shard": fully_shard, "flat_fsdp": flat_fsdp, "ddp": ddp}[case](rank)
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.write("all promises kept\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
