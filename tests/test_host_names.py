"""What this package takes of its hosts beyond their public face stands in one list per wing, and the lists hold."""

import ast
import re
from importlib import import_module, metadata
from pathlib import Path

import pytest

import exit_plugins
from exit_plugins._hosts import check_names, missing_name
from exit_plugins.timm._scripts import in_place

PACKAGE = Path(exit_plugins.__file__).parent
HOSTS = ("timm", "peft", "transformers", "accelerate", "mmengine", "mmcv", "mmdet")
LISTS = [
    ("timm", "timm"),
    ("peft", "peft"),
    ("mmdet", "onedl-mmengine"),
]
# Modules of hosts that are undocumented, whatever they are called.
INNER = ("peft.tuners.", "peft.utils.constants", "peft.utils.error", "peft.utils.other", "mmengine.runner.checkpoint")


@pytest.mark.parametrize("wing, distribution", LISTS)
def test_the_installed_host_has_every_name_with_the_parameters_it_is_given(wing, distribution):
    names = import_module(f"exit_plugins.{wing}._host").RELIED_ON
    assert names and missing_name(names) is None
    for name in names:
        assert name.split(".")[0] in HOSTS


@pytest.mark.parametrize("wing, distribution", LISTS)
def test_a_name_or_parameter_that_is_gone_is_named_with_the_hosts_version(wing, distribution):
    names = import_module(f"exit_plugins.{wing}._host").RELIED_ON
    called = next(name for name, parameters in names.items() if parameters)
    host, version = called.split(".")[0], re.escape(metadata.version(distribution))
    with pytest.raises(ImportError, match=rf"{host}\.nothing, which {host} {version} lacks.*pip install"):
        check_names(host, distribution, f"{distribution}==0", {f"{host}.nothing": ()})
    with pytest.raises(ImportError, match=rf"{called}\(nothing=...\), which {host} {version} lacks"):
        check_names(host, distribution, f"{distribution}==0", {called: ("nothing",)})


def private_imports(path: Path) -> list[str]:
    """Names of hosts that a module imports, with an underscore in front of a part or from an undocumented module."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [
        name
        for name in found
        if name.split(".")[0] in HOSTS
        and (name.startswith(INNER) or any(part.startswith("_") for part in name.split(".")[1:]))
    ]


def test_private_names_of_hosts_are_imported_in_one_place_per_wing():
    elsewhere = {
        str(path.relative_to(PACKAGE)): found
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.name != "_host.py" and (found := private_imports(path))
    }
    assert not elsewhere


def test_what_is_imported_in_that_place_is_in_its_list():
    for path in PACKAGE.glob("*/_host.py"):
        listed = import_module(f"exit_plugins.{path.parent.name}._host").RELIED_ON
        for name in private_imports(path):
            assert any(entry == name or entry.startswith(f"{name}.") for entry in listed), name


def test_a_swap_that_is_not_listed_is_refused():
    with (
        pytest.raises(ValueError, match=r"timm\.data\.create_dataset is to be swapped .*SWAPPED"),
        in_place({"timm.data": {"create_dataset": None}}),
    ):
        pass
