"""The ways one machine can run a model, timed in turns: which of them is fastest here."""

import copy
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from ..exits.adaptive import AdaptiveModel
from ..exits.costs import exit_latency
from ..exits.export import RUNTIMES, ExportedAdaptiveModel, export_segments
from ..exits.policy import ExitPolicy
from ..exits.protocol import MultiExitModule

__all__ = ["MODES", "open_mode", "recommended", "time_modes"]

MODES = {
    "plain": "the model as it is: fuse=False",
    "channels_last": "fuse=False, weights in channels_last",
    "fused": "the form for inference, which AdaptiveModel runs by default",
    "compiled": "AdaptiveModel(compile=True)",
    "onnx": "exported for ONNX Runtime",
    "openvino": "exported for OpenVINO",
}
_ROUNDS = 4  # in which all modes take turns, so that a drift of the machine touches all alike
_SECONDS = 240  # after which no further round begins


def time_modes(
    model: MultiExitModule, images: torch.Tensor, repeats: int
) -> tuple[dict[str, NDArray[np.float64]], dict[str, str]]:
    """Seconds (K,) to every exit in each mode that works here, and for each of the others why it does not.

    Images are (B, C, H, W) on the model's device. Modes are timed on the whole batch, in alternating rounds. The model
    is copied, not changed; exports are written to a temporary folder, and only timed where torch is on the CPU too.
    """
    ways: dict[str, AdaptiveModel] = {}
    refused: dict[str, str] = {}
    for name in MODES:
        try:
            ways[name] = open_mode(name, model, images)
            with ways[name].running(images.device):
                exit_latency(ways[name].runner, images, repeats=1, warmup=2)  # compiles, and shows what does not run
        except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            ways.pop(name, None)
            refused[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in ways}
    started = time.perf_counter()
    for count in _shares(repeats):
        for name, way in ways.items():
            with way.running(images.device):
                found[name].append(exit_latency(way.runner, images, repeats=count, warmup=1))
        if time.perf_counter() - started > _SECONDS:
            break
    return {name: np.median(times, axis=0) for name, times in found.items()}, refused


def recommended(latency: dict[str, NDArray[np.float64]]) -> str:
    """The mode of the least mean time over the exits: fastest where as many images leave at every exit."""
    return min(latency, key=lambda name: float(latency[name].mean()))


def open_mode(name: str, model: MultiExitModule, images: torch.Tensor) -> AdaptiveModel:
    """A copy of the model in one of ``MODES``, for such images (B, C, H, W); under its policy nobody leaves early.

    ValueError for an export of a model that is not on the CPU, and what the runtime raises where it is missing.
    """
    nobody = ExitPolicy([np.inf] * model.num_exits)
    if name not in RUNTIMES:
        own: MultiExitModule = copy.deepcopy(model)
        if name == "channels_last":
            own.to(memory_format=torch.channels_last)
        fuse = None if name in ("fused", "compiled") else False
        return AdaptiveModel(own, nobody, fuse=fuse, compile=name == "compiled")
    if images.device.type != "cpu":
        raise ValueError("exports run on the CPU")
    with tempfile.TemporaryDirectory() as folder:
        export_segments(model, nobody, folder, tuple(images.shape[1:]), name)
        return ExportedAdaptiveModel(folder)


def _shares(repeats: int) -> Iterator[int]:
    rounds = min(_ROUNDS, repeats)
    return (repeats // rounds + (index < repeats % rounds) for index in range(rounds))
