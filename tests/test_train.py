"""What `python train.py` does and leaves behind, for every choice that its configuration offers."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from finished_run import Run, finished_run, read_metrics, train
from omegaconf import OmegaConf
from run_entry_point import run_entry_point
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from vespo_lightning.callbacks.dashboard import LAYOUT
from vespo_lightning.config import config_hash
from vespo_lightning.models.export import export_hf
from vespo_lightning.models.loading import load_tokenizer, resolve_model_path

BUILTIN = "builtin:tiny-addition-moe"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return finished_run(tmp_path_factory)


def without_times(metrics: pd.DataFrame) -> pd.DataFrame:
    return metrics[[name for name in metrics if not name.startswith("performance/")]]


# ---- the run folder --------------------------------------------------------------------------------------------


def test_the_folder_of_a_run(run: Run) -> None:
    assert {path.name for path in run.folder.iterdir()} == {
        "config.yaml", "metrics.csv", "summary.json", "samples.jsonl",
        "tensorboard", "checkpoints", "rollouts", "export",
    }  # fmt: skip
    cfg = OmegaConf.load(run.folder / "config.yaml")
    assert (cfg.updates, cfg.staleness.n, cfg.optim.lr) == (8, 4, 3e-4)
    assert "${" not in (run.folder / "config.yaml").read_text()
    assert [path.name for path in sorted((run.folder / "checkpoints").iterdir())] == [
        "update-000004.ckpt", "update-000008.ckpt",
    ]  # fmt: skip


def test_one_row_per_update_and_every_group_of_metrics(run: Run) -> None:
    metrics = run.metrics()
    assert metrics.index.tolist() == list(range(9))
    groups = {name.split("/")[0] for name in metrics}
    assert groups == {
        "reward", "importance", "objective", "shadow", "mismatch", "staleness", "router", "performance", "eval",
        "train",
    }  # fmt: skip
    assert metrics["eval/accuracy"].notna()[lambda given: given].index.tolist() == [0, 4, 8]
    assert metrics["staleness/lag_mean"][1:].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert metrics["train/policy_version"][1:].tolist() == list(range(1, 9))
    assert metrics["reward/rollout_mean"].notna()[lambda given: given].index.tolist() == [1, 5]
    assert metrics["reward/rollout_mean"][1] == metrics["reward/mean"][1:5].mean()
    # float32 engine and trainer agree; drift makes the weights of responses differ
    assert 0 < metrics["mismatch/log_prob_diff_max"][1] < 1e-3
    assert metrics["importance/log_weight_std"][4] > 100 * metrics["importance/log_weight_std"][1]


def test_the_summary(run: Run) -> None:
    summary = json.loads((run.folder / "summary.json").read_text())
    metrics = run.metrics()
    assert summary["status"] == "finished" and summary["error"] is None
    assert summary["versions"].keys() >= {"python", "torch", "lightning", "transformers", "vespo-lightning"}
    assert summary["config_hash"] == config_hash(OmegaConf.load(run.folder / "config.yaml"))
    assert (summary["updates"], summary["skipped_updates"], summary["samples"]) == (8, 0, 512)
    assert summary["samples_per_second"] == pytest.approx(512 / summary["wall_seconds"])
    # fewer updates than the window of the first and the last ones
    assert summary["reward"] == pytest.approx(dict.fromkeys(("first", "last"), metrics["reward/mean"].mean()))
    accuracy = summary["held_out_accuracy"]
    assert [accuracy["first"]["update"], accuracy["last"]["update"]] == [0, 8]
    assert accuracy["first"]["accuracy"] == metrics["eval/accuracy"][0]
    assert accuracy["last"]["accuracy"] == metrics["eval/accuracy"][8]
    assert accuracy["best"]["accuracy"] == metrics["eval/accuracy"].max()
    assert summary["mismatch"]["mismatch/k3_kl"] == metrics["mismatch/k3_kl"][5]
    phases = summary["seconds_by_phase"]
    assert phases.keys() == {"generate", "verify", "sync", "update", "evaluate", "router_drift"}
    assert 0 < sum(phases.values()) < summary["wall_seconds"]


def test_tensorboard(run: Run) -> None:
    log = EventAccumulator(
        str(run.folder / "tensorboard"), size_guidance={"tensors": 0, "histograms": 0, "images": 0}
    ).Reload()
    tags = log.Tags()
    metrics = run.metrics()
    assert set(tags["scalars"]) == set(metrics)
    assert [event.step for event in log.Scalars("eval/accuracy")] == [0, 4, 8]
    rewards = [event.value for event in log.Scalars("reward/mean")]
    assert np.allclose(rewards, metrics["reward/mean"][1:])
    assert [event.step for event in log.Histograms("importance/log_weight")] == [4, 8]
    assert [event.step for event in log.Images("router/load")] == [1, 5]
    assert {"samples/text_summary", "config/text_summary"} <= set(tags["tensors"])
    (table,) = log.Tensors("samples/text_summary")[0].tensor_proto.string_val
    assert b"| prompt | response |" in table
    (text,) = log.Tensors("config/text_summary")[0].tensor_proto.string_val
    assert b"updates: 8" in text
    (layout,) = log.Tensors("custom_scalars__config__")[0].tensor_proto.string_val
    assert [category.title for category in Layout.FromString(layout).category] == list(LAYOUT)


def test_checkpoint_and_export_hold_the_same_weights(run: Run) -> None:
    checkpoint = torch.load(run.folder / "checkpoints" / "update-000008.ckpt", weights_only=True)
    trained = {name.removeprefix("policy.model."): value for name, value in checkpoint["state_dict"].items()}
    model = AutoModelForCausalLM.from_pretrained(run.folder / "export")
    state = model.state_dict()
    assert trained.keys() == state.keys()
    assert all(torch.equal(trained[name], state[name]) for name in state)
    start = AutoModelForCausalLM.from_pretrained(resolve_model_path(BUILTIN)).state_dict()
    assert not any(
        torch.equal(start[name], state[name]) for name in state if name.endswith("weight") and "norm" not in name
    )
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "export")
    assert tokenizer.decode(tokenizer.encode("12+34=\n")) == "12+34=\n"


def test_the_table_at_the_end_and_the_two_next_commands(run: Run) -> None:
    out = run.ended.out
    metrics = run.metrics()
    assert re.search(rf"^held-out accuracy, last +{metrics['eval/accuracy'][8]:.3f} at update 8 ", out, re.MULTILINE)
    assert re.search(r"^updates +8, 0 of them skipped$", out, re.MULTILINE)
    found = re.search(r"^Next: tensorboard --logdir (\S+)\n +python (evaluate\.py .*)$", out, re.MULTILINE)
    assert found and run.folder.parent / found[1] == run.folder
    script, *words = shlex.split(found[2])
    ended = run_entry_point(script, [*words, "problems=16"], run.folder.parent)
    assert ended.code == 0, ended.err
    assert re.search(r"^avg@8 +0\.\d{4} \(95 % interval", ended.out, re.MULTILINE)
    assert re.search(r"^pass@8 +[01]\.\d{4}$", ended.out, re.MULTILINE)


def test_a_run_says_nothing_on_stderr(run: Run) -> None:
    assert run.ended.err == ""


def test_the_same_seed_gives_the_same_metrics_to_the_bit(run: Run, tmp_path: Path) -> None:
    again = train(tmp_path / "again").metrics()
    pd.testing.assert_frame_equal(without_times(again), without_times(run.metrics()), check_exact=True)


# ---- every choice ----------------------------------------------------------------------------------------------

SHORT = ["updates=2", "staleness.n=2", "callbacks.evaluation.every=0", "callbacks.evaluation.problems=8"]


def short(tmp_path: Path, *argv: str) -> pd.DataFrame:
    """Metrics of two updates; the first one's samples are those of the finished run, if sampling is the same."""
    metrics = train(tmp_path / "short", *SHORT, *argv).metrics()
    assert np.isfinite(metrics["train/loss"][1:]).all()
    assert metrics["train/policy_version"].iloc[-1] == len(metrics) - 1 >= 2
    return metrics


