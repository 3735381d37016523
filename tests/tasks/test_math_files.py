import json
from collections import Counter

import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Verdict
from vespo_lightning.tasks.math_files import MathFileTask


def write_sums(path, numbers):
    path.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in numbers))
    return str(path)


def prompts(problems):
    return {problem.prompt for problem in problems}


def test_epochs_are_seeded_permutations(tmp_path):
    task = MathFileTask(write_sums(tmp_path / "sums.jsonl", range(40)), held_out_size=10)
    assert task.epoch_size == 30
    epochs = [[task.train_problem(1, 30 * epoch + place).id for place in range(30)] for epoch in range(3)]
    assert all(len(set(epoch)) == 30 for epoch in epochs)
    assert set(epochs[0]) == set(epochs[1]) == set(epochs[2])
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert epochs[0] != [task.train_problem(2, place).id for place in range(30)]
    assert epochs[2][7] == MathFileTask(str(tmp_path / "sums.jsonl"), held_out_size=10).train_problem(1, 67).id


def test_held_out_split_is_disjoint_and_does_not_depend_on_the_order(tmp_path):
    task = MathFileTask(write_sums(tmp_path / "a.jsonl", range(60)), held_out_size=20)
    trained = {task.train_problem(0, index).prompt for index in range(2 * task.epoch_size)}
    assert len(prompts(task.held_out())) == 20 and len(trained) == 40
    assert not prompts(task.held_out()) & trained
    reverse = MathFileTask(write_sums(tmp_path / "b.jsonl", reversed(range(60))), held_out_size=20)
    assert prompts(reverse.held_out()) == prompts(task.held_out())
    smaller = MathFileTask(str(tmp_path / "a.jsonl"), held_out_size=5)
    assert prompts(smaller.held_out()) < prompts(task.held_out())


def test_held_out_file_is_never_trained_on(tmp_path):
    training = tmp_path / "train.jsonl"
    write_sums(training, range(20))
    with training.open("a") as file:  # a held-out question in other letters, and one asked twice
        file.write(json.dumps({"question": " 25  + 1? ", "answer": "26"}) + "\n")
        file.write(json.dumps({"question": "3 + 1?", "answer": "4"}) + "\n")
    held_out = write_sums(tmp_path / "test.jsonl", range(15, 30))
    task = MathFileTask(str(training), held_out_path=held_out, held_out_size=4)
    trained = Counter(task.train_problem(0, index).prompt for index in range(task.epoch_size))
    assert trained == {f"{n} + 1?": 1 for n in range(15)}
    assert len(task.held_out()) == 4 and prompts(task.held_out()) < {f"{n} + 1?" for n in range(15, 30)}
    everything = MathFileTask(str(training), held_out_path=held_out, held_out_size=None)
    assert [problem.id for problem in everything.held_out()] == [f"held_out/{row}" for row in range(15)]


def test_ids_are_unique_and_name_the_row(tmp_path):
    held_out = write_sums(tmp_path / "test.jsonl", [7, 7, 8])
    task = MathFileTask(write_sums(tmp_path / "train.jsonl", range(5)), held_out_path=held_out)
    assert [problem.id for problem in task.held_out()] == ["held_out/0", "held_out/1", "held_out/2"]
    problem = task.train_problem(0, 0)
    assert problem.prompt == f"{problem.id.removeprefix('train/')} + 1?"


def test_prompt_with_instruction_and_system_message(tmp_path):
    path = write_sums(tmp_path / "sums.jsonl", [5, 6])
    plain = MathFileTask(path, held_out_size=1, instruction="Think.")
    assert {problem.prompt for problem in [plain.train_problem(0, 0), *plain.held_out()]} == {
        "5 + 1?\nThink.",
        "6 + 1?\nThink.",
    }
    chat = MathFileTask(path, held_out_size=1, system_prompt="Be brief.").held_out()[0]
    assert chat.prompt[0] == {"role": "system", "content": "Be brief."}
    assert chat.prompt[1] == {"role": "user", "content": f"{int(chat.reference) - 1} + 1?"}


def test_verify_and_close(fixtures):
    task = MathFileTask(
        None, held_out_path=str(fixtures / "problem_solution.jsonl"), held_out_size=None, verify_timeout_s=20
    )
    sum_, root = task.held_out()
    responses = ["\\boxed{\\frac{10}{12}}", "#### \\sqrt{12}", "\\boxed{\\frac{5}{7}}", ""]
    verdicts = task.verify([sum_, root, sum_, root], responses)
    assert verdicts == [Verdict(1.0), Verdict(1.0), Verdict(0.0), Verdict(0.0)]
    assert task.timeouts == 0
    task.close()
    task.close()


def test_evaluation_only_has_nothing_to_train_on(fixtures):
    task = MathFileTask(None, held_out_path=str(fixtures / "gsm8k_format.jsonl"))
    assert [problem.reference for problem in task.held_out()] == ["38", "3,450", "-7", "2.25"]
    with pytest.raises(UserError, match=r"task\.path=null"):
        task.train_problem(0, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path": None}, "task.path=null needs task.held_out_path"),
        ({"held_out_size": None}, "task.held_out_size=null needs task.held_out_path"),
        ({"held_out_size": 0}, "task.held_out_size=0"),
        ({"held_out_size": 4}, "no question left to train on"),
        ({"verify_timeout_s": 0}, "task.verify_timeout_s=0"),
        ({"held_out_path": "missing.jsonl"}, "task.held_out_path=missing.jsonl does not exist"),
        ({"question_field": "problem"}, "task.question_field=problem"),
    ],
)
def test_bad_settings_are_named(fixtures, settings, message):
    with pytest.raises(UserError, match=message):
        MathFileTask(**{"path": str(fixtures / "gsm8k_format.jsonl"), **settings})
