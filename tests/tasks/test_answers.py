import time
from fractions import Fraction

import pytest

from vespo_lightning.tasks.answers import decide_cheaply, extract_answer, last_boxed, number


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("\\boxed{17}, no: \\boxed{18}. #### 3", "18"),
        ("so \\boxed{\\frac{1}{2}} it is", "\\frac{1}{2}"),
        ("2 + 2 = 4\n#### 1,450,000\n", "1,450,000"),
        ("#### 1\n#### 2", "2"),
        ("####18", "18"),
        ("Q: 3 + 4?\nA: 7", "7"),
        ("**Answer:** 18", "18"),
        ("answer: 20%", "20%"),
        ("The answer is 18.", "18"),
        ("The answer is $18.50. Done in 3 steps.", "$18.50"),
        ("The answer is 5 km", "5 km"),
        ("The final answer is: $\\frac{1}{2}$.", "\\frac{1}{2}"),
        ("The answer is \\(x^2\\), as said.", "x^2"),
        ("The answer is:\n\\[ 5 \\]", "\\[ 5 \\]"),
        ("The answer is that she has 18 eggs left.", "18"),
        ("The answer is Monday.", "Monday"),
        ("The answer is 3 and a half", "3 and a half"),
        ("The answer is 7. The answer is 8.", "7"),
        ("I get 9 - 3 = 6, so 6 of 12", "12"),
        ("we end at -5", "-5"),
        ("we end at 10-3", "3"),
        ("it costs $1,234.56 in all.", "$1,234.56"),
        ("a square of 5 m^2", "5"),
        ("cut off at \\boxed{18", "18"),
        ("no idea", None),
        ("", None),
    ],
)
def test_extract_answer(response, answer):
    assert extract_answer(response) == answer


def test_last_boxed_balances_braces():
    assert last_boxed("\\boxed{a} \\boxed{ \\frac{1}{\\sqrt{2}} } {}") == "\\frac{1}{\\sqrt{2}}"
    assert last_boxed("\\boxed{\\frac{1}{2}") is None
    assert last_boxed("boxed{1}") is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("-7", -7),
        ("\N{MINUS SIGN}7", -7),
        ("-$5", -5),
        ("$-5", -5),
        ("027.0", 27),
        (".5", Fraction(1, 2)),
        ("3/4", Fraction(3, 4)),
        ("1,450,000", 1450000),
        ("1{,}450", 1450),
        ("1\\,450\\,000", 1450000),
        ("1.2e3", 1200),
        ("20\\%", 20),
        ("18 dollars", 18),
        ("$18$ eggs", 18),
        ("**18**", 18),
        ("5\\text{ km}", 5),
        ("5 km/h", 5),
        ("5 m^2", 5),
        ("90^\\circ", 90),
        ("x = 9*2 = 18", 18),
        ("2.5 million dollars", 2500000),
    ],
)
def test_number(text, value):
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "2x",
        "2 x",
        "2 pi",
        "2*3",
        "2**3",
        "2 * 3",
        "2$3",
        "1 450",
        "12,34",
        "1,2345",
        "3 and a half",
        "5-",
        "1/0",
        "x >= 5",
        "x != 5",
        "x \\le 5",
        "17, 18",
        "17 or 18",
        "2 dozen",
        "\\frac{1}{2}",
        "",
        "1" * 5000,
    ],
)
def test_number_leaves_all_else_alone(text):
    assert number(text) is None


@pytest.mark.parametrize(
    ("reference", "answer", "verdict"),
    [
        ("18", "18.00", True),
        ("20%", "20", True),
        ("Monday", "monday.", True),
        ("x+1", "x+1", True),
        ("18", "19", False),
        ("1/2", "1/3", False),
        ("18", "-18", False),
        ("0.6666666667", "2/3", None),
        ("0.5", "0.7", None),
        ("\\Delta", "\\delta", None),
        ("18", "x", None),
    ],
)
def test_decide_cheaply(reference, answer, verdict):
    assert decide_cheaply(reference, answer) is verdict


@pytest.mark.parametrize(
    "unit",
    [
        "1",
        "-",
        "$a ",
        "\\(",
        "\\(x ",
        "\\boxed{",
        "answer is ",
        "1,111",
        "#### ",
        "\\text{",
        " ",
        "A:*",
        "=9",
    ],
)
def test_endless_responses_take_no_time(unit):
    start = time.perf_counter()
    for response in (
        unit * 30000,
        "The answer is " + unit * 30000,
        "\\boxed{" + unit.replace("{", "") * 30000 + "}",
    ):
        decide_cheaply("18", extract_answer(response) or "")
    assert time.perf_counter() - start < 2.0
