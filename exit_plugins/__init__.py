"""Early exits for the models people already use: timm models, an MMDetection backbone, PEFT adapters.

Importing this package registers its models with timm. Everything that needs another host is loaded when asked for.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import timm as _timm_wing  # noqa: F401  registers the models
from ._version import __version__
from .exits import (
    AdaptiveModel,
    BudgetController,
    ExitCosts,
    ExitOutput,
    ExitPolicy,
    ExitTable,
    MultiExit,
    MultiExitLoss,
    MultiExitModule,
    anytime_curve,
    budgeted_curve,
    cap_policy,
    certify,
    collect_exits,
    evaluate_policy,
    exit_costs,
    exit_latency,
    fit_temperatures,
    policy_path,
    profile_latency,
    solve_latency,
    solve_thresholds,
)
from .timm.any_model import add_exits
from .timm.cascade import cascade_of as cascade
from .timm.video import temporal_shift

if TYPE_CHECKING:
    from .exits.serving import RequestQueue
    from .peft import (
        BottleneckConfig,
        DynConfig,
        DynPeftModel,
        RepAdapterConfig,
        get_dyn_peft_model,
    )

# Public names that need the `peft` extra; `import exit_plugins` must not pay for it.
_PEFT_NAMES = ("get_dyn_peft_model", "DynPeftModel", "DynConfig", "RepAdapterConfig", "BottleneckConfig")

__all__ = [
    "AdaptiveModel",
    "BudgetController",
    "BottleneckConfig",
    "DynConfig",
    "DynPeftModel",
    "ExitCosts",
    "ExitOutput",
    "ExitPolicy",
    "ExitTable",
    "MultiExit",
    "MultiExitLoss",
    "MultiExitModule",
    "RepAdapterConfig",
    "RequestQueue",
    "__version__",
    "add_exits",
    "anytime_curve",
    "budgeted_curve",
    "cap_policy",
    "cascade",
    "certify",
    "collect_exits",
    "evaluate_policy",
    "exit_costs",
    "exit_latency",
    "fit_temperatures",
    "get_dyn_peft_model",
    "policy_path",
    "profile_latency",
    "solve_latency",
    "solve_thresholds",
    "temporal_shift",
]


def __getattr__(name: str) -> Any:
    if name == "RequestQueue":
        return import_module(".exits.serving", __name__).RequestQueue
    if name in _PEFT_NAMES:
        try:
            return getattr(import_module(".peft", __name__), name)
        except ModuleNotFoundError as error:
            if error.name in ("peft", "transformers", "accelerate"):
                raise ImportError(
                    f"exit_plugins.{name} needs {error.name}, which is not installed: pip install 'exit-plugins[peft]'"
                ) from error
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
