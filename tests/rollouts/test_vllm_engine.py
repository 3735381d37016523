"""Real vLLM on a tiny random Qwen3-MoE. One engine serves the module; each test loads its weights."""

import logging
import os
import random
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.core_model_loading import revert_weight_conversion

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts import vllm_weights
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, SamplingParams
from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.rollouts.truncation import EXCLUDED_LOG_PROB, truncate
from vespo_lightning.rollouts.vllm_engine import MAX_TOP_LOG_PROBS, VllmEngine
from vespo_lightning.rollouts.weight_check import (
    CorruptWeightsError,
    StaleWeightsError,
    WeightCheck,
    canary_sequences,
    fingerprint,
)

# Looked for, not imported: the engine sets up its environment before the first import.
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed, `make test` installs it"),
]

VOCAB, END, LAYERS, EXPERTS, TOP_K = 40, 1, 3, 8, 2
DENSE_LAYER = 1
PROMPTS = [[2, 3, 4], [5, 6, 7, 8, 9], [10], [11, 12], [2, 3, 4], [30, 31, 32, 33]]


def _config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        mlp_only_layers=[DENSE_LAYER],
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=0,
    )


def _save(model, folder: Path) -> str:
    vocabulary = {"<pad>": 0, "<end>": END} | {chr(ord("a") + i): 2 + i for i in range(VOCAB - 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<pad>")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return str(folder)


def _random_model(seed: int) -> Qwen3MoeForCausalLM:
    torch.manual_seed(seed)
    return Qwen3MoeForCausalLM(_config()).eval().requires_grad_(False)


def _tensors(model) -> list[tuple[str, torch.Tensor]]:
    state = model.state_dict()
    del state["lm_head.weight"]  # tied
    return list(revert_weight_conversion(model, state).items())


@dataclass
class Process:
    """What a guest must leave as it was."""

    threads: int
    set_num_threads: object
    dtype: torch.dtype
    grad: bool
    handlers: list
    signals: tuple
    environment: dict[str, str]


def _process() -> Process:
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    return Process(
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        logging.root.handlers[:],
        tuple(signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)),
        {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "PYTEST_"))},
    )


def _draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return _save(_random_model(0), tmp_path_factory.mktemp("tiny-moe"))


@dataclass
class Started:
    engine: VllmEngine
    before: Process
    after: Process
    draws: tuple[float, float, float]
    """first random numbers after the start, seeded before it"""
    generations: list[Generation]
    """by the weights that were on disk"""


@pytest.fixture(scope="module")
def started(model_path):
    engine = VllmEngine(max_num_seqs=64, kv_cache_gib=0.0625)
    before = _process()
    engine.start(model_path)
    draws = _draws()
    after = _process()
    yield Started(engine, before, after, draws, engine.generate(_requests(), SamplingParams(1.0, 24)))
    engine.close()
    engine.close()
    assert not torch.distributed.is_initialized()


@pytest.fixture
def engine(started):
    return started.engine


def _load(engine: VllmEngine, seed: int, version: int = 1) -> Qwen3MoeForCausalLM:
    model = _random_model(seed)
    engine.load_weights(_tensors(model), version)
    return model


def _requests(first_seed: int = 0) -> list[GenerationRequest]:
    return [GenerationRequest(prompt, first_seed + i) for i, prompt in enumerate(PROMPTS)]


class RouterRecorder:
    """[positions, K] experts of each router, in layer order, from transformers' own forward."""

    def __init__(self, model) -> None:
        self.chosen: dict[int, torch.Tensor] = {}
        for layer, block in enumerate(model.model.layers):
            if layer != DENSE_LAYER:
                block.mlp.gate.register_forward_hook(
                    lambda module, args, out, layer=layer: self.chosen.__setitem__(layer, out[2])
                )