def test_another_seed_gives_other_samples(run: Run, tmp_path: Path) -> None:
    metrics = short(tmp_path, "seed=2", "callbacks.evaluation.problems=32")
    assert metrics["eval/accuracy"][0] == run.metrics()["eval/accuracy"][0]  # greedy, before training
    assert metrics["train/loss"][1] != run.metrics()["train/loss"][1]


@pytest.mark.parametrize("objective", ["grpo", "reinforce"])
def test_objectives_part_ways_off_policy_only(objective: str, run: Run, tmp_path: Path) -> None:
    metrics, vespo = short(tmp_path, f"objective={objective}"), run.metrics()
    norms, others = metrics["train/grad_norm"], vespo["train/grad_norm"]
    assert norms[1] == pytest.approx(others[1], rel=1e-3)
    assert abs(norms[2] / others[2] - 1) > 1e-3
    assert metrics["reward/mean"][1:].tolist() == vespo["reward/mean"][1:3].tolist()


def test_advantages_scale_the_first_update_as_they_are_defined(run: Run, tmp_path: Path) -> None:
    mean = run.metrics()["train/grad_norm"][1]
    leave_one_out = short(tmp_path / "a", "advantage=leave_one_out")["train/grad_norm"][1]
    assert leave_one_out == pytest.approx(8 / 7 * mean, rel=1e-4)
    # rewards of 0 and 1 in groups of 8 have a standard deviation from 0.354 to 0.535
    normalised = short(tmp_path / "b", "advantage=group_mean_std")["train/grad_norm"][1]
    assert 1.8 * mean < normalised < 2.9 * mean


