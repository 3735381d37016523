"""What routing replay takes out of log-ratios: an engine against the trainer, native, R2 and R3.

    python benchmarks/routing_replay.py [--engine vllm|transformers] [--model builtin:NAME|PATH|random] ...

An engine answers addition problems at temperature 1. The trainer gives the same tokens log-probs at the same weights,
then again after some updates (Adam on policy gradients, in float32), with three kinds of routing: the routers' own
choice (native), the trainer's own choice at generation weights (r2), the engine's choice (r3). Engines that record
router probabilities (transformers) add r3 with recorded gate weights. Nothing is written.

``--model random`` is an untrained Qwen3-MoE of 4 layers with 32 experts; its advantages are random signs.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from vespo_lightning.models.loading import load_model, load_tokenizer, resolve_model_path
from vespo_lightning.models.tiny_moe import byte_tokenizer, tiny_qwen3_moe
from vespo_lightning.rollouts.engine import GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.rollouts.vllm_engine import VllmEngine
from vespo_lightning.routing.layout import collapse_layers
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.training.micro_batches import collate
from vespo_lightning.training.policy import ModelInputs, Policy
from vespo_lightning.training.reference import sample_log_probs
from vespo_lightning.training.routing_batches import Replayed, recording_trainer_experts, replaying

TOKEN_BUDGET = 8192
MINI_BATCH = 64
GROUP = 8
#: Standard deviation of the random model's weights: routers that prefer some experts, as trained ones do.
RANDOM_STD = 0.2

Around = Callable[[ModelInputs, Sequence[Sample]], AbstractContextManager[None]]


@dataclass(frozen=True)
class Mode:
    """A kind of routing."""

    name: str
    replayed: Replayed
    gate_weights: bool = False

    def around(self, tap: RouterTap, inputs: ModelInputs, samples: Sequence[Sample]) -> AbstractContextManager[None]:
        return replaying(tap, self.replayed, self.gate_weights, inputs, samples)


@dataclass(frozen=True)
class Scores:
    """Log-probs of all response tokens by the trainer, and the experts of those positions."""

    log_prob: np.ndarray
    """float64 [T]"""
    experts: Tensor
    """int64 [T, L, K]"""


def save_random(folder: str, seed: int) -> None:
    tokenizer = byte_tokenizer()
    sizes = {"hidden_size": 128, "layers": 4, "experts": 32, "experts_per_token": 4, "expert_size": 64}
    model = tiny_qwen3_moe(tokenizer, **sizes)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            torch.nn.init.normal_(parameter, std=RANDOM_STD, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def generate(engine: RolloutEngine, path: str, count: int, max_new_tokens: int, seed: int) -> list[Sample]:
    task, tokenizer = AdditionTask(), load_tokenizer(path)
    problems = [task.train_problem(seed, i // GROUP) for i in range(count)]
    prompts = [tokenizer.encode(problem.prompt, add_special_tokens=False) for problem in problems]
    requests = [GenerationRequest(prompt, 2**20 * seed + i) for i, prompt in enumerate(prompts)]
    generations = engine.generate(requests, SamplingParams(1.0, max_new_tokens))
    texts = [tokenizer.decode(g.token_ids, skip_special_tokens=True) for g in generations]
    verdicts = task.verify(problems, texts)
    return [
        Sample(
            prompt_id=str(i // GROUP),
            group_id=str(i // GROUP),
            index=i % GROUP,
            seed=request.seed,
            prompt_ids=np.array(request.prompt_ids, dtype=np.int32),
            response_ids=g.token_ids,
            behaviour_log_probs=g.log_probs,
            version_runs=[(0, len(g.token_ids))],
            loss_mask=np.ones(len(g.token_ids), dtype=bool),
            finish_reason=g.finish_reason,
            text=text,
            reward=verdict.reward,
            routed_experts=g.routed_experts,
            router_top_probs=g.router_top_probs,
        )
        for i, (request, g, text, verdict) in enumerate(zip(requests, generations, texts, verdicts, strict=True))
    ]


class Trainer:
    """A policy in the trainer's precision that scores samples under a kind of routing."""

    def __init__(self, path: str, dtype: str) -> None:
        self.model: PreTrainedModel = load_model(path, dtype).requires_grad_(False)
        self.policy = Policy(self.model)
        tap = RouterTap.attach(self.model)
        assert tap is not None, "the model has no MoE layers"
        self.tap = tap

    def take(self, weights: dict[str, Tensor]) -> None:
        self.model.load_state_dict(weights)

    def record(self, samples: Sequence[Sample]) -> None:
        """Keep the routers' own choice as ``trainer_experts``."""
        self._log_probs(samples, partial(recording_trainer_experts, self.tap))

    def score(self, samples: Sequence[Sample], mode: Mode) -> Scores:
        """Under ``mode``. The experts are those used."""
        used: dict[tuple[str, int], Tensor] = {}

        @contextmanager
        def watched(inputs: ModelInputs, chosen: Sequence[Sample]) -> Iterator[None]:
            with self.tap.recording() as record, mode.around(self.tap, inputs, chosen):
                yield
            for sample, start in zip(chosen, inputs.starts, strict=True):
                first = start + len(sample.prompt_ids) - 1  # the position that predicts the first response token
                used[sample.group_id, sample.index] = record.select(
                    torch.arange(first, first + len(sample.response_ids))
                ).experts

        log_probs = self._log_probs(samples, watched)
        experts = torch.cat([used[sample.group_id, sample.index] for sample in samples])
        return Scores(np.concatenate(log_probs).astype(np.float64), experts)

    def _log_probs(self, samples: Sequence[Sample], around: Around) -> list[np.ndarray]:
        return sample_log_probs(
            self.policy, samples, token_budget=TOKEN_BUDGET, layout="padded", temperature=1.0, around=around
        )


