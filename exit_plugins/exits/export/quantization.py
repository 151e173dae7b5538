"""Exports in a lower precision: int8 set on the user's images, or bfloat16."""

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..confidence import confidence
from ..digests import sample_digests
from ..policy import ExitPolicy
from .accuracy import check_max_drop, policy_for
from .exported import ExportedSegments, open_segment
from .manifest import POLICY, check_replaceable, write_manifest, written_whole
from .openvino_runtime import openvino_core
from .quantizers import QUANTIZERS, feeds_of

__all__ = ["LOWER_PRECISIONS", "TABLE", "quantize_segments"]

LOWER_PRECISIONS = ("int8", "bfloat16")
TABLE = "table.npz"  # in the folder: what the export said of the held-out images


def quantize_segments(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    batches: Iterable[Any],
    weights_only: bool = False,
    *,
    precision: str = "int8",
    held_out: Iterable[Any] | None = None,
    max_drop: float = 0.005,
) -> dict[str, Any]:
    """Write an export in a lower precision, and refuse where it costs more accuracy than ``max_drop``.

    int8 is static: ONNX Runtime's quantisation or, for OpenVINO, NNCF's (its symmetric preset; the mixed one and its
    transformer scheme where a segment has attention). Segment after segment, ranges come from the states that the
    images lead to through the segments that are int8 already. bfloat16 is OpenVINO's: the same files, computed in it
    wherever the folder is loaded on a processor that can.

    Args:
        folder: a float32 export.
        destination: folder for the new export, loaded like any other.
        batches: images (B, C, H, W), or a loader of (images, ...), preprocessed as for the model; a hundred or more
            that look like what will come. They set the ranges of the activations, and need no labels.
        weights_only: quantise weights and leave the ranges to be found at run time (ONNX Runtime). Keeps more of the
            accuracy of transformers; convolutions stay in float32.
        precision: ``int8`` or ``bfloat16``.
        held_out: a loader of (images, target) of others, not shuffled. Thresholds are solved on half of them, on the
            new export's own table, for the policy's budget (for its exit shares where it knows no costs); the other
            half compares both exports under such policies. The table is kept in the folder as ``table.npz``, for
            other budgets: ``ExitTable.load``, ``exit-plugins solve --table``. Without it the policy stays as it was,
            for confidences that have moved, and nothing is refused.
        max_drop: how much the accuracy on ``held_out`` may fall, as a share of the images: at the last exit, and at the
            same budget.

    Returns:
        Also kept in the manifest. Of ``batches``: their number and digest (``calibration``), per exit the share of
        predictions that stayed (``agreement``) and the mean absolute change of the confidence (``confidence_change``).
        Of ``held_out``: accuracies of all exits, and ``at_last_exit`` and ``under_policy`` each with the fall
        (``drop``) and its 95 % interval.

    Raises:
        ImportError: the runtime or NNCF is not installed.
        ValueError: the export is not in float32, its runtime or this processor has no such precision, or there are no
            images, or they are not finite.
        RuntimeError: the accuracy falls by more than ``max_drop``; nothing is written, ``destination`` is as it was.
    """
    if precision not in LOWER_PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; choose one of {', '.join(LOWER_PRECISIONS)}.")
    check_max_drop(max_drop)
    exported = ExportedSegments(folder)
    if exported.manifest["precision"] != "float32":
        raise ValueError(f"{folder} is in {exported.manifest['precision']} already; start from a float32 export.")
    if precision == "bfloat16":
        _check_bfloat16(exported)
    images = [batch if isinstance(batch, Tensor) else batch[0] for batch in batches]
    images = [exported.begin_exits(batch)[0] for batch in images if len(batch)]
    if not images:
        raise ValueError("a lower precision needs images: to find the ranges of the activations, and to compare with.")
    if not all(batch.isfinite().all() for batch in images):
        raise ValueError("the images hold NaN or infinite values, which no range can hold; check the preprocessing.")
    destination = Path(destination)
    if destination.resolve() == exported.folder.resolve():
        raise ValueError(f"{destination} is the float32 export itself; name another folder.")
    check_replaceable(destination)
    policy = ExitPolicy.load(exported.folder / POLICY)
    with written_whole(destination) as part:
        if precision == "int8":
            _write_int8(exported, part, images, weights_only)
        else:
            _copy_segments(exported, part)
        # Its weights are no longer those of the model: they are known by what they were made from and how.
        hasher = hashlib.sha256(precision.encode() if precision != "int8" else b"")
        for path in sorted(part.iterdir()):
            hasher.update(path.read_bytes())
        about = {"weights": hasher.hexdigest(), "precision": precision}
        runtime, names = exported.manifest["runtime"], exported.manifest["segments"]
        write_manifest(part, policy, names, runtime, exported.input_size, exported, **about)
        lower = ExportedSegments(part)
        report: dict[str, Any] = {"calibration": _record(images), **_change(exported, lower, images)}
        if held_out is not None:
            policy, table, figures = policy_for(lower, exported, policy, held_out, max_drop)
            table.save(part / TABLE)
            report |= figures
        write_manifest(part, policy, names, runtime, exported.input_size, exported, quantisation=report, **about)
    return report


def _write_int8(exported: ExportedSegments, part: Path, images: list[Tensor], weights_only: bool) -> None:
    """Every segment of the export as int8 in the folder ``part``."""
    runtime = exported.manifest["runtime"]
    states: list[list[NDArray[Any]]] = [[batch.contiguous().numpy()] for batch in images]
    for index, name in enumerate(exported.manifest["segments"]):
        feeds = feeds_of(states, exported.inputs(index))
        QUANTIZERS[runtime](exported.folder / name, part / name, feeds, weights_only)
        if index < exported.num_exits - 1:
            segment = open_segment(runtime, part / name)
            states = [segment(state)[1:] for state in states]


def _copy_segments(exported: ExportedSegments, part: Path) -> None:
    for name in exported.manifest["files"]:
        if name != POLICY:
            shutil.copyfile(exported.folder / name, part / name)


def _check_bfloat16(exported: ExportedSegments) -> None:
    if exported.manifest["runtime"] != "openvino":
        raise ValueError("bfloat16 is a choice of OpenVINO; export with runtime='openvino' for it.")
    able = openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        raise ValueError(f"this processor does not compute in bfloat16 (OpenVINO finds {', '.join(able)}).")


def _record(images: list[Tensor]) -> dict[str, Any]:
    """How many images, and a digest of them whatever their order."""
    digests = np.sort(np.concatenate([sample_digests(batch) for batch in images]))
    return {"count": len(digests), "sha256": hashlib.sha256(digests.astype("<u8").tobytes()).hexdigest()}


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
