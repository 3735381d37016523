"""Final answers: where a response states one, and which of them need no computer algebra to compare."""

from __future__ import annotations

import re
from fractions import Fraction

_MARKED_ANSWER = re.compile(r"(?:^[ \t*]*A:|(?i:\banswer[\s*]*(?:is|:)))[\s*:]*([^\n]*)", re.MULTILINE)
_HASH_ANSWER = re.compile(r"####[ \t]*([^\n]+)")
_END_OF_SENTENCE = re.compile(r"[.!?](?:\s|$)")
_INLINE_MATH = re.compile(r"\\\((.+?)\\\)|\$([^\s$](?:[^$\n]*[^\s$])?)\$")

_UNSIGNED = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER_IN_TEXT = re.compile(rf"(?:(?<![\w)])-)?\$?(?<![\w^])(?:{_UNSIGNED})(?:/\d+)?")
_NUMBER_WITH_UNIT = re.compile(
    rf"(?:[^<>!=~\\]*=)*\s*(?P<sign>[-+]?)\s*(?P<number>{_UNSIGNED})"
    r"(?:[eE](?P<exponent>[-+]?\d{1,2}))?(?:\s*/\s*(?P<divisor>\d+))?"
    r"\s*(?P<unit>[%°]?\s*(?:[A-Za-z][A-Za-z .'/°-]*(?:\^?\{?[23²³]\}?)?)?)"
)
_UNIT_LETTERS = frozenset("mgshlL")
_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
#: Words that make a number into another one. "3 and a half" is not 3 of something.
_NOT_UNITS = frozenset(
    {
        "and",
        "or",
        "to",
        "half",
        "halves",
        "third",
        "thirds",
        "quarter",
        "quarters",
        "hundred",
        "dozen",
        "plus",
    }
    | {
        "minus",
        "times",
        "over",
        "divided",
        "squared",
        "cubed",
        "factorial",
        "pi",
        "sqrt",
        "sin",
        "cos",
        "exp",
    }
)
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")
_MIXED_NUMBER = re.compile(r"\d and (?:a|one|two|three) (?:half|third|quarter)")
_LONGEST_NUMBER = 200
_LONGEST_PHRASE = 500

_REPLACEMENTS = [
    (re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\!"), ""),
    (re.compile(r"\{,\}|(?<=\d)(?:\\,|\\ |~)(?=\d{3}(?!\d))"), ","),
    (re.compile(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})"), " degrees"),
    (re.compile(r"\\[(){}\[\],;: ]|\\quad|\\left|\\right|~|\u00a0"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile("[\N{MINUS SIGN}\N{EN DASH}]"), "-"),
    # with a blank, and asterisks only at the edge of a word, so that no two numbers grow into one
    (re.compile(r"\\?\$|[€£¥]|(?<!\S)[*`]+|[*`]+(?!\S)"), " "),
]


def extract_answer(response: str) -> str | None:
    r"""The final answer that a response states, or None where it holds nothing like one.

    Looked for in this order, the last of each: ``\boxed{x}``; ``#### x``; ``A: x`` at the start of a line,
    ``Answer: x`` or ``The answer is x``; the last number. A sentence after a mark is searched for its last
    number: ``The answer is that she has 18 eggs left`` is 18.
    """
    boxed = last_boxed(response)
    if boxed is not None:
        return boxed
    for mark in (_HASH_ANSWER, _MARKED_ANSWER):
        phrases = [phrase for phrase in mark.findall(response) if phrase.strip()]
        if phrases:
            return _answer_in_phrase(phrases[-1])
    return _last_number(response)


def last_boxed(text: str) -> str | None:
    r"""What the last ``\boxed{...}`` holds, inner braces balanced; None without one, or if it is cut off."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for place in range(start, len(text)):
        depth += (text[place] == "{") - (text[place] == "}")
        if depth == 0:
            return text[start:place].strip()
    return None


def decide_cheaply(reference: str, answer: str) -> bool | None:
    """Whether two answers are equal, where that needs no computer algebra; None where it does.

    Equal text and equal numbers are equal, units and thousands separators aside; whole numbers and fractions
    that differ are different. Decimals that differ may be roundings of one another, and formulas need
    math-verify: None.
    """
    expected_text, given_text = _plain(reference), _plain(answer)
    if expected_text == given_text:
        return True
    if "\\" not in reference and expected_text.casefold() == given_text.casefold():
        return True
    expected, given = number(reference), number(answer)
    if expected is None or given is None:
        return None
    if expected == given:
        return True
    return None if "." in reference or "." in answer else False


def number(text: str) -> Fraction | None:
    """The value of a number with or without currency, unit, separators or ``x =``; None for all else.

    ``$1,234.50``, ``18 dollars``, ``20%`` (20), ``x = 5``, ``3/4``, ``1.2e3``, ``2 million``.
    """
    if len(text) > _LONGEST_NUMBER:
        return None
    match = _NUMBER_WITH_UNIT.fullmatch(_plain(text))
    if match is None:
        return None
    words = re.findall(r"[A-Za-z]+", match["unit"])
    if any(word.lower() in _NOT_UNITS or (len(word) == 1 and word not in _UNIT_LETTERS) for word in words):
        # one letter is a unit only if it is a usual one; "2x" is a product, "5 of a kind" a loss we can bear
        return None
    value = Fraction(match["number"].replace(",", "")) * Fraction(10) ** int(match["exponent"] or 0)
    if match["divisor"]:
        if int(match["divisor"]) == 0:
            return None
        value /= int(match["divisor"])
    if words and words[0].lower() in _SCALES:
        value *= _SCALES[words[0].lower()]
    return -value if match["sign"] == "-" else value


def _plain(text: str) -> str:
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".!?;:,").strip()


def _answer_in_phrase(phrase: str) -> str:
    sentence = _END_OF_SENTENCE.split(phrase.strip()[:_LONGEST_PHRASE], maxsplit=1)[0].strip()
    if number(sentence) is not None:
        return sentence
    formulas = _INLINE_MATH.findall(sentence)
    if formulas:
        return "".join(formulas[-1])
    if "\\" not in sentence and _PROSE.search(sentence) and not _MIXED_NUMBER.search(sentence):
        return _last_number(sentence) or sentence
    return sentence


def _last_number(text: str) -> str | None:
    found = _NUMBER_IN_TEXT.findall(text)
    return found[-1] if found else None
