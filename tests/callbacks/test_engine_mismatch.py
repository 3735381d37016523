from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vespo_lightning.callbacks.engine_mismatch import EngineMismatch
from vespo_lightning.objectives.base import TokenBatch


def recorded(version_made: int, policy_version: int) -> list[dict[str, float]]:
    tokens = TokenBatch(
        log_prob=torch.tensor([-1.0, -2.0, -0.5]),
        behaviour_log_prob=torch.tensor([-1.1, -2.0, -0.3]),
        sequence_index=torch.tensor([0, 0, 1]),
        loss_mask=torch.ones(3, dtype=torch.bool),
        advantage=torch.tensor([1.0, -1.0]),
        group=torch.tensor([0, 0]),
        version_made=torch.full((3,), version_made, dtype=torch.int32),
        policy_version=policy_version,
    )
    records: list[dict[str, float]] = []
    module = SimpleNamespace(last_update=SimpleNamespace(tokens=tokens), record=records.append)
    EngineMismatch().on_train_batch_end(None, module, None, None, 0)
    return records


def test_fresh_mini_batch_is_recorded():
    (row,) = recorded(version_made=8, policy_version=8)
    assert row["mismatch/log_prob_diff_mean"] == pytest.approx(0.1, rel=1e-6)
    assert row["mismatch/log_prob_diff_max"] == pytest.approx(0.2, rel=1e-6)
    assert row["mismatch/sequence_log_ratio_mean"] == pytest.approx(-0.05, rel=1e-5)
    assert all(name.startswith("mismatch/") for name in row)


def test_stale_mini_batch_records_nothing():
    assert recorded(version_made=7, policy_version=8) == []


def test_nothing_before_the_first_update():
    EngineMismatch().on_train_batch_end(None, SimpleNamespace(last_update=None), None, None, 0)