def test_recomputed_log_probs_make_the_first_mini_batch_on_policy(tmp_path: Path) -> None:
    metrics = short(tmp_path, "denominator=recomputed", "updates=3", "staleness.n=3")
    assert abs(metrics["importance/token_log_ratio_mean"][1]) < 1e-6
    assert metrics["importance/token_log_ratio_std"][1] < 1e-5
    assert abs(metrics["importance/log_weight_mean"][1]) < 1e-5
    assert metrics["importance/log_weight_std"][2] > 1e-3
    assert metrics["staleness/lag_mean"][1:].tolist() == [0, 1, 2]
    assert metrics["mismatch/k3_kl"][1:].notna().all()  # known at every lag here
    assert metrics["performance/recompute_seconds"][1] > 0


def test_a_rollout_of_one_mini_batch_is_on_policy(run: Run, tmp_path: Path) -> None:
    metrics = short(tmp_path, "staleness.n=1")
    assert metrics["staleness/lag_max"][1:].tolist() == [0, 0]
    assert metrics["reward/rollout_mean"][1:].tolist() == metrics["reward/mean"][1:].tolist()
    assert metrics["importance/log_weight_std"][1:].max() < 1e-3
    # the same prompts as in the finished run; from the second mini-batch on by newer weights
    assert metrics["reward/mean"][1] == run.metrics()["reward/mean"][1]


def test_truncated_responses_are_kept_masked_or_penalised(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(LENGTH_REWARD)
    all_cut = ["rollout.max_new_tokens=20", "task.reward=mine.reward"]
    keep = train(tmp_path / "keep", *SHORT, *all_cut).metrics()
    mask = train(tmp_path / "mask", *SHORT, *all_cut, "rollout.truncated=mask").metrics()
    penalise = train(
        tmp_path / "penalise", *SHORT, *all_cut, "rollout.truncated=penalise", "rollout.truncated_reward=-1"
    ).metrics()
    assert [m["reward/truncated_share"][1] for m in (keep, mask, penalise)] == [1, 1, 1]
    assert keep["train/grad_norm"][1] > 0 and mask["train/grad_norm"][1] == 0
    assert mask["reward/rollout_mean"][1] == keep["reward/rollout_mean"][1] > 0
    assert penalise["reward/rollout_mean"][1] == -1


def test_packed_rows_give_the_same_first_update(run: Run, tmp_path: Path) -> None:
    metrics = short(tmp_path, "batching.layout=packed", "batching.token_budget=512", "batching.head_chunk=100")
    for name in ("train/loss", "train/grad_norm", "train/entropy"):
        assert metrics[name][1] == pytest.approx(run.metrics()[name][1], rel=1e-4)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precisions(precision: str, run: Run, tmp_path: Path) -> None:
    metrics = short(tmp_path, f"trainer.precision={precision}", "engine.dtype=bfloat16")
    assert metrics["train/grad_norm"][1] == pytest.approx(run.metrics()["train/grad_norm"][1], rel=0.2)
    assert metrics["mismatch/log_prob_diff_max"][1] > 1e-3
    checkpoint = torch.load(tmp_path / "short" / "checkpoints" / "update-000002.ckpt", weights_only=True)
    moments = checkpoint["optimizer_states"][0]["state"][0]
    assert moments["exp_avg"].dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "short" / "export").dtype == torch.float32 or (
        precision == "bf16-true"
    )


