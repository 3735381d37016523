"""Load-balance and z-loss: their values, and that micro-batches add up to the mini-batch."""

from __future__ import annotations

import pytest
import torch
from moe_families import EXPERTS, FAMILIES, TOP_K, family_model, other_experts, router_gradients, token_ids
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.routing.losses import RouterLosses, RouterTotals, expert_load, load_balance_loss, z_loss
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.outputs import RoutingBatch

T, L, E, K = 13, 3, 6, 2


def routing(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, L, E], the experts [T, L, K] that they choose, a mask [T] that leaves some tokens out."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(T, L, E, generator=generator, dtype=torch.float64)
    return logits, logits.topk(K, dim=-1).indices, torch.rand(T, generator=generator) > 0.3


def totals_of(experts: Tensor, mask: Tensor, num_experts: int = E) -> RouterTotals:
    return RouterTotals(int(mask.sum()), expert_load(experts, mask, num_experts))


def test_values_by_hand():
    logits, experts, mask = routing()
    balance = squares = 0.0
    for layer in range(L):
        tokens = [t for t in range(T) if mask[t]]
        for expert in range(E):
            share = sum(int(expert in experts[t, layer]) for t in tokens) / (len(tokens) * K)
            mean = sum(float(logits[t, layer].softmax(-1)[expert]) for t in tokens) / len(tokens)
            balance += E * share * mean / L
        squares += sum(float(logits[t, layer].exp().sum().log()) ** 2 for t in tokens) / len(tokens) / L
    totals = totals_of(experts, mask)
    assert float(load_balance_loss(logits.softmax(-1), mask, totals)) == pytest.approx(balance, rel=1e-12)
    assert float(z_loss(logits, mask, totals)) == pytest.approx(squares, rel=1e-12)
    losses = RouterLosses(load_balance=0.01, z=0.001)
    total = losses(logits, logits.softmax(-1), mask, totals)
    assert float(total) == pytest.approx(0.01 * balance + 0.001 * squares, rel=1e-12)
    assert float(RouterLosses()(logits, logits.softmax(-1), mask, totals)) == 0.0


def test_values_are_those_of_the_router_metrics():
    logits, experts, mask = routing()
    statistics = RouterStatistics(list(range(L)), E)
    statistics.update(
        RoutingBatch(
            layers=list(range(L)),
            experts=experts,
            logits=logits,
            probs=logits.softmax(-1),
            mask=mask,
            recorded_experts=None,
            recorded_top_probs=None,
            native_experts=experts,
        )
    )
    metrics = statistics.per_layer()
    totals = totals_of(experts, mask)
    found = load_balance_loss(logits.softmax(-1), mask, totals), z_loss(logits, mask, totals)
    assert float(found[0]) == pytest.approx(float(metrics["load_balance_loss"].mean()), rel=1e-6)
    assert float(found[1]) == pytest.approx(float(metrics["z_loss"].mean()), rel=1e-6)


