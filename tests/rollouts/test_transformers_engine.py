"""The embedded engine: what it says about what it generated is true, and nothing around a request changes it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from pieces import fit, make_mini_batch, own_log_probs, tiny_policy, tokenizer
from routing.moe_families import family_model
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from vespo_lightning.errors import UserError
from vespo_lightning.models.export import export_hf
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.rollouts import transformers_engine
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, SamplingParams
from vespo_lightning.rollouts.sample import Sample
from vespo_lightning.rollouts.transformers_engine import TransformersEngine
from vespo_lightning.rollouts.truncation import EXCLUDED_LOG_PROB, truncate
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.training.module import PolicyModule
from vespo_lightning.weights import checkpoint_tensors

#: End tokens, many enough for a random model to write one now and then.
STOPS = [1, *range(30, 280, 14)]
LIMIT = 12


def saved(model: PreTrainedModel, folder: Path) -> str:
    model.generation_config.eos_token_id = STOPS
    return str(export_hf(model, tokenizer(), folder / "model"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tiny_policy(), tmp_path_factory.mktemp("engine"))


@pytest.fixture
def engine(folder: str) -> TransformersEngine:
    return started(folder)


def started(folder: str, **options) -> TransformersEngine:
    engine = TransformersEngine(device="cpu", **options)
    engine.start(folder)
    return engine


def requests(count: int = 24) -> list[GenerationRequest]:
    """Prompts of 1 to 9 tokens, each with a seed of its own."""
    rng = np.random.default_rng(3)
    return [
        GenerationRequest(rng.integers(2, 24, int(rng.integers(1, 10))).tolist(), int(rng.integers(2**62)))
        for _ in range(count)
    ]


def same(a: Sequence[Generation], b: Sequence[Generation]) -> bool:
    """Bit for bit, routing included."""

    def equal(x, y):
        return (x is None and y is None) or (x.dtype == y.dtype and np.array_equal(x, y))

    return len(a) == len(b) and all(
        x.finish_reason == y.finish_reason
        and all(
            equal(getattr(x, name), getattr(y, name))
            for name in ("token_ids", "log_probs", "top_ids", "top_log_probs", "routed_experts", "router_top_probs")
        )
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.5])
def test_log_probs_are_those_of_a_full_forward(engine, temperature):
    generations = engine.generate(requests(), SamplingParams(temperature, LIMIT))
    lengths = {len(g.token_ids) for g in generations}
    assert len(lengths) > 3  # ragged, or compaction would not be exercised
    for request, g in zip(requests(), generations, strict=True):
        assert g.token_ids.dtype == np.int32 and g.log_probs.dtype == np.float32
        wanted = own_log_probs(tiny_policy(), request.prompt_ids, g.token_ids.tolist(), temperature)
        assert np.abs(g.log_probs - wanted).max() < 1e-5


def test_greedy_takes_the_likeliest_token_at_temperature_1(engine):
    generations = engine.generate(requests(), SamplingParams(0.0, LIMIT))
    for request, g in zip(requests(), generations, strict=True):
        ids = torch.tensor([[*request.prompt_ids, *g.token_ids]])
        with torch.no_grad():
            logits = tiny_policy()(ids).logits[0, len(request.prompt_ids) - 1 : -1]
        assert logits.argmax(-1).tolist() == g.token_ids.tolist()
        wanted = own_log_probs(tiny_policy(), request.prompt_ids, g.token_ids.tolist())
        assert np.abs(g.log_probs - wanted).max() < 1e-5


def test_responses_end_at_the_end_token_or_the_limit(engine):
    generations = engine.generate(requests(64), SamplingParams(1.0, LIMIT))
    for g in generations:
        assert 1 <= len(g.token_ids) == len(g.log_probs) <= LIMIT
        assert not np.isin(g.token_ids[:-1], STOPS).any()
        assert g.finish_reason == ("stop" if g.token_ids[-1] in STOPS else "length")
        assert g.finish_reason == "stop" or len(g.token_ids) == LIMIT
    assert {g.finish_reason for g in generations} == {"stop", "length"}
    assert len({int(g.token_ids[-1]) for g in generations if g.finish_reason == "stop"}) > 3


def test_an_end_token_at_the_limit_is_a_stop(engine):
    whole = engine.generate(requests(64), SamplingParams(1.0, LIMIT))
    longest = max(len(g.token_ids) for g in whole if g.finish_reason == "stop")
    cut = engine.generate(requests(64), SamplingParams(1.0, longest))
    at_limit = [c for c, w in zip(cut, whole, strict=True) if w.finish_reason == "stop" and len(w.token_ids) == longest]
    assert at_limit and all(c.finish_reason == "stop" and c.token_ids[-1] in STOPS for c in at_limit)


def test_a_lower_limit_cuts_the_same_responses(engine):
    long = engine.generate(requests(), SamplingParams(1.0, LIMIT))
    short = engine.generate(requests(), SamplingParams(1.0, 4))
    for a, b in zip(long, short, strict=True):
        assert np.array_equal(a.token_ids[:4], b.token_ids)
    assert engine.generate(requests(2), SamplingParams(1.0, 1))[0].token_ids.shape == (1,)


def test_one_end_token_from_the_configuration_of_the_model(tmp_path):
    """Where generation_config.json names none."""
    model = tiny_policy()
    model.generation_config.eos_token_id, model.config.eos_token_id = None, 60
    export_hf(model, tokenizer(), tmp_path / "model")
    generations = started(str(tmp_path / "model")).generate(requests(200), SamplingParams(1.0, LIMIT))
    assert {int(g.token_ids[-1]) for g in generations if g.finish_reason == "stop"} == {60}
    assert any(np.isin(g.token_ids[:-1], STOPS).any() for g in generations)


def test_a_model_without_an_end_token_is_refused(tmp_path):
    model = tiny_policy()
    model.generation_config.eos_token_id = model.config.eos_token_id = None
    export_hf(model, tokenizer(), tmp_path / "model")
    with pytest.raises(UserError, match=r"^model\.path: .*eos_token_id"):
        started(str(tmp_path / "model"))


def test_same_requests_same_result_bit_for_bit(folder, engine):
    """Also in another engine, and whatever the global random state is."""
    sampling = SamplingParams(1.0, LIMIT)
    first = engine.generate(requests(), sampling)
    torch.manual_seed(99)
    engine.generate(requests(5), SamplingParams(0.0, 3))
    assert same(engine.generate(requests(), sampling), first)
    assert same(started(folder).generate(requests(), sampling), first)
    other = [GenerationRequest(r.prompt_ids, r.seed + 1) for r in requests()]
    assert not same(engine.generate(other, sampling), first)


def test_nothing_around_a_request_changes_its_tokens(folder, engine):
    """Alone, in another order, in smaller batches: equal tokens, log-probs equal up to rounding."""
    sampling = SamplingParams(1.0, LIMIT)
    together = engine.generate(requests(), sampling)
    alone = [engine.generate([request], sampling)[0] for request in requests()]
    backwards = engine.generate(requests()[::-1], sampling)[::-1]
    in_fives = started(folder, batch_size=5).generate(requests(), sampling)
    for others in (alone, backwards, in_fives):
        for a, b in zip(together, others, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids)
            assert a.finish_reason == b.finish_reason
            assert np.abs(a.log_probs - b.log_probs).max() < 1e-5
            assert np.array_equal(a.routed_experts, b.routed_experts)


@pytest.mark.parametrize("below", [0.0, 1.1])
def test_compaction_changes_nothing(engine, monkeypatch, below):
    """Never, or after every token that ended a response."""
    sampling = SamplingParams(1.0, LIMIT)
    usual = engine.generate(requests(40), sampling)
    rows: list[int] = []
    step = engine._step
    monkeypatch.setattr(engine, "_step", lambda ids, *rest: (rows.append(len(ids)), step(ids, *rest))[1])
    monkeypatch.setattr(transformers_engine, "COMPACT_BELOW", below)
    other = engine.generate(requests(40), sampling)
    assert (len(set(rows)) == 1) == (below == 0.0)
    for a, b in zip(usual, other, strict=True):
        assert np.array_equal(a.token_ids, b.token_ids)
        assert np.abs(a.log_probs - b.log_probs).max() < 1e-5
        assert np.array_equal(a.routed_experts, b.routed_experts)


def test_inversion_of_the_distribution_function():
    """Half-open intervals: a number on a boundary belongs to the token above, impossible tokens are never drawn."""
    probs = torch.tensor([0.0, 0.25, 0.25, 0.0, 0.5, 0.0])
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    tokens = transformers_engine._inverse_cdf(probs.log().expand(6, 6), numbers)
    assert tokens.tolist() == [1, 1, 2, 2, 4, 4]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_first_tokens_follow_the_softmax(engine, temperature):
    """Chi-square of 4000 first tokens against the model's own distribution, below the 99.9 % point."""
    prompt, count = [5, 6, 7], 4000
    sampled = engine.generate(
        [GenerationRequest(prompt, seed) for seed in range(count)], SamplingParams(temperature, 1)
    )
    with torch.no_grad():
        probs = torch.softmax(tiny_policy()(torch.tensor([prompt])).logits[0, -1].double() / temperature, -1).numpy()
    counts = np.bincount([int(g.token_ids[0]) for g in sampled], minlength=len(probs))
    large = probs * count >= 5
    observed, expected = counts[large], probs[large] * count
    observed, expected = np.append(observed, counts[~large].sum()), np.append(expected, probs[~large].sum() * count)
    statistic = ((observed - expected) ** 2 / np.maximum(expected, 1e-9))[expected > 1].sum()
    freedom = int((expected > 1).sum()) - 1
    assert freedom > 3
    # Wilson-Hilferty approximation of the 99.9 % point
    point = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < point
    assert abs(float(np.mean([g.log_probs[0] for g in sampled])) - float((probs * np.log(probs)).sum())) < 0.1


