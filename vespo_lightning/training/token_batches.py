"""The flat numbers of a mini-batch, and the :class:`TokenBatch` of any of its sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.objectives.base import TokenBatch, TopLogProbs
from vespo_lightning.rollouts.sample import MiniBatch


@dataclass(frozen=True)
class MiniBatchTokens:
    """Everything about the T response tokens of S samples that is known before the forward pass, in sample order."""

    behaviour_log_prob: Tensor
    recomputed_log_prob: Tensor | None
    reference_log_prob: Tensor | None
    top_ids: Tensor | None
    """int64 [T, K]"""
    top_behaviour: Tensor | None
    """float32 [T, K]"""
    top_holds_sampled: Tensor | None
    """bool [T]"""
    loss_mask: Tensor
    """bool [T] tokens in the loss: written by the policy, in a sample that the loss keeps"""
    written: Tensor
    """int64 [S] tokens written by the policy, whether or not in the loss: what the loss is normalised by"""
    total_written: int
    """their sum, known without asking the device"""
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

        def optional(arrays: Sequence[np.ndarray | None]) -> Tensor | None:
            known = [array for array in arrays if array is not None]
            return flat(known) if len(known) == len(arrays) else None

        written = [int(s.loss_mask.sum()) for s in samples]
        top_ids = optional([s.top_ids for s in samples])
        return cls(
            behaviour_log_prob=flat([s.behaviour_log_probs for s in samples]),
            recomputed_log_prob=optional([s.recomputed_log_probs for s in samples]),
            reference_log_prob=optional([s.reference_log_probs for s in samples]),
            top_ids=None if top_ids is None else top_ids.long(),
            top_behaviour=optional([s.top_log_probs for s in samples]),
            top_holds_sampled=None
            if top_ids is None
            else (top_ids == flat([s.response_ids for s in samples])[:, None]).any(dim=1),
            loss_mask=flat([s.loss_mask & keep for s, keep in zip(samples, batch.in_loss, strict=True)]),
            written=torch.tensor(written, device=device),
            total_written=sum(written),
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

    def select(
        self,
        sequences: Sequence[int],
        log_prob: Tensor,
        policy_version: int,
        top: Tensor | None = None,
        router_shift: Tensor | None = None,
    ) -> TokenBatch:
        """The numbers of some whole sequences.

        Args:
            log_prob: [t] of the current policy, in the order of ``sequences``; so are ``top`` [t, K], its log-probs
                of ``top_ids``, and ``router_shift`` [t].
        """
        chosen = torch.as_tensor(sequences, device=self.length.device)
        index = self.token_index(sequences)
        return TokenBatch(
            log_prob=log_prob,
            behaviour_log_prob=self.behaviour_log_prob[index],
            recomputed_log_prob=_at(self.recomputed_log_prob, index),
            reference_log_prob=_at(self.reference_log_prob, index),
            top=self._top(index, top),
            router_shift=router_shift,
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

    def _top(self, index: Tensor, current: Tensor | None) -> TopLogProbs | None:
        if self.top_behaviour is None or self.top_holds_sampled is None or current is None:
            return None
        return TopLogProbs(self.top_behaviour[index], current, self.top_holds_sampled[index])


def _at(values: Tensor | None, index: Tensor) -> Tensor | None:
    return None if values is None else values[index]
