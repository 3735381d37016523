import sys

import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.tasks.base import Verdict
from vespo_lightning.tasks.math_files import MathFileTask
from vespo_lightning.tasks.reward import load_reward


@pytest.fixture(autouse=True)
def own_rewards(tmp_path, monkeypatch):
    (tmp_path / "own_rewards.py").write_text(
        "def half_length(prompt, response, reference):\n    return len(response) / 2\n"
        "def with_reference(prompt, response, reference):\n"
        "    return prompt.endswith('=\\n') and response == reference\n"
        "def moody(prompt, response, reference):\n"
        "    if response == 'raise':\n        raise KeyError('lost')\n"
        "    return {'nan': float('nan'), 'inf': float('inf'), 'none': None}.get(response, 0.25)\n"
        "NUMBER = 3\n"
    )
    (tmp_path / "broken_rewards.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("own_rewards", None)


def test_addition_takes_a_reward_function():
    task = AdditionTask(reward="own_rewards.with_reference")
    problem = task.train_problem(0, 0)
    assert task.verify([problem] * 2, [problem.reference, "1"]) == [Verdict(1.0), Verdict(0.0)]


def test_math_files_take_a_reward_function(fixtures):
    task = MathFileTask(str(fixtures / "gsm8k_format.jsonl"), held_out_size=1, reward="own_rewards.half_length")
    assert task.verify([task.train_problem(0, 0)], ["four!"]) == [Verdict(2.5)]


def test_errors_name_the_problem_and_the_batch_goes_on():
    task = AdditionTask(reward="own_rewards.moody", max_reward_errors=3)
    problem = task.train_problem(0, 0)
    verdicts = task.verify([problem] * 5, ["raise", "nan", "inf", "none", "fine"])
    assert [verdict.reward for verdict in verdicts] == [0.0, 0.0, 0.0, 0.0, 0.25]
    assert verdicts[0].error == f"problem {problem.id}: the reward function raised KeyError: 'lost'"
    assert verdicts[1].error == f"problem {problem.id}: the reward function returned nan"
    assert verdicts[2].error == f"problem {problem.id}: the reward function returned inf"
    assert f"problem {problem.id}: the reward function raised TypeError" in verdicts[3].error
    assert verdicts[4].error is None
    assert task.max_reward_errors == 3


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("half_length", "task.reward=half_length is not a Python path"),
        ("no_such_module.reward", "task.reward=no_such_module.reward cannot be imported"),
        ("broken_rewards.reward", "no_such_package"),
        ("own_rewards.typo", "own_rewards has no function typo"),
        ("own_rewards.NUMBER", "own_rewards has no function NUMBER"),
    ],
)
def test_bad_paths_are_named(path, message):
    with pytest.raises(UserError, match=message):
        load_reward(path)
