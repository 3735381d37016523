"""The LightningModule: one mini-batch in, one optimizer step out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler

from vespo_lightning.corrections.base import Correction
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import Objective
from vespo_lightning.objectives.kl import KlPenalty
from vespo_lightning.objectives.min_variance import MinVariance
from vespo_lightning.rollouts.sample import MiniBatch
from vespo_lightning.routing.losses import RouterLosses, expert_load
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.aggregation import Aggregation
from vespo_lightning.training.combinations import check_combinations
from vespo_lightning.training.loss import MiniBatchLoss
from vespo_lightning.training.micro_batches import Layout
from vespo_lightning.training.min_variance import backward_per_sequence, set_advantage_from_head
from vespo_lightning.training.optimizers import build_adamw
from vespo_lightning.training.outputs import MicroBatchObserver, UpdateResult
from vespo_lightning.training.packing import packed_rows_are_separate
from vespo_lightning.training.passes import ForwardPass, MiniBatchPasses
from vespo_lightning.training.policy import Policy
from vespo_lightning.training.reference import ReferencePolicy
from vespo_lightning.training.routing_batches import Replayed
from vespo_lightning.training.token_batches import MiniBatchTokens
from vespo_lightning.training.weight_source import WeightSourceModule


class NonFiniteStreak(UserError):
    """Too many updates in a row had a non-finite loss or gradient."""


#: Whose routing is replayed in updates.
REPLAYED: dict[str, Replayed] = {"native": "none", "r2": "trainer", "r3": "engine"}


class PolicyModule(WeightSourceModule):
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
        corrections: of the importance ratios, in order.
        kl: penalty for leaving a reference policy; here its term of the loss, if it has one.
        reference: that policy, for the log-probs of samples that are made.
        baseline: replaces the advantages of mini-batches by those of the minimum-variance baseline.
        routing: of MoE policies. ``native``: as the routers choose; ``r2``: replay the trainer's own choice at
            generation weights; ``r3``: replay the engine's.
        gate_weights: under ``r3``, weights of the replayed experts from ``live`` scores or as the engine ``recorded``.
        entropy_coefficient: weight of an entropy bonus.
        router_losses: on the router logits of MoE policies; None for none.
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
        corrections: Sequence[Correction] = (),
        kl: KlPenalty | None = None,
        reference: ReferencePolicy | None = None,
        baseline: MinVariance | None = None,
        routing: Literal["native", "r2", "r3"] = "native",
        gate_weights: Literal["live", "recorded"] = "live",
        entropy_coefficient: float = 0.0,
        router_losses: RouterLosses | None = None,
        max_skipped_streak: int = 8,
        head_chunk: int = 1024,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = Policy(model, chunk=head_chunk)
        self.loss = MiniBatchLoss(
            objective,
            corrections,
            kl,
            aggregation,
            max_response_tokens,
            entropy_coefficient,
            router_losses or RouterLosses(),
        )
        self.baseline = baseline
        self.reference = reference
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
        self.max_skipped_streak = max_skipped_streak
        self.tap = RouterTap.attach(model)
        self.routing = routing
        self.replayed: Replayed = REPLAYED[routing]
        self.gate_weights = gate_weights == "recorded"
        self.update = 0
        """Mini-batches consumed, skipped ones included: the x-axis of every metric."""
        self.policy_version = 0
        """Optimizer steps applied."""
        self.skipped_updates = 0
        self.skipped_streak = 0
        self.last_update: UpdateResult | None = None
        self._record: dict[str, float] = {}
        check_combinations(self)

    @property
    def objective(self) -> Objective:
        return self.loss.objective

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
        if self.is_moe and self.dtype == torch.float64 and experts not in ("eager", "loop"):
            raise UserError(
                f"trainer.precision=64-true does not run with model.experts={experts}; use model.experts=loop"
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
        passes = self._passes(batch, self.replayed, bool(self._observers()), self.gate_weights)
        loss = self._backward(passes)
        grad_norm = self._clip()
        whole = passes.whole()
        seen = self.loss.seen(whole)
        # set before the step, so that callbacks can act on it
        self.last_update = UpdateResult(
            mini_batch=batch,
            tokens=whole,
            corrected=seen,
            coefficient=self.objective.corrected_coefficient(seen),
            entropy=passes.entropy,
            loss=loss,
            grad_norm=grad_norm,
            learning_rate=float(optimizer.param_groups[0]["lr"]),  # type: ignore[union-attr]
            skipped=not (np.isfinite(loss) and np.isfinite(grad_norm)),
            seconds=0.0,
        )
        learning_rate = self._finish(optimizer, self.last_update.skipped)
        self.last_update = replace(self.last_update, learning_rate=learning_rate, seconds=time.perf_counter() - start)
        self._record_update(self.last_update)

    def look(self, batch: MiniBatch, replayed: Replayed) -> Iterator[ForwardPass]:
        """Forward passes without gradients over a mini-batch, at the weights of the moment and with their routing.

        Replayed experts get live gate weights, so that what differs is the choice alone.
        """
        passes = self._passes(batch, replayed, routing=True, gate_weights=False).run()
        while True:
            # not around the yield: what the caller does between passes is not to run in this context
            with torch.no_grad(), self._precision():
                done = next(passes, None)
            if done is None:
                return
            yield done

    def _passes(self, batch: MiniBatch, replayed: Replayed, routing: bool, gate_weights: bool) -> MiniBatchPasses:
        return MiniBatchPasses(
            self.policy,
            self.tap,
            batch.samples,
            MiniBatchTokens.build(batch, self.denominator, self.device),
            token_budget=self.token_budget,
            layout=self.layout,
            temperature=self.temperature,
            policy_version=self.policy_version,
            routing=routing,
            needs=self.loss.needs,
            replayed=replayed,
            gate_weights=gate_weights,
            router_graph=self.loss.router_losses.needs_graph,
        )

    def _observers(self) -> list[MicroBatchObserver]:
        return [c for c in self.trainer.callbacks if isinstance(c, MicroBatchObserver)]  # type: ignore[attr-defined]

    def _observe(self, done: ForwardPass) -> None:
        for observer in self._observers():
            observer.on_micro_batch_end(self.trainer, self, done.observed)

    def _backward(self, passes: MiniBatchPasses) -> float:
        """Gradients and loss of the mini-batch."""
        if self.baseline is not None and self.baseline.estimator == "exact":
            return backward_per_sequence(self.loss, passes, self.manual_backward, self._observe)
        multiplier, load = self._pre_pass(passes)
        router_totals = self.loss.router_totals(passes.tokens, load)
        loss = 0.0
        for done in passes.run():
            factor = self.loss.multiplier(done.tokens) if multiplier is None else multiplier[done.index]
            micro_loss = self.loss(passes.tokens, done, factor, router_totals)
            self.manual_backward(micro_loss)
            loss += float(micro_loss.detach())
            self._observe(done)
        return loss

    @torch.no_grad()
    def _pre_pass(self, passes: MiniBatchPasses) -> tuple[Tensor | None, Tensor | None]:
        """What needs a look at the whole mini-batch before the first backward.

        Returns:
            Multipliers [T] of an objective that depends on the whole mini-batch; load [L, E] of the experts for the
            load-balance loss. A baseline sets the advantages.
        """
        whole, balanced = self.objective.scope == "mini-batch", self.loss.router_losses.needs_load
        started = time.perf_counter()
        if self.baseline is not None:
            set_advantage_from_head(self.baseline, self.loss, passes)
        load = None
        if whole or balanced:
            for done in passes.run():
                routing = done.observed.routing
                if balanced and routing is not None:
                    found = expert_load(routing.experts, routing.mask, routing.logits.shape[-1])
                    load = found if load is None else load + found
        multiplier = self.loss.multiplier(passes.whole()) if whole else None
        if whole or balanced or self.baseline is not None:
            self.record({"performance/pre_pass_seconds": time.perf_counter() - started})
        return multiplier, load

    def _clip(self) -> float:
        bound = float("inf") if self.max_grad_norm is None else self.max_grad_norm
        return float(torch.nn.utils.clip_grad_norm_(self.policy.parameters(), bound))

    def _finish(self, optimizer: Any, skipped: bool) -> float:
        """Apply or skip the update; the learning rate that it had. A skipped one advances the schedule and the data,
        not the version."""
        if skipped:
            optimizer.zero_grad(set_to_none=True)
            self.skipped_updates += 1
            self.skipped_streak += 1
        else:
            optimizer.step()
            self.policy_version += 1
            self.skipped_streak = 0
        learning_rate = float(optimizer.param_groups[0]["lr"])  # a callback may have changed it for this step
        self.lr_schedulers().step()  # type: ignore[union-attr]
        self.update += 1
        if self.skipped_streak >= self.max_skipped_streak:
            raise NonFiniteStreak(
                f"{self.skipped_streak} updates in a row had a non-finite loss or gradient "
                f"(optim.max_skipped_streak={self.max_skipped_streak}); {self._last_checkpoint()}: look at the last "
                "rollouts, or lower optim.lr"
            )
        return learning_rate

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
                **self.loss.statistics(result.tokens, result.corrected),
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
