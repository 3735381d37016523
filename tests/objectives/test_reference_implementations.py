"""Parameter gradients against TRL and Liger on a small language-model head."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, TokenBatch, policy_loss
from vespo_lightning.objectives.cispo import Cispo
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.kernel import Kernel
from vespo_lightning.objectives.sapo import Sapo
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.aggregation import Totals, token_weights

B, T, H, V = 6, 12, 8, 17
MAX_RESPONSE_TOKENS = 20

METHODS = [
    # objective, aggregation, name of both in TRL and Liger, dual clip
    pytest.param(Vespo(), "token-mean", "vespo", None, id="vespo"),
    pytest.param(Vespo(1.3, 0.9, 2.2, 1.7), "token-mean", "vespo", None, id="vespo, other constants"),
    pytest.param(Kernel(1.2, 0.7), "token-mean", "vespo", None, id="kernel"),
    pytest.param(Grpo(0.2, 0.28), "token-mean", "dapo", None, id="dapo"),
    pytest.param(Grpo(0.2, 0.2), "seq-mean-token-mean", "grpo", None, id="grpo"),
    pytest.param(Grpo(0.2, 0.2, 1.5), "seq-mean-token-mean", "grpo", 1.5, id="grpo, dual clip"),
    pytest.param(Grpo(0.2, 0.28), "constant", "dr_grpo", None, id="dr_grpo"),
    pytest.param(Gspo(), "seq-mean-token-mean", "grpo", None, id="gspo"),
    pytest.param(Gspo(0.02, 0.01), "seq-mean-token-mean", "grpo", None, id="gspo, wide"),
    pytest.param(Gspo(0.02, 0.01), "token-mean", "dapo", None, id="gspo, token-mean"),
    pytest.param(Cispo(), "token-mean", "cispo", None, id="cispo"),
    pytest.param(Cispo(ratio_max=1.05), "token-mean", "cispo", None, id="cispo, tight bound"),
    pytest.param(Sapo(), "seq-mean-token-mean", "sapo", None, id="sapo"),
    pytest.param(Sapo(0.5, 4.0), "seq-mean-token-mean", "sapo", None, id="sapo, other temperatures"),
]
methods = pytest.mark.parametrize(("objective", "aggregation", "loss_type", "dual_clip"), METHODS)


@dataclass
class Problem:
    hidden: Tensor
    weight: Tensor
    ids: Tensor
    mask: Tensor
    advantages: Tensor
    old: Tensor

    def log_probs(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """[B, T]"""
        logits = hidden @ weight.T
        return logits.log_softmax(-1).gather(-1, self.ids[..., None])[..., 0]


@pytest.fixture(params=[0.05, 0.4], ids=["near", "far"])
def problem(request) -> Problem:
    """Ragged responses; the policy moved by ``request.param`` nats a token since they were made."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([12, 1, 5, 9, 12, 3])
    problem = Problem(
        hidden=torch.randn(B, T, H, generator=generator),
        weight=torch.randn(V, H, generator=generator),
        ids=torch.randint(V, (B, T), generator=generator),
        mask=(torch.arange(T) < lengths[:, None]).float(),
        advantages=torch.tensor([1.0, -0.7, 0.3, -1.2, 0.8, 0.0]),
        old=torch.empty(0),
    )
    drift = request.param * torch.randn(B, T, generator=generator)
    problem.old = problem.log_probs(problem.hidden, problem.weight) - drift
    return problem


def leaves(problem: Problem) -> tuple[Tensor, Tensor]:
    return problem.hidden.clone().requires_grad_(), problem.weight.clone().requires_grad_()


def our_gradients(problem: Problem, objective: Objective, aggregation: str) -> tuple[Tensor, list[Tensor]]:
    hidden, weight = leaves(problem)
    inside = problem.mask.bool()
    log_prob = problem.log_probs(hidden, weight)[inside]
    sequence_index = torch.arange(B)[:, None].expand(B, T)[inside]
    batch = TokenBatch(
        log_prob=log_prob.detach(),
        behaviour_log_prob=problem.old[inside],
        sequence_index=sequence_index,
        loss_mask=torch.ones(len(log_prob), dtype=torch.bool),
        advantage=problem.advantages,
        group=torch.arange(B),
        version_made=torch.zeros(len(log_prob), dtype=torch.int32),
        policy_version=1,
    )
    totals = Totals(tokens=len(log_prob), sequences=B, max_response_tokens=MAX_RESPONSE_TOKENS)
    weights = token_weights(aggregation, batch.length, sequence_index, totals)
    loss = policy_loss(weights, objective.multiplier(batch), log_prob)
    loss.backward()
    return loss.detach(), [hidden.grad, weight.grad]


