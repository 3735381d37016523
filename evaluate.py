"""Evaluate a policy: ``python evaluate.py model.path=FOLDER``, ``run=RUN_FOLDER`` or ``checkpoint=FILE.ckpt``."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import vespo_lightning.conf  # noqa: F401  only an install maps this folder into the package
    from vespo_lightning.config import CONFIG_FILE, config_hash, load_resolved, run_entry, save_resolved
except ModuleNotFoundError as error:
    if error.name not in ("vespo_lightning", "vespo_lightning.conf", "hydra", "omegaconf"):
        raise
    sys.exit("error: vespo_lightning is not installed; type: make train, or: pip install -e . (see README.md)")

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vespo_lightning.config_types import check_arguments
from vespo_lightning.errors import UserError

if TYPE_CHECKING:
    from vespo_lightning.tasks.base import Problem

DEFAULT_MAX_NEW_TOKENS = 256


def main(cfg: DictConfig) -> None:
    """Judge responses to held-out problems; print a table, write ``evaluation.json`` and the run's TensorBoard."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    run = run_folder_of(cfg)
    trained = None if run is None else load_resolved(run)
    if trained is not None:
        take_from_run(cfg, trained)
    save_resolved(cfg, folder)

    import torch
    from transformers.utils.logging import disable_progress_bar

    from vespo_lightning.callbacks.run_files import write_atomically
    from vespo_lightning.diagnostics.evaluation import evaluation_metrics
    from vespo_lightning.models.loading import context_length, load_tokenizer, resolve_model_path
    from vespo_lightning.rollouts.engine import SamplingParams
    from vespo_lightning.rollouts.evaluation import evaluate_engine

    torch.set_num_threads(cfg.threads)
    disable_progress_bar()
    check_arguments(cfg)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = checkpoint_of(cfg, run)
        model_path = resolve_model_path(str(cfg.model.path))
        if checkpoint is not None:
            model_path = export_checkpoint(checkpoint, model_path, Path(scratch) / "export")
        tokenizer = load_tokenizer(model_path)
        task, engine = instantiate(cfg.task), instantiate(cfg.engine)
        problems = list(task.held_out())[: cfg.problems]
        max_new_tokens = response_length(cfg.max_new_tokens, tokenizer, problems, context_length(model_path))
        engine.start(model_path)
        result = evaluate_engine(
            engine,
            task,
            tokenizer,
            problems,
            cfg.samples_per_problem,
            SamplingParams(cfg.temperature, max_new_tokens),
            cfg.seed,
        )
        engine.close()
        task.close()
    metrics = evaluation_metrics(result)
    report: dict[str, Any] = {
        "evaluated": str(checkpoint or cfg.model.path),
        "task": task_name(cfg.task),
        "problems": len(problems),
        "samples_per_problem": cfg.samples_per_problem,
        "temperature": cfg.temperature,
        "config_hash": config_hash(cfg),
        **metrics,
    }
    write_atomically(folder / "evaluation.json", json.dumps(report, indent=2) + "\n")
    if run is not None:
        log_to_run(run, checkpoint, metrics)
    print(table(report))
    print(f"Written to {folder / 'evaluation.json'}")


def check(cfg: DictConfig) -> None:
    """Raises UserError for settings that cannot work together."""
    if cfg.temperature == 0 and cfg.samples_per_problem > 1:
        raise UserError(
            f"samples_per_problem={cfg.samples_per_problem} with temperature=0 would write the same response again "
            "and again; give temperature=1.0"
        )
    for key in ("samples_per_problem", "threads", "problems", "max_new_tokens"):
        if cfg[key] is not None and cfg[key] < 1:
            raise UserError(f"{key}={cfg[key]} must be at least 1")
    if cfg.run is not None and cfg.checkpoint is not None:
        raise UserError(f"run={cfg.run} and checkpoint={cfg.checkpoint} both name a policy; give one of them")


def run_folder_of(cfg: DictConfig) -> Path | None:
    """The run that ``run`` names or that ``checkpoint`` lies in."""
    if cfg.run is not None:
        run, key = Path(cfg.run), f"run={cfg.run}"
    elif cfg.checkpoint is not None:
        if not Path(cfg.checkpoint).is_file():
            raise UserError(f"checkpoint={cfg.checkpoint}: no such file; give RUN/checkpoints/update-NNNNNN.ckpt")
        run, key = Path(cfg.checkpoint).resolve().parent.parent, f"checkpoint={cfg.checkpoint}"
    else:
        return None
    if not (run / CONFIG_FILE).is_file():
        raise UserError(f"{key}: {run} is no run folder ({CONFIG_FILE} is missing); give the folder that a run printed")
    if "model" in typed_sections():
        raise UserError(f"model and {key} both name a policy; give one of them")
    return run


