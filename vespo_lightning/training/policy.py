"""The policy as the trainer sees it: token ids in, log-probs and entropy of chosen positions out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from vespo_lightning.errors import UserError
from vespo_lightning.training.gradient_norms import head_gradient_squared_norms
from vespo_lightning.training.log_probs import LogProbs, chunked_log_probs


@dataclass(frozen=True)
class ModelInputs:
    """One forward pass: B rows of S tokens, of which T positions predict a token that training looks at."""

    input_ids: Tensor
    """int64 [B, S]"""
    position_ids: Tensor
    """int64 [B, S]; starts again at 0 with every sequence of a packed row"""
    attention_mask: Tensor | None
    """int64 [B, S] for padded rows, None for packed ones"""
    positions: Tensor
    """int64 [T] into the flattened [B * S] hidden states: the position before each response token"""
    targets: Tensor
    """int64 [T] the response tokens"""
    starts: tuple[int, ...]
    """place of each sequence's first token among the [B * S] flattened positions"""

    def to(self, device: torch.device) -> ModelInputs:
        return ModelInputs(
            self.input_ids.to(device),
            self.position_ids.to(device),
            None if self.attention_mask is None else self.attention_mask.to(device),
            self.positions.to(device),
            self.targets.to(device),
            self.starts,
        )


@dataclass(frozen=True)
class NormRequest:
    """Asks for the squared norm of the head's gradient of ``sum of weight * log pi`` over each sequence."""

    weight: Tensor
    """[T]"""
    sequence_index: Tensor
    """int64 [T], non-decreasing"""
    sequences: int


class Policy(nn.Module):
    """A Hugging Face causal LM behind the log-prob head of :mod:`vespo_lightning.training.log_probs`.

    Logits are made for the asked positions only. The head runs inside this module's forward, so that sharded
    strategies gather its weight with the root.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = 1024) -> None:
        super().__init__()
        self.model = model
        self.chunk = chunk
        _check_plain_head(model)
        model.eval()  # dropout would make the importance ratio of equal weights differ from 1
        for layer in model.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                # transformers recomputes only in layers that are in training mode; dropout has modules of its own
                layer.training = layer.gradient_checkpointing

    def forward(
        self,
        inputs: ModelInputs,
        temperature: float = 1.0,
        extra_ids: Tensor | None = None,
        norms_of: Callable[[Tensor], NormRequest] | None = None,
    ) -> LogProbs:
        """Float32 log-probs and entropy of ``inputs.targets`` (float64 for a float64 model).

        Args:
            extra_ids: int64 [T, K] further token ids whose log-probs are wanted.
            norms_of: asks for gradient norms, whose weights it gives when the log-probs [T] are known.
        """
        decoder = self.model.base_model(
            input_ids=inputs.input_ids,
            attention_mask=inputs.attention_mask,
            position_ids=inputs.position_ids,
            use_cache=False,
        )
        hidden = decoder.last_hidden_state.flatten(0, 1)[inputs.positions]
        head = self.model.get_output_embeddings()
        bias = getattr(head, "bias", None)
        out = chunked_log_probs(
            hidden,
            head.weight,
            inputs.targets,
            bias=bias,
            temperature=temperature,
            chunk=self.chunk,
            extra_ids=extra_ids,
        )
        if norms_of is None:
            return out
        wanted = norms_of(out.log_prob.detach())
        norms = head_gradient_squared_norms(
            hidden,
            head.weight,
            inputs.targets,
            out.log_prob.detach(),
            wanted.weight,
            wanted.sequence_index,
            wanted.sequences,
            bias=bias,
            temperature=temperature,
            chunk=self.chunk,
        )
        return out._replace(squared_norm=norms)


@torch.no_grad()
def _check_plain_head(model: PreTrainedModel) -> None:
    """Refuse models that do something to their logits after the output embedding (soft-capping, scaling).

    Asked of the model itself rather than of a list of families: hidden states through the bare head must give the
    model's own logits.
    """
    parameter = next(model.parameters())
    if parameter.is_meta:
        return
    ids = torch.arange(4, device=parameter.device).unsqueeze(0) % model.config.get_text_config().vocab_size
    training = model.training
    model.eval()
    own = model(input_ids=ids, use_cache=False).logits
    head = model.get_output_embeddings()
    if head is None:
        raise UserError(
            f"model.path: {type(model).__name__} has no output embedding; only causal language models can be trained"
        )
    bare = head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(training)
    if not torch.allclose(own.float(), bare.float(), rtol=1e-2, atol=1e-2, equal_nan=True):
        raise UserError(
            f"model.path: {type(model).__name__} transforms its logits after the output embedding (soft-capping or "
            "scaling), which the log-prob head does not reproduce; choose a model with a plain head"
        )
