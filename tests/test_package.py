"""What importing the package costs and promises."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import exit_plugins

ROOT = Path(__file__).parent.parent


def loaded_by(statement: str) -> set[str]:
    script = f"import sys; {statement}; print(' '.join(sys.modules))"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    return set(out.stdout.split())


@pytest.mark.slow
def test_importing_loads_no_other_host_and_no_plotting():
    loaded = loaded_by("import exit_plugins")
    heavy = {"peft", "transformers", "accelerate", "mmdet", "mmengine", "mmcv", "matplotlib", "sklearn", "onnx"}
    assert not loaded & (heavy | {"onnxruntime", "openvino", "pandas"})
    assert "timm" in loaded


def test_every_public_name_is_there_and_documented():
    for name in exit_plugins.__all__:
        if name in exit_plugins._PEFT_NAMES:
            pytest.importorskip("peft.utils")  # tests/peft alone would count as a package of that name
        value = getattr(exit_plugins, name)
        assert name.startswith("__") or value.__doc__, f"{name} has no docstring"
    assert set(dir(exit_plugins)) == set(exit_plugins.__all__)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        exit_plugins.nothing  # noqa: B018


@pytest.mark.slow
def test_rooms_import_only_rooms_below_them():
    importlinter = pytest.importorskip("importlinter.cli")
    assert importlinter.lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True) == 0


@pytest.mark.slow
@pytest.mark.parametrize("category", [DeprecationWarning, FutureWarning, PendingDeprecationWarning])
def test_what_a_host_deprecates_is_an_error_where_this_package_calls_it(category):
    ours = {"__name__": "exit_plugins.timm.somewhere", "warnings": warnings, "category": category}
    with pytest.raises(category, match="old"):
        exec("warnings.warn('old', category)", ours)


@pytest.mark.slow
def test_versions_agree():
    out = subprocess.run(
        [sys.executable, "-m", "exit_plugins", "--version"], capture_output=True, text=True, check=True, env=os.environ
    )
    assert out.stdout.strip() == f"exit-plugins {exit_plugins.__version__}"
