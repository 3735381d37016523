"""Every file under conf/ composes, what it describes can be built, and no key is without effect."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra import compose
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from vespo_lightning.config import resolved
from vespo_lightning.config_check import CONFIG_PATH, config_source
from vespo_lightning.config_rules import check_run
from vespo_lightning.errors import UserError
from vespo_lightning.rollouts.loader import RolloutLoader
from vespo_lightning.rollouts.producer import RolloutProducer
from vespo_lightning.rollouts.vllm_support import SUPPORTED
from vespo_lightning.training.module import PolicyModule

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = sorted(
    (file.parent.relative_to(ROOT / "conf").as_posix(), file.stem) for file in (ROOT / "conf").glob("*/**/*.yaml")
)
NAMES = ["/".join(option) for option in OPTIONS]


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """A file for tasks whose path is mandatory."""
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps({"question": f"{n} + 1?", "answer": str(n + 1)}) + "\n" for n in range(520)))
    return file


def composed(name: str = "train", *overrides: str) -> DictConfig:
    with config_source(CONFIG_PATH):
        return compose(name, list(overrides), return_hydra_config=False)


#: What an option needs beside it.
BESIDE = {
    ("advantage", "min_variance"): ["objective=sequence_is"],
    ("correction", "tis"): ["denominator=recomputed"],
}


def choice(group: str, option: str, questions: Path) -> list[str]:
    path = [f"task.path={questions}"] if (group, option) in (("task", "gsm8k"), ("task", "math")) else []
    return [f"{group}={option}", "name=x", *path, *BESIDE.get((group, option), [])]


def has_vllm() -> bool:
    for distribution in SUPPORTED:
        try:
            importlib.metadata.version(distribution)
            return True
        except importlib.metadata.PackageNotFoundError:
            continue
    return False


def test_the_groups_are_found_on_disk() -> None:
    assert len(OPTIONS) >= 15
    assert {"model", "task", "objective", "advantage", "engine", "staleness", "trainer", "callbacks"} <= {
        group for group, _ in OPTIONS
    }


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_every_option_composes_and_its_objects_are_built(group: str, option: str, questions: Path) -> None:
    if option == "vllm" and not has_vllm():
        pytest.skip("vLLM is not installed")
    cfg = composed("train", *choice(group, option, questions))
    check_run(cfg)
    assert "${" not in json.dumps(resolved(cfg))
    section = OmegaConf.select(cfg, group.replace("/", "."))
    if group == "experiment":  # sets other groups
        return
    if group in ("callbacks", "correction"):
        for name, node in section.items():
            given = {"folder": "checkpoints"} if name == "checkpoint" else {}
            assert type(instantiate(node, **given)) is get_class(node._target_)
    elif "_target_" in section:
        built = instantiate(section)
        assert type(built) is get_class(section._target_)
        if group == "task":
            built.close()


@pytest.mark.parametrize("group", ["model", "task", "engine"])
def test_evaluation_takes_every_option_that_training_takes(group: str, questions: Path) -> None:
    for option in (option for known, option in OPTIONS if known == group):
        resolved(composed("evaluate", *choice(group, option, questions)))


def test_the_default_passes_the_rules() -> None:
    check_run(composed("train", "name=x"))


# ---- no key without effect -------------------------------------------------------------------------------------


def sections_with_target(node: Any, path: str = "") -> Iterator[tuple[str, DictConfig]]:
    if isinstance(node, DictConfig):
        if "_target_" in node:
            yield path, node
        for name, child in node.items():
            yield from sections_with_target(child, f"{path}.{name}".lstrip("."))


def parameters_that_are_read(function: Any) -> set[str]:
    """Parameters of a function that its own body uses."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    return {name for name in inspect.signature(function).parameters if name in read}


@pytest.mark.parametrize(("group", "option"), OPTIONS, ids=NAMES)
def test_keys_of_built_objects_are_the_arguments_that_they_read(group: str, option: str, questions: Path) -> None:
    cfg = composed("train", *choice(group, option, questions))
    section = None if group == "experiment" else OmegaConf.select(cfg, group.replace("/", "."))
    for path, node in sections_with_target(section, group):
        wanted = set(node) - {"_target_"}
        constructor = get_class(node._target_).__init__
        assert wanted <= (set() if constructor is object.__init__ else parameters_that_are_read(constructor)), path


def test_keys_of_sections_are_arguments_of_what_they_are_passed_to() -> None:
    cfg = composed("train", "name=x")
    rollout = parameters_that_are_read(RolloutProducer.__init__) | parameters_that_are_read(RolloutLoader.__init__)
    assert set(cfg.rollout) <= rollout
    assert {*cfg.optim, *cfg.batching} <= parameters_that_are_read(PolicyModule.__init__)


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_other_key_is_read_by_its_entry_point(name: str) -> None:
    source = (ROOT / f"{name}.py").read_text()
    yaml = (ROOT / "conf" / f"{name}.yaml").read_text()
    read = set(re.findall(r"\bcfg\.([a-z_]+(?:\.[a-z_]+)?)", source)) | set(re.findall(r"\$\{(?!hydra)(\w+)\}", yaml))
    read |= {word for words in re.findall(r"for \w+ in \(([^)]*)\)", source) for word in re.findall(r'"(\w+)"', words)}
    cfg = composed(name)
    top = set(cfg) - {"hydra"}
    assert {key for key in top if not any(word == key or word.startswith(f"{key}.") for word in read)} == set()
    if name == "train":
        for section in ("model", "sft"):
            assert {f"{section}.{key}" for key in cfg[section]} - read == set()


# ---- the rules -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("updates=0", "updates=0 must be a whole number of at least 1"),
        ("rollout.chunk_groups=1.5", "rollout.chunk_groups=1.5 must be a whole number of at least 1"),
        ("seed=-1", "seed=-1 must be a whole number of at least 0"),
        ("optim.lr=abc", "optim.lr=abc must be a number above 0"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1 must be a number of at least 0"),
        ("entropy_coefficient=true", "entropy_coefficient=True must be a number"),
        ("rollout.shuffle_rewards=maybe", "rollout.shuffle_rewards=maybe must be true or false"),
        ("optim.betas=[0.9,1]", "optim.betas=[0.9, 1] must be two numbers from 0 to below 1, such as [0.9,0.999]"),
        ("optim.betas=0.9", "optim.betas=0.9 must be two numbers from 0 to below 1, such as [0.9,0.999]"),
        ("optim.max_grad_norm=0", "optim.max_grad_norm=0 must be a number above 0, or null for no clipping"),
        ("denominator=old", "denominator=old is unknown; valid: behaviour, recomputed"),
        ("mini_batch_size=60", "mini_batch_size=60 is not a multiple of rollout.group_size=8; use 56 or 64"),
        ("mini_batch_size=4", "mini_batch_size=4 is not a multiple of rollout.group_size=8; use 8"),
        (
            "rollout.truncated_reward=-1",
            "rollout.truncated_reward=-1 has no effect with rollout.truncated=keep; set rollout.truncated=penalise",
        ),
        (
            "trainer.precision=bf16-true",
            "trainer.precision=bf16-true computes in bfloat16, which an engine of engine.dtype=float32 would not agree "
            "with; set engine.dtype=bfloat16",
        ),
    ],
)
def test_broken_rules_name_key_value_and_way_out(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        check_run(composed("train", "name=x", override))
    assert str(error.value) == message


def test_a_supervised_run_does_not_resume() -> None:
    with pytest.raises(UserError, match=r"^resume=runs/x is a run with stage=sft"):
        check_run(composed("train", "name=x", "stage=sft", "resume=runs/x"))
