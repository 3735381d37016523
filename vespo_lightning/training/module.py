"""The LightningModule: one mini-batch in, one optimizer step out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Objective, policy_loss
from vespo_lightning.rollouts.sample import MiniBatch, Sample
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.scoring import score_sequences
from vespo_lightning.training.aggregation import Aggregation, Totals, token_weights
from vespo_lightning.training.micro_batches import Layout, collate, plan_micro_batches
from vespo_lightning.training.optimizers import build_adamw
from vespo_lightning.training.outputs import MicroBatchObserver, MicroBatchOutput, UpdateResult
from vespo_lightning.training.packing import packed_rows_are_separate
from vespo_lightning.training.policy import Policy
from vespo_lightning.training.precision import PreciseModule
from vespo_lightning.training.routing_batches import routing_batch
from vespo_lightning.training.token_batches import MiniBatchTokens
from vespo_lightning.weights import checkpoint_tensors


class NonFiniteStreak(UserError):
    """Too many updates in a row had a non-finite loss or gradient."""


class PolicyModule(PreciseModule):
    """Trains a policy on mini-batches of samples with an :class:`Objective`.

    Manual optimization: ``training_step`` loops over micro-batches and steps once. The loss is normalised by counts
    of the whole mini-batch that are known before the first backward, so the gradient does not depend on how the
    mini-batch is cut.

    Args:
        model: causal LM, trained in place.
        objective: the method.
        lr, betas, eps, weight_decay: AdamW.
        schedule: name of a transformers learning-rate schedule (``constant``, ``constant_with_warmup``, ``linear``,
            ``cosine``), with ``warmup_updates`` and ``updates`` (its total length).
        max_grad_norm: clip the gradient to this 2-norm; None does not clip.
        token_budget: most tokens, padding included, of one forward pass.
        layout: ``padded`` rows or ``packed`` rows; models whose packed sequences see each other get padded ones.
        temperature: of sampling; the same on both sides of the importance ratio.
        denominator: of the importance ratio, see DESIGN.
        aggregation: how token losses become one number; ``constant`` divides by ``max_response_tokens``.
        entropy_coefficient: weight of an entropy bonus.
        max_skipped_streak: this many non-finite updates in a row stop the run.
        head_chunk: tokens per chunk of the log-prob head.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        objective: Objective,
        *,
        lr: float = 1e-6,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        schedule: str = "constant",
        warmup_updates: int = 0,
        updates: int | None = None,
        max_grad_norm: float | None = 1.0,
        token_budget: int = 16384,
        layout: Layout = "padded",
        temperature: float = 1.0,
        denominator: Literal["behaviour", "recomputed"] = "behaviour",
        aggregation: Aggregation = "token-mean",
        max_response_tokens: int | None = None,
        entropy_coefficient: float = 0.0,
        max_skipped_streak: int = 8,
        head_chunk: int = 1024,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = Policy(model, chunk=head_chunk)
        self.objective = objective
        self.optimizer_options: dict[str, Any] = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }
        self.schedule, self.warmup_updates, self.updates = schedule, warmup_updates, updates
        self.max_grad_norm = max_grad_norm
        self.token_budget = token_budget
        self.layout: Layout = layout
        self.temperature = temperature
        self.denominator: Literal["behaviour", "recomputed"] = denominator
        self.aggregation: Aggregation = aggregation
        self.max_response_tokens = max_response_tokens
        self.entropy_coefficient = entropy_coefficient
        self.max_skipped_streak = max_skipped_streak
        self.tap = RouterTap.attach(model)
        self.update = 0
        """Mini-batches consumed, skipped ones included: the x-axis of every metric."""
        self.policy_version = 0
        """Optimizer steps applied."""
        self.skipped_updates = 0
        self.skipped_streak = 0
        self.last_update: UpdateResult | None = None
        self._record: dict[str, float] = {}

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    @property
    def is_moe(self) -> bool:
        return self.tap is not None

    # ---- metrics -----------------------------------------------------------------------------------------------

    def record(self, metrics: dict[str, float]) -> None:
        """Add scalars to the row of the current update."""
        self._record.update(metrics)

    def take_record(self) -> dict[str, float]:
        """The row of the current update; the next one starts empty."""
        row, self._record = self._record, {}
        return row

    # ---- Lightning ---------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Packed rows only where the model keeps their sequences apart."""
        experts = getattr(self.model.config, "_experts_implementation", None)
        if self.is_moe and self.dtype == torch.float64 and experts != "eager":
            raise UserError(
                f"trainer.precision=64-true does not run with model.experts={experts}; use model.experts=eager"
            )
        if self.layout != "packed":
            return
        with self._precision():
            separate = packed_rows_are_separate(self.policy)
        if not separate:
            rank_zero_warn(
                f"batching.layout=packed: {type(self.model).__name__} lets packed sequences see each other, so rows "
                "are padded instead; set batching.layout=padded to silence this"
            )
            self.layout = "padded"

    def configure_optimizers(self) -> Any:
        optimizer = build_adamw(self.policy, **self.optimizer_options)
        scheduler = get_scheduler(
            self.schedule, optimizer, num_warmup_steps=self.warmup_updates, num_training_steps=self.updates
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def transfer_batch_to_device(self, batch: MiniBatch, device: torch.device, dataloader_idx: int) -> MiniBatch:
        """Samples stay numpy arrays; what a step needs is moved by the step."""
        return batch

    def training_step(self, batch: MiniBatch, batch_idx: int) -> None:
        start = time.perf_counter()
        optimizer = self.optimizers()
        optimizer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        learning_rate = float(optimizer.param_groups[0]["lr"])  # type: ignore[union-attr]
        tokens = MiniBatchTokens.build(batch, self.denominator, self.device)
        log_prob, entropy, loss = self._backward(batch, tokens)
        grad_norm = self._clip()
        skipped = not (np.isfinite(loss) and np.isfinite(grad_norm))
        # of the version that the forward pass was done with, so before the step
        whole = tokens.select(range(len(batch.samples)), log_prob, self.policy_version)
        coefficient = self.objective.coefficient(whole)
        self._finish(optimizer, skipped)
        self.last_update = UpdateResult(
            mini_batch=batch,
            tokens=whole,
            coefficient=coefficient,
            entropy=entropy,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            skipped=skipped,
            seconds=time.perf_counter() - start,
        )
        self._record_update(self.last_update)

    def _backward(self, batch: MiniBatch, tokens: MiniBatchTokens) -> tuple[Tensor, Tensor, float]:
        """Forward and backward of every micro-batch; log-probs [T], entropies [T] and the loss of the mini-batch."""
        samples = batch.samples
        totals = Totals(int(tokens.written.sum()), len(samples), self.max_response_tokens)
        plan = plan_micro_batches(
            [len(s.prompt_ids) + len(s.response_ids) for s in samples], self.token_budget, self.layout
        )
        observers = [c for c in self.trainer.callbacks if isinstance(c, MicroBatchObserver)]  # type: ignore[attr-defined]
        log_prob = torch.empty_like(tokens.behaviour_log_prob)
        entropy = torch.empty_like(log_prob)
        loss = 0.0
        for sequences in plan:
            chosen = [samples[i] for i in sequences]
            inputs = collate(chosen, self.layout).to(self.device)
            with self._recording(bool(observers)) as record:
                out = self.policy(inputs, temperature=self.temperature)
            piece = tokens.select(sequences, out.log_prob.detach(), self.policy_version)
            weight = token_weights(self.aggregation, tokens.written[sequences], piece.sequence_index, totals)
            micro_loss = policy_loss(weight, self.objective.multiplier(piece), out.log_prob)
            if self.entropy_coefficient:
                bonus = torch.where(piece.loss_mask, weight * out.entropy, 0.0).sum()
                micro_loss = micro_loss - self.entropy_coefficient * bonus
            self.manual_backward(micro_loss)
            index = tokens.token_index(sequences)
            log_prob[index] = out.log_prob.detach().to(log_prob.dtype)
            entropy[index] = out.entropy.detach().to(entropy.dtype)
            loss += float(micro_loss.detach())
            if observers:
                routing = None
                if record is not None and self.tap is not None:
                    routing = routing_batch(record, inputs.positions, chosen, piece.loss_mask, self.tap.layers)
                for observer in observers:
                    observer.on_micro_batch_end(self.trainer, self, MicroBatchOutput(chosen, piece, routing))
        return log_prob, entropy, loss

    def _recording(self, wanted: bool) -> contextlib.AbstractContextManager[Any]:
        return self.tap.recording() if wanted and self.tap is not None else contextlib.nullcontext()

    def _clip(self) -> float:
        bound = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), bound))

    def _finish(self, optimizer: Any, skipped: bool) -> None:
        """Apply or skip the update. A skipped one advances the schedule and the data, not the version."""
        if skipped:
            optimizer.zero_grad(set_to_none=True)
            self.skipped_updates += 1
            self.skipped_streak += 1
        else:
            optimizer.step()
            self.policy_version += 1
            self.skipped_streak = 0
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.update += 1
        if self.skipped_streak >= self.max_skipped_streak:
            raise NonFiniteStreak(
                f"{self.skipped_streak} updates in a row had a non-finite loss or gradient "
                f"(optim.max_skipped_streak={self.max_skipped_streak}); {self._last_checkpoint()}: look at the last "
                "rollouts, or lower optim.lr"
            )

    def _last_checkpoint(self) -> str:
        callback = self.trainer.checkpoint_callback
        # RunCheckpoint's name for it, ModelCheckpoint's, and what a resumed run started from
        path = getattr(callback, "last_path", None) or getattr(callback, "best_model_path", None)
        path = path or self.trainer.ckpt_path
        return f"the last good checkpoint is {path}" if path else "no checkpoint had been written yet"

    def _record_update(self, result: UpdateResult) -> None:
        rewards = result.mini_batch.rewards
        entropy = result.entropy[result.tokens.loss_mask]
        if len(entropy):
            self.record({"train/entropy": float(entropy.mean())})
        self.record(
            {
                "reward/mean": float(rewards.mean()),
                "reward/std": float(rewards.std(unbiased=False)),
                "train/loss": result.loss,
                "train/grad_norm": result.grad_norm,
                "train/learning_rate": result.learning_rate,
                "train/skipped_updates": float(self.skipped_updates),
                "train/policy_version": float(self.policy_version),
                **self.objective.statistics(result.tokens),
                **result.mini_batch.rollout_metrics,
            }
        )

    # ---- state -------------------------------------------------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["policy_state"] = {
            "update": self.update,
            "policy_version": self.policy_version,
            "skipped_updates": self.skipped_updates,
            "skipped_streak": self.skipped_streak,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for name, value in checkpoint["policy_state"].items():
            setattr(self, name, value)

    # ---- what engines ask of the policy ------------------------------------------------------------------------

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Current weights under checkpoint names."""
        return checkpoint_tensors(self.model)

    @torch.no_grad()
    def sample_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """float32 [T] per sample: this trainer's log-probs at the current weights and the sampling temperature."""
        results: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(samples)
        plan = plan_micro_batches(
            [len(s.prompt_ids) + len(s.response_ids) for s in samples], self.token_budget, self.layout
        )
        for sequences in plan:
            chosen = [samples[i] for i in sequences]
            with self._precision():
                out = self.policy(collate(chosen, self.layout).to(self.device), temperature=self.temperature)
            pieces = out.log_prob.float().cpu().split([len(s.response_ids) for s in chosen])
            for i, piece in zip(sequences, pieces, strict=True):
                results[i] = piece.numpy()
        return results

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float32 [len - 1] per sequence: log-probs at temperature 1 of tokens 1.. given their prefixes."""
        with self._precision():
            return score_sequences(self.model, sequences)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """The trainer's own precision, for forward passes outside of training_step."""
        return self.trainer.precision_plugin.forward_context()
