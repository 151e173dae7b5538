"""The runtimes of the `export` extra, loaded when needed; ONNX Runtime: from a file to a function over numpy arrays."""

import functools
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray

__all__ = [
    "Session",
    "inference_session",
    "leaf_names",
    "onnx_session",
    "openmp",
    "require",
]


class Session:
    """A loaded segment: leaves in, logits and leaves out, all numpy."""

    def __init__(self, inputs: list[str], run: Callable[[list[NDArray[Any]]], list[NDArray[Any]]]) -> None:
        self.inputs, self._run = inputs, run

    def __call__(self, leaves: list[NDArray[Any]]) -> list[NDArray[Any]]:
        return self._run(leaves)


def inference_session(path: Path, threads: int | None) -> Any:
    """An ONNX Runtime session of the file at ``path`` on the CPU, with ``threads`` threads, or as many as torch."""
    runtime = require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Every session has threads of its own, which spin for a while after a run: on the cores of the next segment.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def onnx_session(path: Path, threads: int | None, bfloat16: bool) -> Session:
    """A segment's file, opened by ONNX Runtime."""
    session = inference_session(path, threads)
    names = leaf_names(len(session.get_inputs()))
    return Session(names, lambda leaves: session.run(None, dict(zip(names, leaves, strict=True))))


def leaf_names(count: int) -> list[str]:
    """Names of a segment's inputs in the files."""
    return [f"leaf_{index}" for index in range(count)]


@functools.cache
def openmp() -> Any:
    """The OpenMP pools of the process, torch's among them."""
    return require("threadpoolctl").ThreadpoolController().select(user_api="openmp")


def require(name: str, package: str | None = None) -> ModuleType:
    """The module ``name``; ImportError that says what to install where it is missing."""
    try:
        return import_module(name)
    except ImportError as error:
        package = package or name
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'exit-plugins[export]'"
        ) from error
