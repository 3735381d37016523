"""Train a policy: ``python train.py`` with Hydra overrides. ``python train.py --help`` lists what can be set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

try:
    import vespo_lightning.conf  # noqa: F401  only an install maps this folder into the package
    from vespo_lightning.config import config_hash, resolved, run_entry, save_resolved
except ModuleNotFoundError as error:
    if error.name not in ("vespo_lightning", "vespo_lightning.conf", "hydra", "omegaconf"):
        raise
    sys.exit("error: vespo_lightning is not installed; type: make train, or: pip install -e . (see README.md)")

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vespo_lightning.config_check import one_line
from vespo_lightning.config_rules import check_run
from vespo_lightning.config_types import check_arguments
from vespo_lightning.errors import UserError
from vespo_lightning.method_rules import method_warnings

if TYPE_CHECKING:
    from lightning import Trainer

#: Training prompts whose length is checked before the engine starts; later ones are checked as they come.
FIRST_PROMPTS = 256


def main(cfg: DictConfig) -> None:
    """One run, in the folder that Hydra made for it."""
    check_run(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if not cfg.resume:
        save_resolved(cfg, folder)

    import torch

    torch.set_num_threads(cfg.threads)
    quiet()
    check_arguments(cfg)
    for sentence in method_warnings(cfg) if cfg.stage == "rl" else ():
        print(f"warning: {sentence}", file=sys.stderr)
    if cfg.stage == "sft":
        supervised(cfg, folder)
    else:
        reinforce(cfg, folder)


def reinforce(cfg: DictConfig, folder: Path) -> None:
    """The main job: rollouts, updates, evaluation, export."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from vespo_lightning.callbacks.event_files import cut_event_files
    from vespo_lightning.callbacks.metrics_csv import MetricsCsv
    from vespo_lightning.callbacks.run_checkpoint import newest_checkpoint
    from vespo_lightning.callbacks.summary import RunSummary, format_table
    from vespo_lightning.models.export import export_hf
    from vespo_lightning.models.loading import context_length, load_model, load_tokenizer, resolve_model_path
    from vespo_lightning.objectives.min_variance import MinVariance
    from vespo_lightning.rollouts.loader import RolloutLoader
    from vespo_lightning.rollouts.producer import RolloutProducer
    from vespo_lightning.rollouts.prompt_lengths import check_response_length
    from vespo_lightning.routing.losses import RouterLosses
    from vespo_lightning.training.loss import loss_needs
    from vespo_lightning.training.module import PolicyModule

    model_path = resolve_model_path(str(cfg.model.path))
    tokenizer = load_tokenizer(model_path)
    task, engine, objective, advantage, staleness = (
        instantiate(cfg[group]) for group in ("task", "engine", "objective", "advantage", "staleness")
    )
    corrections = [instantiate(node) for node in (cfg.correction or {}).values()]
    kl = instantiate(cfg.kl) if cfg.kl else None
    context = context_length(model_path)
    first = [task.train_problem(cfg.seed, place) for place in range(FIRST_PROMPTS)]
    check_response_length(
        "rollout.max_new_tokens", cfg.rollout.max_new_tokens, tokenizer, [*task.held_out(), *first], context
    )
    dtype = {"bf16-true": "bfloat16", "64-true": "float64"}.get(cfg.trainer.precision, "float32")
    model = load_model(
        model_path,
        dtype,
        cfg.model.experts,
        cfg.model.gradient_checkpointing,
        cfg.model.freeze_router,
        cfg.model.router_dtype,
    )
    reference = reference_policy(cfg, kl.reference or model_path, dtype, tokenizer) if kl is not None else None
    rollout = dict(cfg.rollout)
    passes = rollout.pop("passes")
    producer = RolloutProducer(
        task,
        tokenizer,
        engine,
        str(folder / "rollouts"),
        context=context,
        seed=cfg.seed,
        recompute=cfg.denominator == "recomputed" or "recomputed_log_prob" in loss_needs(objective, corrections),
        routing=cfg.routing.mode,
        reference=kl is not None,
        **rollout,
    )
    loader = RolloutLoader(
        producer,
        staleness,
        advantage,
        updates=cfg.updates,
        mini_batch_size=cfg.mini_batch_size,
        passes=passes,
        kl=kl,
    )
    module = PolicyModule(
        model,
        objective,
        updates=cfg.updates,
        temperature=cfg.rollout.temperature,
        max_response_tokens=cfg.rollout.max_new_tokens,
        denominator=cfg.denominator,
        aggregation=cfg.aggregation,
        corrections=corrections,
        kl=kl,
        reference=reference,
        routing=cfg.routing.mode,
        gate_weights=cfg.routing.gate_weights,
        router_losses=RouterLosses(**cfg.router_loss),
        baseline=advantage if isinstance(advantage, MinVariance) else None,
        entropy_coefficient=cfg.entropy_coefficient,
        **OmegaConf.to_container(cfg.optim),
        **cfg.batching,
    )
    checkpoint = newest_checkpoint(folder / "checkpoints")
    metrics = MetricsCsv(folder / "metrics.csv")
    if cfg.resume:
        update = -1 if checkpoint is None else updates_done(checkpoint)
        print(f"Resuming {folder} after update {max(update, 0)}.", flush=True)
        cut_event_files(folder / "tensorboard", update)
        metrics.truncate(update)
    summary = RunSummary(config_hash(cfg))
    trainer = build_trainer(
        cfg.trainer,
        max_epochs=1,
        callbacks=callbacks(cfg, folder, producer, staleness, model_path, summary),
        logger=[
            TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False),
            metrics,
            *(instantiate(logger) for logger in cfg.logger.values()),
        ],
        default_root_dir=str(folder),
        enable_checkpointing=cfg.callbacks.get("checkpoint") is not None,  # else Lightning adds its own
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader, ckpt_path=checkpoint)
    if trainer.interrupted:
        raise KeyboardInterrupt
    export = export_hf(module.model, tokenizer, folder / "export")
    print(format_table(summary.summary(trainer, "finished")))
    print(f"Next: tensorboard --logdir {shown(folder)}")
    print(f"      python evaluate.py model.path={shown(export)} samples_per_problem=8 temperature=1.0")


