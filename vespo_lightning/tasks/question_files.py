"""Question/answer files in the formats that people share them in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.answers import last_boxed

#: A question is one field, or several joined by a space (SVAMP). The first that a file has is taken.
QUESTION_FIELDS = (("question",), ("problem",), ("Body", "Question"), ("input",), ("prompt",), ("Question",))
#: Short answers before worked ones: some files have both.
ANSWER_FIELDS = ("final_answer", "final", "answer", "Answer", "target", "solution")

_FILE_SUFFIXES = (".jsonl", ".json", ".parquet")


@dataclass(frozen=True)
class Question:
    row: int
    """0-based place in the file"""
    text: str
    answer: str
    """the final answer alone, as text: ``18``, ``27`` for 27.0, ``\\frac{1}{2}``"""


@dataclass(frozen=True)
class Fields:
    """Which fields to read (``task.question_field``, ``task.answer_field``); None detects them."""

    question: str | None = None
    answer: str | None = None


def read_questions(
    path: str, split: str, subset: str | None = None, fields: Fields | None = None, key: str = "task.path"
) -> list[Question]:
    """All questions of a file, a folder or a data set of the Hugging Face hub, in order.

    Args:
        path: a .jsonl, .json (list of records) or .parquet file, or what ``datasets.load_dataset`` takes.
        split: which split of a folder or data set.
        subset: the data set's configuration (``main`` for ``openai/gsm8k``), where it has several.
        fields: fields of question and answer; by default the first of :data:`QUESTION_FIELDS` and of
            :data:`ANSWER_FIELDS` that the first record has.
        key: config key of the path, for errors.

    Raises:
        UserError: nothing there, no records, no such fields, or a record without an answer.
    """
    rows = _read_rows(path, split, subset, key)
    if not rows:
        raise UserError(f"{key}={path} holds no questions; give a file with one record per question")
    fields = fields or Fields()
    question_fields, answer_field = _detect(rows[0], fields, key, path)
    return [
        Question(
            row=number,
            text=_question_text(row, question_fields, f"{key}={path}: record {number}"),
            answer=_final_answer(row, answer_field, f"{key}={path}: record {number}"),
        )
        for number, row in enumerate(rows)
    ]


def final_answer_of(text: str) -> str:
    r"""The final answer in a worked one: after the last ``####``, in the last ``\boxed{}``, or all of it."""
    if "####" in text:
        return text.rpartition("####")[2].strip()
    boxed = last_boxed(text)
    return text.strip() if boxed is None else boxed


def _read_rows(path: str, split: str, subset: str | None, key: str) -> Sequence[Mapping[str, Any]]:
    file = Path(path).expanduser()
    if file.is_file():
        return _read_file(file, key)
    if file.is_dir() or _looks_like_hub_name(path):
        return _load_dataset(str(file) if file.is_dir() else path, split, subset, key)
    raise UserError(f"{key}={path} does not exist; give a file, a folder or the name of a data set")


def _looks_like_hub_name(path: str) -> bool:
    return path.count("/") <= 1 and path[:1] not in ("/", ".", "~") and not path.endswith(_FILE_SUFFIXES)


def _read_file(file: Path, key: str) -> list[dict[str, Any]]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet  # type: ignore[import-untyped]

            return pyarrow.parquet.read_table(file).to_pylist()
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            rows = json.loads(text)
        elif file.suffix == ".jsonl":
            # not splitlines(), which also splits at line separators inside of strings
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        else:
            raise UserError(f"{key}={file} is no {', '.join(_FILE_SUFFIXES)} file; convert it or name one of those")
    except (ValueError, OSError) as error:  # broken JSON, text or parquet: all of them are ValueErrors
        raise UserError(f"{key}={file} cannot be read ({error}); repair the file or name another") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{key}={file} is no list of records; give one JSON object per question")
    return rows


def _load_dataset(path: str, split: str, subset: str | None, key: str) -> Sequence[Mapping[str, Any]]:
    import datasets  # slow to import, and needed for folders and the hub only

    try:
        loaded = datasets.load_dataset(path, name=subset, split=split)
    except Exception as error:  # whatever the hub, the network and the builders raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"{key}={path} with split {split} and task.subset={subset} cannot be loaded ({reason}); "
            "name a local file, or check the data set's name, split and subset"
        ) from error
    return loaded.to_list()


def _detect(row: Mapping[str, Any], fields: Fields, key: str, path: str) -> tuple[tuple[str, ...], str]:
    if fields.question is not None:
        _require(row, fields.question, "task.question_field", path)
        question: tuple[str, ...] | None = (fields.question,)
    else:
        question = next((names for names in QUESTION_FIELDS if all(name in row for name in names)), None)
    if fields.answer is not None:
        _require(row, fields.answer, "task.answer_field", path)
        answer: str | None = fields.answer
    else:
        answer = next((name for name in ANSWER_FIELDS if row.get(name) is not None), None)
    if question is None or answer is None:
        missing = "question" if question is None else "answer"
        raise UserError(
            f"{key}={path} has fields {', '.join(row)}, none of them known as the {missing}; "
            f"name it with task.{missing}_field"
        )
    return question, answer


def _require(row: Mapping[str, Any], field: str, key: str, path: str) -> None:
    if field not in row:
        raise UserError(f"{key}={field} is no field of {path}; it has {', '.join(row)}")


def _question_text(row: Mapping[str, Any], fields: tuple[str, ...], where: str) -> str:
    parts = [row.get(field) for field in fields]
    if not all(isinstance(part, str) and part.strip() for part in parts):
        raise UserError(f"{where} has no text in {' and '.join(fields)}; repair it or set task.question_field")
    *body, question = (str(part).strip() for part in parts)
    # SVAMP's bodies often lack their full stop
    return " ".join([text if text.endswith((".", "!", "?", ",")) else f"{text}." for text in body] + [question])


def _final_answer(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    written = value if isinstance(value, str) else ""
    answer = final_answer_of(written)
    if not answer or (field == "solution" and answer == written.strip()):
        raise UserError(f"{where} has no final answer in {field}; repair it or set task.answer_field")
    return answer
