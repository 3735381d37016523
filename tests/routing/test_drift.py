import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.routing.drift import LogRatioSplit, RoutingDrift, RoutingSnapshot, js_divergence
from vespo_lightning.training.outputs import RoutingBatch

LAYERS, EXPERTS, TOP_K = [1, 4], 8, 2


# ---- two passes ------------------------------------------------------------------------------------------------


def compare(
    now: list, earlier: list, mask: list[bool] | None = None, top_probs: tuple[Tensor, Tensor] | None = None
) -> dict[str, float]:
    """Metrics of experts [T][L][K] in two layers."""
    drift = RoutingDrift(LAYERS)
    counts = torch.ones(len(now), dtype=torch.bool) if mask is None else torch.tensor(mask)
    drift.update(torch.tensor(now), torch.tensor(earlier), counts, top_probs)
    return drift.metrics()


def test_changed_sets_overlap_and_tokens() -> None:
    earlier = [[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[4, 5], [-1, -1]]]
    now = [[[1, 0], [3, 4]], [[1, 0], [3, 2]], [[6, 7], [0, 1]]]
    metrics = compare(now, earlier)
    assert metrics["changed_sets/layer_01"] == pytest.approx(1 / 3)
    assert metrics["changed_sets/layer_04"] == 1 / 2
    assert metrics["changed_sets"] == 2 / 5  # of five known sets, not the mean of the layers
    assert metrics["overlap/layer_01"] == pytest.approx(2 / 3)
    assert metrics["overlap/layer_04"] == 3 / 4
    assert metrics["overlap"] == 3.5 / 5
    assert metrics["changed_tokens"] == pytest.approx(2 / 3)
    assert "js_divergence" not in metrics


def test_masked_tokens_may_hold_anything() -> None:
    probs = torch.tensor([[[0.5, 0.25]] * 2, [[math.nan] * 2] * 2])
    now, earlier = [[[0, 1], [2, 3]], [[99, 99], [99, 99]]], [[[0, 1], [2, 5]], [[0, 1], [2, 3]]]
    metrics = compare(now, earlier, [True, False], (probs, probs))
    assert metrics["changed_sets"] == 1 / 2
    assert metrics["changed_tokens"] == 1
    assert metrics["js_divergence"] == 0


def test_prefix_is_part_of_every_name() -> None:
    drift = RoutingDrift(LAYERS, prefix="update_")
    experts, probs = torch.zeros(1, 2, 1, dtype=torch.long), torch.full((1, 2, 1), 0.5)
    drift.update(experts, experts, torch.ones(1, dtype=torch.bool), (probs, probs))
    pooled = {"update_changed_sets", "update_overlap", "update_changed_tokens", "update_js_divergence"}
    layers = {f"{name}/layer_{layer}" for name in pooled - {"update_changed_tokens"} for layer in ("01", "04")}
    assert drift.metrics().keys() == pooled | layers


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


# ---- before and after an update --------------------------------------------------------------------------------


def routing(logits: Tensor, mask: Tensor) -> RoutingBatch:
    experts = logits.topk(TOP_K).indices
    return RoutingBatch(
        layers=LAYERS,
        experts=experts,
        native_experts=experts,
        logits=logits,
        probs=logits.softmax(-1),
        mask=mask,
        recorded_experts=None,
        recorded_top_probs=None,
    )


def passes(logits: Tensor, log_prob: Tensor, mask: Tensor, micro_batches: list[list[int]]) -> list[SimpleNamespace]:
    """Forward passes over tokens in the order of ``micro_batches``."""
    return [
        SimpleNamespace(
            index=index,
            tokens=SimpleNamespace(log_prob=log_prob[index]),
            observed=SimpleNamespace(routing=routing(logits[index], mask[index])),
        )
        for index in map(torch.tensor, micro_batches)
    ]


def test_snapshot_and_drift_do_not_depend_on_the_micro_batches() -> None:
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(7, len(LAYERS), EXPERTS, generator=generator)
    after = before + 0.3 * torch.randn(before.shape, generator=generator)
    log_prob = torch.randn(7, generator=generator)
    mask = torch.tensor([True] * 5 + [False] * 2)
    snapshot = RoutingSnapshot.take(passes(before, log_prob, mask, [[4, 5, 6], [0, 1], [2, 3]]))
    assert torch.equal(snapshot.log_prob, log_prob)
    assert torch.equal(snapshot.experts.long(), before.topk(TOP_K).indices)
    assert torch.equal(snapshot.top_probs, before.softmax(-1).topk(TOP_K).values)

    metrics = snapshot.drift(passes(after, log_prob, mask, [[2, 3, 4, 5, 6], [0, 1]])).metrics()
    sets = [logits.topk(TOP_K).indices.sort().values[mask] for logits in (before, after)]
    changed = (sets[0] != sets[1]).any(dim=-1)
    assert metrics["update_changed_sets"] == pytest.approx(changed.double().mean().item())
    assert metrics["update_changed_tokens"] == pytest.approx(changed.any(dim=1).double().mean().item())
    assert 0 < metrics["update_changed_sets"] < metrics["update_changed_tokens"] <= 1
    at = before.topk(TOP_K).indices
    divergence = js_divergence(after.softmax(-1).gather(-1, at), before.softmax(-1).gather(-1, at))[mask]
    assert metrics["update_js_divergence"] == pytest.approx(divergence.mean().item())
    assert metrics["update_js_divergence/layer_04"] == pytest.approx(divergence[:, 1].mean().item())


