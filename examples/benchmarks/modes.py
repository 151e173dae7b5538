"""The ways of running a network that the benchmarks compare."""

import copy
import tempfile

import numpy as np
import timm
import torch
from torch import Tensor, nn

from exit_plugins import AdaptiveModel, ExitPolicy, MultiExit
from exit_plugins.exits.export import ExportedAdaptiveModel, export_segments, quantize_segments
from exit_plugins.timm.layers import fold_batch_norms

MODES = {
    "eager": "torch as a timm user runs it: channels_last, nothing fused",
    "fused": "torch, eager, in the form for inference (fuse=True)",
    "served": "fused, of a model built under torch.inference_mode(), whose weights no call has to look at",
    "bfloat16": "fused, in mixed precision",
    "compiled": "fused, and torch.compile (with CUDA graphs on a GPU)",
    "compiled-bfloat16": "compiled, in mixed precision",
    "onnx": "exported, ONNX Runtime",
    "onnx-int8": "exported, ONNX Runtime, int8",
    "openvino": "exported, OpenVINO in float32",
}


class OneExit(MultiExit, nn.Module):
    """A plain network, or timm's of that name, as a multi-exit model with one exit, so that it runs in every mode."""

    num_exits = 1

    def __init__(self, network: str | nn.Module) -> None:
        super().__init__()
        self.network = (timm.create_model(network) if isinstance(network, str) else network).eval()
        self.num_classes = self.network.num_classes

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, state: Tensor) -> tuple[Tensor, tuple]:
        return self.network(state), ()

    def fuse(self) -> "OneExit":
        fold_batch_norms(self)
        return self


def adaptive_options(mode: str) -> dict:
    """Keyword arguments that make AdaptiveModel run a torch mode."""
    return {
        "fuse": mode != "eager",
        "compile": mode.startswith("compiled"),
        "dtype": torch.bfloat16 if mode.endswith("bfloat16") else None,
    }


def runner(model: nn.Module, mode: str, size: tuple[int, ...], threads: int) -> AdaptiveModel:
    """``model`` in ``mode`` on images of ``size``, never leaving early."""
    nobody = ExitPolicy([np.inf] * model.num_exits)
    if not mode.startswith(("onnx", "openvino")):
        if mode == "served":
            with torch.inference_mode():
                own = copy.deepcopy(model).to(memory_format=torch.channels_last)
        else:
            own = model.to(memory_format=torch.channels_last)
        return AdaptiveModel(own, nobody, **adaptive_options(mode))
    with tempfile.TemporaryDirectory() as folder:
        exported = f"{folder}/float32"
        export_segments(model, nobody, exported, size, "openvino" if mode == "openvino" else "onnx")
        if mode == "onnx-int8":
            quantize_segments(exported, f"{folder}/int8", [torch.randn(8, *size)])
            exported = f"{folder}/int8"
        return ExportedAdaptiveModel(exported, threads=threads)


def to_exit(model: AdaptiveModel, last: int, images: Tensor) -> None:
    """Run the segments up to exit ``last`` (0-based) on the whole batch, without confidences or decisions."""
    with torch.autocast(images.device.type, model.dtype, enabled=model.dtype is not None):
        state = model.runner.begin_exits(images)
        for index in range(last + 1):
            _, state = model.runner.forward_exit(index, state)
