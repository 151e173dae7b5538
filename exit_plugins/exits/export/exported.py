"""Running what was exported: the segments as a multi-exit model, the policy over them, the one file."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..adaptive import AdaptiveModel, ExitOutput
from ..policy import ExitPolicy
from ..protocol import MultiExit, State
from ..reading import reading
from .manifest import POLICY, read_manifest
from .openvino_runtime import openvino_session
from .runtimes import Session, inference_session, onnx_session, openmp

__all__ = ["ExportedAdaptiveModel", "ExportedSegments", "GraphRunner", "open_segment"]


def open_segment(runtime: str, path: Path, threads: int | None = None, bfloat16: bool = False) -> Session:
    """The segment's file at ``path``, opened by its runtime."""
    return (onnx_session if runtime == "onnx" else openvino_session)(path, threads, bfloat16)


class ExportedSegments(MultiExit, nn.Module):
    """The segments of an export, run by ONNX Runtime or OpenVINO; a multi-exit model like the one exported.

    So everything that takes a model takes it: ``collect_exits`` for its accuracy, ``exit_latency`` for its times. Runs
    on the CPU, without gradients. The state is a tuple of the exported state's tensors.

    Args:
        folder: what ``export_segments`` or ``quantize_segments`` wrote.
        threads: CPU threads; default as many as torch uses.
        bfloat16: let OpenVINO compute in bfloat16 where the CPU does. By default it does so for an export in that
            precision, and otherwise computes in float32, like torch, what is not int8.

    FileNotFoundError or ValueError for a folder that is missing or damaged; ImportError without the runtime.
    """

    def __init__(
        self, folder: str | os.PathLike[str], threads: int | None = None, bfloat16: bool | None = None
    ) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        described = self.manifest["model"]
        self.num_exits = described["num_exits"]
        self.num_classes = described.get("num_classes") or 0
        self.in_chans = described.get("in_chans")
        self.model_kwargs = described.get("model_kwargs")
        self.weights = described.get("weights")
        self.input_size = tuple(self.manifest["input_size"])
        self.sample_ndim = len(self.input_size)
        self.pretrained_cfg = {
            "architecture": described["architecture"],
            "input_size": self.input_size,
            **self.manifest["preprocessing"],
        }
        if bfloat16 and self.manifest["runtime"] != "openvino":
            raise ValueError("bfloat16 is a choice of OpenVINO; export with runtime='openvino' for it.")
        if bfloat16 is None:
            bfloat16 = self.manifest["precision"] == "bfloat16"
        runtime = self.manifest["runtime"]
        with reading(self.folder, "export", "export again"):
            self._sessions = [
                open_segment(runtime, self.folder / name, threads, bfloat16) for name in self.manifest["segments"]
            ]
        self.eval()

    @property
    def mode(self) -> str:
        """The runtime, and the precision where it is lower than float32: what ``AdaptiveModel.mode`` says."""
        runtime, precision = self.manifest["runtime"], self.manifest["precision"]
        return f"{runtime}" if precision == "float32" else f"{runtime}, {precision}"

    def inputs(self, index: int) -> list[str]:
        """Names of the leaves that segment ``index`` reads; those it only hands on may be missing."""
        return self._sessions[index].inputs

    def train(self, mode: bool = True) -> "ExportedSegments":
        if mode:
            raise RuntimeError("an exported model only runs inference; train the model it was exported from.")
        return super().train(False)

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        if tuple(x.shape[1:]) != self.input_size:
            raise ValueError(
                f"this export takes images of shape (batch, {', '.join(map(str, self.input_size))}), got "
                f"{tuple(x.shape)}; export again for another size."
            )
        return (x.float(),)

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        logits, *state = self._sessions[index]([leaf.detach().cpu().contiguous().numpy() for leaf in state])
        return torch.from_numpy(logits), tuple(torch.from_numpy(leaf) for leaf in state)


class ExportedAdaptiveModel(AdaptiveModel):
    """AdaptiveModel over an export: ``forward(images) -> ExitOutput``, policy and all.

    Args:
        folder: what ``export_segments`` or ``quantize_segments`` wrote.
        policy: default the one exported.
        threads, bfloat16: see ``ExportedSegments``.

    Threads may share it and swap its policy meanwhile: every call runs under one policy from beginning to end. With
    OpenVINO they take turns at each segment; load the folder once for every thread to run in parallel.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        policy: ExitPolicy | None = None,
        threads: int | None = None,
        bfloat16: bool | None = None,
    ) -> None:
        segments = ExportedSegments(folder, threads, bfloat16)
        super().__init__(segments, policy or ExitPolicy.load(Path(folder) / POLICY))

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        # torch only takes confidences and gathers here. A second thread gains nothing for that, and spins on afterwards
        # on a core that the runtime needs for the next segment: 9 % of a run at batch 8 on two cores. Unlike
        # torch.set_num_threads, the limit holds for this thread alone.
        torch.get_num_threads()  # a thread's first question to torch sets its number, and would undo the limit
        with openmp().limit(limits=1), super().running(device):
            yield


class GraphRunner:
    """Runs a file of ``export_graph`` with ONNX Runtime: images (B, C, H, W) to ExitOutput.

    ``thresholds`` (exits,) replaces those in the file for one call. ``threads`` as of ``ExportedSegments``.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None) -> None:
        with reading(path, "exported graph", "export it again", "write one with export_graph"):
            self.session = inference_session(Path(path), threads)

    def __call__(self, images: Tensor, thresholds: Sequence[float] | NDArray[Any] | None = None) -> ExitOutput:
        feed = {"images": images.detach().cpu().float().contiguous().numpy()}
        if thresholds is not None:
            feed["thresholds"] = np.asarray(thresholds, dtype=np.float32)
        return ExitOutput(*map(torch.from_numpy, self.session.run(["logits", "exit_index", "confidence"], feed)))
