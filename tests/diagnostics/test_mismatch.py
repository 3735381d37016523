from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from vespo_lightning.diagnostics.mismatch import EqualRouting, mismatch_statistics
from vespo_lightning.objectives.base import TokenBatch

LENGTHS = [2, 5, 3, 7]


def token_batch(version_made: list[int], policy_version: int = 4) -> TokenBatch:
    """float32; the last token of sequence 1 and all of sequence 2 are outside the loss and hold NaN."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[6] = mask[7] = mask[8] = mask[9] = False
    engine = -2 * torch.rand(tokens, generator=generator)
    trainer = engine + 0.6 * torch.randn(tokens, generator=generator)
    return TokenBatch(
        log_prob=torch.where(mask, trainer, float("nan")),
        behaviour_log_prob=torch.where(mask, engine, float("nan")),
        sequence_index=torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS)),
        loss_mask=mask,
        advantage=torch.tensor([1.0, -1.0, 0.0, 0.0]),
        group=torch.zeros(4, dtype=torch.int64),
        version_made=torch.tensor(version_made, dtype=torch.int32),
        policy_version=policy_version,
    )


def brute_force(batch: TokenBatch, trainer: torch.Tensor, tokens: list[int], sequences: list[list[int]]) -> dict:
    p, q = trainer.double().numpy(), batch.behaviour_log_prob.double().numpy()
    d = (trainer - batch.behaviour_log_prob).double().numpy()
    ratios = np.exp(d[tokens])
    sums = np.array([d[members].sum() for members in sequences])
    expected = {
        "mismatch/k3_kl": np.mean(ratios - 1 - d[tokens]),
        "mismatch/log_prob_diff_mean": np.abs(d[tokens]).mean(),
        "mismatch/log_prob_diff_max": np.abs(d[tokens]).max(),
        "mismatch/perplexity_gap": math.exp(-p[tokens].mean()) - math.exp(-q[tokens].mean()),
        "mismatch/extreme_token_share": np.mean((ratios > 2) | (ratios < 0.5)),
    }
    if sequences:
        expected |= {
            "mismatch/sequence_log_ratio_mean": sums.mean(),
            "mismatch/sequence_log_ratio_std": sums.std(),
        }
    return expected


IN_LOSS = [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15, 16]
SEQUENCES = [[0, 1], [2, 3, 4, 5], [10, 11, 12, 13, 14, 15, 16]]


def test_fresh_tokens_equal_brute_force():
    batch = token_batch([4] * 17)
    expected = brute_force(batch, batch.log_prob, IN_LOSS, SEQUENCES)
    assert mismatch_statistics(batch) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected["mismatch/extreme_token_share"] < 1


def test_only_tokens_of_the_current_version_count():
    """Sequence 3 was finished by an older version: its fresh tokens count, its sum does not."""
    batch = token_batch([4] * 14 + [3] * 3)
    expected = brute_force(batch, batch.log_prob, IN_LOSS[:-3], SEQUENCES[:2])
    assert mismatch_statistics(batch) == pytest.approx(expected, rel=1e-12)


def test_no_whole_sequence_gives_no_sequence_numbers():
    batch = token_batch([4] + [3] * 16)
    assert mismatch_statistics(batch) == pytest.approx(brute_force(batch, batch.log_prob, [0], []), rel=1e-12)


def test_stale_tokens_give_nothing():
    assert mismatch_statistics(token_batch([3] * 17)) == {}
    assert mismatch_statistics(token_batch([4] * 6 + [4] * 4 + [3] * 7, policy_version=5)) == {}


@pytest.mark.parametrize("denominator", ["behaviour", "recomputed"])
def test_recomputed_log_probs_are_used_at_any_lag(denominator):
    stale = token_batch([0] * 17)
    recomputed = stale.behaviour_log_prob + 0.01 * torch.arange(17)
    batch = dataclasses.replace(stale, recomputed_log_prob=recomputed, denominator=denominator)
    expected = brute_force(batch, recomputed, IN_LOSS, SEQUENCES)
    assert mismatch_statistics(batch) == pytest.approx(expected, rel=1e-12)
    assert expected["mismatch/log_prob_diff_max"] == pytest.approx(0.16, rel=1e-5)


def test_equal_log_probs_give_exact_zeros():
    batch = token_batch([4] * 17)
    result = mismatch_statistics(dataclasses.replace(batch, log_prob=batch.behaviour_log_prob))
    assert set(result.values()) == {0.0}
    assert len(result) == 7


def test_equal_routing_leaves_out_a_sequence_from_its_first_flip():
    # two sequences of 4 and 3 tokens, 2 layers, 2 experts; order inside a set does not matter
    now = torch.tensor([[[0, 1], [2, 3]]] * 7)
    then = torch.tensor([[[1, 0], [3, 2]]] * 7)
    then[2, 1] = torch.tensor([2, 5])  # a flip at token 2 of the first sequence
    then[5, 0] = torch.tensor([-1, -1])  # unknown is not a flip
    behaviour = torch.zeros(7)
    batch = TokenBatch(
        log_prob=torch.tensor([0.001, 0.002, 0.9, 0.8, 0.003, 0.004, 0.0]),
        behaviour_log_prob=behaviour,
        sequence_index=torch.tensor([0, 0, 0, 0, 1, 1, 1]),
        loss_mask=torch.tensor([True] * 6 + [False]),
        advantage=torch.zeros(2),
        group=torch.zeros(2, dtype=torch.int64),
        version_made=torch.full((7,), 3),
        policy_version=3,
    )
    measured = EqualRouting()
    measured.update(batch, now, then)
    assert measured.metrics() == {
        "mismatch/flipped_tokens": 1.0,
        "mismatch/equal_routing_diff_max": pytest.approx(0.004),
    }
    older = EqualRouting()
    older.update(dataclasses.replace(batch, policy_version=4), now, then)
    assert older.metrics() == {}
