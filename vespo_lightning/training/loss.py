"""The loss of a mini-batch: objective, corrections, KL penalty, entropy bonus and aggregation, put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vespo_lightning.corrections.base import Correction, corrected, correction_statistics
from vespo_lightning.objectives.base import Need, Objective, TokenBatch, policy_loss
from vespo_lightning.objectives.kl import KlPenalty
from vespo_lightning.routing.losses import RouterLosses, RouterTotals
from vespo_lightning.training.aggregation import Aggregation, Totals, token_weights
from vespo_lightning.training.passes import ForwardPass
from vespo_lightning.training.token_batches import MiniBatchTokens


def loss_needs(objective: Objective, corrections: Sequence[Correction]) -> frozenset[Need]:
    """Optional parts of token batches that the objective or a correction cannot do without."""
    return objective.needs.union(*(correction.needs for correction in corrections))


class MiniBatchLoss:
    """Loss of micro-batches, normalised by counts of their whole mini-batch. See :class:`PolicyModule`."""

    def __init__(
        self,
        objective: Objective,
        corrections: Sequence[Correction],
        kl: KlPenalty | None,
        aggregation: Aggregation,
        max_response_tokens: int | None,
        entropy_coefficient: float,
        router_losses: RouterLosses,
    ) -> None:
        self.objective = objective
        self.corrections = list(corrections)
        self.kl = kl
        self.aggregation: Aggregation = aggregation
        self.max_response_tokens = max_response_tokens
        self.entropy_coefficient = entropy_coefficient
        self.router_losses = router_losses

    @property
    def needs(self) -> frozenset[Need]:
        return loss_needs(self.objective, self.corrections)

    def seen(self, tokens: TokenBatch) -> TokenBatch:
        """What the objective sees: ``tokens`` after the corrections."""
        return corrected(self.corrections, tokens)

    def weights(self, tokens: MiniBatchTokens, sequences: Sequence[int], sequence_index: Tensor) -> Tensor:
        """[t] aggregation weight of the tokens of some sequences."""
        totals = Totals(tokens.total_written, len(tokens.written), self.max_response_tokens)
        return token_weights(self.aggregation, tokens.written[list(sequences)], sequence_index, totals)

    def multiplier(self, tokens: TokenBatch) -> Tensor:
        """[T] what multiplies ``grad log pi`` of each token, aggregation aside."""
        multiplier = self.objective.multiplier(self.seen(tokens))
        # A token that a correction takes out of the objective is still held by the reference.
        return multiplier if self.kl is None else multiplier + self.kl.multiplier(tokens)

    def router_totals(self, tokens: MiniBatchTokens, load: Tensor | None) -> RouterTotals:
        """What router losses are normalised by; ``load`` int64 [L, E] is that of the mini-batch, where it is known."""
        return RouterTotals(int(tokens.loss_mask.sum()), load)

    def __call__(
        self, tokens: MiniBatchTokens, done: ForwardPass, multiplier: Tensor, router_totals: RouterTotals
    ) -> Tensor:
        """Scalar, with the gradient of the micro-batch ``done``; ``multiplier`` [t] is that of its tokens."""
        weight = self.weights(tokens, done.sequences, done.tokens.sequence_index)
        loss = policy_loss(weight, multiplier, done.out.log_prob)
        if self.entropy_coefficient:
            bonus = torch.where(done.tokens.loss_mask, weight * done.out.entropy, 0.0).sum()
            loss = loss - self.entropy_coefficient * bonus
        if done.router_logits is not None and done.router_probs is not None:
            mask = done.tokens.loss_mask
            loss = loss + self.router_losses(done.router_logits, done.router_probs, mask, router_totals)
        return loss

    def statistics(self, tokens: TokenBatch, seen: TokenBatch) -> dict[str, float]:
        """Numbers of the objective, the corrections and the KL penalty over the whole mini-batch."""
        result = self.objective.statistics(seen) | correction_statistics(self.corrections, tokens)
        return result if self.kl is None else result | self.kl.statistics(tokens)