def assert_gradients_agree(ours: list[Tensor], theirs: list[Tensor]) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        assert other.norm() > 1e-4
        assert (mine - other).norm() <= 1e-4 * other.norm()


def importance_sampling_level(objective: Objective) -> str:
    return "sequence" if isinstance(objective, Gspo) else "token"


def vespo_options(objective: Objective) -> dict[str, float]:
    constants = objective if isinstance(objective, Vespo) else Vespo()
    if isinstance(objective, Kernel):
        constants = Vespo(objective.c1, objective.c2, objective.c1, objective.c2)
    return {
        "vespo_k_pos": constants.c1_positive,
        "vespo_lambda_pos": constants.c2_positive,
        "vespo_k_neg": constants.c1_negative,
        "vespo_lambda_neg": constants.c2_negative,
    }


def sapo_options(objective: Objective) -> dict[str, float]:
    gate = objective if isinstance(objective, Sapo) else Sapo()
    return {"sapo_temperature_pos": gate.tau_positive, "sapo_temperature_neg": gate.tau_negative}


def clip_options(objective: Objective) -> dict[str, float]:
    """For CISPO both libraries take the largest ratio itself as epsilon_high."""
    if isinstance(objective, Cispo):
        return {"epsilon_low": 0.2, "epsilon_high": objective.ratio_max}
    clip = objective if isinstance(objective, Grpo | Gspo) else Grpo()
    return {"epsilon_low": clip.clip_low, "epsilon_high": clip.clip_high}


@methods
def test_trl(problem, objective, aggregation, loss_type, dual_clip):
    """TRL's own loss method, run on what it reads of its trainer."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    hidden, weight = leaves(problem)
    log_probs = problem.log_probs(hidden, weight)
    trainer = SimpleNamespace(
        loss_type=loss_type,
        args=SimpleNamespace(
            delta=dual_clip, steps_per_generation=1, **vespo_options(objective), **sapo_options(objective)
        ),
        **clip_options(objective),
        importance_sampling_level=importance_sampling_level(objective),
        beta=0.0,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        max_completion_length=MAX_RESPONSE_TOKENS,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        _metrics={"train": defaultdict(list)},
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (log_probs, torch.zeros(B, T), None),
    )
    inputs = {
        "prompt_ids": torch.zeros(B, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(B, 1),
        "completion_ids": problem.ids,
        "completion_mask": problem.mask,
        "advantages": problem.advantages,
        "old_per_token_logps": problem.old,
        "num_items_in_batch": problem.mask.sum(),
    }
    loss = grpo_trainer.GRPOTrainer._compute_loss(trainer, None, inputs)
    loss.backward()
    our_loss, ours = our_gradients(problem, objective, aggregation)
    assert_gradients_agree(ours, [hidden.grad, weight.grad])
    if loss_type in ("vespo", "cispo"):
        assert our_loss.item() == pytest.approx(loss.item(), rel=1e-4)


@methods
def test_liger(problem, objective, aggregation, loss_type, dual_clip):
    liger = pytest.importorskip("liger_kernel.chunked_loss", reason="Liger-Kernel is not installed")
    fused = liger.LigerFusedLinearGRPOLoss(
        beta=0.0,
        compiled=False,
        use_ref_model=False,
        **clip_options(objective),
        loss_type=loss_type,
        importance_sampling_level=importance_sampling_level(objective),
        delta=dual_clip,
        max_completion_length=MAX_RESPONSE_TOKENS,
        **vespo_options(objective),
        **sapo_options(objective),
    )
    hidden, weight = leaves(problem)
    loss, _ = fused(hidden, weight, problem.ids, problem.mask, problem.advantages, old_per_token_logps=problem.old)
    loss.backward()
    our_loss, ours = our_gradients(problem, objective, aggregation)
    assert_gradients_agree(ours, [hidden.grad, weight.grad])
    if loss_type in ("vespo", "cispo"):
        assert our_loss.item() == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize("spread", [0.1, 1.0, 30.0])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_phi_equals_gamma_weights_of_trl(make_batch, spread, sign):
    """Over many sequences, beyond both clamps too."""
    grpo_trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed")
    generator = torch.Generator().manual_seed(0)
    log_ratio = spread * torch.randn(64, 16, generator=generator, dtype=torch.float64)
    advantage = torch.full((64, 1), sign, dtype=torch.float64)
    theirs = grpo_trainer.GRPOTrainer.get_gamma_weights(advantage, log_ratio, torch.ones(64, 16), None)[:, 0]
    ours = Vespo().phi(make_batch(log_ratio.tolist(), [sign] * 64))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-30)
