"""The architecture of docs/new_architecture.md, as a newcomer would add it: what is written there is all it takes."""

import re
import sys
from importlib import util
from pathlib import Path

import pytest
import test_contract
import timm
from timm.models import _registry

from exit_plugins.timm import ARCHITECTURES

PAGE = Path(__file__).parents[2] / "docs" / "new_architecture.md"
NAME = "stairs_test"

# The rest of the contract needs compilers or processes; the page was held against all of it when it was written.
CONTRACT = [
    "train_returns_every_exit_and_eval_the_last",
    "any_sample_can_leave_at_any_exit",
    "unknown_arguments_are_refused",
    "reset_classifier_changes_every_exit_and_nothing_else",
    "without_classes_the_model_gives_pooled_features",
    "features_only_gives_the_maps_of_forward_intermediates",
    "forward_intermediates_options",
    "gradient_checkpointing_changes_no_gradient",
    "layer_decay_grows_from_the_stem_to_the_heads",
    "no_weight_decay_on_what_the_model_names_and_on_vectors",
    "device_of_the_factory_reaches_every_tensor",
]


@pytest.fixture(scope="module", autouse=True)
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("new") / "stairs.py"
    path.write_text(re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)[1])
    spec = util.spec_from_file_location("exit_plugins.timm.stairs", path)
    module = sys.modules[spec.name] = util.module_from_spec(spec)
    tables = {key: value for key, value in vars(_registry).items() if isinstance(value, dict) and key[:2] != "__"}
    before = {key: dict(value) for key, value in tables.items()}
    spec.loader.exec_module(module)
    yield
    del sys.modules[spec.name]
    for key, value in before.items():
        tables[key].clear()
        tables[key].update(value)


@pytest.mark.parametrize("part", CONTRACT)
def test_it_keeps_the_contract(part):
    getattr(test_contract, f"test_{part}")(NAME)


def test_the_package_finds_what_registers_a_model_and_nothing_else():
    registered = {module for name, module in _registry._model_to_module.items() if name in timm.list_models()}
    assert set(ARCHITECTURES) <= registered
    folder = Path(sys.modules["exit_plugins.timm"].__file__).parent
    shared = {path.stem for path in folder.glob("[a-z]*.py")} - set(ARCHITECTURES)
    assert {"train", "data", "split", "layers"} <= shared and not shared & registered - {"stairs"}
