"""Known values, statistics, configurations and refusals of the token-level objectives."""

from __future__ import annotations

import dataclasses
import math
from importlib.resources import files

import pytest
import torch
import yaml
from hydra.utils import instantiate

from vespo_lightning.errors import UserError
from vespo_lightning.objectives.cispo import Cispo
from vespo_lightning.objectives.dppo import Dppo
from vespo_lightning.objectives.m2po import M2po
from vespo_lightning.objectives.minirl import MiniRl
from vespo_lightning.objectives.minpro import Minpro, log_prefix_minimum
from vespo_lightning.objectives.sapo import Sapo

CLASSES = {"sapo": Sapo, "cispo": Cispo, "dppo": Dppo, "minpro": Minpro, "m2po": M2po, "minirl": MiniRl}
NAN_VISIBLE = [Sapo(), Cispo(), Dppo(), Dppo("binary_kl"), Dppo("topk_tv"), Dppo("topk_kl"), Minpro(), MiniRl()]
NAN_VISIBLE += [M2po(), M2po(mode="adaptive_clip")]
R05, R2, R8 = (math.log(r) for r in (0.5, 2.0, 8.0))


def at_probabilities(make_batch, old: list[float], new: list[float], advantages: list[float]):
    """One token per sequence, with the probability before and now."""
    batch = make_batch([[0.0]] * len(old), advantages)
    log_old, log_new = (torch.tensor(p, dtype=torch.float64).log() for p in (old, new))
    return dataclasses.replace(batch, log_prob=log_new, behaviour_log_prob=log_old)


@pytest.mark.parametrize("name", CLASSES)
def test_file_of_the_configuration_has_the_defaults_of_the_class(name):
    config = yaml.safe_load((files("vespo_lightning.conf") / "objective" / f"{name}.yaml").read_text())
    objective = instantiate(config)
    assert type(objective) is CLASSES[name] and objective.name == name
    assert vars(objective) == vars(CLASSES[name]())
    assert set(vars(objective)) == set(config) - {"_target_"}


# ---- SAPO ------------------------------------------------------------------------------------------------------


def test_sapo_gate_is_a_half_at_its_published_width(make_batch):
    """sech^2(x) = 1/2 at x = acosh(sqrt 2), that is r = 1 + 2 x / tau, with the temperature of the sign."""
    width = 2 * math.acosh(math.sqrt(2))
    ratios = [1 + width / 2.0, 1 - width / 4.0, 1 + width / 4.0]
    batch = make_batch([[math.log(r)] for r in ratios], [1.0, -1.0, -1.0])
    assert Sapo(2.0, 4.0).coefficient(batch).tolist() == pytest.approx([r / 2 for r in ratios], rel=1e-12)


def test_sapo_tokens_beyond_the_log_ratio_clamp_have_no_gradient(make_batch):
    batch = make_batch([[-20.001], [-19.999], [20.001], [1e4]], [-1.0] * 4)
    below = math.exp(-19.999) / math.cosh(1.05 / 2) ** 2
    assert Sapo().coefficient(batch).tolist() == pytest.approx([0.0, below, 0.0, 0.0], rel=1e-7)


def test_sapo_statistics(make_batch):
    batch = make_batch([[0.0, R8], [0.0, R8, R8, -9.0], [R8]], [1.0, -1.0, 0.0])
    far = [8 / math.cosh(tau * 3.5) ** 2 for tau in (1.0, 1.05)]
    low = math.exp(-9) / math.cosh(1.05 / 2 * (1 - math.exp(-9))) ** 2
    assert far[0] < 0.1
    assert Sapo().statistics(batch) == pytest.approx(
        {
            "objective/coefficient_positive_mean": (1 + far[0]) / 2,
            "objective/coefficient_negative_mean": (1 + 2 * far[1] + low) / 4,
            "objective/zero_share": 0.0,
            "objective/suppressed_positive_share": 1 / 2,
            "objective/suppressed_negative_share": 3 / 4,
        },
        rel=1e-12,
    )


# ---- CISPO -----------------------------------------------------------------------------------------------------