def typed_sections() -> set[str]:
    """First parts of the keys on the command line."""
    return {line.split("=")[0].lstrip("+~").split(".")[0] for line in HydraConfig.get().overrides.task}


def response_length(typed: int | None, tokenizer: Any, problems: Sequence[Problem], context: int) -> int:
    """Most tokens of a response: what was typed, if the context has room for it; else a default that fits."""
    from vespo_lightning.rollouts.prompt_lengths import check_response_length, room_for_responses

    if typed is None:
        return min(DEFAULT_MAX_NEW_TOKENS, room_for_responses(tokenizer, problems, context))
    check_response_length("max_new_tokens", typed, tokenizer, problems, context)
    return typed


def take_from_run(cfg: DictConfig, trained: DictConfig) -> None:
    """What was not typed comes from the run: the model it started from, its task, its response length, its seed."""
    cfg.model = trained.model
    cfg.task = task_of_run(cfg, trained)
    if "seed" not in typed_sections():
        cfg.seed = trained.seed
    if cfg.max_new_tokens is None:
        cfg.max_new_tokens = trained.rollout.max_new_tokens


def task_of_run(cfg: DictConfig, trained: DictConfig) -> DictConfig:
    """The run's task with the keys that were typed, unless ``task=NAME`` was."""
    typed = [line.split("=")[0].lstrip("+") for line in HydraConfig.get().overrides.task]
    keys = [key for key in typed if key.startswith("task.")]
    if "task" in typed:
        return cfg.task
    if keys and cfg.task._target_ != trained.task._target_:
        raise UserError(f"{keys[0]} is not for the task of the run ({task_name(trained.task)}); type task=NAME too")
    task = trained.task
    for key in keys:
        task[key.removeprefix("task.")] = OmegaConf.select(cfg, key)
    return task


def task_name(task: DictConfig) -> str:
    return str(task._target_).rsplit(".", 1)[-1]


def checkpoint_of(cfg: DictConfig, run: Path | None) -> Path | None:
    """The checkpoint to evaluate, if it is one."""
    from vespo_lightning.callbacks.run_checkpoint import newest_checkpoint

    if cfg.checkpoint is not None:
        return Path(cfg.checkpoint)
    if run is None:
        return None
    checkpoint = newest_checkpoint(run / "checkpoints")
    if checkpoint is None:
        raise UserError(f"run={run} has no checkpoint yet; let it train longer, or evaluate model.path=...")
    return checkpoint


def export_checkpoint(checkpoint: Path, model_path: str, folder: Path) -> str:
    """An HF folder with the weights of a checkpoint of a run that started from ``model_path``."""
    import torch

    from vespo_lightning.models.export import export_hf
    from vespo_lightning.models.loading import load_model, load_tokenizer

    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = load_model(model_path)
    model.load_state_dict({name.removeprefix("policy.model."): value for name, value in state.items()})
    return str(export_hf(model, load_tokenizer(model_path), folder))


def log_to_run(run: Path, checkpoint: Path | None, metrics: dict[str, float]) -> None:
    """The figures as scalars ``evaluate/...`` in the run's TensorBoard, at the checkpoint's update."""
    from torch.utils.tensorboard import SummaryWriter

    step = 0 if checkpoint is None else int(checkpoint.stem.removeprefix("update-"))
    with SummaryWriter(str(run / "tensorboard")) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name.replace("eval/", "evaluate/"), value, step)


def table(report: dict[str, Any]) -> str:
    """Names left, figures right."""
    rows = {
        "evaluated": report["evaluated"],
        "problems": f"{report['problems']} of {report['task']}, {report['samples_per_problem']} responses each, "
        f"temperature {report['temperature']:g}",
        f"avg@{report['samples_per_problem']}": f"{report['eval/accuracy']:.4f} (95 % interval "
        f"{report['eval/ci_low']:.4f} .. {report['eval/ci_high']:.4f})",
    }
    for name, value in report.items():
        if name.startswith("eval/pass_at_"):
            rows[f"pass@{name.removeprefix('eval/pass_at_')}"] = f"{value:.4f}"
    rows["response length"] = f"{report['eval/response_length']:.1f} tokens, {report['eval/truncated_share']:.1%} cut"
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())


if __name__ == "__main__":
    run_entry(main, config_name="evaluate")
