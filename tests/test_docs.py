"""The documentation against the code: metric names, links, command lines."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from vespo_lightning.callbacks.weight_variance import histograms
from vespo_lightning.config_check import check_overrides
from vespo_lightning.diagnostics.evaluation import EvaluationResult, evaluation_metrics
from vespo_lightning.diagnostics.importance import coefficient_distribution, importance_statistics
from vespo_lightning.diagnostics.length_drift import usable_lengths
from vespo_lightning.diagnostics.shadow import shadow_statistics
from vespo_lightning.errors import UserError
from vespo_lightning.objectives.base import TokenBatch
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.routing.drift import RoutingDrift
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.training.outputs import RoutingBatch

ROOT = Path(__file__).resolve().parent.parent
METRICS = ROOT / "docs" / "metrics.md"
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
GROUPS = "reward|importance|objective|correction|kl|shadow|mismatch|staleness|router|performance|train|eval"
NAME = re.compile(rf"({GROUPS})/\w*[a-z0-9](/layer_NN)?|shadow/\w+/\w*[a-z0-9]")
FENCE = re.compile(r"^ *```.*?\n(.*?)^ *```", re.DOTALL | re.MULTILINE)


def each_page(function):
    return pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)(function)


# ---- metric names ----------------------------------------------------------------------------------------------


def source_nodes() -> Iterator[ast.AST]:
    files = [ROOT / "train.py", ROOT / "evaluate.py"]
    for folder in ("vespo_lightning", "callbacks", "models"):
        files += (ROOT / folder).rglob("*.py")
    for file in files:
        yield from ast.walk(ast.parse(file.read_text(encoding="utf-8")))


def text_of(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def literal_names() -> set[str]:
    """Strings of the sources that are a name as they stand; ``eval/pass_at_``, a prefix, is none."""
    return {text for node in source_nodes() if NAME.fullmatch(text := text_of(node))}


def name_patterns() -> set[str]:
    """f-strings of the sources that begin like a name, as regular expressions."""
    strings = (node.values for node in source_nodes() if isinstance(node, ast.JoinedStr))
    return {
        "".join(re.escape(text_of(part)) or ".+" for part in parts)
        for parts in strings
        if re.match(rf"({GROUPS})/", text_of(parts[0]))
    }


def token_batch() -> TokenBatch:
    """Nine tokens of four responses, one of them longer, two advantages of each sign."""
    return TokenBatch(
        log_prob=torch.full((9,), -1.0),
        behaviour_log_prob=torch.full((9,), -1.1),
        sequence_index=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 3]),
        loss_mask=torch.ones(9, dtype=torch.bool),
        advantage=torch.tensor([1.0, -1.0, 1.0, -1.0]),
        group=torch.tensor([0, 0, 1, 1]),
        version_made=torch.zeros(9, dtype=torch.int32),
        policy_version=0,
    )


def router_names() -> set[str]:
    statistics = RouterStatistics([3], num_experts=4)
    probs, experts = torch.full((2, 1, 4), 0.25), torch.zeros(2, 1, 1, dtype=torch.long)
    mask = torch.ones(2, dtype=torch.bool)
    statistics.update(RoutingBatch([3], experts, probs.log(), probs, mask, experts, probs[..., :1], experts))
    names = set(statistics.metrics())
    for prefix in ("engine_", "update_"):
        drift = RoutingDrift([3], prefix=prefix)
        drift.update(experts, experts, mask, (probs[..., :1], probs[..., :1]))
        names |= drift.metrics().keys()
    return {f"router/{name}" for name in names}


def names_put_together() -> set[str]:
    """Names that the code formats, from the functions that do it."""
    batch, coefficient = token_batch(), torch.ones(9)
    judged = EvaluationResult(np.eye(4), np.zeros((4, 4), dtype=bool), np.ones((4, 4), dtype=int))
    return (
        importance_statistics(batch).keys()
        | coefficient_distribution(coefficient, batch).keys()
        | histograms(SimpleNamespace(tokens=batch, coefficient=coefficient)).keys()
        | Grpo(dual_clip=3.0).statistics(batch).keys()
        | usable_lengths(batch, Vespo()).keys()
        | shadow_statistics({"grpo": Grpo()}, batch, coefficient).keys()
        | evaluation_metrics(judged).keys()
        | router_names()
    )


def as_documented(name: str) -> str:
    name = re.sub(r"^shadow/\w+/", "shadow/NAME/", name)
    return re.sub(r"layer_\d+$", "layer_NN", re.sub(r"pass_at_\d+$", "pass_at_k", name))


def code_spans(page: Path) -> set[str]:
    return set(re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text(encoding="utf-8"))))


def test_every_name_that_the_code_formats_is_known_here() -> None:
    names = names_put_together()
    patterns = name_patterns()
    assert len(patterns) >= 5
    assert {p for p in patterns if not any(re.fullmatch(p, name) for name in names)} == set()


def test_the_page_has_the_metrics_of_the_code_and_no_others() -> None:
    known = {as_documented(name) for name in literal_names() | names_put_together()}
    documented = {as_documented(span) for span in code_spans(METRICS) if NAME.fullmatch(span)}
    assert known - documented == set(), "not in docs/metrics.md"
    assert documented - known == set(), "not in the code"
    assert len(known) > 80


def test_each_metric_has_one_row() -> None:
    rows = [line.split("|")[1] for line in METRICS.read_text(encoding="utf-8").splitlines() if "| `" in line[:3]]
    named = [span for cell in rows for span in re.findall(r"`([^`]+)`", cell) if NAME.fullmatch(span)]
    assert sorted(named) == sorted(set(named))
    assert {as_documented(n) for n in named} == {as_documented(n) for n in literal_names() | names_put_together()}


def test_the_page_has_the_tags_of_everything_else_in_tensorboard() -> None:
    tags = {
        text_of(node.args[0])
        for node in source_nodes()
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("add_text", "add_image", "add_histogram")
    } - {""}
    assert tags >= {"samples", "router/load"}
    assert tags - code_spans(METRICS) == set()


# ---- links -----------------------------------------------------------------------------------------------------


def relative_links(text: str) -> list[str]:
    prose = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    targets = re.findall(r"\]\(<?([^)>\s]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)\"", prose)
    return [path for target in targets if "://" not in target and (path := target.split("#")[0])]


def test_relative_links_are_found() -> None:
    text = '[a](b.md#part) ![c](d/e.png "title") [f](https://x.org) [g](#h) `[i](j)`\n<img src="k.png">\n'
    assert relative_links(text + "```\n[l](m)\n```\n") == ["b.md", "d/e.png", "k.png"]


@each_page
def test_links_lead_to_files(page: Path) -> None:
    links = relative_links(page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []


# ---- command lines ---------------------------------------------------------------------------------------------


def commands(text: str) -> list[tuple[str, list[str]]]:
    """(configuration, arguments) of ``python train.py``, ``python evaluate.py`` and ``make train`` in code blocks.

    Placeholders: capitals are values like any other, and ``...`` stands for further arguments.
    """
    found = []
    for block in FENCE.findall(text):
        for line in block.replace("\\\n", " ").splitlines():
            if match := re.search(r"python\S*\s+(?:\S*/)?(train|evaluate)\.py(?!\S)(.*)", line):
                found.append((match[1], [word for word in words(match[2]) if word != "..."]))
            elif match := re.search(r"\bmake train(?!\S)(.*)", line):
                given = dict(word.split("=", 1) for word in words(match[1]) if "=" in word)
                engine = [f"engine={given['ENGINE']}"] if "ENGINE" in given else []
                found.append(("train", engine + shlex.split(given.get("ARGS", ""))))
    return found


def words(rest_of_line: str) -> list[str]:
    """As a shell would split them, up to a comment or the next ``;``, ``&``, ``|``, ``<`` or ``>``."""
    lexer = shlex.shlex(rest_of_line, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    found: list[str] = []
    for word in lexer:
        if set(word) <= set(";&|<>"):
            break
        found.append(word)
    return found


def test_command_lines_are_found() -> None:
    text = """
`python train.py in=prose`
```bash
$ OMP_NUM_THREADS=1 .venv/bin/python train.py optim.betas=[0.9,0.95] \\
    'task.instruction=a; b' > log.txt  # why
for s in 1 2; do python evaluate.py run=RUN_FOLDER seed=$s ...; done
make train ENGINE=vllm ARGS="seed=2 updates=8" | tee log.txt
make train-all && python other.py x=1
```
"""
    assert commands(text) == [
        ("train", ["optim.betas=[0.9,0.95]", "task.instruction=a; b"]),
        ("evaluate", ["run=RUN_FOLDER", "seed=$s"]),
        ("train", ["engine=vllm", "seed=2", "updates=8"]),
    ]


@each_page
def test_command_lines_are_accepted(page: Path) -> None:
    refused = []
    for config_name, arguments in commands(page.read_text(encoding="utf-8")):
        try:
            check_overrides(arguments, config_name)
        except UserError as error:
            refused.append(f"{config_name}.py {shlex.join(arguments)}: {error}")
    assert refused == []
