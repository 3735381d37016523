"""Routing of one forward pass, as the router tap recorded it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Scoring = Literal["softmax", "sigmoid"]


class RoutingRecord:
    """Routing of one forward pass: R rows (batch x sequence, row-major), L MoE layers, E experts, K per row.

    Tensors are put together when they are asked for, so :meth:`select` the rows of interest first.
    """

    def __init__(
        self, layers: Sequence[int], scoring: Scoring, rows: Tensor | None = None, keep_graph: bool = False
    ) -> None:
        self._keep_graph = keep_graph
        self._layers = layers
        self._scoring = scoring
        self._rows = rows
        self._logits: dict[int, Tensor] = {}
        self._experts: dict[int, Tensor] = {}
        self._native: dict[int, Tensor] = {}
        self._given_as_probs = False

    def select(self, rows: Tensor) -> RoutingRecord:
        """The same pass, restricted to some rows.

        Args:
            rows: int64 [R'] row numbers (of this record, so that selections can be chained), or bool [R].
        """
        if rows.dtype == torch.bool:
            rows = rows.nonzero().squeeze(-1)
        rows = rows if self._rows is None else self._rows[rows]
        selected = RoutingRecord(self._layers, self._scoring, rows)
        selected._logits, selected._experts, selected._native = self._logits, self._experts, self._native
        selected._given_as_probs = self._given_as_probs
        return selected

    @property
    def experts(self) -> Tensor:
        """int64 [R, L, K] experts used, in the order in which the router names them."""
        return self._stack(self._experts).long()

    @property
    def native_experts(self) -> Tensor:
        """int64 [R, L, K] experts that the routers would have used without a replay, at the same logits."""
        return self._stack(self._native).long()

    @property
    def logits(self) -> Tensor:
        """float32 [R, L, E] router logits, with gradients if the recording keeps the graph.

        For routers that hand out probabilities instead (Gemma 4) it is their logarithm, the logits up to a
        constant per row: the same softmax, but a log-sum-exp of zero.
        """
        values = self._stack(self._logits).float()
        return values.log() if self._given_as_probs else values

    @property
    def probs(self) -> Tensor:
        """float32 [R, L, E] router probabilities: the softmax of the logits, or for sigmoid routers
        ``sigmoid(logit) / sum of sigmoid(logits)``. Biases that only steer the choice are left out."""
        return torch.softmax(self._log_scores(), dim=-1)

    @property
    def top_probs(self) -> Tensor:
        """float32 [R, L, K] router probabilities of :attr:`experts`; they sum to at most 1."""
        scores = self._log_scores()
        # Not through `probs`: for few experts a softmax costs several times a log-sum-exp.
        return (scores.gather(-1, self.experts) - scores.logsumexp(-1, keepdim=True)).exp()

    def _log_scores(self) -> Tensor:
        """float32 [R, L, E]: router probabilities are the softmax of these."""
        return F.logsigmoid(self.logits) if self._scoring == "sigmoid" else self.logits

    def _add(self, layer: int, logits: Tensor, experts: Tensor, native: Tensor) -> None:
        if layer in self._logits:
            raise RuntimeError(f"decoder layer {layer} ran twice in one recording; make one per forward pass")
        self._logits[layer] = logits if self._keep_graph else logits.detach()
        self._experts[layer] = experts
        self._native[layer] = native

    def _stack(self, per_layer: dict[int, Tensor]) -> Tensor:
        missing = [layer for layer in self._layers if layer not in per_layer]
        if missing:
            raise RuntimeError(f"decoder layers {missing} did not run in this recording")
        pieces = [per_layer[layer] for layer in self._layers]
        if self._rows is not None:
            pieces = [piece.index_select(0, self._rows) for piece in pieces]
        return torch.stack(pieces, dim=1)
