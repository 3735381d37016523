"""Accuracy of a policy from several samples per problem: avg@k, pass@k and their uncertainty.

P is the number of problems, K of samples per problem. Nothing here draws random numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vespo_lightning.tasks.base import Problem

#: A response counts as correct when its reward is greater, whatever the reward of wrong ones is.
CORRECT_ABOVE = 0.5


@dataclass(frozen=True)
class EvaluationResult:
    """Judged responses of all ranks, problems in the order given."""

    rewards: NDArray[np.floating]
    """[P, K]"""
    truncated: NDArray[np.bool_]
    """[P, K] responses that ended at the token limit"""
    lengths: NDArray[np.integer]
    """[P, K] response tokens"""

    @property
    def correct(self) -> NDArray[np.bool_]:
        """[P, K]"""
        return self.rewards > CORRECT_ABOVE


class Evaluator(Protocol):
    """Generates and judges ``samples_per_problem`` responses to each problem with the current policy.

    The seed of each response is part of the run's counted randomness, the same at every evaluation, so that
    two evaluations differ by the weights only.
    """

    def __call__(
        self, problems: Sequence[Problem], samples_per_problem: int, temperature: float
    ) -> EvaluationResult: ...


def average_at_k(correct: NDArray[np.bool_]) -> float:
    """avg@k: share of correct responses, over problems and samples. ``correct`` is [P, K]."""
    return float(correct.mean())


def pass_at_k(correct: NDArray[np.bool_], k: int) -> float:
    """Unbiased pass@k: probability that at least one of ``k`` samples, drawn without return, is correct.

    For a problem with c of K samples correct it is ``1 - C(K-c, k) / C(K, k)`` (Chen et al. 2021, arXiv
    2107.03374, eq. 1), here as a product of k factors in [0, 1], so that no binomial coefficient overflows.

    Args:
        correct: [P, K]
        k: 1 .. K

    Raises:
        ValueError: k is out of range.
    """
    samples = correct.shape[1]
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} needs at least {k} samples per problem, there are {samples}")
    wrong = samples - correct.sum(axis=1)
    drawn = np.arange(k)
    all_wrong = np.prod(np.maximum(wrong[:, None] - drawn, 0) / (samples - drawn), axis=1)
    return float(np.mean(1.0 - all_wrong))


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson score interval of a proportion (Wilson 1927). Unlike the normal one it is sound near 0 and 1."""
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share = successes / trials
    shrink = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / shrink
    half = z / shrink * float(np.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)))
    # Rounding must not move an end that is 0 or 1 exactly.
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def accuracy_interval(correct: NDArray[np.bool_], confidence: float = 0.95) -> tuple[float, float]:
    """Confidence interval of avg@k over problems like these; ``correct`` is [P, K].

    Samples of one problem are not independent, so the problem is the unit: with K = 1 it is Wilson's interval
    of P trials, with K > 1 Student's t interval of the P per-problem means, cut to [0, 1]. Where the means do
    not differ at all (nothing solved, everything solved, or P = 1) their spread says nothing, and Wilson's
    interval of P trials, which is wider than the truth, stands in.
    """
    per_problem = correct.mean(axis=1)
    problems, samples = correct.shape
    mean = float(per_problem.mean())
    spread = float(per_problem.std(ddof=1)) if problems > 1 else 0.0
    if samples == 1 or spread == 0.0:
        return wilson_interval(mean * problems, problems, confidence)
    half = student_t_quantile(0.5 + confidence / 2, problems - 1) * spread / float(np.sqrt(problems))
    return max(0.0, mean - half), min(1.0, mean + half)


def student_t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Exact for 1 and 2 degrees of freedom; beyond that the asymptotic expansion of Abramowitz and Stegun
    26.7.5, at 97.5 % off by less than 0.5 % for 3 degrees and 0.02 % from 7 on.
    """
    if freedom == 1:
        return float(np.tan(np.pi * (probability - 0.5)))
    if freedom == 2:
        return float((2 * probability - 1) / np.sqrt(2 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def powers_of_two(limit: int) -> list[int]:
    """2, 4, 8, ... up to ``limit``: the k for which pass@k is reported (pass@1 is avg@k)."""
    return [2**power for power in range(1, limit.bit_length()) if 2**power <= limit]


def evaluation_metrics(result: EvaluationResult) -> dict[str, float]:
    """The figures of one evaluation, named ``eval/...``; see ``docs/metrics.md``."""
    low, high = accuracy_interval(result.correct)
    metrics = {
        "eval/accuracy": average_at_k(result.correct),
        "eval/ci_low": low,
        "eval/ci_high": high,
        "eval/reward": float(result.rewards.mean()),
        "eval/response_length": float(result.lengths.mean()),
        "eval/truncated_share": float(result.truncated.mean()),
    }
    for k in powers_of_two(result.rewards.shape[1]):
        metrics[f"eval/pass_at_{k}"] = pass_at_k(result.correct, k)
    return metrics