def reference_policy(cfg: DictConfig, path: str, dtype: str, tokenizer: Any) -> Any:
    """The frozen policy that the KL penalty refers to."""
    from vespo_lightning.models.loading import is_moe_config, load_model, load_tokenizer, resolve_model_path
    from vespo_lightning.training.reference import ReferencePolicy, check_same_tokenizer

    try:
        path = resolve_model_path(path)
        check_same_tokenizer(load_tokenizer(path), tokenizer, path)
        router_dtype = cfg.model.router_dtype if is_moe_config(path) else None
        model = load_model(path, dtype, cfg.model.experts, router_dtype=router_dtype)
        return ReferencePolicy(model, path, cfg.batching.head_chunk)
    except UserError as error:  # loading knows one path only
        raise UserError(str(error).replace("model.path=", "kl.reference=", 1)) from error


def callbacks(cfg: DictConfig, folder: Path, producer: Any, staleness: Any, model_path: str, summary: Any) -> list[Any]:
    """In the order in which they run: what generates, what measures, what writes, what saves."""
    from vespo_lightning.callbacks.dashboard import Dashboard
    from vespo_lightning.callbacks.metric_writer import MetricWriter
    from vespo_lightning.callbacks.rollout_generation import RolloutGeneration

    configured = {name: node for name, node in cfg.callbacks.items() if node is not None}
    checkpoint = configured.pop("checkpoint", None)
    return [
        RolloutGeneration(producer, model_path),
        staleness,
        *(instantiate(node) for node in configured.values()),
        Dashboard(OmegaConf.to_yaml(OmegaConf.create(resolved(cfg)))),
        summary,
        MetricWriter(),
        *([instantiate(checkpoint, folder=str(folder / "checkpoints"))] if checkpoint is not None else []),
    ]


def build_trainer(settings: DictConfig, **options: Any) -> Trainer:
    """Lightning's trainer; what Lightning says against the user's settings comes as one sentence."""
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return L.Trainer(**settings, **options)
    except (TypeError, ValueError, RuntimeError, MisconfigurationException) as error:
        typed = ", ".join(f"trainer.{name}={value}" for name, value in settings.items())
        raise UserError(f"Lightning refuses one of {typed} ({one_line(error)}); change it or leave it out") from error


def quiet() -> None:
    """Warnings of libraries that tell the user of a run nothing."""
    import logging
    import warnings

    import lightning.pytorch  # noqa: F401  its import sets the level that is set below
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    for module in ("lightning.pytorch.utilities._pytree", "torch.utils._pytree"):
        warnings.filterwarnings("ignore", module=module)
    for message in ("does not have many workers", "in eval mode at the start of training"):
        warnings.filterwarnings("ignore", message=f".*{message}")


def updates_done(checkpoint: Path) -> int:
    """Number of updates that a checkpoint comes after, from its name."""
    return int(checkpoint.stem.removeprefix("update-"))


def supervised(cfg: DictConfig, folder: Path) -> None:
    """``stage=sft``: a warm start on the task's own worked solutions, exported as an HF folder."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from vespo_lightning.models.export import export_hf
    from vespo_lightning.models.loading import load_model, load_tokenizer
    from vespo_lightning.models.tiny_moe import byte_tokenizer, tiny_qwen3_moe
    from vespo_lightning.training.supervised import SolutionLoader, SupervisedModule

    task = instantiate(cfg.task)
    if cfg.sft.init == "tiny_moe":
        tokenizer = byte_tokenizer()
        model = tiny_qwen3_moe(tokenizer, seed=cfg.seed)
    else:
        tokenizer = load_tokenizer(cfg.model.path)
        model = load_model(
            cfg.model.path,
            experts=cfg.model.experts,
            gradient_checkpointing=cfg.model.gradient_checkpointing,
            freeze_router=cfg.model.freeze_router,
            router_dtype=cfg.model.router_dtype,
        )
    module = SupervisedModule(
        model,
        lr=cfg.sft.lr,
        updates=cfg.sft.updates,
        schedule=cfg.sft.schedule,
        warmup_updates=cfg.sft.warmup_updates,
        weight_decay=cfg.sft.weight_decay,
    )
    loader = SolutionLoader(task, tokenizer, updates=cfg.sft.updates, batch_size=cfg.sft.batch_size, seed=cfg.seed)
    trainer = build_trainer(
        cfg.trainer,
        max_epochs=1,
        gradient_clip_val=1.0,
        logger=TensorBoardLogger(str(folder), name="tensorboard", version="", default_hp_metric=False),
        default_root_dir=str(folder),
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=10,
    )
    trainer.fit(module, loader)
    export = export_hf(model, tokenizer, folder / "export")
    print(f"Loss {float(trainer.callback_metrics['train/loss']):.4f} after {cfg.sft.updates} updates.")
    print(f"Next: python evaluate.py model.path={shown(export)}")
    print(f"      python train.py model.path={shown(export)}")


def shown(path: Path) -> str:
    """Relative to the working directory where it lies below it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    run_entry(main, config_name="train")
