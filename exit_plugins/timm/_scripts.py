"""The one door into timm's scripts: they run unmodified, and find our names where timm's are."""

import ast
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import timm

from .._hosts import missing_name
from ._host import SWAPPED

__all__ = ["Names", "check_script", "in_place", "put_in_place", "run_script"]

# By module of timm's: what stands under a name of that module while a script runs.
Names = Mapping[str, Mapping[str, Any]]


def run_script(path: str, arguments: Sequence[str], names: Names) -> dict[str, Any]:
    """Run a script as ``python PATH ARGUMENTS`` would, with ``names`` in timm's places; return the script's globals."""
    with in_place(names), mock.patch.object(sys, "argv", [path, *arguments]):
        return runpy.run_path(path, run_name="__main__")


@contextmanager
def in_place(names: Names) -> Iterator[None]:
    """Put ``names`` into timm's modules for the time of the block.

    Raises:
        ValueError: one of them is not listed in ``_host.SWAPPED``, where whoever reads this package looks for them.
    """
    with ExitStack() as stack:
        for module, name, value in _listed(names):
            stack.enter_context(mock.patch.object(import_module(module), name, value))
        yield


def put_in_place(names: Names, script: dict[str, Any]) -> None:
    """Put ``names`` into timm's modules for good, and where a running script's globals hold timm's own already."""
    for module, name, value in _listed(names):
        if script.get(name) is getattr(import_module(module), name):
            script[name] = value
        setattr(import_module(module), name, value)


def _listed(names: Names) -> list[tuple[str, str, Any]]:
    found = [(module, name, value) for module, swaps in names.items() for name, value in swaps.items()]
    for module, name, _ in found:
        if name not in SWAPPED.get(module, ()):
            raise ValueError(f"{module}.{name} is to be swapped and does not stand in exit_plugins.timm._host.SWAPPED.")
    return found


def check_script(path: str) -> bool:
    """Whether the script trains; raise an error if it does not fit the installed timm.

    Raises:
        FileNotFoundError, ValueError: there is no such script, or it is not Python.
        ImportError: it takes a name from timm that the installed timm lacks, or trains in a way of its own.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no script at {path!r}: give the path of timm's train.py (or validate.py, ...) first.")
    with open(path, encoding="utf-8") as file:
        try:
            tree = ast.parse(file.read(), path)
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"{path} is not a Python script: {error or 'it is nested too deeply'}") from None
    if all(isinstance(node, ast.Expr) and not isinstance(node.value, ast.Call) for node in tree.body):
        # JSON reads as an expression, and running it would do nothing and say so by success.
        raise ValueError(f"{path} is not a Python script: nothing in it does anything; give timm's train.py first.")
    advice = f"take it from timm's repository at the version installed, {timm.__version__}."
    taken: set[str] = set()
    # Imports inside a try are the script's own affair.
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "timm" and not node.level:
            for name in (alias.name for alias in node.names if alias.name != "*"):
                if missing_name({f"{node.module}.{name}": ()}):
                    raise ImportError(
                        f"{path} needs {node.module}.{name}, which timm {timm.__version__} lacks: {advice}"
                    )
                taken.add(name)
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    if "train_one_epoch" in functions and "ClassificationTask" not in taken:
        raise ImportError(
            f"{path} does not train through timm.task.ClassificationTask, so it cannot train several exits: {advice}"
        )
    return "ClassificationTask" in taken
