"""Mathematics problems from question/answer files, answers checked by math-verify."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Problem, PromptText, Task, Verdict
from vespo_lightning.tasks.question_files import Fields, Question, read_questions
from vespo_lightning.tasks.reward import judge_with, load_reward
from vespo_lightning.tasks.verifier import AnswerVerifier


class MathFileTask(Task):
    """Questions of a file, a folder or a hub data set; reward 1 for the right final answer, else 0.

    Training goes through the questions in epochs, each in an order of its own that the run's seed decides. No
    question whose text (case and blanks aside) is in the held-out source is trained on, and every question is
    posed once per epoch, however often the file repeats it.

    Args:
        path: .jsonl, .json or .parquet file, folder, or hub name of the training questions. None: evaluation
            only.
        split: its split, for folders and hub data sets.
        subset: configuration of a hub data set, of both paths.
        held_out_path: source of the held-out questions. None: ``held_out_size`` questions of ``path``, chosen
            by a hash of their text, whatever their order.
        held_out_split: its split, for folders and hub data sets.
        held_out_size: number of held-out questions. None: all of ``held_out_path``. With fewer, they are
            chosen by hash; those left over are not trained on either.
        system_prompt: system message; the prompt is then a list of messages.
        instruction: text after each question, on a line of its own.
        question_field: field with the question; None detects it.
        answer_field: field with the answer; None detects it.
        verify_timeout_s: seconds that math-verify may take for one answer before it is killed.
        reward: Python path of a reward function to use instead of math-verify.
        max_reward_errors: verdicts with an error after which the run stops; None bears all. Enforced by the
            caller.

    Raises:
        UserError: a source is missing, empty or of unknown format, or nothing is left to train on.
    """

    name = "math"

    def __init__(
        self,
        path: str | None,
        split: str = "train",
        subset: str | None = None,
        held_out_path: str | None = None,
        held_out_split: str = "test",
        held_out_size: int | None = 512,
        system_prompt: str | None = None,
        instruction: str | None = None,
        question_field: str | None = None,
        answer_field: str | None = None,
        verify_timeout_s: float = 5.0,
        reward: str | None = None,
        max_reward_errors: int | None = None,
    ) -> None:
        if path is None and held_out_path is None:
            raise UserError("task.path=null needs task.held_out_path; name the file with the questions")
        if held_out_path is None and held_out_size is None:
            raise UserError("task.held_out_size=null needs task.held_out_path; set a number to split task.path by")
        if held_out_size is not None and held_out_size < 1:
            raise UserError(f"task.held_out_size={held_out_size} leaves nothing to evaluate on; use 1 or more")
        if verify_timeout_s <= 0:
            raise UserError(f"task.verify_timeout_s={verify_timeout_s} gives no time; use a few seconds")
        self.max_reward_errors = max_reward_errors
        self._system_prompt = system_prompt
        self._instruction = instruction
        self._reward = load_reward(reward) if reward else None
        self._verifier = AnswerVerifier(verify_timeout_s)

        fields = Fields(question_field, answer_field)
        questions = read_questions(path, split, subset, fields) if path is not None else []
        if held_out_path is not None:
            source = read_questions(held_out_path, held_out_split, subset, fields, key="task.held_out_path")
            held_out = _smallest_hashes(source, held_out_size)
            never = {_same_text(question.text) for question in source}
        else:
            held_out = _smallest_hashes(_without_repeats(questions), held_out_size)
            never = {_same_text(question.text) for question in held_out}
        training = [q for q in _without_repeats(questions) if _same_text(q.text) not in never]
        if path is not None and not training:
            raise UserError(
                f"task.path={path} has no question left to train on beside the held-out ones; "
                "lower task.held_out_size or name another task.held_out_path"
            )
        self._training = [self._problem("train", question) for question in training]
        self._held_out = [self._problem("held_out", question) for question in held_out]
        self._order = functools.lru_cache(maxsize=2)(self._epoch_order)

    @property
    def epoch_size(self) -> int:
        """Number of training problems."""
        return len(self._training)

    @property
    def timeouts(self) -> int:
        """Answers that math-verify did not judge in time, so far."""
        return self._verifier.timeouts

    def train_problem(self, seed: int, index: int) -> Problem:
        if not self._training:
            raise UserError("task.path=null leaves nothing to train on; name a file with training questions")
        epoch, place = divmod(index, len(self._training))
        return self._training[self._order(seed, epoch)[place]]

    def held_out(self) -> Sequence[Problem]:
        return self._held_out

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        if self._reward is not None:
            return judge_with(self._reward, problems, responses)
        return self._verifier.verify(problems, responses)

    def close(self) -> None:
        self._verifier.close()

    def _epoch_order(self, seed: int, epoch: int) -> np.ndarray:
        draws = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        return draws.permutation(len(self._training))

    def _problem(self, source: str, question: Question) -> Problem:
        text = question.text if self._instruction is None else f"{question.text}\n{self._instruction}"
        prompt: PromptText = text
        if self._system_prompt is not None:
            prompt = [{"role": "system", "content": self._system_prompt}, {"role": "user", "content": text}]
        return Problem(id=f"{source}/{question.row}", prompt=prompt, reference=question.answer)


def _same_text(text: str) -> str:
    return " ".join(text.casefold().split())


def _without_repeats(questions: Sequence[Question]) -> list[Question]:
    first = {_same_text(question.text): question for question in reversed(questions)}
    return sorted(first.values(), key=lambda question: question.row)


def _smallest_hashes(questions: Sequence[Question], size: int | None) -> list[Question]:
    if size is None or size >= len(questions):
        return list(questions)
    # by text, so that a file in another order or with more questions keeps most of its held-out ones
    chosen = sorted(questions, key=lambda question: hashlib.blake2b(_same_text(question.text).encode()).digest())[:size]
    return sorted(chosen, key=lambda question: question.row)
