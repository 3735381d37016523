"""Auxiliary losses of routers, additive over the micro-batches of a mini-batch.

Sums over N tokens of the mini-batch (those of the mask), means over its L MoE layers:

* z-loss, ``mean_t (ln sum_e exp z_te)^2`` of router logits z (ST-MoE, arXiv 2202.08906);
* load-balance loss, ``E sum_e f_e mean_t p_te`` of router probabilities p, 1 when either is uniform. f_e is the share
  of expert e in the assignments, and carries no gradient.

The load-balance loss is a product of two means over tokens. With f_e counted in each micro-batch, as most trainers do,
loss and gradient depend on how the mini-batch is cut, and small micro-batches push every sequence towards a uniform
load of its own (arXiv 2501.11873). Here f_e is that of the whole mini-batch and all ranks. Given f the loss is linear
in p, so that micro-batches add up to the loss and gradient of the mini-batch. The price is that f has to be known
before the first backward, from a forward pass without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.checks import require_number

#: More than the rounding of a sum of float32 probabilities.
_NO_LOGITS = 1e-5


@dataclass(frozen=True)
class RouterTotals:
    """Of the whole mini-batch on all ranks, known before the first backward."""

    tokens: int
    """N, tokens that count"""
    load: Tensor | None
    """[L, E] assignments of those tokens to each expert; only the load-balance loss needs it"""


def expert_load(experts: Tensor, mask: Tensor, num_experts: int) -> Tensor:
    """int64 [L, E] assignments of tokens to experts. Loads of micro-batches and ranks add up.

    Args:
        experts: int64 [T, L, K] experts *used*, replayed ones included; negative where unknown, which is not counted.
        mask: bool [T] tokens that count.
    """
    counted = experts[mask].transpose(0, 1).flatten(1)  # [L, T * K]
    load = torch.zeros(len(counted), num_experts, dtype=torch.int64, device=experts.device)
    return load.scatter_add_(1, counted.clamp(min=0), (counted >= 0).long())


def load_balance_loss(probs: Tensor, mask: Tensor, totals: RouterTotals) -> Tensor:
    """Scalar: the share of some tokens in the load-balance loss of their mini-batch.

    Args:
        probs: [T, L, E] router probabilities, with their graph; for sigmoid routers the normalised scores.
        mask: bool [T].
    """
    assert totals.load is not None, "the load-balance loss needs the load of the whole mini-batch"
    num_layers, num_experts = totals.load.shape
    load = totals.load.to(probs)
    share = load / load.sum(dim=-1, keepdim=True).clamp(min=1)
    mean_prob = probs[mask].sum(dim=0) / max(totals.tokens, 1)
    return num_experts * (share * mean_prob).sum() / num_layers


def z_loss(logits: Tensor, mask: Tensor, totals: RouterTotals) -> Tensor:
    """Scalar: the share of some tokens in the z-loss of their mini-batch.

    Args:
        logits: [T, L, E] router logits, with their graph.
        mask: bool [T].
    """
    squares = logits[mask].logsumexp(dim=-1).square()
    return squares.sum() / (max(totals.tokens, 1) * logits.shape[1])


class RouterLosses:
    """The weighted sum of both losses.

    Args:
        load_balance: coefficient of the load-balance loss; 0 leaves it out.
        z: coefficient of the z-loss.

    Raises:
        UserError: a coefficient that is negative or no finite number.
    """

    def __init__(self, load_balance: float = 0.0, z: float = 0.0) -> None:
        self.load_balance = require_number("load_balance", load_balance, 0.0, section="router_loss")
        self.z = require_number("z", z, 0.0, section="router_loss")
        self._has_logits = False

    @property
    def needs_graph(self) -> bool:
        """Whether router logits must carry their graph."""
        return self.load_balance > 0 or self.z > 0

    @property
    def needs_load(self) -> bool:
        """Whether the load of the whole mini-batch must be known before its first backward."""
        return self.load_balance > 0

    def __call__(self, logits: Tensor, probs: Tensor, mask: Tensor, totals: RouterTotals) -> Tensor:
        """Scalar to add to the loss of a micro-batch of T tokens. See the two losses for the arguments.

        Raises:
            UserError: a z-loss of logarithms of probabilities (Gemma 4), which is 0 and has no gradient.
        """
        loss = logits.new_zeros(())
        if self.load_balance:
            loss = loss + self.load_balance * load_balance_loss(probs, mask, totals)
        if self.z:
            self._check_logits(logits[mask])
            loss = loss + self.z * z_loss(logits, mask, totals)
        return loss

    def _check_logits(self, logits: Tensor) -> None:
        """Once, of the first tokens."""
        if self._has_logits or not logits.numel():
            return
        if logits.detach().logsumexp(dim=-1).abs().amax() < _NO_LOGITS:
            raise UserError(
                f"router_loss.z={self.z:g} has nothing to act on: the routers of this model give probabilities "
                "instead of logits; use router_loss.z=0"
            )
        self._has_logits = True
