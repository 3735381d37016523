"""DPPO, divergence proximal policy optimization (arXiv 2602.04879), with its binary and its top-K divergences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Need, Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_choice, require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import MAX_RATIO, clamped_log_ratio

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]

#: Thresholds of the paper's stability study, which gives one for each distance.
DEFAULT_THRESHOLDS = {"tv": 0.15, "kl": 0.05}
#: Added to both probabilities of "any other token" in the KL divergences, as in the published code.
PROBABILITY_EPSILON = 1e-8


class Dppo(Objective):
    """Token ratio, 0 where the policy moved too far *in probability* and the advantage would move it further.

    With m = exp(old log-prob) and p = exp(log-prob) of the sampled token, the token against all others:

    * ``binary_tv``: D = ``|m - p|``
    * ``binary_kl``: D = ``m log(m / p) + (1 - m) log((1 - m) / (1 - p))``

    or with several bins, the K tokens that were likeliest when the response was sampled, the sampled token where it is
    not one of them, and all other tokens together (probability at least 0):

    * ``topk_tv``: D = half the sum of ``|m_b - p_b|`` over the bins b
    * ``topk_kl``: D = sum of ``m_b log(m_b / p_b)``

    K is ``rollout.top_log_probs`` (the paper: 20, vLLM's limit). With K = 0 these would be the binary divergences,
    which are lower bounds of them: merging bins never raises D.

    The coefficient is ``min(r, cap)``, and 0 where D > threshold and either A > 0 and r > 1 or A < 0 and r < 1. A
    ratio clip is wrong at both ends: 1e-4 to 1e-2 is a ratio of 100 but moves 1 % of the probability, 0.99 to 0.8 is
    a ratio of 0.81 and moves 19 %.

    ============  ===================  =================  ================  =====================
    constant      paper, stability     paper, scaling     verl's examples   here
    ============  ===================  =================  ================  =====================
    threshold TV  0.15                 0.2 (LoRA 0.15)    0.15              0.15
    threshold KL  0.05                 0.05               0.05              0.05
    cap           none                 5                  10000             5
    ============  ===================  =================  ================  =====================

    The paper finds no difference for thresholds of 0.10-0.20 (TV) and 0.05-0.15 (KL), and gives none of their own for
    the top-K divergences. Its advantages are not divided
    by a standard deviation, its loss is a sum over tokens divided by a constant (``aggregation=constant``).

    Disagreements: the paper anchors ratio and divergence at the policy that sampled, that is ``denominator=behaviour``,
    and finds a recomputed anchor to collapse; verl recomputes by default. Here both follow the denominator of the run,
    but the top-K divergences, which know the policy that sampled only. TRL's implementation has K bins instead of K + 1
    where the sampled token is not among the likeliest: it takes the place of the last.
    verl reads the thresholds from ``clip_ratio_low`` and ``clip_ratio_high``, which default to 0.2, so that its
    ``clip_ratio`` has no effect, and the cap from ``clip_ratio_c``, which defaults to 3, not to the 20 in its code.

    Part of the definition: log-ratios are clamped to [-20, 20] before the exponential, as verl does, inside the weight
    that is not differentiated; 1e-8 is added to 1 - m and to 1 - p, or to the rest, in the KL divergences, as in
    verl; a log-prob above 0 counts as 0 in the divergence.

    Args:
        divergence: ``binary_tv``, ``binary_kl``, ``topk_tv`` or ``topk_kl``.
        threshold: largest divergence that is not masked; None takes 0.15 for TV, 0.05 for KL.
        cap: largest weight, at least 1; None for no bound but that of the clamp.

    Raises:
        UserError: a value outside these ranges, or no such divergence.
    """

    name: ClassVar[str] = "dppo"
    scope: ClassVar[Scope] = "token"

    def __init__(
        self, divergence: Divergence = "binary_tv", threshold: float | None = None, cap: float | None = 5.0
    ) -> None:
        self.divergence = require_choice("divergence", divergence, get_args(Divergence))
        default = DEFAULT_THRESHOLDS[divergence[-2:]]
        self.threshold = default if threshold is None else require_number("threshold", threshold, 0.0)
        self.cap = None if cap is None else require_number("cap", cap, 1.0, MAX_RATIO)

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]  # of this divergence
        return frozenset({"top_log_probs"}) if self.divergence.startswith("topk") else frozenset()

    def coefficient(self, batch: TokenBatch) -> Tensor:
        coefficient = clamped_log_ratio(batch).exp()
        if self.cap is not None:
            coefficient = coefficient.clamp(max=self.cap)
        for masked in self._masked(self._divergence(batch), batch).values():
            coefficient = torch.where(masked, 0.0, coefficient)
        return coefficient

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, mean divergence, and the shares of active tokens masked on each side and capped."""
        active = active_tokens(batch)
        divergence = self._divergence(batch)
        numbers = {"objective/divergence_mean": divergence[active]}
        numbers |= {side: masked[active] for side, masked in self._masked(divergence, batch).items()}
        if self.cap is not None:
            numbers["objective/capped_share"] = clamped_log_ratio(batch).exp()[active] > self.cap
        return coefficient_statistics(self.coefficient(batch), batch) | means(numbers)

    def _divergence(self, batch: TokenBatch) -> Tensor:
        """float64 [T]: divergence of each token in the loss, 0 elsewhere."""
        bins = _top_bins(batch) if self.divergence.startswith("topk") else _sampled_bin(batch, batch.old_log_prob)
        if self.divergence.endswith("tv"):
            return bins.total_variation
        return bins.kl

    def _masked(self, divergence: Tensor, batch: TokenBatch) -> dict[str, Tensor]:
        """bool [T] for each side: too far, and the advantage would move the token further."""
        advantage = batch.advantage[batch.sequence_index]
        far = divergence > self.threshold
        return {
            "objective/clip_low_share": far & (advantage < 0) & (batch.log_ratio < 0),
            "objective/clip_high_share": far & (advantage > 0) & (batch.log_ratio > 0),
        }


@dataclass(frozen=True)
class _Bins:
    """Two distributions over B + 1 bins, the last of which is the rest. float64."""

    old: Tensor
    """[T, B] log-probs, at most 0"""
    new: Tensor
    """[T, B]"""
    rest_old: Tensor
    """[T] probabilities"""
    rest_new: Tensor
    """[T]"""

    @property
    def total_variation(self) -> Tensor:
        """[T]"""
        moved = (self.old.exp() - self.new.exp()).abs().sum(1)
        return (moved + (self.rest_old - self.rest_new).abs()) / 2

    @property
    def kl(self) -> Tensor:
        """[T] divergence of old from new."""
        probability = self.old.exp()
        # a bin that was impossible adds nothing, also where its log-prob is -inf
        terms = torch.where(probability > 0, probability * (self.old - self.new), 0.0)
        rest = ((self.rest_old + PROBABILITY_EPSILON) / (self.rest_new + PROBABILITY_EPSILON)).log()
        return terms.sum(1) + self.rest_old * rest


def _sampled_bin(batch: TokenBatch, old_log_prob: Tensor) -> _Bins:
    """The sampled token against all others."""
    old, new = _in_loss(old_log_prob, batch), _in_loss(batch.log_prob, batch)
    # expm1: 1 - p without loss of digits for the likely tokens that make up most of a response
    return _Bins(old[:, None], new[:, None], -torch.expm1(old), -torch.expm1(new))


def _top_bins(batch: TokenBatch) -> _Bins:
    """The likeliest tokens, the sampled one where it is not among them, and all others."""
    assert batch.top is not None, "a top-k divergence without top log-probs"
    extra = torch.where(batch.top.holds_sampled, -math.inf, 0.0).double()[:, None]  # impossible where it is not needed
    sampled = _sampled_bin(batch, batch.behaviour_log_prob)
    old = torch.cat([_in_loss(batch.top.behaviour, batch), sampled.old + extra], 1)
    new = torch.cat([_in_loss(batch.top.current, batch), sampled.new + extra], 1)
    return _Bins(old, new, _rest(old), _rest(new))


def _in_loss(log_prob: Tensor, batch: TokenBatch) -> Tensor:
    """float64, [T] or [T, K]: at most 0; 0 outside the loss."""
    inside = batch.loss_mask if log_prob.dim() == 1 else batch.loss_mask[:, None]
    return torch.where(inside, log_prob, 0.0).double().clamp(max=0.0)


def _rest(log_prob: Tensor) -> Tensor:
    """[T] probability that the bins [T, B] leave over."""
    return (1 - log_prob.exp().sum(1)).clamp(min=0.0)