class Drift:
    """Float32 weights that are trained on the samples."""

    def __init__(self, path: str, lr: float, seed: int) -> None:
        self.policy = Policy(load_model(path, "float32"))
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)
        self.seed = seed

    def run(self, samples: Sequence[Sample], updates: int) -> str:
        """Policy-gradient steps, mini-batch after mini-batch; returns what the advantages were."""
        advantages = group_advantages(samples)
        kind = "rewards minus their group's mean"
        if not advantages.any():
            advantages = np.random.default_rng(self.seed).choice([-1.0, 1.0], len(samples))
            kind = "random signs, because all rewards of each group are equal"
        batches = max(1, len(samples) // MINI_BATCH)
        for update in range(updates):
            chosen = range(update % batches * MINI_BATCH, min(len(samples), (update % batches + 1) * MINI_BATCH))
            self._step([samples[i] for i in chosen], advantages[list(chosen)])
        return kind

    def _step(self, samples: Sequence[Sample], advantages: np.ndarray) -> None:
        log_prob = self.policy(collate(samples)).log_prob
        weights = np.repeat(advantages, [len(sample.response_ids) for sample in samples])
        loss = -(torch.from_numpy(weights).float() * log_prob).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def weights(self) -> dict[str, Tensor]:
        return self.policy.model.state_dict()


def group_advantages(samples: Sequence[Sample]) -> np.ndarray:
    rewards = np.array([sample.reward for sample in samples]).reshape(-1, GROUP)
    return (rewards - rewards.mean(1, keepdims=True)).reshape(-1)


def per_sequence(values: np.ndarray, samples: Sequence[Sample]) -> np.ndarray:
    """Sums over the tokens of each response."""
    return np.add.reduceat(values, np.cumsum([0, *(len(sample.response_ids) for sample in samples[:-1])]))


def engine_experts(samples: Sequence[Sample], layers: Sequence[int]) -> Tensor:
    """int64 [T, L, K] of the positions that predict response tokens."""
    return torch.cat([collapse_layers(s.routed_experts[len(s.prompt_ids) - 1 :], layers) for s in samples])


def changed(experts: Tensor, others: Tensor) -> Tensor:
    """bool [T, L]: whether the sets differ."""
    return (experts.sort(-1).values != others.sort(-1).values).any(-1)


def from_first_change(sets: Tensor, samples: Sequence[Sample]) -> np.ndarray:
    """bool [T]: tokens from the first changed set of their response on. Later ones attend to what it moved."""
    pieces = sets.any(1).numpy()
    ends = np.cumsum([len(sample.response_ids) for sample in samples])
    return np.concatenate([np.maximum.accumulate(piece) for piece in np.split(pieces, ends[:-1])])


def print_mismatch(modes: Sequence[Mode], scores: dict[str, Scores], samples: Sequence[Sample], routed: Tensor) -> None:
    """d = log-prob of the trainer - of the engine; k3 = exp(d) - 1 - d."""
    engine = np.concatenate([sample.behaviour_log_probs for sample in samples]).astype(np.float64)
    disturbed = from_first_change(changed(scores["native"].experts, routed), samples)
    print(
        "| same weights | k3 KL | of it, once a set changed natively | mean abs(d) | max abs(d) | mean abs(sum d) "
        "| changed sets | changed tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for mode in modes:
        d = scores[mode.name].log_prob - engine
        k3 = np.expm1(d) - d
        sums = np.abs(per_sequence(d, samples))
        sets = changed(scores[mode.name].experts, routed)
        print(
            f"| {mode.name} | {k3.mean():.2e} | {(k3 * disturbed).mean():.2e} | {np.abs(d).mean():.2e} "
            f"| {np.abs(d).max():.2e} | {sums.mean():.2e} | {100 * sets.double().mean():.2f} % "
            f"| {100 * sets.any(1).double().mean():.1f} % |"
        )


def print_drift(
    modes: Sequence[Mode],
    before: dict[str, Scores],
    after: dict[str, Scores],
    samples: Sequence[Sample],
    routed: Tensor,
    updates: int,
) -> None:
    """Log-ratios of the policy after the updates, to the engine's log-probs and to the trainer's own of then."""
    engine = np.concatenate([sample.behaviour_log_probs for sample in samples]).astype(np.float64)
    print(
        f"| after {updates} updates | std, to engine | mean abs(sum), to engine | std, to trainer "
        "| mean abs(sum), to trainer | sets not the engine's |"
    )
    print("|---|---|---|---|---|---|")
    for mode in modes:
        cells = []
        for then in (engine, before[mode.name].log_prob):
            ratio = after[mode.name].log_prob - then
            cells += [f"{ratio.std():.2e}", f"{np.abs(per_sequence(ratio, samples)).mean():.2e}"]
        share = changed(after[mode.name].experts, routed).double().mean()
        print(f"| {mode.name} | {' | '.join(cells)} | {100 * share:.2f} % |")


def make_engine(name: str, dtype: str) -> RolloutEngine:
    return VllmEngine(dtype=dtype, max_num_seqs=64) if name == "vllm" else TransformersEngine(dtype=dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--model", default="builtin:tiny-addition-moe")
    parser.add_argument("--engine-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--trainer-dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--sequences", type=int, default=1024, help=f"responses, a multiple of {GROUP}")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    parser.add_argument("--updates", type=int, default=4, help="0: no second table")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.sequences < GROUP or options.sequences % GROUP:
        parser.error(f"--sequences {options.sequences} is not a multiple of {GROUP}")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "random":
            save_random(folder, options.seed)
        compare(folder if options.model == "random" else resolve_model_path(options.model), options)


def compare(path: str, options: argparse.Namespace) -> None:
    engine = make_engine(options.engine, options.engine_dtype)
    engine.start(path)
    samples = generate(engine, path, options.sequences, options.max_new_tokens, options.seed)
    engine.close()
    trainer = Trainer(path, options.trainer_dtype)
    tap = trainer.tap
    routed = engine_experts(samples, tap.layers)
    modes = [Mode("native", "none"), Mode("r2", "trainer"), Mode("r3", "engine")]
    if samples[0].router_top_probs is not None:
        modes.append(Mode("r3, gate weights too", "engine", gate_weights=True))

    trainer.record(samples)
    before = {mode.name: trainer.score(samples, mode) for mode in modes}
    print(
        f"{options.model}: {len(tap.layers)} MoE layers, {tap.num_experts} experts, {tap.top_k} per token; "
        f"{options.engine} in {options.engine_dtype}, trainer in {options.trainer_dtype}; {len(samples)} responses, "
        f"{len(routed)} tokens\n"
    )
    print_mismatch(modes, before, samples, routed)
    if options.updates:
        drift = Drift(path, options.lr, options.seed)
        kind = drift.run(samples, options.updates)
        trainer.take(drift.weights())
        after = {mode.name: trainer.score(samples, mode) for mode in modes}
        print(f"\nAdam, learning rate {options.lr:g}, {MINI_BATCH} responses; advantages: {kind}\n")
        print_drift(modes, before, after, samples, routed, options.updates)


if __name__ == "__main__":
    main()
