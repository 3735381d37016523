"""A learning rate that falls with the effective sample size of the importance weights (VCPO, arXiv 2602.17616)."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import lightning as L

from vespo_lightning.diagnostics import importance
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch

Rule = Literal["sqrt", "linear"]


class EssLearningRate(L.Callback):
    """Multiplies the learning rate of each update by ``f(min(1, rho / reference))``.

    rho is the effective sample size ratio ``(sum W)^2 / (n * sum W^2)`` of the mini-batch, over the responses with a
    token in the loss, on all ranks. W is neither clamped nor capped, whatever the objective does to it. f is the
    square root or the identity. Decoupled weight decay shrinks along, as it is a multiple of the learning rate.

    The optimizer's schedule sets the learning rate anew after each step, so factors do not pile up.

    Args:
        rule: ``sqrt`` (the paper) or ``linear``.
        reference: rho at which the learning rate is the configured one. 1 in VCPO's code, 0.55 for its multi-turn
            runs. None measures it: the mean rho of the first mini-batches of all rollouts so far, whose weights
            differ from 1 by the mismatch between engine and trainer only; the paper's formula.

    Raises:
        UserError: an argument outside its domain.
    """

    def __init__(self, rule: Rule = "sqrt", reference: float | None = None) -> None:
        if rule not in get_args(Rule):
            raise UserError(f"callbacks.ess_learning_rate.rule={rule} is unknown; valid: {', '.join(get_args(Rule))}")
        number = isinstance(reference, int | float) and not isinstance(reference, bool)
        if reference is not None and not (number and 0 < reference <= 1):
            raise UserError(
                f"callbacks.ess_learning_rate.reference={reference} is not allowed; give a number above 0 and at most "
                "1, or null to measure it"
            )
        self.rule, self.reference = rule, reference
        self._fresh_sum = 0.0
        self._fresh_count = 0

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Any, optimizer: Any) -> None:
        ess = _ess_ratio(trainer, module.last_update.tokens)
        if ess is None:
            return
        if module.last_update.mini_batch.position == 0:
            self._fresh_sum += ess
            self._fresh_count += 1
        reference = self._reference()
        factor = min(1.0, ess / reference)
        if self.rule == "sqrt":
            factor = math.sqrt(factor)
        for group in optimizer.param_groups:
            group["lr"] *= factor
        module.record({"train/ess_lr_factor": factor, "train/ess_reference": reference})

    def _reference(self) -> float:
        if self.reference is not None:
            return self.reference
        return self._fresh_sum / self._fresh_count if self._fresh_count else 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"fresh_sum": self._fresh_sum, "fresh_count": self._fresh_count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._fresh_sum, self._fresh_count = state_dict["fresh_sum"], state_dict["fresh_count"]


def _ess_ratio(trainer: L.Trainer, tokens: TokenBatch) -> float | None:
    """Of the mini-batch on all ranks, which must agree on the learning rate; None without a token in the loss."""
    gather = trainer.strategy.all_gather
    log_weight = gather(importance.log_weights(tokens)).flatten()
    log_weight = log_weight[gather(importance.in_loss(tokens)).flatten()]
    if not len(log_weight):
        return None
    ess = importance.ess_ratio(log_weight)
    # an engine that reports -inf: one weight is everything
    return ess if math.isfinite(ess) else 1 / len(log_weight)
