"""Whether a model keeps packed sequences apart, asked of the model itself rather than of a list of families."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.training.micro_batches import Layout, collate
from vespo_lightning.training.policy import Policy

_LENGTHS = ((3, 5), (5, 4), (2, 9))
#: Difference of log-probs, relative to their spread, that is no leak in any precision.
_FLOOR = 1e-3
#: Leaks are orders of magnitude above rounding, which padding shows too.
_MARGIN = 10.0


@torch.no_grad()
def packed_rows_are_separate(policy: Policy) -> bool:
    """Whether sequences of one packed row do not see each other.

    Three short sequences, one forward pass each, give the log-probs that packed rows must give as well. How far
    rounding alone may move them is read off padded rows. Medians over the tokens, because in low precision a
    rounded-off tie between two experts moves single tokens far. Some families leak: their attention masks do not
    follow the position ids, or their linear attention carries its state on.
    """
    samples = _random_samples(policy.model.config.get_text_config().vocab_size)
    device = next(policy.parameters()).device

    def log_probs(chosen: list[Sample], layout: Layout) -> Tensor:
        return policy(collate(chosen, layout).to(device)).log_prob

    separate = torch.cat([log_probs([sample], "padded") for sample in samples])
    rounding = (log_probs(samples, "padded") - separate).abs().median()
    packed = (log_probs(samples, "packed") - separate).abs().median()
    return bool(packed <= _MARGIN * rounding + _FLOOR * separate.std())


def _random_samples(vocab_size: int) -> list[Sample]:
    rng = np.random.default_rng(0)
    return [
        Sample(
            prompt_id="",
            group_id="",
            index=0,
            seed=0,
            prompt_ids=rng.integers(0, vocab_size, prompt).astype(np.int32),
            response_ids=rng.integers(0, vocab_size, response).astype(np.int32),
            behaviour_log_probs=np.zeros(response, dtype=np.float32),
            version_runs=[(0, response)],
            loss_mask=np.ones(response, dtype=bool),
            finish_reason="stop",
            text="",
            reward=0.0,
        )
        for prompt, response in _LENGTHS
    ]
