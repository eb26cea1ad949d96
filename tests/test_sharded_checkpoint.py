"""Checkpoints of shards, by one process; `tests/test_processes.py` has two processes write what one reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dpfa_hf import sharded_checkpoint
from dpfa_hf.per_example.shards import whole


@pytest.fixture(scope="module", autouse=True)
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def trained(seed: int, *, cut: bool, steps: int = 3) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    if cut:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(steps):
        model(torch.ones(2, 5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = {name: whole(p.detach()) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": whole(optimizer.state[p][key]) for key in ("exp_avg", "exp_avg_sq", "step")}
    return found


@pytest.mark.parametrize("cut", [True, False])
def test_what_shards_wrote_is_read_back_with_the_optimizer_by_a_cut_or_a_whole_model(cut: bool, tmp_path: Path) -> None:
    written = trained(1, cut=True)
    assert not sharded_checkpoint.is_sharded(str(tmp_path))
    sharded_checkpoint.save_model(str(tmp_path), written[0])
    sharded_checkpoint.save_optimizer(str(tmp_path), *written)
    assert sharded_checkpoint.is_sharded(str(tmp_path))
    read = trained(2, cut=cut, steps=1)
    assert not torch.equal(state(*read)["0.weight"], state(*written)["0.weight"])
    sharded_checkpoint.load_model(str(tmp_path), read[0])
    sharded_checkpoint.load_optimizer(str(tmp_path), *read)
    for name, tensor in state(*written).items():
        assert torch.equal(state(*read)[name], tensor), name


def test_a_gathered_model_is_whole_and_on_the_cpu() -> None:
    model, _ = trained(1, cut=True)
    found = sharded_checkpoint.gathered(model)
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "0.weight": (7, 5), "0.bias": (7,), "1.weight": (3, 7), "1.bias": (3,),
    }  # fmt: skip
    assert all(torch.equal(found[name], whole(p.detach())) for name, p in model.named_parameters())


def test_a_checkpoint_that_is_not_whole_is_not_read(tmp_path: Path) -> None:
    model, _ = trained(1, cut=True)
    sharded_checkpoint.save_model(str(tmp_path), model)
    next((tmp_path / "model_shards").glob("*.distcp")).unlink()
    with pytest.raises((dist.checkpoint.CheckpointException, FileNotFoundError)):
        sharded_checkpoint.load_model(str(tmp_path), model)
