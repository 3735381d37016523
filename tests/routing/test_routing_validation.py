"""Recorded routing that cannot be this sample's is refused, with the sample's name."""

import re

import numpy as np
import pytest

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.validation import check_recorded_experts, check_recorded_probs

PROMPT, RESPONSE, DEPTH, LAYERS, EXPERTS, TOP_K = 4, 3, 4, [1, 2, 3], 8, 2
NAME = re.escape("sample 5/2/7 (prompt addition-19) ")


def sample(experts: np.ndarray | None, probs: np.ndarray | None = None) -> Sample:
    return Sample(
        prompt_id="addition-19",
        group_id="5/2",
        index=7,
        seed=0,
        prompt_ids=np.arange(PROMPT, dtype=np.int32),
        response_ids=np.arange(RESPONSE, dtype=np.int32),
        behaviour_log_probs=np.zeros(RESPONSE, np.float32),
        version_runs=[(0, RESPONSE)],
        loss_mask=np.ones(RESPONSE, bool),
        finish_reason="stop",
        text="",
        reward=0.0,
        routed_experts=experts,
        router_top_probs=probs,
    )


def recorded(rows: int = PROMPT + RESPONSE - 1, depth: int = DEPTH, top_k: int = TOP_K) -> np.ndarray:
    """int16 [rows, depth, top_k], distinct in each row, -1 in the dense layer 0."""
    rng = np.random.default_rng(0)
    experts = rng.permuted(np.tile(np.arange(EXPERTS), (rows, depth, 1)), axis=-1)[..., :top_k].astype(np.int16)
    experts[:, 0] = -1
    return experts


def check(experts: np.ndarray | None, top_k: int = TOP_K) -> None:
    check_recorded_experts(sample(experts), DEPTH, LAYERS, EXPERTS, top_k)


def test_good_recordings_pass() -> None:
    check(recorded())
    check(recorded().astype(np.uint16))
    zeros_in_dense_layers = recorded()
    zeros_in_dense_layers[:, 0] = 0  # as vLLM fills them
    check(zeros_in_dense_layers)


def changed(index: tuple, value: object) -> np.ndarray:
    experts = recorded()
    experts[index] = value
    return experts


@pytest.mark.parametrize(
    ("experts", "problem"),
    [
        (None, "are missing; .* set routing=native"),
        (recorded().astype(np.float16), r"are float16 \(6, 4, 2\), not integer"),
        (recorded()[0], r"are int16 \(4, 2\), not integer \[tokens - 1, layers, K\]"),
        (recorded(rows=7), "have 7 rows for 7 tokens instead of 6: one per token but the last"),
        (recorded(rows=5), "have 5 rows for 7 tokens instead of 6"),
        (recorded(depth=3), "are for 3 layers with 2 experts per token, the trainer's model has 4 with 2"),
        (recorded(top_k=3), "are for 4 layers with 3 experts per token, .* run the same model"),
        (changed((4, 2, 1), 8), "go up to expert 8, the trainer's model has 8 per layer; .* run the same model"),
        (changed((slice(2, 5), 1), -1), "are unknown for 3 of 6 tokens, the first at position 2"),
        (changed((slice(None), 2), 0), "are expert 0 throughout in decoder layers 2: the engine captured nothing"),
        (changed((slice(None),), 0), "are expert 0 throughout in decoder layers 1, 2, 3: "),
        (changed((3, 2), 5), "name an expert twice at position 3 in decoder layer 2"),
    ],
)
def test_bad_recordings_are_refused_by_name(experts: np.ndarray | None, problem: str) -> None:
    with pytest.raises(UserError, match=f"^engine: routed experts of {NAME}{problem}"):
        check(experts)


def test_one_expert_per_token() -> None:
    single = recorded(top_k=1)
    single[:, 2] = 0  # a router that always takes expert 0
    check(single, top_k=1)
    with pytest.raises(UserError, match="expert 0 throughout in decoder layers 1, 2, 3"):
        check(np.zeros_like(single), top_k=1)


def test_probabilities() -> None:
    experts = recorded()
    good = np.full(experts.shape, 0.25, dtype=np.float16)
    good[:, 0] = 0
    check_recorded_probs(sample(experts, good))
    for probs, problem in (
        (None, "are missing; use an engine that returns them"),
        (good[1:], r"have the shape \(5, 4, 2\), its routed experts \(6, 4, 2\)"),
        (np.where(experts == experts[2, 2, 0], np.float16(np.nan), good), "are not all between 0 and 1"),
        (good * np.float16(5), "are not all between 0 and 1"),
        (np.zeros_like(good), "are not all between 0 and 1 with a sum above 0"),
    ):
        with pytest.raises(UserError, match=f"^engine: router probabilities of {NAME}{problem}"):
            check_recorded_probs(sample(experts, probs))
