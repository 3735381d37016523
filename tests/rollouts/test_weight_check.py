import numpy as np
import pytest
import torch

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.weight_check import (
    CorruptWeightsError,
    EngineWeightsError,
    StaleWeightsError,
    WeightCheck,
    canary_sequences,
    fingerprint,
)

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _reference_fingerprint(array: np.ndarray) -> int:
    """The same sum in Python integers, float32 only."""
    mask, total = (1 << 64) - 1, 0
    for bits in array.ravel().view(np.int32).tolist():
        if bits & 0x7F800000 == 0:
            continue
        value = bits * 0x6A09E667F3BCC909 & mask
        value = (value ^ (value >> 32)) * 0x3B67AE8584CAA73B & mask
        value = (value ^ (value >> 29)) * 0x3C6EF372FE94F82B & mask
        total += value
    return total & mask


def test_fingerprint_is_the_documented_sum():
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    assert fingerprint([tensor]) == _reference_fingerprint(tensor.numpy())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8], ids=str)
def test_fingerprint_does_not_depend_on_order_fusing_slicing_layout_or_padding(dtype):
    generator = torch.Generator().manual_seed(1)
    a = (100 * torch.randn(40, 30, generator=generator)).to(dtype)
    b = (100 * torch.randn(20, 30, generator=generator)).to(dtype)
    expected = fingerprint([a, b])
    fused = torch.cat([b, a])
    permuted = fused.reshape(-1)[torch.randperm(fused.numel(), generator=generator)]
    padded = torch.nn.functional.pad(fused, (0, 2, 0, 4))
    assert expected != 0
    assert fingerprint([b, a]) == expected
    assert fingerprint([fused.t()]) == expected
    assert fingerprint([permuted]) == expected
    assert fingerprint([padded]) == expected
    assert fingerprint(iter(fused[::2]), None) + fingerprint(fused[1::2]) in (expected, expected + (1 << 64))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fingerprint_sees_the_last_bit_and_leaves_its_input_alone(dtype):
    tensor = torch.randn(1000, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = tensor.clone()
    expected = fingerprint([tensor])
    assert torch.equal(tensor, before)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    changed = tensor.clone()
    changed.view(bits)[17] ^= 1
    assert fingerprint([changed]) != expected
    swapped = tensor.clone()
    swapped[[3, 900]] = tensor[[900, 3]]
    assert fingerprint([swapped]) == expected  # documented: this is the canary's to see


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fingerprint_counts_every_zero_as_nothing(dtype):
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)
    assert fingerprint([zeros]) == 0
    assert fingerprint([]) == 0
    assert fingerprint([torch.empty(0, dtype=dtype)]) == 0
    subnormal = torch.tensor([torch.finfo(dtype).tiny / 2], dtype=dtype)
    assert (fingerprint([subnormal]) == 0) == (dtype != torch.float16)  # float16 weights are often subnormal


def test_fingerprint_of_integers_leaves_them_alone():
    tensor = torch.arange(10)
    assert fingerprint([tensor]) != 0
    assert tensor.tolist() == list(range(10))


def test_fingerprint_rounds_to_the_engines_precision_first():
    tensor = torch.randn(500, generator=torch.Generator().manual_seed(3))
    assert fingerprint([tensor], torch.bfloat16) == fingerprint([tensor.bfloat16()])
    assert fingerprint([tensor.bfloat16()], torch.bfloat16) == fingerprint([tensor.bfloat16()])
    assert fingerprint([tensor]) != fingerprint([tensor.bfloat16()])


def test_fingerprint_spans_chunks():
    tensor = torch.randn(3 * (1 << 15) + 5, generator=torch.Generator().manual_seed(4))
    assert fingerprint([tensor]) == _reference_fingerprint(tensor.numpy())


def test_canary_sequences_are_fixed_and_in_the_vocabulary():
    sequences = canary_sequences(11, seed=5, count=3, length=50)
    assert sequences == canary_sequences(11, seed=5, count=3, length=50)
    assert sequences != canary_sequences(11, seed=6, count=3, length=50)
    assert [len(s) for s in sequences] == [50, 50, 50]
    assert {token for s in sequences for token in s} == set(range(11))


