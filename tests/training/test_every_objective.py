"""Every objective that can be configured trains, and logs the numbers that runs are compared by."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose
from hydra.utils import instantiate
from pieces import fit, make_mini_batch, make_samples, tiny_policy

from vespo_lightning.config_check import CONFIG_PATH, config_source
from vespo_lightning.training.module import PolicyModule

CONF = Path(__file__).resolve().parents[2] / "conf"
OBJECTIVES = [file.stem for file in sorted((CONF / "objective").glob("*.yaml"))]
CASES = [(name, []) for name in OBJECTIVES] + [
    ("dppo", ["objective.divergence=binary_kl"]),
    ("dppo", ["objective.divergence=topk_tv"]),
    ("dppo", ["objective.divergence=topk_kl"]),
    ("m2po", ["objective.mode=adaptive_clip"]),
    ("vespo", ["objective.normalisation=length"]),
]
COMMON = {"objective/coefficient_positive_mean", "objective/coefficient_negative_mean", "objective/zero_share"}


def full_samples(model):
    """With everything that any objective may need: recomputed log-probs and top-k ones."""
    rng = np.random.default_rng(3)
    samples = make_samples(model, noise=0.3)
    for sample in samples:
        length = len(sample.response_ids)
        sample.recomputed_log_probs = sample.behaviour_log_probs + np.float32(0.05)
        sample.top_ids = np.stack([rng.permutation(24)[:4] for _ in range(length)]).astype(np.int32)
        sample.top_log_probs = -np.sort(rng.uniform(1.5, 6.0, (length, 4))).astype(np.float32)
    return samples


@pytest.mark.parametrize(("name", "overrides"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_two_updates(name, overrides):
    with config_source(CONFIG_PATH):
        cfg = compose("train", [f"objective={name}", *overrides])
    model = tiny_policy()
    module = PolicyModule(model, instantiate(cfg.objective), lr=1e-3)
    batches = [make_mini_batch(full_samples(model), update=i) for i in range(2)]
    fit(module, batches)
    assert module.policy_version == 2 and module.skipped_updates == 0
    row = module.take_record()
    assert row.keys() >= COMMON
    assert all(math.isfinite(value) for key, value in row.items() if key.startswith("objective/"))
    assert torch.isfinite(module.last_update.coefficient).all()
    assert module.last_update.grad_norm > 0
