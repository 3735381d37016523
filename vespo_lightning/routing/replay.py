"""Making routers choose given experts, with gate weights that still follow the live scores.

A router's own code stays in charge. While it runs, its top-k alone is replaced: the given experts instead of the
likeliest ones, and the live scores of those experts. What the family does with them afterwards (normalising, scaling,
casting) happens as always, so the router gets its gradient, and replaying what a forward pass chose by itself changes
no bit of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from vespo_lightning.errors import UserError
from vespo_lightning.routing.record import Scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Spread of a row's sum of gate weights, relative to the largest, that rounding to bfloat16 can explain.
_NORMALISED = 0.05

#: Below every positive float16, in which probabilities are kept.
_SMALLEST = 1e-8

_numbers = itertools.count(1)


class Replay:
    """Experts for the one forward pass made while it is armed, and for what backward passes recompute of it.

    Keyed by decoder layer, because recomputation runs the layers in reverse.

    Args:
        layers: decoder layer of each of the L entries.
        experts: integer [R, L, K]; a row with a negative entry routes natively.
        gate_probs: [R, L, K] router probabilities of those experts, or None for live scores.

    Raises:
        ValueError: shapes that do not fit.
    """

    def __init__(self, layers: Sequence[int], top_k: int, experts: Tensor, gate_probs: Tensor | None = None) -> None:
        expected = (len(layers), top_k)
        if experts.dim() != 3 or tuple(experts.shape[1:]) != expected or experts.is_floating_point():
            raise ValueError(
                f"experts to replay are {experts.dtype} {tuple(experts.shape)}, not integer [R, L, K] "
                f"with (L, K) = {expected}"
            )
        if gate_probs is not None and gate_probs.shape != experts.shape:
            raise ValueError(f"gate_probs are {tuple(gate_probs.shape)}, the experts {tuple(experts.shape)}")
        self.number = next(_numbers)
        """which replay this is; 0 stands for none"""
        self._entries = {layer: entry for entry, layer in enumerate(layers)}
        self._experts = experts
        self._gate_probs = gate_probs
        self._used: set[int] = set()

    def choice(self, layer: int, num_experts: int, scoring: Scoring, *, recomputing: bool) -> ReplayedChoice:
        """What to put in the place of the layer's top-k. Forward passes may ask once for each layer."""
        if not recomputing:
            if layer in self._used:
                raise RuntimeError(f"decoder layer {layer} ran twice in one replay; make one per forward pass")
            self._used.add(layer)
        entry = self._entries[layer]
        probs = None if self._gate_probs is None else self._gate_probs[:, entry]
        return ReplayedChoice(self._experts[:, entry], probs, num_experts, scoring)

    def check_used(self) -> None:
        """Every layer ran, or the experts were meant for another forward pass than the one that was made."""
        missing = [layer for layer in self._entries if layer not in self._used]
        if missing:
            raise RuntimeError(f"decoder layers {missing} did not run in this replay")


