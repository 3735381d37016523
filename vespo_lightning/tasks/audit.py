"""How well the verifier knows right from wrong: ``python -m vespo_lightning.tasks.audit FILE [FILE ...]``.

Every reference answer is written in many forms that must be accepted, changed in many ways that must be
rejected, and exchanged with that of another question. Exit status 1 if anything is judged wrongly.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import pairwise

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.answers import extract_answer, number
from vespo_lightning.tasks.question_files import Question, read_questions
from vespo_lightning.tasks.verifier import AnswerVerifier

_FAILURES_SHOWN = 5
#: math-verify compares decimals after rounding to six places; smaller changes are none to it.
_ROUNDING = Decimal("1e-6")
_Judge = Callable[[str, str], float]


@dataclass
class Rate:
    """How many responses of one kind were judged as they should be."""

    name: str
    right: int = 0
    total: int = 0
    wrong: list[str] = field(default_factory=list)
    """what was judged wrongly: ``record, reference, response``"""

    def count(self, right: bool, question: Question, response: str) -> None:
        self.total += 1
        self.right += right
        if not right:
            self.wrong.append(f"record {question.row}: reference {question.answer!r}, response {response!r}")

    def __str__(self) -> str:
        # rounded down, so that 100 % means all of them
        percent = f"{self.right * 10000 // self.total / 100:.2f} %" if self.total else "-"
        return f"{self.name:<48}{self.right:>7} of {self.total:<7}{percent:>9}"


def written_forms(answer: str) -> Iterator[tuple[str, str]]:
    """(name of the form, response) for each way in which a right answer can be written."""
    yield "accepted: boxed", f"First, 3 + 4 = 7. So it is \\boxed{{{answer}}}."
    yield "accepted: #### x", f"First, 3 + 4 = 7.\n#### {answer}"
    yield "accepted: A: x", f"First, 3 + 4 = 7.\nA: {answer}"
    yield "accepted: The answer is x.", f"First, 3 + 4 = 7. The answer is {answer}."
    if (value := number(answer)) is None:
        return
    yield "accepted: last number", f"First, 3 + 4 = 7, and then we get {answer}."
    yield "accepted: unit (x dollars)", f"The answer is {answer} dollars."
    yield "accepted: unit (#### x km)", f"#### {answer} km"
    yield "accepted: unit (boxed text)", f"\\boxed{{{answer}\\text{{ apples}}}}"
    yield "accepted: unit (x%)", f"A: {answer}%"
    sign, digits = ("-", answer[1:]) if answer.startswith("-") else ("", answer)
    yield "accepted: currency ($x)", f"The answer is {sign}${digits}."
    if value.denominator == 1:
        yield "accepted: decimals (x.00)", f"#### {int(value)}.00"
        if abs(value) >= 1000:
            yield "accepted: thousands separators", f"The answer is {int(value):,}."
            yield "accepted: thousands separators, currency", f"A: ${int(value):,}.00"
            yield "accepted: no thousands separators", f"\\boxed{{{int(value)}}}"


def perturbed(answer: str) -> Iterator[tuple[str, str]]:
    """(name of the change, another answer) for each way to change an answer that is a plain number."""
    written = answer.replace(",", "")
    if not re.fullmatch(r"-?\d+(\.\d+)?", written):
        return
    value = Decimal(written)
    yield "rejected: x + 1", str(value + 1)
    if value != 0:
        yield "rejected: x * 10", str(value * 10)
        yield "rejected: -x", str(-value)
    swapped = _swap_digits(written)
    if swapped is not None and abs(Decimal(swapped) - value) > _ROUNDING:
        yield "rejected: two digits swapped", swapped


def _swap_digits(written: str) -> str | None:
    """The first two neighbouring digits that differ, exchanged; None without such."""
    for place, (left, right) in enumerate(pairwise(written)):
        if left.isdigit() and right.isdigit() and left != right:
            return written[:place] + right + left + written[place + 2 :]
    return None


def audit(questions: list[Question], judge: _Judge, judge_in_worker: _Judge) -> list[Rate]:
    """Rates of right judgements.

    Args:
        questions: whose answers to write, change and exchange.
        judge: reward of (reference, response).
        judge_in_worker: reward of (reference, answer) by math-verify alone.
    """
    rates: dict[str, Rate] = {}

    def expect(name: str, right: bool, question: Question, response: str) -> None:
        rates.setdefault(name, Rate(name)).count(right, question, response)

    for question in questions:
        for name, response in written_forms(question.answer):
            expect(name, judge(question.answer, response) == 1.0, question, response)
        for name, other in perturbed(question.answer):
            for form, response in written_forms(other):
                if form in ("accepted: boxed", "accepted: #### x", "accepted: The answer is x."):
                    expect(name, judge(question.answer, response) == 0.0, question, response)
    for question, another in _shuffled(questions):
        response = f"#### {another.answer}"
        expect(
            "rejected: answer of another question",
            judge(question.answer, response) == 0.0,
            question,
            response,
        )
    # the ordinary path decides plain numbers without math-verify; here math-verify judges all of them
    for question in questions:
        answer = question.answer
        expect("accepted by math-verify itself", judge_in_worker(answer, answer) == 1.0, question, answer)
        for name, other in perturbed(answer):
            if name == "rejected: x + 1":
                rejected = judge_in_worker(answer, other) == 0.0
                expect("rejected by math-verify itself: x + 1", rejected, question, other)
    return sorted(rates.values(), key=lambda rate: rate.name)


def _shuffled(questions: list[Question]) -> Iterable[tuple[Question, Question]]:
    """Each question with another one, pairs with equal answers left out."""
    others = random.Random(0).sample(questions, len(questions))
    for question, other in zip(questions, others, strict=True):
        if question.answer != other.answer and number(question.answer) != number(other.answer):
            yield question, other


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="How well the verifier judges the answers of question files.")
    parser.add_argument("files", nargs="+", metavar="FILE", help=".jsonl, .json, .parquet file, folder or hub name")
    parser.add_argument("--split", default="test", help="split of folders and hub names (default: test)")
    options = parser.parse_args(arguments)
    verifier = AnswerVerifier()
    failed = False
    try:
        for path in options.files:
            failed |= _audit_file(path, options.split, verifier)
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        verifier.close()
    return int(failed)


def _audit_file(path: str, split: str, verifier: AnswerVerifier) -> bool:
    questions = read_questions(path, split, key="FILE")
    timeouts_before = verifier.timeouts
    rates = audit(
        questions,
        judge=lambda reference, response: verifier.judge(reference, extract_answer(response)).reward,
        judge_in_worker=lambda reference, answer: verifier.judge_in_worker(reference, answer).reward,
    )
    print(f"{path}: {len(questions)} questions, {verifier.timeouts - timeouts_before} timed out")
    for rate in rates:
        print(f"  {rate}")
        for example in rate.wrong[:_FAILURES_SHOWN]:
            print(f"      {example}")
        if len(rate.wrong) > _FAILURES_SHOWN:
            print(f"      and {len(rate.wrong) - _FAILURES_SHOWN} more")
    return any(rate.wrong for rate in rates)


if __name__ == "__main__":
    sys.exit(main())
