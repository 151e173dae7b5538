"""Deployment: one file per segment for ONNX Runtime or OpenVINO, or one ONNX file in which samples leave inside.

What is exported is the model's form for inference (its ``fuse()``, where it has one). Nothing is written that was not
first run beside the model itself in torch: every exit's logits, and adaptive runs in which nobody, some and everybody
leaves early, must agree within 1e-4. A lower precision made from that is held to a bound on the fall of the accuracy.
Needs the ``export`` extra.
"""

from ..deprecation import moved
from .exported import ExportedAdaptiveModel, ExportedSegments, GraphRunner
from .manifest import RUNTIMES
from .quantization import LOWER_PRECISIONS, quantize_segments
from .tracing import onnx_program
from .writing import export_graph, export_segments

__all__ = [
    "LOWER_PRECISIONS",
    "RUNTIMES",
    "ExportedAdaptiveModel",
    "ExportedSegments",
    "GraphRunner",
    "export_graph",
    "export_segments",
    "onnx_program",
    "quantize_segments",
]

__getattr__ = moved(__name__, {"FORMATS": "exit_plugins.exits.export.RUNTIMES"})
