"""The command line: unknown names, stored configurations, the resume check, and errors as one sentence."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose
from omegaconf import DictConfig, OmegaConf

from vespo_lightning.config import (
    config_differences,
    config_hash,
    load_resolved,
    resolved,
    resume_config,
    run_folder,
    save_resolved,
)
from vespo_lightning.config_check import check_overrides, config_source
from vespo_lightning.errors import UserError

CONF = str(Path(__file__).parent / "fixtures" / "conf")
ENTRY = Path(__file__).parent / "fixtures" / "conf_entry.py"


def composed(*overrides: str) -> DictConfig:
    with config_source(CONF):
        return compose("train", list(overrides))


def refusal(command: str) -> str:
    with pytest.raises(UserError) as error:
        check_overrides(command.split(), "train", CONF)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "objective=grpo staleness.n=8",
        "task=gsm8k task.path=x.jsonl",
        "+experiment=far",
        "optimizer.betas=[0.8,0.9] optimizer.betas.0=0.7",
        "+model.kwargs.attn_implementation=eager",
        "+callbacks.mine._target_=my.Callback",
        "++staleness.n=2",
        "~callbacks",
        "hydra.run.dir=somewhere hydra.job.chdir=false",
        "--cfg job --resolve",
        "--help",
        "-m objective=vespo,grpo seed=range(1,4)",
        "--multirun objective=glob(*)",
    ],
)
def test_valid_command_lines_pass(command: str) -> None:
    check_overrides(command.split(), "train", CONF)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("objective=vesp", "objective=vesp is unknown; valid: grpo, reinforce, vespo (nearest: vespo)"),
        ("objective=qqq", "objective=qqq is unknown; valid: grpo, reinforce, vespo"),
        ("objective=null", "objective=null is unknown; valid: grpo, reinforce, vespo"),
        ("staleness.nn=4", "staleness.nn=4 is unknown; nearest: staleness.n"),
        ("stalenes.n=4", "stalenes.n=4 is unknown; nearest: staleness.n, staleness, staleness.seed"),
        ("lr=1", "lr=1 is unknown; nearest: optimizer.lr"),
        ("objectiv=grpo", "objectiv=grpo is unknown; nearest: objective"),
        ("task=gsm8k task.digits=4", "task.digits=4 is unknown; valid here: task.name, task.path"),
        ("~callback", "~callback is unknown; nearest: callbacks"),
        ("+experiment=fer", "experiment=fer is unknown; valid: far (nearest: far)"),
        ("+seed=2", "+seed=2 adds a key that exists; type seed=2 to change it"),
        (
            "-m objective=vespo,grp seed=1,2",
            "objective=grp is unknown; valid: grpo, reinforce, vespo (nearest: grpo)",
        ),
        ("seed", "seed cannot be read as key=value; quote a value with commas, spaces, = or brackets"),
        ("--config-dir nowhere", "--config-dir nowhere: no such folder"),
    ],
)
def test_a_wrong_word_is_named_with_the_nearest_valid_ones(command: str, message: str) -> None:
    assert refusal(command) == message


def test_additions_are_for_open_sections_only() -> None:
    assert refusal("+staleness.m=4").startswith("+staleness.m=4 adds a key that nothing reads; valid here: ")
    assert refusal("++optimizer.weight_deca=1").startswith("++optimizer.weight_deca=1 adds a key")
    check_overrides(["+trainer.precision=16"], "train", CONF, open_sections=("trainer",))
    with pytest.raises(UserError, match=r"^\+trainer\.precision=16 adds a key .*; valid here: trainer\.max_steps "):
        check_overrides(["+trainer.precision=16"], "train", CONF, open_sections=("logger",))


def test_a_sweep_without_multirun_says_how_to_sweep() -> None:
    assert "--multirun" in refusal("objective=vespo,grpo")


def test_options_in_a_folder_of_the_users_own_are_known(tmp_path: Path) -> None:
    (tmp_path / "objective").mkdir()
    (tmp_path / "objective" / "mine.yaml").write_text("name: mine\nbeta: 1\n")
    check_overrides(["--config-dir", str(tmp_path), "objective=mine", "objective.beta=2"], "train", CONF)
    with pytest.raises(UserError, match="valid: grpo, mine, reinforce, vespo"):
        check_overrides(["--config-dir", str(tmp_path), "objective=min"], "train", CONF)


def test_stored_configuration_comes_back_equal(tmp_path: Path) -> None:
    values = {"lr": 1e-05, "text": "1e-5", "no": "no", "none": None, "n": [1, 2.5], "deep": {"empty": {}}}
    path = save_resolved(OmegaConf.create({**values, "same": "${lr}"}), tmp_path / "run")
    assert path == tmp_path / "run" / "config.yaml"
    assert OmegaConf.to_container(load_resolved(tmp_path / "run")) == {**values, "same": 1e-05}
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_a_value_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^task\.path has no value; type task\.path=\.\.\.$"):
        save_resolved(composed("task=gsm8k"), tmp_path)
    assert not (tmp_path / "config.yaml").exists()
    with pytest.raises(UserError, match=r"cannot be resolved: .*nowhere"):
        resolved({"a": "${nowhere}"})


@pytest.mark.parametrize("content", [None, "", "a: [1", "- 1\n- 2\n"])
def test_a_folder_that_is_no_run_folder_is_refused(tmp_path: Path, content: str | None) -> None:
    folder = tmp_path / "run"
    with pytest.raises(UserError, match=f"^resume={folder}: the folder does not exist; give the run folder"):
        load_resolved(folder)
    folder.mkdir()
    if content is not None:
        (folder / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=f"^resume={folder}: "):
        load_resolved(folder)


def test_hash_depends_on_what_is_computed_only() -> None:
    reference = config_hash(composed())
    assert len(reference) == 64
    assert config_hash(composed("resume=runs/x", "name=other")) == reference
    assert config_hash(dict(reversed(list(resolved(composed()).items())))) == reference
    assert config_hash(composed("staleness.n=5")) != reference
    assert config_hash(composed("optimizer.lr=1e-5")) != reference


def test_differences_are_leaves_with_both_values() -> None:
    found = config_differences(composed(), composed("objective=grpo", "seed=2", "resume=x"))
    assert found == [
        ("objective.c1", 2.0, "(absent)"),
        ("objective.clip", "(absent)", 0.2),
        ("objective.name", "vespo", "grpo"),
        ("seed", 1, 2),
        ("staleness.seed", 1, 2),
    ]


def resumed(folder: Path, *overrides: str) -> DictConfig:
    words = [f"resume={folder}", *overrides]
    return resume_config(composed(*words), composed(), words)


def test_resume_takes_what_is_stored_where_nothing_was_typed(tmp_path: Path) -> None:
    save_resolved(composed("objective=grpo", "staleness.n=64", "seed=7"), tmp_path)
    cfg = resumed(tmp_path)
    assert (cfg.objective.name, cfg.staleness.n, cfg.staleness.seed) == ("grpo", 64, 7)
    assert cfg.resume == str(tmp_path)
    assert resumed(tmp_path, "objective=grpo", "staleness.n=64", "seed=7", "name=x").seed == 7
    assert resumed(tmp_path, "+experiment=far").staleness.n == 64


@pytest.mark.parametrize(
    ("typed", "key", "values"),
    [
        ("staleness.n=4", "staleness.n", "64 there and 4 here"),  # the default, but typed
        ("objective=vespo", "objective.name", "'grpo' there and 'vespo' here"),
        ("optimizer={lr: 1}", "optimizer.lr", "0.0001 there and 1 here"),
        ("seed=8", "staleness.seed", "7 there and 8 here"),  # reached by interpolation
    ],
)
def test_resume_refuses_a_typed_key_that_differs(tmp_path: Path, typed: str, key: str, values: str) -> None:
    save_resolved(composed("objective=grpo", "staleness.n=64", "seed=7"), tmp_path)
    with pytest.raises(UserError) as error:
        resumed(tmp_path, typed)
    assert f"{key} is {values}" in str(error.value)
    assert f"model.path={tmp_path / 'export'}" in str(error.value)


def test_resume_refuses_an_experiment_that_differs(tmp_path: Path) -> None:
    save_resolved(composed("staleness.n=8"), tmp_path)
    with pytest.raises(UserError, match=r"staleness\.n is 8 there and 64 here"):
        resumed(tmp_path, "+experiment=far")


def test_run_folder_is_new_each_time_or_the_resumed_one() -> None:
    folders = {run_folder(None, "addition") for _ in range(20)}
    assert len(folders) == 20
    assert all(re.fullmatch(r"runs/addition/\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d_[0-9a-f]{4}", f) for f in folders)
    assert run_folder("runs/old", "addition") == "runs/old"


def entry(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ENTRY), *words],
        cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "HYDRA_FULL_ERROR"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_entry_runs_and_resumes_in_the_same_folder(tmp_path: Path) -> None:
    first = entry(tmp_path, "objective=grpo", "staleness.n=16")
    assert first.returncode == 0, first.stderr
    torch_loaded, objective, n, folder = first.stdout.split()
    assert (torch_loaded, objective, n) == ("False", "grpo", "16")
    run = Path(folder).relative_to(tmp_path)
    assert run.parts[:2] == ("runs", "addition")
    second = entry(tmp_path, f"resume={run}")
    assert second.stdout.split() == ["False", "grpo", "16", folder]
    third = entry(tmp_path, f"resume={run}", "staleness.n=4")
    assert (third.returncode, third.stdout) == (1, "")
    assert third.stderr.startswith(f"error: resume={run} goes on with the configuration of that run")
    assert third.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["objective=vesp"],
            "error: objective=vesp is unknown; valid: grpo, reinforce, vespo (nearest: vespo)\n",
        ),
        (["task=gsm8k"], "error: task.path has no value; type task.path=...\n"),
        (
            ["resume=typo"],
            "error: resume=typo: the folder does not exist; give the run folder that the run printed\n",
        ),
        (["model.path=user-error"], "error: model.path=user-error is not a folder\n"),
        (["model.path=instantiate"], "error: task.digits=99 is too many; at most 12\n"),
    ],
)
def test_mistakes_are_one_line_on_stderr_and_status_1(tmp_path: Path, words: list[str], message: str) -> None:
    done = entry(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", message)
    assert not (tmp_path / "typo").exists()


def test_faults_of_the_program_keep_their_traceback(tmp_path: Path) -> None:
    done = entry(tmp_path, "model.path=bug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "conf_entry.py" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: a fault of the program")


@pytest.mark.parametrize("how", ["interrupt", "interrupt-as-lightning"])
def test_an_interrupt_says_how_to_go_on(tmp_path: Path, how: str) -> None:
    done = entry(tmp_path, f"model.path={how}")
    assert done.returncode == 130
    found = re.fullmatch(r"\ninterrupted; go on with: python \S+ resume=(\S+)\n", done.stderr)
    assert found and (tmp_path / found[1] / "config.yaml").is_file()
