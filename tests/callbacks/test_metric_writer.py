import csv

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from small_run import FakeModule, batches, trainer

from vespo_lightning.callbacks.event_files import read_scalars
from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.metrics_csv import MetricsCsv


class Watcher(L.Callback):
    def __init__(self):
        self.rows = []

    def on_row(self, trainer, module, update, row):
        self.rows.append((update, row))


class Recorder(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.record({"importance/ess_ratio": 1 / module.update})


def test_one_row_per_update_in_every_logger_and_for_every_watcher(tmp_path):
    table = MetricsCsv(tmp_path / "metrics.csv")
    board = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    watcher = Watcher()  # before the writer: its place in the list does not matter
    module = FakeModule()
    trainer(tmp_path, [watcher, Recorder(), MetricWriter()], [table, board]).fit(module, batches(3))

    with open(table.path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["update"] for row in rows] == ["1", "2", "3"]
    assert [float(row["importance/ess_ratio"]) for row in rows] == [1, 1 / 2, 1 / 3]
    assert watcher.rows[1] == (2, {"reward/mean": 0.2, "train/loss": 0.2, "importance/ess_ratio": 0.5})
    scalars = read_scalars(tmp_path / "tb")
    assert [step for step, _ in scalars["reward/mean"]] == [1, 2, 3]
    assert [value for _, value in scalars["reward/mean"]] == pytest.approx([0.1, 0.2, 0.3], rel=1e-6)
    assert module.take_record() == {}


def test_metrics_before_an_exception_are_readable_after_it(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    with pytest.raises(RuntimeError, match="on fire"):
        trainer(tmp_path, [MetricWriter()], [board]).fit(FakeModule(fail_at=3), batches(5))
    assert [step for step, _ in read_scalars(tmp_path / "tb")["reward/mean"]] == [1, 2]


def test_flush_makes_logged_metrics_readable(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    seen = []

    class Checkpoint(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            MetricWriter.flush(trainer)
            seen.append(len(read_scalars(tmp_path / "tb")["reward/mean"]))

    trainer(tmp_path, [MetricWriter(), Checkpoint()], [board]).fit(FakeModule(), batches(3))
    assert seen == [1, 2, 3]
