"""AdamW with float32 masters under bfloat16 parameters, and which parameters decay."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from vespo_lightning.training.optimizers import MasterWeightAdamW, build_adamw

OPTIONS = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-8}


def net(dtype: torch.dtype) -> nn.Sequential:
    """Weights near 1, where bfloat16 numbers are 0.0039 or 0.0078 apart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((1 + 0.1 * torch.randn_like(parameter)).bfloat16())
    return model.to(dtype)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    """One step with gradients that both precisions represent."""
    generator = torch.Generator().manual_seed(number)
    optimizer.zero_grad()
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).bfloat16().to(parameter.dtype)
    optimizer.step()


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_masters_follow_float32_and_parameters_are_their_rounding(weight_decay):
    low, high = net(torch.bfloat16), net(torch.float32)
    low_optimizer = build_adamw(low, weight_decay=weight_decay, **OPTIONS)
    high_optimizer = build_adamw(high, weight_decay=weight_decay, **OPTIONS)
    assert isinstance(low_optimizer, MasterWeightAdamW)
    assert type(high_optimizer) is torch.optim.AdamW
    for number in range(30):
        step(low, low_optimizer, number)
        step(high, high_optimizer, number)
    for master, parameter, wanted in zip(low_optimizer.masters, low.parameters(), high.parameters(), strict=True):
        assert master.dtype == torch.float32 and parameter.dtype == torch.bfloat16
        assert torch.equal(master, wanted)
        assert torch.equal(parameter, wanted.bfloat16())


def test_updates_below_the_spacing_of_bfloat16_add_up():
    """Steps of 1e-4 on a weight of 1 round to nothing one by one; a hundred of them must not."""
    weight = nn.Parameter(torch.ones(1, 1, dtype=torch.bfloat16))
    plain = nn.Parameter(weight.detach().clone())
    optimizer = MasterWeightAdamW([weight], weight_decay=0.0, **OPTIONS)
    naive = torch.optim.AdamW([plain], weight_decay=0.0, **OPTIONS)
    for _ in range(100):
        weight.grad, plain.grad = torch.ones_like(weight), torch.ones_like(plain)
        optimizer.step()
        naive.step()
    assert plain.item() == 1.0
    assert weight.item() == pytest.approx(0.99, abs=0.002)
    assert optimizer.masters[0].item() == pytest.approx(0.99, abs=1e-5)


def test_state_round_trip_continues_bit_for_bit():
    model = net(torch.bfloat16)
    optimizer = build_adamw(model, weight_decay=0.1, **OPTIONS)
    for number in range(5):
        step(model, optimizer, number)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    masters = copy.deepcopy(saved["optimizer"]["masters"])
    assert not torch.equal(masters[0], masters[0].bfloat16().float())  # more than the parameters hold

    other = net(torch.bfloat16)
    other_optimizer = build_adamw(other, weight_decay=0.1, **OPTIONS)
    step(other, other_optimizer, 99)
    other.load_state_dict(saved["model"])
    other_optimizer.load_state_dict(saved["optimizer"])
    for number in range(5, 10):
        step(model, optimizer, number)
        step(other, other_optimizer, number)
    for a, b in zip(optimizer.masters, other_optimizer.masters, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(saved["optimizer"]["masters"][0], masters[0])  # what was loaded does not move with training


def test_zero_grad_clears_the_parameters():
    model = net(torch.bfloat16)
    optimizer = build_adamw(model, weight_decay=0.0, **OPTIONS)
    step(model, optimizer, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(master.grad is None for master in optimizer.masters)


def test_parameters_without_a_gradient_stay():
    """Experts that no token chose, frozen parts of a graph."""
    model = net(torch.bfloat16)
    optimizer = build_adamw(model, weight_decay=0.1, **OPTIONS)
    step(model, optimizer, 0)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.zero_grad()
    optimizer.step()
    for parameter, wanted in zip(model.parameters(), before, strict=True):
        assert torch.equal(parameter, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_decay_and_vectors_do_not(dtype):
    model = net(dtype)
    model[0].bias.requires_grad_(False)
    optimizer = build_adamw(model, weight_decay=0.1, **OPTIONS)
    groups = [(group["weight_decay"], [tuple(p.shape) for p in group["params"]]) for group in optimizer.param_groups]
    assert groups == [(0.1, [(3, 4)]), (0.0, [(3,), (3,)])]
    before = [p.detach().float().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1.0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    after = [p.detach().float() for p in model.parameters()]
    torch.testing.assert_close(after[0], 0.9 * before[0], rtol=0.005, atol=0)
    for a, b in zip(after[1:], before[1:], strict=True):
        assert torch.equal(a, b)


def test_no_decay_is_one_group():
    assert len(build_adamw(net(torch.float32), weight_decay=0.0, **OPTIONS).param_groups) == 1
