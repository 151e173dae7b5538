"""The ground floor: what an exit is, and all that is done with exits whatever the model (torch, numpy, scipy)."""

from .adaptive import AdaptiveModel, ExitOutput
from .collecting import collect_exits
from .confidence import fit_temperatures
from .control import BudgetController, cap_policy
from .costs import ExitCosts, exit_costs, exit_latency
from .evaluation import anytime_curve, budgeted_curve, evaluate_policy
from .latency import profile_latency, solve_latency
from .losses import MultiExitLoss
from .policy import ExitPolicy
from .protocol import MultiExit, MultiExitModule
from .risk import certify
from .table import ExitTable
from .thresholds import policy_path, solve_thresholds

__all__ = [
    "AdaptiveModel",
    "BudgetController",
    "ExitCosts",
    "ExitOutput",
    "ExitPolicy",
    "ExitTable",
    "MultiExit",
    "MultiExitLoss",
    "MultiExitModule",
    "anytime_curve",
    "budgeted_curve",
    "cap_policy",
    "certify",
    "collect_exits",
    "exit_costs",
    "exit_latency",
    "evaluate_policy",
    "fit_temperatures",
    "policy_path",
    "profile_latency",
    "solve_latency",
    "solve_thresholds",
]
