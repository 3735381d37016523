"""What rollouts ask of the policy that is being trained: its weights, and log-probs under them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.routing.validation import check_recorded_experts, check_recorded_probs
from vespo_lightning.scoring import score_sequences
from vespo_lightning.training.micro_batches import Layout
from vespo_lightning.training.policy import ModelInputs, Policy
from vespo_lightning.training.precision import PreciseModule
from vespo_lightning.training.reference import ReferencePolicy, sample_log_probs
from vespo_lightning.training.routing_batches import Replayed, recording_trainer_experts, replaying
from vespo_lightning.weights import checkpoint_tensors


class WeightSourceModule(PreciseModule):
    """A module that engines take their weights from (:class:`~vespo_lightning.rollouts.producer.WeightSource`)."""

    policy: Policy
    reference: ReferencePolicy | None
    token_budget: int
    layout: Layout
    temperature: float
    tap: RouterTap | None
    replayed: Replayed
    gate_weights: bool

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Current weights under checkpoint names."""
        return checkpoint_tensors(self.model)

    def recompute(self, samples: Sequence[Sample]) -> None:
        """Give samples that were just made this trainer's log-probs, and under R2 its routing, at the same weights."""
        around: Callable[[ModelInputs, Sequence[Sample]], AbstractContextManager[None]]
        if self.replayed == "trainer" and self.tap is not None:
            around = partial(recording_trainer_experts, self.tap)
        else:
            around = partial(replaying, self.tap, self.replayed, self.gate_weights)
        with self._precision():
            found = sample_log_probs(self.policy, samples, around=around, **self._scoring)
        for sample, log_probs in zip(samples, found, strict=True):
            sample.recomputed_log_probs = log_probs

    def check_routing(self, samples: Sequence[Sample]) -> None:
        """Refuse recorded routing that would be replayed wrongly.

        Raises:
            UserError: names the sample.
        """
        if self.tap is None:  # a dense policy trains on no routing
            return
        for sample in samples:
            check_recorded_experts(
                sample, self.tap.num_decoder_layers, self.tap.layers, self.tap.num_experts, self.tap.top_k
            )
            if self.gate_weights:
                check_recorded_probs(sample)

    def reference_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """float32 [T] per sample: log-probs of the reference policy, in this trainer's precision."""
        assert self.reference is not None, "log-probs of a reference policy that the module was not given"
        self.reference.to(self.device, cast(torch.dtype, self.dtype))
        # Routed like the policy where it can be, so that equal weights are at distance 0.
        replayed = self.replayed if self.reference.routes_like(self.tap) else "none"
        around = partial(replaying, self.reference.tap, replayed, self.gate_weights)
        with self._precision():
            return self.reference.log_probs(samples, around=around, **self._scoring)

    def reference_checksum(self) -> str:
        """Of the weights of the reference policy."""
        assert self.reference is not None, "checksum of a reference policy that the module was not given"
        return self.reference.checksum

    @property
    def _scoring(self) -> dict[str, Any]:
        return {"token_budget": self.token_budget, "layout": self.layout, "temperature": self.temperature}

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float32 [len - 1] per sequence: log-probs at temperature 1 of tokens 1.. given their prefixes."""
        with self._precision():
            return score_sequences(self.model, sequences)

    def _precision(self) -> AbstractContextManager[Any]:
        """The trainer's own precision, for forward passes outside of training_step."""
        return self.trainer.precision_plugin.forward_context()
