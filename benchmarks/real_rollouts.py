"""What the benchmarks of an update share: the parts of a run of train.py, and a trainer without anything else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from vespo_lightning.callbacks.rollout_generation import RolloutGeneration
from vespo_lightning.models.loading import load_model, load_tokenizer, resolve_model_path
from vespo_lightning.rollouts.loader import RolloutLoader
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.training.module import PolicyModule


def train(cfg: DictConfig, folder: Path, watch: L.Callback, around: Callable[[RolloutLoader], Any]) -> None:
    """Train on real rollouts, which are kept in ``folder``, with one callback.

    Args:
        around: makes what the trainer iterates over of the loader; sized.
    """
    model_path = resolve_model_path(str(cfg.model.path))
    task, engine, objective, advantage, staleness = (
        instantiate(cfg[group]) for group in ("task", "engine", "objective", "advantage", "staleness")
    )
    sampling = {name: cfg.rollout[name] for name in ("group_size", "temperature", "max_new_tokens", "chunk_groups")}
    producer = RolloutProducer(
        task,
        load_tokenizer(model_path),
        engine,
        str(folder),
        seed=cfg.seed,
        recompute=cfg.denominator == "recomputed",
        **sampling,
    )
    loader = around(
        RolloutLoader(producer, staleness, advantage, updates=cfg.updates, mini_batch_size=cfg.mini_batch_size)
    )
    module = PolicyModule(
        load_model(model_path, "float32", cfg.model.experts),
        objective,
        updates=len(loader),
        denominator=cfg.denominator,
        aggregation=cfg.aggregation,
        temperature=cfg.rollout.temperature,
        **OmegaConf.to_container(cfg.optim),
        **cfg.batching,
    )
    trainer = L.Trainer(
        **cfg.trainer,
        max_epochs=1,
        callbacks=[RolloutGeneration(producer, model_path), watch],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
    )
    trainer.fit(module, loader)
