"""What a rollout produces: samples, and mini-batches of them."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

#: Run-length coded policy versions: ``[(version, number of tokens), ...]`` in token order.
VersionRuns = list[tuple[int, int]]


@dataclass
class Sample:
    """One response to one prompt, with everything that training on it needs.

    P is the number of prompt tokens, T of response tokens, L of decoder layers, K of experts per token.
    """

    prompt_id: str
    """Stable name of the problem; with the run's seed it decides which problem this is."""
    group_id: str
    """Responses to one prompt in one rollout share it: ``"<rollout>/<place of the prompt in the rollout>"``."""
    index: int
    """Place inside the group, 0 .. group size - 1."""
    seed: int
    """Seed of this response's sampling, derived from (run seed, prompt id, index, version)."""
    prompt_ids: np.ndarray
    """int32 [P]"""
    response_ids: np.ndarray
    """int32 [T], the end-of-sequence token included when the policy wrote it"""
    behaviour_log_probs: np.ndarray
    """float32 [T], natural log, from the engine at the sampling temperature"""
    version_runs: VersionRuns
    """Policy versions that wrote the response tokens; one run in sync mode."""
    loss_mask: np.ndarray
    """bool [T], False for tokens that the policy did not write (tool output, environment turns)"""
    finish_reason: str
    """``"stop"`` (wrote the end token) or ``"length"`` (truncated)"""
    text: str
    """The response, decoded without special tokens."""
    reward: float
    reward_error: str | None = None
    """Why the verifier could not judge (time-out, exception, NaN); the reward is then the task's failure value."""
    recomputed_log_probs: np.ndarray | None = None
    """float32 [T], the trainer's own log-probs at generation weights (``denominator=recomputed``)"""
    reference_log_probs: np.ndarray | None = None
    """float32 [T], of the reference policy (a KL penalty is on)"""
    top_ids: np.ndarray | None = None
    """int32 [T, K], the K likeliest tokens at each position when it was sampled, in descending order"""
    top_log_probs: np.ndarray | None = None
    """float32 [T, K], their log-probs at the sampling temperature"""
    routed_experts: np.ndarray | None = None
    """int16 [P+T-1, L, K], experts that the engine used at each input position; -1 where unknown (dense layers)"""
    router_top_probs: np.ndarray | None = None
    """float16 [P+T-1, L, K], router probabilities of those experts, where the engine gives them"""
    trainer_experts: np.ndarray | None = None
    """int16 [P+T-1, L, K], experts that the trainer used at generation weights (``routing=r2``)"""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"

    def versions(self) -> np.ndarray:
        """int32 [T]: the policy version that wrote each response token."""
        return np.repeat(
            np.array([version for version, _ in self.version_runs], dtype=np.int32),
            [count for _, count in self.version_runs],
        )


@dataclass(frozen=True)
class MiniBatch:
    """What one optimizer step trains on: whole groups, S samples in all."""

    update: int
    """0-based number of the optimizer step in the run."""
    rollout: int
    """0-based number of the rollout it is cut from."""
    position: int
    """Updates since that rollout was made, ``pass_number * rollout_size`` + place in the rollout; equals the staleness
    in updates when none was skipped."""
    rollout_size: int
    """N: mini-batches per rollout."""
    samples: list[Sample]
    advantages: Tensor
    """float32 [S]"""
    in_loss: list[bool]
    """[S] False for samples that leave the loss (``rollout.truncated=mask``); they stay in its normalisation."""
    rollout_metrics: dict[str, float] = field(default_factory=dict)
    """Facts about the whole rollout, on its first mini-batch only (generation time, truncation, reward errors)."""
    passes: int = 1
    """times that its rollout is gone through"""
    pass_number: int = 0
    """0-based: how often the rollout was gone through before."""
    reward_penalty: Tensor | None = None
    """float64 [S], what a KL penalty in the reward takes off, if there is one"""

    @property
    def rewards(self) -> Tensor:
        """float32 [S], of the task"""
        return torch.tensor([sample.reward for sample in self.samples], dtype=torch.float32)

    @property
    def penalised_rewards(self) -> Tensor:
        """[S] what advantages are made of."""
        return self.rewards if self.reward_penalty is None else self.rewards.double() - self.reward_penalty

    def group_index(self) -> Tensor:
        """int64 [S]: samples of one group share a number, counted in order of appearance."""
        numbers: dict[str, int] = {}
        return torch.tensor([numbers.setdefault(s.group_id, len(numbers)) for s in self.samples])
