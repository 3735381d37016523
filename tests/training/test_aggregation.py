from __future__ import annotations

import pytest
import torch

from vespo_lightning.errors import UserError
from vespo_lightning.training.aggregation import Totals, check_aggregation, token_weights

LENGTHS = [1, 4, 2, 9]
LIMIT = 16


def brute_force(aggregation: str, losses: list[list[float]]) -> float:
    """The loss of a whole mini-batch, written as its name says."""
    if aggregation == "token-mean":
        everything = [loss for row in losses for loss in row]
        return sum(everything) / len(everything)
    per_sequence = {
        "seq-mean-token-mean": [sum(row) / len(row) for row in losses],
        "seq-mean-token-sum": [sum(row) for row in losses],
        "constant": [sum(row) / LIMIT for row in losses],
    }[aggregation]
    return sum(per_sequence) / len(losses)


@pytest.mark.parametrize("split", [[[0, 1, 2, 3]], [[0, 1], [2, 3]], [[3], [0], [2, 1]]])
@pytest.mark.parametrize("aggregation", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "constant"])
def test_equals_brute_force_for_any_split(aggregation, split):
    generator = torch.Generator().manual_seed(0)
    losses = [torch.rand(n, generator=generator, dtype=torch.float64) for n in LENGTHS]
    totals = Totals(sum(LENGTHS), len(LENGTHS), LIMIT)
    total = 0.0
    for piece in split:
        length = torch.tensor([LENGTHS[s] for s in piece], dtype=torch.float64)
        index = torch.repeat_interleave(torch.arange(len(piece)), length.long())
        weight = token_weights(aggregation, length, index, totals)
        assert weight.dtype == torch.float64
        total += (weight * torch.cat([losses[s] for s in piece])).sum().item()
    assert total == pytest.approx(brute_force(aggregation, [loss.tolist() for loss in losses]), rel=1e-12)


def test_masking_leaves_the_numerator_only():
    """The weight of a token does not depend on which of the others are in the loss."""
    totals = Totals(tokens=16, sequences=4)
    index = torch.tensor([1, 1, 1])  # one of the four tokens of sequence 1 is not in the loss
    assert token_weights("token-mean", torch.tensor(LENGTHS), index, totals).tolist() == [1 / 16] * 3
    assert token_weights("seq-mean-token-mean", torch.tensor(LENGTHS), index, totals).tolist() == [1 / 16] * 3
    assert token_weights("seq-mean-token-sum", torch.tensor(LENGTHS), index, totals).tolist() == [1 / 4] * 3


def test_integer_lengths_give_float32_and_no_tokens_give_no_weights():
    totals = Totals(tokens=3, sequences=2)
    assert token_weights("token-mean", torch.tensor([3, 0]), torch.zeros(3).long(), totals).dtype == torch.float32
    assert token_weights("token-mean", torch.tensor([0]), torch.zeros(0).long(), totals).shape == (0,)


@pytest.mark.parametrize(("typo", "nearest"), [("token_mean", "token-mean"), ("seq-mean-tokens", "seq-mean-token-sum")])
def test_unknown_names_get_the_nearest(typo, nearest):
    with pytest.raises(UserError, match=f"^aggregation={typo} is not known; did you mean {nearest}"):
        check_aggregation(typo)
    with pytest.raises(UserError, match=nearest):
        token_weights(typo, torch.tensor([1]), torch.tensor([0]), Totals(1, 1))
