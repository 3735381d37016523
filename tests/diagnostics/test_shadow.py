from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from vespo_lightning.diagnostics.shadow import compare, missing_parts, shadow_statistics
from vespo_lightning.objectives.base import TokenBatch, TopLogProbs
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.reinforce import Reinforce
from vespo_lightning.objectives.vespo import Vespo

#: Log W of -2, -0.5, 0, 1, 1.6 and of one without advantage; a token of the last is out of the loss.
ROWS = [[-1.5, -0.5], [-0.5], [0.25, -0.25, 0.0], [0.25, 0.75], [1.6, 5.0], [3.0]]
MASKS = [[True] * 2, [True], [True] * 3, [True] * 2, [True, False], [True]]
ADVANTAGES = [1.0, -2.0, 0.5, -1.0, 3.0, 0.0]
#: Bin of log W of each of the five that count, an end belonging to the bin above it.
BINS = [0, 1, 2, 3, 3]
MASS = ("mass_below_m1", "mass_m1_0", "mass_0_1", "mass_above_1")


def token_batch(
    rows: list[list[float]] = ROWS, advantages: list[float] = ADVANTAGES, masks: list[list[bool]] | None = None
) -> TokenBatch:
    """float64, NaN outside the loss mask."""
    lengths = [len(row) for row in rows]
    mask = torch.tensor([m for row in masks for m in row]) if masks else torch.ones(sum(lengths), dtype=torch.bool)
    log_ratio = torch.tensor([x for row in rows for x in row], dtype=torch.float64)
    return TokenBatch(
        log_prob=torch.where(mask, log_ratio, math.nan),
        behaviour_log_prob=torch.zeros_like(log_ratio),
        sequence_index=torch.arange(len(rows)).repeat_interleave(torch.tensor(lengths)),
        loss_mask=mask,
        advantage=torch.tensor(advantages, dtype=torch.float64),
        group=torch.zeros(len(rows), dtype=torch.int64),
        version_made=torch.zeros(len(log_ratio), dtype=torch.int32),
        policy_version=0,
    )


def vespo(log_weight: float, advantage: float) -> float:
    c1, c2 = (2, 3) if advantage > 0 else (3, 2)
    return math.exp(c1 * log_weight + c2 * (1 - math.exp(log_weight)))


def grpo(log_ratio: float, advantage: float) -> float:
    ratio = math.exp(log_ratio)
    return 0.0 if (ratio > 1.2 if advantage > 0 else ratio < 0.8) else ratio


def by_hand(coefficients: list[float], run: list[float], advantages: list[float], bins: list[int]) -> dict[str, float]:
    c, a = np.array(coefficients), np.array(advantages)
    g, h = c * a, np.array(run) * a
    expected = {
        "coefficient_positive_mean": c[a > 0].mean(),
        "coefficient_negative_mean": c[a < 0].mean(),
        "ess_ratio": c.sum() ** 2 / (len(c) * (c**2).sum()),
        "zero_share": (c == 0).mean(),
        "cosine": g @ h / (np.linalg.norm(g) * np.linalg.norm(h)),
    }
    return expected | {name: np.abs(g)[np.array(bins) == b].sum() / np.abs(g).sum() for b, name in enumerate(MASS)}


def test_statistics_equal_brute_force():
    batch = token_batch(masks=MASKS)
    tokens = [(x, s) for s in range(5) for x, m in zip(ROWS[s], MASKS[s], strict=True) if m]
    log_weights = [-2.0, -0.5, 0.0, 1.0, 1.6]
    run = [vespo(log_weights[s], ADVANTAGES[s]) for _, s in tokens]
    advantages, bins = [ADVANTAGES[s] for _, s in tokens], [BINS[s] for _, s in tokens]
    columns = {
        "run": run,
        "grpo": [grpo(x, ADVANTAGES[s]) for x, s in tokens],
        "reinforce": [1.0] * len(tokens),
    }
    expected = {
        f"shadow/{method}/{name}": value
        for method, column in columns.items()
        for name, value in by_hand(column, run, advantages, bins).items()
    }
    methods = {"grpo": Grpo(), "reinforce": Reinforce()}
    result = shadow_statistics(methods, batch, Vespo().coefficient(batch))
    assert result == pytest.approx(expected, rel=1e-12)
    assert result["shadow/grpo/zero_share"] == 3 / 9  # -0.5 with A < 0; 0.25 and 1.6 with A > 0
    assert result["shadow/reinforce/ess_ratio"] == 1.0


