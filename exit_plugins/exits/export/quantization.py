"""Int8 versions of ONNX exports."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..confidence import confidence
from ..policy import ExitPolicy
from ..protocol import State
from .exported import ExportedSegments
from .manifest import POLICY, check_replaceable, write_manifest, written_whole
from .runtimes import require

__all__ = ["quantize_segments"]


def quantize_segments(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    batches: Iterable[Tensor],
    weights_only: bool = False,
) -> dict[str, Any]:
    """Write an int8 version of an ONNX export, with ONNX Runtime's static quantisation of every segment.

    Args:
        folder: an export with runtime ``onnx``.
        destination: folder for the int8 export, loaded like any other.
        batches: images (B, C, H, W), preprocessed as for the model; a hundred or more that look like what will come.
            They set the ranges of the activations.
        weights_only: quantise weights and leave the ranges to be found at run time. Keeps more of the accuracy of
            transformers; convolutions stay in float32.

    Returns:
        What quantisation changed on ``batches``, also kept in the manifest: per exit the share of predictions that
        stayed (``agreement``) and the mean absolute change of the confidence (``confidence_change``). Accuracy is
        measured by ``collect_exits(ExportedSegments(destination), loader)`` or ``exit-plugins evaluate``; confidences
        move, so solve thresholds on that table again.

    Raises:
        ValueError: the export is not for ONNX Runtime, or there are no images.
    """
    quantization = require("onnxruntime.quantization", "onnxruntime")
    preprocess = require("onnxruntime.quantization.shape_inference", "onnxruntime").quant_pre_process
    exported = ExportedSegments(folder)
    if exported.manifest["runtime"] != "onnx":
        raise ValueError(f"{folder} is an OpenVINO export; quantise an ONNX one.")
    batches = list(batches)
    if not batches:
        raise ValueError("quantisation needs images to find the ranges of the activations with.")
    destination = Path(destination)
    check_replaceable(destination)
    states = [exported.begin_exits(images) for images in batches]
    with written_whole(destination) as part:
        names = []
        for index, name in enumerate(exported.manifest["segments"]):
            source = part / "optimised.onnx"
            preprocess(exported.folder / name, source, skip_symbolic_shape=True)
            if weights_only:
                quantization.quantize_dynamic(source, part / name, op_types_to_quantize=["MatMul", "Gemm"])
            else:
                quantization.quantize_static(
                    source,
                    part / name,
                    _Calibration(quantization, exported, index, states),
                    op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                    per_channel=True,
                )
            source.unlink()
            names.append(name)
            states = [exported.forward_exit(index, state)[1] for state in states]
        policy = ExitPolicy.load(exported.folder / POLICY)
        # Its weights are no longer those of the model: they are known by what they were made from and how.
        weights = hashlib.sha256(b"".join((part / name).read_bytes() for name in names)).hexdigest()
        about = {"weights": weights, "precision": "int8"}
        write_manifest(part, policy, names, "onnx", exported.input_size, exported, **about)
        report = _change(exported, ExportedSegments(part), batches)
        write_manifest(part, policy, names, "onnx", exported.input_size, exported, quantisation=report, **about)
    return report


def _Calibration(quantization: ModuleType, exported: ExportedSegments, index: int, states: list[State]) -> Any:
    """A reader of ONNX Runtime's kind over the states that reach segment ``index``."""
    names = exported._sessions[index].inputs

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # the runtime is optional
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            state = next(self.left, None)
            return state and {n: leaf.contiguous().numpy() for n, leaf in zip(names, state, strict=True)}

        def rewind(self) -> None:
            self.left = iter(states)

    return Reader()


def _change(before: ExportedSegments, after: ExportedSegments, batches: list[Tensor]) -> dict[str, list[float]]:
    same, moved = [], []
    for images in batches:
        pairs = list(zip(before.forward_exits(images), after.forward_exits(images), strict=True))
        same.append(torch.stack([(a.argmax(1) == b.argmax(1)).float() for a, b in pairs]))
        moved.append(torch.stack([(confidence(a) - confidence(b)).abs() for a, b in pairs]))
    return {
        "agreement": torch.cat(same, 1).mean(1).tolist(),
        "confidence_change": torch.cat(moved, 1).mean(1).tolist(),
    }
