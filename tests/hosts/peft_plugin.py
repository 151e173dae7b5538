"""PEFT's own tests run over RepAdapter and Bottleneck: their lists of cases are replaced by ours before collection.

The files are PEFT's, unchanged, from the source distribution of the installed version. Optional packages that they
import for tests of other things are stood in for by empty ones where they are missing.
"""

import importlib
import os
import sys
import types
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import peft
import pytest

from exit_plugins.peft import BottleneckConfig, RepAdapterConfig

os.environ.setdefault("HF_HUB_OFFLINE", "1")
PACKAGE = "peft_own_tests"
OUTCOMES: dict[str, Counter] = {}

# (name, model of PEFT's test file, configuration, arguments). Dropout is 0, as in PEFT's own cases: outputs in training
# mode are compared. Bottleneck starts as an identity where a test expects that of fresh adapters.
REP = dict(dropout=0.0, r=4)
BOTTLE = dict(dropout=0.0, r=4, init="identity")
TEST_CASES = [
    ("RepAdapter 1", "MLP", RepAdapterConfig, {"target_modules": "lin0", **REP}),
    ("RepAdapter 2", "MLP", RepAdapterConfig, {"target_modules": ["lin0"], **REP, "scale": 0.5}),
    ("RepAdapter 3 groups", "MLP", RepAdapterConfig, {"target_modules": ["lin1"], **REP, "groups": 4}),
    ("RepAdapter 4 both", "MLP", RepAdapterConfig, {"target_modules": ["lin0", "lin1"], **REP}),
    (
        "RepAdapter 5 saved module",
        "MLP",
        RepAdapterConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **REP},
    ),
    ("RepAdapter 6 convolution", "Conv2d1x1", RepAdapterConfig, {"target_modules": ["conv2d"], **REP, "groups": 1}),
    ("Bottleneck 1", "MLP", BottleneckConfig, {"target_modules": "lin0", **BOTTLE}),
    ("Bottleneck 2 both", "MLP", BottleneckConfig, {"target_modules": ["lin0", "lin1"], **BOTTLE}),
    (
        "Bottleneck 3 saved module",
        "MLP",
        BottleneckConfig,
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **BOTTLE},
    ),
    ("Bottleneck 4 convolution", "Conv2d1x1", BottleneckConfig, {"target_modules": ["conv2d"], **BOTTLE}),
]
MULTIPLE_CASES = [
    (
        f"RepAdapter {kind}",
        "repadapter",
        RepAdapterConfig,
        {"target_modules": ["lin0"], "init_weights": False, **REP},
        {"target_modules": [second], "init_weights": False, **REP},
    )
    for kind, second in (("Same", "lin0"), ("Different", "lin1"))
]
CONFIGS = [(RepAdapterConfig, {}), (BottleneckConfig, {})]

# What is left out, and why: tests that read an adapter or a model from the hub, and for Bottleneck, which cannot be
# merged, those that merge: every one that says so in its name, and those named here. Tests whose cases name other
# methods or models are never selected.
NEEDS_DOWNLOAD = ("test_from_pretrained", "test_from_pretrained_cache_dir", "test_save_pretrained_with_runtime_config")
MERGES = (
    "test_forward_float16",
    "test_forward_float16_no_autocast",
    "test_forward_bfloat16",
    "test_forward_bfloat16_no_autocast",
)
OTHER_FILES = (
    "test_decoder_models, test_encoder_decoder_models, test_feature_extraction_models, test_seq_classifier, "
    "test_token_classification_qa, test_vision_models: all of their models are downloaded"
)
MODULES = {
    "test_custom_models": {
        "TEST_CASES": TEST_CASES,
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": MULTIPLE_CASES,
        "ALL_PEFT_CONFIG_CLASSES": [RepAdapterConfig, BottleneckConfig],
    },
    "test_config": {"ALL_CONFIG_CLASSES": CONFIGS, "LAYER_INDEXING_CONFIG_CLASSES": CONFIGS},
}
OURS = (RepAdapterConfig, BottleneckConfig)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--peft-tests", required=True, help="folder with PEFT's own tests")
    parser.addoption("--peft-few", action="store_true", help="one case of each method and model, not all")


def pytest_configure(config: pytest.Config) -> None:
    for name, wanted in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
        if importlib.util.find_spec(name) is None:
            stand_in = types.ModuleType(name)
            setattr(stand_in, wanted, type(wanted, (), {}))
            sys.modules[name] = stand_in
    if config.getoption("--peft-few"):
        TEST_CASES[:] = [case for case in TEST_CASES if " 1" in case[0] or "convolution" in case[0]]
    folder = Path(config.getoption("--peft-tests"))
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[PACKAGE] = package
    for name, lists in MODULES.items():
        module = importlib.import_module(f"{PACKAGE}.{name}")
        for attribute, cases in lists.items():
            replace_cases(module, getattr(module, attribute), cases)


def replace_cases(module: types.ModuleType, found: Sequence, cases: list) -> None:
    """Put ``cases`` in the place of ``found`` in every parametrised test of ``module``."""
    count = 0
    holders = [module, *(value for value in vars(module).values() if isinstance(value, type))]
    for test in {id(f): f for holder in holders for f in vars(holder).values() if callable(f)}.values():
        marks = getattr(test, "pytestmark", None)
        for index, mark in enumerate(marks if isinstance(marks, list) else ()):
            if mark.name == "parametrize" and mark.args[1:2] and mark.args[1] is found:
                marks[index] = pytest.mark.parametrize(mark.args[0], cases, *mark.args[2:], **mark.kwargs).mark
                count += 1
    if not count:
        raise pytest.UsageError(f"no test in PEFT {peft.__version__}'s {module.__name__} has the cases looked for")


def left_out(item: pytest.Item) -> bool:
    """Whether the case is not one of ours, or cannot run over it."""
    parameters = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    name = item.name.partition("[")[0]
    if not any(value in OURS for value in parameters if isinstance(value, type)):
        return True
    merging = name in MERGES or "merg" in name
    return name in NEEDS_DOWNLOAD or (BottleneckConfig in parameters and merging)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    out = [item for item in items if left_out(item)]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in set(out)]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        kind = report.nodeid.rpartition("::")[2].partition("[")[0]
        OUTCOMES.setdefault(kind, Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section(f"PEFT {peft.__version__} over RepAdapter and Bottleneck")
    for kind, outcomes in sorted(OUTCOMES.items()):
        terminalreporter.line(f"{kind}: " + ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items()))
    terminalreporter.line(f"left out because they download: {', '.join(NEEDS_DOWNLOAD)}; {OTHER_FILES}")
    terminalreporter.line(f"left out for Bottleneck because they merge: test_*merg*, {', '.join(MERGES)}")
    total = sum(OUTCOMES.values(), Counter())
    counts = ", ".join(f"{n} {outcome}" for outcome, n in total.items())
    terminalreporter.line(f"in all, {len(OUTCOMES)} kinds of test: {counts or 'none'}")