def _reference(model, request: GenerationRequest, generation: Generation, temperature: float):
    """(log-probs [T], experts [P + T - 1, L, K] with -1 for the dense layer) by transformers."""
    recorder = RouterRecorder(model)
    ids = torch.tensor([*request.prompt_ids, *generation.token_ids.tolist()])
    logits = model(ids[None, :-1]).logits[0].float() / temperature
    log_probs = torch.log_softmax(logits, -1).gather(1, ids[1:, None])[:, 0]
    experts = torch.full((len(ids) - 1, LAYERS, TOP_K), -1)
    for layer, chosen in recorder.chosen.items():
        experts[:, layer] = chosen
    return log_probs[len(request.prompt_ids) - 1 :].numpy(), experts.numpy()


def _assert_agrees(model, requests, generations, temperature: float) -> None:
    """Log-probs within 1e-5 wherever no expert choice up to there differs, and hardly any choice differs."""
    flips = tokens = 0
    for request, generation in zip(requests, generations, strict=True):
        log_probs, experts = _reference(model, request, generation, temperature)
        assert generation.routed_experts.dtype == np.int16
        assert generation.routed_experts.shape == experts.shape
        assert (generation.routed_experts[:, DENSE_LAYER] == -1).all()
        differs = (np.sort(generation.routed_experts, -1) != np.sort(experts, -1)).any((1, 2))
        unaffected = ~np.maximum.accumulate(differs)[len(request.prompt_ids) - 1 :]
        assert np.abs(generation.log_probs - log_probs)[unaffected].max(initial=0) < 1e-5
        flips += differs.sum()
        tokens += len(differs)
    assert flips <= tokens // 100


def test_start_leaves_the_process_as_it_was(started):
    assert started.after == started.before
    _process()
    assert started.draws == _draws()


def test_calls_leave_the_process_as_it_was(engine):
    _load(engine, 1)
    before = _process()
    engine.generate(_requests(), SamplingParams(max_new_tokens=3))
    engine.score(PROMPTS[:2])
    engine.fingerprint()
    draws = _draws()
    assert _process() == before
    assert draws == _draws()


def test_log_probs_and_experts_equal_transformers_after_the_load_from_disk(started):
    assert sum(len(g.token_ids) for g in started.generations) > 40
    _assert_agrees(_random_model(0), _requests(), started.generations, temperature=1.0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_experts_equal_transformers_after_a_reload(engine, temperature):
    for seed in (5, 0):
        model = _load(engine, seed)
        generations = engine.generate(_requests(seed), SamplingParams(temperature, max_new_tokens=24))
        assert sum(len(g.token_ids) for g in generations) > 40
        _assert_agrees(model, _requests(seed), generations, temperature)


def test_greedy_takes_the_most_likely_token_and_gives_log_probs_at_temperature_one(engine):
    model = _load(engine, 2)
    generations = engine.generate(_requests(), SamplingParams(0.0, max_new_tokens=12))
    _assert_agrees(model, _requests(), generations, temperature=1.0)
    for request, generation in zip(_requests(), generations, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *generation.token_ids.tolist()]])
        greedy = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].argmax(-1)
        assert greedy.tolist() == generation.token_ids.tolist()
    assert [g.token_ids.tolist() for g in engine.generate(_requests(77), SamplingParams(0.0, 12))] == [
        g.token_ids.tolist() for g in generations
    ]


def test_score_equals_transformers(engine):
    model = _load(engine, 3)
    sequences = canary_sequences(VOCAB, count=8, length=12)
    for sequence, scored in zip(sequences, engine.score(sequences), strict=True):
        ids = torch.tensor([sequence])
        expected = torch.log_softmax(model(ids).logits[0, :-1].float(), -1).gather(1, ids[0, 1:, None])[:, 0]
        assert scored.dtype == np.float32
        np.testing.assert_allclose(scored, expected.numpy(), atol=1e-5)


def test_the_end_token_is_part_of_the_response(engine):
    _load(engine, 4)
    generations = engine.generate(_requests(0) + _requests(100) + _requests(200), SamplingParams(1.0, 48))
    reasons = [g.finish_reason for g in generations]
    assert set(reasons) == {"stop", "length"}
    for generation in generations:
        stopped = generation.finish_reason == "stop"
        assert (generation.token_ids == END).sum() == stopped
        assert (generation.token_ids[-1] == END) == stopped
        assert stopped or len(generation.token_ids) == 48
        assert len(generation.log_probs) == len(generation.token_ids)
        assert generation.token_ids.dtype == np.int32
        assert generation.log_probs.dtype == np.float32


