import ast
import re
from pathlib import Path

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from small_run import FakeModule, batches, mini_batch, trainer, update_result
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

import vespo_lightning
import vespo_lightning.callbacks as callbacks
from vespo_lightning.callbacks.dashboard import LAYOUT, Dashboard
from vespo_lightning.callbacks.progress import SHOWN
from vespo_lightning.callbacks.summary import MISMATCH, REWARD
from vespo_lightning.diagnostics.importance import coefficient_distribution, importance_statistics
from vespo_lightning.diagnostics.shadow import shadow_statistics
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.routing.drift import RoutingDrift
from vespo_lightning.routing.statistics import RouterStatistics
from vespo_lightning.training.outputs import RoutingBatch

GROUPS = "reward|importance|objective|correction|kl|shadow|mismatch|staleness|router|performance|eval|train"
NAME = re.compile(rf"({GROUPS})/\w+")


def names_in_other_files(*left_out: str) -> set[str]:
    """Every string of the sources that is a metric name as it stands, those of the files named excepted."""
    names = set()
    for folder in (Path(vespo_lightning.__file__).parent, Path(callbacks.__file__).parent):
        for path in folder.rglob("*.py"):
            if path.name not in left_out:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                names |= {
                    node.value
                    for node in ast.walk(tree)
                    if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value)
                }
    return names


def names_put_together_at_run_time() -> set[str]:
    result = update_result(mini_batch(0), version=1)
    routing = RouterStatistics([0, 2], num_experts=4)
    probs = torch.full((3, 2, 4), 0.25)
    experts = torch.zeros(3, 2, 1, dtype=torch.long)
    mask = torch.ones(3, dtype=torch.bool)
    routing.update(RoutingBatch([0, 2], experts, probs.log(), probs, mask, experts, probs[..., :1], experts))
    drifted = set()
    for prefix in ("engine_", "update_"):
        drift = RoutingDrift([0, 2], prefix=prefix)
        drift.update(experts, experts, mask, (probs[..., :1], probs[..., :1]))
        drifted |= {f"router/{name}" for name in drift.metrics()}
    return (
        drifted
        | importance_statistics(result.tokens).keys()
        | coefficient_distribution(result.coefficient, result.tokens).keys()
        | {f"router/{name}" for name in routing.metrics()}
        | shadow_statistics({"vespo": Vespo()}, result.tokens, result.coefficient).keys()
        | {"eval/pass_at_2"}
    )


def test_every_tag_of_the_layout_is_a_metric_of_the_code():
    names = names_in_other_files("dashboard.py", "progress.py", "summary.py") | names_put_together_at_run_time()
    assert Vespo().statistics(update_result(mini_batch(0), 1).tokens).keys() <= names
    for group, charts in LAYOUT.items():
        for chart, (kind, tags) in charts.items():
            if kind == "Margin":
                assert len(tags) == 3 and set(tags) <= names, f"{group}: {chart}"
            else:  # TensorBoard matches from the beginning of the name
                for tag in tags:
                    assert any(re.match(tag, name) for name in names), f"{group}: {chart}: {tag}"


def test_progress_bar_and_summary_show_metrics_of_the_code():
    assert {*SHOWN.values(), *MISMATCH.values(), REWARD} <= names_in_other_files("progress.py", "summary.py")


def test_per_layer_charts_hold_all_layers():
    (tag,) = LAYOUT["Router"]["load, max violation"][1]
    matched = {name for name in names_put_together_at_run_time() if re.match(tag, name)}
    assert matched == {f"router/load_max_violation{end}" for end in ("", "/layer_00", "/layer_02")}


def test_layout_and_config_arrive_in_tensorboard_once(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="tb", default_hp_metric=False)
    module = FakeModule()
    trainer(tmp_path, [Dashboard("objective:\n  name: vespo")], [board]).fit(module, batches(2))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"tensors": 0}).Reload()
    (config,) = events.Tensors("config/text_summary")
    assert config.tensor_proto.string_val[0].decode() == "```yaml\nobjective:\n  name: vespo\n```"
    (stored,) = events.Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(stored.tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == list(LAYOUT)
    accuracy = next(chart for chart in layout.category[0].chart if chart.title == "held-out accuracy")
    assert accuracy.margin.series[0].upper == "eval/ci_high"

    resumed = TensorBoardLogger(tmp_path, name="", version="resumed", default_hp_metric=False)
    trainer(tmp_path, [Dashboard("x: 1")], [resumed]).fit(module, batches(1))  # module.update is 2 by now
    tags = EventAccumulator(str(tmp_path / "resumed")).Reload().Tags()["tensors"]
    assert tags == []
