"""What rollouts ask of the policy that is being trained: its weights, and log-probs under them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.scoring import score_sequences
from vespo_lightning.training.micro_batches import Layout
from vespo_lightning.training.policy import Policy
from vespo_lightning.training.precision import PreciseModule
from vespo_lightning.training.reference import ReferencePolicy, sample_log_probs
from vespo_lightning.weights import checkpoint_tensors


class WeightSourceModule(PreciseModule):
    """A module that engines take their weights from (:class:`~vespo_lightning.rollouts.producer.WeightSource`)."""

    policy: Policy
    reference: ReferencePolicy | None
    token_budget: int
    layout: Layout
    temperature: float

    @property
    def model(self) -> PreTrainedModel:
        return self.policy.model

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Current weights under checkpoint names."""
        return checkpoint_tensors(self.model)

    def sample_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """float32 [T] per sample: this trainer's log-probs at the current weights and the sampling temperature."""
        with self._precision():
            return sample_log_probs(self.policy, samples, **self._scoring)

    def reference_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """float32 [T] per sample: log-probs of the reference policy, in this trainer's precision."""
        assert self.reference is not None, "log-probs of a reference policy that the module was not given"
        self.reference.to(self.device, cast(torch.dtype, self.dtype))
        with self._precision():
            return self.reference.log_probs(samples, **self._scoring)

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

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        """The trainer's own precision, for forward passes outside of training_step."""
        return self.trainer.precision_plugin.forward_context()
