"""The embedded engine: batched decoding with a KV cache, in this process, on any device.

Log-probs and routing are recorded while sampling, so that no second forward pass is needed for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, PreTrainedModel

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.randomness import uniforms
from vespo_lightning.rollouts.truncation import EXCLUDED_LOG_PROB, check_top_log_probs, truncate
from vespo_lightning.rollouts.weight_check import fingerprint
from vespo_lightning.routing.layout import expand_layers
from vespo_lightning.routing.tap import RouterTap
from vespo_lightning.scoring import score_sequences
from vespo_lightning.weights import InPlaceLoader, checkpoint_tensors

#: Finished rows are dropped from the batch when fewer than this share of its rows still generate.
COMPACT_BELOW = 0.75


class TransformersEngine(RolloutEngine):
    """Decodes with transformers' own modelling code and a copy of the weights of its own.

    Args:
        batch_size: sequences decoded together; larger is faster until memory ends.
        dtype: ``"float32"`` or ``"bfloat16"``, the precision of the copy.
        device: ``"auto"`` takes the GPU if there is one.
        record_routing: return the experts that each position used (MoE models only).
    """

    def __init__(
        self,
        batch_size: int = 512,
        dtype: str = "float32",
        device: str = "auto",
        record_routing: bool = True,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"engine.batch_size={batch_size} must be at least 1")
        if dtype not in ("float32", "bfloat16", "float64"):
            raise UserError(f"engine.dtype={dtype} is unknown; valid: float32, bfloat16, float64")
        self.batch_size = batch_size
        self.dtype = getattr(torch, dtype)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.record_routing = record_routing
        self._model: PreTrainedModel | None = None
        self._tap: RouterTap | None = None

    @property
    def model(self) -> PreTrainedModel:
        assert self._model is not None, "start() was not called"
        return self._model

    @property
    def returns_routing(self) -> bool:
        return self._tap is not None

    def start(self, model_path: str) -> None:
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=self.dtype)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"model.path={model_path} does not load in the embedded engine ({reason})") from error
        if self.dtype == torch.float64:
            model.set_experts_implementation("eager")  # grouped_mm has no float64
        self._model = model.to(self.device).eval().requires_grad_(False)
        self._loader = InPlaceLoader(self.model)
        self._tap = RouterTap.attach(self.model) if self.record_routing else None
        self._stop_ids = _stop_ids(self.model.generation_config, self.model)
        self.version = 0

    def close(self) -> None:
        self._model = self._tap = None

    def reset_cache(self) -> None:
        """Nothing is kept between calls."""

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        self._loader.load(tensors)
        self.version = version

    def fingerprint(self) -> int:
        return fingerprint((tensor for _, tensor in checkpoint_tensors(self.model)), self.dtype)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        return score_sequences(self.model, sequences)

    @torch.inference_mode()
    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        vocabulary = self.model.config.get_text_config().vocab_size
        check_top_log_probs(sampling.top_log_probs, vocabulary, "the model's vocabulary")
        done: list[Generation] = []
        for start in range(0, len(requests), self.batch_size):
            done += self._generate_batch(requests[start : start + self.batch_size], sampling)
        return done

    def _generate_batch(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        state = _Decoding(requests, sampling, self._stop_ids, self.device)
        cache = DynamicCache(config=self.model.config)
        input_ids, mask = _left_pad(requests, self.device)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        while True:
            logits, routing = self._step(input_ids, mask, position_ids, cache)
            alive = state.advance(logits, routing, input_ids.shape[1])
            if not alive.any():
                break
            last, position_ids = state.last_token(), position_ids[:, -1:] + 1
            if alive.float().mean() < COMPACT_BELOW:
                keep = alive.nonzero()[:, 0]
                # which linear attention has too, unlike batch_select_indices
                cache.reorder_cache(keep)  # type: ignore[arg-type]
                mask, position_ids, last = mask[keep], position_ids[keep], last[keep]
                state.compact(keep)
            input_ids = last.unsqueeze(1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        return state.generations()

    def _step(
        self, input_ids: Tensor, mask: Tensor, position_ids: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, tuple[np.ndarray, np.ndarray] | None]:
        """float32 [B, V] logits of the last position, and routing ([B * S, L, K] experts, their probabilities)."""
        inputs = {
            "input_ids": input_ids,
            "attention_mask": mask,
            "position_ids": position_ids,
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if self._tap is None:
            return self.model(**inputs).logits[:, -1].float(), None
        with self._tap.recording() as record:
            logits = self.model(**inputs).logits[:, -1].float()
        layers, depth = self._tap.layers, self._tap.num_decoder_layers
        return logits, (
            expand_layers(record.experts, layers, depth),
            expand_layers(record.top_probs, layers, depth),
        )


class _Decoding:
    """The growing responses of one batch. B rows at the start, fewer after compaction."""

    def __init__(
        self,
        requests: Sequence[GenerationRequest],
        sampling: SamplingParams,
        stop_ids: Tensor,
        device: torch.device,
    ) -> None:
        self.requests = requests
        self.sampling = sampling
        self.stop_ids = stop_ids.to(device)
        seeds = np.array([r.seed for r in requests], dtype=np.uint64)
        self.uniforms = torch.from_numpy(uniforms(seeds, sampling.max_new_tokens)).to(device)
        self.row = torch.arange(len(requests), device=device)  # request of each row still in the batch
        self.alive = torch.ones(len(requests), dtype=torch.bool, device=device)
        self.steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # request, token, log-prob, alive
        self.likeliest: list[tuple[Tensor, Tensor]] = []  # [B, K] ids and log-probs of each step
        self.routing: list[
            tuple[Tensor, np.ndarray, np.ndarray, int]
        ] = []  # request, experts, probabilities, positions

    def advance(self, logits: Tensor, routing: tuple[np.ndarray, np.ndarray] | None, positions: int) -> Tensor:
        """Sample one token per row; returns the rows that go on."""
        step = len(self.steps)
        temperature = self.sampling.temperature or 1.0
        scaled = logits / temperature
        if self.sampling.temperature == 0:
            log_probs = torch.log_softmax(scaled, dim=-1)
            tokens = log_probs.argmax(-1)
        else:
            log_probs = torch.log_softmax(truncate(scaled, self.sampling.top_k, self.sampling.top_p), dim=-1)
            tokens = _inverse_cdf(log_probs, self.uniforms[self.row, step])
        if self.sampling.top_log_probs:
            ids = scaled.topk(self.sampling.top_log_probs, dim=-1).indices
            self.likeliest.append((ids, log_probs.gather(1, ids).clamp(min=EXCLUDED_LOG_PROB)))
        chosen = log_probs.gather(1, tokens[:, None])[:, 0]
        self.steps.append((self.row, tokens, chosen, self.alive))
        if routing is not None:
            self.routing.append((self.row, *routing, positions))
        stopped = torch.isin(tokens, self.stop_ids)
        self.alive = self.alive & ~stopped
        if step + 1 == self.sampling.max_new_tokens:
            return torch.zeros_like(self.alive)
        return self.alive

    def last_token(self) -> Tensor:
        return self.steps[-1][1]

    def compact(self, keep: Tensor) -> None:
        self.row = self.row[keep]
        self.alive = self.alive[keep]

    def generations(self) -> list[Generation]:
        count, width = len(self.requests), len(self.steps)
        tokens = np.zeros((count, width), dtype=np.int32)
        log_probs = np.zeros((count, width), dtype=np.float32)
        lengths = np.zeros(count, dtype=np.int64)
        for t, (row, token, log_prob, alive) in enumerate(self.steps):
            rows = row.cpu().numpy()
            tokens[rows, t] = token.cpu().numpy()
            log_probs[rows, t] = log_prob.cpu().numpy()
            lengths[rows[alive.cpu().numpy()]] = t + 1
        top_ids, top_log_probs = self._likeliest_arrays(width)
        routing = self._routing_arrays(width)
        stop = set(self.stop_ids.tolist())
        results = []
        for i, length in enumerate(lengths):
            ended = int(tokens[i, length - 1]) in stop
            routed, top_probs = (None, None) if routing is None else routing[i]
            positions = len(self.requests[i].prompt_ids) + length - 1
            results.append(
                Generation(
                    token_ids=tokens[i, :length].copy(),
                    log_probs=log_probs[i, :length].copy(),
                    finish_reason="stop" if ended else "length",
                    top_ids=None if top_ids is None else top_ids[i, :length].copy(),
                    top_log_probs=None if top_log_probs is None else top_log_probs[i, :length].copy(),
                    routed_experts=None if routed is None else routed[:positions],
                    router_top_probs=None if top_probs is None else top_probs[:positions],
                )
            )
        return results

    def _likeliest_arrays(self, width: int) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """int32 and float32 [requests, width, K]; positions after the end of a response hold garbage."""
        if not self.likeliest:
            return None, None
        shape = len(self.requests), width, self.sampling.top_log_probs
        ids, log_probs = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
        for t, ((row, *_), (step_ids, step_log_probs)) in enumerate(zip(self.steps, self.likeliest, strict=True)):
            rows = row.cpu().numpy()
            ids[rows, t] = step_ids.cpu().numpy()
            log_probs[rows, t] = step_log_probs.cpu().numpy()
        return ids, log_probs

    def _routing_arrays(self, width: int) -> list[tuple[np.ndarray, np.ndarray]] | None:
        """Per request [P + width - 1, L, K] experts and probabilities; positions after its end hold garbage."""
        if not self.routing:
            return None
        _, experts, probs, columns = self.routing[0]
        count = len(self.requests)
        prompt_experts = experts.reshape(count, columns, *experts.shape[1:])
        prompt_probs = probs.reshape(count, columns, *probs.shape[1:])
        later_experts = np.zeros((count, width - 1, *prompt_experts.shape[2:]), dtype=prompt_experts.dtype)
        later_probs = np.zeros((count, width - 1, *prompt_probs.shape[2:]), dtype=prompt_probs.dtype)
        for t, (row, experts, probs, _) in enumerate(self.routing[1:]):
            rows = row.cpu().numpy()
            later_experts[rows, t] = experts
            later_probs[rows, t] = probs
        arrays = []
        for i, request in enumerate(self.requests):
            pad = columns - len(request.prompt_ids)
            arrays.append(
                (
                    np.concatenate([prompt_experts[i, pad:], later_experts[i]]),
                    np.concatenate([prompt_probs[i, pad:], later_probs[i]]),
                )
            )
        return arrays


def _inverse_cdf(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """int64 [B]: one token per row by inverting the float64 distribution function at ``uniform`` [B].

    A row's token depends on its own distribution and number only, not on the batch around it.
    """
    cumulative = log_probs.double().exp().cumsum(-1)
    threshold = uniform.unsqueeze(1) * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return tokens.clamp(max=log_probs.shape[1] - 1)


def _left_pad(requests: Sequence[GenerationRequest], device: torch.device) -> tuple[Tensor, Tensor]:
    """int64 [B, P] token ids and attention mask, prompts flush right."""
    columns = max(len(r.prompt_ids) for r in requests)
    ids = np.zeros((len(requests), columns), dtype=np.int64)
    mask = np.zeros((len(requests), columns), dtype=np.int64)
    for i, request in enumerate(requests):
        ids[i, columns - len(request.prompt_ids) :] = request.prompt_ids
        mask[i, columns - len(request.prompt_ids) :] = 1
    return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)


def _stop_ids(generation_config: GenerationConfig | None, model: PreTrainedModel) -> Tensor:
    """End-of-sequence tokens: of the generation config, else of the model config."""
    ids = generation_config.eos_token_id if generation_config is not None else None
    if ids is None:
        ids = model.config.get_text_config().eos_token_id
    if ids is None:
        raise UserError("model.path: neither generation_config.json nor config.json names an eos_token_id")
    return torch.tensor([ids] if isinstance(ids, int) else list(ids))
