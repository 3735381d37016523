"""M2PO, second-moment trust policy optimization (arXiv 2510.01161)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vespo_lightning.objectives.base import Objective, Scope, TokenBatch
from vespo_lightning.objectives.checks import require_choice, require_number
from vespo_lightning.objectives.statistics import active_tokens, coefficient_statistics, means
from vespo_lightning.objectives.token_ratio import beyond_bound, clamped_log_ratio

Mode = Literal["mask", "adaptive_clip"]


class M2po(Objective):
    """Token ratio, 0 for the tokens of the mini-batch that carry most of its second moment of log-ratios.

    Trust-region tokens are those that the advantage moves further away: A > 0 and r > 1, or A < 0 and r < 1. M2 is the
    mean of ``(log r)^2`` over the trust-region tokens of the whole mini-batch. While it is at most ``budget``, no token
    is touched, however far it is. Beyond:

    * ``mask`` (the paper's algorithm): the largest entries are masked one after the other until the mean *of the
      remaining ones* is within the budget: the smallest number that does it. Equal entries are masked together, so
      that the order of tokens does not matter. (Duplicated responses have equal entries.)
    * ``adaptive_clip`` (the released code): tau solves ``mean of min((log r)^2, tau^2) = budget``, and PPO's clip acts
      with the range ``[exp(-tau), exp(tau)]``, widened to at least ``[1 - miniclip_low, 1 + miniclip_high]``. The code
      takes for tau the largest abs(log r) of the data below that solution, which clips the same tokens.

    A token that moves towards r = 1 is never masked.

    =============  ==========================  =======================================================  ===========
    constant       paper                       released code                                            here
    =============  ==========================  =======================================================  ===========
    budget         0.04                        0.04                                                     0.04
    mask over      mini-batch                  micro-batch                                              mini-batch
    floors         none (no clip range)        0.3, 0.5 in the function; its caller passes none         0.3, 0.5
    =============  ==========================  =======================================================  ===========

    The paper's aggregation is the mean over all tokens, masked ones included (``aggregation=token-mean``), its
    advantage is divided by the standard deviation of the group.

    Part of the definition: log-ratios are clamped to [-20, 20] before everything, which the released code does not do,
    and tokens beyond have no gradient, as in :class:`~vespo_lightning.objectives.grpo.Grpo`. They do count in M2.

    Args:
        budget: largest second moment, nats squared, above 0.
        mode: ``mask`` or ``adaptive_clip``.
        miniclip_low: with ``adaptive_clip``, the range reaches down to 1 - miniclip_low at least; None is no floor.
        miniclip_high: with ``adaptive_clip``, the range reaches up to 1 + miniclip_high at least; None is no floor.

    Raises:
        UserError: a value outside these ranges, or no such mode.
    """

    name: ClassVar[str] = "m2po"
    scope: ClassVar[Scope] = "mini-batch"

    def __init__(
        self,
        budget: float = 0.04,
        mode: Mode = "mask",
        miniclip_low: float | None = 0.3,
        miniclip_high: float | None = 0.5,
    ) -> None:
        self.budget = require_number("budget", budget, 0.0, open_low=True)
        self.mode = require_choice("mode", mode, get_args(Mode))
        self.miniclip_low = None if miniclip_low is None else require_number("miniclip_low", miniclip_low, 0.0, 1.0)
        self.miniclip_high = None if miniclip_high is None else require_number("miniclip_high", miniclip_high, 0.0)

    def coefficient(self, batch: TokenBatch) -> Tensor:
        """[T], of which ``batch`` must hold the whole mini-batch."""
        silent = beyond_bound(batch)
        for masked in self._masked(batch).values():
            silent = silent | masked
        return torch.where(silent, 0.0, clamped_log_ratio(batch).exp())

    def statistics(self, batch: TokenBatch) -> dict[str, float]:
        """Common numbers, shares of active tokens masked on each side and in the trust region, M2 before and after.

        M2 after masking is the mean over the trust-region tokens that are left.
        """
        active, trust_region = active_tokens(batch), _trust_region(batch)
        sides = self._masked(batch)
        square = clamped_log_ratio(batch).double().square()
        masked = torch.stack(list(sides.values())).any(0)
        numbers = {f"objective/{side}_share": tokens[active] for side, tokens in sides.items()}
        numbers["objective/trust_region_share"] = trust_region[active]
        numbers["objective/second_moment"] = square[trust_region]
        numbers["objective/second_moment_kept"] = square[trust_region & ~masked]
        return coefficient_statistics(self.coefficient(batch), batch) | means(numbers)

    def _masked(self, batch: TokenBatch) -> dict[str, Tensor]:
        """bool [T] for each side of the ratio 1."""
        log_ratio, trust_region = clamped_log_ratio(batch).double(), _trust_region(batch)
        square = log_ratio.square()
        ordered = square[trust_region].sort().values
        if self.mode == "mask":
            low = high = square >= _first_masked(ordered, self.budget)
        else:
            floor, ceiling = self._range(_cap(ordered, self.budget))
            low, high = log_ratio < floor, log_ratio > ceiling
        return {
            "clip_low": trust_region & (log_ratio < 0) & low,
            "clip_high": trust_region & (log_ratio > 0) & high,
        }

    def _range(self, cap: float) -> tuple[float, float]:
        """Logs of the two ratios between which nothing is clipped: of tau, widened to the floors."""
        low, high = -cap, cap
        if self.miniclip_low is not None:
            low = min(low, math.log1p(-self.miniclip_low) if self.miniclip_low < 1 else -math.inf)
        if self.miniclip_high is not None:
            high = max(high, math.log1p(self.miniclip_high))
        return low, high


def _trust_region(batch: TokenBatch) -> Tensor:
    """bool [T]: tokens in the loss that the advantage moves further from a ratio of 1. Not those with a NaN ratio."""
    return batch.loss_mask & (clamped_log_ratio(batch) * batch.advantage.sign()[batch.sequence_index] > 0)


def _first_masked(ordered: Tensor, budget: float) -> Tensor:
    """Smallest entry that is masked; infinity when the mean of all is within ``budget``.

    Args:
        ordered: float64 [n], ascending.
    """
    # The mean of the k smallest entries grows with k, so the last k within the budget keeps the most.
    kept = (ordered.cumsum(0) / torch.arange(1, len(ordered) + 1, device=ordered.device) <= budget).sum()
    return torch.cat([ordered, ordered.new_full((1,), math.inf)])[kept]


def _cap(ordered: Tensor, budget: float) -> float:
    """tau with ``mean of min(entry, tau^2) = budget``; infinity when the mean of all is within ``budget``.

    Args:
        ordered: float64 [n], ascending.
    """
    count = len(ordered)
    from_here = torch.arange(count, 0, -1, device=ordered.device)  # number of entries from each one on
    before = ordered.cumsum(0) - ordered
    whole = int((before + ordered * from_here <= budget * count).sum())  # entries that tau^2 does not cap
    if whole == count:
        return math.inf
    return math.sqrt((budget * count - float(before[whole])) / (count - whole))
