"""How much the importance weights vary, and what the objective makes of them."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor

from vespo_lightning.callbacks.tensorboard import summary_writer
from vespo_lightning.diagnostics import importance
from vespo_lightning.errors import UserError
from vespo_lightning.training.outputs import UpdateResult


class WeightVariance(L.Callback):
    """Records ``importance/*`` at each update; draws histograms of log W and the coefficient.

    Args:
        histogram_every: updates between histograms; 0 draws none.

    Raises:
        UserError: ``histogram_every`` is not a whole number >= 0.
    """

    def __init__(self, histogram_every: int = 16) -> None:
        if not isinstance(histogram_every, int) or isinstance(histogram_every, bool) or histogram_every < 0:
            raise UserError(
                f"callbacks.weight_variance.histogram_every={histogram_every} is not allowed;"
                " give a whole number of updates, 0 for no histograms"
            )
        self.histogram_every = histogram_every

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        update = module.last_update
        if update is None:
            return
        module.record(importance.importance_statistics(update.tokens))
        module.record(importance.coefficient_distribution(update.coefficient, update.tokens))
        if self.histogram_every and module.update % self.histogram_every == 0:
            writer = summary_writer(trainer)
            if writer is not None:
                for tag, values in histograms(update).items():
                    writer.add_histogram(tag, values, module.update)


def histograms(update: UpdateResult) -> dict[str, Tensor]:
    """Values by TensorBoard tag, one per sequence, without non-finite ones, which TensorBoard cannot bin."""
    tokens = update.tokens
    log_weight = importance.log_weights(tokens)[importance.in_loss(tokens)]
    coefficients = importance.by_sign(importance.sequence_coefficients(update.coefficient, tokens), tokens)
    tagged = {"importance/log_weight": log_weight} | {
        f"importance/coefficient_{sign}": values for sign, values in coefficients.items()
    }
    finite = {tag: values[torch.isfinite(values)].cpu() for tag, values in tagged.items()}
    return {tag: values for tag, values in finite.items() if len(values)}
