from __future__ import annotations

import dataclasses
import warnings
from types import SimpleNamespace

import pytest
import torch
from pieces import fit, make_mini_batch, make_samples, tiny_policy

from vespo_lightning.callbacks.weight_alarms import STREAK, WeightAlarms
from vespo_lightning.diagnostics.length_drift import length_drift
from vespo_lightning.objectives.base import Objective, TokenBatch
from vespo_lightning.objectives.grpo import Grpo
from vespo_lightning.objectives.gspo import Gspo
from vespo_lightning.objectives.vespo import Vespo
from vespo_lightning.training.module import PolicyModule

LONGEST = 100


def tokens(log_weights: list[float], lengths: list[int], advantages: list[float], lag: int = 0) -> TokenBatch:
    """log W of each response, spread evenly over its tokens."""
    length = torch.tensor(lengths)
    ratio = (torch.tensor(log_weights, dtype=torch.float64) / length).repeat_interleave(length)
    return TokenBatch(
        log_prob=ratio - 1,
        behaviour_log_prob=-torch.ones(len(ratio), dtype=torch.float64),
        sequence_index=torch.arange(len(lengths)).repeat_interleave(length),
        loss_mask=torch.ones(len(ratio), dtype=torch.bool),
        advantage=torch.tensor(advantages, dtype=torch.float64),
        group=torch.zeros(len(lengths), dtype=torch.int64),
        version_made=torch.full((len(ratio),), 5 - lag, dtype=torch.int32),
        policy_version=5,
    )


def run(
    callback: WeightAlarms, batches: list[TokenBatch], objective: Objective | None = None, longest: int | None = LONGEST
) -> tuple[list[dict[str, float]], list[str]]:
    """Rows and warnings of updates on these batches."""
    objective = objective or Vespo()
    rows = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches:
            row: dict[str, float] = {}
            module = SimpleNamespace(
                last_update=SimpleNamespace(tokens=batch, coefficient=objective.coefficient(batch)),
                record=row.update,
                objective=objective,
                loss=SimpleNamespace(max_response_tokens=longest),
            )
            callback.on_train_batch_end(None, module, None, None, 0)
            rows.append(row)
    return rows, [str(warning.message) for warning in caught]


LENGTHS = [4, 8, 12, 16]
FINE = tokens([0.01, -0.02, 0.01, 0.0], LENGTHS, [1.0, -1.0, 1.0, -1.0])
#: -0.012 nats per token: 1.2 over the longest response
DRIFT = tokens([-0.012 * n for n in LENGTHS], LENGTHS, [1.0, -1.0, 1.0, -1.0])


def test_records_figures_and_says_nothing_when_all_is_well():
    (row,), said = run(WeightAlarms(), [FINE])
    assert said == []
    assert row["importance/log_weight_length_slope"] == pytest.approx(0.0, abs=1e-3)
    assert row["importance/starved_positive_share"] == row["importance/starved_positive_mass"] == 0
    assert row["mismatch/usable_length_positive"] > LONGEST
    assert {f"importance/log_weight_length_q{q}" for q in (1, 2, 3, 4)} <= row.keys()


def test_drift_with_length_is_said_once_with_number_and_remedy():
    rows, said = run(WeightAlarms(), [FINE, DRIFT, DRIFT, FINE, DRIFT])
    assert rows[1]["importance/log_weight_length_bias"] == pytest.approx(-1.2)
    length = [sentence for sentence in said if "by their length" in sentence]
    assert len(length) == 1
    assert "-0.012 nats per token, -1.2 nats over rollout.max_new_tokens=100" in length[0]
    assert "denominator=recomputed" in length[0]


def test_short_usable_length_is_said_once():
    """phi of a bad response is 0.5 at log W = -0.489: at -0.012 nats per token that is 40 tokens."""
    rows, said = run(WeightAlarms(), [DRIFT] * 3)
    assert rows[0]["mismatch/usable_length_negative"] == 40
    usable = [sentence for sentence in said if "beyond 40 tokens" in sentence]
    assert len(usable) == 1 and "-0.012 nats per token" in usable[0] and "=100 allows" in usable[0]
    assert len(said) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"version_made": torch.full_like(DRIFT.version_made, 4)},  # lag, not mismatch
        {"denominator": "recomputed", "recomputed_log_prob": DRIFT.log_prob + 0.012},  # W is not against the engine
    ],
)
def test_drift_from_other_causes_is_no_mismatch(changes):
    assert run(WeightAlarms(), [dataclasses.replace(DRIFT, **changes)])[1] == []


