"""The TensorBoard page of a run: which metrics share a chart, and the configuration beside them."""

from __future__ import annotations

from typing import Any

import lightning as L

from vespo_lightning.callbacks.tensorboard import summary_writer

Chart = tuple[str, list[str]]

#: Group -> chart -> kind and tags. Multiline charts show every scalar whose name a regular expression matches
#: from its beginning (hence the ``$``); margin charts take exactly value, lower and upper end.
LAYOUT: dict[str, dict[str, Chart]] = {
    "Reward": {
        "reward": ("Multiline", [r"reward/(rollout_)?mean$"]),
        "held-out accuracy": ("Margin", ["eval/accuracy", "eval/ci_low", "eval/ci_high"]),
        "held-out pass@k": ("Multiline", ["eval/accuracy$", r"eval/pass_at_\d+$"]),
        "groups with equal rewards": ("Multiline", ["reward/uniform_group_share$"]),
        "dynamic sampling": ("Multiline", [r"reward/(dropped_groups|refill_rounds|refill_shortfall)$"]),
        "response length": ("Multiline", [r"(reward|eval)/response_length$"]),
        "truncated share": ("Multiline", [r"(reward|eval)/truncated_share$"]),
        "responses that could not be judged": ("Multiline", ["reward/errors$"]),
    },
    "Importance": {
        "effective sample size": ("Multiline", [r"importance/(token_|coefficient_)?ess_ratio$"]),
        "log W, 10th to 90th percentile": (
            "Margin",
            ["importance/log_weight_p50", "importance/log_weight_p10", "importance/log_weight_p90"],
        ),
        "log W, tails": ("Multiline", [r"importance/log_weight_p(01|99)$"]),
        "log W, spread": ("Multiline", ["importance/log_weight_std$"]),
        "log W by quartile of length": ("Multiline", ["importance/log_weight_length_q[1-4]$"]),
        "log W against length": ("Multiline", [r"importance/log_weight_length_(slope|bias)$"]),
        "starved good responses": ("Multiline", [r"importance/starved_positive_(share|mass)$"]),
        "largest token ratio": ("Multiline", ["importance/token_ratio_max$"]),
    },
    "Objective": {
        "coefficient by sign of the advantage": (
            "Multiline",
            [r"objective/coefficient_(positive|negative)_mean$"],
        ),
        "shares clipped, clamped or suppressed": ("Multiline", [r"objective/\w+_share$"]),
        "second moment and its bound": (
            "Multiline",
            [r"objective/(second_moment|variance_bound)_(positive|negative)$"],
        ),
        "corrections": ("Multiline", [r"correction/\w+_share$"]),
        "divergence from the reference policy": ("Multiline", [r"kl/\w+$"]),
        "loss": ("Multiline", ["train/loss$"]),
        "gradient norm": ("Multiline", ["train/grad_norm$"]),
        "entropy": ("Multiline", ["train/entropy$"]),
        "learning rate": ("Multiline", ["train/learning_rate$"]),
        "learning-rate factor": ("Multiline", [r"train/ess_(lr_factor|reference)$"]),
        "skipped updates": ("Multiline", ["train/skipped_updates$"]),
    },
    "Shadow": {
        "cosine with the run's update": ("Multiline", [r"shadow/\w+/cosine$"]),
        "mean coefficient, A > 0": ("Multiline", [r"shadow/\w+/coefficient_positive_mean$"]),
        "mean coefficient, A < 0": ("Multiline", [r"shadow/\w+/coefficient_negative_mean$"]),
        "effective sample size of coefficients": ("Multiline", [r"shadow/\w+/ess_ratio$"]),
        "share of zero coefficients": ("Multiline", [r"shadow/\w+/zero_share$"]),
        "mass below log W = -1": ("Multiline", [r"shadow/\w+/mass_below_m1$"]),
    },
    "Mismatch": {
        "k3 KL": ("Multiline", ["mismatch/k3_kl$"]),
        "log-prob difference": ("Multiline", [r"mismatch/log_prob_diff_(mean|max)$"]),
        "sequence log-ratio": ("Multiline", [r"mismatch/sequence_log_ratio_(mean|std)$"]),
        "token log-ratio": ("Multiline", [r"mismatch/token_log_ratio_(mean|std)$"]),
        "usable response length": ("Multiline", [r"mismatch/usable_length_(positive|negative)$"]),
        "perplexity gap": ("Multiline", ["mismatch/perplexity_gap$"]),
        "canary": ("Multiline", [r"mismatch/canary\w*$"]),
    },
    "Staleness": {
        "lag in policy versions": ("Multiline", [r"staleness/lag\w*$"]),
        "pass over the rollout": ("Multiline", ["staleness/pass$"]),
        "policy version": ("Multiline", ["train/policy_version$"]),
    },
    "Router": {
        "load, max violation": ("Multiline", [r"router/load_max_violation(/layer_\d+)?$"]),
        "load entropy": ("Multiline", [r"router/load_entropy(/layer_\d+)?$"]),
        "router entropy": ("Multiline", [r"router/entropy(/layer_\d+)?$"]),
        "dead experts": ("Multiline", [r"router/dead_experts(/layer_\d+)?$"]),
        "log-ratio per token: routing or weights": ("Multiline", [r"router/log_ratio(_routing|_weights)?_abs$"]),
        "log-ratio per response: routing or weights": (
            "Multiline",
            [r"router/sequence_log_ratio(_routing|_weights)?_abs$"],
        ),
        "share of variance due to routing": ("Multiline", [r"router/(sequence_)?log_ratio_routing_share$"]),
        "changed expert sets: engine, since generation, per update": (
            "Multiline",
            [r"router/(engine_|update_)?changed_sets$"],
        ),
        "router divergence: engine, since generation, per update": (
            "Multiline",
            [r"router/(engine_|update_)?js_divergence$"],
        ),
        "changed sets by layer": ("Multiline", [r"router/changed_sets(/layer_\d+)?$"]),
        "router-shift ratio": ("Multiline", [r"router/shift_ratio$"]),
        "load, min and mean violation": ("Multiline", [r"router/load_(min|mean)_violation$"]),
        "load-balance loss": ("Multiline", [r"router/load_balance_loss(/layer_\d+)?$"]),
        "confidence and margin": ("Multiline", [r"router/(confidence|margin)$"]),
        "z-loss": ("Multiline", [r"router/z_loss(/layer_\d+)?$"]),
    },
    "Performance": {
        "samples per second": ("Multiline", ["performance/samples_per_second$"]),
        "tokens per second": ("Multiline", ["performance/tokens_per_second$"]),
        "seconds by phase": ("Multiline", [r"performance/\w+_seconds$"]),
    },
}


class Dashboard(L.Callback):
    """Writes the chart layout and the resolved configuration into TensorBoard, once in a run's life.

    Args:
        resolved_config: the configuration as YAML, every interpolation resolved; empty writes none.
    """

    def __init__(self, resolved_config: str = "") -> None:
        self.resolved_config = resolved_config

    def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
        writer = summary_writer(trainer)
        if writer is None or module.update > 0:  # a resumed run has both in the event files that it goes on with
            return
        writer.add_custom_scalars({group: dict(charts) for group, charts in LAYOUT.items()})
        if self.resolved_config:
            writer.add_text("config", f"```yaml\n{self.resolved_config}\n```", 0)
