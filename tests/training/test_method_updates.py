"""Updates with parts around the objective: corrections, KL penalty, a look at the whole mini-batch, baselines."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, own_log_probs, tiny_policy

from vespo_lightning.corrections.masked_is import MaskedIs
from vespo_lightning.corrections.tis import TokenTis
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.kl import KlPenalty
from vespo_lightning.objectives.m2po import M2po
from vespo_lightning.objectives.min_variance import MinVariance, min_variance_advantage
from vespo_lightning.objectives.minirl import MiniRl
from vespo_lightning.objectives.sequence_is import SequenceIs
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.routing.losses import RouterLosses
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.token_batches import MiniBatchTokens

TEMPERATURE = 0.8
SPLITS = [(10_000, "padded"), (40, "padded"), (18, "padded"), (25, "packed")]
METHODS = {
    "m2po": {"objective": M2po(budget=0.002)},
    "minirl": {"objective": MiniRl()},
    "tis": {"objective": Vespo(), "corrections": [TokenTis(cap=1.05)], "denominator": "recomputed"},
    "mis": {"objective": Vespo(), "corrections": [MaskedIs(low=0.9, high=1.1)], "denominator": "recomputed"},
    "kl": {"objective": Vespo(), "kl": KlPenalty(coefficient=0.3, estimator="k3", placement="loss")},
}


def mini_batch(model):
    """Six samples in three groups; recomputed and reference log-probs are the model's own with noise."""
    rng = np.random.default_rng(1)
    samples = make_samples(model)
    for sample in samples:
        exact = own_log_probs(model, sample.prompt_ids.tolist(), sample.response_ids.tolist(), TEMPERATURE)
        for name, noise in (("recomputed_log_probs", 0.1), ("reference_log_probs", 0.3), ("behaviour_log_probs", 0.1)):
            setattr(sample, name, (exact + noise * rng.standard_normal(len(exact))).astype(np.float32))
    return make_mini_batch(samples, advantages=torch.tensor([-0.5, 0.5, 0.7, -0.7, 0.25, -0.25]))


def module_of(model, budget=10_000, layout="padded", **parts) -> PolicyModule:
    return PolicyModule(
        model,
        lr=0.0,
        max_grad_norm=None,
        token_budget=budget,
        layout=layout,
        temperature=TEMPERATURE,
        max_response_tokens=20,
        **parts,
    )


def trained(model, batch, **parts) -> tuple[PolicyModule, dict[str, torch.Tensor]]:
    module = module_of(model, **parts)
    fit(module, [batch], precision="64-true")
    assert not module.last_update.skipped
    return module, {name: p.grad.clone() for name, p in model.named_parameters()}


def log_probs_with_graph(model, batch, head=None) -> list[torch.Tensor]:
    """One plain forward pass per sample; ``head`` stands in for the weight of the (tied) output embedding."""
    found = []
    for sample in batch.samples:
        ids = torch.tensor([[*sample.prompt_ids, *sample.response_ids]])
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0, len(sample.prompt_ids) - 1 : -1]
        logits = hidden @ (model.get_output_embeddings().weight if head is None else head).t() / TEMPERATURE
        found.append(torch.log_softmax(logits, -1).gather(1, torch.tensor(sample.response_ids).long()[:, None])[:, 0])
    return found


def gradients_of(model, log_prob, factor) -> dict[str, torch.Tensor]:
    """Of ``-sum of factor * log pi / tokens``, the token mean."""
    model.zero_grad()
    (-(factor * log_prob).sum() * float(np.float32(1 / len(log_prob)))).backward(retain_graph=True)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_equal(found, expected, tolerance) -> None:
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= tolerance * max(float(gradient.norm()), 1e-12), name


@pytest.mark.parametrize("name", METHODS)
def test_one_backward_of_the_whole_multiplier_and_every_split_agree(name):
    parts = METHODS[name]
    model = tiny_policy(experts="eager").double()
    batch = mini_batch(model)
    log_prob = torch.cat(log_probs_with_graph(model, batch))
    tokens = MiniBatchTokens.build(batch, parts.get("denominator", "behaviour"), torch.device("cpu"))
    whole = tokens.select(range(6), log_prob.detach(), 0)
    for correction in parts.get("corrections", ()):
        whole = correction(whole)
    factor = parts["objective"].multiplier(whole)
    if "kl" in parts:
        factor = factor + parts["kl"].multiplier(whole)
    expected = gradients_of(model, log_prob, factor)
    for budget, layout in SPLITS:
        module, found = trained(model, batch, budget=budget, layout=layout, **parts)
        assert_equal(found, expected, 1e-9)
        torch.testing.assert_close(module.last_update.corrected.loss_mask, whole.loss_mask)