class Bigram:
    """A model whose log-probs are a softmax over rows of one matrix; engine and trainer at once."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self.dtype = dtype
        self.version = 0
        self.weights: dict[str, torch.Tensor] = {}
        self.padding = torch.ones(3)

    def load_weights(self, tensors, version):
        self.weights = {name: tensor.to(self.dtype) for name, tensor in tensors}
        self.version = version

    def fingerprint(self):
        return fingerprint([*self.weights.values(), self.padding])

    def score(self, sequences):
        table = torch.log_softmax(self.weights["table"].float(), dim=-1)
        return [table[s[:-1], s[1:]].numpy() for s in map(torch.tensor, sequences)]


def _table(seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    return {"table": scale * torch.randn(20, 20, generator=torch.Generator().manual_seed(seed))}


def _check(dtype: torch.dtype = torch.float32) -> tuple[Bigram, Bigram, WeightCheck]:
    engine, trainer = Bigram(dtype), Bigram()
    engine.load_weights(_table(0).items(), 0)
    trainer.load_weights(_table(0).items(), 0)
    check = WeightCheck(engine, canary_sequences(20))
    check.calibrate(_table(0).items(), trainer.score(check.sequences))
    return engine, trainer, check


def _load(trainer: Bigram, check: WeightCheck, seed: int, scale: float = 1.0) -> dict[str, float]:
    weights = _table(seed, scale)
    trainer.load_weights(weights.items(), seed)
    return check.load(weights.items(), seed, trainer.score(check.sequences))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_weights_never_alarm(dtype):
    engine, trainer, check = _check(dtype)
    assert check.offset == fingerprint([engine.padding])
    for seed in range(1, 200):
        metrics = _load(trainer, check, seed, scale=10.0 ** (seed % 5 - 2))
        assert metrics["mismatch/canary_relative"] <= check.tolerance / 2
    assert metrics["mismatch/canary_mean"] <= metrics["mismatch/canary_max"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_permutation_of_the_weights_always_alarms(dtype, monkeypatch):
    engine, trainer, check = _check(dtype)
    honest = engine.load_weights

    def permuting(tensors, version):
        honest([(name, tensor.roll(1, dims=1)) for name, tensor in tensors], version)

    monkeypatch.setattr(engine, "load_weights", permuting)
    for seed in range(1, 50):
        with pytest.raises(CorruptWeightsError, match=rf"policy version {seed} .*tolerance"):
            _load(trainer, check, seed, scale=0.1)


def test_a_few_flipped_tokens_do_not_alarm_and_a_majority_of_sequences_does():
    _, trainer, check = _check()
    scored = trainer.score(check.sequences)
    flipped = [s.copy() for s in scored]
    for sequence in flipped[:7]:
        sequence[5:] += 1.0
    assert check.load(_table(0).items(), 1, flipped)["mismatch/canary_max"] == pytest.approx(1.0, abs=1e-5)
    for sequence in flipped[7:10]:
        sequence[5] += 1.0
    with pytest.raises(CorruptWeightsError):
        check.load(_table(0).items(), 2, flipped)


def test_weights_that_were_not_taken_over_are_stale(monkeypatch):
    engine, trainer, check = _check()
    monkeypatch.setattr(engine, "load_weights", lambda tensors, version: setattr(engine, "version", version))
    with pytest.raises(StaleWeightsError, match="checksum read back"):
        _load(trainer, check, 1)


def test_one_last_bit_is_stale(monkeypatch):
    engine, trainer, check = _check()
    honest = engine.load_weights

    def lossy(tensors, version):
        honest(tensors, version)
        engine.weights["table"].view(torch.int32)[3, 3] ^= 1

    monkeypatch.setattr(engine, "load_weights", lossy)
    with pytest.raises(StaleWeightsError, match="checksum read back"):
        _load(trainer, check, 1)


def test_a_wrong_version_is_stale(monkeypatch):
    engine, trainer, check = _check()
    honest = engine.load_weights
    monkeypatch.setattr(engine, "load_weights", lambda tensors, version: honest(tensors, version - 1))
    with pytest.raises(StaleWeightsError, match="reports policy version 4 after version 5"):
        _load(trainer, check, 5)


def test_not_a_number_alarms():
    _, trainer, check = _check()
    scored = [np.full_like(s, np.nan) for s in trainer.score(check.sequences)]
    with pytest.raises(CorruptWeightsError):
        check.load(_table(0).items(), 1, scored)


def test_calibration_refuses_an_engine_that_computes_another_model():
    engine, trainer = Bigram(), Bigram()
    engine.load_weights(_table(0).items(), 0)
    trainer.load_weights(_table(1).items(), 0)
    check = WeightCheck(engine, canary_sequences(20))
    with pytest.raises(CorruptWeightsError, match="right after both loaded"):
        check.calibrate(_table(0).items(), trainer.score(check.sequences))


def test_both_errors_are_the_users_to_read():
    assert issubclass(StaleWeightsError, EngineWeightsError)
    assert issubclass(CorruptWeightsError, EngineWeightsError)
    assert issubclass(EngineWeightsError, UserError)
