"""The precisions of the trainer: what is rounded, and what is not."""

from __future__ import annotations

import copy

import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy, tokenizer
from routing.moe_families import family_model

from vespo_lightning.errors import UserError
from vespo_lightning.models.export import export_hf
from vespo_lightning.models.loading import load_model
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.training.optimizers import MasterWeightAdamW
from vespo_lightning.training.reference import ReferencePolicy
from vespo_lightning.training.supervised import SolutionLoader, SupervisedModule

DTYPES = {"32-true": torch.float32, "bf16-mixed": torch.float32, "bf16-true": torch.bfloat16, "64-true": torch.float64}


def train(precision: str, updates: int, lr: float, **options) -> PolicyModule:
    model = tiny_policy(experts="eager" if precision == "64-true" else "grouped_mm")
    batches = [make_mini_batch(make_samples(model), update=update) for update in range(updates)]
    if precision == "bf16-true":
        model = model.bfloat16()  # as load_model(dtype="bfloat16") makes it
    module = PolicyModule(model, Vespo(), lr=lr, **options)
    fit(module, batches, precision=precision)
    assert module.policy_version == updates and module.skipped_updates == 0
    return module


@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_a_few_updates(precision, layout):
    """Positive advantages make their samples likelier, in every precision."""
    before, after = train(precision, 1, 1e-3), train(precision, 8, 1e-3, layout=layout, entropy_coefficient=0.01)
    assert {p.dtype for p in after.model.parameters()} == {DTYPES[precision]}
    assert after.layout == layout
    for module in (before, after):
        tokens = module.last_update.tokens
        assert tokens.log_prob.dtype == torch.promote_types(DTYPES[precision], torch.float32)
        assert module.last_update.entropy.isfinite().all()
    gain = after.last_update.tokens.log_prob - before.last_update.tokens.log_prob
    advantage = after.last_update.tokens.advantage[after.last_update.tokens.sequence_index]
    assert (gain * advantage).mean() > 0.01


def test_float64_needs_experts_that_compute_in_it():
    model = tiny_policy(experts="grouped_mm")
    batch = make_mini_batch(make_samples(model))
    with pytest.raises(UserError, match=r"^trainer\.precision=64-true .* use model\.experts=loop"):
        fit(PolicyModule(model, Vespo()), [batch], precision="64-true")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_log_probs_are_not_bfloat16(precision):
    """The head computes in float32 whatever the layers do."""
    log_prob = train(precision, 1, 0.0).last_update.tokens.log_prob
    assert not torch.equal(log_prob, log_prob.bfloat16().float())
    exact = train("32-true", 1, 0.0).last_update.tokens.log_prob
    assert 1e-5 < (log_prob - exact).abs().mean() < 0.2