def test_an_uncertain_slope_is_no_alarm():
    """-0.02 nats per token, 2 over the longest response, but three responses scatter about it by more."""
    noisy = tokens([-0.05, -0.3, -0.05, -0.4], LENGTHS, [1.0, -1.0, 1.0, -1.0])
    (row,), said = run(WeightAlarms(), [noisy])
    assert abs(row["importance/log_weight_length_bias"]) > 1
    assert not any("by their length" in sentence for sentence in said)


def test_without_a_longest_response_there_is_nothing_to_compare_with():
    (row,), said = run(WeightAlarms(), [DRIFT], longest=None)
    assert said == [] and "importance/log_weight_length_bias" not in row


#: one of twelve equally long responses has nearly all the weight: ESS ratio about 1 / 12
FEW = tokens([10.0] + [0.0] * 11, [3] * 12, [1.0, -1.0] * 6, lag=1)


def test_low_sample_size_must_last():
    assert run(WeightAlarms(), [FEW] * (STREAK - 1))[1] == []
    assert run(WeightAlarms(), [*[FEW] * (STREAK - 1), FINE, *[FEW] * (STREAK - 1)])[1] == []
    (sentence,) = run(WeightAlarms(), [FEW] * (2 * STREAK))[1]
    assert "8.3% in the last" in sentence and f"{STREAK} updates in a row" in sentence and "staleness.n" in sentence


def far(sign: float, share: float = 0.75) -> TokenBatch:
    """That share of the responses of one sign is suppressed; the other sign has coefficient 1."""
    count = round(4 * share)
    log_weights = [-6.0] * count + [0.0] * (4 - count)
    return tokens([*log_weights, 0.0, 0.0], [3] * 6, [sign] * 4 + [-sign] * 2, lag=1)


@pytest.mark.parametrize(("sign", "name"), [(1.0, "positive"), (-1.0, "negative")])
def test_suppressed_responses_must_last(sign, name):
    assert run(WeightAlarms(), [far(sign)] * (STREAK - 1))[1] == []
    assert run(WeightAlarms(), [far(sign, 0.5)] * STREAK)[1] == []
    (sentence,) = run(WeightAlarms(), [far(sign)] * (STREAK + 2))[1]
    assert f"with {name} advantage" in sentence and "75% in the last" in sentence and "below 0.1" in sentence


def test_an_update_without_such_responses_neither_prolongs_nor_ends_a_streak():
    without = tokens([0.0, 0.0], [3, 3], [-1.0, -1.0], lag=1)
    some = [far(1.0)] * (STREAK - 1)
    assert run(WeightAlarms(), [*some, without])[1] == []
    assert len(run(WeightAlarms(), [*some, without, far(1.0)])[1]) == 1


def test_methods_without_whole_weights_warn_of_suppressed_coefficients_only():
    for objective in (Grpo(), Gspo()):
        rows, said = run(WeightAlarms(), [DRIFT] * STREAK + [FEW] * STREAK, objective)
        assert "importance/log_weight_length_slope" in rows[0]
        assert not any("sample size" in s or "by their length" in s or "allows longer" in s for s in said)
    assert "mismatch/usable_length_positive" not in run(WeightAlarms(), [DRIFT], Grpo())[0][0]
    clipped = tokens([1.0] * 4, [1] * 4, [1.0] * 4, lag=1)
    (sentence,) = run(WeightAlarms(), [clipped] * STREAK, Grpo())[1]
    assert "100% in the last" in sentence


def test_warnings_can_be_switched_off():
    rows, said = run(WeightAlarms(warn=False), [DRIFT] * STREAK + [far(1.0)] * STREAK)
    assert said == [] and "importance/log_weight_length_bias" in rows[0]


def test_nothing_before_the_first_update():
    WeightAlarms().on_train_batch_end(None, SimpleNamespace(last_update=None), None, None, 0)


def test_in_a_real_update():
    """Samples of another policy than the module's: noise of 0.1 per token on up to 12 tokens."""
    model = tiny_policy()
    module = PolicyModule(model, Vespo(), lr=0.0, max_response_tokens=12)
    fit(module, [make_mini_batch(make_samples(model))], [WeightAlarms()])
    row, update = module.take_record(), module.last_update
    assert row["importance/log_weight_length_slope"] == length_drift(update.tokens).slope
    assert row["importance/log_weight_length_bias"] == 12 * row["importance/log_weight_length_slope"]
    assert row["mismatch/token_log_ratio_std"] == pytest.approx(0.1, rel=0.4)
    assert row["objective/second_moment_positive"] < row["objective/variance_bound_positive"]
