"""Where importance weights of whole responses break down: with length, with mismatch, with staleness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from vespo_lightning.diagnostics import importance
from vespo_lightning.diagnostics.length_drift import (
    length_drift,
    length_statistics,
    starved_positives,
    usable_lengths,
)
from vespo_lightning.objectives.base import Objective, TokenBatch
from vespo_lightning.objectives.sequence import SequenceObjective
from vespo_lightning.objectives.statistics import SUPPRESSED_BELOW
from vespo_lightning.training.outputs import UpdateResult

#: Log W that length alone may add over the longest response. At 1 nat VESPO's coefficient of a bad response is 0.18
#: instead of 1.
LENGTH_BIAS = 1.0
#: The slope must also be this many standard errors away from 0.
LENGTH_CERTAINTY = 3.0
#: Below this share of the responses a few of them make the update.
ESS_RATIO = 0.1
#: More than half of the responses of one sign hardly take part.
SUPPRESSED_SHARE = 0.5
#: Updates in a row before staleness is called lasting: one rollout's worst mini-batches are no news.
STREAK = 8


class WeightAlarms(L.Callback):
    """Records how log W depends on length and what it starves, and warns when the weights stop being of use.

    Of methods that do not weigh whole responses by W itself (by token, by a mean over the length), log W tells
    nothing: for them only suppressed coefficients raise an alarm.

    Each kind of warning is printed once in a process; a resumed run may print it again, and counts its streaks anew.
    Updates in which a figure has no data neither prolong its streak nor end it.

    Args:
        warn: False records only.
    """

    def __init__(self, warn: bool = True) -> None:
        self.warn = warn
        self._streaks: dict[str, int] = {}
        self._warned: set[str] = set()

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update = module.last_update
        if update is None:
            return
        longest: int | None = module.loss.max_response_tokens
        metrics = length_statistics(update.tokens, longest) | starved_positives(update.coefficient, update.tokens)
        if isinstance(module.objective, SequenceObjective):
            metrics |= usable_lengths(update.tokens, module.objective)
        module.record(metrics)
        if not self.warn:
            return
        for kind, sentence in self._alarms(update, metrics, longest, weighs_whole_responses(module.objective)):
            if kind not in self._warned:
                self._warned.add(kind)
                rank_zero_warn(sentence)

    def _alarms(
        self, update: UpdateResult, metrics: dict[str, float], longest: int | None, whole: bool
    ) -> Iterator[tuple[str, str]]:
        """(kind, sentence) of every alarm that this update raises; ``whole``: W is what the method weighs with."""
        tokens = update.tokens
        if whole and longest is not None and tokens.denominator == "behaviour":
            yield from _length_alarms(tokens, metrics, longest)
        counted = importance.in_loss(tokens)
        if whole and counted.any():
            ratio = importance.ess_ratio(importance.log_weights(tokens)[counted])
            if self._lasts("ess", ratio < ESS_RATIO):
                yield (
                    "ess",
                    f"The effective sample size of the importance weights was below {ESS_RATIO:.0%} of the responses "
                    f"in {STREAK} updates in a row, {ratio:.1%} in the last: lower staleness.n, rollout.passes "
                    "or optim.lr, or look at mismatch/* if this is so from the first mini-batch of each rollout on.",
                )
        coefficients = importance.sequence_coefficients(update.coefficient, tokens)
        for sign, values in importance.by_sign(coefficients, tokens).items():
            if not len(values):
                continue
            share = (values < SUPPRESSED_BELOW).double().mean().item()
            if self._lasts(sign, share > SUPPRESSED_SHARE):
                yield (
                    sign,
                    f"More than {SUPPRESSED_SHARE:.0%} of the responses with {sign} advantage had a coefficient below "
                    f"{SUPPRESSED_BELOW:g} in {STREAK} updates in a row, {share:.0%} in the last, so hardly anything "
                    "is learned from them: lower staleness.n, rollout.passes or optim.lr, or look at mismatch/* if "
                    "this is so from the first mini-batch of each rollout on.",
                )

    def _lasts(self, name: str, raised: bool) -> bool:
        """Whether this has now been so for ``STREAK`` updates in a row."""
        self._streaks[name] = self._streaks.get(name, 0) + 1 if raised else 0
        return self._streaks[name] >= STREAK


def weighs_whole_responses(objective: Objective) -> bool:
    return isinstance(objective, SequenceObjective) and objective.normalisation == "none"


def _length_alarms(tokens: TokenBatch, metrics: dict[str, float], longest: int) -> Iterator[tuple[str, str]]:
    """What goes wrong at equal weights already, where W should be 1."""
    remedy = (
        "set denominator=recomputed, compute both in float32 (engine.dtype=float32 trainer.precision=32-true) or lower "
        "rollout.max_new_tokens; for Mixture-of-Experts policies try routing=r3"
    )
    fit = length_drift(tokens) if _fresh(tokens) else None
    if fit is not None:
        bias = fit.slope * longest
        if abs(bias) > LENGTH_BIAS and abs(fit.slope) > LENGTH_CERTAINTY * fit.error:
            yield (
                "length",
                f"With no lag at all log W changes by {fit.slope:.2g} nats per token, {bias:.2g} nats over "
                f"rollout.max_new_tokens={longest}, so responses are weighted by their length: {remedy}.",
            )
    usable = min(metrics.get(f"mismatch/usable_length_{sign}", math.inf) for sign in ("positive", "negative"))
    if usable < longest:
        yield (
            "usable",
            f"Engine and trainer differ by {metrics['mismatch/token_log_ratio_mean']:.2g} nats per token at equal "
            f"weights, which alone takes the coefficient of responses beyond {usable:.0f} tokens below a half, and "
            f"rollout.max_new_tokens={longest} allows longer ones: {remedy}.",
        )


def _fresh(tokens: TokenBatch) -> bool:
    """Whether every token in the loss was written by the version that is trained now."""
    written = tokens.version_made[tokens.loss_mask]
    return bool(len(written)) and bool((written == tokens.policy_version).all())
