"""The life of the rollout engine inside a fit: start it, let the loader use it, close it."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.sample import MiniBatch

#: Rollouts in a row with nothing but equal rewards before a warning.
UNIFORM_ROLLOUTS = 3


class RolloutGeneration(L.Callback):
    """Connects the producer with the policy in training.

    Args:
        producer: makes rollouts when the loader asks.
        model_path: folder or hub id that the policy was loaded from; the engine starts from it.
    """

    def __init__(self, producer: RolloutProducer, model_path: str) -> None:
        self.producer = producer
        self.model_path = model_path
        self._uniform_rollouts = 0
        self._calibration: dict[str, float] | None = None

    def on_fit_start(self, trainer: L.Trainer, module: Any) -> None:
        self._check_agreement(module)
        self.producer.start(self.model_path, module, self._calibration)
        if module.routing == "r3" and not self.producer.engine.returns_routing:
            raise UserError(
                f"routing=r3 replays the engine's routing, and {type(self.producer.engine).__name__} returns none; use "
                "another engine or routing=native"
            )
        module.evaluator = self.producer.evaluate
        module.held_out_problems = self.producer.task.held_out()
        module.tokenizer = self.producer.tokenizer

    def _check_agreement(self, module: Any) -> None:
        """Raises UserError where producer and module were built for different runs."""
        producer = self.producer
        sampled = self.producer.sampling.temperature
        if module.temperature != sampled:
            raise UserError(
                f"the producer samples at temperature={sampled} and the module computes log-probs at temperature="
                f"{module.temperature}; give both the same"
            )
        if module.denominator == "recomputed" and not self.producer.recompute:
            raise UserError("denominator=recomputed needs a producer with recompute=True, which stores those log-probs")
        if "recomputed_log_prob" in module.loss.needs and not producer.recompute:
            raise UserError(
                "the objective or a correction needs a producer with recompute=True, which stores log-probs"
            )
        if module.loss.kl is not None and not producer.reference:
            raise UserError("a KL penalty needs a producer with reference=True, which stores the reference's log-probs")
        if module.routing != producer.routing:
            raise UserError(
                f"the producer was made for routing={producer.routing}, the module for routing={module.routing}; give "
                "both the same"
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Any, outputs: Any, batch: MiniBatch, batch_idx: int
    ) -> None:
        if batch.position != 0:
            return
        uniform = batch.rollout_metrics["reward/uniform_group_share"] == 1.0
        self._uniform_rollouts = self._uniform_rollouts + 1 if uniform else 0
        if self._uniform_rollouts == UNIFORM_ROLLOUTS:
            rank_zero_warn(
                f"In {UNIFORM_ROLLOUTS} rollouts in a row all responses to a prompt had the same reward, "
                f"{batch.rollout_metrics['reward/rollout_mean']:g} on average, so every advantage is 0 and nothing is "
                "learned: look at the sampled responses and the verifier, or take an easier or harder task."
            )

    def teardown(self, trainer: L.Trainer, module: Any, stage: str) -> None:
        self.producer.close()

    def state_dict(self) -> dict[str, Any]:
        return {"uniform_rollouts": self._uniform_rollouts, "calibration": dict(self.producer.check.calibration)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._uniform_rollouts = state_dict["uniform_rollouts"]
        self._calibration = state_dict["calibration"]
