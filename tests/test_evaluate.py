"""`python evaluate.py`: the same figures for the same weights, however they are named, and for any question file."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from finished_run import Run, finished_run
from run_entry_point import Ended, run_entry_point

from vespo_lightning.callbacks.event_files import read_scalars
from vespo_lightning.config import load_resolved

TINY = "model.path=builtin:tiny-addition-moe"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A copy, because evaluations are logged in the run."""
    finished = finished_run(tmp_path_factory)
    return Run(shutil.copytree(finished.folder, tmp_path_factory.mktemp("evaluated") / "run"), finished.ended)


def evaluate(folder: Path, *argv: str) -> tuple[dict[str, float], Ended]:
    """The content of evaluation.json, and what was printed."""
    ended = run_entry_point("evaluate.py", [*argv, f"hydra.run.dir={folder / 'evaluation'}"], folder)
    assert (ended.code, ended.err) == (0, "")
    return json.loads((folder / "evaluation" / "evaluation.json").read_text()), ended


def figures(report: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in report.items() if name.startswith("eval/")}


def test_all_three_ways_to_name_the_weights_give_the_accuracy_of_the_run(run: Run, tmp_path: Path) -> None:
    checkpoint = run.folder / "checkpoints" / "update-000008.ckpt"
    by_run, _ = evaluate(tmp_path / "run", f"run={run.folder}", "problems=32")
    by_checkpoint, _ = evaluate(tmp_path / "checkpoint", f"checkpoint={checkpoint}", "problems=32")
    by_path, _ = evaluate(tmp_path / "path", f"model.path={run.folder / 'export'}", "problems=32", "max_new_tokens=72")
    assert figures(by_run) == figures(by_checkpoint) == figures(by_path)
    row = run.metrics().loc[8]
    assert figures(by_run) == {name: row[name] for name in figures(by_run)}
    assert by_run["evaluated"] == str(checkpoint)


def test_an_older_checkpoint_gives_its_own_accuracy_and_is_logged_in_the_run(run: Run, tmp_path: Path) -> None:
    checkpoint = run.folder / "checkpoints" / "update-000004.ckpt"
    report, _ = evaluate(tmp_path, f"checkpoint={checkpoint}", "problems=32")
    assert report["eval/accuracy"] == run.metrics()["eval/accuracy"][4]
    logged = dict(read_scalars(run.folder / "tensorboard")["evaluate/accuracy"])
    assert logged[4] == pytest.approx(report["eval/accuracy"])


def test_sampled_responses_give_pass_at_k(tmp_path: Path) -> None:
    report, ended = evaluate(tmp_path, TINY, "problems=24", "samples_per_problem=4", "temperature=1.0")
    assert (report["problems"], report["samples_per_problem"], report["task"]) == (24, 4, "AdditionTask")
    assert report["eval/accuracy"] < report["eval/pass_at_2"] < report["eval/pass_at_4"] <= 1
    # avg@4 and pass@4 of 24 problems are multiples of 1/96 and 1/24
    assert (report["eval/accuracy"] * 96) == pytest.approx(round(report["eval/accuracy"] * 96))
    assert (report["eval/pass_at_4"] * 24) == pytest.approx(round(report["eval/pass_at_4"] * 24))
    assert 0 <= report["eval/ci_low"] < report["eval/accuracy"] < report["eval/ci_high"] <= 1
    shown = re.search(r"^avg@4 +([\d.]+) \(95 % interval ([\d.]+) \.\. ([\d.]+)\)$", ended.out, re.MULTILINE)
    assert shown and [float(number) for number in shown.groups()] == pytest.approx(
        [report["eval/accuracy"], report["eval/ci_low"], report["eval/ci_high"]], abs=1e-4
    )
    again, _ = evaluate(tmp_path / "again", TINY, "problems=24", "samples_per_problem=4", "temperature=1.0")
    assert figures(again) == figures(report)
    other, _ = evaluate(tmp_path / "other", TINY, "problems=24", "samples_per_problem=4", "temperature=1.0", "seed=9")
    assert other["eval/response_length"] != report["eval/response_length"]


def test_what_is_typed_goes_before_what_the_run_had(run: Run, tmp_path: Path) -> None:
    report, _ = evaluate(tmp_path, f"run={run.folder}", "problems=8", "max_new_tokens=20", "task.max_digits=7")
    assert (report["eval/response_length"], report["eval/truncated_share"]) == (20, 1)
    stored = load_resolved(tmp_path / "evaluation")
    assert (stored.task.min_digits, stored.task.max_digits, stored.max_new_tokens) == (4, 7, 20)


# ---- question files --------------------------------------------------------------------------------------------

#: Invented problems in the formats that the benchmarks are shared in.
FORMATS = {
    "aime.jsonl": [{"id": 1, "problem": "Find 7 times 9.", "solution": "It is $\\boxed{63}$.", "answer": "63"}],
    "amc.json": [{"id": 1, "problem": "Find 2 plus 2.", "answer": 4.0, "question": "Find 2 plus 2."}] * 2,
    "gsm8k.jsonl": [{"question": "Ida has 3 hats and buys 4.", "answer": "3 + 4 = <<3+4=7>>7\n#### 7"}] * 3,
    "math.jsonl": [{"problem": "Find $x$ in $2x=8$.", "solution": "Halve it: $\\boxed{4}$"}],
}


@pytest.mark.parametrize("name", list(FORMATS))
def test_question_files_of_every_format(name: str, tmp_path: Path) -> None:
    rows = FORMATS[name]
    text = json.dumps(rows) if name.endswith(".json") else "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_text(text)
    report, _ = evaluate(
        tmp_path, TINY, "task=math", "task.path=null", f"task.held_out_path={tmp_path / name}",
        "task.held_out_size=null", "max_new_tokens=8",
    )  # fmt: skip
    assert (report["task"], report["problems"]) == ("MathFileTask", len(rows))
    assert report["eval/accuracy"] == 0 and report["eval/response_length"] <= 8


def test_a_file_with_an_answer_that_the_policy_gives(tmp_path: Path) -> None:
    """The whole path with a reward of 1: the tiny policy adds, and its ``#579`` is judged by a reward function."""
    (tmp_path / "last_number.py").write_text(
        "def reward(prompt, response, reference):\n    return response.rpartition('#')[2].strip() == reference\n"
    )
    sums = [(2145 + 17 * n, 1032 + 5 * n) for n in range(12)]
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{a}+{b}=", "answer": str(a + b)}) + "\n" for a, b in sums))
    report, _ = evaluate(
        tmp_path, TINY, "task=math", "task.path=null", f"task.held_out_path={file}", "task.held_out_size=null",
        "task.instruction=''", "task.reward=last_number.reward",
    )  # fmt: skip
    assert report["eval/accuracy"] > 0.2