def _same(a: list[Generation], b: list[Generation]) -> bool:
    return all(
        np.array_equal(x.token_ids, y.token_ids)
        and np.array_equal(x.log_probs, y.log_probs)
        and np.array_equal(x.routed_experts, y.routed_experts)
        and x.finish_reason == y.finish_reason
        for x, y in zip(a, b, strict=True)
    )


def test_the_same_requests_and_weights_give_the_same_bits_whatever_came_before(engine):
    sampling = SamplingParams(1.0, max_new_tokens=32)
    _load(engine, 6)
    first = engine.generate(_requests(), sampling)
    engine.reset_cache()
    assert _same(engine.generate(_requests(), sampling), first)
    # Another history: other weights, other lengths, another batch size, prefixes of the same prompts cached.
    _load(engine, 7)
    engine.generate(_requests(50)[::-1] * 3, SamplingParams(0.5, 17))
    _load(engine, 6)
    engine.generate([GenerationRequest([*PROMPTS[1], 3], 1)], SamplingParams(1.0, 40))
    engine.reset_cache()
    assert _same(engine.generate(_requests(), sampling), first)


def test_the_seed_decides(engine):
    _load(engine, 8)
    sampling = SamplingParams(1.0, max_new_tokens=16)
    one, other = engine.generate(_requests(), sampling), engine.generate(_requests(1000), sampling)
    assert not _same(one, other)
    again = engine.generate([GenerationRequest([4, 5, 6], 2**63 - 1)] * 2, sampling)
    assert again[0].token_ids.tolist() == again[1].token_ids.tolist()


def test_sampled_tokens_follow_the_distribution(engine):
    model = _load(engine, 9)
    prompt = [4, 9, 14]
    expected = torch.softmax(model(torch.tensor([prompt])).logits[0, -1].float() / 0.7, -1).numpy()
    count = 2000
    generations = engine.generate([GenerationRequest(prompt, 10**12 + i) for i in range(count)], SamplingParams(0.7, 1))
    seen = np.bincount([g.token_ids[0] for g in generations], minlength=VOCAB) / count
    assert np.abs(seen - expected[:VOCAB]).max() < 4 * 0.5 / count**0.5


def _reference_distributions(model, request: GenerationRequest, generation: Generation, temperature: float):
    """float64 [T, V] log-probs before truncation, by transformers, without the positions after an expert flip."""
    ids = torch.tensor([*request.prompt_ids, *generation.token_ids.tolist()])
    _, experts = _reference(model, request, generation, temperature)
    differs = (np.sort(generation.routed_experts, -1) != np.sort(experts, -1)).any((1, 2))
    unaffected = ~np.maximum.accumulate(differs)[len(request.prompt_ids) - 1 :]
    logits = model(ids[None, :-1]).logits[0, len(request.prompt_ids) - 1 :].double() / temperature
    return torch.log_softmax(logits, -1)[unaffected]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.8, 5, 1.0), (1.3, None, 0.8), (1.0, 8, 0.7)]
)
def test_likeliest_and_truncated_log_probs(engine, temperature, top_k, top_p):
    """Those of the truncated, renormalised distribution: temperature, then top-k, then top-p."""
    model = _load(engine, 13)
    sampling = SamplingParams(temperature, 24, top_p=top_p, top_k=top_k, top_log_probs=6)
    generations = engine.generate(_requests() + _requests(50), sampling)
    positions = 0
    for request, g in zip(_requests() * 2, generations, strict=True):
        assert (g.top_ids.dtype, g.top_log_probs.dtype, g.log_probs.dtype) == (np.int32, np.float32, np.float32)
        assert g.top_ids.shape == g.top_log_probs.shape == (len(g.token_ids), 6)
        distributions = _reference_distributions(model, request, g, temperature)
        kept = torch.log_softmax(truncate(distributions, top_k, top_p), -1)
        positions += len(kept)
        for t, (before, after) in enumerate(zip(distributions.numpy(), kept.numpy(), strict=True)):
            assert abs(g.log_probs[t] - after[g.token_ids[t]]) < 1e-4
            order = np.argsort(-before)[:6]
            shown = np.isfinite(after[order])
            assert np.array_equal(g.top_ids[t, shown], order[shown])
            assert np.abs(g.top_log_probs[t, shown] - after[order][shown]).max() < 1e-4
            assert (g.top_log_probs[t, ~shown] == EXCLUDED_LOG_PROB).all()
    assert positions > 150


