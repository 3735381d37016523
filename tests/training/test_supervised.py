"""The warm start: what it is trained on, and how it is normalised."""

from __future__ import annotations

import pytest
import torch
from pieces import fit, own_log_probs, tiny_policy, tokenizer

from vespo_lightning.errors import UserError
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.training.supervised import SolutionLoader, SupervisedModule


def loader(updates: int = 3, **options) -> SolutionLoader:
    return SolutionLoader(
        AdditionTask(1, 2, held_out_size=4), tokenizer(), **{"updates": updates, "batch_size": 5, "seed": 0} | options
    )


def test_batches_are_worked_problems_in_the_order_of_the_stream():
    task, tok = AdditionTask(1, 2, held_out_size=4), tokenizer()
    batches = list(loader())
    assert len(batches) == len(loader()) == 3
    for number, batch in enumerate(batches):
        problems = [task.train_problem(0, 5 * number + row) for row in range(5)]
        targets = []
        for row, problem in enumerate(problems):
            text, solution = problem.prompt, task.solution(problem)
            length = int(batch.attention_mask[row].sum())
            assert batch.attention_mask[row].tolist() == [1] * length + [0] * (batch.input_ids.shape[1] - length)
            ids = batch.input_ids[row, :length].tolist()
            assert ids[-1] == tok.eos_token_id and tok.decode(ids[:-1]) == text + solution
            targets += [*tok.encode(solution, add_special_tokens=False), tok.eos_token_id]
        assert batch.targets.tolist() == targets
        assert torch.equal(batch.input_ids.flatten()[batch.positions + 1], batch.targets)


def test_two_passes_are_the_same_and_seeds_differ():
    one = loader()
    for a, b in zip(one, one, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
    assert not torch.equal(next(iter(loader())).input_ids, next(iter(loader(seed=1))).input_ids)


def test_the_loss_is_the_mean_over_solution_tokens():
    task, tok, model = AdditionTask(1, 2, held_out_size=4), tokenizer(), tiny_policy()
    log_probs = []
    for index in range(5):
        problem = task.train_problem(0, index)
        solution = [*tok.encode(task.solution(problem), add_special_tokens=False), tok.eos_token_id]
        log_probs += own_log_probs(model, tok.encode(problem.prompt), solution).tolist()
    module = SupervisedModule(model, lr=0.0, updates=1)
    trainer = fit(module, loader(updates=1))
    assert float(trainer.callback_metrics["train/loss"]) == pytest.approx(-sum(log_probs) / len(log_probs), rel=1e-5)


def test_a_task_without_solutions():
    class Silent(AdditionTask):
        def solution(self, problem):
            return None

    silent = SolutionLoader(Silent(), tokenizer(), updates=1, batch_size=1, seed=0)
    with pytest.raises(UserError, match=r"^task=addition writes no worked solutions, so stage=sft cannot"):
        next(iter(silent))
