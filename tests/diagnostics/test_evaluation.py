import math
from itertools import combinations

import numpy as np
import pytest

from vespo_lightning.diagnostics.evaluation import (
    EvaluationResult,
    accuracy_interval,
    average_at_k,
    evaluation_metrics,
    pass_at_k,
    powers_of_two,
    student_t_quantile,
    wilson_interval,
)


def brute_force_pass_at_k(correct: np.ndarray, k: int) -> float:
    """Every way to draw k of the samples, counted."""
    shares = [np.mean([any(row[list(chosen)]) for chosen in combinations(range(len(row)), k)]) for row in correct]
    return float(np.mean(shares))


@pytest.mark.parametrize("samples", [1, 2, 5, 8])
def test_pass_at_k_counts_draws(samples):
    correct = np.random.default_rng(0).random((20, samples)) < 0.3
    for k in range(1, samples + 1):
        assert pass_at_k(correct, k) == pytest.approx(brute_force_pass_at_k(correct, k), abs=1e-14)
    assert pass_at_k(correct, 1) == pytest.approx(average_at_k(correct), abs=1e-14)


def test_pass_at_k_is_exact_where_binomials_overflow_a_double():
    correct = np.zeros((1, 4000), dtype=bool)
    correct[0, :3] = True
    expected = 1 - math.comb(3997, 2000) / math.comb(4000, 2000)  # exact integers
    assert pass_at_k(correct, 2000) == pytest.approx(expected, rel=1e-12)


def test_pass_at_k_out_of_range():
    for k in (0, 5):
        with pytest.raises(ValueError, match="there are 4"):
            pass_at_k(np.ones((2, 4), dtype=bool), k)


def test_wilson_against_its_quadratic():
    # The ends are the p for which the observed share is z standard errors of p away.
    z = 1.959963984540054
    for successes, trials in ((0, 10), (3, 10), (250, 512), (512, 512)):
        low, high = wilson_interval(successes, trials)
        for end in (low, high):
            if 0 < end < 1:
                distance = abs(successes / trials - end) / math.sqrt(end * (1 - end) / trials)
                assert distance == pytest.approx(z, rel=1e-9)
        assert low <= successes / trials <= high
    assert wilson_interval(0, 10)[0] == 0 and wilson_interval(0, 10)[1] == pytest.approx(0.27753, abs=1e-5)


@pytest.mark.parametrize(
    ("freedom", "table", "relative"),
    [(1, 12.7062, 1e-5), (2, 4.30265, 1e-5), (3, 3.18245, 5e-3), (7, 2.36462, 2e-4), (29, 2.04523, 1e-5)],
)
def test_student_t_quantile_against_tables(freedom, table, relative):
    assert student_t_quantile(0.975, freedom) == pytest.approx(table, rel=relative)


def test_interval_of_clustered_samples_covers_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(600):
        difficulty = rng.beta(0.6, 0.6, size=(40, 1))  # problems are mostly easy or mostly hard
        low, high = accuracy_interval(rng.random((40, 8)) < difficulty)
        hits += low <= 0.5 <= high
    assert 0.92 <= hits / 600 <= 0.98


def test_interval_is_wider_than_if_samples_were_independent():
    correct = np.repeat(np.arange(50)[:, None] % 2 == 0, 8, axis=1)  # all samples of a problem agree
    low, high = accuracy_interval(correct)
    per_problem_low, per_problem_high = accuracy_interval(correct[:, :1])
    assert high - low == pytest.approx(per_problem_high - per_problem_low, rel=0.1)
    naive_low, naive_high = wilson_interval(correct.sum(), correct.size)
    assert high - low > 2.5 * (naive_high - naive_low)


def test_interval_does_not_collapse_where_nothing_is_solved():
    assert accuracy_interval(np.zeros((30, 4), dtype=bool)) == wilson_interval(0, 30)
    assert accuracy_interval(np.ones((1, 4), dtype=bool)) == wilson_interval(1, 1)


def test_metrics_of_one_evaluation():
    result = EvaluationResult(
        rewards=np.array([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 0.25]]),
        truncated=np.array([[False, True, False, False], [False] * 4]),
        lengths=np.array([[10, 40, 10, 10], [20, 20, 20, 30]]),
    )
    metrics = evaluation_metrics(result)
    assert metrics["eval/accuracy"] == 0.5  # partial credit is not correct
    assert metrics["eval/reward"] == pytest.approx(4.25 / 8)
    assert metrics["eval/response_length"] == 20.0
    assert metrics["eval/truncated_share"] == 0.125
    assert metrics["eval/pass_at_2"] == pytest.approx((3 / 6 + 1) / 2)
    assert metrics["eval/pass_at_4"] == 1.0
    assert metrics["eval/ci_low"] <= 0.5 <= metrics["eval/ci_high"]
    assert "eval/pass_at_8" not in metrics


def test_powers_of_two():
    assert [powers_of_two(limit) for limit in (1, 2, 7, 16)] == [[], [2], [2, 4], [2, 4, 8, 16]]
