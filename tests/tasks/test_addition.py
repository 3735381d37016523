import re

import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.addition import AdditionTask, is_held_out, operands, worked_addition


def test_worked_addition_writes_columns_and_carries():
    assert worked_addition(347, 582) == "7+2+0=09;4+8+0=12;3+5+1=09;#929"
    assert worked_addition(95, 95) == "5+5+0=10;9+9+1=19;#190"


@pytest.mark.parametrize("distractors", [0, 1, 6])
def test_problems_are_right_and_written_in_the_alphabet(distractors):
    task = AdditionTask(min_digits=2, max_digits=5, distractors=distractors)
    for index in range(300):
        problem = task.train_problem(seed=3, index=index)
        solution = task.solution(problem)
        assert set(problem.prompt) | set(solution) <= set("0123456789+=;#abcdefgh\n")
        assert len(re.findall(r"[a-h]=\d", problem.prompt)) == (distractors + 2 if distractors else 0)
        first, second = operands(problem)
        assert min(first, second) >= 10 and max(first, second) < 10**5
        assert len(str(first)) == len(str(second))
        assert problem.reference == str(first + second) == solution.rpartition("#")[2]


def test_distractor_prompt_asks_for_two_of_its_numbers():
    problem = AdditionTask(distractors=1).train_problem(seed=0, index=0)
    numbers = dict(re.findall(r"([a-h])=(\d+);", problem.prompt))
    left, right = re.fullmatch(r".*;([a-h])\+([a-h])=\n", problem.prompt).groups()
    assert set(numbers) == {"a", "b", "c"} and left != right
    assert problem.reference == str(int(numbers[left]) + int(numbers[right]))


def test_each_name_is_asked_for_about_equally_often():
    task = AdditionTask(distractors=2)
    asked = [re.search(r"([a-h])\+", task.train_problem(0, index).prompt).group(1) for index in range(800)]
    assert all(150 < asked.count(name) < 250 for name in "abcd")


def test_numbers_of_digits_are_drawn_uniformly():
    task = AdditionTask(min_digits=4, max_digits=8)
    counts = [len(str(operands(task.train_problem(0, index))[0])) for index in range(2000)]
    assert all(330 < counts.count(digits) < 470 for digits in range(4, 9))


def test_default_responses_have_40_to_130_tokens():
    task = AdditionTask()
    shortest = worked_addition(10 ** (task.min_digits - 1), 10 ** (task.min_digits - 1))
    longest = worked_addition(10**task.max_digits - 1, 10**task.max_digits - 1)
    assert (len(shortest) + 1, len(longest) + 1) == (42, 63)  # one token per character, and the end token
    lengths = [len(task.solution(task.train_problem(1, index))) + 1 for index in range(500)]
    assert min(lengths) >= 42 and max(lengths) <= 63


def test_train_problems_are_counted():
    task, again = AdditionTask(), AdditionTask()
    forwards = [task.train_problem(5, index) for index in range(50)]
    assert forwards == [again.train_problem(5, index) for index in reversed(range(50))][::-1]
    assert len({problem.id for problem in forwards}) == 50
    assert not {problem.id for problem in forwards} & {task.train_problem(6, index).id for index in range(50)}


@pytest.mark.parametrize("distractors", [0, 3])
def test_held_out_problems_are_disjoint_from_training(distractors):
    task = AdditionTask(min_digits=2, max_digits=3, distractors=distractors)
    held_out = task.held_out()
    pairs = {frozenset(operands(problem)) for problem in held_out}
    assert len(held_out) == len({problem.id for problem in held_out}) == len(pairs) == 512
    assert all(is_held_out(*operands(problem)) for problem in held_out)
    for seed in range(4):
        trained = [operands(task.train_problem(seed, index)) for index in range(1000)]
        assert not any(is_held_out(*pair) for pair in trained)
        assert not pairs & {frozenset(pair) for pair in trained}


def test_held_out_class_ignores_order_and_holds_one_in_eight():
    members = [is_held_out(a, b) for a in range(100, 160) for b in range(100, 160)]
    assert all(is_held_out(a, b) == is_held_out(b, a) for a in range(50) for b in range(50))
    assert 0.09 < sum(members) / len(members) < 0.16


def test_held_out_problems_do_not_change():
    assert [problem.id for problem in AdditionTask().held_out()[:3]] == [
        "256127+115164",
        "7723+1678",
        "179630+168006",
    ]
    assert AdditionTask(held_out_size=20).held_out() == AdditionTask().held_out()[:20]


def test_verify_is_exact():
    task = AdditionTask()
    problem = task.train_problem(0, 0)
    right = problem.reference
    responses = {
        task.solution(problem): 1.0,
        f"#{right}": 1.0,
        f"#1#{right}\n": 1.0,
        right: 0.0,
        "": 0.0,
        "#": 0.0,
        f"#0{right}": 0.0,
        f"#{right}#": 0.0,
        f"#{right};": 0.0,
        f"#+{right}": 0.0,
        f"#{int(right) + 1}": 0.0,
    }
    verdicts = task.verify([problem] * len(responses), list(responses))
    assert [verdict.reward for verdict in verdicts] == list(responses.values())
    assert all(verdict.error is None for verdict in verdicts)


def test_numbers_may_be_longer_than_64_bits():
    task = AdditionTask(min_digits=30, max_digits=30, held_out_size=1)
    first, second = operands(task.train_problem(0, 0))
    assert len(str(first)) == len(str(second)) == 30
    assert task.train_problem(0, 0).reference == str(first + second)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"min_digits": 0}, "task.min_digits=0"),
        ({"min_digits": 5, "max_digits": 4}, "task.max_digits=4"),
        ({"distractors": 7}, "task.distractors=7"),
        ({"distractors": -1}, "task.distractors=-1"),
        ({"held_out_size": 0}, "task.held_out_size=0"),
    ],
)
def test_bad_settings_are_named(settings, key):
    with pytest.raises(UserError, match=key):
        AdditionTask(**settings)


def test_too_many_held_out_problems_are_refused():
    with pytest.raises(UserError, match=r"task.held_out_size=512 .*raise task.max_digits"):
        AdditionTask(min_digits=1, max_digits=1).held_out()