@torch.no_grad()
def distributions(model: PreTrainedModel, request: GenerationRequest, g: Generation, temperature: float) -> np.ndarray:
    """float64 [T, V] log-probs at each response position, before truncation, from one plain forward pass."""
    ids = torch.tensor([[*request.prompt_ids, *g.token_ids.tolist()]])
    logits = model(ids, use_cache=False).logits[0, len(request.prompt_ids) - 1 : -1].double()
    return torch.log_softmax(logits / temperature, -1).numpy()


def kept_by_hand(log_probs: np.ndarray, top_k: int | None, top_p: float) -> dict[int, float]:
    """Log-prob by token of the truncated, renormalised distribution: one token after the other."""
    ranked = sorted(range(len(log_probs)), key=lambda token: -log_probs[token])[:top_k]
    probs = [math.exp(log_probs[token]) for token in ranked]
    kept, mass = [], 0.0
    for token, prob in zip(ranked, probs, strict=True):
        kept.append(token)
        mass += prob
        if mass >= top_p * math.fsum(probs):
            break
    return {token: log_probs[token] - math.log(mass) for token in kept}


TRUNCATIONS = [(None, 0.9), (None, 0.3), (5, 1.0), (1, 1.0), (12, 0.8), (10**6, 0.999)]


@pytest.mark.parametrize(("top_k", "top_p"), TRUNCATIONS)
@pytest.mark.parametrize("temperature", [1.0, 1.6])
def test_truncated_sampling_returns_log_probs_of_what_is_kept(engine, temperature, top_k, top_p):
    sampling = SamplingParams(temperature, LIMIT, top_p=top_p, top_k=top_k, top_log_probs=20)
    sizes = set()
    for request, g in zip(requests(), engine.generate(requests(), sampling), strict=True):
        for t, untruncated in enumerate(distributions(tiny_policy(), request, g, temperature)):
            kept = kept_by_hand(untruncated, top_k, top_p)
            sizes.add(len(kept))
            assert abs(g.log_probs[t] - kept[int(g.token_ids[t])]) < 1e-5
            shown = g.top_log_probs[t] > EXCLUDED_LOG_PROB
            assert set(g.top_ids[t, shown].tolist()) == set(list(kept)[:20])
            assert shown.sum() == min(len(kept), 20)
            wanted = [kept[int(token)] for token in g.top_ids[t, shown]]
            assert np.abs(g.top_log_probs[t, shown] - wanted).max() < 1e-5
    assert len(sizes) > 1 or sizes == {top_k}


