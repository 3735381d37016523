"""Which experts a Mixture-of-Experts model chose, read off its routers while it runs."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vespo_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Scoring = Literal["softmax", "sigmoid"]

_WAY_OUT = "use a model of another family, such as qwen3_moe, mixtral or olmoe"

_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)")


class RouterTap:
    """Forward hooks on the routers of a Hugging Face MoE model.

    Routers are found by structure: a block that holds fused ``experts`` and, beside them, a ``gate`` or
    ``router``. Everything is keyed by the decoder layer's index, so the order in which layers run, or run
    again when gradient checkpointing recomputes them, does not matter. The model's code is not touched.

    Attributes:
        layers: decoder-layer indices of the L MoE layers, ascending.
        num_decoder_layers: all decoder layers, dense ones included.
        num_experts: E, routed experts per MoE layer.
        top_k: K, experts per token.
        scoring: how the family turns router logits into scores.
    """

    def __init__(self, routers: dict[int, nn.Module], num_decoder_layers: int, num_experts: int, top_k: int) -> None:
        self.layers = sorted(routers)
        self.num_decoder_layers = num_decoder_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring: Scoring = _scoring(routers[self.layers[0]])
        self._record: RoutingRecord | None = None
        self._handles = [router.register_forward_hook(_RouterHook(self, layer)) for layer, router in routers.items()]

    @classmethod
    def attach(cls, model: PreTrainedModel) -> RouterTap | None:
        """Hook the routers of ``model``, before it is wrapped for sharding.

        Args:
            model: a transformers causal language model.

        Returns:
            The tap, or None where the model has no MoE layer.

        Raises:
            UserError: a router that does not choose by top-k (PhiMoE's sparse mixer), experts that are not
                fused, or layers that differ in the number of experts.
        """
        blocks = _moe_blocks(model)
        if not blocks:
            return None
        routers = {layer: router for layer, (router, _) in blocks.items()}
        for layer, router in routers.items():
            if "topk" not in _names_used(router):
                raise _unsupported(model, router, layer, "does not choose its experts by top-k")
        sizes = {(num_experts, _top_k(router)) for router, num_experts in blocks.values()}
        if len(sizes) > 1:
            layer = max(routers)
            problem = "has another number of experts than other layers"
            raise _unsupported(model, routers[layer], layer, problem)
        num_experts, top_k = sizes.pop()
        text_config: Any = model.config.get_text_config()
        num_decoder_layers = text_config.num_hidden_layers
        return cls(routers, num_decoder_layers, num_experts, top_k)

    @contextmanager
    def recording(self) -> Iterator[RoutingRecord]:
        """Record the one forward pass made inside the block, without what a backward pass recomputes."""
        if self._record is not None:
            raise RuntimeError("this tap is recording already")
        self._record = record = RoutingRecord(self.layers, self.scoring)
        try:
            yield record
        finally:
            self._record = None

    def detach(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class RoutingRecord:
    """Routing of one forward pass: R rows (batch x sequence, row-major), L MoE layers, E experts, K per row.

    Tensors are put together when they are asked for, so :meth:`select` the rows of interest first.
    """

    def __init__(self, layers: Sequence[int], scoring: Scoring, rows: Tensor | None = None) -> None:
        self._layers = layers
        self._scoring = scoring
        self._rows = rows
        self._logits: dict[int, Tensor] = {}
        self._experts: dict[int, Tensor] = {}
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
        selected._logits, selected._experts = self._logits, self._experts
        selected._given_as_probs = self._given_as_probs
        return selected

    @property
    def experts(self) -> Tensor:
        """int64 [R, L, K] experts used, in the order in which the router names them."""
        return self._stack(self._experts).long()

    @property
    def logits(self) -> Tensor:
        """float32 [R, L, E] router logits.

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

    def _add(self, layer: int, logits: Tensor, experts: Tensor) -> None:
        if layer in self._logits:
            raise RuntimeError(f"decoder layer {layer} ran twice in one recording; make one per forward pass")
        self._logits[layer] = logits.detach()
        self._experts[layer] = experts

    def _stack(self, per_layer: dict[int, Tensor]) -> Tensor:
        missing = [layer for layer in self._layers if layer not in per_layer]
        if missing:
            raise RuntimeError(f"decoder layers {missing} did not run in this recording")
        pieces = [per_layer[layer] for layer in self._layers]
        if self._rows is not None:
            pieces = [piece.index_select(0, self._rows) for piece in pieces]
        return torch.stack(pieces, dim=1)


class _RouterHook:
    """Forward hook of one router. An object, not a closure: a deep copy of the model must not report here."""

    def __init__(self, tap: RouterTap, layer: int) -> None:
        self.tap = tap
        self.layer = layer
        self.slots: tuple[int, int] | None = None
        self.gives_probs = False

    def __call__(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        record = self.tap._record
        # Inside a backward pass this can only be gradient checkpointing, which has been here before.
        if record is None or torch._C._current_graph_task_id() != -1:
            return
        if self.slots is None:
            self.slots = self._find_slots(router, output)
            self.gives_probs = _are_probabilities(output[self.slots[0]])
        logits_slot, experts_slot = self.slots
        record._add(self.layer, output[logits_slot], output[experts_slot])
        record._given_as_probs = self.gives_probs

    def _find_slots(self, router: nn.Module, output: Any) -> tuple[int, int]:
        """Where a router's output has its logits [R, E] and chosen experts [R, K].

        Most families return (logits, weights, experts), Granite and Aria the reverse. Weights are second.
        """
        widths: dict[bool, dict[int, int]] = {True: {}, False: {}}  # floating? -> width -> slot
        for slot, value in enumerate(output if isinstance(output, tuple) else ()):
            if isinstance(value, Tensor) and value.dim() == 2 and slot != 1:
                widths[value.is_floating_point()][value.shape[1]] = slot
        logits_slot = widths[True].get(self.tap.num_experts)
        experts_slot = widths[False].get(self.tap.top_k)
        if logits_slot is None or experts_slot is None:
            raise UserError(
                f"model.path: the router {type(router).__name__} of decoder layer {self.layer} does not "
                f"return its logits and chosen experts, so its routing cannot be recorded; {_WAY_OUT}."
            )
        return logits_slot, experts_slot


def _moe_blocks(model: PreTrainedModel) -> dict[int, tuple[nn.Module, int]]:
    """Router and number of experts of each MoE layer, by decoder-layer index."""
    blocks: dict[int, tuple[nn.Module, int]] = {}
    for name, block in model.named_modules():
        experts = getattr(block, "experts", None)
        found = _LAYER.search(name)
        if found is None or not isinstance(experts, nn.Module):
            continue
        layer = int(found.group(1))
        router = getattr(block, "gate", None) or getattr(block, "router", None)
        fused = getattr(experts, "down_proj", None)
        if not isinstance(router, nn.Module) or not isinstance(fused, Tensor) or fused.dim() != 3:
            raise _unsupported(model, block, layer, "has no fused experts with a router beside them")
        blocks[layer] = (router, len(fused))
    return blocks


def _names_used(router: nn.Module) -> set[str]:
    """Names that the code of a router's class refers to (functions called, attributes read)."""
    names: set[str] = set()
    for cls in type(router).__mro__:
        for member in vars(cls).values():
            if inspect.isfunction(member):
                names.update(inspect.unwrap(member).__code__.co_names)
    return names


def _scoring(router: nn.Module) -> Scoring:
    """Softmax or sigmoid: what the router's code applies; where it has both, its own setting says which."""
    setting = getattr(router, "expert_selection_fn", None)
    names = {setting} if setting else _names_used(router)
    if ("sigmoid" in names) == ("softmax" in names):
        raise UserError(
            f"model.path: the router {type(router).__name__} scores experts neither by softmax nor by "
            f"sigmoid, so its probabilities are unknown; {_WAY_OUT}."
        )
    return "sigmoid" if "sigmoid" in names else "softmax"


def _top_k(router: Any) -> int:
    if hasattr(router, "top_k"):
        return router.top_k
    return router.config.top_k_experts  # Gemma 4 keeps it in the config only


def _are_probabilities(values: Tensor) -> bool:
    """Whether every row of [R, E] is a distribution already."""
    if len(values) == 0 or (values < 0).any():
        return False
    sums = values.sum(dim=-1)
    return torch.allclose(sums, torch.ones_like(sums), atol=1e-3)


def _unsupported(model: PreTrainedModel, module: nn.Module, layer: int, problem: str) -> UserError:
    path = getattr(model.config, "_name_or_path", "") or model.config.model_type
    return UserError(
        f"model.path={path}: {type(module).__name__} of decoder layer {layer} {problem}, so its routing "
        f"cannot be recorded; {_WAY_OUT}."
    )
