from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from vespo_lightning.objectives.draw import coefficient_curve, draw, drawn_objectives, main, picture
from vespo_lightning.objectives.options import default_objective, option_names

X = torch.tensor([-4.0, -1.0, 0.0, 0.5, 3.0, 4.5], dtype=torch.float64)


def ratio(length: int, power: float = 1.0) -> list[float]:
    return [math.exp(power * x / length) for x in X.tolist()]


def zero_where(values: list[float], masked: list[bool]) -> list[float]:
    return [0.0 if m else v for v, m in zip(values, masked, strict=True)]


def gamma(c1: float, c2: float) -> list[float]:
    return [math.exp(c1 * x + c2 * (1 - math.exp(x))) for x in X.tolist()]


SIGNS = (1.0, -1.0)
EXPECTED = {
    "vespo": (gamma(2, 3), gamma(3, 2)),
    "kernel": (gamma(3, 2), gamma(3, 2)),
    "sequence_is": (ratio(1), ratio(1)),
    "topr": ([1.0] * 6, [min(w, 1.0) for w in ratio(1)]),
    "respo": (
        [(1 + w) / 2 * math.exp(1 - w) for w in ratio(1)],
        [w**0.5 * math.exp(2 * (1 - w**0.5)) for w in ratio(1)],
    ),
    # of 16 tokens: 1.2 is reached at log W = 2.92, 0.8 at -3.57
    "grpo": (
        zero_where(ratio(16), [r > 1.2 for r in ratio(16)]),
        zero_where(ratio(16), [r < 0.8 for r in ratio(16)]),
    ),
    "gspo": (zero_where(ratio(16), [x > 0 for x in X.tolist()]), zero_where(ratio(16), [x < 0 for x in X.tolist()])),
    "cispo": (ratio(16), ratio(16)),
    # from 0.5 to more than 0.65 with A > 0; at log W = -4 to 0.39 only
    "dppo": (zero_where(ratio(16), [r * 0.5 > 0.65 for r in ratio(16)]), ratio(16)),
    "sapo": tuple(
        [[r / math.cosh(tau * (r - 1) / 2) ** 2 for r in ratio(16)] for tau in (1.0, 1.05)],
    ),
    # no token is before the first
    "minpro": tuple([[(r + 15 * r * r) / 16 for r in ratio(16)]] * 2),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_curves_are_the_formulas(name):
    for sign, expected in zip(SIGNS, EXPECTED[name], strict=True):
        curve = coefficient_curve(default_objective(name), X, sign, 16)
        assert curve.tolist() == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_masks_are_seen_on_both_sides():
    """The points of X are such that the expectations above have both."""
    for name in ("grpo", "gspo"):
        assert all(0 < column.count(0.0) < 6 for column in EXPECTED[name])
    assert EXPECTED["dppo"][0].count(0.0) == 1


def test_methods_on_w_do_not_depend_on_the_length_and_others_do():
    groups = drawn_objectives()
    assert {"vespo", "kernel", "sequence_is", "topr", "respo"} <= set(groups["by W"])
    assert {"grpo", "gspo", "cispo", "sapo", "dppo", "minpro"} <= set(groups["by token"])
    for group, methods in groups.items():
        for objective in methods.values():
            long, short = (coefficient_curve(objective, X, -1.0, length) for length in (50, 5))
            assert torch.allclose(long, short, rtol=1e-10, atol=0) == (group == "by W"), objective.name


def test_every_method_has_a_curve_or_sees_more_than_its_response():
    drawn = {name for methods in drawn_objectives().values() for name in methods}
    for name in set(option_names()) - drawn - {"reinforce"}:
        objective = default_objective(name)
        assert objective.scope == "mini-batch" or "top_log_probs" in objective.needs, name


def test_every_curve_goes_through_one():
    for methods in drawn_objectives().values():
        for objective in methods.values():
            for sign in SIGNS:
                at_one = coefficient_curve(objective, torch.zeros(1, dtype=torch.float64), sign)
                assert at_one.item() == pytest.approx(1.0, rel=1e-12)


def test_picture_names_every_method_and_the_length():
    figure = picture(7)
    names = {text.get_text() for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()}
    assert names >= {name for methods in drawn_objectives().values() for name in methods} | {"reinforce"}
    assert "7 tokens" in figure.get_suptitle()
    assert "1 token," in picture(1).get_suptitle()


def test_writes_png_and_svg(tmp_path: Path, capsys):
    for name in ("curves.png", "curves.SVG"):
        assert main([str(tmp_path / name), "--length", "4"]) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'curves.png'}: ")
    pixels = imread(tmp_path / "curves.png")
    assert pixels.shape[0] > 500 and pixels.std() > 0.05
    assert "<svg" in (tmp_path / "curves.SVG").read_text()


def test_committed_picture_is_small(repository: Path):
    assert 10_000 < (repository / "docs" / "images" / "coefficients.png").stat().st_size < 200_000


def test_svg_is_the_same_each_time(tmp_path: Path):
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, 2)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["curves.jpg"], r"curves\.jpg: the name must end in \.png or \.svg"),
        (["no/such/folder/curves.png"], r"no/such/folder/curves\.png cannot be written: No such file or directory"),
        (["curves.png", "--length", "0"], r"--length 0 is not allowed; a response has at least 1 token"),
    ],
)
def test_mistakes_are_one_line(arguments, sentence, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"error: {sentence}\n".replace("\\", "")
    assert list(tmp_path.iterdir()) == []
