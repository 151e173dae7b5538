"""The runtimes of the `export` extra, loaded when needed: from a file to a function over numpy arrays."""

import functools
import threading
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
    "openvino_session",
    "require",
    "to_openvino",
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


def openvino_session(path: Path, threads: int | None, bfloat16: bool) -> Session:
    """A segment's file, opened by OpenVINO; in float32 unless ``bfloat16`` is asked for."""
    openvino = require("openvino")
    # Left to itself OpenVINO computes in bfloat16 where the CPU can, without a word.
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    core = openvino.Core()
    model = core.read_model(path)
    for_batches = core.compile_model(model, "CPU", config)
    # Single samples run in a network of fixed shape, which OpenVINO plans better.
    model.reshape({value: [1, *[d.get_length() for d in list(value.partial_shape)[1:]]] for value in model.inputs})
    for_one = core.compile_model(model, "CPU", config)
    turn = threading.Lock()  # a compiled network runs one request at a time
    # OpenVINO orders inputs and outputs as it likes, and joins outputs that are the same tensor: names tell.
    read = {name for value in model.inputs for name in value.names}
    written = {name for value in model.outputs for name in value.names}
    names = ["logits", *(f"next_{index}" for index in range(len(written)) if f"next_{index}" in written)]

    def run(leaves: list[NDArray[Any]]) -> list[NDArray[Any]]:
        compiled = for_one if len(leaves[0]) == 1 else for_batches
        given = zip(leaf_names(len(leaves)), leaves, strict=True)
        with turn:
            results = compiled({name: leaf for name, leaf in given if name in read}, share_inputs=True)
            return [results[name] for name in names]

    return Session(sorted(read), run)


def to_openvino(path: Path) -> str:
    """Convert an ONNX file to OpenVINO's .xml and .bin beside it, in float32, and remove it; return the new name."""
    openvino = require("openvino")
    openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    path.unlink()
    return path.with_suffix(".xml").name


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
