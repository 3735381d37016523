"""Forward passes over the micro-batches of a mini-batch, and what they say about its tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vespo_lightning.corrections.router_shift import router_shift_of
from vespo_lightning.objectives.base import Need, TokenBatch
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.log_probs import LogProbs
from vespo_lightning.training.micro_batches import Layout, collate, plan_micro_batches
from vespo_lightning.training.outputs import MicroBatchOutput, RoutingBatch
from vespo_lightning.training.policy import ModelInputs, NormRequest, Policy
from vespo_lightning.training.routing_batches import Replayed, replaying, routing_batch
from vespo_lightning.training.token_batches import MiniBatchTokens

#: [t] weights of the tokens of some sequences of the mini-batch.
TokenWeights = Callable[[Sequence[int], TokenBatch], Tensor]


@dataclass(frozen=True)
class ForwardPass:
    """One micro-batch of t tokens after its forward pass."""

    sequences: Sequence[int]
    """places of its samples in the mini-batch"""
    index: Tensor
    """int64 [t], places of its tokens in the mini-batch"""
    out: LogProbs
    """with gradients"""
    observed: MicroBatchOutput
    """detached"""
    router_logits: Tensor | None
    """[t, L, E] with gradients, where losses on them are asked for"""
    router_probs: Tensor | None
    """[t, L, E] of these logits"""

    @property
    def tokens(self) -> TokenBatch:
        return self.observed.tokens


class MiniBatchPasses:
    """Runs the policy over a mini-batch of T tokens, micro-batch by micro-batch, and keeps the numbers of all tokens.

    Args:
        plan: samples of each micro-batch; each sample in exactly one.
        policy_version: of the weights that the passes are done with.
        routing: record the routing of the pass, for observers.
        needs: optional parts of token batches that somebody asks for.
        router_graph: keep router logits with their gradients.
        replayed, gate_weights: routing replay, see :func:`~.routing_batches.replaying`.
    """

    def __init__(
        self,
        policy: Policy,
        tap: RouterTap | None,
        samples: Sequence[Sample],
        tokens: MiniBatchTokens,
        *,
        token_budget: int,
        layout: Layout,
        temperature: float,
        policy_version: int,
        routing: bool,
        needs: frozenset[Need],
        replayed: Replayed = "none",
        gate_weights: bool = False,
        router_graph: bool = False,
    ) -> None:
        self.policy, self.tap = policy, tap
        self.samples, self.tokens = samples, tokens
        self.plan = plan_micro_batches([len(s.prompt_ids) + len(s.response_ids) for s in samples], token_budget, layout)
        self.layout: Layout = layout
        self.temperature = temperature
        self.policy_version = policy_version
        self.replayed: Replayed = replayed
        self.gate_weights = gate_weights
        self.router_graph = router_graph
        self.records_routing = tap is not None and (routing or router_graph or "router_shift" in needs)
        # that of the head's results: what a pre-pass says must be what the pass with gradients sees
        dtype = torch.promote_types(next(policy.parameters()).dtype, torch.float32)
        self.log_prob = torch.empty_like(tokens.behaviour_log_prob, dtype=dtype)
        self.entropy = torch.empty_like(self.log_prob)
        self._router_shift = torch.empty_like(self.log_prob) if "router_shift" in needs else None
        self._top = torch.empty_like(tokens.top_behaviour, dtype=dtype) if tokens.top_behaviour is not None else None

    def run(
        self,
        plan: Sequence[Sequence[int]] | None = None,
        token_weights: TokenWeights | None = None,
    ) -> Iterator[ForwardPass]:
        """One forward pass for each micro-batch of ``plan``, the memory-bounded one if None.

        Do its backward pass before asking for the next one: what is recomputed must be routed alike.

        Args:
            token_weights: asks for the squared norms of head gradients under these weights of tokens.
        """
        for sequences in self.plan if plan is None else plan:
            chosen = [self.samples[i] for i in sequences]
            inputs = collate(chosen, self.layout).to(self.log_prob.device)
            with replaying(self.tap, self.replayed, self.gate_weights, inputs, chosen):
                yield self._forward(sequences, chosen, inputs, token_weights)

    def set_advantage(self, advantage: Tensor) -> None:
        """Replace the advantages [S] of the mini-batch."""
        self.tokens = replace(self.tokens, advantage=advantage.to(self.tokens.advantage))

    def whole(self) -> TokenBatch:
        """All tokens in sample order, when every sample has had its pass."""
        everything = range(len(self.samples))
        return self.tokens.select(everything, self.log_prob, self.policy_version, self._top, self._router_shift)

    def _forward(
        self,
        sequences: Sequence[int],
        chosen: Sequence[Sample],
        inputs: ModelInputs,
        token_weights: TokenWeights | None,
    ) -> ForwardPass:
        index = self.tokens.token_index(sequences)
        routing: RoutingBatch | None = None
        shift: Tensor | None = None

        def read_routing() -> None:
            nonlocal routing, shift
            if record is not None and self.tap is not None and routing is None:
                mask = self.tokens.loss_mask[index]
                routing = routing_batch(record, inputs.positions, chosen, mask, self.tap.layers)
                if self._router_shift is not None:
                    shift = router_shift_of(routing).to(self._router_shift.dtype)

        def norms_of(log_prob: Tensor) -> NormRequest:
            assert token_weights is not None
            read_routing()
            piece = self.tokens.select(sequences, log_prob, self.policy_version, router_shift=shift)
            return NormRequest(token_weights(sequences, piece), piece.sequence_index, len(sequences))

        with self._recording() as record:
            out = self.policy(
                inputs,
                temperature=self.temperature,
                extra_ids=None if self.tokens.top_ids is None else self.tokens.top_ids[index],
                norms_of=None if token_weights is None else norms_of,
            )
        read_routing()
        log_prob = out.log_prob.detach()
        top = None if out.extra is None else out.extra.detach()
        self._keep(index, log_prob, out.entropy.detach(), top, shift)
        piece = self.tokens.select(sequences, log_prob, self.policy_version, top, shift)
        router = record.select(inputs.positions) if record is not None and self.router_graph else None
        return ForwardPass(
            sequences,
            index,
            out,
            MicroBatchOutput(list(chosen), piece, routing),
            None if router is None else router.logits,
            None if router is None else router.probs,
        )

    def _keep(self, index: Tensor, log_prob: Tensor, entropy: Tensor, top: Tensor | None, shift: Tensor | None) -> None:
        """Put the numbers of some tokens in their places in the mini-batch."""
        for kept, found in (
            (self.log_prob, log_prob),
            (self.entropy, entropy),
            (self._top, top),
            (self._router_shift, shift),
        ):
            if kept is not None and found is not None:
                kept[index] = found.to(kept.dtype)

    def _recording(self) -> contextlib.AbstractContextManager[Any]:
        if self.tap is None or not self.records_routing:
            return contextlib.nullcontext()
        return self.tap.recording(keep_graph=self.router_graph)
