"""Rollouts on disk: written once when they are made, in chunks, so that nothing generated is lost or made twice."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.routing.layout import compact_experts, widen_experts

#: Array fields of a sample, and whether they may be absent.
_ARRAYS = {
    "prompt_ids": False,
    "response_ids": False,
    "behaviour_log_probs": False,
    "loss_mask": False,
    "recomputed_log_probs": True,
    "reference_log_probs": True,
    "top_ids": True,
    "top_log_probs": True,
    "routed_experts": True,
    "router_top_probs": True,
    "trainer_experts": True,
}
#: Expert ids, in one byte each where they fit.
_EXPERTS = ("routed_experts", "trainer_experts")
_FACTS = (
    "prompt_id",
    "group_id",
    "index",
    "seed",
    "version_runs",
    "finish_reason",
    "text",
    "reward",
    "reward_error",
)


class RolloutStore:
    """Chunks of samples as safetensors files, ``FOLDER/rollout-000003/chunk-000.safetensors``.

    A chunk carries an ``identity`` (weights, version, prompts, settings that made it). It is used again only by a
    rollout of the same identity; anything else under its name is a leftover of another history and is made anew.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)

    def write(
        self,
        rollout: int,
        chunk: int,
        samples: Sequence[Sample],
        identity: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        """Write atomically: a chunk exists whole or not at all.

        Raises:
            UserError: the disk does not take it.
        """
        path = self._path(rollout, chunk)
        arrays: dict[str, np.ndarray] = {}
        for name, optional in _ARRAYS.items():
            values = [getattr(sample, name) for sample in samples]
            if optional and any(value is None for value in values):
                continue
            joined = np.concatenate(values)
            arrays[name] = compact_experts(joined) if name in _EXPERTS else joined
            arrays[f"{name}.rows"] = np.array([len(value) for value in values], dtype=np.int64)
        facts = [{name: getattr(sample, name) for name in _FACTS} for sample in samples]
        header = {
            "identity": json.dumps(identity),
            "metrics": json.dumps(metrics),
            "samples": json.dumps(facts),
        }
        header["checksum"] = _checksum(arrays, header)
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(arrays, partial, metadata=header)
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())  # checkpoints that name this chunk are on the disk too
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"rollout chunk {path} could not be written ({error}); free disk space and resume"
            ) from error

    def read(self, rollout: int, chunk: int, identity: dict[str, Any]) -> tuple[list[Sample], dict[str, float]] | None:
        """The chunk's samples and metrics, or None where there is no undamaged one of this identity."""
        path = self._path(rollout, chunk)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                header = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except SafetensorError:
            return None
        if header.pop("checksum", None) != _checksum(arrays, header):
            return None
        if json.loads(header["identity"]) != json.loads(json.dumps(identity)):
            return None
        facts = json.loads(header["samples"])
        columns: dict[str, list[Any]] = {name: [None] * len(facts) for name in _ARRAYS}
        for name in _ARRAYS:
            if name in arrays:
                joined = widen_experts(arrays[name]) if name in _EXPERTS else arrays[name]
                columns[name] = np.split(joined, np.cumsum(arrays[f"{name}.rows"])[:-1])
        samples = [
            Sample(
                **{**fact, "version_runs": [(v, n) for v, n in fact["version_runs"]]},
                **{name: columns[name][i] for name in _ARRAYS},
            )
            for i, fact in enumerate(facts)
        ]
        return samples, json.loads(header["metrics"])

    def prune(self, before: int) -> None:
        """Delete the rollouts with a number below ``before``: no checkpoint that is kept needs them."""
        for folder in self.folder.glob("rollout-*"):
            if int(folder.name.removeprefix("rollout-")) < before:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, rollout: int, chunk: int) -> Path:
        return self.folder / f"rollout-{rollout:06d}" / f"chunk-{chunk:03d}.safetensors"


def _checksum(arrays: dict[str, np.ndarray], header: dict[str, str]) -> str:
    """CRC-32 of everything in a chunk."""
    crc = 0
    for name, text in sorted(header.items()):
        crc = zlib.crc32(f"{name}={text}".encode(), crc)
    for name, array in sorted(arrays.items()):
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"