def test_cispo_bounds_are_ratios_and_drop_nothing(make_batch):
    batch = make_batch([[R05, 0.0, R2, R8, -1e4, 1e4]] * 2, [1.0, -1.0])
    both_signs = Cispo(0.0, 5.0).multiplier(batch).tolist()
    expected = [0.5, 1.0, 2.0, 5.0, math.exp(-20), 5.0]
    assert both_signs == pytest.approx(expected + [-x for x in expected], rel=1e-12)
    assert Cispo(0.8, 1.2).coefficient(batch).tolist() == pytest.approx([0.8, 1.0, 1.2, 1.2, 0.8, 1.2] * 2)


def test_cispo_statistics(make_batch):
    batch = make_batch([[R05, 0.0, R2, R8], [R8], [R8]], [1.0, -1.0, 0.0])
    expected = {
        "objective/coefficient_positive_mean": (0.8 + 1 + 2 + 5) / 4,
        "objective/coefficient_negative_mean": 5.0,
        "objective/zero_share": 0.0,
        "objective/capped_share": 2 / 5,
        "objective/raised_share": 1 / 5,
    }
    assert Cispo(0.8, 5.0).statistics(batch) == pytest.approx(expected, rel=1e-12)
    assert "objective/raised_share" not in Cispo().statistics(batch)
    assert Cispo().statistics(make_batch([[0.1]], [0.0])) == {}


# ---- DPPO ------------------------------------------------------------------------------------------------------


def test_dppo_sees_probability_where_a_ratio_clip_sees_the_ratio(make_batch):
    """The paper's examples: 1e-4 -> 1e-2 moves little, 0.99 -> 0.8 much. A > 0 masks rises, A < 0 falls."""
    old, new = [1e-4, 0.99, 0.8, 0.99, 0.8], [1e-2, 0.8, 0.99, 0.8, 0.99]
    batch = at_probabilities(make_batch, old, new, [1.0, -1.0, 1.0, 1.0, -1.0])
    expected = [100.0, 0.0, 0.0, 0.8 / 0.99, 0.99 / 0.8]
    for divergence in ("binary_tv", "binary_kl"):
        assert Dppo(divergence, cap=None).coefficient(batch).tolist() == pytest.approx(expected, rel=1e-12)
    assert Dppo(cap=5.0).coefficient(batch).tolist() == pytest.approx([5.0, *expected[1:]], rel=1e-12)
    assert Dppo(threshold=0.191).coefficient(batch)[1].item() == pytest.approx(0.8 / 0.99)


def test_dppo_takes_the_threshold_of_its_divergence(make_batch):
    assert (Dppo().threshold, Dppo("binary_kl").threshold, Dppo("binary_kl", 0.1).threshold) == (0.15, 0.05, 0.1)
    # TV 0.1 and 0.14, KL 0.0507 and 0.0478
    batch = at_probabilities(make_batch, [0.05, 0.2], [0.15, 0.34], [1.0, 1.0])
    assert Dppo("binary_tv").coefficient(batch).tolist() == pytest.approx([3.0, 1.7])
    assert Dppo("binary_kl").coefficient(batch).tolist() == pytest.approx([0.0, 1.7])
    assert Dppo("binary_kl", 0.0508).coefficient(batch).tolist() == pytest.approx([3.0, 1.7])
    assert Dppo("binary_kl", 0.0477).coefficient(batch).tolist() == [0.0, 0.0]


def test_dppo_anchors_ratio_and_divergence_at_the_denominator(make_batch):
    batch = at_probabilities(make_batch, [0.3], [0.9], [1.0])
    recomputed = torch.tensor([0.8], dtype=torch.float64).log()
    assert Dppo().coefficient(batch).item() == 0.0
    other = dataclasses.replace(batch, denominator="recomputed", recomputed_log_prob=recomputed)
    assert Dppo().coefficient(other).item() == pytest.approx(0.9 / 0.8, rel=1e-12)


def test_dppo_statistics(make_batch):
    old, new = [0.9, 0.5, 0.1, 0.5, 0.01, 0.1], [0.5, 0.5, 0.6, 0.7, 0.1, 0.9]
    batch = at_probabilities(make_batch, old, new, [-1.0, -1.0, -1.0, 1.0, 1.0, 0.0])
    assert Dppo().statistics(batch) == pytest.approx(
        {
            "objective/coefficient_positive_mean": (0 + 5) / 2,
            "objective/coefficient_negative_mean": (0 + 1 + 5) / 3,
            "objective/zero_share": 2 / 5,
            "objective/clip_low_share": 1 / 5,
            "objective/clip_high_share": 1 / 5,
            "objective/divergence_mean": (0.4 + 0 + 0.5 + 0.2 + 0.09) / 5,
            "objective/capped_share": 2 / 5,
        },
        rel=1e-12,
    )
    assert "objective/capped_share" not in Dppo(cap=None).statistics(batch)