# ---- parts of log-ratios ---------------------------------------------------------------------------------------

LENGTHS = [3, 1, 4]


def token_batch(log_prob: Tensor, behaviour: Tensor, mask: Tensor) -> TokenBatch:
    count = len(LENGTHS)
    return TokenBatch(
        log_prob=log_prob,
        behaviour_log_prob=behaviour,
        sequence_index=torch.repeat_interleave(torch.arange(count), torch.tensor(LENGTHS)),
        loss_mask=mask,
        advantage=torch.ones(count),
        group=torch.zeros(count, dtype=torch.long),
        version_made=torch.zeros(sum(LENGTHS), dtype=torch.int32),
        policy_version=0,
    )


def random_split(seed: int = 0) -> tuple[Tensor, TokenBatch]:
    """Log-probs with the routers' own choice, and the batch of a pass with the engine's; one token is masked."""
    generator = torch.Generator().manual_seed(seed)
    native, replayed, behaviour = torch.randn(3, sum(LENGTHS), generator=generator)
    mask = torch.ones(sum(LENGTHS), dtype=torch.bool)
    mask[4] = False
    return native, token_batch(replayed, torch.where(mask, behaviour, math.nan), mask)


def metrics_of(*updates: tuple[Tensor, TokenBatch]) -> dict[str, float]:
    split = LogRatioSplit()
    for native, tokens in updates:
        split.update(native, tokens)
    return split.metrics()


def test_parts_of_log_ratios() -> None:
    native, tokens = random_split()
    counted = tokens.loss_mask
    total = (native - tokens.behaviour_log_prob)[counted].double()
    part = (native - tokens.log_prob)[counted].double()
    sequence = tokens.sequence_index[counted]
    metrics = metrics_of((native, tokens))
    for name, of in (
        ("router/", lambda values: values),
        ("router/sequence_", lambda values: torch.stack([values[sequence == i].sum() for i in range(3)])),
    ):
        whole, routed = of(total), of(part)
        assert metrics[name + "log_ratio_abs"] == pytest.approx(whole.abs().mean().item(), rel=1e-6)
        assert metrics[name + "log_ratio_routing_abs"] == pytest.approx(routed.abs().mean().item(), rel=1e-6)
        rest = (whole - routed).abs().mean().item()
        assert metrics[name + "log_ratio_weights_abs"] == pytest.approx(rest, rel=1e-6)
        covariance = torch.cov(torch.stack([whole, routed]), correction=0)
        share = (covariance[0, 1] / covariance[0, 0]).item()
        assert metrics[name + "log_ratio_routing_share"] == pytest.approx(share, rel=1e-6)
    assert len(metrics) == 8


@pytest.mark.parametrize("cause", ["routing", "weights"])
def test_a_single_cause_has_the_whole_share(cause: str) -> None:
    """The engine agrees with the replayed pass, or replay changes nothing."""
    native, tokens = random_split()
    if cause == "routing":
        tokens, other, share = replace(tokens, behaviour_log_prob=tokens.log_prob), "weights", 1.0
    else:
        tokens, other, share = replace(tokens, log_prob=native), "routing", 0.0
    metrics = metrics_of((native, tokens))
    for prefix in ("router/log_ratio", "router/sequence_log_ratio"):
        assert metrics[f"{prefix}_{other}_abs"] == 0
        assert metrics[f"{prefix}_{cause}_abs"] == metrics[f"{prefix}_abs"] > 0.1
        assert metrics[f"{prefix}_routing_share"] == pytest.approx(share, abs=1e-12)


def test_micro_batches_add_up() -> None:
    one, two = random_split(0), random_split(1)
    both = metrics_of(one, two)
    assert both != metrics_of(one)
    assert both["router/log_ratio_abs"] == pytest.approx(
        (metrics_of(one)["router/log_ratio_abs"] + metrics_of(two)["router/log_ratio_abs"]) / 2
    )


def test_no_share_of_no_variance_and_nothing_of_no_tokens() -> None:
    native, tokens = random_split()
    constant = replace(tokens, behaviour_log_prob=native - 0.5)
    names = {name for name in metrics_of((native, constant)) if name.endswith("_share")}
    assert names == {"router/sequence_log_ratio_routing_share"}  # lengths differ, so sums over responses do
    assert metrics_of((native, replace(tokens, loss_mask=torch.zeros_like(tokens.loss_mask)))) == {}
