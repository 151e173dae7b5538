"""Small models with their segments in ONNX: tracing takes most of an export's time and serves every test."""

import functools

import timm
import torch
from small_models import ConvExits, NestedExits, settle

from exit_plugins import ExitPolicy, add_exits
from exit_plugins.exits.adaptive import inference_copy
from exit_plugins.exits.export import writing
from exit_plugins.exits.export.tracing import onnx_segments

SMALL = {
    "conv": ConvExits,
    "nested": NestedExits,
    "vit": lambda: add_exits(timm.create_model("test_vit", img_size=32, num_classes=5), exits=3).eval(),
}
SIZE = (3, 32, 32)


@functools.cache
def traced(name: str):
    """Model, images, and its segments in ONNX: tracing takes most of an export's time and serves every path."""
    torch.manual_seed(0)
    model = SMALL[name]() if name in SMALL else timm.create_model(name, num_classes=5)
    size = SIZE if name in SMALL else model.pretrained_cfg["input_size"]
    images = torch.randn(24, *size) * torch.rand(24, 1, 1, 1) * 3
    settle(model, images)
    inference_form = inference_copy(writing._prepared(model, nobody(model)))
    return model, images, list(onnx_segments(inference_form, images))


def nobody(model) -> ExitPolicy:
    return ExitPolicy([float("inf")] * model.num_exits)


def between(sure: torch.Tensor, rank: int) -> list[float]:
    """Thresholds between the samples' confidences."""
    ordered = sure.sort(1).values
    return [float((row[rank] + row[rank + 1]) / 2) for row in ordered]
