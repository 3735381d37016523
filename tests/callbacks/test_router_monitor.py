import json
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vespo_lightning.callbacks.router_monitor import MAX_COLUMNS, LayerHistory, RouterMonitor
from vespo_lightning.callbacks.tensorboard import draw_heat_map, summary_writer
from vespo_lightning.errors import UserError
from vespo_lightning.training.outputs import MicroBatchObserver, MicroBatchOutput, RoutingBatch

LAYERS, EXPERTS = [1, 3], 4


class Module:
    """What the callback uses of the policy module."""

    def __init__(self) -> None:
        self.update = 0
        self.row: dict[str, float] = {}

    def record(self, metrics: dict[str, float]) -> None:
        assert not self.row.keys() & metrics.keys()
        self.row |= metrics


def make_trainer(*loggers: object, world_size: int = 1) -> SimpleNamespace:
    """A trainer whose other ranks see what this one sees."""

    def reduce(tensor: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        return tensor * world_size

    return SimpleNamespace(strategy=SimpleNamespace(reduce=reduce), loggers=list(loggers), is_global_zero=True)


def micro_batch(
    experts: list[int] | None, recorded: list[int] | None = None, versions: list[int] | None = None
) -> MicroBatchOutput:
    """Top-1 routing of some tokens, equal in both layers; the last token is masked. Version 5 is current."""
    if experts is None:
        return MicroBatchOutput(samples=[], tokens=None, routing=None)

    def per_layer(values: list[int]) -> torch.Tensor:
        return torch.tensor(values)[:, None, None].expand(-1, len(LAYERS), 1)

    probs = torch.full((len(experts), len(LAYERS), EXPERTS), 0.25)
    mask = torch.ones(len(experts), dtype=torch.bool)
    mask[-1] = False
    routing = RoutingBatch(
        layers=LAYERS,
        experts=per_layer(experts),
        native_experts=per_layer(experts),
        logits=probs.log(),
        probs=probs,
        mask=mask,
        recorded_experts=None if recorded is None else per_layer(recorded),
        recorded_top_probs=None,
    )
    made = torch.tensor([0] * len(experts) if versions is None else versions)
    return MicroBatchOutput(samples=[], tokens=SimpleNamespace(version_made=made, policy_version=5), routing=routing)


def run_update(
    monitor: RouterMonitor, trainer: object, module: Module, update: int, outputs: list[MicroBatchOutput]
) -> dict[str, float]:
    module.row = {}
    for output in outputs:
        monitor.on_micro_batch_end(trainer, module, output)
    module.update = update + 1
    monitor.on_train_batch_end(trainer, module, None, SimpleNamespace(update=update), update)
    return module.row


def test_metrics_cover_one_update_and_all_its_micro_batches() -> None:
    monitor, module, trainer = RouterMonitor(), Module(), make_trainer()
    assert isinstance(monitor, MicroBatchObserver)
    run_update(monitor, trainer, module, 0, [micro_batch([3, 3, 3])])  # must leave no trace in the next
    row = run_update(monitor, trainer, module, 1, [micro_batch([0, 0, 1], [0, 2, 1]), micro_batch([2, 1], [2, 1])])
    assert row["router/load_max_violation"] == pytest.approx(2 / 3 * 4 - 1)  # [2, 0, 1, 0] of 3 tokens
    assert row["router/dead_experts"] == 0.5
    assert row["router/entropy"] == pytest.approx(1)
    assert row["router/changed_sets"] == row["router/changed_tokens"] == pytest.approx(1 / 3)
    assert row["router/overlap"] == pytest.approx(2 / 3)
    load = {"max_violation", "min_violation", "mean_violation", "cv", "entropy", "balance_loss"}
    router = {"dead_experts", "entropy", "confidence", "margin", "z_loss"}
    names = {f"load_{name}" for name in load} | router | {"changed_sets", "overlap"}
    pooled = {f"router/{name}" for name in names} | {"router/changed_tokens"}
    layers = {f"router/{name}/layer_{layer}" for name in names for layer in ("01", "03")}
    assert row.keys() == pooled | layers  # no divergence: no probabilities were recorded


def test_engine_drift_is_that_of_tokens_written_by_the_present_weights() -> None:
    outputs = [micro_batch([0, 0, 1, 2, 3], [0, 2, 1, 1, 1], versions=[4, 5, 5, 4, 5])]
    row = run_update(RouterMonitor(), make_trainer(), Module(), 0, outputs)
    assert row["router/changed_sets"] == 2 / 4
    assert row["router/engine_changed_sets"] == row["router/engine_changed_sets/layer_03"] == 1 / 2
    assert row["router/engine_changed_tokens"] == row["router/engine_overlap"] == 1 / 2
    stale = run_update(RouterMonitor(), make_trainer(), Module(), 0, [micro_batch([0, 0], [0, 2])])
    assert "router/changed_sets" in stale
    assert not [name for name in stale if "engine" in name]


def test_ranks_are_added_before_ratios() -> None:
    outputs = [micro_batch([0, 0, 1], [0, 2, 1])]
    alone = run_update(RouterMonitor(), make_trainer(), Module(), 0, outputs)
    assert run_update(RouterMonitor(), make_trainer(world_size=2), Module(), 0, outputs) == alone


def test_silent_for_dense_models(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    row = run_update(RouterMonitor(), make_trainer(logger), Module(), 0, [micro_batch(None)])
    assert row == {}
    assert not list(tmp_path.rglob("events*"))


def images(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    return EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()


def test_heat_maps_every_so_many_updates(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    monitor, trainer, module = RouterMonitor(heatmap_every=2), make_trainer(logger), Module()
    for update in range(4):
        run_update(monitor, trainer, module, update, [micro_batch([0, 1, 2], [0, 2, 2])])
    events = images(logger)
    tags = ["router/changed_sets_over_time", "router/load", "router/load_max_violation_over_time"]
    assert sorted(events.Tags()["images"]) == tags
    for tag in tags:
        assert [image.step for image in events.Images(tag)] == [1, 3]
        assert min(events.Images(tag)[0].width, events.Images(tag)[0].height) > 100
    first, second = (image.width for image in events.Images("router/changed_sets_over_time"))
    assert second > first  # three updates against one


def test_heat_map_over_time_of_what_there_is(tmp_path: Path) -> None:
    """An engine without routing: load, but no changed sets."""
    logger = TensorBoardLogger(tmp_path)
    run_update(RouterMonitor(), make_trainer(logger), Module(), 0, [micro_batch([0, 1, 2])])
    assert sorted(images(logger).Tags()["images"]) == ["router/load", "router/load_max_violation_over_time"]


def test_a_resumed_run_has_its_whole_history() -> None:
    def train(monitor: RouterMonitor, updates: range) -> RouterMonitor:
        for update in updates:
            recorded = [update % EXPERTS, 2, 3]
            run_update(monitor, make_trainer(), Module(), update, [micro_batch([0, 1, 2], recorded)])
        return monitor

    whole = train(RouterMonitor(heatmap_every=100), range(1, 6)).state_dict()
    state = train(RouterMonitor(heatmap_every=100), range(1, 3)).state_dict()
    resumed = RouterMonitor(heatmap_every=100)
    resumed.load_state_dict(json.loads(json.dumps(state)))  # plain containers
    assert train(resumed, range(3, 6)).state_dict() == whole
    changed = LayerHistory(**whole["history"]["changed_sets"]).means()
    assert np.isnan(changed[:, 0]).all()  # there was no update 0
    assert changed[:, 1:].tolist() == [[1.0, 1.0, 1.0, 0.5, 1.0]] * len(LAYERS)


def test_history_has_means_of_more_and_more_updates() -> None:
    history = LayerHistory()
    assert history.means().size == 0
    for update in range(2 * MAX_COLUMNS):
        history.add(update, [update, -1.0])
    assert history.width == 2
    assert history.means()[0].tolist() == [2 * column + 0.5 for column in range(MAX_COLUMNS)]
    assert set(history.means()[1]) == {-1.0}
    history.add(2 * MAX_COLUMNS, [0.0, -1.0])
    assert history.means().shape == (2, MAX_COLUMNS // 2 + 1)
    assert history.means()[0, :2].tolist() == [1.5, 5.5]
    history.add(100 * MAX_COLUMNS, [7.0, 8.0])  # updates without a response token leave gaps
    assert history.width == 128
    means = history.means()
    assert means.shape == (2, 100 * MAX_COLUMNS // 128 + 1)
    assert means[:, -1].tolist() == [7, 8]
    assert np.isnan(means[:, 5:-1]).all()
    assert means[0, 0] == sum(range(128)) / 128


def test_skips_the_heat_map_where_no_token_counted(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path)
    row = run_update(RouterMonitor(), make_trainer(logger), Module(), 0, [micro_batch([0])])
    assert row == {}
    assert not list(tmp_path.rglob("events*"))


def test_interval_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"router_monitor\.heatmap_every=0 "):
        RouterMonitor(heatmap_every=0)


def test_summary_writer_of_a_trainer(tmp_path: Path) -> None:
    tensorboard = TensorBoardLogger(tmp_path)
    settings = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    assert summary_writer(L.Trainer(logger=[CSVLogger(tmp_path), tensorboard], **settings)) is tensorboard.experiment
    assert summary_writer(L.Trainer(logger=False, **settings)) is None
    assert summary_writer(SimpleNamespace(is_global_zero=False, loggers=[tensorboard])) is None


def test_heat_map_colours_follow_values() -> None:
    def mean_colour(value: float) -> float:
        image = draw_heat_map(
            np.full((3, 8), value),
            ["0", "1", "2"],
            title="",
            x_label="expert",
            y_label="layer",
            value_label="load",
            value_range=(0, 2),
        )
        assert image.dtype == np.uint8
        height, width, _ = image.shape
        return image[height // 2 - 5 : height // 2 + 5, width // 3 : width // 2].mean()

    low, middle, high = mean_colour(0), mean_colour(1), mean_colour(2)
    assert low + 30 < middle < high - 20
    assert mean_colour(100) == pytest.approx(high, abs=1)


def test_heat_map_labels_many_rows_sparsely() -> None:
    values = np.random.default_rng(0).random((94, 256))
    labels = {"title": "t", "x_label": "x", "y_label": "y", "value_label": "v"}
    image = draw_heat_map(values, [str(row) for row in range(94)], value_range=(0, 1), **labels)
    assert image.shape[0] <= 1200
    assert image.shape[1] <= 1600
