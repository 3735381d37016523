"""Counted randomness."""

from __future__ import annotations

import itertools

import numpy as np

from vespo_lightning.rollouts.randomness import sample_seed, uniforms


def test_seeds_are_a_fixed_function_of_their_names():
    """This number may not change: runs of earlier versions are resumed with it."""
    assert sample_seed(1, 2, "12+34", 3, 4) == 0x2B4A3C741B1192B3


def test_every_part_of_the_name_matters():
    parts = itertools.product([0, 1], [0, 1, 12], ["", "1", "1+1"], [0, 1, 21], [-1, 0, 1])
    seeds = [sample_seed(*part) for part in parts]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_parts_do_not_run_together():
    assert sample_seed(1, 11, "a", 0, 0) != sample_seed(11, 1, "a", 0, 0)
    assert sample_seed(0, 0, "a", 11, 1) != sample_seed(0, 0, "a", 1, 11)


def test_uniforms_are_splitmix64():
    """Against the published algorithm, one number at a time."""
    mask = 2**64 - 1

    def reference(seed, count):
        state = seed
        for _ in range(count):
            state = (state + 0x9E3779B97F4A7C15) & mask
            z = state
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            yield ((z ^ (z >> 31)) >> 11) / 2**53

    seeds = np.array([0, 1, 2**63 - 1, 1234567], dtype=np.uint64)
    got = uniforms(seeds, 6)
    assert got.dtype == np.float64
    assert got.tolist() == [list(reference(int(seed), 6)) for seed in seeds]


def test_a_number_depends_on_its_own_seed_and_place_only():
    seeds = np.arange(5, dtype=np.uint64)
    wide = uniforms(seeds, 40)
    assert np.array_equal(uniforms(seeds[3:4], 7), wide[3:4, :7])
    assert np.array_equal(uniforms(seeds[::-1].copy(), 40), wide[::-1])


def test_uniforms_are_uniform():
    """Moments, neighbours along both axes, and 16 bins (chi-square, 99.99 %), for seeds of real samples."""
    seeds = np.array([sample_seed(0, p, "x", k, 0) for p in range(250) for k in range(8)], dtype=np.uint64)
    values = uniforms(seeds, 50)
    assert (values >= 0).all() and (values < 1).all()
    count = values.size
    assert abs(values.mean() - 0.5) < 4 / np.sqrt(12 * count)
    assert abs(values.var() - 1 / 12) < 0.001
    for a, b in ((values[:, 1:], values[:, :-1]), (values[1:], values[:-1])):
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 4 / np.sqrt(a.size)
    bins = np.histogram(values, 16, (0, 1))[0]
    assert ((bins - count / 16) ** 2 / (count / 16)).sum() < 44.3
