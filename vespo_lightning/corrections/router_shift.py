"""RSPO's router-shift factor (arXiv 2510.23027): tokens whose routing has changed count less."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from vespo_lightning.corrections.base import Correction
from vespo_lightning.corrections.checks import require_number
from vespo_lightning.corrections.ratios import with_final_weight
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Need, TokenBatch
from vespo_lightning.objectives.statistics import means

if TYPE_CHECKING:
    from vespo_lightning.training.outputs import RoutingBatch

#: The smallest probability that float16, the format of recorded probabilities, tells from 0.
SMALLEST_PROBABILITY = 2.0**-24


class RouterShift(Correction):
    """Factor ``max(floor, gamma_t)`` of the finished coefficient, not differentiated, for any objective.

    ``gamma_t = exp(-(1/L) sum_l (1/K) sum_k abs(log r_new(e_k) - log r_old(e_k)))`` over the L MoE layers and the K
    experts that were active when the token was sampled; r are router probabilities. It is 1 where the router has not
    moved, and never above.

    Needs the router's probabilities from the engine: ``engine=transformers`` records them, vLLM returns the experts'
    numbers only. They are kept in float16, whose steps are 5e-4 of the value (1e-3 at most) above 6e-5; both sides are
    rounded to it, so that an unchanged router gives exactly 1. Probabilities below 6e-8 count as that.

    Disagreements: the paper multiplies the ratio before the clip and takes the geometric mean over the response
    (GMPO); here the factor comes after whatever the objective does, so that it means the same for each of them. The
    authors' code takes the mean over K of exp(-abs(...)), multiplies over layers unless told to take their geometric
    mean, and masks tokens below 0.7 instead of flooring. The floor of the paper is not established here; 0.8 is
    chosen (a re-implementation has the same).

    Part of the definition: a NaN shift stays NaN.

    Args:
        floor: smallest factor, above 0 and at most 1.

    Raises:
        UserError: the floor is outside this range; or, on a batch, there is no router.
    """

    name: ClassVar[str] = "router_shift"
    needs: ClassVar[frozenset[Need]] = frozenset({"router_shift"})

    def __init__(self, floor: float = 0.8) -> None:
        self.floor = require_number("router_shift.floor", floor, 0.0, 1.0, open_low=True)

    def __call__(self, batch: TokenBatch) -> TokenBatch:
        return with_final_weight(batch, self._weight(batch))

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Mean factor of the tokens in the loss, and the share of them at the floor."""
        in_loss = batch.loss_mask
        return means(
            {
                "correction/router_shift_weight_mean": self._weight(batch)[in_loss],
                "correction/router_shift_floored_share": _shift(batch)[in_loss] < math.log(self.floor),
            }
        )

    def _weight(self, batch: TokenBatch) -> Tensor:
        """[T]"""
        return _shift(batch).exp().clamp(min=self.floor)


def _shift(batch: TokenBatch) -> Tensor:
    if batch.router_shift is None:
        raise UserError(
            "correction=router_shift needs a model with experts, and that of model.path is dense; take router_shift "
            "out of correction"
        )
    return batch.router_shift


def log_router_shift(new_probs: Tensor, old_probs: Tensor) -> Tensor:
    """[T] log of gamma, from 0 down to -16.7 = log 2^-24.

    Args:
        new_probs: [T, L, K] router probabilities now, of the experts that were active at generation time.
        old_probs: [T, L, K] those at generation time.
    """
    new, old = (probs.clamp(min=SMALLEST_PROBABILITY).log() for probs in (new_probs, old_probs))
    return -(new - old).abs().mean(dim=(1, 2))


def router_shift_of(routing: RoutingBatch) -> Tensor:
    """[T] log of gamma for the tokens of ``routing``; 0 where its mask is False.

    Raises:
        UserError: the engine recorded no experts, or not the probabilities of the router.
    """
    experts, old = routing.recorded_experts, routing.recorded_top_probs
    if experts is None or bool(((experts < 0).any(dim=2).any(dim=1) & routing.mask).any()):
        raise UserError(
            "correction=router_shift needs the experts of every token, and the engine did not return them; set "
            "engine.record_routing=true"
        )
    if old is None:
        raise UserError(
            "correction=router_shift needs the router's probabilities, and the engine returned experts only; use "
            "engine=transformers"
        )
    new = routing.probs.gather(2, experts.clamp(min=0)).to(torch.float16).to(old.dtype)
    return torch.where(routing.mask, log_router_shift(new, old), 0.0)
