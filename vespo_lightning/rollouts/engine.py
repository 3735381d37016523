"""The interface of rollout engines: generate, take new weights in place, prove which weights they hold."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. The log-probs that come back are those of this very distribution."""

    temperature: float = 1.0
    """0 means greedy decoding; log-probs are then those at temperature 1."""
    max_new_tokens: int = 128
    top_p: float = 1.0
    """keep the likeliest tokens that hold this probability mass together; the log-probs are of what is kept"""
    top_k: int | None = None
    """keep this many of the likeliest tokens; None keeps all"""
    top_log_probs: int = 0
    """return the log-probs of this many likeliest tokens at each position too"""


@dataclass(frozen=True)
class GenerationRequest:
    prompt_ids: Sequence[int]
    seed: int
    """Any integer in [0, 2**63); the response depends on it, the prompt and the weights, on nothing else."""


@dataclass
class Generation:
    """One response. P prompt tokens, T response tokens, L decoder layers, K experts per token."""

    token_ids: np.ndarray
    """int32 [T], with the end-of-sequence token if it was written"""
    log_probs: np.ndarray
    """float32 [T]"""
    finish_reason: str
    """``"stop"`` or ``"length"``"""
    top_ids: np.ndarray | None = None
    """int32 [T, K] likeliest tokens at each position, in descending order (``SamplingParams.top_log_probs`` = K)"""
    top_log_probs: np.ndarray | None = None
    """float32 [T, K] log-probs of those tokens"""
    routed_experts: np.ndarray | None = None
    """int16 [P+T-1, L, K]; -1 where unknown (dense layers)"""
    router_top_probs: np.ndarray | None = None
    """float16 [P+T-1, L, K], router probabilities of those experts"""


class RolloutEngine(ABC):
    """Generates responses with weights that it holds itself.

    Engines load the model from a Hugging Face folder at :meth:`start`, and later take weights under the names of that
    folder's checkpoint (``model.layers.0.mlp.experts.0.gate_proj.weight``), whatever they fuse inside.
    """

    dtype: torch.dtype
    """Precision of the weights held."""
    version: int = 0
    """Policy version of the weights held now, as given to the last :meth:`load_weights`."""

    @property
    @abstractmethod
    def returns_routing(self) -> bool:
        """Whether generations carry ``routed_experts`` (False for dense models)."""

    @abstractmethod
    def start(self, model_path: str) -> None:
        """Load model and tokenizer settings from an HF folder. Raises UserError where it cannot serve them."""

    @abstractmethod
    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """Responses in the order of the requests. The same requests and weights give the same result, bit for bit."""

    @abstractmethod
    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Replace the weights in place by (checkpoint name, tensor) pairs, all of them."""

    @abstractmethod
    def fingerprint(self) -> int:
        """Checksum read back from the weights in use, see :mod:`vespo_lightning.rollouts.weight_check`."""

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """float32 [len - 1] each: log-prob at temperature 1 of tokens 1.. given their prefixes (for the canary)."""

    @abstractmethod
    def reset_cache(self) -> None:
        """Forget cached prefixes, so that what comes next does not depend on what came before."""

    @abstractmethod
    def close(self) -> None:
        """Free the engine. Safe to call twice."""
