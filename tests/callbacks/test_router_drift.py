"""The callback on the real module, with a tiny policy and an engine that routed some tokens otherwise."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pieces
import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from transformers import PreTrainedModel

from vespo_lightning.callbacks.router_drift import RouterDrift
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.drift import LogRatioSplit, RoutingDrift
from vespo_lightning.routing.layout import expand_layers
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.module import PolicyModule

LR = 3e-2


def engine_samples(model: PreTrainedModel, noise: float, reroute: float) -> list[Sample]:
    """Samples with the routing under which their log-probs came about.

    Args:
        noise: standard deviation of the engine's own arithmetic, nats.
        reroute: share of (token, layer) that the engine sends to random experts.
    """
    model = copy.deepcopy(model)  # hooks must not stay
    tap = RouterTap.attach(model)
    assert tap is not None
    rng = np.random.default_rng(0)
    samples = []
    for sample in pieces.make_samples(model, noise=0.0):
        prompt, response = sample.prompt_ids.tolist(), sample.response_ids.tolist()
        with tap.recording() as record:
            pieces.own_log_probs(model, prompt, response)
        experts = record.experts[:-1]  # the last token is no input of an engine
        others = torch.from_numpy(np.argsort(rng.random((*experts.shape[:2], tap.num_experts)))[..., : tap.top_k])
        swapped = torch.from_numpy(rng.random((*experts.shape[:2], 1)) < reroute)
        experts = torch.where(swapped, others, experts)
        with tap.replaying(torch.cat([experts, torch.full_like(experts[:1], -1)])):
            exact = pieces.own_log_probs(model, prompt, response)
        samples.append(
            dataclasses.replace(
                sample,
                behaviour_log_probs=(exact + noise * rng.standard_normal(len(response))).astype(np.float32),
                routed_experts=expand_layers(experts, tap.layers, tap.num_decoder_layers),
            )
        )
    return samples


class Rows(L.Callback):
    """Keeps the row of each update; stands last."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        self.rows.append(module.take_record())


def train(
    callback: RouterDrift | None,
    *,
    model: PreTrainedModel | None = None,
    updates: int = 1,
    noise: float = 0.0,
    reroute: float = 0.0,
    recorded: bool = True,
    **options: Any,
) -> tuple[PreTrainedModel, list[dict[str, float]]]:
    """The trained model, and ``router/*`` and the callback's time of each update."""
    model = model or pieces.tiny_policy()
    samples = engine_samples(model, noise, reroute)
    if not recorded:
        samples = [dataclasses.replace(sample, routed_experts=None) for sample in samples]
    module = PolicyModule(model, Grpo(), **{"lr": LR, "token_budget": 40} | options)
    rows = Rows()
    batches = [pieces.make_mini_batch(samples, update) for update in range(updates)]
    pieces.fit(module, batches, [*([callback] if callback else []), rows])
    kept = [{name: row[name] for name in row if name.startswith("router/") or "drift" in name} for row in rows.rows]
    return model, kept


def test_arithmetic_alone_is_no_routing() -> None:
    _, (row,) = train(RouterDrift(every=1), noise=0.1)
    assert row["router/log_ratio_routing_abs"] == 0  # replay of what the model chooses itself changes no bit
    assert row["router/log_ratio_weights_abs"] == row["router/log_ratio_abs"] == pytest.approx(0.08, abs=0.03)
    assert row["router/log_ratio_routing_share"] == pytest.approx(0, abs=1e-9)
    assert row["router/sequence_log_ratio_weights_abs"] > row["router/log_ratio_weights_abs"]


def test_routing_alone_is_all_routing() -> None:
    _, (row,) = train(RouterDrift(every=1), reroute=0.2)
    assert row["router/log_ratio_routing_abs"] > 0.03
    assert row["router/log_ratio_routing_abs"] == pytest.approx(row["router/log_ratio_abs"], rel=1e-3)
    assert row["router/log_ratio_weights_abs"] < 1e-5
    assert row["router/log_ratio_routing_share"] == pytest.approx(1, abs=1e-4)
    assert row["router/sequence_log_ratio_routing_share"] == pytest.approx(1, abs=1e-4)


def test_weights_that_moved_are_not_routing() -> None:
    """The second update has the same data and other weights."""
    _, (fresh, stale) = train(RouterDrift(every=1), updates=2, reroute=0.05)
    assert fresh["router/log_ratio_weights_abs"] < 1e-5
    assert stale["router/log_ratio_weights_abs"] > 0.1


