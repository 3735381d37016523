from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vespo_lightning.callbacks.weight_variance import WeightVariance, histograms
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.vespo import Vespo


def update(log_ratio: list[float], advantages: list[float]) -> SimpleNamespace:
    """Sequences of two tokens."""
    sequences = len(advantages)
    tokens = TokenBatch(
        log_prob=torch.tensor(log_ratio) - 1,
        behaviour_log_prob=-torch.ones(2 * sequences),
        sequence_index=torch.arange(sequences).repeat_interleave(2),
        loss_mask=torch.ones(2 * sequences, dtype=torch.bool),
        advantage=torch.tensor(advantages),
        group=torch.zeros(sequences, dtype=torch.int64),
        version_made=torch.zeros(2 * sequences, dtype=torch.int32),
        policy_version=1,
    )
    return SimpleNamespace(tokens=tokens, coefficient=Vespo().coefficient(tokens))


FOUR = update([0.0, 0.0, 1.0, 0.0, -1.0, 0.5, 0.2, 0.0], [1.0, 1.0, -1.0, 0.0])


def run(callback: WeightVariance, logger, updates: range) -> list[dict[str, float]]:
    """The rows of these updates, each consuming the batch ``FOUR``."""
    trainer = SimpleNamespace(is_global_zero=True, loggers=[logger])
    rows = []
    for number in updates:
        row: dict[str, float] = {}
        module = SimpleNamespace(last_update=FOUR, update=number, record=row.update)
        callback.on_train_batch_end(trainer, module, None, None, 0)
        rows.append(row)
    return rows


def test_records_weights_and_coefficients(tmp_path: Path):
    (row,) = run(WeightVariance(0), CSVLogger(tmp_path), range(1, 2))
    assert row["importance/log_weight_mean"] == pytest.approx(0.7 / 4, rel=1e-6)
    assert row["importance/log_weight_p50"] == pytest.approx(0.1, rel=1e-6)
    phi = Vespo().phi(FOUR.tokens)
    assert row["importance/coefficient_positive_p50"] == pytest.approx(phi[:2].mean().item(), rel=1e-6)
    assert row["importance/coefficient_negative_p50"] == pytest.approx(phi[2].item(), rel=1e-6)
    assert all(name.startswith("importance/") for name in row)


def test_histograms_go_to_tensorboard_at_the_update_number(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run(WeightVariance(histogram_every=3), logger, range(1, 8))
    logger.experiment.flush()
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    tags = ["importance/coefficient_negative", "importance/coefficient_positive", "importance/log_weight"]
    assert sorted(events.Tags()["histograms"]) == tags
    counts = {tag: [(e.step, e.histogram_value.num) for e in events.Histograms(tag)] for tag in tags}
    assert counts == dict(zip(tags, [[(3, 1), (6, 1)], [(3, 2), (6, 2)], [(3, 4), (6, 4)]], strict=True))


def test_zero_draws_no_histograms(tmp_path: Path):
    logger = TensorBoardLogger(tmp_path, name="", version="")
    run(WeightVariance(histogram_every=0), logger, range(3))
    assert list(tmp_path.iterdir()) == []


def test_non_finite_values_stay_out_of_histograms():
    broken = update([float("nan"), 0.0, 0.5, 0.0, 0.1, 0.0], [1.0, 1.0, -1.0])
    values = histograms(broken)
    assert values["importance/log_weight"].tolist() == pytest.approx([0.5, 0.1])
    assert len(values["importance/coefficient_positive"]) == 1
    everything = update([float("nan"), 0.0], [1.0])
    assert histograms(everything) == {}


def test_nothing_before_the_first_update():
    WeightVariance().on_train_batch_end(None, SimpleNamespace(last_update=None), None, None, 0)


@pytest.mark.parametrize("value", [-1, 2.5, "often", True])
def test_invalid_interval_is_named(value):
    with pytest.raises(UserError, match=rf"^callbacks\.weight_variance\.histogram_every={value} "):
        WeightVariance(value)
