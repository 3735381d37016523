"""KL penalties: gradients of the scalar estimators, of the divergences themselves, and of TRL."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch, policy_loss
from vespo_lightning.objectives.kl import KlPenalty

BETA = 0.07
LOSS = [KlPenalty(BETA, "k2", "loss"), KlPenalty(BETA, "k3", "loss")]
in_the_loss = pytest.mark.parametrize("kl", LOSS, ids=lambda kl: kl.estimator)
REWARD = KlPenalty(BETA, "k1", "reward")
ESTIMATORS = {"k2": lambda d: d**2 / 2, "k3": lambda d: torch.exp(-d) - 1 + d}


def batch_of(difference: Tensor, mask: Tensor | None = None, lengths: tuple[int, ...] | None = None) -> TokenBatch:
    """Log-ratios to the reference of the current policy; the one that sampled was 0.25 above it everywhere."""
    lengths = lengths or (len(difference),)
    reference = torch.linspace(-3.0, -0.5, len(difference), dtype=difference.dtype)
    return TokenBatch(
        log_prob=reference + difference,
        behaviour_log_prob=reference + difference + 0.25,
        sequence_index=torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)),
        loss_mask=torch.ones(len(difference), dtype=torch.bool) if mask is None else mask,
        advantage=torch.zeros(len(lengths), dtype=difference.dtype),
        group=torch.arange(len(lengths)),
        version_made=torch.zeros(len(difference), dtype=torch.int32),
        policy_version=0,
        reference_log_prob=reference,
    )


@in_the_loss
def test_multiplier_is_the_gradient_of_the_estimator(kl):
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(2 * torch.randn(50, generator=generator, dtype=torch.float64))
    weight = torch.rand(50, generator=generator, dtype=torch.float64)
    log_prob = batch.log_prob.clone().requires_grad_()
    (BETA * weight * ESTIMATORS[kl.estimator](log_prob - batch.reference_log_prob)).sum().backward()
    ours = batch.log_prob.clone().requires_grad_()
    policy_loss(weight, kl.multiplier(batch), ours).backward()
    torch.testing.assert_close(ours.grad, log_prob.grad, rtol=1e-10, atol=1e-14)


@pytest.fixture
def distributions() -> tuple[Tensor, Tensor]:
    """Logits of a policy and log-probs of a reference over nine tokens."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, generator=generator, dtype=torch.float64).requires_grad_()
    return logits, torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(-1)


def mean_gradient(logits: Tensor, multiplier: Tensor) -> Tensor:
    """Mean of ``multiplier * grad log pi`` over tokens that the policy samples, by enumeration."""
    log_pi = logits.log_softmax(-1)
    (gradient,) = torch.autograd.grad((log_pi.detach().exp() * multiplier * log_pi).sum(), logits)
    return gradient


def all_tokens(logits: Tensor, reference: Tensor) -> TokenBatch:
    log_pi = logits.detach().log_softmax(-1)
    return replace(
        batch_of(torch.zeros(9, dtype=torch.float64), lengths=(1,) * 9),
        log_prob=log_pi,
        behaviour_log_prob=log_pi,
        reference_log_prob=reference,
    )


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_mean_gradients_are_those_of_a_divergence(distributions, estimator):
    """k1 and k2: KL(policy || reference); k3: KL(reference || policy)."""
    logits, reference = distributions
    log_pi = logits.log_softmax(-1)
    forward = (reference.exp() * (reference - log_pi)).sum()
    reverse = (log_pi.exp() * (log_pi - reference)).sum()
    (wanted,) = torch.autograd.grad(-BETA * (forward if estimator == "k3" else reverse), logits)
    batch = all_tokens(logits, reference)
    if estimator == "k1":
        sampled, reference_numbers = batch.log_prob.numpy(), reference.numpy()
        falls = [
            REWARD.reward_penalty(sampled[i : i + 1], reference_numbers[i : i + 1], np.ones(1, bool)) for i in range(9)
        ]
        multiplier = -torch.tensor(falls, dtype=torch.float64)
    else:
        multiplier = KlPenalty(BETA, estimator, "loss").multiplier(batch)
    torch.testing.assert_close(mean_gradient(logits, multiplier), wanted, rtol=1e-10, atol=1e-14)
    assert wanted.norm() > 1e-2


