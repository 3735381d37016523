"""Plans of micro-batches, and the token ids of one forward pass."""

from __future__ import annotations

import pytest
import torch
from pieces import LENGTHS, make_samples, tiny_policy

from vespo_lightning.errors import UserError
from vespo_lightning.training.micro_batches import collate, plan_micro_batches


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("budget", [9, 10, 17, 23, 100])
def test_every_sequence_once_and_no_pass_over_the_budget(layout, budget):
    lengths = [3, 9, 1, 9, 4, 4, 2, 7, 5]
    plan = plan_micro_batches(lengths, budget, layout)
    assert sorted(i for part in plan for i in part) == list(range(len(lengths)))
    for part in plan:
        cost = sum(lengths[i] for i in part) if layout == "packed" else len(part) * max(lengths[i] for i in part)
        assert cost <= budget


def test_plans_are_as_full_as_the_layout_allows():
    assert plan_micro_batches([4, 4, 4, 4], 16) == [[0, 1, 2, 3]]
    assert plan_micro_batches([1, 8, 1, 8], 16) == [[1, 3], [0, 2]]
    assert plan_micro_batches([1, 8, 1, 8], 18, "packed") == [[1, 3, 0, 2]]
    assert plan_micro_batches([1, 8, 1, 8], 18, "padded") == [[1, 3], [0, 2]]
    assert plan_micro_batches([], 4) == []


def test_a_sequence_longer_than_the_budget():
    with pytest.raises(UserError, match=r"^batching\.token_budget=8 is smaller than one sequence of 9 tokens"):
        plan_micro_batches([3, 9], 8)


def test_padded_rows():
    samples = make_samples(tiny_policy())
    inputs = collate(samples, "padded", pad_id=31)
    assert inputs.input_ids.shape == inputs.attention_mask.shape == (6, 18)
    for row, sample in enumerate(samples):
        length = len(sample.prompt_ids) + len(sample.response_ids)
        assert inputs.input_ids[row].tolist() == [*sample.prompt_ids, *sample.response_ids, *[31] * (18 - length)]
        assert inputs.attention_mask[row].tolist() == [1] * length + [0] * (18 - length)
        assert inputs.position_ids[row, :length].tolist() == list(range(length))


def test_one_packed_row():
    samples = make_samples(tiny_policy())
    inputs = collate(samples, "packed")
    assert inputs.attention_mask is None
    assert inputs.input_ids[0].tolist() == [i for s in samples for i in [*s.prompt_ids, *s.response_ids]]
    assert inputs.position_ids[0].tolist() == [i for p, t in LENGTHS for i in range(p + t)]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_positions_point_before_their_targets(layout):
    samples = make_samples(tiny_policy())
    inputs = collate(samples, layout)
    assert torch.equal(inputs.input_ids.flatten()[inputs.positions + 1], inputs.targets)
    assert inputs.targets.tolist() == [i for s in samples for i in s.response_ids]
