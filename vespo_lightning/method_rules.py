"""Combinations of methods that make no sense, refused before anything expensive starts, and those that call for care.

Nothing here imports torch: parts of the configuration are known by their ``_target_``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: Objectives whose coefficient is the same whatever the advantage.
BLIND_TO_ADVANTAGE = ("reinforce", "sequence_is", "kernel", "cispo", "minpro")
#: Objectives on the product of a response's ratios, without division by its length.
ON_SEQUENCE_WEIGHT = ("vespo", "kernel", "sequence_is", "topr", "respo")
_LOW_PRECISION = ("bfloat16", "float16")


def method_rules(cfg: Any) -> Iterator[str]:
    """One sentence for each combination that is refused: key, value, reason and way out.

    Args:
        cfg: the composed configuration of ``train.py``.
    """
    for rules in (_corrections, _router_shift, _router_loss, _replay, _objective, _min_variance):
        yield from rules(cfg)


def method_warnings(cfg: Any) -> Iterator[str]:
    """One sentence for each setting that works and is known to mislead.

    Args:
        cfg: the composed configuration of ``train.py``.
    """
    for warnings in (
        _sampling,
        _precision,
        _rounded_gates,
        _length_filters,
        _published_differently,
        _penalised_groups,
    ):
        yield from warnings(cfg)


# ---- refused ---------------------------------------------------------------------------------------------------


def _corrections(cfg: Any) -> Iterator[str]:
    names = _correction_classes(cfg)
    if "TokenTis" in names and cfg.denominator == "behaviour":
        yield (
            "correction=tis with denominator=behaviour would count the engine's mismatch twice, since the importance "
            "ratio holds it already; set denominator=recomputed or take tis out of correction"
        )
    if {"TokenTis", "MaskedIs"} <= names and cfg.denominator == "recomputed":
        yield (
            "correction=[tis,mis] would weight each token by the engine's mismatch twice; take one of them: tis cuts "
            "large weights, mis drops their tokens"
        )
    if "Opsm" in names and cfg.denominator == "recomputed" and _one_step_per_rollout(cfg):
        yield (
            "correction=opsm does nothing with denominator=recomputed, staleness.n=1 and rollout.passes=1, where the "
            "ratio is always 1; set denominator=behaviour or staleness.n=2 or more"
        )


def _router_shift(cfg: Any) -> Iterator[str]:
    if "RouterShift" not in _correction_classes(cfg):
        return
    if _module(cfg.engine) == "vllm_engine":
        yield (
            "correction=router_shift needs the router's probabilities when the response was sampled, of which "
            "engine=vllm returns none; use engine=transformers"
        )
    elif not cfg.engine.get("record_routing", True):
        yield (
            "correction=router_shift needs the engine's routing, which engine.record_routing=false leaves out; set "
            "engine.record_routing=true"
        )


def _router_loss(cfg: Any) -> Iterator[str]:
    if cfg.model.get("freeze_router") and any(cfg.router_loss.values()):
        yield (
            "model.freeze_router=true with router_loss above 0 would push the layers below the routers instead of "
            "them; set router_loss.load_balance=0 router_loss.z=0 or model.freeze_router=false"
        )


def _replay(cfg: Any) -> Iterator[str]:
    mode, weights = cfg.routing.mode, cfg.routing.gate_weights
    if mode not in ("native", "r2", "r3"):
        yield f"routing.mode={mode} is unknown; use routing=native, routing=r2 or routing=r3"
    if weights not in ("live", "recorded"):
        yield f"routing.gate_weights={weights} is unknown; valid: live, recorded"
    if mode == "r3" and not cfg.engine.get("record_routing", True):
        yield (
            "routing=r3 replays the engine's routing, which engine.record_routing=false leaves out; set "
            "engine.record_routing=true"
        )
    if weights == "recorded" and mode != "r3":
        yield (
            f"routing.gate_weights=recorded replays what the engine recorded and does nothing with routing={mode}; "
            "use routing=r3"
        )
    elif weights == "recorded" and _module(cfg.engine) == "vllm_engine":
        yield (
            "routing.gate_weights=recorded needs the router's probabilities when the response was sampled, of which "
            "engine=vllm returns none; use engine=transformers or routing.gate_weights=live"
        )


def _objective(cfg: Any) -> Iterator[str]:
    name = _module(cfg.objective)
    divergence = str(cfg.objective.get("divergence"))
    if name == "dppo" and divergence.startswith("topk_") and not cfg.rollout.get("top_log_probs", 0):
        yield (
            f"objective.divergence={divergence} needs log-probs of the likeliest tokens, of which "
            "rollout.top_log_probs=0 keeps none; set rollout.top_log_probs=20"
        )
    elif name == "dppo" and divergence.startswith("topk_") and cfg.denominator != "behaviour":
        yield (
            f"denominator={cfg.denominator} does not fit objective.divergence={divergence}, which is taken against the "
            "likeliest tokens of the engine; set denominator=behaviour or objective.divergence=binary_tv"
        )
    if name == "minirl" and cfg.denominator != "behaviour":
        yield (
            f"denominator={cfg.denominator} does not fit objective=minirl, whose weight is the ratio against the "
            "engine (its clip uses the recomputed log-probs anyway); set denominator=behaviour"
        )


def _min_variance(cfg: Any) -> Iterator[str]:
    if _module(cfg.advantage) != "min_variance":
        return
    name = _module(cfg.objective)
    if name not in BLIND_TO_ADVANTAGE and str(cfg.objective.get("_target_")).startswith("vespo_lightning."):
        yield (
            f"advantage=min_variance needs gradients that do not depend on the advantage, and the coefficient of "
            f"objective={name} does; use objective={', '.join(BLIND_TO_ADVANTAGE[:-1])} or {BLIND_TO_ADVANTAGE[-1]}"
        )
    if "Opsm" in _correction_classes(cfg):
        yield (
            "advantage=min_variance needs gradients that do not depend on the advantage, and correction=opsm masks by "
            "its sign; take opsm out of correction"
        )
    if cfg.advantage.get("estimator") != "exact":
        return
    remedy = "or use advantage.estimator=proxy"
    if any(cfg.router_loss.values()):
        yield (
            "advantage.estimator=exact splits the gradient by response and has no place for router_loss; set "
            f"router_loss.load_balance=0 router_loss.z=0 {remedy}"
        )
    if cfg.entropy_coefficient:
        yield (
            f"advantage.estimator=exact splits the gradient by response and has no place for an entropy bonus "
            f"(entropy_coefficient={cfg.entropy_coefficient}); set entropy_coefficient=0 {remedy}"
        )
    if _kl_node(cfg).get("placement") == "loss":
        yield (
            f"advantage.estimator=exact splits the gradient by response and has no place for kl.placement=loss; "
            f"use kl=none, kl=reward_k1 {remedy}"
        )


# ---- allowed, with a word --------------------------------------------------------------------------------------


def _sampling(cfg: Any) -> Iterator[str]:
    top_p, top_k = cfg.rollout.get("top_p", 1.0), cfg.rollout.get("top_k")
    cut = [f"rollout.top_p={top_p}"] * (top_p < 1) + [f"rollout.top_k={top_k}"] * (top_k is not None)
    if not cut:
        return
    effect = (
        "log W changes by the log of the kept mass at every token (0.99 kept: -10 nats in 1000 tokens, where VESPO's "
        "coefficient of good responses is 2e-8)"
        if cfg.denominator == "behaviour"
        else "the ratio is not taken against the distribution that sampled, and corrections see the mass cut off as "
        "mismatch"
    )
    yield (
        f"{' and '.join(cut)}: the engine's log-probs are of the tokens kept, the trainer's of all, so that {effect}; "
        "sequence-level methods need rollout.top_p=1 rollout.top_k=null"
    )


def _precision(cfg: Any) -> Iterator[str]:
    dtype = cfg.engine.get("dtype")
    if dtype not in _LOW_PRECISION:
        return
    if _module(cfg.engine) == "vllm_engine":
        yield (
            f"engine.dtype={dtype}: vLLM computes the logits in it, which in bfloat16 alone is noise of 0.015 nats per "
            "token, about 1 nat of log W at 4096 tokens; engine.dtype=float32 trainer.precision=32-true has none"
        )
    name = _module(cfg.objective)
    if cfg.denominator == "behaviour" and name in ON_SEQUENCE_WEIGHT:
        yield (
            f"denominator=behaviour with engine.dtype={dtype}: the engine's mismatch makes log W drift with the length "
            f"of the response, and objective={name} acts on W; with long responses use denominator=recomputed, with "
            "correction=tis or mis for the mismatch"
        )


def _rounded_gates(cfg: Any) -> Iterator[str]:
    if cfg.routing.gate_weights == "recorded" and cfg.engine.get("dtype") not in _LOW_PRECISION:
        yield (
            "routing.gate_weights=recorded with engine.dtype=float32 replays probabilities that are stored in float16, "
            "which differ more from the engine's than live ones do; use routing.gate_weights=live"
        )


def _length_filters(cfg: Any) -> Iterator[str]:
    names = _correction_classes(cfg)
    if "Geometric" in names:
        yield (
            "correction=geometric drops short responses first, whose mean log-ratio is the noisiest; watch "
            "correction/geometric_kept_length_ratio"
        )
    if "SequenceRejection" in names:
        yield (
            "correction=sequence_rejection drops long responses first, whose log-ratios add up; watch "
            "correction/sequence_kept_length_ratio"
        )


def _published_differently(cfg: Any) -> Iterator[str]:
    name = _module(cfg.objective)
    if name == "gspo" and cfg.aggregation != "seq-mean-token-mean":
        yield (
            f"objective=gspo with aggregation={cfg.aggregation} is not GSPO as published, whose loss is the mean over "
            "responses of the mean over tokens: aggregation=seq-mean-token-mean"
        )
    if name == "dppo" and cfg.denominator == "recomputed":
        yield (
            "objective=dppo with denominator=recomputed: its paper finds this anchor of the trust region to collapse "
            "and takes the engine's log-probs, denominator=behaviour"
        )
    normalisation = cfg.objective.get("normalisation", "none")
    if name == "vespo" and normalisation != "none":
        yield (
            f"objective.normalisation={normalisation} is an ablation that collapses in VESPO's paper; the method "
            "itself is objective.normalisation=none"
        )


def _penalised_groups(cfg: Any) -> Iterator[str]:
    divides = str(cfg.advantage.get("_target_")).endswith((".GroupMeanStd", ".BatchStd"))
    if divides and _kl_node(cfg).get("placement") == "reward":
        yield (
            "kl=reward_k1 with an advantage that is divided by a std: where all task rewards are equal the penalty is "
            "all there is, and the division makes it as large as a reward, whatever kl.coefficient is; use "
            "advantage=group_mean or kl=loss_k3"
        )


# ---- parts of the configuration --------------------------------------------------------------------------------


def _module(node: Any) -> str:
    """The last part of the module that ``_target_`` is in: the name of a built-in objective."""
    return str(node.get("_target_")).rpartition(".")[0].rpartition(".")[2]


def _correction_classes(cfg: Any) -> set[str]:
    nodes = (cfg.get("correction") or {}).values()
    return {str(node["_target_"]).rpartition(".")[2] for node in nodes if node is not None}


def _kl_node(cfg: Any) -> Mapping[str, Any]:
    return cfg.get("kl") or {}


def _one_step_per_rollout(cfg: Any) -> bool:
    return cfg.staleness.get("n") == 1 and cfg.rollout.get("passes", 1) == 1
