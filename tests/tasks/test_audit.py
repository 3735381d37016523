import pytest

from vespo_lightning.tasks import audit as audit_module
from vespo_lightning.tasks.answers import extract_answer
from vespo_lightning.tasks.audit import audit, main, perturbed, written_forms
from vespo_lightning.tasks.question_files import Question, read_questions


def test_perturbed_answers_all_differ():
    assert [other for _, other in perturbed("1,250")] == ["1251", "12500", "-1250", "2150"]
    assert [other for _, other in perturbed("-7")] == ["-6", "-70", "7"]
    assert [other for _, other in perturbed("2.25")] == ["3.25", "22.50", "-2.25", "2.52"]
    assert [other for _, other in perturbed("0")] == ["1"]
    assert [other for _, other in perturbed("0.6666666667")][3:] == []  # swapped within math-verify's rounding
    assert list(perturbed("\\frac{1}{2}")) == []


def test_written_forms_cover_units_and_separators():
    forms = dict(written_forms("1250"))
    assert len(forms) == 14
    assert forms["accepted: thousands separators"] == "The answer is 1,250."
    assert forms["accepted: unit (#### x km)"] == "#### 1250 km"
    assert dict(written_forms("-3"))["accepted: currency ($x)"] == "The answer is -$3."


def test_every_format_passes(fixtures, capsys):
    assert main([str(file) for file in sorted(fixtures.glob("*.jsonl"))]) == 0
    output = capsys.readouterr().out
    assert "gsm8k_format.jsonl: 4 questions, 0 timed out" in output
    rates = [line for line in output.splitlines() if " of " in line]
    assert len(rates) > 60 and all(line.endswith("100.00 %") for line in rates)


def test_a_lenient_and_a_strict_judge_are_found_out(fixtures):
    questions = read_questions(str(fixtures / "gsm8k_format.jsonl"), "train")
    lenient = audit(questions, lambda reference, response: 1.0, lambda reference, answer: 1.0)
    assert all(bool(rate.wrong) == rate.name.startswith("rejected") for rate in lenient)
    strict = audit(
        questions,
        lambda reference, response: float(extract_answer(response) == reference),
        lambda reference, answer: float(reference == answer),
    )
    wrong = {rate.name: (rate.right, rate.total) for rate in strict if rate.wrong}
    assert wrong["accepted: thousands separators, currency"] == (0, 1)
    assert wrong["accepted: unit (x dollars)"] == (0, 4)
    assert not any(name.startswith("rejected") for name in wrong)


def test_failures_are_printed_and_change_the_exit_status(fixtures, capsys, monkeypatch):
    monkeypatch.setattr(audit_module, "extract_answer", lambda response: "38")
    assert main([str(fixtures / "gsm8k_format.jsonl")]) == 1
    output = capsys.readouterr().out
    assert "record 1: reference '3,450', response" in output and "25.00 %" in output


def test_equal_answers_of_other_questions_are_left_out():
    same = [Question(row, f"{row}?", answer) for row, answer in enumerate(["5", "5.0", "5"])]
    rates = {rate.name for rate in audit(same, lambda *_: 0.0, lambda *_: 0.0)}
    assert "rejected: answer of another question" not in rates


@pytest.mark.parametrize("path", ["missing.jsonl"])
def test_missing_files_are_named(path, capsys):
    assert main([path]) == 1
    assert f"FILE={path} does not exist" in capsys.readouterr().err
