"""OpenVINO: from a file to a function over numpy arrays, by one core that leaves the process's signals alone."""

import ctypes
import functools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from .runtimes import Session, leaf_names, require

__all__ = ["keep_signal_stack", "openvino_core", "openvino_session", "to_openvino"]

_ONE_CORE = threading.Lock()


def openvino_session(path: Path, threads: int | None, bfloat16: bool) -> Session:
    """A segment's file, opened by OpenVINO; in float32 unless ``bfloat16`` is asked for."""
    # Left to itself OpenVINO computes in bfloat16 where the CPU can, without a word.
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    core = openvino_core()
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


def openvino_core() -> Any:
    """The one core of this process, which stays until its end.

    Every core's CPU plugin gives the thread that loads it a stack for signals, and frees that with itself. Of two
    plugins that do not end in the opposite order the one that goes last hands the thread the freed stack of the other;
    one that ends in another thread leaves the first with what is freed. Python's handlers run on that stack: the next
    signal, as little as the SIGCHLD of a data loader's worker, then kills the process without a word.
    """
    with _ONE_CORE:
        return _core()


@functools.cache
def _core() -> Any:
    core = require("openvino").Core()
    with keep_signal_stack():
        core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")  # loads the plugin
    return core


@contextmanager
def keep_signal_stack() -> Iterator[None]:
    """Give the calling thread the stack for signals that it had, whatever happened to it inside."""
    try:
        sigaltstack = ctypes.CDLL(None).sigaltstack
    except (AttributeError, OSError, TypeError):  # Windows, which has none
        yield
        return
    before = _Stack()
    sigaltstack(None, ctypes.byref(before))
    try:
        yield
    finally:
        if sigaltstack(ctypes.byref(before), None):
            warnings.warn("the stack for signals could not be put back after OpenVINO.", RuntimeWarning, stacklevel=3)


class _Stack(ctypes.Structure):
    """``stack_t``, whose last two fields Linux and the BSDs have in opposite orders; it is handed back as it came."""

    _fields_ = (("bytes", ctypes.c_byte * 24),)
