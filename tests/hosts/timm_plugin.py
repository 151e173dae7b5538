"""pytest plugin: timm's test_models.py runs over this package's models alone, with every kind of test it has.

timm's file asks ``timm.list_models`` at import which models each kind of test is for. Here the answer is ours: all of
them, except that its two tests of the configuration are for models whose features are one map (the standard one) or
anything else (the other), and that nothing needs downloaded weights. Tests that name a model of timm's are deselected.
"""

import fnmatch
from collections import Counter
from functools import cache

import pytest
import timm
import torch

import exit_plugins  # noqa: F401  registers the models
from exit_plugins.timm import list_models as registered_models

KINDS: dict[str, Counter] = {}
MODELS: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--exit-models", default="*_test", help="globs between commas: the models to run over")


def pytest_configure(config: pytest.Config) -> None:
    globs = config.getoption("--exit-models").split(",")
    MODELS[:] = [name for name in registered_models(clips=False) if any(fnmatch.fnmatch(name, glob) for glob in globs)]
    if not MODELS:
        raise pytest.UsageError(f"no model matches {globs}; there are {', '.join(registered_models())}")
    config.addinivalue_line("markers", "timeout(seconds): of pytest-timeout, which is not needed here")
    timm.list_models = list_models


def list_models(filter="", *, pretrained=False, include_tags=None, **conditions) -> list[str]:
    """Stands for ``timm.list_models`` while test_models.py is imported."""
    if pretrained:
        return []
    if not include_tags:
        # A single pattern asks for a family of timm's by name.
        return [] if isinstance(filter, str) and filter else list(MODELS)
    return [name for name in MODELS if has_feature_map(name) != bool(filter)]


@cache
def has_feature_map(name: str) -> bool:
    """Whether the model's ``forward_features`` returns one (B, C, H, W) map."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, device="meta").eval()
        features = model.forward_features(torch.empty(1, *model.default_cfg["input_size"]))
    return isinstance(features, torch.Tensor) and features.ndim == 4


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ours = [
        item for item in items if getattr(item, "callspec", None) and item.callspec.params.get("model_name") in MODELS
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in set(ours)])
    items[:] = ours


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        kind = report.nodeid.rpartition("::")[2].partition("[")[0]
        KINDS.setdefault(kind, Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"timm {timm.__version__} over {len(MODELS)} models of exit_plugins")
    for kind, outcomes in sorted(KINDS.items()):
        terminalreporter.line(f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    total = sum(KINDS.values(), Counter())
    counts = ", ".join(f"{n} {outcome}" for outcome, n in total.items())
    terminalreporter.line(f"in all, {len(KINDS)} kinds of test: {counts or 'none'}")
