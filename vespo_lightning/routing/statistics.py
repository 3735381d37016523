"""Router statistics of one optimizer step, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vespo_lightning.corrections.router_shift import router_shift_of
from vespo_lightning.routing.drift import RoutingDrift
from vespo_lightning.routing.layer_sums import LayerSums, masked_sum
from vespo_lightning.routing.losses import expert_load

if TYPE_CHECKING:
    from vespo_lightning.training.outputs import RoutingBatch


class RouterStatistics(LayerSums):
    """Statistics of L MoE layers with E experts, K per token; tokens of the batch's mask only.

    C_e are the assignments to expert e of a layer by the forward pass, replayed ones included; f = C / sum C;
    p_t are the router probabilities of token t and z_t its router logits:

    ===================== ==========================================================================
    load_max_violation    max_e f_e E - 1; 0 when the load is uniform, E / K - 1 when it has collapsed
    load_min_violation    min_e f_e E - 1; 0 when the load is uniform, -1 with a dead expert
    load_mean_violation   mean_e abs(f_e E - 1)
    load_cv               std(f) / mean(f), population standard deviation over experts
    load_entropy          -sum_e f_e ln f_e / ln E; 1 when the load is uniform
    dead_experts          share of experts with C_e = 0
    load_balance_loss     E sum_e f_e mean_t p_te; 1 when either is uniform
    entropy               mean_t H(p_t) / ln E; 0 when every token is certain of one expert
    confidence            mean_t of the sum of p_t over the K experts used
    margin                mean_t of the K-th minus the (K + 1)-th largest of p_t; absent where K = E
    z_loss                mean_t (ln sum_e exp z_te)^2
    shift_ratio           mean_t exp(-mean over layers and K of abs(ln p_now - ln p_then)), see ``RouterShift``
    ===================== ==========================================================================

    The margin is one of router probabilities. Routers that choose by other scores (an added bias, groups first) can
    be closer to another choice than it says.

    The statistics of :class:`~vespo_lightning.routing.drift.RoutingDrift` since generation are among them.
    """

    def __init__(self, layers: list[int], num_experts: int, device: torch.device | str = "cpu") -> None:
        super().__init__(layers, device)
        num_layers = len(layers)
        self.assignments = self._zeros(num_layers, num_experts)
        """float64 [L, E] tokens sent to each expert"""
        self.prob_sum = self._zeros(num_layers, num_experts)
        self.tokens = self._zeros(1)
        self.entropy_sum = self._zeros(num_layers)
        self.confidence_sum = self._zeros(num_layers)
        self.margin_sum = self._zeros(num_layers)
        self.margin_tokens = self._zeros(1)
        self.z_loss_sum = self._zeros(num_layers)
        self.shift_ratio_sum = self._zeros(1)
        self.shift_tokens = self._zeros(1)
        self.drift = RoutingDrift(layers, device)

    def update(self, batch: RoutingBatch) -> None:
        """Add the tokens of one micro-batch; rows whose ``mask`` is False may hold anything."""
        self.assignments += expert_load(batch.experts, batch.mask, self.assignments.shape[1])
        self.tokens += batch.mask.sum()
        self._add_router(batch)
        self.drift.update_since_generation(batch, batch.mask)
        if batch.recorded_experts is not None and batch.recorded_top_probs is not None:
            self._add_shift(batch, batch.recorded_experts, batch.recorded_top_probs)

    def _add_router(self, batch: RoutingBatch) -> None:
        mask, top_k = batch.mask[:, None], batch.experts.shape[-1]
        self.prob_sum += torch.where(mask[..., None], batch.probs, 0.0).sum(dim=0, dtype=torch.float64)
        self.entropy_sum += masked_sum(torch.special.entr(batch.probs).sum(dim=-1), mask)
        self.confidence_sum += masked_sum(batch.probs.gather(-1, batch.experts).sum(dim=-1), mask)
        self.z_loss_sum += masked_sum(batch.logits.logsumexp(dim=-1).square(), mask)
        if top_k < batch.probs.shape[-1]:
            highest = batch.probs.topk(top_k + 1, dim=-1).values
            self.margin_sum += masked_sum(highest[..., -2] - highest[..., -1], mask)
            self.margin_tokens += batch.mask.sum()

    def _add_shift(self, batch: RoutingBatch, experts: Tensor, probs: Tensor) -> None:
        known = ((experts >= 0) & probs.isfinite()).all(dim=-1).all(dim=-1) & batch.mask
        shift = router_shift_of(replace(batch, mask=known)).double()
        self.shift_ratio_sum += torch.where(known, shift.exp(), 0.0).sum()
        self.shift_tokens += known.sum()

    def relative_load(self) -> Tensor:
        """float64 [L, E]: f_e E, 1 where an expert gets its fair share."""
        return self.assignments / self.assignments.sum(dim=1, keepdim=True) * self.assignments.shape[1]

    def per_layer(self) -> dict[str, Tensor]:
        """float64 [L] for each statistic that has data; all but ``changed_tokens`` and ``shift_ratio``."""
        values: dict[str, Tensor] = {}
        if self.tokens > 0:
            values |= self._load() | {
                "entropy": self.entropy_sum / self.tokens / math.log(self.assignments.shape[1]),
                "confidence": self.confidence_sum / self.tokens,
                "z_loss": self.z_loss_sum / self.tokens,
            }
        if self.margin_tokens > 0:
            values["margin"] = self.margin_sum / self.margin_tokens
        return values | self.drift.per_layer()

    def _load(self) -> dict[str, Tensor]:
        load, num_experts = self.relative_load(), self.assignments.shape[1]
        return {
            "load_max_violation": load.amax(dim=1) - 1,
            "load_min_violation": load.amin(dim=1) - 1,
            "load_mean_violation": (load - 1).abs().mean(dim=1),
            "load_cv": load.std(dim=1, correction=0),
            "load_entropy": torch.special.entr(load / num_experts).sum(dim=1) / math.log(num_experts),
            "dead_experts": (self.assignments == 0).double().mean(dim=1),
            "load_balance_loss": (load * self.prob_sum).sum(dim=1) / self.tokens,
        }

    def pooled(self) -> dict[str, float]:
        """Comparisons with generation time; other pooled values are means over layers, whose experts have nothing to
        do with each other."""
        values = self.drift.pooled()
        if self.shift_tokens > 0:
            values["shift_ratio"] = (self.shift_ratio_sum / self.shift_tokens).item()
        return values