@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.7])
def test_likeliest_tokens_are_those_of_a_full_forward(engine, temperature):
    """In descending order, at the sampling temperature (1 for greedy decoding), and nothing else changes."""
    plain = engine.generate(requests(), SamplingParams(temperature, LIMIT))
    generations = engine.generate(requests(), SamplingParams(temperature, LIMIT, top_log_probs=7))
    for request, before, g in zip(requests(), plain, generations, strict=True):
        assert before.top_ids is None and before.top_log_probs is None
        assert np.array_equal(before.token_ids, g.token_ids) and np.array_equal(before.log_probs, g.log_probs)
        assert (g.top_ids.dtype, g.top_log_probs.dtype) == (np.int32, np.float32)
        assert g.top_ids.shape == g.top_log_probs.shape == (len(g.token_ids), 7)
        wanted = distributions(tiny_policy(), request, g, temperature or 1.0)
        order = np.argsort(-wanted, axis=-1)[:, :7]
        assert np.array_equal(g.top_ids, order)
        assert np.abs(g.top_log_probs - np.take_along_axis(wanted, order, -1)).max() < 1e-5
        assert (np.diff(g.top_log_probs) <= 0).all()
        inside = g.top_ids == g.token_ids[:, None]
        assert np.array_equal(g.top_log_probs[inside], g.log_probs[inside.any(-1)])


