"""Replay under FSDP2: two gloo processes give the gradients of one."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from moe_families import EXPERTS, family_model, other_experts, token_ids
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from vespo_lightning.routing.tap import RouterTap

RANKS = 2
FAMILIES = ["qwen3_moe", "deepseek_v3"]


def replayed_gradients(model: nn.Module, tap: RouterTap, ids: Tensor, experts: Tensor) -> dict[str, Tensor]:
    with tap.replaying(experts), tap.recording() as record:
        logits = model(ids).logits
        assert torch.equal(record.experts, experts)
        logits.float().square().mean().backward()
    assert torch.equal(record.experts, experts)
    gradients = {name: value.grad for name, value in model.named_parameters() if value.grad is not None}
    return {name: grad.full_tensor() if isinstance(grad, DTensor) else grad for name, grad in gradients.items()}


def recorded(family: str) -> tuple[Tensor, Tensor]:
    """Token ids [4, S] and experts [4 * S, L, K] that no router would choose."""
    model = family_model(family)
    tap = RouterTap.attach(model)
    ids = token_ids(batch=4)
    with torch.no_grad(), tap.recording() as record:
        model(ids)
    return ids, other_experts(record.experts)


def run_rank(rank: int, folder: str, checkpointing: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    for family in FAMILIES:
        ids, experts = recorded(family)
        model = family_model(family).train()
        tap = RouterTap.attach(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        rows = len(experts) // RANKS
        mine = slice(rank * rows, (rank + 1) * rows)
        gradients = replayed_gradients(model, tap, ids.chunk(RANKS)[rank], experts[mine])
        if rank == 0:
            torch.save(gradients, f"{folder}/{family}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize(
    "checkpointing",
    [pytest.param(False, marks=pytest.mark.long), True],
    ids=["plain", "checkpointing"],
)
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, checkpointing: bool) -> None:
    mp.spawn(run_rank, (str(tmp_path), checkpointing), nprocs=RANKS)
    for family in FAMILIES:
        ids, experts = recorded(family)
        model = family_model(family).train()
        tap = RouterTap.attach(model)
        expected = replayed_gradients(model, tap, ids, experts)
        found = torch.load(tmp_path / f"{family}.pt")
        assert found.keys() == expected.keys()
        difference = max((found[name] - value).abs().max().item() for name, value in expected.items())
        print(f"{family}: largest difference of a gradient {difference:.1e}")
        assert difference < 1e-6
        routers = [name for name in found if name.endswith("mlp.gate.weight") and found[name].shape[0] == EXPERTS]
        assert len(routers) == len(tap.layers)
        for name in routers:
            assert found[name].abs().max() > 1e-4, name
