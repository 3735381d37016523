import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from vespo_lightning.corrections.router_shift import router_shift_of
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.training.outputs import RoutingBatch

TOKENS, LAYERS, EXPERTS, TOP_K = 37, [0, 2, 11], 6, 3
LOAD = {
    "load_max_violation",
    "load_min_violation",
    "load_mean_violation",
    "load_cv",
    "load_entropy",
    "dead_experts",
    "load_balance_loss",
}
ROUTER = {"entropy", "confidence", "margin", "z_loss"}
DRIFT = {"changed_sets", "overlap", "js_divergence"}


def routing_batch(seed: int, tokens: int = TOKENS, recorded: bool = True) -> RoutingBatch:
    """Random routing: a third of the sets as recorded, half of the tokens replayed, some recorded rows unknown, masked
    rows garbage."""
    generator = torch.Generator().manual_seed(seed)

    def probabilities() -> Tensor:
        return torch.randn(tokens, len(LAYERS), EXPERTS, generator=generator).mul(1.5).softmax(-1)

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < share

    probs, old_probs = probabilities(), probabilities()
    agree = chance(1 / 3, tokens, len(LAYERS))
    old_probs = torch.where(agree[..., None], (0.9 * probs + 0.1 / EXPERTS), old_probs)
    native, old_experts = probs.topk(TOP_K)[1], old_probs.topk(TOP_K)[1]
    old_experts = old_experts.flip(-1)  # the order inside a set must not matter
    used = torch.where(chance(0.5, tokens)[:, None, None], old_experts, native)
    old_top = old_probs.gather(-1, old_experts).half().float()
    old_experts = torch.where(chance(0.15, tokens, len(LAYERS), 1), -1, old_experts)
    old_experts[chance(0.1, tokens)] = -1
    mask = chance(0.7, tokens)
    logits = probs.log() + 0.5
    for values in (probs, logits, old_top):
        values[~mask] = float("nan")
    return RoutingBatch(
        layers=LAYERS,
        experts=used,
        native_experts=native,
        logits=logits,
        probs=probs,
        mask=mask,
        recorded_experts=old_experts if recorded else None,
        recorded_top_probs=old_top if recorded else None,
    )


def mean(values: list) -> float:
    return sum(values) / len(values)


def counted(batches: list[RoutingBatch]) -> list[tuple[RoutingBatch, int]]:
    return [(batch, token) for batch in batches for token in batch.mask.nonzero().squeeze(-1).tolist()]


def brute_force_now(batches: list[RoutingBatch]) -> dict[str, list[float]]:
    """Load and router, token by token in Python floats; per layer."""
    tokens = counted(batches)
    found: dict[str, list[float]] = {name: [] for name in LOAD | ROUTER}
    for layer in range(len(LAYERS)):
        probs = [batch.probs[token, layer].double().tolist() for batch, token in tokens]
        used = [batch.experts[token, layer].tolist() for batch, token in tokens]
        logits = [batch.logits[token, layer].double().tolist() for batch, token in tokens]
        load = Counter(expert for experts in used for expert in experts)
        share = [load[e] / load.total() for e in range(EXPERTS)]
        violation = [f * EXPERTS - 1 for f in share]
        found["load_max_violation"].append(max(violation))
        found["load_min_violation"].append(min(violation))
        found["load_mean_violation"].append(mean([abs(x) for x in violation]))
        found["load_cv"].append(float(np.std(share) / np.mean(share)))
        found["load_entropy"].append(-sum(f * math.log(f) for f in share if f > 0) / math.log(EXPERTS))
        found["dead_experts"].append(mean([f == 0 for f in share]))
        mean_probs = [mean([p[e] for p in probs]) for e in range(EXPERTS)]
        found["load_balance_loss"].append(EXPERTS * sum(f * p for f, p in zip(share, mean_probs, strict=True)))
        found["entropy"].append(mean([-sum(x * math.log(x) for x in p) / math.log(EXPERTS) for p in probs]))
        found["confidence"].append(mean([sum(p[e] for e in es) for p, es in zip(probs, used, strict=True)]))
        ranked = [sorted(p, reverse=True) for p in probs]
        found["margin"].append(mean([p[TOP_K - 1] - p[TOP_K] for p in ranked]))
        found["z_loss"].append(mean([math.log(sum(math.exp(z) for z in row)) ** 2 for row in logits]))
    return found