def test_settings_of_optimisation_reach_it(run: Run, tmp_path: Path) -> None:
    schedule = ["optim.schedule=linear", "optim.warmup_updates=2", "updates=4", "staleness.n=4"]
    metrics = short(tmp_path, *schedule, "aggregation=constant", "entropy_coefficient=0.01", "optim.max_grad_norm=0.01")
    assert metrics["train/learning_rate"][1:].tolist() == pytest.approx([0, 1.5e-4, 3e-4, 1.5e-4])
    assert metrics["train/loss"][1] != run.metrics()["train/loss"][1]


def test_a_small_token_budget_changes_memory_not_the_update(run: Run, tmp_path: Path) -> None:
    metrics = short(tmp_path, "batching.token_budget=256", "model.experts=eager", "model.gradient_checkpointing=true")
    assert metrics["train/grad_norm"][1] == pytest.approx(run.metrics()["train/grad_norm"][1], rel=1e-4)


@pytest.mark.parametrize("routing", ["r2", "r3"])
def test_replayed_routing(routing: str, run: Run, tmp_path: Path) -> None:
    """At generation weights the replay changes nothing; later the experts used stay those of generation."""
    replayed = train(tmp_path / routing, "updates=4", f"routing={routing}").metrics()
    native = run.metrics()
    assert replayed["importance/log_weight_std"][1] == pytest.approx(native["importance/log_weight_std"][1], abs=1e-4)
    assert replayed["train/grad_norm"][1] == pytest.approx(native["train/grad_norm"][1], rel=1e-3)
    assert replayed["train/grad_norm"][4] != native["train/grad_norm"][4]
    assert replayed["router/changed_sets"][4] > 0  # of what the routers would choose themselves


def test_callbacks_can_be_left_out(tmp_path: Path) -> None:
    left_out = [
        "weight_variance", "weight_alarms", "shadow_objectives", "router_monitor", "router_drift", "sample_table",
        "evaluation", "checkpoint", "engine_mismatch",
    ]  # fmt: skip
    folder = train(tmp_path / "bare", "updates=2", *(f"callbacks.{name}=null" for name in left_out),
                   base=["staleness.n=2", "mini_batch_size=16"]).folder  # fmt: skip
    groups = {name.split("/")[0] for name in read_metrics(folder)}
    assert groups == {"reward", "objective", "staleness", "train", "performance", "mismatch"}  # mismatch: the canary
    assert not list(folder.rglob("*.ckpt")) and (folder / "export" / "model.safetensors").exists()


# ---- other models and tasks ------------------------------------------------------------------------------------


