"""Makes rollouts: prompts -> engine -> verifier, with the weights of the moment, chunk by chunk onto the disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vespo_lightning.diagnostics.evaluation import EvaluationResult
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.evaluation import decode, evaluate_engine
from vespo_lightning.rollouts.randomness import sample_seed
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.store import RolloutStore
from vespo_lightning.rollouts.weight_check import WeightCheck, canary_sequences
from vespo_lightning.tasks.base import Problem, Task
from vespo_lightning.tasks.prompts import render_prompt


class WeightSource(Protocol):
    """What a producer needs of the policy that is being trained."""

    policy_version: int

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def sample_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Rollout:
    samples: list[Sample]
    """whole groups, in the order of the prompts"""
    metrics: dict[str, float]
    identity: dict[str, Any]
    """what made it; plain values, part of checkpoints"""


class RolloutProducer:
    """Generates and judges groups of responses.

    Args:
        task: poses problems and judges responses.
        tokenizer: of the policy.
        engine: generates; owned by the producer from here on.
        folder: where the chunks are kept.
        group_size: responses per prompt.
        temperature: of sampling.
        max_new_tokens: longest response.
        context: longest prompt and response together that the model takes.
        seed: of the run.
        chunk_groups: groups per call of the engine; what a killed run may have to generate again.
        truncated: ``keep`` the reward of responses cut at ``max_new_tokens``, or ``penalise`` them with
            ``truncated_reward``, or ``mask`` them out of the loss (see the loader).
        recompute: store the trainer's own log-probs too (``denominator=recomputed``).
        shuffle_rewards: permute rewards among the responses of a chunk: a control that must not learn.
    """

    def __init__(
        self,
        task: Task,
        tokenizer: PreTrainedTokenizerBase,
        engine: RolloutEngine,
        folder: str,
        *,
        group_size: int = 8,
        temperature: float = 1.0,
        max_new_tokens: int = 128,
        context: int | None = None,
        seed: int = 0,
        chunk_groups: int = 64,
        truncated: Literal["keep", "mask", "penalise"] = "keep",
        truncated_reward: float = 0.0,
        recompute: bool = False,
        shuffle_rewards: bool = False,
    ) -> None:
        self.task, self.tokenizer, self.engine = task, tokenizer, engine
        self.store = RolloutStore(folder)
        self.check = WeightCheck(engine, canary_sequences(len(tokenizer)))
        self.group_size = group_size
        self.sampling = SamplingParams(temperature, max_new_tokens)
        self.context = context
        self.seed = seed
        self.chunk_groups = chunk_groups
        self.truncated = truncated
        self.truncated_reward = truncated_reward
        self.recompute = recompute
        self.shuffle_rewards = shuffle_rewards
        self.reward_errors = 0
        self.sync_metrics: dict[str, float] = {}
        """of the last synchronisation: seconds, canary"""
        self._source: WeightSource | None = None

    # ---- life of the engine ------------------------------------------------------------------------------------

    def start(self, model_path: str, source: WeightSource, calibration: dict[str, float] | None = None) -> None:
        """Start the engine from the folder that the policy was loaded from.

        Args:
            source: the policy; without ``calibration`` it holds the weights of that folder, and how exactly the
                engine serves them is measured.
            calibration: of the run that goes on, whose policy has moved on from the folder.
        """
        self._source = source
        self.engine.start(model_path)
        if calibration is None:
            self.check.calibrate(source.checkpoint_tensors(), source.score(self.check.sequences))
        else:
            self.check.calibration = calibration

    def sync(self) -> dict[str, float]:
        """Give the engine the current weights, and prove that it uses them.

        Raises:
            StaleWeightsError, CorruptWeightsError: it does not.
        """
        source = self.source
        started = time.perf_counter()
        self.sync_metrics = self.check.load(
            source.checkpoint_tensors(), source.policy_version, source.score(self.check.sequences)
        )
        self.sync_metrics["performance/sync_seconds"] = time.perf_counter() - started
        return self.sync_metrics

    def close(self) -> None:
        self.engine.close()
        self.task.close()

    @property
    def source(self) -> WeightSource:
        assert self._source is not None, "the producer was not started (callback RolloutGeneration is missing)"
        return self._source

    # ---- rollouts ----------------------------------------------------------------------------------------------

    def produce(self, rollout: int, prompts: Sequence[tuple[int, Problem]]) -> Rollout:
        """One group of responses for each (place in the stream of prompts, problem)."""
        metrics = self.sync()
        made = self._gather(rollout, self._identity(prompts), metrics, prompts)
        self.reward_errors += sum(sample.reward_error is not None for sample in made.samples)
        return made

    def reload(self, rollout: int, identity: dict[str, Any]) -> Rollout:
        """A rollout that was made before, from the disk.

        Raises:
            UserError: it is not there any more.
        """
        return self._gather(rollout, identity, {}, None)

    def _identity(self, prompts: Sequence[tuple[int, Problem]]) -> dict[str, Any]:
        return {
            "weights": f"{self.check.shipped:016x}",
            "version": self.engine.version,
            "seed": self.seed,
            "first_prompt": prompts[0][0],
            "groups": len(prompts),
            "group_size": self.group_size,
            "temperature": self.sampling.temperature,
            "max_new_tokens": self.sampling.max_new_tokens,
            "chunk_groups": self.chunk_groups,
            "prompts": _digest(prompts),
            "truncated": self.truncated,
            "truncated_reward": self.truncated_reward,
            "recompute": self.recompute,
            "shuffle_rewards": self.shuffle_rewards,
        }

    def _gather(
        self,
        rollout: int,
        identity: dict[str, Any],
        metrics: dict[str, float],
        prompts: Sequence[tuple[int, Problem]] | None,
    ) -> Rollout:
        """All chunks of a rollout: those on the disk are read, the others made of ``prompts``, if given."""
        samples: list[Sample] = []
        seconds: dict[str, float] = {}
        for chunk, start in enumerate(range(0, identity["groups"], self.chunk_groups)):
            found = self.store.read(rollout, chunk, identity)
            if found is None:
                if prompts is None:
                    raise UserError(
                        f"chunk {chunk} of rollout {rollout} is missing in {self.store.folder}, so the run cannot go "
                        "on exactly; put the folder back, or start a new run from the export of this one"
                    )
                found = self._make_chunk(rollout, start, prompts[start : start + self.chunk_groups])
                # before it is written, so that a resumed run judges these responses again
                self._check_errors([*samples, *found[0]])
                self.store.write(rollout, chunk, found[0], identity, found[1])
            samples += found[0]
            for name, value in found[1].items():
                seconds[name] = seconds.get(name, 0.0) + value
        return Rollout(samples, {**metrics, **seconds, **_rollout_metrics(samples)}, identity)

    def _make_chunk(
        self, rollout: int, offset: int, prompts: Sequence[tuple[int, Problem]]
    ) -> tuple[list[Sample], dict[str, float]]:
        places, problems = zip(*prompts, strict=True)
        prompt_ids = [self._prompt_ids(problem) for problem in problems]
        version = self.engine.version
        members = [(g, k) for g in range(len(prompts)) for k in range(self.group_size)]
        seeds = [sample_seed(self.seed, places[g], problems[g].id, k, version) for g, k in members]
        requests = [GenerationRequest(prompt_ids[g], seed) for (g, _), seed in zip(members, seeds, strict=True)]
        started = time.perf_counter()
        self.engine.reset_cache()
        generations = self.engine.generate(requests, self.sampling)
        generated = time.perf_counter()
        texts = [decode(self.tokenizer, generation) for generation in generations]
        verdicts = self.task.verify([problems[g] for g, _ in members], texts)
        verified = time.perf_counter()
        samples = [
            Sample(
                prompt_id=problems[g].id,
                group_id=f"{rollout}/{offset + g}",
                index=k,
                seed=seeds[i],
                prompt_ids=np.asarray(prompt_ids[g], dtype=np.int32),
                response_ids=generations[i].token_ids,
                behaviour_log_probs=generations[i].log_probs,
                version_runs=[(version, len(generations[i].token_ids))],
                loss_mask=np.ones(len(generations[i].token_ids), dtype=bool),
                finish_reason=generations[i].finish_reason,
                text=texts[i],
                reward=verdicts[i].reward,
                reward_error=verdicts[i].error,
                routed_experts=generations[i].routed_experts,
                router_top_probs=generations[i].router_top_probs,
            )
            for i, (g, k) in enumerate(members)
        ]
        self._adjust_rewards(samples, places[0])
        if self.recompute:
            for sample, log_probs in zip(samples, self.source.sample_log_probs(samples), strict=True):
                sample.recomputed_log_probs = log_probs
        seconds = {
            "performance/generate_seconds": generated - started,
            "performance/verify_seconds": verified - generated,
        }
        if self.recompute:
            seconds["performance/recompute_seconds"] = time.perf_counter() - verified
        return samples, seconds

    def _adjust_rewards(self, samples: list[Sample], place: int) -> None:
        if self.truncated == "penalise":
            for sample in samples:
                if sample.truncated:
                    sample.reward = self.truncated_reward
        if self.shuffle_rewards:
            order = np.random.default_rng([self.seed, place]).permutation(len(samples))
            rewards = [samples[i].reward for i in order]
            for sample, reward in zip(samples, rewards, strict=True):
                sample.reward = reward

    def _check_errors(self, samples: Sequence[Sample]) -> None:
        """Raises UserError when the samples of a rollout bring the run above its limit of reward errors."""
        failed = [sample for sample in samples if sample.reward_error is not None]
        errors = self.reward_errors + len(failed)
        limit = getattr(self.task, "max_reward_errors", None)
        if limit is not None and failed and errors > limit:
            raise UserError(
                f"task.max_reward_errors={limit} is exceeded: {errors} responses could not be judged, the last one "
                f"of prompt {failed[-1].prompt_id}: {failed[-1].reward_error}; mend the reward, then resume"
            )

    def _prompt_ids(self, problem: Problem) -> list[int]:
        ids = render_prompt(self.tokenizer, problem.prompt)
        if self.context is not None and len(ids) + self.sampling.max_new_tokens > self.context:
            raise UserError(
                f"prompt {problem.id} has {len(ids)} tokens; with rollout.max_new_tokens="
                f"{self.sampling.max_new_tokens} it exceeds the model's context of {self.context}; lower "
                "rollout.max_new_tokens or leave out long prompts"
            )
        return ids

    # ---- evaluation --------------------------------------------------------------------------------------------

    def evaluate(self, problems: Sequence[Problem], samples_per_problem: int, temperature: float) -> EvaluationResult:
        """Responses of the current policy to given problems, judged. Seeds are the same at every evaluation."""
        if self.engine.version != self.source.policy_version:
            self.sync()
        return evaluate_engine(
            self.engine,
            self.task,
            self.tokenizer,
            problems,
            samples_per_problem,
            SamplingParams(temperature, self.sampling.max_new_tokens),
            self.seed,
        )


def _digest(prompts: Sequence[tuple[int, Problem]]) -> str:
    """Of what is posed and what counts as right: another task in the same folder makes its own rollouts."""
    posed = [(place, problem.id, problem.prompt, problem.reference) for place, problem in prompts]
    return hashlib.blake2b(json.dumps(posed).encode(), digest_size=8).hexdigest()


def _rollout_metrics(samples: Sequence[Sample]) -> dict[str, float]:
    groups: dict[str, set[float]] = {}
    for sample in samples:
        groups.setdefault(sample.group_id, set()).add(sample.reward)
    return {
        "reward/rollout_mean": float(np.mean([s.reward for s in samples])),
        "reward/errors": float(sum(s.reward_error is not None for s in samples)),
        "reward/truncated_share": float(np.mean([s.truncated for s in samples])),
        "reward/response_length": float(np.mean([len(s.response_ids) for s in samples])),
        "reward/uniform_group_share": float(np.mean([len(rewards) == 1 for rewards in groups.values()])),
    }
