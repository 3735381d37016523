import sys

import lightning as L
from small_run import FakeModule, batches, trainer

from vespo_lightning.callbacks.metric_writer import MetricWriter
from vespo_lightning.callbacks.progress import Progress


class Recorder(L.Callback):
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        module.record({"importance/ess_ratio": 0.987654, "staleness/lag_mean": 3.5, "other/thing": 1.0})


def run(folder, progress, updates=4):
    options = {"enable_progress_bar": True}
    trainer(folder, [Recorder(), progress, MetricWriter()], **options).fit(FakeModule(), batches(updates))


def test_plain_lines_without_a_terminal(tmp_path, capsys):
    progress = Progress(every_seconds=3600)
    assert not progress.on_terminal
    run(tmp_path, progress)
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line.startswith("update")] == [
        "update 1/4  reward 0.1  ESS 0.988  lag 3.5",
        "update 4/4  reward 0.4  ESS 0.988  lag 3.5",
    ]
    assert "\r" not in shown


def test_a_line_as_often_as_asked(tmp_path, capsys):
    run(tmp_path, Progress(every_seconds=0))
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in shown if line.startswith("update ")] == ["1/4", "2/4", "3/4", "4/4"]


def test_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    progress = Progress()
    run(tmp_path, progress)
    shown = capsys.readouterr().out
    last = shown.split("\r")[-1]
    assert last.startswith("updates: 100%") and "4/4" in last
    assert "reward=0.4" in last and "ESS=0.988" in last and "lag=3.5" in last
    assert "other" not in shown and "v_num" not in shown
    assert "update 1/4" not in shown
