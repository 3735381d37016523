"""How far routing moved between two forward passes over the same tokens, and what that did to log-probs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.routing.layer_sums import LayerSums, masked_sum

if TYPE_CHECKING:
    from vespo_lightning.training.outputs import RoutingBatch
    from vespo_lightning.training.passes import ForwardPass


class RoutingDrift(LayerSums):
    """Compares the experts of L MoE layers, K per token, with those of an earlier pass, and their probabilities.

    ================ ==========================================================================
    changed_sets     share of (token, layer) whose expert set is another one
    overlap          mean share of the K experts that were chosen earlier too
    changed_tokens   share of tokens with a changed set in any layer
    js_divergence    Jensen-Shannon divergence between the router probabilities of both, nats
    ================ ==========================================================================

    Of the earlier pass the probabilities of the K chosen experts are known, not of all E, so the divergence is that of
    the two distributions coarsened to those K experts and one bin for the rest: by the data-processing inequality a
    lower bound of the full one. All is absent where nothing was compared.

    Args:
        prefix: of the names.
    """

    def __init__(self, layers: list[int], device: torch.device | str = "cpu", prefix: str = "") -> None:
        super().__init__(layers, device)
        self.prefix = prefix
        num_layers = len(layers)
        self.compared_sets = self._zeros(num_layers)
        self.changed_sets = self._zeros(num_layers)
        self.overlap_sum = self._zeros(num_layers)
        self.compared_tokens = self._zeros(1)
        self.changed_tokens = self._zeros(1)
        self.compared_probs = self._zeros(num_layers)
        self.divergence_sum = self._zeros(num_layers)

    def update(
        self,
        experts: Tensor,
        earlier_experts: Tensor,
        mask: Tensor,
        top_probs: tuple[Tensor, Tensor] | None,
    ) -> None:
        """Add the T tokens of one micro-batch.

        Args:
            experts: int64 [T, L, K] of the later pass.
            earlier_experts: int64 [T, L, K], negative where unknown.
            mask: bool [T]; where it is False there may be anything.
            top_probs: [T, L, K] probabilities of ``earlier_experts`` in the later and in the earlier pass, the latter
                non-finite where unknown; None where the earlier pass kept none.
        """
        known = (earlier_experts >= 0).all(dim=-1) & mask[:, None]  # [T, L]
        kept = (experts[..., :, None] == earlier_experts[..., None, :]).any(dim=-1).sum(dim=-1)  # [T, L]
        top_k = experts.shape[-1]
        changed = known & (kept < top_k)
        self.compared_sets += known.sum(dim=0)
        self.changed_sets += changed.sum(dim=0)
        self.overlap_sum += masked_sum(kept / top_k, known)
        self.compared_tokens += known.any(dim=-1).sum()
        self.changed_tokens += changed.any(dim=-1).sum()
        if top_probs is not None:
            known = known & top_probs[1].isfinite().all(dim=-1)
            self.compared_probs += known.sum(dim=0)
            self.divergence_sum += masked_sum(js_divergence(*top_probs), known)

    def update_since_generation(self, batch: RoutingBatch, mask: Tensor) -> None:
        """Add what the routers would choose by themselves, replay or not, against what the engine recorded.

        Engines keep probabilities in float16. The current ones are rounded to it as well, so that a router that has
        not moved has no divergence.

        Args:
            mask: bool [T] tokens to compare.
        """
        recorded, top_probs = batch.recorded_experts, None
        if recorded is None:
            return
        if batch.recorded_top_probs is not None:
            now = batch.probs.gather(-1, recorded.clamp(min=0)).to(torch.float16)
            top_probs = (now, batch.recorded_top_probs)
        self.update(batch.native_experts, recorded, mask, top_probs)

    def per_layer(self) -> dict[str, Tensor]:
        """float64 [L]; all but ``changed_tokens``."""
        values: dict[str, Tensor] = {}
        if (self.compared_sets > 0).all():
            values["changed_sets"] = self.changed_sets / self.compared_sets
            values["overlap"] = self.overlap_sum / self.compared_sets
        if (self.compared_probs > 0).all():
            values["js_divergence"] = self.divergence_sum / self.compared_probs
        return {self.prefix + name: value for name, value in values.items()}

    def pooled(self) -> dict[str, float]:
        """Means over all compared tokens and layers."""
        values: dict[str, Tensor] = {}
        if (self.compared_sets > 0).all():
            compared = self.compared_sets.sum()
            values["changed_sets"] = self.changed_sets.sum() / compared
            values["overlap"] = self.overlap_sum.sum() / compared
            values["changed_tokens"] = self.changed_tokens / self.compared_tokens
        if (self.compared_probs > 0).all():
            values["js_divergence"] = self.divergence_sum.sum() / self.compared_probs.sum()
        return {self.prefix + name: value.item() for name, value in values.items()}


def js_divergence(probs: Tensor, earlier_probs: Tensor) -> Tensor:
    """[...] Jensen-Shannon divergence, nats, of two distributions known on K outcomes; the rest is one bin.

    Args:
        probs, earlier_probs: [..., K], sum to at most 1 but for rounding (engines keep them in float16).
    """
    p, q = _with_rest(probs), _with_rest(earlier_probs)
    mean = (p + q) / 2
    divergence = torch.special.entr(mean) - (torch.special.entr(p) + torch.special.entr(q)) / 2
    return divergence.sum(dim=-1).clamp(min=0)


def _with_rest(top_probs: Tensor) -> Tensor:
    """float64 [..., K + 1]: a last bin with what is missing to 1."""
    top_probs = top_probs.double()
    rest = (1 - top_probs.sum(dim=-1, keepdim=True)).clamp(min=0)
    distribution = torch.cat([top_probs, rest], dim=-1)
    return distribution / distribution.sum(dim=-1, keepdim=True)


@dataclass(frozen=True)
class RoutingSnapshot:
    """What the routers chose by themselves for the T tokens of a mini-batch. L MoE layers, K experts per token."""

    layers: list[int]
    log_prob: Tensor
    """[T]"""
    experts: Tensor
    """int16 [T, L, K]"""
    top_probs: Tensor
    """float32 [T, L, K] router probabilities of those experts; the full distributions would be too large to keep"""

    @classmethod
    def take(cls, passes: Iterable[ForwardPass]) -> RoutingSnapshot:
        """From native forward passes over a mini-batch.

        Raises:
            ValueError: there was no pass.
        """
        layers: list[int] = []
        index, log_prob, experts, top_probs = [], [], [], []
        for done in passes:
            routing = done.observed.routing
            assert routing is not None, "a model without routers"
            layers = routing.layers
            index.append(done.index)
            log_prob.append(done.tokens.log_prob)
            experts.append(routing.native_experts.to(torch.int16))
            top_probs.append(routing.probs.gather(-1, routing.native_experts))
        order = torch.cat(index).argsort()  # micro-batches take the samples in an order of their own
        return cls(layers, *(torch.cat(pieces)[order] for pieces in (log_prob, experts, top_probs)))

    def drift(self, passes: Iterable[ForwardPass]) -> RoutingDrift:
        """From here to native forward passes over the same mini-batch at other weights; names are ``update_...``."""
        drift = RoutingDrift(self.layers, self.experts.device, prefix="update_")
        for done in passes:
            routing = done.observed.routing
            assert routing is not None, "a model without routers"
            experts = self.experts[done.index].long()
            now = routing.probs.gather(-1, experts)
            drift.update(routing.native_experts, experts, routing.mask, (now, self.top_probs[done.index]))
        return drift


class LogRatioSplit:
    """Splits the log-ratio l = p - q of each token, p the trainer's log-prob and q the engine's, into two parts.

    With p_e, the trainer's log-prob at the same weights when every token takes the experts that the engine used:
    l = (p - p_e) + (p_e - q), a part due to routing, and a part due to everything else: arithmetic, and the change of
    the weights since generation. A part of a response is the sum over its tokens in the loss. Sums add up over
    micro-batches and ranks.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.sums = torch.zeros(2, 8, dtype=torch.float64, device=device)
        """of tokens and of responses: number, sums of abs(l), abs(routing), abs(rest), l, routing, l^2, l * routing"""

    def update(self, native: Tensor, tokens: TokenBatch) -> None:
        """Add the t tokens of one micro-batch.

        Args:
            native: [t] p of the same tokens.
            tokens: of the pass with the engine's experts, whose ``log_prob`` is p_e.
        """

        def in_loss(values: Tensor) -> Tensor:
            return torch.where(tokens.loss_mask, values.double(), 0.0)

        total = in_loss(native.double() - tokens.behaviour_log_prob)
        routing = in_loss(native.double() - tokens.log_prob)
        self.sums[0] += _moments(total, routing, tokens.loss_mask)
        self.sums[1] += _moments(tokens.sequence_sum(total), tokens.sequence_sum(routing), tokens.length > 0)

    def metrics(self) -> dict[str, float]:
        """``router/...``; a value without data is absent."""
        token, sequence = (_split(*row) for row in self.sums.tolist())
        named = {
            "router/log_ratio_abs": token.total,
            "router/log_ratio_routing_abs": token.routing,
            "router/log_ratio_weights_abs": token.rest,
            "router/log_ratio_routing_share": token.routing_share,
            "router/sequence_log_ratio_abs": sequence.total,
            "router/sequence_log_ratio_routing_abs": sequence.routing,
            "router/sequence_log_ratio_weights_abs": sequence.rest,
            "router/sequence_log_ratio_routing_share": sequence.routing_share,
        }
        return {name: value for name, value in named.items() if value is not None}


class _Split(NamedTuple):
    """Means of absolute values, and the share of the variance of l that is covariance with the routing part."""

    total: float | None = None
    routing: float | None = None
    rest: float | None = None
    routing_share: float | None = None


def _moments(total: Tensor, routing: Tensor, counts: Tensor) -> Tensor:
    """float64 [8] of n values [n] each; where ``counts`` is False they are 0."""
    columns = (counts, total.abs(), routing.abs(), (total - routing).abs(), total, routing, total**2, total * routing)
    return torch.stack([column.sum(dtype=torch.float64) for column in columns])


def _split(n: float, *sums: float) -> _Split:
    if n == 0:
        return _Split()
    total_abs, routing_abs, rest_abs, total, routing, squared, product = (value / n for value in sums)
    variance = squared - total**2
    spread = variance > 1e-12 * squared  # more than the rounding of equal values
    share = (product - total * routing) / variance if spread else None
    return _Split(total_abs, routing_abs, rest_abs, share)
