"""Engine mismatch: what the inference engine and the trainer say about the same tokens at the same weights.

Measured at equal weights only, so that it never mixes with the lag of the data: either the trainer's
log-probs were recomputed when the sample was made, or the tokens were written by the very version that the
trainer now holds (the first mini-batch of a rollout).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch

#: A token is extreme when one side finds it more than twice as likely as the other (F(2) of the R3 paper).
EXTREME_RATIO = 2.0


def comparable_tokens(batch: TokenBatch) -> tuple[Tensor, Tensor]:
    """The trainer's log-probs [T], and bool [T]: loss tokens where they are those of generation weights."""
    if batch.recomputed_log_prob is not None:
        return batch.recomputed_log_prob, batch.loss_mask
    return batch.log_prob, batch.loss_mask & (batch.version_made == batch.policy_version)


def mismatch_statistics(batch: TokenBatch) -> dict[str, float]:
    """``mismatch/...`` from ``d = log p_trainer - log p_engine`` of each token; {} where undefined.

    Sequence numbers count sequences all of whose loss tokens are comparable.
    """
    trainer, compared = comparable_tokens(batch)
    if not compared.any():
        return {}
    difference = torch.where(compared, trainer - batch.behaviour_log_prob, 0.0).double()
    d = difference[compared]
    result = {
        "mismatch/k3_kl": (torch.expm1(d) - d).mean().item(),
        "mismatch/log_prob_diff_mean": d.abs().mean().item(),
        "mismatch/log_prob_diff_max": d.abs().max().item(),
        "mismatch/perplexity_gap": _perplexity(trainer[compared]) - _perplexity(batch.behaviour_log_prob[compared]),
        "mismatch/extreme_token_share": (d.abs() > math.log(EXTREME_RATIO)).double().mean().item(),
    }
    whole = (batch.length > 0) & (batch.sequence_sum(compared.to(batch.length)) == batch.length)
    if whole.any():
        log_ratio = batch.sequence_sum(difference)[whole]
        result["mismatch/sequence_log_ratio_mean"] = log_ratio.mean().item()
        result["mismatch/sequence_log_ratio_std"] = log_ratio.std(correction=0).item()
    return result


class EqualRouting:
    """Largest |d| over tokens whose whole response so far was routed alike by engine and trainer.

    A token that one side sends to another expert changes every later token of its sequence through attention, so the
    rest of a sequence is left out from its first flip on. What remains is arithmetic alone: in float32 about 1e-6.
    Sums add up over micro-batches.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.flipped = 0
        self.largest = 0.0

    def update(self, batch: TokenBatch, now: Tensor, then: Tensor) -> None:
        """Add one micro-batch: experts [T, L, K] of the trainer's pass, and of the engine's (-1 where unknown)."""
        compared = batch.loss_mask & (batch.version_made == batch.policy_version)
        if not compared.any():
            return
        known = (then >= 0).all(dim=-1)
        differs = (now.sort(dim=-1).values != then.sort(dim=-1).values).any(dim=-1)
        flips = (known & differs).any(dim=-1)  # [T]
        equal = compared & (_running_count(flips, batch.sequence_index) == 0)
        self.tokens += int(compared.sum())
        self.flipped += int((flips & compared).sum())
        if equal.any():
            difference = (batch.log_prob - batch.behaviour_log_prob)[equal].abs()
            self.largest = max(self.largest, float(difference.max()))

    def metrics(self) -> dict[str, float]:
        """``mismatch/...``; {} where nothing was compared."""
        if not self.tokens:
            return {}
        return {
            "mismatch/flipped_tokens": float(self.flipped),
            "mismatch/equal_routing_diff_max": self.largest,
        }


def _running_count(flags: Tensor, sequence_index: Tensor) -> Tensor:
    """int64 [T]: flags raised so far in the same sequence, the present token included."""
    total = flags.long().cumsum(0)
    starts = torch.ones_like(flags)
    starts[1:] = sequence_index[1:] != sequence_index[:-1]
    before = (total - flags.long())[starts]  # raised before each sequence begins
    return total - before[starts.long().cumsum(0) - 1]


def _perplexity(log_prob: Tensor) -> float:
    """``exp(-mean log p)`` over tokens [n]."""
    return (-log_prob.double().mean()).exp().item()
