from types import SimpleNamespace

import pytest
from small_run import FakeModule, batches, trainer

from vespo_lightning.callbacks import throughput
from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.metrics_csv import MetricsCsv
from vespo_lightning.callbacks.throughput import Throughput


def test_rates_are_over_one_rollout(tmp_path, monkeypatch):
    # Rollouts of 2 updates: 9 s with generation, 1 s without, for the first update of a rollout and the
    # second.
    ticks = iter([0.0, 9.0, 10.0, 19.0, 20.0])
    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    rows = []

    class Rows(MetricsCsv):
        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    trainer(tmp_path, [Throughput(), MetricWriter()], [Rows(tmp_path / "m.csv")]).fit(
        FakeModule(), batches(4, rollout_size=2)
    )
    # 4 samples with 2 tokens each per update
    assert [row["performance/samples_per_second"] for row in rows] == pytest.approx([4 / 9, 8 / 10, 8 / 10, 8 / 10])
    assert [row["performance/tokens_per_second"] for row in rows] == pytest.approx([8 / 9, 1.6, 1.6, 1.6])
    assert {row["performance/update_seconds"] for row in rows} == {0.125}