def test_likeliest_log_probs_equal_those_of_the_embedded_engine(engine, model_path):
    """On the same tokens: each engine's own sampling goes other ways."""
    model, embedded = _load(engine, 14), TransformersEngine(device="cpu")
    embedded.start(model_path)
    embedded.load_weights(_tensors(model), 1)
    compared = 0
    for temperature, top_k, top_p in [(0.0, None, 1.0), (0.9, 1, 1.0), (1.2, 1, 0.9)]:
        sampling = SamplingParams(temperature, 16, top_p=top_p, top_k=top_k, top_log_probs=5)
        for a, b in zip(engine.generate(_requests(), sampling), embedded.generate(_requests(), sampling), strict=True):
            assert a.token_ids.tolist() == b.token_ids.tolist()
            shown = b.top_log_probs > EXCLUDED_LOG_PROB
            assert shown.sum() == len(b.token_ids) * (1 if top_k else 5)
            assert np.array_equal(a.top_ids[shown], b.top_ids[shown])
            assert np.abs(a.top_log_probs - b.top_log_probs).max() < 1e-4
            compared += len(b.token_ids)
    assert compared > 100


def test_truncated_sampling_is_repeatable(engine):
    sampling = SamplingParams(1.0, 24, top_p=0.9, top_k=10, top_log_probs=4)
    model = _load(engine, 15)
    first = engine.generate(_requests(), sampling)
    engine.generate(_requests(5)[::-1] * 2, SamplingParams(0.5, 9))
    engine.reset_cache()
    again = engine.generate(_requests(), sampling)
    assert _same(again, first)
    assert all(np.array_equal(a.top_log_probs, b.top_log_probs) for a, b in zip(again, first, strict=True))
    plain = engine.generate(_requests(), SamplingParams(1.0, 24))
    assert all(g.top_ids is None and g.top_log_probs is None for g in plain)
    _assert_agrees(model, _requests(), plain, 1.0)


def test_too_many_likeliest_tokens_name_the_key(engine):
    for asked, limit in [(MAX_TOP_LOG_PROBS + 1, MAX_TOP_LOG_PROBS), (VOCAB + 1, VOCAB)]:
        with pytest.raises(UserError, match=rf"^rollout\.top_log_probs={asked} .*\({limit}\)"):
            engine.generate(_requests(), SamplingParams(1.0, 2, top_log_probs=asked))
    whole = engine.generate(_requests()[:1], SamplingParams(1.0, 2, top_log_probs=VOCAB))
    assert np.exp(whole[0].top_log_probs).sum(-1) == pytest.approx(1, abs=1e-5)


def test_no_requests_give_no_generations(engine):
    assert engine.generate([], SamplingParams()) == []


def test_a_request_that_does_not_fit_names_the_key(engine):
    with pytest.raises(UserError, match=r"prompt of 100 tokens .*engine\.max_model_len=128"):
        engine.generate([GenerationRequest([3] * 100, 0)], SamplingParams(1.0, 29))


def test_fingerprint_reads_back_what_was_loaded(engine):
    for seed in (10, 11):
        model = _load(engine, seed)
        assert engine.fingerprint() == fingerprint(tensor for _, tensor in _tensors(model))


@pytest.mark.parametrize("part", ["embed_tokens", "qkv_proj", "o_proj", "mlp.gate", "experts", "norm", "gate_up_proj"])
def test_fingerprint_sees_every_part_of_the_model(engine, part):
    model = _load(engine, 10)
    tensors = _tensors(model)
    keys = {
        "qkv_proj": "v_proj",
        "experts": "experts.5.up_proj",
        "gate_up_proj": f"layers.{DENSE_LAYER}.mlp.up",
    }
    changed = next(i for i, (name, _) in enumerate(tensors) if keys.get(part, part) in name)
    name, tensor = tensors[changed]
    tensor = tensor.clone()
    tensor.view(torch.int32).view(-1)[-1] ^= 1
    engine.load_weights([*tensors[:changed], (name, tensor), *tensors[changed + 1 :]], 2)
    assert engine.fingerprint() != fingerprint(tensor for _, tensor in tensors)
    tensors[changed] = (name, tensor)
    assert engine.fingerprint() == fingerprint(tensor for _, tensor in tensors)


