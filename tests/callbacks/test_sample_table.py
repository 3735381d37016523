import html
import json
import re

import pytest
from lightning.pytorch.loggers import TensorBoardLogger
from small_run import LOG_RATIO, FakeModule, batches, mini_batch, sample, trainer, update_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

from vespo_lightning.callbacks.sample_table import SampleTable, cut_samples, markdown_table, sample_rows
from vespo_lightning.errors import UserError


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_say_what_the_sample_was():
    batch = mini_batch(update=3, groups=4)
    rows = sample_rows(FakeModule(), update_result(batch, version=5), count=3)
    assert [row["prompt_id"] for row in rows] == ["sum-0", "sum-2", "sum-3"]  # samples 0, 4, 7 of 8
    assert rows[2] == {
        "prompt_id": "sum-3",
        "prompt": "ids 3 65 66",
        "response": "4",
        "reference": None,
        "reward": 1.0,
        "advantage": 1.0,
        "lag": 5,
        "log_w": pytest.approx(2 * LOG_RATIO),
        "finish_reason": "stop",
    }
    assert len(sample_rows(FakeModule(), update_result(batch, version=5), count=50)) == 8


@pytest.mark.parametrize(
    "text",
    [
        "a | b || c",
        "*x* _y_ `z` **w**",
        "<b>&amp;</b> [l](u) \\(x^2\\)",
        "12\n-----\n= 7 # no title",
        "é 漢 𝛑",
    ],
)
def test_tensorboard_shows_responses_as_they_are(text):
    batch = mini_batch(0)
    batch.samples[0] = sample(0, 0, text)
    table = markdown_table(sample_rows(FakeModule(), update_result(batch, 1), count=1))
    shown = markdown_to_safe_html(table)
    cells = re.findall(r"<td>(.*?)</td>", shown, flags=re.DOTALL)
    assert len(cells) == 8
    assert html.unescape(cells[1].replace("<br>", "\n")) == text


def test_written_every_so_many_updates(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    trainer(tmp_path, [SampleTable(every=2, rows=3)], [board]).fit(FakeModule(), batches(5))
    assert [row["update"] for row in lines(tmp_path / "samples.jsonl")] == [2, 2, 2, 4, 4, 4]
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"tensors": 0}).Reload()
    assert [event.step for event in events.Tensors("samples/text_summary")] == [2, 4]


def test_works_without_tensorboard_and_starts_a_new_file_for_a_new_run(tmp_path):
    for _ in range(2):
        trainer(tmp_path, [SampleTable(every=1, rows=1)]).fit(FakeModule(), batches(3))
    assert [row["update"] for row in lines(tmp_path / "samples.jsonl")] == [1, 2, 3]


def test_cut_for_a_resumed_run(tmp_path):
    path = tmp_path / "samples.jsonl"
    path.write_text('{"update": 2, "response": "a\\nb"}\n{"update": 4}\n{"update": 6}\n{"upda')
    cut_samples(path, last_update=4)
    assert path.read_text() == '{"update": 2, "response": "a\\nb"}\n{"update": 4}\n'
    cut_samples(tmp_path / "missing.jsonl", last_update=4)
    assert not (tmp_path / "missing.jsonl").exists()


def test_resumed_run_repeats_the_lines_of_the_killed_one(tmp_path):
    trainer(tmp_path, [SampleTable(every=1, rows=2)]).fit(FakeModule(), batches(4))
    whole = (tmp_path / "samples.jsonl").read_bytes()
    module = FakeModule()
    module.update = module.policy_version = 2
    trainer(tmp_path, [SampleTable(every=1, rows=2)]).fit(module, batches(4, start=2))
    assert (tmp_path / "samples.jsonl").read_bytes() == whole


def test_bad_numbers():
    with pytest.raises(UserError, match=r"callbacks\.sample_table\.every=0"):
        SampleTable(every=0, rows=1)
    with pytest.raises(UserError, match=r"callbacks\.sample_table\.rows=0"):
        SampleTable(every=1, rows=0)