def test_greedy_decoding_truncates_nothing(engine):
    plain = engine.generate(requests(), SamplingParams(0.0, LIMIT))
    assert same(engine.generate(requests(), SamplingParams(0.0, LIMIT, top_p=0.5, top_k=3)), plain)


def test_limits_that_keep_everything_change_no_bit(engine):
    plain = engine.generate(requests(), SamplingParams(1.0, LIMIT))
    assert same(engine.generate(requests(), SamplingParams(1.0, LIMIT, top_p=1.0, top_k=10**6)), plain)


def test_nothing_is_sorted_unless_asked_for(engine, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("sorted")

    for name in ("sort", "topk", "argsort", "kthvalue"):
        monkeypatch.setattr(torch, name, refuse)
        monkeypatch.setattr(torch.Tensor, name, refuse)
    logits = torch.randn(3, 50)
    assert truncate(logits, None, 1.0) is logits
    with pytest.raises(AssertionError, match="sorted"):
        truncate(logits, None, 0.9)
    with pytest.raises(AssertionError, match="sorted"):
        truncate(logits, 4, 1.0)


def test_tokens_as_likely_as_the_last_kept_one_are_kept():
    logits = torch.tensor([[0.0, 1.0, 0.0, 2.0, 0.0, 1.0]])
    assert (truncate(logits, 2, 1.0) > -math.inf).tolist() == [[False, True, False, True, False, True]]
    assert (truncate(logits, None, 0.5) > -math.inf).tolist() == [[False, True, False, True, False, True]]
    assert (truncate(logits, None, 0.01) > -math.inf).tolist() == [[False, False, False, True, False, False]]
    assert (truncate(logits, None, 0.9) > -math.inf).all()
    # top-p counts the mass of what top-k has left: 2 holds e / (e + 2) = 0.58 of it
    assert (truncate(logits, 3, 0.57) > -math.inf).sum() == 1
    assert (truncate(logits, None, 0.57) > -math.inf).sum() == 3


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (None, 0.8), (9, 0.9)])
def test_nothing_around_a_truncated_request_changes_it(folder, engine, top_k, top_p):
    sampling = SamplingParams(1.0, LIMIT, top_p=top_p, top_k=top_k, top_log_probs=6)
    together = engine.generate(requests(), sampling)
    assert same(engine.generate(requests(), sampling), together)
    alone = [engine.generate([request], sampling)[0] for request in requests()]
    in_fives = started(folder, batch_size=5).generate(requests()[::-1], sampling)[::-1]
    for others in (alone, in_fives):
        for a, b in zip(together, others, strict=True):
            assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.top_ids, b.top_ids)
            assert np.abs(a.log_probs - b.log_probs).max() < 1e-5
            assert np.abs(a.top_log_probs - b.top_log_probs).max() < 1e-5