def _log_probs(model, sequences) -> list[np.ndarray]:
    ids = torch.tensor(sequences)
    return list(torch.log_softmax(model(ids).logits[:, :-1].float(), -1).gather(2, ids[:, 1:, None])[..., 0].numpy())


@pytest.fixture
def check(engine):
    model = _load(engine, 0)
    check = WeightCheck(engine, canary_sequences(VOCAB))
    metrics = check.calibrate(_tensors(model), _log_probs(model, check.sequences))
    assert metrics["mismatch/canary_max"] < 1e-4
    assert check.offset == 0
    return check


def test_check_passes_right_weights(check):
    for seed in range(20, 40):
        model = _random_model(seed)
        metrics = check.load(_tensors(model), seed, _log_probs(model, check.sequences))
        assert check.engine.version == seed
        assert metrics["mismatch/canary_relative"] < 1e-5
        assert metrics["mismatch/canary_mean"] < 1e-5


def test_stale_weights_stop_the_run(check, monkeypatch):
    model = _random_model(41)
    monkeypatch.setattr(check.engine, "load_weights", lambda t, version: setattr(check.engine, "version", version))
    with pytest.raises(StaleWeightsError, match="policy version 7"):
        check.load(_tensors(model), 7, _log_probs(model, check.sequences))


def test_experts_left_unpacked_stop_the_run_even_if_nothing_changed(check, monkeypatch):
    if not check.engine.on_cpu:
        pytest.skip("experts are packed on a CPU only")
    monkeypatch.setattr(vllm_weights, "_repair_experts", lambda module: None)
    for seed in (0, 42, 43):
        model = _random_model(seed)
        with pytest.raises(CorruptWeightsError, match="wrong layout"):
            check.load(_tensors(model), 8, _log_probs(model, check.sequences))


def test_a_tied_head_left_behind_stops_the_run(check, monkeypatch):
    if not check.engine.on_cpu:
        pytest.skip("linears are packed on a CPU only")
    monkeypatch.setattr(vllm_weights, "_repair_tied_linear", lambda module: None)
    model = _random_model(44)
    with pytest.raises(StaleWeightsError, match="checksum"):
        check.load(_tensors(model), 9, _log_probs(model, check.sequences))


def test_a_missing_expert_is_stale(check):
    model = _random_model(45)
    tensors = [(n, t) for n, t in _tensors(model) if "layers.2.mlp.experts.3.down_proj" not in n]
    expected = _tensors(model)

    def lossy(pairs, version, load=check.engine.load_weights):
        load([(n, t) for n, t in pairs if n in dict(tensors)], version)

    check.engine.load_weights, honest = lossy, check.engine.load_weights
    try:
        with pytest.raises(StaleWeightsError):
            check.load(expected, 10, _log_probs(model, check.sequences))
    finally:
        check.engine.load_weights = honest


def test_a_missing_weight_is_named(engine):
    tensors = [(n, t) for n, t in _tensors(_random_model(1)) if n != "model.norm.weight"]
    with pytest.raises(UserError, match=r"was not given 1 of its weights, among them model\.norm\.weight"):
        engine.load_weights(tensors, 3)
    _load(engine, 1)


def test_an_unknown_weight_is_named(engine):
    unknown = ("model.layers.0.mlp.exports.0.weight", torch.ones(2))
    with pytest.raises(UserError, match=rf"refused the weight {unknown[0]}"):
        engine.load_weights([*_tensors(_random_model(1)), unknown], 3)