def test_replay_in_training_hides_nothing() -> None:
    """The first update has the same looks before it, whatever it replays itself."""
    (native,), (replayed,) = (
        train(RouterDrift(every=1), reroute=0.2, noise=0.1, routing=mode)[1] for mode in ("native", "r3")
    )
    names = [name for name in native if "log_ratio" in name]
    assert len(names) == 8
    assert [native[name] for name in names] == [replayed[name] for name in names]
    assert replayed["router/update_changed_sets"] > 0


def test_ranks_are_added_before_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    _, (alone,) = train(RouterDrift(every=1), noise=0.1)
    lengths = []

    def reduce(self: object, sums: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        lengths.append(sums.numel())
        return sums + sums  # the other rank has the same

    monkeypatch.setattr(SingleDeviceStrategy, "reduce", reduce)
    _, (two,) = train(RouterDrift(every=1), noise=0.1)
    assert {LogRatioSplit().sums.numel(), RoutingDrift([0, 1]).sums().numel()} < set(lengths)
    assert {n: two[n] for n in two if "seconds" not in n} == {n: alone[n] for n in alone if "seconds" not in n}


def test_one_update_against_two_looks_by_hand() -> None:
    before = pieces.tiny_policy()
    samples = pieces.make_samples(before, noise=0.0)
    after, (row,) = train(RouterDrift(every=1), model=copy.deepcopy(before))
    changed = []
    for sample in samples:
        sets = []
        for model in (before, after):
            model = copy.deepcopy(model)
            tap = RouterTap.attach(model)
            with tap.recording() as record:
                pieces.own_log_probs(model, sample.prompt_ids.tolist(), sample.response_ids.tolist())
            sets.append(record.experts[len(sample.prompt_ids) - 1 : -1].sort().values)
        changed.append((sets[0] != sets[1]).any(dim=-1))
    flags = torch.cat(changed).double()
    assert row["router/update_changed_sets"] == pytest.approx(flags.mean().item())
    assert row["router/update_changed_sets/layer_01"] == pytest.approx(flags[:, 1].mean().item())
    assert row["router/update_changed_tokens"] == pytest.approx(flags.amax(dim=1).mean().item())
    assert 0 < row["router/update_changed_sets"] < 1
    assert row["router/update_js_divergence"] > 1e-4


def test_an_update_of_nothing_moves_no_router() -> None:
    _, (row,) = train(RouterDrift(every=1), lr=0.0)
    assert row["router/update_changed_sets"] == row["router/update_js_divergence"] == 0
    assert row["router/update_overlap"] == 1


def test_training_does_not_notice() -> None:
    def trained(callback: RouterDrift | None) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        torch.manual_seed(0)
        model, _ = train(callback, updates=3, noise=0.1, reroute=0.1)
        return model.state_dict(), torch.get_rng_state()

    (weights, state), (looked_at, state_after) = trained(None), trained(RouterDrift(every=1))
    assert all(torch.equal(looked_at[name], value) for name, value in weights.items())
    assert torch.equal(state, state_after)


def test_every() -> None:
    _, rows = train(RouterDrift(every=2), updates=4)
    assert [bool(row) for row in rows] == [True, False, True, False]
    assert rows[0].keys() == rows[2].keys()
    assert rows[0]["performance/router_drift_seconds"] > 0


def test_never() -> None:
    assert train(RouterDrift(every=0))[1] == [{}]


def test_an_engine_without_routing_leaves_the_drift_of_the_update() -> None:
    _, (row,) = train(RouterDrift(every=1), recorded=False)
    assert "router/update_changed_sets" in row
    assert not [name for name in row if "log_ratio" in name]


def test_a_skipped_update_moved_nothing() -> None:
    model = pieces.tiny_policy()
    model.lm_head.weight.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    _, (row,) = train(RouterDrift(every=1), model=model, noise=0.1)
    assert row["router/log_ratio_weights_abs"] > 0
    assert not [name for name in row if "update" in name]
    assert row["performance/router_drift_seconds"] > 0


def test_silent_for_dense_models() -> None:
    module = SimpleNamespace(is_moe=False)
    callback = RouterDrift(every=1)
    callback.on_train_batch_start(None, module, SimpleNamespace(update=0), 0)
    callback.on_train_batch_end(None, module, None, SimpleNamespace(update=0), 0)


@pytest.mark.parametrize("every", [-1, 1.5, True, "2"])
def test_every_must_be_a_number_of_updates(every: Any) -> None:
    with pytest.raises(UserError, match=r"^callbacks\.router_drift\.every="):
        RouterDrift(every=every)
