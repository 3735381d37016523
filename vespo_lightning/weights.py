"""Weights under the names that their Hugging Face checkpoint uses, out of a model and into one.

In memory, transformers fuses what a checkpoint stores apart (``mlp.experts.gate_up_proj`` [E, 2I, H] against
``mlp.experts.3.gate_proj.weight`` [I, H]). Engines are only ever handed checkpoint names, because those are what every
engine's own loader understands.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion


def _untied_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """Parameters and persistent buffers in memory names; of tied tensors only the one that the others are tied to."""
    tied = set(model.all_tied_weights_keys or {})
    return {name: tensor for name, tensor in model.state_dict().items() if name not in tied}


@torch.no_grad()
def checkpoint_tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """(checkpoint name, detached tensor) of every parameter and persistent buffer, tied ones once.

    The tensors may share memory with the model: copy what must outlive the next optimizer step.
    """
    yield from revert_weight_conversion(model, _untied_state(model)).items()


@dataclass(frozen=True)
class _Place:
    """Where the elements of one checkpoint tensor live in memory."""

    parameter: str
    start: int
    """first element, in the flattened parameter"""
    index: Tensor | None
    """int64, flattened positions, when they are not one contiguous run from ``start``"""
    shape: torch.Size


class InPlaceLoader:
    """Copies checkpoint tensors into a model that is in use, without a second copy of the model.

    The places are found by sending element *positions* through transformers' own conversion, so that no knowledge of
    any model family is written down here.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._state = _untied_state(model)
        self._places = _find_places(model, self._state)

    @property
    def names(self) -> list[str]:
        """Checkpoint names that a complete load must bring."""
        return list(self._places)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the model. Raises ValueError unless exactly the expected names and shapes arrive."""
        missing = set(self._places)
        for name, tensor in tensors:
            if name not in missing:
                raise ValueError(f"weight {name!r} is unknown to the model, or came twice")
            missing.remove(name)
            place = self._places[name]
            if tensor.shape != place.shape:
                raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, expected {tuple(place.shape)}")
            flat = self._state[place.parameter].view(-1)
            source = tensor.detach().reshape(-1).to(flat.device, flat.dtype)
            if place.index is None:
                flat[place.start : place.start + source.numel()].copy_(source)
            else:
                flat[place.index] = source
        if missing:
            raise ValueError(f"{len(missing)} weights did not arrive, among them {sorted(missing)[:3]}")


def _find_places(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, _Place]:
    offsets: dict[str, int] = {}
    positions: dict[str, Tensor] = {}
    total = 0
    for name, tensor in state.items():
        offsets[name] = total
        positions[name] = torch.arange(total, total + tensor.numel()).view(tensor.shape)
        total += tensor.numel()
    starts = torch.tensor(list(offsets.values()))
    names = list(offsets)
    places: dict[str, _Place] = {}
    for checkpoint_name, index in revert_weight_conversion(model, positions).items():
        flat = index.reshape(-1)
        owner = names[int(torch.searchsorted(starts, flat[0], right=True)) - 1]
        flat = flat - offsets[owner]
        if int(flat.min()) < 0 or int(flat.max()) >= state[owner].numel():
            raise ValueError(f"{checkpoint_name!r} is spread over several parameters; in-place loading cannot serve it")
        contiguous = bool((flat == torch.arange(len(flat)) + flat[0]).all())
        places[checkpoint_name] = _Place(owner, int(flat[0]), None if contiguous else flat, index.shape)
    if sum(place.shape.numel() for place in places.values()) != total:
        raise ValueError("the checkpoint names do not cover every weight of the model exactly once")
    return places
