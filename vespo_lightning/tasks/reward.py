"""A reward function of the user's own, named in config as ``task.reward: my_module.my_function``."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem, PromptText, Verdict

#: ``(prompt, response, reference) -> reward``. The prompt is what the problem holds: text or chat messages.
RewardFunction = Callable[[PromptText, str, str], float]


def load_reward(path: str) -> RewardFunction:
    """The function that ``path`` names, ``package.module.function``.

    Raises:
        UserError: nothing callable can be imported under that name.
    """
    module_name, _, function_name = path.rpartition(".")
    if not module_name:
        raise UserError(f"task.reward={path} is not a Python path; write it as my_module.my_function")
    try:
        function = getattr(importlib.import_module(module_name), function_name, None)
    except Exception as error:  # whatever the user's module does at import
        raise UserError(
            f"task.reward={path} cannot be imported ({type(error).__name__}: {error}); "
            "check the name, and that its folder is on PYTHONPATH"
        ) from error
    if not callable(function):
        raise UserError(f"task.reward={path}: {module_name} has no function {function_name}; check the name")
    return function


def judge_with(function: RewardFunction, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
    """Verdicts of the user's function, called in this process, one by one and without a deadline.

    An exception, or a reward that is no finite number, becomes a verdict with reward 0 and an error that
    names the problem; nothing is raised. How many of those a run bears is ``task.max_reward_errors``.
    """
    return [_judge_one(function, problem, response) for problem, response in zip(problems, responses, strict=True)]


def _judge_one(function: RewardFunction, problem: Problem, response: str) -> Verdict:
    try:
        reward = float(function(problem.prompt, response, problem.reference))
    except Exception as error:
        return Verdict(0.0, f"problem {problem.id}: the reward function raised {type(error).__name__}: {error}")
    if not math.isfinite(reward):
        return Verdict(0.0, f"problem {problem.id}: the reward function returned {reward}")
    return Verdict(reward)
