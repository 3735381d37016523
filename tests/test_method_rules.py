"""Combinations of methods that are refused, and those that run with a warning, on composed configurations."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest
import yaml
from hydra import compose
from hydra.utils import get_class
from omegaconf import DictConfig

from vespo_lightning.config_check import CONFIG_PATH, config_source
from vespo_lightning.method_rules import BLIND_TO_ADVANTAGE, ON_SEQUENCE_WEIGHT, method_rules, method_warnings
from vespo_lightning.objectives.sequence import SequenceObjective

OBJECTIVES = {
    path.stem: get_class(yaml.safe_load(path.read_text())["_target_"])
    for path in Path(str(files("vespo_lightning.conf") / "objective")).glob("*.yaml")
}


def composed(overrides: str) -> DictConfig:
    with config_source(CONFIG_PATH):
        return compose("train", ["name=x", *overrides.split()])


def refusals(overrides: str) -> list[str]:
    return list(method_rules(composed(overrides)))


def warnings(overrides: str) -> list[str]:
    return list(method_warnings(composed(overrides)))


# ---- refused ---------------------------------------------------------------------------------------------------

REFUSED = {
    "correction=tis": "correction=tis with denominator=behaviour would count .* set denominator=recomputed",
    "correction=[tis,mis] denominator=recomputed": r"correction=\[tis,mis\] would weight .* twice; take one of them",
    "correction=opsm denominator=recomputed staleness.n=1": "correction=opsm does nothing .* set denominator=behaviour",
    "correction=router_shift engine=vllm": "correction=router_shift needs .* use engine=transformers$",
    "correction=router_shift engine.record_routing=false": "engine.record_routing=false .* engine.record_routing=true$",
    "objective=dppo objective.divergence=topk_tv": "divergence=topk_tv needs .* set rollout.top_log_probs=20$",
    "objective=minirl denominator=recomputed": "denominator=recomputed does not fit .* set denominator=behaviour$",
    "advantage=min_variance": "advantage=min_variance needs .* objective=vespo does; use objective=reinforce, ",
    "advantage=min_variance objective=reinforce correction=opsm": "correction=opsm masks by its sign",
    "advantage=min_variance objective=kernel entropy_coefficient=0.1": r"entropy_coefficient=0.1\); set",
    "objective=dppo objective.divergence=topk_kl rollout.top_log_probs=8 denominator=recomputed": (
        "denominator=recomputed does not fit .* set denominator=behaviour or objective.divergence=binary_tv$"
    ),
    "advantage=min_variance objective=kernel kl=loss_k3": "kl.placement=loss; use kl=none",
}

ALLOWED = [
    "correction=tis denominator=recomputed",
    "correction=mis",
    "correction=[geometric,tis,opsm] denominator=recomputed",
    "correction=opsm staleness.n=1",
    "correction=opsm denominator=recomputed staleness.n=2",
    "correction=opsm denominator=recomputed staleness.n=1 rollout.passes=2",
    "correction=[sequence_rejection,router_shift]",
    "objective=dppo objective.divergence=topk_kl rollout.top_log_probs=20",
    "objective=minirl correction=mis",
    "advantage=min_variance objective=reinforce correction=mis",
    "advantage=min_variance objective=cispo advantage.estimator=proxy advantage.leave_one_out=true kl=loss_k2",
    "advantage=min_variance objective=kernel kl=reward_k1",
    "kl=reward_k1",
    "kl=loss_k2",
    "kl=loss_k3",
]


@pytest.mark.parametrize(("overrides", "pattern"), REFUSED.items())
def test_refused_with_one_sentence(overrides: str, pattern: str) -> None:
    sentences = refusals(overrides)
    assert len(sentences) == 1
    assert re.search(pattern, sentences[0])


@pytest.mark.parametrize("overrides", ALLOWED)
def test_allowed(overrides: str) -> None:
    assert refusals(overrides) == []


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_every_objective_is_allowed_as_it_comes(name: str) -> None:
    assert refusals(f"objective={name}") == []


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_minimum_variance_goes_with_the_objectives_that_say_so(name: str) -> None:
    allowed = refusals(f"objective={name} advantage=min_variance") == []
    assert allowed == (not OBJECTIVES[name].depends_on_advantage) == (name in BLIND_TO_ADVANTAGE)


def test_an_objective_of_the_users_own_is_not_judged_by_its_name() -> None:
    assert refusals("objective=reinforce objective._target_=my.Method advantage=min_variance") == []


# ---- warned about ----------------------------------------------------------------------------------------------

WARNED = {
    "rollout.top_p=0.9": r"^rollout.top_p=0.9: .* log W changes by the log of the kept mass",
    "rollout.top_k=50 rollout.top_p=0.9": "^rollout.top_p=0.9 and rollout.top_k=50: ",
    "rollout.top_k=50 denominator=recomputed": "corrections see the mass cut off as mismatch",
    "objective=gspo": "aggregation=token-mean is not GSPO as published",
    "engine=vllm engine.dtype=bfloat16 objective=grpo": "engine.dtype=bfloat16: vLLM computes the logits in it",
    "engine=vllm engine.dtype=float16 denominator=recomputed": "engine.dtype=float16: vLLM computes the logits in it",
    "engine.dtype=bfloat16": "denominator=behaviour with engine.dtype=bfloat16: .* objective=vespo acts on W",
    "correction=geometric": "correction=geometric drops short responses first",
    "correction=sequence_rejection": "correction=sequence_rejection drops long responses first",
    "objective=dppo denominator=recomputed": "objective=dppo with denominator=recomputed: .* collapse",
    "kl=reward_k1 advantage=group_mean_std": "the penalty is all there is",
    "objective.normalisation=length": "objective.normalisation=length is an ablation",
}
QUIET = [
    "",
    "engine=vllm",
    "objective=gspo aggregation=seq-mean-token-mean",
    "objective=dppo",
    "correction=[mis,opsm]",
    "engine.dtype=bfloat16 denominator=recomputed",
    "engine.dtype=bfloat16 objective=grpo",
]


@pytest.mark.parametrize(("overrides", "pattern"), WARNED.items())
def test_warned_about_with_one_sentence(overrides: str, pattern: str) -> None:
    sentences = warnings(overrides)
    assert len(sentences) == 1
    assert re.search(pattern, sentences[0])


@pytest.mark.parametrize("overrides", QUIET)
def test_nothing_to_say(overrides: str) -> None:
    assert warnings(overrides) == []


def test_the_objectives_on_the_product_of_ratios() -> None:
    on_product = {
        name for name, kind in OBJECTIVES.items() if issubclass(kind, SequenceObjective) and kind.folds_engine_weight
    }
    assert on_product == set(ON_SEQUENCE_WEIGHT)


def test_sentences_have_one_line_and_no_full_stop() -> None:
    for overrides in (*REFUSED, *WARNED):
        for sentence in refusals(overrides) + warnings(overrides):
            assert "\n" not in sentence and not sentence.endswith(".") and "  " not in sentence