def test_a_refused_shape_is_named_and_the_engine_can_be_started_again(engine, model_path):
    tensors = dict(_tensors(_random_model(1))) | {"model.norm.weight": torch.ones(65)}
    with pytest.raises(UserError, match=r"refused the weight model\.norm\.weight \(.*65"):
        engine.load_weights(tensors.items(), 3)
    engine.close()
    assert not torch.distributed.is_initialized()
    engine.start(model_path)
    assert engine.version == 0
    assert engine.fingerprint() == fingerprint(tensor for _, tensor in _tensors(_random_model(0)))


def test_dense_models_in_bfloat16_return_no_routing(engine, model_path, tmp_path):
    engine.close()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        initializer_range=0.2,
        tie_word_embeddings=True,
        eos_token_id=END,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    dense = VllmEngine(dtype="bfloat16", max_model_len=64, kv_cache_gib=0.0625)
    dense.start(_save(model, tmp_path))
    try:
        with pytest.raises(UserError, match="max_model_len=64"):
            dense.generate([GenerationRequest([3] * 60, 0)], SamplingParams(1.0, 5))
        assert not dense.returns_routing
        check = WeightCheck(dense, canary_sequences(VOCAB))
        check.calibrate(_tensors(model), _log_probs(model, check.sequences))
        for parameter in model.parameters():
            parameter.mul_(1.1)
        metrics = check.load(_tensors(model), 1, _log_probs(model, check.sequences))
        assert 1e-4 < metrics["mismatch/canary_mean"] < 0.1
        generations = dense.generate(_requests(), SamplingParams(1.0, 8))
        assert all(generation.routed_experts is None for generation in generations)
    finally:
        dense.close()
        engine.start(model_path)


FRESH = """
import sys
from vespo_lightning.rollouts.engine import GenerationRequest, SamplingParams
from vespo_lightning.rollouts.vllm_engine import VllmEngine
engine = VllmEngine(dtype="bfloat16", kv_cache_gib=0.0625)
engine.start(sys.argv[1])
print(len(engine.generate([GenerationRequest([3] * 40, 0)], SamplingParams(0.0, 4))[0].routed_experts))
"""


def test_bfloat16_works_before_torch_has_used_it(model_path):
    """Kernels for AMX kill the process unless somebody asked Linux for the permission."""
    ended = subprocess.run([sys.executable, "-c", FRESH, model_path], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert 40 <= int(ended.stdout.split()[-1]) <= 43


class LightningLine(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        loss = (self.layer(batch) - 3 * batch).square().mean()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_beside_a_running_engine(engine, tmp_path):
    model = LightningLine()
    trainer = lightning.Trainer(
        max_epochs=40,
        accelerator="cpu",
        devices=1,
        default_root_dir=tmp_path,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, torch.utils.data.DataLoader(torch.linspace(-1, 1, 8)[:, None], batch_size=4))
    assert trainer.world_size == 1
    assert model.layer.weight.item() == pytest.approx(3, abs=0.1)
    _assert_agrees(_load(engine, 12), _requests(), engine.generate(_requests(), SamplingParams(1.0, 8)), 1.0)


def test_compiling_still_works_for_the_trainer(engine):
    engine.score(PROMPTS[:1])
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
    counted = torch._dynamo.utils.counters
    counted.clear()
    compiled(torch.ones(3))
    assert counted["frames"]["total"] == 1


@pytest.mark.parametrize(("key", "value"), [("dtype", "int8"), ("max_num_seqs", 0)])
def test_wrong_values_name_the_key(key, value):
    with pytest.raises(UserError, match=rf"engine\.{key}={value}"):
        VllmEngine(**{key: value})


def test_what_vllm_cannot_serve_is_one_sentence(engine, model_path):
    engine.close()
    with pytest.raises(UserError, match=r"engine=vllm cannot serve model\.path=.*max_model_len"):
        VllmEngine(max_model_len=4096).start(model_path)
    assert not torch.distributed.is_initialized()
    engine.start(model_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [({"head_dim": 16}, "head_dim is 16"), ({"moe_intermediate_size": 48}, "intermediate size is 48")],
)
def test_sizes_without_a_cpu_kernel_are_refused_at_start(engine, changes, named, tmp_path):
    if not engine.on_cpu:
        pytest.skip("GPU kernels have other limits")
    config = _config()
    config.update(changes)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=named):
        VllmEngine().start(str(tmp_path))
