"""The backbones in ONNX, through both of torch's exporters: the same maps in ONNX Runtime at every image size."""

from pathlib import Path

import pytest
import torch
from torch.export import Dim

from exit_plugins.mmdet import DynPerceiver

onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZES = [(128, 128), (192, 256), (256, 320), (800, 1344)]
FREE = {0: "batch", 2: "height", 3: "width"}


def small(exporter: str) -> DynPerceiver:
    """The newer exporter takes many times as long, so it gets two stages of the four."""
    torch.manual_seed(0)
    stages = (0, 1, 2, 3) if exporter == "torchscript" else (0, 1)
    return DynPerceiver("dynperceiver_test", out_indices=stages).eval()


def exported(backbone: torch.nn.Module, path: Path, exporter: str, size: tuple[int, int], free: bool):
    """Session of ``backbone`` exported from one image of ``size``, bound to that size or for any."""
    image = torch.randn(1 + free, 3, *size)
    if exporter == "torchscript":  # what mmdeploy calls
        axes = {"image": FREE} if free else None
        torch.onnx.export(backbone, (image,), path, dynamo=False, input_names=["image"], dynamic_axes=axes)
    else:
        shapes = ({axis: Dim.DYNAMIC for axis in FREE},) if free else None
        torch.onnx.export(
            backbone, (image,), path, dynamo=True, input_names=["image"], dynamic_shapes=shapes, verbose=False
        )
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def check(session, backbone: torch.nn.Module, image: torch.Tensor) -> None:
    with torch.no_grad():
        expected = backbone(image)
    maps = [torch.from_numpy(array) for array in session.run(None, {"image": image.numpy()})]
    torch.testing.assert_close(tuple(maps), expected, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the exporters: about themselves, and constants that are none
@pytest.mark.parametrize("exporter", ["torchscript", "torch.export"])
def test_one_file_for_every_image_size(exporter: str, tmp_path: Path) -> None:
    backbone = small(exporter)
    session = exported(backbone, tmp_path / "backbone.onnx", exporter, (192, 256), free=True)
    for height, width in SIZES:
        check(session, backbone, torch.randn(1, 3, height, width))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exporter", ["torchscript", "torch.export"])
def test_one_file_for_one_image_size(exporter: str, size: tuple[int, int], tmp_path: Path) -> None:
    backbone = small(exporter)
    session = exported(backbone, tmp_path / "backbone.onnx", exporter, size, free=False)
    check(session, backbone, torch.randn(1, 3, *size))
