"""Writing an export: traced, put together, verified against torch, and only then put in its place."""

import copy
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..adaptive import ExitOutput, inference_copy
from ..deprecation import warn_old
from ..files import atomic_path
from ..policy import ExitPolicy
from ..protocol import AnyModel, MultiExitModule
from .exported import ExportedAdaptiveModel, ExportedSegments, GraphRunner
from .graph import adaptive_graph
from .manifest import RUNTIMES, check_replaceable, write_manifest, written_whole
from .openvino_runtime import to_openvino
from .runtimes import require
from .tracing import onnx_segments
from .verification import trial_images, verify_graph, verify_segments

__all__ = ["export_graph", "export_segments"]


def export_segments(
    model: AnyModel,
    policy: ExitPolicy,
    folder: str | os.PathLike[str],
    input_size: Sequence[int],
    runtime: str = "onnx",
    *,
    format: str | None = None,
) -> "ExportedAdaptiveModel":
    """Write ``folder`` with one file per segment, the policy and a manifest; return it loaded and verified.

    Args:
        model: a multi-exit module in float32. It is copied, not changed.
        policy: thresholds for it; another policy can be given when the folder is loaded.
        folder: new, or an earlier export, which is replaced once the new one is verified: killed at any moment, one of
            the two stands there complete. Other files in it stay.
        input_size: (channels, height, width) of the images, (frames, channels, height, width) of clips; the batch
            stays free.
        runtime: what runs the segments: ``onnx`` (ONNX Runtime) or ``openvino``.
        format: the old name of ``runtime``.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: the model is not float32, the folder holds something else, or a segment's computation depends on
            the number of samples.
        RuntimeError: the export does not give what torch gives; nothing is written then.
    """
    prepared = _prepared(model, policy)
    if format is not None:
        warn_old("the argument format of export_segments", "write runtime=")
        runtime = format
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}; choose one of {', '.join(RUNTIMES)}.")
    folder = Path(folder)
    check_replaceable(folder)
    images = trial_images(prepared, input_size)
    with written_whole(folder) as part:
        segments = []
        for index, onnx_model in enumerate(onnx_segments(inference_copy(prepared), images)):
            name = f"segment_{index}.onnx"
            onnx_model.save(part / name)
            segments.append(name if runtime == "onnx" else to_openvino(part / name))
        write_manifest(part, policy, segments, runtime, input_size, prepared)
        verify_segments(prepared, ExportedSegments(part), images)
    return ExportedAdaptiveModel(folder)


def export_graph(
    model: AnyModel, policy: ExitPolicy, path: str | os.PathLike[str], input_size: Sequence[int]
) -> Callable[[Tensor], ExitOutput]:
    """Write one ONNX file that runs the policy inside: nothing deeper runs for a sample that has left.

    Input ``images`` (batch, C, H, W) float32; outputs ``logits`` (batch, classes), ``exit_index`` (batch,) int64 and
    ``confidence`` (batch,). ``thresholds`` (exits,) is an optional input whose default is the policy's. After each exit
    the state of the samples that stay is gathered inside an ``If``, so that an empty remainder runs nothing. Exits
    beyond the policy's ``max_exit`` are not in the file.

    Returns a function from images to ExitOutput that runs the file. Arguments and errors as of ``export_segments``.

    ValueError if ``path`` is a folder.
    """
    prepared = _prepared(model, policy)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, for example {path / 'model.onnx'}.")
    images = trial_images(prepared, input_size)
    with atomic_path(path) as part:
        segments = [program.model_proto for program in onnx_segments(inference_copy(prepared), images)]
        require("onnx").save(adaptive_graph(segments, policy), part)
        runner = GraphRunner(part)  # once it is open it needs no file, and a pipe could not be read again
        verify_graph(prepared, policy, runner, images)
    return runner


def _prepared(model: AnyModel, policy: ExitPolicy) -> MultiExitModule:
    """A float32 copy on the CPU in evaluation mode; here, once, the model is checked."""
    checked = policy.check_model(model)
    wrong = {p.dtype for p in checked.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if wrong:
        raise ValueError(f"exports are verified in float32; the model has {wrong.pop()}: call model.float() first.")
    return copy.deepcopy(checked).cpu().eval().requires_grad_(False)
