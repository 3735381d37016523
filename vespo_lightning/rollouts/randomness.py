"""Counted randomness: every number is a pure function of names and positions, never of what was drawn before."""

from __future__ import annotations

import hashlib

import numpy as np


def sample_seed(run_seed: int, prompt_index: int, prompt_id: str, sample_index: int, version: int) -> int:
    """Seed in [0, 2**63) of one response.

    ``prompt_index`` is the place of the prompt in the run's stream of prompts: a small training file poses the same
    problem again, perhaps twice in one rollout, and those responses must differ.
    """
    name = f"{run_seed}\x00{prompt_index}\x00{prompt_id}\x00{sample_index}\x00{version}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def uniforms(seeds: np.ndarray, columns: int) -> np.ndarray:
    """float64 [len(seeds), columns] in [0, 1): entry (i, t) depends on seed i and t only.

    SplitMix64 (Steele, Lea, Flood 2014), whose output at step t is computed directly from seed + (t + 1) * gamma.
    """
    gamma = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        step = (np.arange(1, columns + 1, dtype=np.uint64) * gamma)[None, :]
        z = seeds.astype(np.uint64)[:, None] + step
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) * 2.0**-53
