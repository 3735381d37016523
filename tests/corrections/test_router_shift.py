"""RSPO's factor: the shift from routing, and its effect on coefficients."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from ragged_batches import build, close

from vespo_lightning.corrections.router_shift import RouterShift, log_router_shift, router_shift_of
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.outputs import RoutingBatch

TOKENS, LAYERS, EXPERTS, ACTIVE = 5, 3, 8, 2


def routing(seed: int = 0, move: float = 0.5) -> RoutingBatch:
    """Router logits moved by ``move`` times noise since generation time; probabilities recorded in float16."""
    generator = torch.Generator().manual_seed(seed)
    old_logits = torch.randn(TOKENS, LAYERS, EXPERTS, generator=generator)
    logits = old_logits + move * torch.randn(TOKENS, LAYERS, EXPERTS, generator=generator)
    top = old_logits.softmax(-1).topk(ACTIVE)
    return RoutingBatch(
        layers=[0, 1, 2],
        experts=logits.topk(ACTIVE).indices,
        logits=logits,
        probs=logits.softmax(-1),
        mask=torch.ones(TOKENS, dtype=torch.bool),
        recorded_experts=top.indices,
        recorded_top_probs=top.values.half().float(),
        native_experts=logits.topk(ACTIVE).indices,
    )


def with_shift(**options):
    shift = torch.tensor([0.0, -0.1, -0.3, -16.0], dtype=torch.float64)
    return replace(build([[0.2, -0.1, 0.05], [0.1]], **options), router_shift=shift)


def test_shift_is_the_mean_change_of_log_probabilities():
    generator = torch.Generator().manual_seed(1)
    new, old = (torch.rand(TOKENS, LAYERS, ACTIVE, generator=generator, dtype=torch.float64) for _ in range(2))
    expected = [
        -sum(abs(math.log(new[t, i, k]) - math.log(old[t, i, k])) for i in range(LAYERS) for k in range(ACTIVE))
        / (LAYERS * ACTIVE)
        for t in range(TOKENS)
    ]
    close(log_router_shift(new, old), expected)


def test_probabilities_of_zero_give_a_finite_shift():
    zero, one = torch.zeros(1, 2, 2), torch.ones(1, 2, 2)
    assert log_router_shift(zero, one).item() == pytest.approx(-24 * math.log(2))
    assert log_router_shift(zero, zero).item() == 0


def test_it_compares_the_experts_of_generation_time():
    batch = routing()
    assert not torch.equal(batch.experts.sort().values, batch.recorded_experts.sort().values)
    expected = []
    for t in range(TOKENS):
        change = 0.0
        for i in range(LAYERS):
            for k in range(ACTIVE):
                expert = int(batch.recorded_experts[t, i, k])
                change += abs(math.log(batch.probs[t, i, expert]) - math.log(batch.recorded_top_probs[t, i, k]))
        expected.append(-change / (LAYERS * ACTIVE))
    found = router_shift_of(batch)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-3)  # float16 on both sides
    assert found.max() < -0.05


def test_an_unchanged_router_shifts_nothing_at_all():
    """Although one side went through float16."""
    assert router_shift_of(routing(move=0.0)).tolist() == [0.0] * TOKENS


def test_float16_has_the_resolution_that_the_docstring_gives():
    """For a router that moved by 1e-4, far below a step of float16, the mean over many tokens is still right."""
    generator = torch.Generator().manual_seed(2)
    old = torch.rand(4000, 4, 2, generator=generator, dtype=torch.float64) * 0.5 + 0.1
    new = old * math.exp(1e-4)
    rounded = log_router_shift(new.half().double(), old.half().double())
    assert rounded.mean().item() == pytest.approx(-1e-4, rel=0.05)
    assert rounded.min().item() > -1e-3


def test_tokens_outside_the_mask_may_hold_anything():
    batch = routing()
    mask = torch.tensor([True, False, True, True, True])
    unknown = replace(batch, mask=mask, recorded_experts=batch.recorded_experts.clone())
    unknown.recorded_experts[1] = -1
    unknown.recorded_top_probs[1] = math.nan
    assert torch.equal(router_shift_of(unknown), torch.where(mask, router_shift_of(routing()), 0.0))


def test_nan_in_the_router_stays_visible():
    batch = routing()
    batch.probs[2] = math.nan
    assert router_shift_of(batch).isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("missing", "remedy"),
    [
        ({"recorded_experts": None}, "engine.record_routing=true"),
        ({"recorded_experts": torch.full((TOKENS, LAYERS, ACTIVE), -1)}, "engine.record_routing=true"),
        ({"recorded_top_probs": None}, "engine=transformers"),
    ],
)
def test_an_engine_that_returned_less_is_named(missing, remedy):
    with pytest.raises(UserError, match=f"^correction=router_shift needs .*{remedy}$"):
        router_shift_of(replace(routing(), **missing))


@pytest.mark.parametrize("objective", [Reinforce(), Grpo(), Vespo()], ids=lambda o: o.name)
@pytest.mark.parametrize("floor", [0.8, 0.01])
def test_the_factor_multiplies_the_finished_coefficient(objective, floor):
    batch = with_shift()
    gamma = torch.tensor([max(floor, math.exp(s)) for s in (0.0, -0.1, -0.3, -16.0)], dtype=torch.float64)
    expected = objective.multiplier(batch) * gamma
    torch.testing.assert_close(objective.multiplier(RouterShift(floor)(batch)), expected, rtol=1e-12, atol=0)


def test_factors_of_several_corrections_multiply():
    twice = RouterShift()(RouterShift()(with_shift()))
    close(twice.final_weight, [1.0, math.exp(-0.2), 0.64, 0.64])


def test_statistics_are_of_tokens_in_the_loss():
    statistics = RouterShift().statistics(with_shift(masks=[[True, True, True], [False]]))
    assert statistics == {
        "correction/router_shift_weight_mean": pytest.approx((1 + math.exp(-0.1) + 0.8) / 3),
        "correction/router_shift_floored_share": pytest.approx(1 / 3),
    }


def test_a_model_without_experts():
    with pytest.raises(UserError, match=r"^correction=router_shift needs a model with experts"):
        RouterShift()(build([[0.1]]))


@pytest.mark.parametrize("floor", [0.0, 1.1, -1, None])
def test_floor_outside_its_domain(floor):
    with pytest.raises(UserError, match=rf"^correction\.router_shift\.floor={floor} is not allowed"):
        RouterShift(floor)
