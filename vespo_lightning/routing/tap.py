"""Which experts a Mixture-of-Experts model chooses, read off its routers while it runs, or told them."""

from __future__ import annotations

import inspect
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from vespo_lightning.errors import UserError
from vespo_lightning.routing.record import RoutingRecord, Scoring
from vespo_lightning.routing.replay import Replay, ReplayedChoice, refuse_reentrant

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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

    def __init__(
        self,
        model: PreTrainedModel,
        routers: dict[int, nn.Module],
        num_decoder_layers: int,
        num_experts: int,
        top_k: int,
    ) -> None:
        self._model: weakref.ref[PreTrainedModel] | None = weakref.ref(model)
        self.layers = sorted(routers)
        self.num_decoder_layers = num_decoder_layers
        self.num_experts = num_experts
        self.top_k = top_k
        self.scoring: Scoring = _scoring(routers[self.layers[0]])
        self._record: RoutingRecord | None = None
        self._replay: Replay | None = None
        self._handles: list[RemovableHandle] = []
        for layer, router in routers.items():
            hook = _RouterHook(self, layer)
            self._handles.append(router.register_forward_pre_hook(hook.before))
            self._handles.append(router.register_forward_hook(hook.after, always_call=True))

    def __getstate__(self) -> dict[str, Any]:
        """Copying or pickling a router, whose hooks lead here, must not take the whole model along."""
        return vars(self) | {"_model": None}

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
        return cls(model, routers, num_decoder_layers, num_experts, top_k)

    @contextmanager
    def recording(self, keep_graph: bool = False) -> Iterator[RoutingRecord]:
        """Record the one forward pass made inside the block, without what a backward pass recomputes.

        Args:
            keep_graph: keep the gradients of the logits, for losses on them.
        """
        if self._record is not None:
            raise RuntimeError("this tap is recording already")
        self._record = record = RoutingRecord(self.layers, self.scoring, keep_graph=keep_graph)
        try:
            yield record
        finally:
            self._record = None

    @contextmanager
    def replaying(self, experts: Tensor, gate_probs: Tensor | None = None) -> Iterator[None]:
        """Make the one forward pass inside the block use given experts, whatever the routers think of them.

        Gate weights follow the live scores of those experts, so gradients reach the router. Under gradient
        checkpointing the backward pass routes again: do it inside the block too, or it raises. Works around
        :meth:`recording`, which then shows the experts that were used.

        Args:
            experts: integer [R, L, K], R rows (batch x sequence, row-major) and L layers in the order of
                :attr:`layers`; a row with a negative entry routes natively. Ids must be in range.
            gate_probs: [R, L, K] router probabilities of those experts (:attr:`RoutingRecord.top_probs` of the pass
                that chose them). They take the place of the live ones in the forward pass, and the router's own code
                turns them into gate weights; the gradient is that of live scores at these values
                (straight-through), so the router learns, but updates of it do not show until the next rollout.

        Raises:
            UserError: reentrant checkpointing; a router whose expert choice cannot be replaced, or
                with ``gate_probs`` one with sigmoid scores that it does not normalise over the chosen experts.
            RuntimeError: rows that do not fit the forward pass, a second forward pass, a layer that did not run.
        """
        if self._replay is not None:
            raise RuntimeError("this tap is replaying already")
        model = self._model() if self._model is not None else None
        if model is not None:
            refuse_reentrant(model)
        self._replay = replay = Replay(self.layers, self.top_k, experts, gate_probs)
        try:
            yield
        finally:
            self._replay = None
        replay.check_used()

    def detach(self) -> None:
        """Remove the hooks. Safe to call twice."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


class _RouterHook:
    """Hooks of one router. An object, not a closure: a deep copy of the model must not report here.

    They stay out of compiled graphs, which break around the router.
    """

    def __init__(self, tap: RouterTap, layer: int) -> None:
        self.tap = tap
        self.layer = layer
        self.slots: tuple[int, int] | None = None
        self.gives_probs = False
        self._choice: ReplayedChoice | None = None
        self._forward_replay = 0
        self._gates_checked = False

    @torch.compiler.disable
    def before(self, router: nn.Module, args: tuple[Any, ...]) -> None:
        replay = self.tap._replay
        number = 0 if replay is None else replay.number
        if _recomputing() and number != self._forward_replay:
            raise RuntimeError(
                f"decoder layer {self.layer} is recomputed for a backward pass with other routing than its forward "
                "pass had; run backward inside the same replaying() block"
            )
        if not _recomputing() and torch.is_grad_enabled():
            self._forward_replay = number
        if replay is None:
            return
        tap = self.tap
        self._choice = replay.choice(self.layer, tap.num_experts, tap.scoring, recomputing=_recomputing())
        self._choice.__enter__()

    @torch.compiler.disable
    def after(self, router: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        choice, self._choice = self._choice, None
        if choice is not None:
            choice.__exit__(None, None, None)
        if output is None:  # the router raised: another error, or the end of a recomputation
            return
        if choice is not None:
            choice.check(router, self.layer)
            if not self._gates_checked:
                choice.check_gates(router, self.layer, output[1])
                self._gates_checked = choice.has_gate_probs
        record = self.tap._record
        # What is recomputed has been here before.
        if record is None or _recomputing():
            return
        if self.slots is None:
            self.slots = self._find_slots(router, output)
            self.gives_probs = _are_probabilities(output[self.slots[0]])
        logits_slot, experts_slot = self.slots
        experts = output[experts_slot]
        record._add(self.layer, output[logits_slot], experts, experts if choice is None else choice.native)
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


def _recomputing() -> bool:
    """Whether this runs inside a backward pass, which can only be gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


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
