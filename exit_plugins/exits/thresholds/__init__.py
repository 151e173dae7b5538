"""Solvers: thresholds that spend a budget as well as possible, or reach an accuracy as cheaply as possible."""

from ..deprecation import moved
from .methods import METHODS
from .msdnet import SWEEPS, msdnet_shares, msdnet_thresholds, sweep_shares
from .path import policy_path
from .solve import solve_thresholds

__all__ = [
    "METHODS",
    "SWEEPS",
    "msdnet_shares",
    "msdnet_thresholds",
    "policy_path",
    "solve_thresholds",
    "sweep_shares",
]

__getattr__ = moved(
    __name__, {name: f"exit_plugins.exits.costs.{name}" for name in ("check_costs", "exit_counts", "mean_cost")}
)