def test_tiny_updates_add_up_in_bf16_true():
    """At a learning rate of 1e-6 bfloat16 parameters alone would hardly move; the masters go where float32 goes."""
    updates, lr = 20, 1e-6
    low = train("bf16-true", updates, lr)
    optimizer = low.trainer.optimizers[0]
    assert isinstance(optimizer, MasterWeightAdamW)
    start = dict(tiny_policy().bfloat16().float().named_parameters())
    wanted = dict(train("32-true", updates, lr).model.named_parameters())
    exact_start = dict(tiny_policy().named_parameters())
    for (name, parameter), master in zip(low.model.named_parameters(), optimizer.masters, strict=True):
        moved = (master - start[name]).flatten().double()
        should = (wanted[name] - exact_start[name]).flatten().double()
        cosine = torch.nn.functional.cosine_similarity(moved, should, dim=0)
        assert cosine > 0.5 and 0.5 < moved.norm() / should.norm() < 2, name
        assert torch.equal(parameter, master.bfloat16())


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_buffers_keep_their_precision_in_bf16_true(family):
    """Rotary frequencies in bfloat16 would be another model at long positions; steering biases choose experts."""
    model = family_model(family)
    buffers = {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}
    assert any("inv_freq" in name for name in buffers)
    module = PolicyModule(model, Vespo(), lr=0.0)
    samples = make_samples(model)
    fit(module, [make_mini_batch(samples)], precision="bf16-true")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for name, value in model.named_buffers():
        if name in buffers:
            assert value.dtype == torch.float32 and torch.equal(value, buffers[name]), name


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_mini_batches_are_not_cast(precision):
    """0.1 as an advantage stays 0.1."""
    model = tiny_policy(experts="eager")
    batch = make_mini_batch(make_samples(model), advantages=torch.full((6,), 0.1))
    before = copy.deepcopy(batch)
    module = PolicyModule(model, Vespo(), lr=0.0)
    fit(module, [batch], precision=precision)
    seen = module.last_update.mini_batch
    assert seen is batch
    assert seen.advantages.dtype == torch.float32 and torch.equal(seen.advantages, before.advantages)
    assert module.last_update.tokens.behaviour_log_prob.dtype == torch.float32


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_own_log_probs_of_samples_have_the_precision_of_training(precision):
    """Recomputed log-probs are those that the first update sees, bit for bit: the ratio starts at exactly 1."""
    model = tiny_policy()
    samples = make_samples(model)
    module = PolicyModule(model, Vespo(), lr=0.0)

    class Recompute:
        def __len__(self):
            return 1

        def __iter__(self):
            module.recompute(samples)
            assert all(sample.recomputed_log_probs.dtype == "float32" for sample in samples)
            yield make_mini_batch(samples)

    module.denominator = "recomputed"
    fit(module, Recompute(), precision=precision)
    assert module.last_update.tokens.log_ratio.abs().max() == 0


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_supervised_updates(precision):
    """The warm start lowers its loss in both precisions."""
    losses = []
    for updates in (1, 30):
        torch.manual_seed(0)
        loader = SolutionLoader(AdditionTask(1, 2, held_out_size=4), tokenizer(), updates=updates, batch_size=8, seed=0)
        module = SupervisedModule(tiny_policy(), lr=3e-3, updates=30, warmup_updates=2)
        trainer = fit(module, loader, precision=precision)
        losses.append(float(trainer.callback_metrics["train/loss"]))
    assert losses[1] < 0.7 * losses[0]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_routers_in_float32(precision, checkpointing, tmp_path):
    """They are neither rounded nor left out of training, in the policy and in the reference policy."""
    path = str(export_hf(tiny_policy(), tokenizer(), tmp_path / "model"))
    dtype = {"bf16-mixed": torch.float32}.get(precision, DTYPES[precision])
    options = {"dtype": str(dtype).removeprefix("torch."), "experts": "loop", "router_dtype": "float32"}
    model = load_model(path, **options, gradient_checkpointing=checkpointing)
    before = model.model.layers[0].mlp.gate.weight.detach().clone()
    reference = ReferencePolicy(load_model(path, **options), path)
    samples = make_samples(tiny_policy())
    module = PolicyModule(model, Vespo(), lr=1e-4, layout="packed", reference=reference)
    fit(module, [make_mini_batch(samples)], precision=precision)
    assert module.policy_version == 1
    router = torch.promote_types(dtype, torch.float32)
    reference.to(module.device, dtype)
    for policy in (module.policy.model, reference.policy.model):
        for name, parameter in policy.named_parameters():
            assert parameter.dtype == (router if "mlp.gate.weight" in name else dtype), name
    after = model.model.layers[0].mlp.gate.weight
    assert torch.equal(reference.policy.model.model.layers[0].mlp.gate.weight, before)
    # steps that bfloat16 would round away
    assert 0 < (after - before).abs().max() < 2e-4 and (after != before).float().mean() > 0.9
    log_probs = reference.log_probs(samples, token_budget=1000, layout="packed", temperature=1.0)
    assert all(torch.from_numpy(values).isfinite().all() for values in log_probs)
