"""Judged responses of an engine to given problems."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from vespo_lightning.diagnostics.evaluation import EvaluationResult
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.randomness import sample_seed
from vespo_lightning.tasks.base import Problem, Task
from vespo_lightning.tasks.prompts import render_prompt

#: Version in the seeds of evaluation: the same at every evaluation, and no training sample's.
EVALUATION_VERSION = -1


def evaluate_engine(
    engine: RolloutEngine,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    samples_per_problem: int,
    sampling: SamplingParams,
    seed: int,
) -> EvaluationResult:
    """Generate ``samples_per_problem`` responses to each problem with the engine's present weights, and judge them."""
    requests = [
        GenerationRequest(
            render_prompt(tokenizer, problem.prompt), sample_seed(seed, i, problem.id, k, EVALUATION_VERSION)
        )
        for i, problem in enumerate(problems)
        for k in range(samples_per_problem)
    ]
    engine.reset_cache()
    generations = engine.generate(requests, sampling)
    texts = [decode(tokenizer, generation) for generation in generations]
    posed = [problem for problem in problems for _ in range(samples_per_problem)]
    verdicts = task.verify(posed, texts)
    shape = (len(problems), samples_per_problem)
    return EvaluationResult(
        rewards=np.array([v.reward for v in verdicts]).reshape(shape),
        truncated=np.array([g.finish_reason == "length" for g in generations]).reshape(shape),
        lengths=np.array([len(g.token_ids) for g in generations]).reshape(shape),
    )


def decode(tokenizer: PreTrainedTokenizerBase, generation: Generation) -> str:
    """The response as text, without special tokens."""
    return str(tokenizer.decode(generation.token_ids.tolist(), skip_special_tokens=True))
