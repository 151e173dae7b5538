"""The PEFT wing: RepAdapter and bottleneck adapters as PEFT methods, and early exits over any adapter.

Importing it makes PEFT know the methods REPADAPTER and BOTTLENECK.
"""

from .bottleneck import BottleneckConfig, BottleneckModel
from .dyn import DynConfig, DynPeftModel, get_dyn_peft_model
from .exit_model import DynOutput
from .multi_exit import MultiExitBackbone
from .repadapter import RepAdapterConfig, RepAdapterModel
from .schedule import GradientMask, exit_weights
from .trainer import DynTrainerCallback, compute_exit_metrics

__all__ = [
    "BottleneckConfig",
    "BottleneckModel",
    "DynConfig",
    "DynOutput",
    "DynPeftModel",
    "DynTrainerCallback",
    "GradientMask",
    "MultiExitBackbone",
    "RepAdapterConfig",
    "RepAdapterModel",
    "compute_exit_metrics",
    "exit_weights",
    "get_dyn_peft_model",
]
