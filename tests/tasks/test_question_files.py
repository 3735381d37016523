import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.question_files import Fields, final_answer_of, read_questions


@pytest.mark.parametrize(
    ("file", "answers"),
    [
        ("gsm8k_format.jsonl", ["38", "3,450", "-7", "2.25"]),
        ("problem_answer.jsonl", ["27", "-1", "033"]),
        ("problem_solution.jsonl", ["\\frac{5}{6}", "2\\sqrt{3}"]),
        ("question_final.jsonl", ["42", "10.5"]),
        ("body_question.jsonl", ["5", "5"]),
        ("input_target.jsonl", ["0.6666666667", "7", "7"]),
    ],
)
def test_answers_of_every_format(fixtures, file, answers):
    questions = read_questions(str(fixtures / file), "train")
    assert [question.answer for question in questions] == answers
    assert [question.row for question in questions] == list(range(len(answers)))


def test_questions_of_several_fields_are_joined(fixtures):
    first, second = read_questions(str(fixtures / "body_question.jsonl"), "train")
    assert first.text == "There are 40 cups on 8 shelves. How many cups are on each shelf?"
    assert second.text == "Ann is 9 years old. Her sister is 4. How much older is Ann?"


def test_question_text_is_untouched(fixtures):
    first = read_questions(str(fixtures / "problem_solution.jsonl"), "train")[1]
    assert first.text == "Simplify $\\sqrt{12}$."


def test_final_answer_of():
    assert final_answer_of("so <<1+1=2>>2\n#### 2 \n") == "2"
    assert final_answer_of("it is \\boxed{1} or \\boxed{2}") == "2"
    assert final_answer_of(" \\frac{1}{2} ") == "\\frac{1}{2}"


def test_named_fields_win(fixtures):
    path = str(fixtures / "question_final.jsonl")
    questions = read_questions(path, "train", fields=Fields(question="final", answer="question"))
    assert (questions[0].text, questions[0].answer) == ("42", "Double 21.")


def test_json_parquet_and_jsonl_give_the_same(fixtures, tmp_path):
    source = fixtures / "gsm8k_format.jsonl"
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    expected = read_questions(str(source), "train")
    assert read_questions(str(tmp_path / "rows.json"), "train") == expected
    assert read_questions(str(tmp_path / "rows.parquet"), "train") == expected


def test_line_separators_inside_of_strings_split_nothing(tmp_path):
    file = tmp_path / "odd.jsonl"
    file.write_text('{"question": "one\u2028two?", "answer": "3"}\n\n', encoding="utf-8")
    assert [question.answer for question in read_questions(str(file), "train")] == ["3"]


def test_folders_are_loaded_by_datasets(fixtures, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "train.jsonl").write_text((fixtures / "gsm8k_format.jsonl").read_text())
    (folder / "test.jsonl").write_text("\n".join((fixtures / "gsm8k_format.jsonl").read_text().split("\n")[:1]))
    assert read_questions(str(folder), "train") == read_questions(str(fixtures / "gsm8k_format.jsonl"), "train")
    assert [question.answer for question in read_questions(str(folder), "test")] == ["38"]
    with pytest.raises(UserError, match=r"task.path=.* with split validation .* cannot be loaded"):
        read_questions(str(folder), "validation")


def test_hub_names_go_to_datasets_with_subset_and_split(monkeypatch):
    asked = {}

    def load_dataset(path, name, split):
        asked.update(path=path, name=name, split=split)
        return datasets.Dataset.from_list([{"question": "1+1?", "answer": "#### 2"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    (question,) = read_questions("someone/sums", "test", subset="main")
    assert question.answer == "2"
    assert asked == {"path": "someone/sums", "name": "main", "split": "test"}


def test_hub_errors_are_one_sentence(monkeypatch):
    def load_dataset(path, name, split):
        raise ConnectionError("no route\nto hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"task.path=someone/sums .*\(no route to hub\)"):
        read_questions("someone/sums", "train")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", "", "holds no questions"),
        ("broken.jsonl", '{"question": ', "cannot be read"),
        ("binary.parquet", "not parquet", "cannot be read"),
        ("notes.txt", "hello", "is no .jsonl, .json, .parquet file"),
        ("object.json", '{"question": "1?"}', "is no list of records"),
        (
            "fields.jsonl",
            '{"q": "1?", "answer": "1"}',
            "has fields q, answer, none of them known as the question",
        ),
        ("fields.jsonl", '{"question": "1?", "a": "1"}', "name it with task.answer_field"),
        (
            "hole.jsonl",
            '{"question": "1?", "answer": "1"}\n{"question": "2?"}',
            "record 1 has no final answer",
        ),
        ("blank.jsonl", '{"question": " ", "answer": "1"}', "record 0 has no text in question"),
        ("list.jsonl", '{"question": "1?", "answer": ["1"]}', "record 0 has no final answer in answer"),
        ("nan.jsonl", '{"question": "1?", "answer": NaN}', "record 0 has no final answer in answer"),
        (
            "solution.jsonl",
            '{"problem": "1?", "solution": "It is 1."}',
            "record 0 has no final answer in solution",
        ),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_questions(str(tmp_path / name), "train")
    assert "task.path=" in str(error.value) or "task.answer_field" in str(error.value)


def test_bad_field_names_are_named(fixtures):
    path = str(fixtures / "gsm8k_format.jsonl")
    with pytest.raises(UserError, match=r"task.question_field=problem is no field .* it has question, answer"):
        read_questions(path, "train", fields=Fields(question="problem"))
    with pytest.raises(UserError, match=r"task\.answer_field=final is no field"):
        read_questions(path, "train", fields=Fields(answer="final"))


@pytest.mark.parametrize("path", ["missing.jsonl", "/missing/folder", "./missing", "a/b/c"])
def test_missing_paths_are_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"task.held_out_path={path} does not exist")):
        read_questions(path, "test", key="task.held_out_path")
