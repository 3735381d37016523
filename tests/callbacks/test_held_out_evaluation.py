import csv

import numpy as np
import pytest
import torch
from small_run import FakeModule, batches, trainer

from vespo_lightning.callbacks.evaluation import HeldOutEvaluation
from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.metrics_csv import MetricsCsv
from vespo_lightning.diagnostics.evaluation import EvaluationResult
from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem


class Evaluated(FakeModule):
    """Solves ``curve[update]`` of ten problems."""

    def __init__(self, curve, **options):
        super().__init__(**options)
        self.curve = curve
        self.held_out_problems = [Problem(str(i), "?", "!") for i in range(10)]
        self.asked = []

    def evaluator(self, problems, samples_per_problem, temperature):
        self.asked.append((self.update, [problem.id for problem in problems], samples_per_problem, temperature))
        solved = np.arange(len(problems))[:, None] < self.curve[self.update]
        rewards = np.repeat(solved, samples_per_problem, axis=1).astype(float)
        return EvaluationResult(rewards, np.zeros(rewards.shape, dtype=bool), np.full(rewards.shape, 5))


def run(folder, module, callback, updates, **options):
    table = MetricsCsv(folder / "metrics.csv")
    fit = trainer(folder, [callback, MetricWriter()], [table], **options)
    fit.fit(module, batches(updates))
    with open(table.path, newline="") as file:
        return {int(row["update"]): row for row in csv.DictReader(file)}


def test_start_every_and_end_are_in_the_rows_of_their_updates(tmp_path):
    module = Evaluated(curve=[3, 0, 5, 0, 9, 7])
    callback = HeldOutEvaluation(every=2, problems=10)
    rows = run(tmp_path, module, callback, updates=5)
    accuracy = {update: row["eval/accuracy"] for update, row in rows.items()}
    assert accuracy == {0: "0.3", 1: "", 2: "0.5", 3: "", 4: "0.9", 5: "0.7"}
    assert rows[5]["reward/mean"] == "0.5"  # one row, not two
    assert rows[0]["eval/response_length"] == "5.0"
    assert float(rows[0]["performance/evaluate_seconds"]) > 0
    state = callback.state_dict()
    assert {key: (value["update"], value["accuracy"]) for key, value in state.items()} == {
        "first": (0, 0.3),
        "last": (5, 0.7),
        "best": (4, 0.9),
    }
    assert [asked[0] for asked in module.asked] == [0, 2, 4, 5]


def test_only_asked_for(tmp_path):
    module = Evaluated(curve=[3, 4, 5, 6])
    callback = HeldOutEvaluation(
        every=0, problems=4, samples_per_problem=2, temperature=0.7, at_start=False, at_end=True
    )
    rows = run(tmp_path, module, callback, updates=3)
    assert module.asked == [(3, ["0", "1", "2", "3"], 2, 0.7)]
    assert rows[3]["eval/pass_at_2"] == "1.0"
    quiet = Evaluated(curve=[3, 4, 5, 6])
    run(tmp_path, quiet, HeldOutEvaluation(every=0, problems=4, at_start=False, at_end=False), updates=3)
    assert quiet.asked == []


def test_a_run_that_stops_early_is_evaluated_at_its_end_in_the_same_row(tmp_path):
    module = Evaluated(curve=[3, 4, 8, 6])
    rows = run(tmp_path, module, HeldOutEvaluation(every=0, problems=10), updates=5, max_steps=2)
    assert rows.keys() == {0, 1, 2}
    assert (rows[2]["eval/accuracy"], rows[2]["reward/mean"]) == ("0.8", "0.2")


def test_resumed_run_does_not_evaluate_the_start_again_and_keeps_first_and_best(tmp_path):
    before = HeldOutEvaluation(every=1, problems=10)
    module = Evaluated(curve=[3, 9, 4, 5, 6])
    fit = trainer(tmp_path, [before, MetricWriter()])
    fit.fit(module, batches(2))
    fit.save_checkpoint(tmp_path / "two.ckpt")
    stored = torch.load(tmp_path / "two.ckpt", weights_only=True)["callbacks"]["HeldOutEvaluation"]
    after = HeldOutEvaluation(every=1, problems=10)
    after.load_state_dict(stored)
    resumed = Evaluated(curve=module.curve)
    resumed.update = 2
    trainer(tmp_path, [after, MetricWriter()]).fit(resumed, batches(4, start=2))
    assert [asked[0] for asked in resumed.asked] == [3, 4]
    state = after.state_dict()
    assert [state[key]["update"] for key in ("first", "last", "best")] == [0, 4, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every": -1, "problems": 4}, r"callbacks\.evaluation\.every=-1"),
        ({"every": 1, "problems": 0}, r"callbacks\.evaluation\.problems=0"),
        ({"every": 1, "problems": 4, "samples_per_problem": 0}, r"samples_per_problem=0"),
        ({"every": 1, "problems": 4, "samples_per_problem": 4}, "temperature=0 would write the same"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        HeldOutEvaluation(**options)


def test_more_problems_than_there_are(tmp_path):
    with pytest.raises(UserError, match="problems=11 is more than the 10 problems"):
        run(tmp_path, Evaluated(curve=[0, 0]), HeldOutEvaluation(every=1, problems=11), updates=1)
