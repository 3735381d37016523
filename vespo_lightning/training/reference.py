"""Log-probs of samples under a policy, without gradients; and the frozen policy that a KL penalty refers to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.micro_batches import Layout, collate, plan_micro_batches
from vespo_lightning.training.policy import ModelInputs, Policy
from vespo_lightning.training.precision import precise_parameters
from vespo_lightning.weights import checkpoint_tensors


@torch.no_grad()
def sample_log_probs(
    policy: Policy,
    samples: Sequence[Sample],
    *,
    token_budget: int,
    layout: Layout,
    temperature: float,
    around: Callable[[ModelInputs, Sequence[Sample]], AbstractContextManager[None]] | None = None,
) -> list[np.ndarray]:
    """float32 [T] per sample: log-probs of its response under ``policy`` at the sampling temperature.

    The caller enters the trainer's precision around it.

    Args:
        around: a context for each forward pass (routing that is replayed or recorded).
    """
    results: list[np.ndarray] = [np.empty(0, dtype=np.float32)] * len(samples)
    device = next(policy.parameters()).device
    for sequences in plan_micro_batches(
        [len(s.prompt_ids) + len(s.response_ids) for s in samples], token_budget, layout
    ):
        chosen = [samples[i] for i in sequences]
        inputs = collate(chosen, layout).to(device)
        with nullcontext() if around is None else around(inputs, chosen):
            out = policy(inputs, temperature=temperature)
        pieces = out.log_prob.float().cpu().split([len(s.response_ids) for s in chosen])
        for i, piece in zip(sequences, pieces, strict=True):
            results[i] = piece.numpy()
    return results


def check_same_tokenizer(reference: PreTrainedTokenizerBase, policy: PreTrainedTokenizerBase, path: str) -> None:
    """Raises UserError where a token id means one thing to the policy and another to the reference at ``path``."""
    own, others = policy.get_vocab(), reference.get_vocab()
    if own != others:
        different = sum(others.get(token) != number for token, number in own.items()) or len(others) - len(own)
        raise UserError(
            f"kl.reference={path} has another tokenizer than model.path ({different} tokens differ); give a reference "
            "with the same tokenizer, or null for what the run starts from"
        )


class ReferencePolicy:
    """A model that never changes. No module on purpose: its weights are no part of checkpoints or of the optimizer.

    Args:
        model: taken over and frozen; not the one in training.
        path: where it was loaded from, for messages.
        head_chunk: tokens per chunk of the log-prob head.
    """

    def __init__(self, model: PreTrainedModel, path: str, head_chunk: int = 1024) -> None:
        self.policy = Policy(model.requires_grad_(False), chunk=head_chunk)
        self.tap = RouterTap.attach(model)
        self.path = path
        self.checksum = f"{fingerprint(tensor for _, tensor in checkpoint_tensors(model)):016x}"
        """of the weights as they were loaded: what rollouts and checkpoints know the reference by"""

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move the weights, and give parameters the precision of the policy in training.

        Buffers and routers in float32 keep theirs, as those of the policy do (see :class:`PreciseModule`).
        """
        precise = {id(parameter) for parameter in precise_parameters(self.policy, dtype)}
        for parameter in self.policy.parameters():
            parameter.data = parameter.data.to(device, None if id(parameter) in precise else dtype)
        self.policy.to(device)

    def routes_like(self, tap: RouterTap | None) -> bool:
        """Whether routing of the policy with ``tap`` can be replayed here."""
        own = self.tap
        if own is None or tap is None:
            return False
        return (own.layers, own.num_experts, own.top_k) == (tap.layers, tap.num_experts, tap.top_k)

    def log_probs(self, samples: Sequence[Sample], **options: Any) -> list[np.ndarray]:
        """float32 [T] per sample; for the options see :func:`sample_log_probs`."""
        return sample_log_probs(self.policy, samples, **options)
