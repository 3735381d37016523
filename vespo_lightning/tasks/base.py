"""What a task is: problems to pose, counted rather than streamed, and a verifier that never raises."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

#: A prompt is plain text, or chat messages ``[{"role": ..., "content": ...}, ...]``.
PromptText = str | list[dict[str, str]]


@dataclass(frozen=True)
class Problem:
    id: str
    """Stable and unique inside the task; the same id is always the same problem."""
    prompt: PromptText
    reference: str
    """What the verifier compares a response with."""


@dataclass(frozen=True)
class Verdict:
    reward: float
    """Always finite."""
    error: str | None = None
    """Why the response could not be judged (time-out, exception, NaN); ``reward`` is then the failure value."""


class Task(ABC):
    """Problems and their verifier.

    Training problems are a pure function of (seed, index), so that the only state of a stream of prompts is a
    number, every rank can take its own indices, and a resumed run poses what the killed one would have posed.
    """

    name: str

    @abstractmethod
    def train_problem(self, seed: int, index: int) -> Problem:
        """The ``index``-th training problem of a run with this seed; never one of the held-out problems."""

    @abstractmethod
    def held_out(self) -> Sequence[Problem]:
        """Problems that are never trained on, the same for every seed."""

    @abstractmethod
    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """Judge responses, in order. Never raises; a response that cannot be judged in time gets an error verdict."""

    def solution(self, problem: Problem) -> str | None:
        """A worked response for supervised training, where the task can write one."""
        return None

    def close(self) -> None:  # noqa: B027 - most tasks hold nothing
        """End worker processes, if any. Safe to call twice."""
