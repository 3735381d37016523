"""What the expert backends cost: one MoE layer's experts, forward and forward + backward, the backends in turn.

    python benchmarks/experts.py [--shape toy|toy-many|qwen3-30b-a3b] [--tokens N] [--repeats 20] [--backends ...]

Prints per backend the median, the middle half of the repeats and the median ratio to grouped_mm of the same repeat
(above 1 is slower); on a GPU the peak of memory as well. MegaBlocks is taken along where it runs and otherwise named
with the reason. Some experts are drawn more often than others, as routers do; ``--even`` draws all alike.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from vespo_lightning.models.experts import BACKENDS, register_experts_backends
from vespo_lightning.models.megablocks_experts import is_available

#: hidden size, inner size, experts, experts per token, tokens
SHAPES = {
    "toy": (128, 128, 8, 2, 2048),
    "toy-many": (128, 128, 64, 8, 1024),
    "qwen3-30b-a3b": (2048, 768, 128, 8, 16384),
}


def build(shape: str, device: str, dtype: torch.dtype) -> Qwen3MoeExperts:
    """The experts of one Qwen3-MoE layer."""
    hidden, inner, experts, top_k, _ = SHAPES[shape]
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=inner, num_experts=experts, num_experts_per_tok=top_k
    )
    layer = Qwen3MoeExperts(config).to(device, dtype)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    return layer


def draw(shape: str, tokens: int, even: bool, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[T, H]``, experts ``[T, K]`` and gate weights ``[T, K]``."""
    hidden, _, experts, top_k, _ = SHAPES[shape]
    popularity = torch.zeros(experts) if even else torch.randn(experts)
    scores, choice = (torch.randn(tokens, experts) + popularity).softmax(-1).topk(top_k)
    x = torch.randn(tokens, hidden).to(device, dtype).requires_grad_()
    weights = (scores / scores.sum(-1, keepdim=True)).to(device, dtype).requires_grad_()
    return x, choice.to(device), weights


def seconds(layer: Qwen3MoeExperts, backend: str, inputs: tuple[Tensor, Tensor, Tensor], backward: bool) -> float:
    layer.config._experts_implementation = backend
    for value in (*layer.parameters(), inputs[0], inputs[2]):
        value.grad = None
    _wait(inputs[0])
    start = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = layer(*inputs)
        if backward:
            out.sum().backward()
    _wait(out)
    return time.perf_counter() - start


def _wait(value: Tensor) -> None:
    if value.is_cuda:
        torch.cuda.synchronize()


def peak_gib(layer: Qwen3MoeExperts, backend: str, inputs: tuple[Tensor, Tensor, Tensor]) -> float:
    """Memory that a forward and backward pass adds at most; GPU only."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    seconds(layer, backend, inputs, backward=True)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def agree(layer: Qwen3MoeExperts, backends: list[str], inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """Times of different results compare nothing. A row may be off by a few roundings of its size."""
    outputs = {}
    for backend in backends:
        layer.config._experts_implementation = backend
        with torch.no_grad():
            outputs[backend] = layer(*inputs).float()
    scale = outputs["grouped_mm"].abs().max()
    for backend, output in outputs.items():
        error = float((output - outputs["grouped_mm"]).abs().max() / scale)
        if error > 4 * torch.finfo(inputs[0].dtype).eps:
            raise SystemExit(f"{backend} disagrees with grouped_mm by {error:.1e} of the largest output")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--even", action="store_true", help="every expert equally popular")
    parser.add_argument("--threads", type=int, default=1, help="of the CPU")
    options = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype or ("bfloat16" if device == "cuda" else "float32"))
    register_experts_backends()
    backends = ["grouped_mm", *(name for name in options.backends if name != "grouped_mm")]
    if "megablocks" in backends and not (found := is_available()):
        backends.remove("megablocks")
        print(f"megablocks left out: {found.reason}")

    hidden, inner, experts, top_k, tokens = SHAPES[options.shape]
    tokens = options.tokens or tokens
    layer = build(options.shape, device, dtype)
    inputs = draw(options.shape, tokens, options.even, device, dtype)
    agree(layer, backends, inputs)
    load = torch.bincount(inputs[1].flatten(), minlength=experts)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {options.threads} threads"
    print(
        f"{options.shape}: {tokens} tokens, hidden {hidden}, inner {inner}, {experts} experts, {top_k} per token, ",
        end="",
    )
    print(f"load max/mean {float(load.max() / load.float().mean()):.1f}; {dtype}; {where}; torch {torch.__version__}")
    for backward in (False, True):
        times: dict[str, list[float]] = {backend: [] for backend in backends}
        for repeat in range(options.repeats + 2):
            for backend in backends:
                taken = seconds(layer, backend, inputs, backward)
                if repeat >= 2:  # the first are for caches and for kernels to be built
                    times[backend].append(taken)
        print("forward + backward" if backward else "forward")
        for backend, values in times.items():
            low, median, high = 1e3 * np.quantile(values, [0.25, 0.5, 0.75])
            ratio = np.median(np.array(values) / np.array(times["grouped_mm"]))
            print(f"  {backend:<12}{median:9.3f} ms ({low:.3f} .. {high:.3f})  {ratio:6.3f} x", end="")
            print(f"  {peak_gib(layer, backend, inputs):.2f} GiB" if backward and device == "cuda" else "")


if __name__ == "__main__":
    main()
