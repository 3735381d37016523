"""Routing replay in updates: what is replayed, where it comes from, and whose gradients come out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy
from transformers import Qwen3Config, Qwen3ForCausalLM

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.module import PolicyModule

SPLITS = [(10_000, "padded"), (40, "padded"), (25, "packed")]


def samples_with_experts(model, native: bool):
    """Routing in the place of the engine's: the model's own, or any other experts."""
    tap = RouterTap.attach(model)
    rng = np.random.default_rng(0)
    samples = make_samples(model)
    for sample in samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        with tap.recording() as record, torch.no_grad():
            model(input_ids=ids, use_cache=False)
        own = record.experts[:-1].numpy().astype(np.int16)
        other = np.stack([[rng.permutation(4)[:2] for _ in range(own.shape[1])] for _ in own]).astype(np.int16)
        sample.routed_experts = own if native else other
        sample.router_top_probs = record.top_probs[:-1].numpy().astype(np.float16)
    tap.detach()
    return samples


def gradients(model, samples, budget=10_000, layout="padded", **options):
    module = PolicyModule(model, Vespo(), lr=0.0, max_grad_norm=None, token_budget=budget, layout=layout, **options)
    fit(module, [make_mini_batch(samples)], precision="64-true")
    module.tap.detach()
    return module, {name: p.grad.clone() for name, p in model.named_parameters()}


def difference(a, b) -> float:
    return max(float((a[name] - b[name]).norm() / b[name].norm().clamp(min=1e-12)) for name in b)


def brute_force(model, samples):
    """One replayed forward and backward pass per sample; log-probs of the samples, gradients."""
    tap = RouterTap.attach(model)
    model.zero_grad()
    batch = make_mini_batch(samples)
    tokens = sum(len(s.response_ids) for s in samples)
    found = []
    for i, sample in enumerate(samples):
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        rows = torch.cat([torch.from_numpy(sample.routed_experts), torch.full((1, 2, 2), -1, dtype=torch.int16)])
        with tap.replaying(rows):
            logits = model(input_ids=ids, use_cache=False).logits[0, len(sample.prompt_ids) - 1 : -1]
            chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.response_ids).long()[:, None])[:, 0]
            log_weight = (chosen.detach() - torch.from_numpy(sample.behaviour_log_probs)).sum()
            c1, c2 = (2, 3) if batch.advantages[i] >= 0 else (3, 2)
            phi = torch.exp(c1 * log_weight + c2 * (1 - log_weight.exp()))
            (-(phi * batch.advantages[i].double() * chosen).sum() * float(np.float32(1 / tokens))).backward()
        found.append(chosen.detach())
    tap.detach()
    return torch.cat(found), {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_r3_trains_on_the_experts_of_the_engine_whatever_the_split(checkpointing):
    model = tiny_policy(experts="eager").double()
    samples = samples_with_experts(model, native=False)
    log_prob, expected = brute_force(model, samples)
    _, native = gradients(model, samples)
    assert difference(native, expected) > 0.1
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for budget, layout in SPLITS:
        module, found = gradients(model, samples, budget, layout, routing="r3")
        assert difference(found, expected) < 1e-6, (budget, layout)  # W is rounded where rope and softmax are float32
        torch.testing.assert_close(module.last_update.tokens.log_prob, log_prob, rtol=0, atol=1e-6)
        assert all(float(found[name].norm()) > 0 for name in found if name.endswith("gate.weight"))


def test_replaying_what_the_routers_choose_anyway_changes_nothing():
    model = tiny_policy(experts="eager").double()
    samples = samples_with_experts(model, native=True)
    _, native = gradients(model, samples)
    for options in ({"routing": "r3"}, {"routing": "r3", "gate_weights": "recorded"}):
        _, found = gradients(model, samples, **options)
        assert difference(found, native) < (1e-12 if len(options) == 1 else 5e-3)  # probabilities are float16


def test_r2_records_at_generation_weights_and_replays_after_the_policy_moved():
    model = tiny_policy(experts="eager").double()
    samples = samples_with_experts(model, native=True)
    own = [sample.routed_experts for sample in samples]
    module = PolicyModule(model, Vespo(), routing="r2")

    class Recompute:
        def __len__(self):
            return 1

        def __iter__(self):
            module.recompute(samples)
            yield make_mini_batch(samples)

    fit(module, Recompute(), precision="64-true")
    for sample, experts in zip(samples, own, strict=True):
        assert sample.trainer_experts.dtype == np.int16
        assert (np.sort(sample.trainer_experts) == np.sort(experts)).all()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.copy_(torch.randn_like(parameter, generator=None))
    batch = make_mini_batch(samples)
    for done in module.look(batch, "trainer"):
        routing = done.observed.routing
        recorded = np.concatenate([s.trainer_experts[len(s.prompt_ids) - 1 :] for s in done.observed.samples])
        assert torch.equal(routing.experts, torch.from_numpy(recorded).long())
        assert not torch.equal(routing.native_experts.sort().values, routing.experts.sort().values)
        assert not done.out.log_prob.requires_grad
    for done in module.look(batch, "none"):
        assert torch.equal(done.observed.routing.native_experts, done.observed.routing.experts)


def test_routing_of_another_model_is_refused_by_sample():
    model = tiny_policy()
    samples = samples_with_experts(model, native=True)
    module = PolicyModule(model, Vespo(), routing="r3", gate_weights="recorded")
    module.check_routing(samples)
    samples[2].routed_experts = samples[2].routed_experts + np.int16(4)
    with pytest.raises(UserError, match=r"sample 0/1/0 \(prompt p1\) go up to expert \d"):
        module.check_routing(samples)
    samples[2].routed_experts = None
    with pytest.raises(UserError, match="are missing; use an engine that returns routing"):
        module.check_routing(samples)


@pytest.mark.parametrize("routing", ["r2", "r3"])
def test_dense_policies_have_nothing_to_replay(routing):
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with pytest.raises(UserError, match=rf"^routing={routing} replays .* set routing=native$"):
        PolicyModule(model, Vespo(), routing=routing)


def test_gate_weights_of_nobody():
    with pytest.raises(
        UserError, match=r"^routing\.gate_weights=recorded does nothing with routing=r2; use routing=r3$"
    ):
        PolicyModule(tiny_policy(), Vespo(), routing="r2", gate_weights="recorded")
