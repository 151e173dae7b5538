"""The ground floor: what an exit is, and all that is done with exits whatever the model (torch, numpy, scipy)."""

from .adaptive import AdaptiveModel, ExitOutput
from .confidence import confidence, fit_temperatures
from .costs import ExitCosts, exit_costs, exit_latency
from .losses import MultiExitLoss
from .policy import ExitPolicy
from .protocol import MultiExit
from .table import ExitTable, collect_exits

__all__ = [
    "AdaptiveModel",
    "ExitCosts",
    "ExitOutput",
    "ExitPolicy",
    "ExitTable",
    "MultiExit",
    "MultiExitLoss",
    "collect_exits",
    "confidence",
    "exit_costs",
    "exit_latency",
    "fit_temperatures",
]
