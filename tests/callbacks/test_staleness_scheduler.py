from types import SimpleNamespace

import pytest
from small_run import mini_batch, update_result

from vespo_lightning.callbacks.staleness_scheduler import StalenessScheduler
from vespo_lightning.errors import UserError


def recorded(version: int) -> dict[str, float]:
    row: dict[str, float] = {}
    batch = mini_batch(3, rollout_size=4)
    module = SimpleNamespace(last_update=update_result(batch, version), record=row.update)
    StalenessScheduler(n=4).on_train_batch_end(None, module, None, batch, 3)
    return row


def test_lag_is_counted_per_token():
    # half of the tokens of small_run were written by version 0, half by version 1
    assert recorded(version=5) == {
        "staleness/lag_mean": 4.5,
        "staleness/lag_min": 4.0,
        "staleness/lag_max": 5.0,
        "staleness/position": 3.0,
        "staleness/pass": 0.0,
        "staleness/rollout_size": 4.0,
    }


def test_every_rollout_has_n_mini_batches():
    assert [StalenessScheduler(n=16).rollout_size(rollout) for rollout in range(3)] == [16, 16, 16]


@pytest.mark.parametrize("n", [0, -1, 1.5, "8"])
def test_n_is_a_whole_number_above_0(n):
    with pytest.raises(UserError, match=r"staleness\.n="):
        StalenessScheduler(n=n)
