"""Multi-digit addition with written-out carries: problems without end, checked exactly."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem, Task, Verdict
from vespo_lightning.tasks.reward import judge_with, load_reward

_NAMES = "abcdefgh"
_HELD_OUT_ONE_IN = 8
_DRAWS_PER_HELD_OUT_PROBLEM = 100


def is_held_out(first: int, second: int) -> bool:
    """Whether a pair of operands, in either order, is of the one in eight that are never trained on."""
    pair = f"{min(first, second)}+{max(first, second)}".encode()
    return int.from_bytes(hashlib.blake2b(pair, digest_size=8).digest()) % _HELD_OUT_ONE_IN == 0


def worked_addition(first: int, second: int) -> str:
    """``347, 582`` -> ``7+2+0=09;4+8+0=12;3+5+1=09;#929``.

    One column per digit from the least significant, each ``digit+digit+carry=two-digit sum``. With D digits
    that is 9 D + 1 characters before an answer of D or D + 1.
    """
    columns, carry = [], 0
    for place in range(max(len(str(first)), len(str(second)))):
        a, b = first // 10**place % 10, second // 10**place % 10
        columns.append(f"{a}+{b}+{carry}={a + b + carry:02d};")
        carry = (a + b + carry) // 10
    return "".join(columns) + f"#{first + second}"


class AdditionTask(Task):
    """Add two numbers with the same number of digits, writing the carries down.

    Prompts are ``347+582=\\n``, or with distractors ``a=12;b=347;c=582;b+c=\\n``, where the policy has to
    find the numbers that are asked for. With the default 4 to 6 digits a worked response has 42 to 63
    characters, end token included. The answer is what follows the last ``#``; reward 1 where it is exactly
    the sum, else 0.

    A pair of operands is held out by a hash of its own, so training and held-out problems are disjoint for
    every seed, index, number of digits and of distractors.

    Args:
        min_digits: fewest digits of a number.
        max_digits: most digits of a number; the number of digits is drawn uniformly, then the numbers.
        distractors: named numbers in the prompt that are not asked for, 0 to 6. Their number of digits is
            drawn apart.
        held_out_size: number of held-out problems.
        reward: Python path of a reward function to use instead of the exact check.
        max_reward_errors: errors of that function after which the run stops; None bears all. Enforced by the
            caller.
    """

    name = "addition"

    def __init__(
        self,
        min_digits: int = 4,
        max_digits: int = 6,
        distractors: int = 0,
        held_out_size: int = 512,
        reward: str | None = None,
        max_reward_errors: int | None = None,
    ) -> None:
        if not 1 <= min_digits <= max_digits:
            raise UserError(
                f"task.min_digits={min_digits} and task.max_digits={max_digits} leave no numbers to add; "
                "use 1 <= min_digits <= max_digits"
            )
        if not 0 <= distractors <= len(_NAMES) - 2:
            raise UserError(f"task.distractors={distractors} is out of range; use 0 to {len(_NAMES) - 2}")
        if held_out_size < 1:
            raise UserError(f"task.held_out_size={held_out_size} leaves nothing to evaluate on; use 1 or more")
        self.min_digits = min_digits
        self.max_digits = max_digits
        self.distractors = distractors
        self.held_out_size = held_out_size
        self.max_reward_errors = max_reward_errors
        self._reward = load_reward(reward) if reward else None

    def train_problem(self, seed: int, index: int) -> Problem:
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, index])))
        while True:
            first, second = self._draw_operands(draws)
            if not is_held_out(first, second):
                return self._pose(first, second, draws)

    def held_out(self) -> Sequence[Problem]:
        """The same ``held_out_size`` different problems for every seed.

        Raises:
            UserError: numbers of these digits do not give that many held-out problems.
        """
        return self._held_out

    @functools.cached_property
    def _held_out(self) -> list[Problem]:
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence(0)))
        problems: dict[tuple[int, int], Problem] = {}
        for _ in range(_DRAWS_PER_HELD_OUT_PROBLEM * self.held_out_size):
            first, second = self._draw_operands(draws)
            if is_held_out(first, second):
                pair = (min(first, second), max(first, second))
                problems.setdefault(pair, self._pose(first, second, draws))
            if len(problems) == self.held_out_size:
                return list(problems.values())
        raise UserError(
            f"task.held_out_size={self.held_out_size} is more than numbers of {self.min_digits} to "
            f"{self.max_digits} digits give ({len(problems)} found); lower it or raise task.max_digits"
        )

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        if self._reward is not None:
            return judge_with(self._reward, problems, responses)
        return [
            Verdict(float("#" in response and response.rpartition("#")[2].strip() == problem.reference))
            for problem, response in zip(problems, responses, strict=True)
        ]

    def solution(self, problem: Problem) -> str:
        return worked_addition(*operands(problem))

    def _draw_operands(self, draws: np.random.Generator) -> tuple[int, int]:
        digits = int(draws.integers(self.min_digits, self.max_digits + 1))
        return _draw_number(draws, digits), _draw_number(draws, digits)

    def _pose(self, first: int, second: int, draws: np.random.Generator) -> Problem:
        question = f"{first}+{second}"
        if self.distractors:
            question = self._hide_among_distractors(first, second, draws)
        return Problem(id=question, prompt=f"{question}=\n", reference=str(first + second))

    def _hide_among_distractors(self, first: int, second: int, draws: np.random.Generator) -> str:
        names = _NAMES[: self.distractors + 2]
        digits = draws.integers(self.min_digits, self.max_digits + 1, size=len(names))
        numbers = {name: _draw_number(draws, int(count)) for name, count in zip(names, digits, strict=True)}
        left, right = (names[place] for place in draws.choice(len(names), size=2, replace=False))
        numbers |= {left: first, right: second}
        return "".join(f"{name}={number};" for name, number in numbers.items()) + f"{left}+{right}"


def operands(problem: Problem) -> tuple[int, int]:
    """The two numbers that a problem of this task asks to add."""
    *named, question = problem.id.split(";")
    values = dict(assignment.split("=") for assignment in named)
    left, right = question.split("+")
    return int(values.get(left, left)), int(values.get(right, right))


def _draw_number(draws: np.random.Generator, digits: int) -> int:
    # digit by digit, because numbers may be longer than 64 bits
    number = int(draws.integers(1, 10))
    for digit in draws.integers(0, 10, size=digits - 1):
        number = 10 * number + int(digit)
    return number
