"""An engine, a policy and a task without a model, for tests of what surrounds them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from pieces import tokenizer
from torch import Tensor

from vespo_lightning.rollouts.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.tasks.base import Problem, Task, Verdict


class FakePolicy:
    """One weight; its log-probs depend on it. Its reference has a weight of its own."""

    def __init__(self, reference: float = -2.0) -> None:
        self.reference = reference
        self.weight = torch.ones(3)
        self.policy_version = 0

    def update(self) -> None:
        self.weight = self.weight + 1
        self.policy_version += 1

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield "weight", self.weight

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [score(self.weight, s) for s in sequences]

    def recompute(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            sample.recomputed_log_probs = np.full(len(sample.response_ids), -float(self.weight[0]), dtype=np.float32)

    def check_routing(self, samples: Sequence[Sample]) -> None:
        assert samples

    def reference_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        return [self.reference * s.response_ids.astype(np.float32) / 24 for s in samples]

    def reference_checksum(self) -> str:
        return f"{-self.reference:g}"


def score(weight: Tensor, sequence: Sequence[int]) -> np.ndarray:
    return -np.asarray(sequence[1:], dtype=np.float32) * float(weight[0])


class FakeEngine(RolloutEngine):
    """Responses are pure functions of prompt, seed and weight; about half of them are cut at the limit."""

    dtype = torch.float32
    returns_routing = False

    def __init__(self) -> None:
        self.calls: list[list[GenerationRequest]] = []
        self.sampling: list[SamplingParams] = []
        self.resets = 0
        self.closed = False

    def start(self, model_path: str) -> None:
        self.weight = torch.ones(3)
        self.version = 0

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        self.calls.append(list(requests))
        self.sampling.append(sampling)
        return [self._respond(request, sampling.max_new_tokens, sampling.top_log_probs) for request in requests]

    def _respond(self, request: GenerationRequest, limit: int, top: int) -> Generation:
        rng = np.random.default_rng([request.seed, *request.prompt_ids, int(self.weight[0])])
        truncated = rng.random() < 0.5
        length = limit if truncated else int(rng.integers(1, limit + 1))
        ids = rng.integers(2, 24, length).astype(np.int32)
        if not truncated:
            ids[-1] = 1
        log_probs = -rng.random(length).astype(np.float32)
        generation = Generation(ids, log_probs, "length" if truncated else "stop")
        if top:
            generation.top_ids = rng.integers(0, 24, (length, top)).astype(np.int32)
            generation.top_log_probs = -np.sort(rng.random((length, top)).astype(np.float32), axis=1)
        return generation

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self.weight = dict(tensors)["weight"].clone()
        self.version = version

    def fingerprint(self) -> int:
        return fingerprint([self.weight])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return [score(self.weight, s) for s in sequences]

    def reset_cache(self) -> None:
        self.resets += 1

    def close(self) -> None:
        self.closed = True


class FakeTask(Task):
    """Problem i has the prompt ``i+i=``; the reward is a hash of the response, in eighths. Prompts repeat after 50."""

    name = "fake"
    max_reward_errors: int | None = None

    def __init__(self, errors_on: str | None = None, max_reward_errors: int | None = None) -> None:
        self.errors_on, self.max_reward_errors = errors_on, max_reward_errors
        self.closed = False

    def train_problem(self, seed: int, index: int) -> Problem:
        number = index % 50
        return Problem(f"{number}+{number}", f"{number}+{number}=", str(2 * number))

    def held_out(self) -> Sequence[Problem]:
        return [Problem("60+60", "60+60=", "120"), Problem("61+61", "61+61=", "122")]

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        return [
            Verdict(0.0, "the reward function raised ValueError")
            if self.errors_on is not None and self.errors_on in response
            else Verdict(sum(map(ord, response)) % 8 / 8)
            for problem, response in zip(problems, responses, strict=True)
        ]

    def close(self) -> None:
        self.closed = True


class UnevenTask(FakeTask):
    """Every third problem is hopeless; elsewhere the reward is 0 or 1, so that some groups are uniform by chance."""

    def verify(self, problems: Sequence[Problem], responses: Sequence[str]) -> list[Verdict]:
        judged = super().verify(problems, responses)
        return [
            Verdict(0.0 if int(problem.reference) % 3 == 0 else float(verdict.reward >= 0.5), verdict.error)
            for problem, verdict in zip(problems, judged, strict=True)
        ]


def make_producer(
    folder: object, task: FakeTask | None = None, policy: FakePolicy | None = None, **options: Any
) -> RolloutProducer:
    """A started producer of fake parts: groups of four, two groups per chunk, at most six tokens."""
    defaults: dict[str, Any] = {"group_size": 4, "max_new_tokens": 6, "chunk_groups": 2, "seed": 3}
    producer = RolloutProducer(task or FakeTask(), tokenizer(), FakeEngine(), str(folder), **defaults | options)
    producer.start("unused", FakePolicy())
    if policy is not None:  # which may have been trained already, where a run is resumed
        producer._source = policy
    return producer


def same_samples(a: Sequence[Sample], b: Sequence[Sample]) -> bool:
    """Every field, arrays bit for bit with their dtypes."""

    def equal(x: object, y: object) -> bool:
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray):
            return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        return type(x) is type(y) and x == y

    return len(a) == len(b) and all(
        equal(getattr(x, name), getattr(y, name)) for x, y in zip(a, b, strict=True) for name in x.__dataclass_fields__
    )
