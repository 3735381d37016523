"""Makes rollouts: prompts -> engine -> verifier, with the weights of the moment, chunk by chunk onto the disk."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, Protocol

import numpy as np
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vespo_lightning.diagnostics.evaluation import EvaluationResult
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.evaluation import decode, evaluate_engine
from vespo_lightning.rollouts.gathering import Gathering, Rollout
from vespo_lightning.rollouts.randomness import sample_seed
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.store import RolloutStore
from vespo_lightning.rollouts.weight_check import WeightCheck, canary_sequences
from vespo_lightning.tasks.base import Problem, Task
from vespo_lightning.tasks.prompts import render_prompt

#: (place in the stream of prompts, problem)
Prompt = tuple[int, Problem]


class WeightSource(Protocol):
    """What a producer needs of the policy that is being trained."""

    policy_version: int

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]: ...

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]: ...

    def recompute(self, samples: Sequence[Sample]) -> None: ...

    def check_routing(self, samples: Sequence[Sample]) -> None: ...

    def reference_log_probs(self, samples: Sequence[Sample]) -> list[np.ndarray]: ...

    def reference_checksum(self) -> str: ...


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
        recompute: store what the trainer says of the samples too: its log-probs (``denominator=recomputed``), and its
            routing under ``routing=r2``.
        routing: what updates will replay; under ``r3`` the engine's routing is checked.
        shuffle_rewards: permute rewards among the responses of a chunk: a control that must not learn.
        top_p, top_k: sample from the likeliest tokens only.
        top_log_probs: keep the log-probs of this many likeliest tokens at each position.
        reference: store the log-probs of the reference policy too (a KL penalty is on).
        dynamic_sampling: put groups of further prompts in the place of groups whose rewards are all equal, as DAPO
            does (arXiv 2503.14476).
        max_refills: rounds of doing so; what is uniform after the last one stays.
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
        routing: Literal["native", "r2", "r3"] = "native",
        shuffle_rewards: bool = False,
        top_p: float = 1.0,
        top_k: int | None = None,
        top_log_probs: int = 0,
        reference: bool = False,
        dynamic_sampling: bool = False,
        max_refills: int = 4,
    ) -> None:
        self.task, self.tokenizer, self.engine = task, tokenizer, engine
        self.store = RolloutStore(folder)
        self.check = WeightCheck(engine, canary_sequences(len(tokenizer)))
        self.group_size = group_size
        self.sampling = SamplingParams(temperature, max_new_tokens, top_p, top_k, top_log_probs)
        self.context = context
        self.seed = seed
        self.chunk_groups = chunk_groups
        self.truncated = truncated
        self.truncated_reward = truncated_reward
        self.recompute = recompute or routing == "r2"
        self.routing = routing
        self.shuffle_rewards = shuffle_rewards
        self.reference = reference
        self.dynamic_sampling = dynamic_sampling
        self.max_refills = max_refills
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

    def produce(
        self, rollout: int, prompts: Sequence[Prompt], more: Callable[[int], Sequence[Prompt]] | None = None
    ) -> Rollout:
        """One group of responses for each prompt.

        Args:
            more: the next so many prompts of the stream, for dynamic sampling; None leaves uniform groups where they
                are.
        """
        metrics = self.sync()
        more = more if self.dynamic_sampling else None
        gathering = self._gather(rollout, self._identity(prompts), prompts, more)
        self.reward_errors += sum(sample.reward_error is not None for sample in gathering.samples)
        made = gathering.rollout()
        return replace(made, metrics=metrics | made.metrics | (gathering.refill_metrics() if more else {}))

    def reload(self, rollout: int, identity: dict[str, Any]) -> Rollout:
        """A rollout that was made before, from the disk.

        Raises:
            UserError: it is not there any more.
        """
        return self._gather(rollout, identity).rollout()

    def check_reference(self, identity: dict[str, Any]) -> None:
        """Raises UserError when the reference policy is not the one of a rollout made before."""
        before, now = identity.get("reference"), self._reference_checksum()
        if before != now:
            raise UserError(
                f"kl.reference (null: model.path) does not hold the weights that this run began with (checksum {now}, "
                f"it was {before}); put them back and resume, or start a new run"
            )

    def _reference_checksum(self) -> str | None:
        return self.source.reference_checksum() if self.reference else None

    def _identity(self, prompts: Sequence[Prompt]) -> dict[str, Any]:
        """What decides the first round of groups; dynamic sampling adds ``refills``, the prompts of the others."""
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
            "routing": self.routing,
            "shuffle_rewards": self.shuffle_rewards,
            "top_p": self.sampling.top_p,
            "top_k": self.sampling.top_k,
            "top_log_probs": self.sampling.top_log_probs,
            "reference": self._reference_checksum(),
        }

    def _gather(
        self,
        rollout: int,
        identity: dict[str, Any],
        prompts: Sequence[Prompt] | None = None,
        more: Callable[[int], Sequence[Prompt]] | None = None,
    ) -> Gathering:
        """All groups of a rollout: those on the disk are read, the others made of ``prompts``, if given."""
        known: list[str] = identity.get("refills", [])
        first = {name: value for name, value in identity.items() if name != "refills"}
        gathering = Gathering(rollout, first)
        self._add_groups(gathering, identity["groups"], first, prompts)
        for refill in range(self.max_refills if more is not None else len(known)):
            places = gathering.uniform_places()
            if not places:
                break
            taken = None if more is None else more(len(places))
            digest = known[refill] if taken is None else _digest(taken)
            self._add_groups(gathering, len(places), {**first, "prompts": digest}, taken)
            gathering.refill(places, digest)
        return gathering

    def _add_groups(
        self, gathering: Gathering, count: int, identity: dict[str, Any], prompts: Sequence[Prompt] | None
    ) -> None:
        """``count`` more groups, chunk by chunk."""
        rollout, size = gathering.number, identity["chunk_groups"]
        for start in range(0, count, size):
            chunk = gathering.chunks
            found = self.store.read(rollout, chunk, identity)
            if found is None:
                if prompts is None:
                    raise UserError(
                        f"chunk {chunk} of rollout {rollout} is missing in {self.store.folder}, so the run cannot go "
                        "on exactly; put the folder back, or start a new run from the export of this one"
                    )
                found = self._make_chunk(rollout, len(gathering.groups), prompts[start : start + size])
                # before it is written, so that a resumed run judges these responses again
                self._check_errors([*gathering.samples, *found[0]])
                self.store.write(rollout, chunk, found[0], identity, found[1])
            gathering.add(*found)

    def _make_chunk(
        self, rollout: int, offset: int, prompts: Sequence[Prompt]
    ) -> tuple[list[Sample], dict[str, float]]:
        """Samples of the groups of ``prompts``, which are numbered from ``offset``, and where the time went."""
        places, problems = zip(*prompts, strict=True)
        prompt_ids = [self._prompt_ids(problem) for problem in problems]
        members = [(g, k) for g in range(len(prompts)) for k in range(self.group_size)]
        version = self.engine.version
        seeds = [sample_seed(self.seed, places[g], problems[g].id, k, version) for g, k in members]
        requests = [GenerationRequest(prompt_ids[g], seed) for (g, _), seed in zip(members, seeds, strict=True)]
        started = time.perf_counter()
        self.engine.reset_cache()
        generations = self.engine.generate(requests, self.sampling)
        generated = time.perf_counter()
        texts = [decode(self.tokenizer, generation) for generation in generations]
        verdicts = self.task.verify([problems[g] for g, _ in members], texts)
        seconds = {
            "performance/generate_seconds": generated - started,
            "performance/verify_seconds": time.perf_counter() - generated,
        }
        samples = [
            Sample(
                prompt_id=problems[g].id,
                group_id=f"{rollout}/{offset + g}",
                index=k,
                seed=seeds[i],
                prompt_ids=np.asarray(prompt_ids[g], dtype=np.int32),
                text=texts[i],
                reward=verdicts[i].reward,
                reward_error=verdicts[i].error,
                **_response(generations[i], version),
            )
            for i, (g, k) in enumerate(members)
        ]
        self._adjust_rewards(samples, places[0])
        self._add_log_probs(samples, seconds)
        return samples, seconds

    def _add_log_probs(self, samples: list[Sample], seconds: dict[str, float]) -> None:
        """What only the trainer can give."""
        if self.routing == "r3" or samples[0].routed_experts is not None:
            self.source.check_routing(samples)
        started = time.perf_counter()
        if self.recompute:
            self.source.recompute(samples)
            seconds["performance/recompute_seconds"] = time.perf_counter() - started
        started = time.perf_counter()
        if self.reference:
            for sample, log_probs in zip(samples, self.source.reference_log_probs(samples), strict=True):
                sample.reference_log_probs = log_probs
            seconds["performance/reference_seconds"] = time.perf_counter() - started

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


def _response(generation: Generation, version: int) -> dict[str, Any]:
    """Fields of a sample that come from the engine."""
    length = len(generation.token_ids)
    return {
        "response_ids": generation.token_ids,
        "behaviour_log_probs": generation.log_probs,
        "version_runs": [(version, length)],
        "loss_mask": np.ones(length, dtype=bool),
        "finish_reason": generation.finish_reason,
        "top_ids": generation.top_ids,
        "top_log_probs": generation.top_log_probs,
        "routed_experts": generation.routed_experts,
        "router_top_probs": generation.router_top_probs,
    }


def _digest(prompts: Sequence[Prompt]) -> str:
    """Of what is posed and what counts as right: another task in the same folder makes its own rollouts."""
    posed = [(place, problem.id, problem.prompt, problem.reference) for place, problem in prompts]
    return hashlib.blake2b(json.dumps(posed).encode(), digest_size=8).hexdigest()