def test_corrections_and_the_pre_pass_act_in_these_tests():
    """Without this the agreement above could be that of methods that change nothing."""
    model = tiny_policy(experts="eager").double()
    batch = mini_batch(model)
    module, _ = trained(model, batch, **METHODS["m2po"])
    row = module.take_record()
    assert row["objective/zero_share"] > 0.05 and row["performance/pre_pass_seconds"] > 0
    module, _ = trained(model, batch, **METHODS["mis"])
    assert 0 < int((~module.last_update.corrected.loss_mask).sum()) < 36
    assert bool(module.last_update.tokens.loss_mask.all())
    module, _ = trained(model, batch, **METHODS["kl"])
    assert module.take_record()["kl/penalty"] > 0


@pytest.mark.parametrize("coefficients", [{"load_balance": 0.3}, {"z": 0.2}, {"load_balance": 0.3, "z": 0.2}])
def test_router_losses_do_not_depend_on_the_split(coefficients):
    """Plain formulas over all response tokens at once; f of the load-balance loss is a constant."""
    model = tiny_policy(experts="eager").double()
    batch = mini_batch(model)
    _, expected = trained(model, batch, objective=Vespo())
    tap = RouterTap.attach(model)
    logits, experts = [], []
    for sample in batch.samples:
        with tap.recording(keep_graph=True) as record:
            model.base_model(torch.tensor([[*sample.prompt_ids, *sample.response_ids]]), use_cache=False)
        rows = slice(len(sample.prompt_ids) - 1, -1)
        logits.append(torch.stack([record._logits[layer] for layer in tap.layers], dim=1)[rows])
        experts.append(record.experts[rows])
    tap.detach()
    z, used = torch.cat(logits), torch.cat(experts)  # [T, L, E], [T, L, K]
    share = torch.nn.functional.one_hot(used, 4).double().sum((0, 2)) / used[:, 0].numel()  # [L, E]
    balance = 4 * (share * z.softmax(-1).mean(0)).sum(-1).mean()
    squares = z.logsumexp(-1).square().mean()
    model.zero_grad()
    (coefficients.get("load_balance", 0.0) * balance + coefficients.get("z", 0.0) * squares).backward()
    moved = 0.0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected[name] = expected[name] + parameter.grad
            moved = max(moved, float(parameter.grad.norm() / expected[name].norm()))
    assert moved > 0.01
    for budget, layout in SPLITS:
        _, found = trained(
            model, batch, objective=Vespo(), budget=budget, layout=layout, router_losses=RouterLosses(**coefficients)
        )
        assert_equal(found, expected, 1e-6)  # captured logits are float32


def norms_by_autograd(log_probs, weights, parameters) -> torch.Tensor:
    norms = []
    for log_prob, weight in zip(log_probs, weights, strict=True):
        found = torch.autograd.grad((weight * log_prob).sum(), parameters, retain_graph=True, allow_unused=True)
        norms.append(sum(float(g.square().sum()) for g in found if g is not None))
    return torch.tensor(norms, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["exact", "proxy"])
def test_the_minimum_variance_baseline_enters_the_gradient(estimator):
    model = tiny_policy(experts="eager").double()
    batch = mini_batch(model)
    objective = SequenceIs()
    log_probs = log_probs_with_graph(model, batch)
    log_prob = torch.cat(log_probs)
    tokens = MiniBatchTokens.build(batch, "behaviour", torch.device("cpu"))
    whole = tokens.select(range(6), log_prob.detach(), 0)
    coefficient = objective.coefficient(whole)
    weights = (coefficient / len(log_prob)).split([len(p) for p in log_probs])
    if estimator == "exact":
        norms = norms_by_autograd(log_probs, weights, list(model.parameters()))
    else:
        head = model.get_output_embeddings().weight.detach().clone().requires_grad_()
        norms = norms_by_autograd(log_probs_with_graph(model, batch, head), weights, [head])
    advantage = min_variance_advantage(batch.advantages, norms, batch.group_index(), leave_one_out=False)
    assert float((advantage - batch.advantages).abs().max()) > 0.01
    factor = coefficient * advantage[whole.sequence_index]
    expected = gradients_of(model, log_prob, factor)
    module, found = trained(model, batch, objective=objective, baseline=MinVariance(estimator), budget=40)
    torch.testing.assert_close(module.last_update.tokens.advantage.double(), advantage, rtol=1e-5, atol=1e-7)
    assert_equal(found, expected, 1e-5)  # advantages are float32
    assert module.last_update.loss == pytest.approx(-float((factor * log_prob).sum()) / len(log_prob), rel=1e-5)


def test_a_coefficient_that_looks_at_the_advantage_is_refused():
    with pytest.raises(UserError, match=r"^advantage=min_variance needs .* the coefficient of Vespo does; use another"):
        PolicyModule(tiny_policy(), Vespo(), baseline=MinVariance("proxy"))


def test_a_uniform_group_keeps_advantage_zero():
    model = tiny_policy(experts="eager").double()
    batch = mini_batch(model)
    batch = replace(batch, advantages=torch.tensor([-0.5, 0.5, 0.0, 0.0, 0.25, -0.25]))
    for estimator in ("exact", "proxy"):
        module, _ = trained(model, batch, objective=SequenceIs(), baseline=MinVariance(estimator))
        assert module.last_update.tokens.advantage[2:4].tolist() == [0.0, 0.0]
