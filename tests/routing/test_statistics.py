import math
from collections import Counter

import pytest
import torch
from torch import Tensor

from vespo_lightning.routing.statistics import RouterStatistics, js_divergence
from vespo_lightning.training.outputs import RoutingBatch

TOKENS, LAYERS, EXPERTS, TOP_K = 37, [0, 2, 11], 6, 3


def routing_batch(seed: int, tokens: int = TOKENS, recorded: bool = True) -> RoutingBatch:
    """Random routing: a third of the sets as recorded, some recorded rows unknown, masked rows garbage."""
    generator = torch.Generator().manual_seed(seed)

    def probabilities() -> Tensor:
        return torch.randn(tokens, len(LAYERS), EXPERTS, generator=generator).mul(1.5).softmax(-1)

    probs, old_probs = probabilities(), probabilities()
    agree = torch.rand(tokens, len(LAYERS), generator=generator) < 1 / 3
    old_probs = torch.where(agree[..., None], (0.9 * probs + 0.1 / EXPERTS), old_probs)
    experts, old_experts = probs.topk(TOP_K)[1], old_probs.topk(TOP_K)[1]
    old_experts = old_experts.flip(-1)  # the order inside a set must not matter
    old_top = old_probs.gather(-1, old_experts).half().float()
    old_experts[torch.rand(tokens, len(LAYERS), generator=generator) < 0.15] = -1
    old_experts[torch.rand(tokens, generator=generator) < 0.1] = -1
    mask = torch.rand(tokens, generator=generator) < 0.7
    probs[~mask] = float("nan")
    old_top[~mask] = float("nan")
    return RoutingBatch(
        layers=LAYERS,
        experts=experts,
        logits=probs.log(),
        probs=probs,
        mask=mask,
        recorded_experts=old_experts if recorded else None,
        recorded_top_probs=old_top if recorded else None,
    )


def brute_force(batches: list[RoutingBatch]) -> dict[str, float]:
    """Token by token in Python floats."""
    loads = [Counter() for _ in LAYERS]
    entropies, changes, overlaps, divergences = ([[] for _ in LAYERS] for _ in range(4))
    token_changes = []
    for batch in batches:
        for token in batch.mask.nonzero().squeeze(-1).tolist():
            changed_layers = []
            for layer in range(len(LAYERS)):
                p = batch.probs[token, layer].double().tolist()
                chosen = batch.experts[token, layer].tolist()
                loads[layer].update(chosen)
                entropies[layer].append(-sum(x * math.log(x) for x in p) / math.log(EXPERTS))
                if batch.recorded_experts is None or -1 in batch.recorded_experts[token, layer]:
                    continue
                old = batch.recorded_experts[token, layer].tolist()
                changes[layer].append(set(old) != set(chosen))
                overlaps[layer].append(len(set(old) & set(chosen)) / TOP_K)
                changed_layers.append(changes[layer][-1])
                q_top = batch.recorded_top_probs[token, layer].double().tolist()
                p_coarse = [p[e] for e in old] + [1 - sum(p[e] for e in old)]
                q_coarse = [*q_top, 1 - sum(q_top)]
                middle = [(a + b) / 2 for a, b in zip(p_coarse, q_coarse, strict=True)]
                kl_p = sum(a * math.log(a / m) for a, m in zip(p_coarse, middle, strict=True))
                kl_q = sum(b * math.log(b / m) for b, m in zip(q_coarse, middle, strict=True))
                divergences[layer].append((kl_p + kl_q) / 2)
            if changed_layers:
                token_changes.append(any(changed_layers))

    def mean(values: list) -> float:
        return sum(values) / len(values)

    shares = [[load[e] / load.total() for e in range(EXPERTS)] for load in loads]
    per_layer = {
        "load_max_violation": [max(f) * EXPERTS - 1 for f in shares],
        "load_entropy": [-sum(x * math.log(x) for x in f if x > 0) / math.log(EXPERTS) for f in shares],
        "dead_experts": [mean([x == 0 for x in f]) for f in shares],
        "entropy": [mean(values) for values in entropies],
    }
    result = {name: mean(values) for name, values in per_layer.items()}
    if token_changes:
        compared = {"changed_sets": changes, "overlap": overlaps, "js_divergence": divergences}
        per_layer |= {name: [mean(values) for values in lists] for name, lists in compared.items()}
        result |= {name: mean([value for values in lists for value in values]) for name, lists in compared.items()}
        result["changed_tokens"] = mean(token_changes)
    for name, values in per_layer.items():
        result |= {f"{name}/layer_{layer:02d}": v for layer, v in zip(LAYERS, values, strict=True)}
    return result


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
    assert len(metrics) == (7 * 4 + 1 if recorded else 4 * 4)
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


def test_even_and_collapsed_load() -> None:
    def batch(experts: list[list[int]], probs: list[float]) -> RoutingBatch:
        chosen = torch.tensor(experts)[:, None]
        distribution = torch.tensor(probs).expand(len(experts), 1, 4)
        mask = torch.ones(len(experts), dtype=torch.bool)
        return RoutingBatch([0], chosen, distribution.log(), distribution, mask, None, None)

    even = RouterStatistics([0], 4)
    even.update(batch([[0, 1], [2, 3]], [0.25] * 4))
    metrics = even.metrics()
    assert metrics["load_max_violation"] == 0
    assert metrics["load_entropy"] == pytest.approx(1)
    assert metrics["dead_experts"] == 0
    assert metrics["entropy"] == pytest.approx(1)
    assert even.relative_load().tolist() == [[1, 1, 1, 1]]

    collapsed = RouterStatistics([0], 4)
    collapsed.update(batch([[0, 3], [3, 0]], [1.0, 0, 0, 0]))
    metrics = collapsed.metrics()
    assert metrics["load_max_violation"] == 4 / 2 - 1
    assert metrics["load_entropy"] == pytest.approx(0.5)
    assert metrics["dead_experts"] == 0.5
    assert metrics["entropy"] == 0


def test_nothing_counted_means_no_metrics() -> None:
    assert RouterStatistics(LAYERS, EXPERTS).metrics() == {}
    batch = routing_batch(0)
    batch.mask[:] = False
    assert statistics_of([batch]).metrics() == {}


def test_coarse_divergence_is_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(500, 8, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    q = torch.randn(500, 8, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    top_q, chosen = q.topk(2)
    coarse = js_divergence(p.gather(-1, chosen), top_q)
    full = js_divergence(p, q)
    assert (coarse <= full + 1e-12).all()
    assert (coarse < 0.9 * full).any()
    assert full.max() < math.log(2)


def test_divergence_of_equal_distributions_and_of_rounded_ones() -> None:
    top = torch.tensor([[0.6, 0.3], [0.75, 0.25]])
    assert js_divergence(top, top).tolist() == [0, 0]
    rounded_up = torch.tensor([[0.75, 0.2505]])  # float16 may sum to more than 1
    assert 0 <= js_divergence(top[1:], rounded_up).item() < 1e-6
    disjoint = js_divergence(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]]))
    assert disjoint.item() == pytest.approx(math.log(2))
