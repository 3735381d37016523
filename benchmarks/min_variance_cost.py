"""What the minimum-variance baseline costs: seconds of one mini-batch's gradient, with and without it.

    python benchmarks/min_variance_cost.py [--responses 64] [--group-size 8] [--model builtin:tiny-addition-moe]

Prints the time of the ordinary gradient (micro-batches of many responses), of the exact form (one backward pass per
response, two sums) and of the proxy (one more forward pass, with norms of the output embedding's gradient), taken in
turn; and how far the norms of the proxy agree with the exact ones.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.models.loading import load_model, load_tokenizer, resolve_model_path
from vespo_lightning.objectives.min_variance import min_variance_advantage
from vespo_lightning.rollouts.engine import GenerationRequest, SamplingParams
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.tasks.prompts import render_prompt
from vespo_lightning.training.gradient_norms import head_gradient_squared_norms
from vespo_lightning.training.log_probs import chunked_log_probs
from vespo_lightning.training.micro_batches import collate, plan_micro_batches
from vespo_lightning.training.per_sequence import min_variance_backward
from vespo_lightning.training.policy import Policy


def responses_to(path: str, count: int, group_size: int, device: str) -> list[Sample]:
    """Groups of responses to addition problems."""
    tokenizer, task = load_tokenizer(path), AdditionTask()
    engine = TransformersEngine(device=device, record_routing=False)
    engine.start(path)
    prompts = [render_prompt(tokenizer, task.train_problem(1, i // group_size).prompt) for i in range(count)]
    requests = [GenerationRequest(prompt, i) for i, prompt in enumerate(prompts)]
    return [
        Sample(
            prompt_id=str(i // group_size),
            group_id=str(i // group_size),
            index=i % group_size,
            seed=i,
            prompt_ids=np.array(prompts[i], dtype=np.int32),
            response_ids=response.token_ids,
            behaviour_log_probs=response.log_probs,
            version_runs=[(0, len(response.token_ids))],
            loss_mask=np.ones(len(response.token_ids), dtype=bool),
            finish_reason=response.finish_reason,
            text="",
            reward=float(i % 2),
        )
        for i, response in enumerate(engine.generate(requests, SamplingParams(max_new_tokens=72)))
    ]


class Gradients:
    """The three ways to the gradient of one mini-batch, REINFORCE with a mean over responses and tokens."""

    def __init__(self, policy: Policy, samples: list[Sample], device: str) -> None:
        self.policy, self.samples, self.device = policy, samples, device
        self.rewards = torch.tensor([s.reward for s in samples])
        self.group = torch.tensor([int(s.group_id) for s in samples])
        self.plan = plan_micro_batches([len(s.prompt_ids) + len(s.response_ids) for s in samples], 8192)
        self.advantage = self.rewards - 0.5
        self.norms: dict[str, Tensor] = {}

    def _backward(self, sequences: list[int], advantage: Tensor) -> None:
        chosen = [self.samples[i] for i in sequences]
        log_prob = self.policy(collate(chosen).to(self.device)).log_prob
        weight = torch.cat([torch.full((len(s.response_ids),), 1 / len(s.response_ids)) for s in chosen])
        multiplier = torch.cat([advantage[i].expand(len(self.samples[i].response_ids)) for i in sequences])
        (-(weight * multiplier).to(self.device) * log_prob).sum().backward()

    def ordinary(self) -> None:
        for sequences in self.plan:
            self._backward(sequences, self.advantage)

    def exact(self) -> None:
        ones = torch.ones(len(self.samples))
        found = min_variance_backward(
            self.policy.parameters(), self.rewards, self.group, lambda i: self._backward([i], ones)
        )
        self.norms["exact"] = found.squared_norm

    @torch.no_grad()
    def _head_norms(self) -> Tensor:
        norms = torch.zeros(len(self.samples), dtype=torch.float64)
        head = self.policy.model.get_output_embeddings()
        for sequences in self.plan:
            lengths = torch.tensor([len(self.samples[i].response_ids) for i in sequences])
            inputs = collate([self.samples[i] for i in sequences]).to(self.device)
            hidden = self.policy.model.base_model(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                position_ids=inputs.position_ids,
                use_cache=False,
            ).last_hidden_state.flatten(0, 1)[inputs.positions]
            log_prob = chunked_log_probs(hidden, head.weight, inputs.targets).log_prob
            index = torch.repeat_interleave(torch.arange(len(sequences)), lengths).to(self.device)
            coefficient = (1 / lengths).to(self.device)[index]
            found = head_gradient_squared_norms(
                hidden, head.weight, inputs.targets, log_prob, coefficient, index, len(sequences)
            )
            norms[sequences] = found.double().cpu()
        return norms

    def proxy(self) -> None:
        self.norms["proxy"] = self._head_norms()
        self.advantage = min_variance_advantage(self.rewards, self.norms["proxy"], self.group).float()
        self.ordinary()


def seconds(work: Callable[[], None], policy: Policy, device: str) -> float:
    policy.zero_grad(set_to_none=True)
    start = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--responses", type=int, default=64)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--model", default="builtin:tiny-addition-moe")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    path = resolve_model_path(arguments.model)
    samples = responses_to(path, arguments.responses, arguments.group_size, device)
    policy = Policy(load_model(path).to(device))
    gradients = Gradients(policy, samples, device)
    ways = {"ordinary": gradients.ordinary, "exact": gradients.exact, "proxy": gradients.proxy}
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(arguments.repeats + 1):  # the first is a warm-up
        for name, work in ways.items():
            spent = seconds(work, policy, device)
            if repeat:
                taken[name].append(spent)
    base = statistics.median(taken["ordinary"])
    print(f"{len(samples)} responses, {sum(len(s.response_ids) for s in samples)} tokens, {device}")
    print(f"{'gradient':10s} {'seconds':>9s} {'ratio':>7s}")
    for name, values in taken.items():
        print(f"{name:10s} {statistics.median(values):9.3f} {statistics.median(values) / base:7.2f}")
    logs = torch.stack([gradients.norms[name].log() for name in ("exact", "proxy")])
    print(f"correlation of log squared norms, exact and proxy: {torch.corrcoef(logs)[0, 1]:.3f}")


if __name__ == "__main__":
    main()
