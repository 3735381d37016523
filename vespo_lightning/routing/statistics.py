"""Router statistics of one optimizer step, as sums that add up over micro-batches and ranks."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vespo_lightning.training.outputs import RoutingBatch


class RouterStatistics:
    """Additive statistics of L MoE layers with E experts; response tokens only, ratios only at the end.

    c_e are the assignments to expert e of a layer, f = c / sum c, p_t the router probabilities of token t:

    ===================== ==========================================================================
    load_max_violation    max_e f_e E - 1; 0 when the load is uniform, E / K - 1 when it has collapsed
    load_entropy          -sum_e f_e ln f_e / ln E; 1 when the load is uniform
    dead_experts          share of experts with c_e = 0
    entropy               mean_t H(p_t) / ln E; 0 when every token is certain of one expert
    changed_sets          share of (token, layer) whose expert set differs from generation time
    overlap               mean share of the K experts that were chosen at generation time too
    changed_tokens        share of tokens with a changed set in any layer
    js_divergence         Jensen-Shannon divergence between router probabilities now and then, nats
    ===================== ==========================================================================

    The last four compare with what the engine recorded and are absent where it recorded nothing. The engine
    keeps probabilities of the K experts it chose, not of all E, so the divergence is that of the two
    distributions coarsened to those K experts and one bin for the rest: by the data-processing inequality a
    lower bound of the full one.
    """

    def __init__(self, layers: list[int], num_experts: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        num_layers = len(layers)
        self.layers = layers
        self.assignments = zeros(num_layers, num_experts)
        """float64 [L, E] tokens sent to each expert"""
        self.tokens = zeros(1)
        self.entropy_sum = zeros(num_layers)
        self.compared_sets = zeros(num_layers)
        self.changed_sets = zeros(num_layers)
        self.overlap_sum = zeros(num_layers)
        self.compared_tokens = zeros(1)
        self.changed_tokens = zeros(1)
        self.compared_probs = zeros(num_layers)
        self.divergence_sum = zeros(num_layers)

    def update(self, batch: RoutingBatch) -> None:
        """Add the tokens of one micro-batch; rows whose ``mask`` is False may hold anything."""
        num_tokens, num_layers, top_k = batch.experts.shape
        counts = batch.mask.double()  # [T]
        flat_experts = batch.experts.transpose(0, 1).reshape(num_layers, num_tokens * top_k)
        self.assignments.scatter_add_(1, flat_experts, counts.repeat_interleave(top_k).expand(num_layers, -1))
        self.tokens += counts.sum()
        entropy = torch.special.entr(batch.probs).sum(dim=-1)  # [T, L]
        self.entropy_sum += _masked_sum(entropy, batch.mask[:, None])
        if batch.recorded_experts is not None:
            self._compare(batch, batch.recorded_experts)

    def _compare(self, batch: RoutingBatch, recorded: Tensor) -> None:
        known = (recorded >= 0).all(dim=-1) & batch.mask[:, None]  # [T, L]
        kept = (batch.experts[..., :, None] == recorded[..., None, :]).any(dim=-1).sum(dim=-1)  # [T, L]
        top_k = recorded.shape[-1]
        changed = known & (kept < top_k)
        self.compared_sets += known.sum(dim=0)
        self.changed_sets += changed.sum(dim=0)
        self.overlap_sum += _masked_sum(kept / top_k, known)
        self.compared_tokens += known.any(dim=-1).sum()
        self.changed_tokens += changed.any(dim=-1).sum()
        if batch.recorded_top_probs is not None:
            known = known & batch.recorded_top_probs.isfinite().all(dim=-1)
            probs = batch.probs.gather(-1, recorded.clamp(min=0))
            self.compared_probs += known.sum(dim=0)
            self.divergence_sum += _masked_sum(js_divergence(probs, batch.recorded_top_probs), known)

    def sums(self) -> Tensor:
        """float64 [n]: everything that adds up, in one vector, so that one all-reduce serves all of it."""
        return torch.cat([value.reshape(-1) for value in self._additive()])

    def set_sums(self, sums: Tensor) -> None:
        """Take over the vector of :meth:`sums` after it was added over ranks."""
        additive = self._additive()
        for value, part in zip(additive, sums.split([value.numel() for value in additive]), strict=True):
            value.copy_(part.view_as(value))

    def _additive(self) -> list[Tensor]:
        return [value for value in vars(self).values() if isinstance(value, Tensor)]

    def relative_load(self) -> Tensor:
        """float64 [L, E]: f_e E, 1 where an expert gets its fair share."""
        return self.assignments / self.assignments.sum(dim=1, keepdim=True) * self.assignments.shape[1]

    def per_layer(self) -> dict[str, Tensor]:
        """float64 [L] for each statistic that has data; all but ``changed_tokens``."""
        num_experts = self.assignments.shape[1]
        values: dict[str, Tensor] = {}
        if self.tokens > 0:
            load = self.relative_load()
            values["load_max_violation"] = load.amax(dim=1) - 1
            values["load_entropy"] = torch.special.entr(load / num_experts).sum(dim=1) / math.log(num_experts)
            values["dead_experts"] = (self.assignments == 0).double().mean(dim=1)
            values["entropy"] = self.entropy_sum / self.tokens / math.log(num_experts)
        if (self.compared_sets > 0).all():
            values["changed_sets"] = self.changed_sets / self.compared_sets
            values["overlap"] = self.overlap_sum / self.compared_sets
        if (self.compared_probs > 0).all():
            values["js_divergence"] = self.divergence_sum / self.compared_probs
        return values

    def metrics(self) -> dict[str, float]:
        """``name`` pooled and ``name/layer_03`` per layer (the decoder layer's index).

        Pooled values of the load are means over layers (experts of different layers have nothing to do with
        each other); every other pooled value is the mean over its tokens and layers.
        """
        metrics: dict[str, float] = {}
        for name, values in self.per_layer().items():
            metrics[name] = values.mean().item()
            for layer, value in zip(self.layers, values.tolist(), strict=True):
                metrics[f"{name}/layer_{layer:02d}"] = value
        if "changed_sets" in metrics:
            compared = self.compared_sets.sum()
            metrics["changed_sets"] = (self.changed_sets.sum() / compared).item()
            metrics["overlap"] = (self.overlap_sum.sum() / compared).item()
            metrics["changed_tokens"] = (self.changed_tokens / self.compared_tokens).item()
        if "js_divergence" in metrics:
            metrics["js_divergence"] = (self.divergence_sum.sum() / self.compared_probs.sum()).item()
        return metrics


def js_divergence(probs: Tensor, recorded_probs: Tensor) -> Tensor:
    """[...] Jensen-Shannon divergence, nats, of two distributions known on K outcomes; the rest is one bin.

    Args:
        probs: [..., K], sums to at most 1.
        recorded_probs: [..., K], sums to at most 1 but for rounding (engines keep it in float16).
    """
    p, q = _with_rest(probs), _with_rest(recorded_probs)
    mean = (p + q) / 2
    divergence = torch.special.entr(mean) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return divergence.sum(dim=-1).clamp(min=0)


def _with_rest(top_probs: Tensor) -> Tensor:
    """float64 [..., K + 1]: a last bin with what is missing to 1."""
    top_probs = top_probs.double()
    rest = (1 - top_probs.sum(dim=-1, keepdim=True)).clamp(min=0)
    distribution = torch.cat([top_probs, rest], dim=-1)
    return distribution / distribution.sum(dim=-1, keepdim=True)


def _masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """float64 [L]: sum over tokens of ``values`` [T, L] where ``mask`` [T, L] or [T, 1]."""
    return torch.where(mask, values.double(), 0.0).sum(dim=0)
