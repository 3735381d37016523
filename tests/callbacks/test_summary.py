import json
import math

import lightning as L
import pytest
import torch
from small_run import FakeModule, batches, trainer

from vespo_lightning.callbacks import summary as summary_module
from vespo_lightning.callbacks.evaluation import HeldOutEvaluation
from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.summary import RunSummary, format_table


class Recorder(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        row = {"performance/update_seconds": 0.5}
        if module.update % 2:
            row |= {"mismatch/k3_kl": 0.01 * module.update, "performance/generate_seconds": 2.0}
        module.record(row)


def callbacks(**options):
    return [RunSummary(**options), Recorder(), MetricWriter()]


def written(folder):
    return json.loads((folder / "summary.json").read_text())


def test_figures_of_a_finished_run(tmp_path):
    trainer(tmp_path, callbacks(config_hash="abc123")).fit(FakeModule(skip_at=3), batches(20))
    summary = written(tmp_path)
    assert (summary["status"], summary["error"], summary["config_hash"]) == ("finished", None, "abc123")
    assert (summary["updates"], summary["skipped_updates"], summary["samples"]) == (20, 1, 80)
    assert summary["reward"] == {
        "first": pytest.approx(0.45),
        "last": pytest.approx(1.65),
    }  # 1..8 and 13..20 tenths
    assert summary["mismatch"] == {"mismatch/k3_kl": pytest.approx(0.19)}
    assert summary["seconds_by_phase"] == {"generate": 20.0, "update": 10.0}
    assert summary["held_out_accuracy"] is None
    assert summary["samples_per_second"] == pytest.approx(80 / summary["wall_seconds"])
    assert summary["versions"]["torch"] == torch.__version__
    assert summary["versions"]["lightning"] == L.__version__


@pytest.mark.parametrize(
    ("error", "raised", "status"),
    [(ValueError("no"), ValueError, "failed"), (KeyboardInterrupt(), SystemExit, "interrupted")],
)
def test_a_run_that_breaks_says_so(tmp_path, error, raised, status):
    with pytest.raises(raised):
        trainer(tmp_path, callbacks()).fit(FakeModule(fail_at=4, error=error), batches(9))
    summary = written(tmp_path)
    assert summary["status"] == status
    assert summary["error"] == (str(error) or "KeyboardInterrupt()")
    assert summary["updates"] == 3
    assert summary["reward"]["last"] == pytest.approx(0.2)


def test_resumed_run_sums_up_the_whole_run(tmp_path):
    first = callbacks()
    fit = trainer(tmp_path, first)
    fit.fit(FakeModule(skip_at=2), batches(6))
    fit.save_checkpoint(tmp_path / "six.ckpt")
    state = torch.load(tmp_path / "six.ckpt", weights_only=True)["callbacks"]["RunSummary"]
    second = callbacks()
    second[0].load_state_dict(state)
    module = FakeModule()
    module.update = 6
    trainer(tmp_path, second).fit(module, batches(10, start=6))
    summary = written(tmp_path)
    assert (summary["updates"], summary["skipped_updates"], summary["samples"]) == (10, 1, 40)
    assert summary["reward"] == {"first": pytest.approx(0.45), "last": pytest.approx(0.65)}
    assert summary["seconds_by_phase"] == {"generate": 10.0, "update": 5.0}
    assert summary["wall_seconds"] > state["totals"]["wall_seconds"] > 0


def test_numbers_that_json_does_not_have_become_null(tmp_path):
    callback = RunSummary()
    fit = trainer(tmp_path, [callback])
    callback.on_row(fit, FakeModule(), 1, {"mismatch/k3_kl": math.nan, "reward/mean": math.inf})
    callback.on_fit_end(fit, FakeModule())
    assert written(tmp_path)["mismatch"] == {"mismatch/k3_kl": None}
    assert written(tmp_path)["reward"]["first"] is None


def test_an_old_summary_survives_a_failing_write(tmp_path, monkeypatch):
    (tmp_path / "summary.json").write_text("{}")
    callback = RunSummary()
    fit = trainer(tmp_path, [callback])
    monkeypatch.setattr(summary_module, "git_commit", lambda: object())  # cannot be written as JSON
    with pytest.raises(TypeError):
        callback.on_fit_end(fit, FakeModule())
    assert (tmp_path / "summary.json").read_text() == "{}"


def test_table(tmp_path):
    evaluation = HeldOutEvaluation(every=1, problems=1)
    figure = {"update": 0, "accuracy": 0.33, "ci_low": 0.29, "ci_high": 0.37}
    evaluation.load_state_dict({"first": figure, "last": figure | {"update": 9}, "best": figure | {"accuracy": 0.91}})
    callback = RunSummary()
    fit = trainer(tmp_path, [callback, evaluation])
    row = {"mismatch/k3_kl": 1.5e-9, "reward/mean": 0.25, "performance/generate_seconds": 12.0}
    callback.on_row(fit, FakeModule(), 1, row)
    table = format_table(callback.summary(fit, "finished"))
    assert table.splitlines() == [
        "status                    finished",
        "updates                   0, 0 of them skipped",
        "samples                   0",
        "reward                    0.25 -> 0.25 (mean of the first and the last 8 updates)",
        "held-out accuracy, first  0.330 at update 0 (95 % interval 0.290 .. 0.370)",
        "held-out accuracy, last   0.330 at update 9 (95 % interval 0.290 .. 0.370)",
        "held-out accuracy, best   0.910 at update 0 (95 % interval 0.290 .. 0.370)",
        "mismatch, k3 KL           1.5e-09",
        "time                      0 s (generate 12 s)",
    ]