def test_more_likeliest_tokens_than_tokens_are_refused(engine):
    vocabulary = engine.model.config.vocab_size
    whole = engine.generate(requests(2), SamplingParams(1.0, 2, top_log_probs=vocabulary))
    assert np.allclose(np.exp(whole[0].top_log_probs.astype(np.float64)).sum(-1), 1, atol=1e-5)
    with pytest.raises(UserError, match=rf"^rollout\.top_log_probs={vocabulary + 1} is more than .*={vocabulary} or"):
        engine.generate(requests(2), SamplingParams(1.0, 2, top_log_probs=vocabulary + 1))


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_routing_is_that_of_a_full_forward(family, tmp_path):
    """One row per input position, one column per decoder layer, -1 in dense ones; probabilities beside it."""
    model = family_model(family)
    engine = started(saved(model, tmp_path))
    assert engine.returns_routing
    tap = RouterTap.attach(model)
    dense = [layer for layer in range(3) if layer not in tap.layers]
    assert family == "mixtral" or dense
    for request, g in zip(requests(8), engine.generate(requests(8), SamplingParams(1.0, LIMIT)), strict=True):
        positions = len(request.prompt_ids) + len(g.token_ids) - 1
        assert g.routed_experts.shape == g.router_top_probs.shape == (positions, 3, 2)
        assert (g.routed_experts.dtype, g.router_top_probs.dtype) == (np.int16, np.float16)
        with torch.no_grad(), tap.recording() as record:
            model(torch.tensor([[*request.prompt_ids, *g.token_ids[:-1]]]))
        assert np.array_equal(g.routed_experts[:, tap.layers], record.experts.numpy())
        assert np.abs(g.router_top_probs[:, tap.layers] - record.top_probs.numpy()).max() < 1e-3
        assert (g.routed_experts[:, dense] == -1).all() and (g.router_top_probs[:, dense] == 0).all()


def test_routing_can_be_left_out(folder, engine):
    without = started(folder, record_routing=False)
    assert not without.returns_routing
    sampling = SamplingParams(1.0, LIMIT)
    for a, b in zip(engine.generate(requests(), sampling), without.generate(requests(), sampling), strict=True):
        assert b.routed_experts is None and b.router_top_probs is None
        assert np.array_equal(a.token_ids, b.token_ids) and np.array_equal(a.log_probs, b.log_probs)


def test_dense_models(tmp_path):
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    engine = started(saved(model, tmp_path))
    assert not engine.returns_routing
    for request, g in zip(requests(), engine.generate(requests(), SamplingParams(1.0, LIMIT)), strict=True):
        assert g.routed_experts is None
        assert np.abs(g.log_probs - own_log_probs(model, request.prompt_ids, g.token_ids.tolist())).max() < 1e-5


