"""The flat numbers of a mini-batch, and the :class:`TokenBatch` of any of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.rollouts.sample import MiniBatch, Sample


@dataclass(frozen=True)
class MiniBatchTokens:
    """Everything about the T response tokens of S samples that is known before the forward pass, in sample order."""

    behaviour_log_prob: Tensor
    recomputed_log_prob: Tensor | None
    loss_mask: Tensor
    """bool [T] tokens in the loss: written by the policy, in a sample that the loss keeps"""
    written: Tensor
    """int64 [S] tokens written by the policy, whether or not in the loss: what the loss is normalised by"""
    version_made: Tensor
    sequence_index: Tensor
    length: Tensor
    """int64 [S] response tokens, masked ones included"""
    offset: Tensor
    """int64 [S] first token of each sample"""
    advantage: Tensor
    group: Tensor
    denominator: Literal["behaviour", "recomputed"]

    @classmethod
    def build(
        cls, batch: MiniBatch, denominator: Literal["behaviour", "recomputed"], device: torch.device
    ) -> MiniBatchTokens:
        samples = batch.samples
        lengths = np.array([len(s.response_ids) for s in samples], dtype=np.int64)

        def flat(arrays: Sequence[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.concatenate(arrays)).to(device)

        recomputed = None
        if all(s.recomputed_log_probs is not None for s in samples):
            recomputed = flat([_known(s) for s in samples])
        return cls(
            behaviour_log_prob=flat([s.behaviour_log_probs for s in samples]),
            recomputed_log_prob=recomputed,
            loss_mask=flat([s.loss_mask & keep for s, keep in zip(samples, batch.in_loss, strict=True)]),
            written=torch.tensor([int(s.loss_mask.sum()) for s in samples], device=device),
            version_made=flat([s.versions() for s in samples]),
            sequence_index=flat([np.repeat(np.arange(len(samples)), lengths)]),
            length=torch.from_numpy(lengths).to(device),
            offset=torch.from_numpy(np.cumsum(lengths) - lengths).to(device),
            advantage=batch.advantages.to(device),
            group=batch.group_index().to(device),
            denominator=denominator,
        )

    def token_index(self, sequences: Sequence[int]) -> Tensor:
        """int64 [t]: places of the tokens of these sequences, in the order given."""
        chosen = torch.as_tensor(sequences, device=self.length.device)
        lengths = self.length[chosen]
        within = torch.arange(int(lengths.sum()), device=lengths.device)
        within = within - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
        return torch.repeat_interleave(self.offset[chosen], lengths) + within

    def select(self, sequences: Sequence[int], log_prob: Tensor, policy_version: int) -> TokenBatch:
        """The numbers of some whole sequences; ``log_prob`` [t] is the current policy's, in the same order."""
        chosen = torch.as_tensor(sequences, device=self.length.device)
        index = self.token_index(sequences)
        return TokenBatch(
            log_prob=log_prob,
            behaviour_log_prob=self.behaviour_log_prob[index],
            recomputed_log_prob=None if self.recomputed_log_prob is None else self.recomputed_log_prob[index],
            sequence_index=torch.repeat_interleave(
                torch.arange(len(chosen), device=chosen.device), self.length[chosen]
            ),
            loss_mask=self.loss_mask[index],
            advantage=self.advantage[chosen],
            group=self.group[chosen],
            version_made=self.version_made[index],
            policy_version=policy_version,
            denominator=self.denominator,
        )


def _known(sample: Sample) -> np.ndarray:
    assert sample.recomputed_log_probs is not None
    return sample.recomputed_log_probs
