"""Proof, after every weight load, that the engine generates with the weights that it was given.

Two independent checks, because each is blind where the other sees:

* A **checksum** over element bit patterns, read back from the engine. It sees any weight that was not loaded,
  to the last bit. It does not see where an element went: a permutation, within a tensor or between tensors,
  leaves it unchanged (that is what lets engines fuse, pack and pad).
* A **canary**: log-probs of fixed sequences, engine against trainer. It sees wrong layouts (such as MoE
  experts left unpacked under a kernel that expects them packed), which produce fluent nonsense and no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import RolloutEngine

_MASK64 = (1 << 64) - 1
#: Elements hashed at a time: the int64 temporaries of a chunk stay in the CPU's cache.
_CHUNK = 1 << 15
_CHUNK_GPU = 1 << 24
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
#: Exponent bits of formats whose subnormal numbers matrix units flush to zero.
_EXPONENT = {torch.float32: 0x7F800000, torch.bfloat16: 0x7F80, torch.float64: 0x7FF0000000000000}
#: Odd constants below 2**63, from the fractional parts of the square roots of 2, 3 and 5.
_MULTIPLIERS = (0x6A09E667F3BCC909, 0x3B67AE8584CAA73B, 0x3C6EF372FE94F82B)


class EngineWeightsError(UserError):
    """The engine does not generate with the weights that it was given."""


class StaleWeightsError(EngineWeightsError):
    """Weights or version read back from the engine are not those that were sent."""


class CorruptWeightsError(EngineWeightsError):
    """The engine holds the right numbers but computes other log-probs with them than the trainer does."""


def fingerprint(tensors: Iterable[Tensor], dtype: torch.dtype | None = None) -> int:
    """Sum over all elements of a 64-bit mix of the element's bits, modulo 2**64.

    Equal for any order, fusing, slicing, transposition or zero padding of the same elements; 0 for no
    tensors. It is additive, so checksums of disjoint shards add up. Subnormal numbers and -0.0 count as 0.
    Tied weights are counted as often as they are passed. Exchanging two values anywhere is not seen.

    Args:
        dtype: precision to which floating-point tensors are rounded first; None takes them as they are.
    """
    total = 0
    for tensor in tensors:
        tensor = tensor.detach()
        if dtype is not None and tensor.is_floating_point():
            tensor = tensor.to(dtype)
        flat = tensor.reshape(-1)
        for chunk in flat.split(_CHUNK if flat.device.type == "cpu" else _CHUNK_GPU):
            total += int(_mix(_bits(chunk)).sum())
    return total & _MASK64


def _bits(flat: Tensor) -> Tensor:
    """int64 [N]: the elements' bit patterns, 0 for every kind of zero."""
    exponent = _EXPONENT.get(flat.dtype)
    bits = flat.contiguous().view(_BITS[flat.element_size()])
    if exponent is not None:
        bits = torch.where((bits & exponent) == 0, 0, bits)
    elif flat.is_floating_point():
        bits = torch.where(flat == 0, 0, bits)
    return bits.to(torch.int64)


def _mix(bits: Tensor) -> Tensor:
    """Multiply-xorshift with f(0) = 0. Integer overflow wraps, which is wanted."""
    first, second, third = _MULTIPLIERS
    bits = bits * first  # a copy: what came in may be the weights themselves
    bits ^= (bits >> 32) & 0xFFFFFFFF
    bits.mul_(second)
    bits ^= (bits >> 29) & 0x7FFFFFFFF
    return bits.mul_(third)


def canary_sequences(vocab_size: int, seed: int = 0, count: int = 16, length: int = 16) -> list[list[int]]:
    """``count`` fixed random token sequences. Any other sequences do as well, prompts of the task for
    instance.

    Many short ones rather than few long ones: a routing flip disturbs the rest of its sequence, and no other.
    """
    return np.random.default_rng(seed).integers(0, vocab_size, (count, length)).tolist()


#: Per precision: relative difference always accepted; how much more than at the load from disk; most accepted
#: there.
_TOLERANCE = {
    torch.float64: (1e-4, 10.0, 1e-2),
    torch.float32: (1e-4, 10.0, 1e-2),
    torch.float16: (5e-3, 4.0, 0.1),
    torch.bfloat16: (3e-2, 4.0, 0.2),
}
#: Spread of log-probs below which differences are no longer measured relative to it (nearly uniform models).
_MIN_SPREAD = 0.05