# ---- MinPRO ----------------------------------------------------------------------------------------------------


def test_prefix_minimum_is_of_the_earlier_tokens_in_the_loss(make_batch):
    ratios = [[0.5, 0.2, -0.3, 0.4, -0.1], [], [-0.7], [9.0, -0.2, 0.1]]
    masks = [[True] * 5, [], [True], [False, True, True]]
    batch = make_batch(ratios, [1.0] * 4, masks)
    assert log_prefix_minimum(batch).tolist() == pytest.approx([0, 0.5, 0.2, -0.3, -0.3, 0, 0, 0, -0.2])


def test_minpro_keeps_the_rest_of_a_response_down(make_batch):
    batch = make_batch([[R2, R05, R2, 0.0, R8], [R2, R8, R8]], [1.0, -1.0])
    expected = [2.0, 1.0, 1.0, 0.5, 4.0, 2.0, 5.0, 5.0]
    assert Minpro().coefficient(batch).tolist() == pytest.approx(expected, rel=1e-12)
    tight = [1.2, 1.0, 1.0, 0.8, 1.2, 1.2, 1.2, 1.2]
    assert Minpro(0.8, 1.2).coefficient(batch).tolist() == pytest.approx(tight, rel=1e-12)


def test_minpro_statistics(make_batch):
    batch = make_batch([[R2, R05, R2, 0.0, R8], [R2, R8, R8], [R8]], [1.0, -1.0, 0.0])
    expected = {
        "objective/coefficient_positive_mean": (2 + 1 + 1 + 0.8 + 4) / 5,
        "objective/coefficient_negative_mean": 12 / 3,
        "objective/zero_share": 0.0,
        "objective/prefix_minimum_mean": (1 + 2 + 3 * 0.5 + 1 + 2 + 2) / 8,
        "objective/capped_share": 2 / 8,
        "objective/raised_share": 1 / 8,
    }
    assert Minpro(0.8, 5.0).statistics(batch) == pytest.approx(expected, rel=1e-12)
    assert "objective/raised_share" not in Minpro().statistics(batch)


# ---- NaN and refusals ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", NAN_VISIBLE, ids=lambda o: o.name)
def test_nan_in_the_loss_stays_visible(make_batch, objective):
    """For MinPRO in the rest of the response too."""
    batch = make_batch([[0.1, float("nan")], [0.1]], [1.0, 1.0])
    assert objective.multiplier(batch).isnan().tolist() == [False, True, False]
    after = make_batch([[float("nan"), 0.1, 0.1]], [1.0])
    rest = isinstance(objective, Minpro)
    assert objective.multiplier(after).isnan().tolist() == [True, rest, rest]


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        (Sapo, "tau_positive", 0.0),
        (Sapo, "tau_negative", -1.0),
        (Sapo, "tau_negative", 1e4),
        (Cispo, "ratio_max", 0.2),
        (Cispo, "ratio_max", float("inf")),
        (Cispo, "ratio_min", 1.1),
        (Dppo, "threshold", -0.1),
        (Dppo, "threshold", "wide"),
        (Dppo, "cap", 0.5),
        (M2po, "budget", 0.0),
        (M2po, "budget", float("nan")),
        (M2po, "miniclip_low", 1.5),
        (M2po, "miniclip_high", -0.1),
        (MiniRl, "clip_low", 1.1),
        (MiniRl, "clip_high", -0.1),
        (MiniRl, "cap", 0.5),
        (Minpro, "ratio_max", 0.9),
        (Minpro, "ratio_min", -0.1),
    ],
)
def test_invalid_values_are_named(kind, key, value):
    with pytest.raises(UserError, match=rf"^objective\.{key}={value} is not allowed; give a finite number"):
        kind(**{key: value})


def test_unknown_choices_are_named():
    with pytest.raises(
        UserError, match=r"^objective\.divergence=tv is unknown; valid: binary_tv, binary_kl, topk_tv, topk"
    ):
        Dppo("tv")
    with pytest.raises(UserError, match=r"^objective\.mode=clip is unknown; valid: mask, adaptive_clip"):
        M2po(mode="clip")
