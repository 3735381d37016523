"""A run that breaks and goes on from its checkpoint leaves the same files as one that never broke."""

import csv
import json

import numpy as np
import pytest
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_run import FakeModule, Loader, batches, trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vespo_lightning.callbacks.dashboard import Dashboard
from vespo_lightning.callbacks.evaluation import HeldOutEvaluation
from vespo_lightning.callbacks.event_files import cut_event_files, read_scalars
from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.metrics_csv import MetricsCsv
from vespo_lightning.callbacks.progress import Progress
from vespo_lightning.callbacks.sample_table import SampleTable
from vespo_lightning.callbacks.summary import RunSummary
from vespo_lightning.callbacks.throughput import Throughput
from vespo_lightning.diagnostics.evaluation import EvaluationResult
from vespo_lightning.tasks.base import Problem

UPDATES, SAVED_AT, BREAKS_AT = 10, 4, 8


class StatefulLoader(Loader):
    def __init__(self):
        super().__init__(batches(UPDATES, rollout_size=2).items)
        self.next = 0

    def __iter__(self):
        while self.next < len(self.items):
            self.next += 1
            yield self.items[self.next - 1]

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Evaluated(FakeModule):
    held_out_problems = [Problem(str(i), "?", "!") for i in range(4)]  # noqa: RUF012

    def evaluator(self, problems, samples_per_problem, temperature):
        rewards = np.array([[1.0], [0.0], [0.0], [float(self.update > 5)]])
        return EvaluationResult(rewards, rewards > 2, rewards.astype(int))


class SaveOnce(Checkpoint):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if module.update == SAVED_AT:
            MetricWriter.flush(trainer)
            trainer.save_checkpoint(f"{trainer.default_root_dir}/saved.ckpt")


def run(folder, fail_at=None, checkpoint=None):
    loggers = [
        MetricsCsv(folder / "metrics.csv"),
        TensorBoardLogger(folder, name="", version="tensorboard", default_hp_metric=False),
    ]
    callbacks = [
        Dashboard("seed: 1"),
        HeldOutEvaluation(every=3, problems=4),
        SampleTable(every=2, rows=2),
        Throughput(),
        MetricWriter(),
        RunSummary(),
        Progress(),
        SaveOnce(),
    ]
    options = {"enable_progress_bar": True, "enable_checkpointing": True}
    fit = trainer(folder, callbacks, loggers, **options)
    module = Evaluated(fail_at=fail_at)
    fit.fit(module, StatefulLoader(), ckpt_path=checkpoint, weights_only=True if checkpoint else None)


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [
            {name: text for name, text in row.items() if not name.startswith("performance/")}
            for row in csv.DictReader(file)
        ]


def scalars(folder):
    return {
        tag: values
        for tag, values in read_scalars(folder / "tensorboard").items()
        if not tag.startswith("performance/")
    }


def texts(folder, tag):
    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    return [(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors(f"{tag}/text_summary")]


@pytest.fixture
def folders(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole)
    with pytest.raises(RuntimeError, match="on fire"):
        run(broken, fail_at=BREAKS_AT)
    assert json.loads((broken / "summary.json").read_text())["status"] == "failed"
    assert rows(broken)[-1]["update"] == str(BREAKS_AT - 1)
    MetricsCsv(broken / "metrics.csv").truncate(SAVED_AT)
    cut_event_files(broken / "tensorboard", SAVED_AT)
    run(broken, checkpoint=broken / "saved.ckpt")
    return whole, broken


def test_files_are_those_of_a_run_that_never_broke(folders):
    whole, broken = folders
    assert len(rows(whole)) == UPDATES + 1  # update 0 is the evaluation before the first
    assert rows(broken) == rows(whole)
    assert scalars(broken) == scalars(whole)
    assert (broken / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    for tag in ("samples", "config"):
        assert texts(broken, tag) == texts(whole, tag)
    assert [step for step, _ in texts(whole, "samples")] == [2, 4, 6, 8, 10]


def test_summary_is_that_of_the_whole_run(folders):
    whole, broken = (json.loads((folder / "summary.json").read_text()) for folder in folders)
    for summary in (whole, broken):
        for wall_clock in ("wall_seconds", "samples_per_second"):
            assert summary.pop(wall_clock) > 0
        assert summary["seconds_by_phase"].keys() == {"evaluate", "update"}
        assert summary["seconds_by_phase"].pop("evaluate") > 0
    assert broken == whole
    assert whole["updates"] == UPDATES
    assert [whole["held_out_accuracy"][key]["update"] for key in ("first", "last", "best")] == [0, 10, 6]