class WeightCheck:
    """Loads weights into an engine and refuses to go on unless the engine proves that it uses them.

    The canary's measure is the *relative difference*: mean |engine - trainer| per sequence, its median over
    the sequences, divided by the standard deviation of the trainer's log-probs. The median makes it blind to
    rounding that flips an expert choice in fewer than half of the sequences, however large the effect; the
    division makes one tolerance fit flat and sharp models alike. A layout fault moves every sequence by a
    good part of the spread.

    Args:
        engine: started engine; its ``dtype`` attribute names the precision of its weights.
        sequences: token sequences of at least 2 tokens, as from :func:`canary_sequences`.
    """

    def __init__(self, engine: RolloutEngine, sequences: Sequence[Sequence[int]]) -> None:
        self.engine = engine
        self.sequences = sequences
        self.dtype: torch.dtype = engine.dtype
        self.floor, self.margin, self.limit = _TOLERANCE[self.dtype]
        self.offset = 0
        self.tolerance = self.limit
        self.shipped = 0
        """Checksum of the weights of the last :meth:`load`: which weights a rollout was made with."""

    def calibrate(
        self, tensors: Iterable[tuple[str, Tensor]], trainer_log_probs: Sequence[np.ndarray]
    ) -> dict[str, float]:
        """Learn what a right load looks like, from the engine's own load from disk at start.

        Args:
            tensors: (checkpoint name, tensor) of the folder that the engine was started with, as the trainer
                has them.
            trainer_log_probs: float32 [len - 1] each, the trainer's log-probs of :attr:`sequences` with those
                weights.

        Raises:
            CorruptWeightsError: engine and trainer compute different models from the same folder.
        """
        expected = fingerprint((tensor for _, tensor in tensors), self.dtype)
        self.offset = (self.engine.fingerprint() - expected) & _MASK64
        measured = self._canary(trainer_log_probs)
        shown = measured["mismatch/canary_relative"]
        if not shown <= self.limit:
            raise CorruptWeightsError(
                f"the engine's log-probs differ from the trainer's by {shown:.2g} of their spread right "
                f"after both loaded the model from disk (accepted in {_name(self.dtype)}: {self.limit:.2g}): "
                "engine and trainer do not compute the same model, use another engine=, or "
                "engine.dtype=float32 if it was lower"
            )
        self.tolerance = max(self.floor, self.margin * shown)
        return measured

    @property
    def calibration(self) -> dict[str, float]:
        """What :meth:`calibrate` learned, in plain values."""
        return {"offset": self.offset, "tolerance": self.tolerance}

    @calibration.setter
    def calibration(self, values: dict[str, float]) -> None:
        self.offset, self.tolerance = int(values["offset"]), values["tolerance"]

    def load(
        self,
        tensors: Iterable[tuple[str, Tensor]],
        version: int,
        trainer_log_probs: Sequence[np.ndarray],
    ) -> dict[str, float]:
        """Give the engine new weights and check them; returns metrics for the row of this update.

        Args:
            tensors: as for :meth:`RolloutEngine.load_weights`.
            version: policy version of these weights.
            trainer_log_probs: as in :meth:`calibrate`, with the new weights.

        Raises:
            StaleWeightsError: checksum or version read back are not those sent.
            CorruptWeightsError: the canary differs by more than the tolerance.
        """
        sent = _Tally(tensors, self.dtype)
        self.engine.load_weights(sent, version)
        expected = self.shipped = sent.finish()
        self._check_checksum(expected, version)
        return self._check_canary(trainer_log_probs, version)

    def _check_checksum(self, expected: int, version: int) -> None:
        if self.engine.version != version:
            raise StaleWeightsError(
                f"the engine reports policy version {self.engine.version} after version {version} was "
                "loaded: it still holds older weights, resume from the last checkpoint and report the "
                "engine's version"
            )
        expected = (expected + self.offset) & _MASK64
        found = self.engine.fingerprint()
        if found != expected:
            raise StaleWeightsError(
                f"the checksum read back from the engine is {found:016x}, of policy version {version} it is "
                f"{expected:016x}: some weights were not taken over, resume from the last checkpoint, with "
                "another engine= if it happens again"
            )

    def _check_canary(self, trainer_log_probs: Sequence[np.ndarray], version: int) -> dict[str, float]:
        measured = self._canary(trainer_log_probs)
        shown = measured["mismatch/canary_relative"]
        if not shown <= self.tolerance:
            raise CorruptWeightsError(
                f"after policy version {version} was loaded the engine's log-probs of the canary differ from "
                f"the trainer's by {shown:.2g} of their spread (tolerance {self.tolerance:.2g}, mean "
                f"{measured['mismatch/canary_mean']:.2g}, max {measured['mismatch/canary_max']:.2g}) "
                "although the checksum is right: the weights are in the wrong layout, use another engine= "
                "or version of it"
            )
        return measured

    def _canary(self, trainer_log_probs: Sequence[np.ndarray]) -> dict[str, float]:
        scored = self.engine.score(self.sequences)
        differences = [
            np.abs(engine.astype(np.float64) - trainer.astype(np.float64))
            for engine, trainer in zip(scored, trainer_log_probs, strict=True)
        ]
        everything = np.concatenate(differences)
        spread = max(_MIN_SPREAD, float(np.concatenate(trainer_log_probs).astype(np.float64).std()))
        return {
            "mismatch/canary_relative": float(np.median([d.mean() for d in differences])) / spread,
            "mismatch/canary_mean": float(everything.mean()),
            "mismatch/canary_max": float(everything.max()),
        }


class _Tally:
    """Passes (name, tensor) pairs on and adds up their checksum on the way: they are made only once."""

    def __init__(self, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
        self._tensors = iter(tensors)
        self._dtype = dtype
        self._total = 0

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self._tensors:
            self._total += fingerprint([tensor], self._dtype)
            yield name, tensor

    def finish(self) -> int:
        """The checksum of all pairs, those included that the engine did not ask for."""
        for _ in self:
            pass
        return self._total & _MASK64


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