def saved(model_class: type[PreTrainedModel], config: object, folder: Path) -> str:
    tokenizer = load_tokenizer(BUILTIN)
    torch.manual_seed(0)
    model = model_class(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return str(export_hf(model, tokenizer, folder))


def sizes() -> dict[str, int]:
    tokenizer = load_tokenizer(BUILTIN)
    return {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 1024,
        "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip


#: A random policy never adds right; this reward tells its responses apart.
LENGTH_REWARD = "def reward(prompt, response, reference):\n    return len(set(response)) / 20\n"


def random_policy_run(path: str, tmp_path: Path, *argv: str) -> pd.DataFrame:
    (tmp_path / "length_reward.py").write_text(LENGTH_REWARD)
    return short(
        tmp_path, f"model.path={path}", "task.reward=length_reward.reward", "rollout.max_new_tokens=24",
        "callbacks.evaluation.problems=4", *argv,
    )  # fmt: skip


def test_a_dense_policy_has_no_router(tmp_path: Path) -> None:
    path = saved(LlamaForCausalLM, LlamaConfig(**sizes()), tmp_path / "llama")
    metrics = random_policy_run(path, tmp_path)
    assert not [name for name in metrics if name.startswith("router/")]
    assert metrics["mismatch/log_prob_diff_max"][1] < 1e-4


def test_another_family_of_experts(tmp_path: Path) -> None:
    config = MixtralConfig(**sizes(), num_local_experts=4, num_experts_per_tok=2)
    metrics = random_policy_run(saved(MixtralForCausalLM, config, tmp_path / "mixtral"), tmp_path)
    assert metrics["router/changed_sets"][1] < 0.01
    assert (metrics["router/load_entropy/layer_01"][1:] > 0.5).all()


QUESTIONS = [
    ("Mia has {a} kites and buys {b} more. How many kites has she?", lambda a, b: a + b),
    ("A shelf holds {a} rows of {b} jars. How many jars are there?", lambda a, b: a * b),
]


def write_questions(file: Path, count: int = 12) -> Path:
    """Invented questions in GSM8K's format."""
    rows = []
    for number in range(count):
        text, solve = QUESTIONS[number % 2]
        a, b = number + 2, 2 * number + 3
        rows.append({"question": text.format(a=a, b=b), "answer": f"It is {solve(a, b)}.\n#### {solve(a, b)}"})
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_question_files_end_to_end(tmp_path: Path) -> None:
    from pieces import tokenizer

    from vespo_lightning.models.tiny_moe import tiny_qwen3_moe

    path = export_hf(tiny_qwen3_moe(tokenizer(), hidden_size=32, context=512), tokenizer(), tmp_path / "model")
    file = write_questions(tmp_path / "questions.jsonl")
    folder = train(
        tmp_path / "run", "task=gsm8k", f"task.path={file}", "task.held_out_size=4", f"model.path={path}",
        "updates=2", "staleness.n=2", "callbacks.evaluation.problems=4", "callbacks.sample_table.every=1",
        "rollout.max_new_tokens=16",
    ).folder  # fmt: skip
    metrics = read_metrics(folder)
    assert metrics["eval/accuracy"][2] == 0 and metrics["reward/errors"][1] == 0
    prompts = {json.loads(line)["prompt"] for line in (folder / "samples.jsonl").read_text().splitlines()}
    assert all(re.match(r"(Mia has|A shelf holds) \d+ .*\nReason step by step\.", prompt) for prompt in prompts)


def test_a_supervised_warm_start_exports_a_model(tmp_path: Path) -> None:
    folder = train(tmp_path / "sft", "stage=sft", "sft.updates=12", "sft.batch_size=8", base=()).folder
    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.config.model_type == "qwen3_moe"
    loss = EventAccumulator(str(folder / "tensorboard")).Reload().Scalars("train/loss")
    assert loss[-1].value < 5.6  # nats; below a uniform guess among the bytes


# ---- learning --------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_default_job_learns(tmp_path: Path) -> None:
    folder = train(tmp_path / "run", "updates=256", "callbacks.evaluation.every=0", base=()).folder
    accuracy = json.loads((folder / "summary.json").read_text())["held_out_accuracy"]
    assert 0.25 <= accuracy["first"]["accuracy"] <= 0.45
    assert accuracy["last"]["accuracy"] >= 0.6


@pytest.mark.long
def test_shuffled_rewards_teach_nothing(tmp_path: Path) -> None:
    """Noise as large as the signal of the default job: accuracy does not rise. (It falls: noise moves weights too.)"""
    argv = ["updates=192", "callbacks.evaluation.every=64", "rollout.shuffle_rewards=true"]
    folder = train(tmp_path / "run", *argv, base=()).folder
    accuracy = json.loads((folder / "summary.json").read_text())["held_out_accuracy"]
    assert accuracy["best"]["accuracy"] <= accuracy["first"]["accuracy"] + 0.05
    assert accuracy["last"]["update"] == 192
