"""Parts of a module that do not go together, refused before anything expensive starts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vespo_lightning.errors import UserError

if TYPE_CHECKING:
    from vespo_lightning.training.module import PolicyModule


def check_combinations(module: PolicyModule) -> None:
    """Raises UserError for what would only fail, or be wrong, after the first rollout."""
    loss = module.loss
    if "router_shift" in loss.needs and not module.is_moe:
        raise UserError(
            f"correction=router_shift needs a Mixture-of-Experts policy, and {type(module.model).__name__} has no "
            "routers; take router_shift out of correction"
        )
    if loss.router_losses.needs_graph and not module.is_moe:
        raise UserError(
            f"router_loss.load_balance={loss.router_losses.load_balance:g} and router_loss.z="
            f"{loss.router_losses.z:g} act on routers, and {type(module.model).__name__} has none; set both to 0"
        )
    if module.replayed != "none" and not module.is_moe:
        raise UserError(
            f"routing={module.routing} replays the choice of routers, and {type(module.model).__name__} has none; set "
            "routing=native"
        )
    if module.gate_weights and module.routing != "r3":
        raise UserError(f"routing.gate_weights=recorded does nothing with routing={module.routing}; use routing=r3")
    if module.baseline is not None and loss.objective.depends_on_advantage:
        raise UserError(
            f"advantage=min_variance needs gradients that do not depend on the advantage, and the coefficient of "
            f"{type(loss.objective).__name__} does; use another objective or advantage"
        )