def brute_force_drift(batches: list[RoutingBatch]) -> tuple[dict[str, list[list[float]]], dict[str, list[float]]]:
    """Values of each token, of the routers' own choice: per layer, and per token."""
    per_layer = {name: [[] for _ in LAYERS] for name in DRIFT}
    per_token: dict[str, list[float]] = {"changed_tokens": [], "shift_ratio": []}
    for batch, token in counted(batches):
        changes, shifts = [], []
        for layer in range(len(LAYERS)):
            old = batch.recorded_experts[token, layer].tolist()
            if -1 in old:
                continue
            own = batch.native_experts[token, layer].tolist()
            changes.append(set(old) != set(own))
            per_layer["changed_sets"][layer].append(changes[-1])
            per_layer["overlap"][layer].append(len(set(old) & set(own)) / TOP_K)
            now = [float(batch.probs[token, layer, e].half()) for e in old]
            then = batch.recorded_top_probs[token, layer].double().tolist()
            coarse = [[*top, 1 - sum(top)] for top in (now, then)]
            middle = [(a + b) / 2 for a, b in zip(*coarse, strict=True)]
            divergences = [sum(a * math.log(a / m) for a, m in zip(p, middle, strict=True)) for p in coarse]
            per_layer["js_divergence"][layer].append(mean(divergences))
            shifts.append(mean([abs(math.log(a) - math.log(b)) for a, b in zip(now, then, strict=True)]))
        if changes:
            per_token["changed_tokens"].append(any(changes))
        if len(shifts) == len(LAYERS):
            per_token["shift_ratio"].append(math.exp(-mean(shifts)))
    return per_layer, per_token


def brute_force(batches: list[RoutingBatch]) -> dict[str, float]:
    now = brute_force_now(batches)
    pooled = {name: mean(values) for name, values in now.items()}
    if batches[0].recorded_experts is not None:
        drift, per_token = brute_force_drift(batches)
        now |= {name: [mean(values) for values in layers] for name, layers in drift.items()}
        pooled |= {name: mean([value for values in layers for value in values]) for name, layers in drift.items()}
        pooled |= {name: mean(values) for name, values in per_token.items()}
    for name, values in now.items():
        pooled |= {f"{name}/layer_{layer:02d}": v for layer, v in zip(LAYERS, values, strict=True)}
    return pooled


def statistics_of(batches: list[RoutingBatch]) -> RouterStatistics:
    statistics = RouterStatistics(LAYERS, EXPERTS)
    for batch in batches:
        statistics.update(batch)
    return statistics


@pytest.mark.parametrize("recorded", [True, False])
def test_equals_brute_force(recorded: bool) -> None:
    batches = [routing_batch(seed, recorded=recorded) for seed in range(3)]
    metrics = statistics_of(batches).metrics()
    expected = brute_force(batches)
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=2e-6), name  # probabilities come in float32
    assert {name for name in metrics if "/" not in name} == LOAD | ROUTER | (
        DRIFT | {"changed_tokens", "shift_ratio"} if recorded else set()
    )
    if recorded:
        assert 0.2 < metrics["changed_sets"] < metrics["changed_tokens"] < 1
        assert metrics["changed_sets/layer_11"] != metrics["changed_sets/layer_00"]


def test_sums_of_ranks_give_the_statistics_of_all_tokens() -> None:
    batches = [routing_batch(seed, tokens) for seed, tokens in enumerate((5, 40, 17))]
    everything = statistics_of(batches)
    first, second = statistics_of(batches[:1]), statistics_of(batches[1:])
    first.set_sums(first.sums() + second.sums())
    assert first.metrics() == pytest.approx(everything.metrics(), rel=1e-12)
    assert first.metrics() != pytest.approx(statistics_of(batches[:1]).metrics(), rel=1e-3)


def test_replay_hides_no_drift_and_moves_the_load() -> None:
    batch = routing_batch(0)
    known = torch.where(batch.recorded_experts < 0, batch.native_experts, batch.recorded_experts)
    native = statistics_of([replace(batch, experts=batch.native_experts)]).metrics()
    replayed = statistics_of([replace(batch, experts=known)]).metrics()
    assert native["changed_sets"] == replayed["changed_sets"] > 0.3
    assert native["js_divergence"] == replayed["js_divergence"] > 0
    assert native["margin"] == replayed["margin"]
    assert native["load_cv"] != replayed["load_cv"]
    assert native["confidence"] > replayed["confidence"]  # no set has more probability than the K likeliest


