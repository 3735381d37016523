"""The baseline of least variance: its formula, its bias by enumeration, its variance on responses of the tiny model."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.models.loading import load_model, load_tokenizer, resolve_model_path
from vespo_lightning.objectives.advantages import GroupMean
from vespo_lightning.objectives.min_variance import MinVariance, min_variance_advantage, min_variance_baseline
from vespo_lightning.rollouts.engine import GenerationRequest, SamplingParams
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.tasks.prompts import render_prompt
from vespo_lightning.training.micro_batches import collate
from vespo_lightning.training.policy import Policy

# ---- the formula -----------------------------------------------------------------------------------------------


def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, squared norms over six orders of magnitude, and interleaved groups of 1, 2, 3 and 8."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([7, 2, 5, 5, 2, 5] + [3] * 8)[torch.randperm(14, generator=generator)]
    rewards = torch.randn(14, generator=generator, dtype=torch.float64)
    return rewards, torch.exp(3 * torch.randn(14, generator=generator, dtype=torch.float64)), group


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_equals_brute_force(leave_one_out):
    rewards, norm, group = ragged()
    expected = []
    for i in range(14):
        members = [j for j in range(14) if group[j] == group[i] and not (leave_one_out and j == i)]
        total = sum(norm[j] for j in members)
        expected.append(float(sum(norm[j] * rewards[j] for j in members) / total) if members else float(rewards[i]))
    found = min_variance_baseline(rewards, norm, group, leave_one_out)
    assert found.tolist() == pytest.approx(expected, rel=1e-12)


def test_minimises_the_second_moment_of_each_group():
    """Against the mean and against small steps to both sides."""
    rewards, norm, group = ragged()
    best = min_variance_baseline(rewards, norm, group)

    def moments(baseline: Tensor) -> Tensor:
        value = norm * (rewards - baseline) ** 2
        return torch.stack([value[group == g].sum() for g in (2, 3, 5)])

    mean = min_variance_baseline(rewards, torch.ones(14), group)
    assert (moments(best) < moments(mean)).all()
    for step in (-1e-3, 1e-3):
        assert (moments(best) < moments(best + step)).all()


def test_equal_norms_give_the_mean():
    rewards, _, group = ragged()
    found = MinVariance().advantage(rewards, torch.full((14,), 2.5), group)
    torch.testing.assert_close(found, GroupMean()(rewards, group))


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_norms_of_zero_give_the_mean(leave_one_out):
    """Of the others, for leave-one-out: response 0 has all of the norm."""
    rewards, group = torch.tensor([3.0, 0.0, 1.0]), torch.zeros(3, dtype=torch.long)
    nothing = min_variance_baseline(rewards, torch.zeros(3), group, leave_one_out)
    assert nothing.tolist() == pytest.approx([0.5, 2.0, 1.5] if leave_one_out else [4 / 3] * 3)
    one = min_variance_baseline(rewards, torch.tensor([2.0, 0.0, 0.0]), group, leave_one_out)
    assert one.tolist() == pytest.approx([0.5, 3.0, 3.0] if leave_one_out else [3.0] * 3)


def test_leave_one_out_keeps_the_others_beside_a_huge_norm():
    rewards, group = torch.tensor([5.0, 1.0, 0.0]), torch.zeros(3, dtype=torch.long)
    found = min_variance_baseline(rewards, torch.tensor([1e30, 3.0, 1.0]), group, leave_one_out=True)
    assert found[0].item() == pytest.approx(0.75, rel=1e-12)


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("size", [1, 3, 7])
def test_groups_without_variance_get_exactly_zero(leave_one_out, size):
    norm = torch.rand(size, generator=torch.Generator().manual_seed(0))
    rewards = torch.full((size,), 0.1, dtype=torch.float64)
    assert min_variance_advantage(rewards, norm, torch.full((size,), 4), leave_one_out).tolist() == [0.0] * size


def test_before_norms_are_known_the_advantage_is_that_of_the_group_mean():
    rewards, _, group = ragged()
    assert torch.equal(MinVariance()(rewards, group), GroupMean()(rewards, group))


def test_a_norm_that_is_not_finite_shows_in_its_group_only():
    rewards, norm, group = ragged()
    norm[(group == 5).nonzero()[0]] = float("nan")
    found = min_variance_advantage(rewards, norm, group)
    assert found[group == 5].isnan().all() and found[group != 5].isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "cheap"}, r"^advantage\.estimator=cheap is unknown; valid: exact, proxy$"),
        ({"leave_one_out": 1}, r"^advantage\.leave_one_out=1 must be true or false$"),
        ({"leave_one_out": True}, r"^advantage\.leave_one_out=true .* use advantage\.estimator=proxy$"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        MinVariance(**options)


# ---- bias, by enumeration of a bandit --------------------------------------------------------------------------

POLICY = torch.softmax(torch.tensor([0.3, -0.5, 0.9, 0.1], dtype=torch.float64), 0)
BEHAVIOUR = torch.softmax(torch.tensor([0.1, 1.2, -0.8, 0.3], dtype=torch.float64), 0)
ARM_REWARDS = torch.tensor([1.0, 0.2, -0.5, 2.0], dtype=torch.float64)
#: [arm, logit]: grad log pi of a softmax policy.
SCORE = torch.eye(4, dtype=torch.float64) - POLICY


def expected_gradient(group_size: int, leave_one_out: bool, cap: float = float("inf")) -> Tensor:
    """[logits] mean over all outcomes of a group of draws from the behaviour policy."""
    total = torch.zeros(4, dtype=torch.float64)
    for arms in itertools.product(range(4), repeat=group_size):
        drawn = torch.tensor(arms)
        weight = (POLICY / BEHAVIOUR)[drawn].clamp(max=cap)
        gradient = weight.unsqueeze(1) * SCORE[drawn]
        group = torch.zeros(group_size, dtype=torch.long)
        advantage = min_variance_advantage(ARM_REWARDS[drawn], gradient.square().sum(1), group, leave_one_out)
        total += BEHAVIOUR[drawn].prod() * (advantage.unsqueeze(1) * gradient).mean(0)
    return total


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_with_whole_weights_is_unbiased_and_the_other_forms_are_not(group_size):
    exact = (POLICY * ARM_REWARDS) @ SCORE

    def bias(leave_one_out: bool, cap: float = float("inf")) -> float:
        return float((expected_gradient(group_size, leave_one_out, cap) - exact).norm() / exact.norm())

    unbiased, including, truncated = bias(True), bias(False), bias(True, cap=1.5)
    print(
        f"groups of {group_size}: relative bias {unbiased:.1e} leave-one-out, {including:.3f} including itself, "
        f"{truncated:.3f} leave-one-out with weights truncated at 1.5"
    )
    assert unbiased < 1e-12
    assert including > 0.1
    assert truncated > 0.1


# ---- variance, on responses of the tiny model ------------------------------------------------------------------

POOL, PROMPTS, GROUP_SIZE, DRAWS = 40, 8, 8, 400


@pytest.fixture(scope="module")
def pools() -> list[tuple[Tensor, Tensor]]:
    """For each prompt with both rewards: rewards [N], and inner products [N, N] of the gradients of its responses.

    Sampled by the built-in model, trained on by a copy whose weights moved: gradients are of ``W log pi``.
    """
    path = resolve_model_path("builtin:tiny-addition-moe")
    tokenizer, task = load_tokenizer(path), AdditionTask()
    engine = TransformersEngine(device="cpu", record_routing=False)
    engine.start(path)
    model = load_model(path, experts="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * p.std() * torch.randn(p.shape, generator=generator))
    policy = Policy(model)
    found = []
    for number in range(PROMPTS):
        problem = task.train_problem(1, number)
        prompt = render_prompt(tokenizer, problem.prompt)
        requests = [GenerationRequest(prompt, 1000 * number + i) for i in range(POOL)]
        responses = engine.generate(requests, SamplingParams(max_new_tokens=72))
        verdicts = task.verify([problem] * POOL, [tokenizer.decode(r.token_ids.tolist()[:-1]) for r in responses])
        rewards = torch.tensor([v.reward for v in verdicts], dtype=torch.float64)
        if len(rewards.unique()) == 2:
            gradients = torch.stack([weighted_gradient(policy, prompt, r) for r in responses])
            found.append((rewards, gradients @ gradients.t()))
    assert len(found) >= 4
    return found


def weighted_gradient(policy: Policy, prompt: list[int], response) -> Tensor:
    count = len(response.token_ids)
    sample = Sample(
        prompt_id="p", group_id="0/0", index=0, seed=0,
        prompt_ids=np.array(prompt, dtype=np.int32), response_ids=response.token_ids,
        behaviour_log_probs=response.log_probs, version_runs=[(0, count)], loss_mask=np.ones(count, dtype=bool),
        finish_reason="stop", text="", reward=0.0,
    )  # fmt: skip
    policy.zero_grad(set_to_none=True)
    log_prob = policy(collate([sample])).log_prob
    weight = float((log_prob.detach().double() - torch.from_numpy(response.log_probs)).sum().exp())
    (weight * log_prob.sum()).backward()
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in policy.parameters()]
    ).double()


def spread(rewards: Tensor, products: Tensor, baseline) -> tuple[float, float]:
    """Variance and squared mean of the group's gradient, over groups drawn from the pool."""
    generator = torch.Generator().manual_seed(1)
    factors = torch.zeros(DRAWS, POOL, dtype=torch.float64)
    for draw in factors:
        drawn = torch.randperm(POOL, generator=generator)[:GROUP_SIZE]
        draw[drawn] = (rewards[drawn] - baseline(rewards[drawn], products.diagonal()[drawn])) / GROUP_SIZE
    mean = factors.mean(0)
    squared_mean = float(mean @ products @ mean)
    return float(((factors @ products) * factors).sum(1).mean()) - squared_mean, squared_mean


