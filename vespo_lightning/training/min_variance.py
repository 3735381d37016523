"""Updates with the minimum-variance baseline, whose advantages are known only after a look at the gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch, policy_loss
from vespo_lightning.objectives.min_variance import MinVariance
from vespo_lightning.training.loss import MiniBatchLoss
from vespo_lightning.training.passes import ForwardPass, MiniBatchPasses
from vespo_lightning.training.per_sequence import min_variance_backward
from vespo_lightning.training.token_batches import MiniBatchTokens


@torch.no_grad()
def set_advantage_from_head(baseline: MinVariance, loss: MiniBatchLoss, passes: MiniBatchPasses) -> None:
    """Advantages of the forward-only estimator, from one pass without gradients."""
    norms = torch.zeros_like(passes.tokens.advantage)
    for done in passes.run(token_weights=lambda seq, tokens: _token_weights(loss, passes.tokens, seq, tokens)):
        assert done.out.squared_norm is not None
        norms[list(done.sequences)] = done.out.squared_norm.to(norms.dtype)
    # The advantages so far are rewards less the mean of their group, and the baseline moves along with a shift.
    passes.set_advantage(baseline.advantage(passes.tokens.advantage, norms, passes.tokens.group))


def backward_per_sequence(
    loss: MiniBatchLoss,
    passes: MiniBatchPasses,
    backward: Callable[[Tensor], None],
    observe: Callable[[ForwardPass], None],
) -> float:
    """Advantages and gradients of the exact estimator, by one backward pass per response; the loss.

    Args:
        backward: of a scalar loss.
        observe: called after each pass.
    """

    def one(i: int) -> None:
        for done in passes.run(plan=[[i]]):
            weight = _token_weights(loss, passes.tokens, done.sequences, done.tokens)
            backward(policy_loss(weight, torch.ones_like(weight), done.out.log_prob))
            observe(done)

    tokens = passes.tokens
    found = min_variance_backward(passes.policy.parameters(), tokens.advantage, tokens.group, one)
    passes.set_advantage(found.advantage)
    whole = passes.whole()
    weight = loss.weights(tokens, range(len(passes.samples)), whole.sequence_index)
    return float(policy_loss(weight, loss.multiplier(whole), whole.log_prob))


def _token_weights(loss: MiniBatchLoss, tokens: MiniBatchTokens, sequences: Sequence[int], piece: TokenBatch) -> Tensor:
    """[t] what multiplies ``grad log pi`` of each token at advantage 1."""
    seen = loss.seen(piece)
    coefficient = torch.where(seen.loss_mask, loss.objective.corrected_coefficient(seen), 0.0)
    return loss.weights(tokens, sequences, piece.sequence_index) * coefficient