@pytest.mark.parametrize("which", ["load", "probabilities", "neither"])
def test_a_uniform_load_or_uniform_probabilities_give_one(which):
    probs = torch.rand(6, 1, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    experts = torch.zeros(6, 1, 1, dtype=torch.int64)
    if which == "load":
        experts = torch.arange(6).view(6, 1, 1)
    elif which == "probabilities":
        probs = torch.full_like(probs, 1 / 6)
    else:
        probs = torch.eye(6)[:1].expand(6, 1, 6)
    mask = torch.ones(6, dtype=torch.bool)
    value = float(load_balance_loss(probs, mask, totals_of(experts, mask)))
    assert value == pytest.approx(6.0 if which == "neither" else 1.0)


def gradient(cut: list[slice], totals: list[RouterTotals]) -> Tensor:
    logits, _, mask = routing()
    logits.requires_grad_()
    losses = RouterLosses(load_balance=1.0, z=0.1)
    for rows, counts in zip(cut, totals, strict=True):
        losses(logits[rows], logits[rows].softmax(-1), mask[rows], counts).backward()
    return logits.grad


CUTS = [
    [slice(0, 5), slice(5, 13)],
    [slice(i, i + 1) for i in range(T)],
    [slice(0, 0), slice(0, 12), slice(12, 13)],
]


@pytest.mark.parametrize("cut", CUTS)
def test_cutting_the_mini_batch_does_not_change_the_gradient(cut):
    _, experts, mask = routing()
    load = sum(expert_load(experts[rows], mask[rows], E) for rows in cut)
    totals = RouterTotals(int(mask.sum()), load)
    assert torch.equal(load, expert_load(experts, mask, E))
    whole = gradient([slice(0, T)], [totals])
    torch.testing.assert_close(gradient(cut, [totals] * len(cut)), whole, rtol=1e-12, atol=1e-15)
    assert whole[mask].abs().amax(-1).min() > 0 and torch.equal(whole[~mask], torch.zeros_like(whole[~mask]))


def test_loads_of_micro_batches_would_change_it():
    """Why the totals are those of the mini-batch."""
    _, experts, mask = routing()
    count = int(mask.sum())
    own = [RouterTotals(count, expert_load(experts[rows], mask[rows], E)) for rows in CUTS[0]]
    whole = gradient([slice(0, T)], [totals_of(experts, mask)])
    assert (gradient(CUTS[0], own) - whole).abs().max() > 1e-3


def test_the_load_is_that_of_known_experts_of_tokens_that_count():
    experts = torch.tensor([[[0, 1]], [[2, 0]], [[-1, -1]], [[1, 2]]])
    assert expert_load(experts, torch.tensor([True, True, True, False]), 4).tolist() == [[2, 1, 1, 0]]
    assert expert_load(experts[:0], torch.zeros(0, dtype=torch.bool), 4).tolist() == [[0, 0, 0, 0]]


def test_nothing_that_counts_gives_zero_with_a_graph():
    logits, experts, _ = routing()
    logits.requires_grad_()
    nothing = torch.zeros(T, dtype=torch.bool)
    loss = RouterLosses(1.0, 1.0)(logits, logits.softmax(-1), nothing, totals_of(experts, nothing))
    loss.backward()
    assert float(loss.detach()) == 0.0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_masked_rows_may_hold_anything():
    logits, experts, mask = routing()
    wanted = RouterLosses(1.0, 1.0)(logits, logits.softmax(-1), mask, totals_of(experts, mask))
    logits[~mask] = torch.nan
    found = RouterLosses(1.0, 1.0)(logits, logits.softmax(-1), mask, totals_of(experts, mask))
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("loss", ["load_balance", "z"])
def test_a_step_down_the_gradient_does_what_the_loss_is_for(loss):
    """The load evens out, or logits shrink."""
    logits, _, mask = routing()
    logits = logits + torch.tensor([3.0, 1, 0, 0, 0, -2])
    logits.requires_grad_()
    losses, before = RouterLosses(**{loss: 1.0}), None
    for _ in range(60):
        experts = logits.topk(K, dim=-1).indices
        value = losses(logits, logits.softmax(-1), mask, totals_of(experts, mask))
        load = expert_load(experts, mask, E).double()
        now = float(load.std(dim=-1).mean()) if loss == "load_balance" else float(value.detach())
        before = now if before is None else before
        (grad,) = torch.autograd.grad(value, logits)
        logits = (logits - 20 * grad).detach().requires_grad_()
    assert now < 0.5 * before


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_experts_count_and_routers_learn(family):
    model = family_model(family)
    tap = RouterTap.attach(model)
    with tap.recording() as record, torch.no_grad():
        model(token_ids())
    experts = other_experts(record.experts)
    with tap.replaying(experts), tap.recording(keep_graph=True) as record:
        model(token_ids())
        mask = torch.arange(len(experts)) % 3 > 0
        load = expert_load(record.experts, mask, EXPERTS)
        assert torch.equal(load, expert_load(experts, mask, EXPERTS))
        assert int(load.sum()) == int(mask.sum()) * TOP_K * len(tap.layers)
        loss = RouterLosses(load_balance=1.0)(record.logits, record.probs, mask, RouterTotals(int(mask.sum()), load))
        loss.backward()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in router_gradients(model).values())


@pytest.mark.parametrize("key", ["load_balance", "z"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), "much", True])
def test_bad_coefficients(key, value):
    with pytest.raises(UserError, match=rf"^router_loss\.{key}={value} is not allowed; give a finite number at least"):
        RouterLosses(**{key: value})


@pytest.mark.parametrize(("load_balance", "z"), [(0.0, 0.0), (0.1, 0.0), (0.0, 0.1), (0.1, 0.1)])
def test_what_is_needed(load_balance, z):
    losses = RouterLosses(load_balance, z)
    assert losses.needs_load is (load_balance > 0)
    assert losses.needs_graph is (load_balance > 0 or z > 0)


def test_routers_that_give_probabilities_have_no_z_loss():
    model = family_model("gemma4")
    with RouterTap.attach(model).recording() as record, torch.no_grad():
        model(token_ids())
    mask = torch.ones(len(record.logits), dtype=torch.bool)
    with pytest.raises(UserError, match=r"^router_loss\.z=0.1 has nothing to act on: .*; use router_loss\.z=0$"):
        RouterLosses(z=0.1)(record.logits, record.probs, mask, RouterTotals(len(mask), None))
