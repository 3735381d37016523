"""What the policy writes, to be read by a person: a table in TensorBoard and lines in ``samples.jsonl``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from vespo_lightning.callbacks.run_files import complete_lines, write_atomically
from vespo_lightning.callbacks.tensorboard import summary_writer
from vespo_lightning.errors import UserError
from vespo_lightning.training.outputs import UpdateResult

FILE_NAME = "samples.jsonl"
COLUMNS = ("prompt", "response", "reference", "reward", "advantage", "lag", "log_w", "finish_reason")


class SampleTable(L.Callback):
    """Shows some responses of a mini-batch, spread evenly over its groups.

    Columns: prompt, response, reference (where the sample carries it), reward, advantage, lag (policy version
    that was updated minus the oldest version that wrote a token of the response), log W (sum of token
    log-ratios before the update) and why the response ended. Rank 0 shows its own samples.

    Prompts are decoded by the module's ``tokenizer``. The file lies in the trainer's ``default_root_dir``; a
    resumed run first cuts the lines that come after its checkpoint.

    Args:
        every: updates between two tables.
        rows: responses per table.
    """

    def __init__(self, every: int, rows: int) -> None:
        for key, value in (("every", every), ("rows", rows)):
            if value < 1:
                raise UserError(f"callbacks.sample_table.{key}={value} is too small: give at least 1.")
        self.every = every
        self.rows = rows

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        if trainer.is_global_zero:
            cut_samples(_path(trainer), module.update)

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if module.update % self.every or module.last_update is None or not trainer.is_global_zero:
            return
        table = sample_rows(module, module.last_update, self.rows)
        path = _path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(json.dumps({"update": module.update, **row}, ensure_ascii=False) + "\n" for row in table)
        writer = summary_writer(trainer)
        if writer is not None:
            writer.add_text("samples", markdown_table(table), module.update)


def sample_rows(module: Any, result: UpdateResult, count: int) -> list[dict[str, Any]]:
    """Up to ``count`` rows with the keys of ``COLUMNS``, evenly spaced in the mini-batch."""
    samples = result.mini_batch.samples
    log_w = result.tokens.sequence_sum(result.tokens.log_ratio)
    places = np.unique(np.linspace(0, len(samples) - 1, min(count, len(samples))).round().astype(int))
    return [
        {
            "prompt_id": samples[place].prompt_id,
            "prompt": module.tokenizer.decode(samples[place].prompt_ids.tolist(), skip_special_tokens=True),
            "response": samples[place].text,
            "reference": getattr(samples[place], "reference", None),
            "reward": samples[place].reward,
            "advantage": float(result.tokens.advantage[place]),
            "lag": result.tokens.policy_version - min(version for version, _ in samples[place].version_runs),
            "log_w": float(log_w[place]),
            "finish_reason": samples[place].finish_reason,
        }
        for place in places
    ]


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """A table that TensorBoard's text plugin shows with the responses exactly as they are."""
    lines = [" | ".join(column.replace("_", " ") for column in COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(_cell(row[column]) for column in COLUMNS) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def cut_samples(path: Path, last_update: int) -> None:
    """Remove the lines of updates greater than ``last_update``, and a line that a kill left incomplete."""
    if path.exists():
        kept = [line for line in complete_lines(path) if json.loads(line)["update"] <= last_update]
        write_atomically(path, "".join(line + "\n" for line in kept))


def _path(trainer: L.Trainer) -> Path:
    return Path(trainer.default_root_dir) / FILE_NAME


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    # As character references, nothing that a model writes can be taken for a column border, markdown or HTML.
    safe = "".join(char if char.isalnum() or char in " \n" else f"&#{ord(char)};" for char in text)
    return safe.replace("\n", "<br>")