def same_for_all(experts: list[list[int]], probs: list[float]) -> dict[str, float]:
    """Metrics of one layer whose tokens have these experts and all the same probabilities."""
    chosen = torch.tensor(experts)[:, None]
    distribution = torch.tensor(probs).expand(len(experts), 1, len(probs))
    statistics = RouterStatistics([0], len(probs))
    statistics.update(
        RoutingBatch(
            layers=[0],
            experts=chosen,
            native_experts=chosen,
            logits=distribution.log(),
            probs=distribution,
            mask=torch.ones(len(experts), dtype=torch.bool),
            recorded_experts=None,
            recorded_top_probs=None,
        )
    )
    return statistics.metrics()


def test_even_and_collapsed_load() -> None:
    even = same_for_all([[0, 1], [2, 3]], [0.25] * 4)
    assert [even[name] for name in sorted(LOAD - {"load_entropy", "load_balance_loss"})] == [0] * 5
    assert even["load_entropy"] == pytest.approx(1)
    assert even["load_balance_loss"] == pytest.approx(1)
    assert even["entropy"] == pytest.approx(1)
    assert even["confidence"] == pytest.approx(0.5)
    assert even["margin"] == 0
    assert even["z_loss"] == pytest.approx(0, abs=1e-12)

    collapsed = same_for_all([[0, 3], [3, 0]], [1.0, 0, 0, 0])
    assert collapsed["load_max_violation"] == 4 / 2 - 1
    assert collapsed["load_min_violation"] == -1
    assert collapsed["load_mean_violation"] == 1
    assert collapsed["load_cv"] == 1
    assert collapsed["load_entropy"] == pytest.approx(0.5)
    assert collapsed["dead_experts"] == 0.5
    assert collapsed["load_balance_loss"] == 4 * 0.5  # f_0 = 1/2 meets p_0 = 1
    assert collapsed["entropy"] == 0
    assert collapsed["confidence"] == 1
    assert collapsed["margin"] == 0


def test_no_margin_where_every_expert_is_used() -> None:
    metrics = same_for_all([[0, 1], [1, 0]], [0.75, 0.25])
    assert "margin" not in metrics
    assert metrics["confidence"] == 1


def test_shift_ratio_is_the_factor_of_the_correction() -> None:
    """Before its floor, and over the tokens whose routing is known in all layers."""
    batch = routing_batch(0, tokens=400)
    known = batch.mask & (batch.recorded_experts >= 0).all(dim=-1).all(dim=-1)
    assert 0 < known.sum() < batch.mask.sum()
    expected = router_shift_of(replace(batch, mask=known))[known].exp().mean().item()
    assert statistics_of([batch]).metrics()["shift_ratio"] == pytest.approx(expected, rel=1e-6)


def test_a_router_that_has_not_moved_shows_no_drift() -> None:
    """Although the engine's probabilities went through float16."""
    batch = routing_batch(0)
    top = batch.probs.gather(-1, batch.native_experts).half().float()
    metrics = statistics_of([replace(batch, recorded_experts=batch.native_experts, recorded_top_probs=top)]).metrics()
    assert metrics["changed_sets"] == metrics["changed_tokens"] == metrics["js_divergence"] == 0
    assert metrics["overlap"] == metrics["shift_ratio"] == 1


def test_experts_alone_give_sets_but_no_divergence() -> None:
    """What vLLM returns."""
    metrics = statistics_of([replace(routing_batch(0), recorded_top_probs=None)]).metrics()
    assert metrics["changed_sets"] > 0
    assert not {"js_divergence", "shift_ratio"} & metrics.keys()


def mask_nothing(batch: RoutingBatch) -> RoutingBatch:
    return replace(batch, mask=torch.zeros_like(batch.mask))


def forget_a_layer(batch: RoutingBatch) -> RoutingBatch:
    recorded = batch.recorded_experts.clone()
    recorded[:, 1] = -1
    return replace(batch, recorded_experts=recorded)


@pytest.mark.parametrize(
    ("change", "left"), [(mask_nothing, set()), (forget_a_layer, LOAD | ROUTER)], ids=["mask", "layer"]
)
def test_what_has_no_data_is_absent(change: Callable[[RoutingBatch], RoutingBatch], left: set[str]) -> None:
    assert RouterStatistics(LAYERS, EXPERTS).metrics() == {}
    metrics = statistics_of([change(routing_batch(0))]).metrics()
    assert {name.split("/")[0] for name in metrics} == left
