"""Small real parts for tests of the loop: a tiny policy, samples that it might have written, a Lightning trainer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import lightning as L
import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from vespo_lightning.models.tiny_moe import byte_tokenizer, tiny_qwen3_moe
from vespo_lightning.rollouts.sample import MiniBatch, Sample

#: Prompt and response lengths of six samples in three groups, one of them a single token.
LENGTHS = [(3, 7), (3, 2), (6, 1), (6, 12), (2, 5), (2, 9)]


def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


def tiny_policy(seed: int = 0, experts: str = "grouped_mm", **sizes: Any) -> PreTrainedModel:
    """Random Qwen3-MoE whose distributions are far from uniform, so that errors show."""
    options = {"hidden_size": 32, "layers": 2, "experts": 4, "expert_size": 32, "context": 64} | sizes
    model = tiny_qwen3_moe(tokenizer(), seed=seed, **options)
    model.set_experts_implementation(experts)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    return model.eval()


@torch.no_grad()
def own_log_probs(
    model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int], temperature: float = 1.0
) -> np.ndarray:
    """[T] log-probs of a response from one plain forward pass, in the model's precision."""
    ids = torch.tensor([[*prompt, *response]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, ids[0, len(prompt) :, None])[:, 0].numpy()


def make_samples(
    model: PreTrainedModel,
    lengths: Sequence[tuple[int, int]] = tuple(LENGTHS),
    noise: float = 0.1,
    group: int = 2,
) -> list[Sample]:
    """Random token ids; behaviour log-probs are the model's own plus noise. Rewards alternate 0 and 1."""
    rng = np.random.default_rng(0)
    samples = []
    for i, (p, t) in enumerate(lengths):
        prompt, response = rng.integers(2, 24, p), rng.integers(2, 24, t)
        exact = own_log_probs(model, prompt.tolist(), response.tolist())
        samples.append(
            Sample(
                prompt_id=f"p{i // group}",
                group_id=f"0/{i // group}",
                index=i % group,
                seed=i,
                prompt_ids=prompt.astype(np.int32),
                response_ids=response.astype(np.int32),
                behaviour_log_probs=(exact + noise * rng.standard_normal(t)).astype(np.float32),
                version_runs=[(0, t)],
                loss_mask=np.ones(t, dtype=bool),
                finish_reason="length" if i == 3 else "stop",
                text="x",
                reward=float(i % 2),
            )
        )
    return samples


def make_mini_batch(samples: list[Sample], update: int = 0, **fields: Any) -> MiniBatch:
    count = len(samples)
    defaults: dict[str, Any] = {
        "update": update,
        "rollout": update,
        "position": 0,
        "rollout_size": 1,
        "samples": samples,
        "advantages": torch.linspace(-1.0, 1.3, count),
        "in_loss": [True] * count,
    }
    return MiniBatch(**defaults | fields)


class Batches:
    """A sized loader of given mini-batches; not a list, which Lightning takes for several loaders."""

    def __init__(self, items: Sequence[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)


def make_trainer(callbacks: Sequence[L.Callback] = (), **options: Any) -> L.Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }
    return L.Trainer(callbacks=list(callbacks), **defaults | options)


def fit(
    module: L.LightningModule, batches: Sequence[Any], callbacks: Sequence[L.Callback] = (), **options: Any
) -> L.Trainer:
    """Train on the given mini-batches, one update each."""
    trainer = make_trainer(callbacks, **options)
    trainer.fit(module, Batches(batches))
    return trainer