def test_the_run_is_like_itself_and_its_mass_is_whole():
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randn(n, generator=generator).tolist() for n in (1, 5, 9, 30)]
    batch = token_batch(rows, [0.3, -1.1, 0.7, -0.2])
    result = shadow_statistics({"vespo": Vespo(), "grpo": Grpo()}, batch, Vespo().coefficient(batch))
    assert result["shadow/run/cosine"] == pytest.approx(1.0, rel=1e-14)
    assert result["shadow/vespo/cosine"] == pytest.approx(1.0, rel=1e-14)
    assert abs(result["shadow/grpo/cosine"]) < 0.99
    for method in ("run", "vespo", "grpo"):
        assert sum(result[f"shadow/{method}/{name}"] for name in MASS) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(
    ("log_weight", "expected"),
    [(-1.0, "mass_m1_0"), (0.0, "mass_0_1"), (1.0, "mass_above_1"), (-1.0 - 1e-9, "mass_below_m1")],
)
def test_an_end_belongs_to_the_bin_above(log_weight, expected):
    one = torch.ones(1, 1, dtype=torch.float64)
    numbers = compare(one, torch.tensor([-2.0]), torch.tensor([log_weight], dtype=torch.float64))
    assert {name: numbers[name].item() for name in MASS} == {name: float(name == expected) for name in MASS}


def test_coefficients_of_opposite_signs_of_advantage():
    """Two methods that each move one token only have nothing in common."""
    coefficients = torch.tensor([[1.0, 0.0, 3.0], [0.0, 2.0, 0.0], [2.0, 0.0, 6.0]], dtype=torch.float64)
    numbers = compare(coefficients, torch.tensor([1.0, -1.0, 2.0]), torch.zeros(3, dtype=torch.float64))
    assert numbers["cosine"].tolist() == pytest.approx([1.0, 0.0, 1.0], rel=1e-15)
    assert numbers["coefficient_positive_mean"].tolist() == [2.0, 0.0, 4.0]
    assert numbers["coefficient_negative_mean"].tolist() == [0.0, 2.0, 0.0]
    assert numbers["ess_ratio"].tolist() == pytest.approx([16 / 30, 1 / 3, 64 / 120], rel=1e-15)


def test_corrections_reach_the_other_methods():
    batch = token_batch([[0.0], [0.0]], [1.0, -1.0])
    halved = replace(batch, final_weight=torch.tensor([0.5, 1.0], dtype=torch.float64))
    result = shadow_statistics({"reinforce": Reinforce()}, halved, Vespo().corrected_coefficient(halved))
    assert result["shadow/reinforce/coefficient_positive_mean"] == 0.5
    assert result["shadow/reinforce/cosine"] == pytest.approx(1.0, rel=1e-14)


def test_what_has_no_data_is_absent():
    batch = token_batch([[1.0, 1.0]], [1.0])  # GRPO clips both tokens
    result = shadow_statistics({"grpo": Grpo()}, batch, Vespo().coefficient(batch))
    assert {name for name in result if "/grpo/" in name} == {
        "shadow/grpo/coefficient_positive_mean",
        "shadow/grpo/zero_share",
    }
    assert result["shadow/grpo/coefficient_positive_mean"] == 0.0
    assert result["shadow/grpo/zero_share"] == 1.0
    assert "shadow/run/coefficient_negative_mean" not in result
    assert shadow_statistics({"grpo": Grpo()}, token_batch([[1.0]], [0.0]), torch.ones(1)) == {}


def test_no_number_is_made_of_a_broken_log_prob():
    batch = token_batch([[math.nan], [0.1], [0.2]], [1.0, -1.0, 1.0])
    result = shadow_statistics({"reinforce": Reinforce()}, batch, Vespo().coefficient(batch))
    assert all(math.isfinite(value) for value in result.values())
    assert result["shadow/reinforce/ess_ratio"] == 1.0
    assert "shadow/run/coefficient_positive_mean" not in result
    assert not {f"shadow/{method}/cosine" for method in ("run", "reinforce")} & result.keys()


def test_missing_parts():
    class Demanding(Grpo):
        needs = frozenset({"recomputed_log_prob", "top_log_probs", "router_shift"})

    batch = token_batch([[0.0]], [1.0])
    one = torch.zeros(1)
    assert missing_parts(Grpo(), batch) == []
    assert missing_parts(Demanding(), batch) == ["recomputed_log_prob", "router_shift", "top_log_probs"]
    full = replace(
        batch,
        recomputed_log_prob=one,
        router_shift=one,
        top=TopLogProbs(one[:, None], one[:, None], torch.ones(1, dtype=torch.bool)),
    )
    assert missing_parts(Demanding(), full) == []