def test_absolute_positions(tmp_path):
    """Left padding shifts no prompt: the first token of each is at position 0."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2)).eval()
    with torch.no_grad():
        model.transformer.wpe.weight.normal_()
    for request, g in zip(
        requests(), started(saved(model, tmp_path)).generate(requests(), SamplingParams(1.0, LIMIT)), strict=True
    ):
        assert np.abs(g.log_probs - own_log_probs(model, request.prompt_ids, g.token_ids.tolist())).max() < 1e-5


@pytest.mark.parametrize("family", ["gpt_oss", "olmoe", "qwen3_next", "lfm2_moe"])
def test_families_with_other_caches(family, tmp_path):
    """Sliding windows and linear attention keep their state through left padding and compaction."""
    model = family_model(family)
    engine = started(saved(model, tmp_path))
    generations = engine.generate(requests(), SamplingParams(1.0, LIMIT))
    assert len({len(g.token_ids) for g in generations}) > 3
    for request, g in zip(requests(), generations, strict=True):
        wanted = own_log_probs(model, request.prompt_ids, g.token_ids.tolist())
        assert np.abs(g.log_probs - wanted).max() < 2e-5


def test_float64_of_a_dense_model(tmp_path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    engine = started(saved(LlamaForCausalLM(config), tmp_path), dtype="float64")
    assert engine.generate(requests(2), SamplingParams(1.0, 2))[0].log_probs.dtype == np.float32


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-5), ("bfloat16", 0.5)])
def test_other_precisions(folder, dtype, tolerance):
    engine = started(folder, dtype=dtype)
    assert engine.model.dtype == getattr(torch, dtype)
    for request, g in zip(requests(), engine.generate(requests(), SamplingParams(1.0, LIMIT)), strict=True):
        assert g.log_probs.dtype == np.float32
        wanted = own_log_probs(tiny_policy(), request.prompt_ids, g.token_ids.tolist())
        assert np.abs(g.log_probs - wanted).mean() < tolerance


def test_new_weights_change_what_is_generated_and_the_fingerprint_follows(engine):
    sampling, other = SamplingParams(1.0, LIMIT), tiny_policy(seed=1)
    before, mark = engine.generate(requests(), sampling), engine.fingerprint()
    assert mark == fingerprint(t for _, t in checkpoint_tensors(tiny_policy()))
    engine.load_weights(checkpoint_tensors(other), version=7)
    assert engine.version == 7
    assert engine.fingerprint() == fingerprint(t for _, t in checkpoint_tensors(other)) != mark
    after = engine.generate(requests(), sampling)
    assert not same(before, after)
    for request, g in zip(requests(), after, strict=True):
        assert np.abs(g.log_probs - own_log_probs(other, request.prompt_ids, g.token_ids.tolist())).max() < 1e-5
    engine.load_weights(checkpoint_tensors(tiny_policy()), version=8)
    assert engine.fingerprint() == mark
    assert same(engine.generate(requests(), sampling), before)


def test_the_engine_holds_its_own_copy(engine):
    """Training on must not change what a running rollout is generated with."""
    source = tiny_policy(seed=1)
    engine.load_weights(checkpoint_tensors(source), version=1)
    before = engine.generate(requests(4), SamplingParams(1.0, LIMIT))
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.zero_()
    assert same(engine.generate(requests(4), SamplingParams(1.0, LIMIT)), before)


def test_an_incomplete_load_is_an_error_and_not_a_new_version(engine):
    tensors = list(checkpoint_tensors(tiny_policy(seed=1)))[:-1]
    with pytest.raises(ValueError, match="did not arrive"):
        engine.load_weights(tensors, version=3)
    assert engine.version == 0


def test_scores_are_log_probs_at_temperature_1(engine):
    sequences = [[3, 4, 5, 6], [7, 8], list(range(2, 20))]
    for sequence, score in zip(sequences, engine.score(sequences), strict=True):
        assert score.dtype == np.float32 and len(score) == len(sequence) - 1
        assert np.abs(score - own_log_probs(tiny_policy(), sequence[:1], sequence[1:])).max() < 1e-5


def test_no_requests_and_closing_twice(engine):
    assert engine.generate([], SamplingParams()) == []
    engine.close()
    engine.close()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [({"batch_size": 0}, r"^engine\.batch_size=0 "), ({"dtype": "float8"}, r"^engine\.dtype=float8 is unknown; valid")],
)
def test_wrong_options(options, sentence):
    with pytest.raises(UserError, match=sentence):
        TransformersEngine(**options)


def test_a_folder_that_does_not_load(tmp_path):
    with pytest.raises(UserError, match=r"^model\.path=.*the embedded engine"):
        started(str(tmp_path))


class RoutingWatch(L.Callback):
    """Every expert chosen at generation time is the one that the trainer uses."""

    tokens = 0

    def on_micro_batch_end(self, trainer, module, output):
        routing = output.routing
        assert torch.equal(routing.experts, routing.recorded_experts)
        now = routing.probs.gather(-1, routing.experts)
        assert (now - routing.recorded_top_probs).abs().max() < 1e-3
        self.tokens += len(routing.experts)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_trainer_and_engine_agree_at_equal_weights(engine, temperature, layout):
    """The importance ratio of a mini-batch of the current policy is 1, token by token."""
    generations = engine.generate(requests(), SamplingParams(temperature, LIMIT))
    samples = [
        Sample(
            prompt_id="p",
            group_id=f"0/{i // 4}",
            index=i % 4,
            seed=r.seed,
            prompt_ids=np.array(r.prompt_ids, dtype=np.int32),
            response_ids=g.token_ids,
            behaviour_log_probs=g.log_probs,
            version_runs=[(0, len(g.token_ids))],
            loss_mask=np.ones(len(g.token_ids), dtype=bool),
            finish_reason=g.finish_reason,
            text="",
            reward=0.0,
            routed_experts=g.routed_experts,
            router_top_probs=g.router_top_probs,
        )
        for i, (r, g) in enumerate(zip(requests(), generations, strict=True))
    ]

    module = PolicyModule(tiny_policy(), Vespo(), lr=0.0, temperature=temperature, layout=layout, token_budget=60)
    watch = RoutingWatch()
    fit(module, [make_mini_batch(samples)], [watch])
    assert module.last_update.tokens.log_ratio.abs().max() < 1e-5
    assert (module.last_update.coefficient - 1).abs().max() < 1e-3
    assert watch.tokens == sum(len(g.token_ids) for g in generations)
