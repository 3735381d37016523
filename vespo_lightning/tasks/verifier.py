"""Answers checked by math-verify in a process that is killed when it takes too long."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

from vespo_lightning.tasks.answers import decide_cheaply, extract_answer
from vespo_lightning.tasks.base import Problem, Verdict

_START_TIMEOUT_S = 120.0


class AnswerVerifier:
    """Reward 1 for a response whose final answer equals the reference, else 0. Safe to call from any thread.

    Ordinary answers never leave this process: equal text, equal numbers, and whole numbers or fractions that
    differ are decided here (:func:`~vespo_lightning.tasks.answers.decide_cheaply`). All others, decimals that
    differ included (math-verify rounds them to six places), go to math-verify in a worker process, one at a
    time. A worker that overruns the deadline is killed, the response gets a verdict with an error, and the
    next one a new worker. A worker that dies is treated alike.

    The worker is a fresh interpreter, neither forked (locks of torch's threads) nor spawned by
    ``multiprocessing`` (which would import the caller's main script, and torch with it).

    Args:
        timeout_s: seconds that math-verify may take for one answer.
    """

    def __init__(self, timeout_s: float = 5.0) -> None:
        self.timeout_s = timeout_s
        self.timeouts = 0
        """Answers that were not judged in time, since this verifier was made."""
        self._connection: Connection | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._forget_worker()

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        """Verdicts in order; never raises. Equal answers to equal references are judged once."""
        judged: dict[tuple[str, str | None], Verdict] = {}
        verdicts = []
        for problem, response in zip(problems, responses, strict=True):
            key = (problem.reference, extract_answer(response))
            if key not in judged:
                judged[key] = self.judge(*key)
            verdicts.append(judged[key])
        return verdicts

    def judge(self, reference: str, answer: str | None) -> Verdict:
        """Verdict on what :func:`~vespo_lightning.tasks.answers.extract_answer` found."""
        if answer is None:
            return Verdict(0.0)
        equal = decide_cheaply(reference, answer)
        return Verdict(float(equal)) if equal is not None else self.judge_in_worker(reference, answer)

    def judge_in_worker(self, reference: str, answer: str) -> Verdict:
        """Verdict of math-verify, whatever the answer looks like."""
        if os.getpid() != self._owner:  # forked: worker and lock are the parent's
            self._forget_worker()
        with self._lock:
            try:
                return self._ask(reference, answer)
            except (OSError, EOFError) as error:
                self._kill()
                return Verdict(0.0, f"the answer checker died ({type(error).__name__}: {error})")
            except BaseException:  # an interrupt would leave an answer behind for the next question
                self._kill()
                raise

    def close(self) -> None:
        """End the worker. Safe to call twice; the verifier can be used again afterwards."""
        if os.getpid() == self._owner:
            with self._lock:
                self._kill()

    def _ask(self, reference: str, answer: str) -> Verdict:
        if self._process is not None and self._process.poll() is not None:
            self._kill()  # it died between two answers; that is no fault of this one
        connection = self._connection or self._start()
        connection.send((reference, answer))
        if not connection.poll(self.timeout_s):
            self._kill()
            self.timeouts += 1
            return Verdict(0.0, f"timed out after {self.timeout_s:g} s")
        return Verdict(float(connection.recv()))

    def _start(self) -> Connection:
        connection, theirs = Pipe()
        with theirs:
            # -P keeps the folder of the script, and its module names, off the worker's path
            script = [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))]
            self._process = subprocess.Popen(
                [*script, str(theirs.fileno()), str(self.timeout_s)],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
            )
        self._connection = connection
        if not connection.poll(_START_TIMEOUT_S):
            raise OSError(f"it did not start within {_START_TIMEOUT_S:g} s")
        connection.recv()
        return connection

    def _kill(self) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._connection = self._process = None

    def _forget_worker(self) -> None:
        self._owner = os.getpid()
        self._lock = threading.Lock()
        self._connection = self._process = None