def test_k1_in_the_loss_would_pull_nowhere(distributions):
    """Why it is refused: its multiplier is a constant."""
    logits, _ = distributions
    assert mean_gradient(logits, torch.full((9,), -BETA, dtype=torch.float64)).abs().max() < 1e-15


def test_trl():
    """The gradient of TRL's own loss method with its penalty, advantages 0."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    generator = torch.Generator().manual_seed(2)
    rows, columns = 4, 7
    mask = (torch.arange(columns) < torch.tensor([7, 1, 4, 6])[:, None]).float()
    log_probs = (-3 * torch.rand(rows, columns, generator=generator)).requires_grad_()
    reference = log_probs.detach() + torch.randn(rows, columns, generator=generator)
    trainer = SimpleNamespace(
        loss_type="dapo",
        args=SimpleNamespace(delta=None, steps_per_generation=1, use_bias_correction_kl=False),
        epsilon_low=0.2,
        epsilon_high=0.2,
        importance_sampling_level="token",
        beta=BETA,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, torch.zeros(rows, columns), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(rows, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(rows, 1),
        "completion_ids": torch.zeros(rows, columns, dtype=torch.int64),
        "completion_mask": mask,
        "advantages": torch.zeros(rows),
        "old_per_token_logps": log_probs.detach() + 0.1,
        "ref_per_token_logps": reference,
        "num_items_in_batch": mask.sum(),
    }
    grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs).backward()
    inside = mask.bool()
    batch = replace(
        batch_of(torch.zeros(int(mask.sum()))),
        log_prob=log_probs.detach()[inside],
        reference_log_prob=reference[inside],
    )
    ours = log_probs.detach()[inside].clone().requires_grad_()
    policy_loss(
        torch.full((len(ours),), 1 / len(ours)), KlPenalty(BETA, "k3", "loss").multiplier(batch), ours
    ).backward()
    assert ours.grad.norm() > 1e-3
    torch.testing.assert_close(ours.grad, log_probs.grad[inside], rtol=1e-4, atol=1e-8)


@in_the_loss
def test_it_pulls_towards_the_reference(kl):
    """Down where the policy likes a token more than the reference does, up where less, not at all where equal."""
    multiplier = kl.multiplier(batch_of(torch.tensor([-25.0, -2.0, -0.1, 0.0, 0.1, 2.0, 25.0])))
    assert (multiplier[:3] > 0).all() and multiplier[3] == 0 and (multiplier[4:] < 0).all()
    assert multiplier[0] >= multiplier[1] and multiplier[-1] <= multiplier[-2]


def test_small_differences_keep_their_digits():
    """1 - exp(-d) would round to 0 in float32."""
    batch = replace(batch_of(torch.zeros(1)), log_prob=torch.tensor([1e-9]), reference_log_prob=torch.zeros(1))
    assert LOSS[1].multiplier(batch).item() == pytest.approx(-BETA * 1e-9, rel=1e-6)


@given(
    st.lists(st.tuples(st.floats(-1e4, 1e4), st.floats(-1e4, 1e4), st.booleans()), min_size=1, max_size=8),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_finite_for_any_finite_input(rows, dtype):
    values = torch.tensor([[a, b] for a, b, _ in rows], dtype=dtype)
    mask = torch.tensor([kept for *_, kept in rows])
    batch = replace(
        batch_of(torch.zeros(len(rows), dtype=dtype), mask),
        log_prob=torch.where(mask, values[:, 0], float("nan")),
        behaviour_log_prob=torch.where(mask, values[:, 0], float("nan")),
        reference_log_prob=torch.where(mask, values[:, 1], float("inf")),
    )
    for kl in (*LOSS, REWARD):
        multiplier = kl.multiplier(batch)
        assert multiplier.isfinite().all() and (multiplier[~mask] == 0).all() and multiplier.dtype == dtype
        assert all(np.isfinite(value) for value in kl.statistics(batch).values())


def test_beyond_the_clamp_the_pull_is_that_of_the_bound():
    for kl in LOSS:
        inside, beyond = (kl.multiplier(batch_of(torch.tensor([-d, d], dtype=torch.float64))) for d in (20.0, 1e3))
        torch.testing.assert_close(inside, beyond, rtol=1e-12, atol=0)


def test_a_penalty_in_the_reward_adds_nothing_to_the_loss():
    batch = batch_of(torch.tensor([1.0, -2.0]))
    assert REWARD.multiplier(batch).tolist() == [0.0, 0.0]
    for kl in LOSS:
        assert kl.reward_penalty(np.ones(2), np.zeros(2), np.ones(2, bool)) == 0


def test_penalty_of_a_response():
    sampled, reference = np.array([-1.0, -2.0, np.nan], np.float32), np.array([-1.5, -1.0, 0.0], np.float32)
    assert REWARD.reward_penalty(sampled, reference, np.array([True, True, False])) == pytest.approx(BETA * -0.5)
    assert REWARD.reward_penalty(sampled, reference, np.zeros(3, bool)) == 0


def test_statistics():
    difference = torch.tensor([0.5, -1.0, 2.0, 9.0], dtype=torch.float64)
    batch = batch_of(difference, torch.tensor([True, True, True, False]), lengths=(2, 1, 1))
    inside = difference[:3]
    k1, k2, k3 = inside.mean().item(), (inside**2 / 2).mean().item(), (torch.exp(-inside) - 1 + inside).mean().item()
    for kl, penalty in ((*LOSS[:1], k2), (*LOSS[1:], k3), (REWARD, ((0.5 - 1.0 + 2 * 0.25) + (2 + 0.25)) / 2)):
        assert kl.statistics(batch) == pytest.approx(
            {"kl/reference_k1": k1, "kl/reference_k3": k3, "kl/penalty": BETA * penalty}, rel=1e-10, abs=1e-14
        )
        assert kl.statistics(replace(batch, loss_mask=torch.zeros(4, dtype=torch.bool))) == {}


def test_coefficient_zero_only_measures():
    batch = batch_of(torch.tensor([1.0, -2.0]))
    kl = KlPenalty(0, "k3", "loss")
    assert kl.multiplier(batch).abs().max() == 0
    assert kl.statistics(batch)["kl/penalty"] == 0 and kl.statistics(batch)["kl/reference_k3"] > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((-0.1, "k3", "loss"), r"^kl\.coefficient=-0\.1 is not allowed; give a finite number of at least 0"),
        ((float("nan"), "k3", "loss"), r"^kl\.coefficient=nan is not allowed"),
        ((True, "k3", "loss"), r"^kl\.coefficient=True is not allowed"),
        (("0.1", "k3", "loss"), r"^kl\.coefficient=0\.1 is not allowed"),
        ((0.1, "k4", "loss"), r"^kl\.estimator=k4 is unknown; valid: k1, k2, k3"),
        ((0.1, "k3", "advantage"), r"^kl\.placement=advantage is unknown; valid: reward, loss"),
        (
            (0.1, "k1", "loss"),
            r"^kl\.placement=loss does not go with kl\.estimator=k1.*pulls nowhere; take kl=reward_k1",
        ),
        ((0.1, "k2", "reward"), r"^kl\.placement=reward does not go with kl\.estimator=k2"),
        ((0.1, "k3", "reward"), r"^kl\.placement=reward does not go with kl\.estimator=k3"),
        ((0.1, "k3", "loss", ""), r"^kl\.reference='' is no folder"),
        ((0.1, "k3", "loss", 7), r"^kl\.reference=7 is no folder"),
    ],
)
def test_what_is_refused(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        KlPenalty(*arguments)