def test_variance_on_a_real_batch_is_below_that_of_the_group_mean(pools):
    """Over the whole batch; prompts are independent, so that variances add up.

    Part of it is shrinkage of the gradient, as a response with most of the norm gets b close to its own reward; but
    the variance falls relative to the squared mean too. So it does with a b of the whole pool, which stands for one
    that is known beforehand. Leave-one-out from seven others is noisy: printed, and no gain is claimed.
    """
    group = torch.zeros(GROUP_SIZE, dtype=torch.long)
    equal = torch.ones(GROUP_SIZE)
    baselines = {
        "group mean": lambda rewards, norm: min_variance_baseline(rewards, equal, group),
        "minimum variance": lambda rewards, norm: min_variance_baseline(rewards, norm, group),
        "mean of others": lambda rewards, norm: min_variance_baseline(rewards, equal, group, True),
        "minimum variance, others": lambda rewards, norm: min_variance_baseline(rewards, norm, group, True),
    }
    found = {name: torch.tensor([spread(*pool, baseline) for pool in pools]) for name, baseline in baselines.items()}
    pooled = []
    for rewards, products in pools:
        known = float(min_variance_baseline(rewards, products.diagonal(), torch.zeros(POOL, dtype=torch.long))[0])
        pooled.append(spread(rewards, products, lambda *_, known=known: known))
    found["minimum variance, known"] = torch.tensor(pooled)
    reference = found["group mean"]
    for name, value in found.items():
        variance, signal = (value.sum(0) / reference.sum(0)).tolist()
        each = ", ".join(f"{v:.2f}" for v in (value[:, 0] / reference[:, 0]).tolist())
        print(f"{name:26s} variance {variance:.2f} ({each}), squared mean {signal:.2f} of the group mean's")
    for name in ("minimum variance", "minimum variance, known"):
        variance, squared_mean = found[name].sum(0) / reference.sum(0)
        assert variance < 0.9
        assert variance / squared_mean < 0.9
