"""Supervised warm start: next-token prediction on worked solutions of a task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.base import Task
from vespo_lightning.tasks.prompts import render_prompt
from vespo_lightning.training.optimizers import build_adamw
from vespo_lightning.training.policy import ModelInputs, Policy
from vespo_lightning.training.precision import PreciseModule


class SolutionLoader:
    """``updates`` batches of worked problems, counted by seed and index like the prompts of reinforcement learning."""

    def __init__(
        self, task: Task, tokenizer: PreTrainedTokenizerBase, *, updates: int, batch_size: int, seed: int
    ) -> None:
        self.task, self.tokenizer = task, tokenizer
        self.updates, self.batch_size, self.seed = updates, batch_size, seed

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[ModelInputs]:
        for update in range(self.updates):
            indices = range(update * self.batch_size, (update + 1) * self.batch_size)
            yield self._collate([self._example(index) for index in indices])

    def _example(self, index: int) -> tuple[list[int], list[int]]:
        """Prompt ids and solution ids with the end token."""
        problem = self.task.train_problem(self.seed, index)
        solution = self.task.solution(problem)
        if solution is None:
            raise UserError(f"task={self.task.name} writes no worked solutions, so stage=sft cannot train on it")
        ids = self.tokenizer.encode(solution, add_special_tokens=False)
        return render_prompt(self.tokenizer, problem.prompt), [*ids, self.tokenizer.eos_token_id]

    def _collate(self, examples: list[tuple[list[int], list[int]]]) -> ModelInputs:
        width = max(len(p) + len(s) for p, s in examples)
        ids = np.zeros((len(examples), width), dtype=np.int64)
        mask = np.zeros_like(ids)
        positions, targets = [], []
        for row, (prompt, solution) in enumerate(examples):
            length = len(prompt) + len(solution)
            ids[row, :length] = prompt + solution
            mask[row, :length] = 1
            positions.append(row * width + np.arange(len(prompt) - 1, length - 1))
            targets += solution
        return ModelInputs(
            input_ids=torch.from_numpy(ids),
            position_ids=torch.arange(width).expand(len(examples), width),
            attention_mask=torch.from_numpy(mask),
            positions=torch.from_numpy(np.concatenate(positions)),
            targets=torch.tensor(targets),
            starts=tuple(range(0, len(examples) * width, width)),
        )


class SupervisedModule(PreciseModule):
    """Minimises the mean negative log-prob of solution tokens (prompt tokens do not count).

    Args:
        model: causal LM, trained in place.
        lr, weight_decay: AdamW.
        schedule: name of a transformers learning-rate schedule over ``updates``, with ``warmup_updates``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        lr: float,
        updates: int,
        schedule: str = "constant_with_warmup",
        warmup_updates: int = 50,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__()
        self.policy = Policy(model)
        self.lr, self.weight_decay = lr, weight_decay
        self.schedule, self.updates, self.warmup_updates = schedule, updates, warmup_updates

    def transfer_batch_to_device(self, batch: ModelInputs, device: torch.device, dataloader_idx: int) -> ModelInputs:
        return batch.to(device)

    def training_step(self, batch: ModelInputs, batch_idx: int) -> torch.Tensor:
        loss = -self.policy(batch).log_prob.mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = build_adamw(self.policy, lr=self.lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=self.weight_decay)
        scheduler = get_scheduler(
            self.schedule, optimizer, num_warmup_steps=self.warmup_updates, num_training_steps=self.updates
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
