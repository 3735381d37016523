"""Log-probs of given token sequences under a causal LM: the trainer's side and the embedded engine's side of checks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel


@torch.no_grad()
def score_sequences(model: PreTrainedModel, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """float32 [len - 1] per sequence: log-probs at temperature 1 of tokens 1.. given their prefixes.

    One right-padded forward pass with the whole logits, so meant for a few short sequences.
    """
    lengths = [len(sequence) for sequence in sequences]
    device = next(model.parameters()).device
    ids = torch.zeros(len(sequences), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.as_tensor(sequence)
        mask[row, : len(sequence)] = 1
    ids = ids.to(device)
    logits = model(input_ids=ids, attention_mask=mask.to(device), use_cache=False).logits[:, :-1]
    log_probs = torch.log_softmax(logits.float(), dim=-1).gather(2, ids[:, 1:, None])[:, :, 0].cpu()
    return [log_probs[row, : length - 1].numpy() for row, length in enumerate(lengths)]