class ReplayedChoice(TorchFunctionMode):
    """Replaces the expert top-k of one router while it is entered.

    Args:
        experts: integer [R, K].
        gate_probs: [R, K] or None. They take the place of the live scores in the forward pass; gradients pass as if
            the scores were live, or the router would get none.
    """

    def __init__(self, experts: Tensor, gate_probs: Tensor | None, num_experts: int, scoring: Scoring) -> None:
        super().__init__()
        self.hits = 0
        """times that an expert top-k was replaced; 1 in a router that can be replayed"""
        self._experts = experts
        self._gate_probs = gate_probs
        self._num_experts = num_experts
        self._scoring = scoring
        self._scored = False
        self._chosen_by_scores = False
        self.native = experts
        """[R, K] what the router chose by itself"""
        self._chosen: Tensor | None = None
        self._known: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in (torch.topk, torch.Tensor.topk):
            scores = kwargs["input"] if "input" in kwargs else args[0]
            # Group-limited routers have a top-k over groups as well, which stays as it is.
            if scores.dim() == 2 and scores.shape[1] == self._num_experts:
                return self._replace(scores, output)
        elif func in (torch.gather, torch.Tensor.gather) and self._chosen is not None:
            # Routers that choose by biased scores read the plain scores of their choice afterwards.
            index = kwargs["index"] if "index" in kwargs else args[2]
            return self._weigh(output) if index is self._chosen else output
        elif getattr(func, "__name__", "") in ("softmax", "sigmoid"):
            self._scored = True
        return output

    @property
    def has_gate_probs(self) -> bool:
        return self._gate_probs is not None

    def check(self, router: nn.Module, layer: int) -> None:
        """Raise UserError unless the router, which has just run, made exactly one expert choice."""
        if self.hits != 1:
            raise UserError(
                f"model.path: the router {type(router).__name__} of decoder layer {layer} made {self.hits} expert "
                "choices by top-k instead of one, so its routing cannot be replayed; use routing=native"
            )

    def check_gates(self, router: nn.Module, layer: int, weights: Tensor) -> None:
        """Raise UserError unless gate weights [R, K] follow from probabilities, which have no scale of their own."""
        if self._gate_probs is None or self._known is None or self._scoring == "softmax":
            return
        sums = weights.detach().float().sum(dim=-1)[self._known.squeeze(-1)]
        if not self._chosen_by_scores or (len(sums) > 0 and sums.max() - sums.min() > _NORMALISED * sums.max()):
            raise UserError(
                f"model.path: the router {type(router).__name__} of decoder layer {layer} has sigmoid scores that it "
                "does not normalise over the chosen experts, so gate weights cannot be replayed; replay experts only"
            )

    def _replace(self, scores: Tensor, native: Any) -> Any:
        if len(scores) != len(self._experts):
            raise RuntimeError(f"the replay has {len(self._experts)} rows, the forward pass {len(scores)}")
        self.hits += 1
        self._chosen_by_scores = self._scored
        experts = self._experts.to(scores.device, torch.int64)
        self._known = (experts >= 0).all(dim=-1, keepdim=True)
        self.native = native.indices
        self._chosen = torch.where(self._known, experts, native.indices)
        values = self._weigh(scores.gather(-1, self._chosen))
        return torch.return_types.topk((values, self._chosen))

    def _weigh(self, live: Tensor) -> Tensor:
        """[R, K] scores of the chosen experts that the router goes on with.

        Recorded probabilities are brought to the live scores' scale where the router takes it out again: it rounds
        there as it would have, and gradients keep their size.
        """
        if self._gate_probs is None or self._known is None:
            return live
        exact = live.detach().float()
        recorded = self._gate_probs.to(live.device, torch.float32)
        if self._scoring == "sigmoid":  # normalised over the chosen experts
            recorded = recorded * (exact.sum(-1, keepdim=True) / recorded.sum(-1, keepdim=True))
        elif not self._chosen_by_scores:  # logits, whose softmax over the chosen experts is yet to come
            logits = recorded.clamp(min=_SMALLEST).log()
            recorded = logits + (exact.mean(-1, keepdim=True) - logits.mean(-1, keepdim=True))
        return torch.where(self._known, recorded.to(live.dtype) + (live - live.detach()), live)


def refuse_reentrant(model: PreTrainedModel) -> None:
    """Raise UserError where activations are recomputed by reentrant checkpointing.

    It runs the forward pass without gradients, so captured logits would carry none, silently.
    """
    for module in model.modules():
        recompute = getattr(module, "_gradient_checkpointing_func", None)
        if recompute is None or not getattr(module, "gradient_checkpointing", False):
            continue
        if getattr(recompute, "keywords", {}).get("use_reentrant", True):
            raise UserError(
                "model.gradient_checkpointing=true runs with use_reentrant=True, which loses router gradients; "
                'enable it with gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def replay_rows(
    arrays: Sequence[np.ndarray | None],
    starts: Sequence[int],
    total_rows: int,
    layers: Sequence[int],
    device: torch.device | str = "cpu",
) -> Tensor | None:
    """What samples recorded, in the rows of one forward pass that holds them, padded or packed.

    Args:
        arrays: per sample ``routed_experts`` int16 or ``router_top_probs`` float16 [P + T - 1, num_decoder_layers, K];
            None where nothing is to be replayed.
        starts: row (batch x sequence, row-major) of each sample's first token.
        total_rows: R, padding included.
        layers: decoder layer of each of the L entries.

    Returns:
        int16 [R, L, K], -1 in rows that nobody recorded (padding, the last token of each sample), or float32 [R, L, K]
        with 0 there; None when no sample has anything.
    """
    given = [(array, start) for array, start in zip(arrays, starts, strict=True) if array is not None]
    if not given:
        return None
    floating = np.issubdtype(given[0][0].dtype, np.floating)
    shape = (total_rows, len(layers), given[0][0].shape[2])
    rows = np.zeros(shape, dtype=np.float32) if floating else np.full(shape, -1, dtype=np.int16)
    for array, start in given:
        rows[start : start + len(array)] = array[:, list(layers)]
    return torch.from_numpy(rows).to(device)
