"""In ONNX Runtime: the backbones, through both of torch's exporters and at every image size, and a whole detector."""

import re
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from PIL import Image
from torch.export import Dim

from exit_plugins.mmdet import DynPerceiver

onnxruntime = pytest.importorskip("onnxruntime")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

# torch's exporters warn about themselves, and of constants in a graph that are none.
quiet_exporters = pytest.mark.filterwarnings("ignore")

SIZES = [(128, 128), (192, 256), (256, 320), (800, 1344)]
FREE = {0: "batch", 2: "height", 3: "width"}


def small(exporter: str, stages: int) -> DynPerceiver:
    """The newer exporter takes many times as long, so it gets ``stages`` of the four."""
    torch.manual_seed(0)
    return DynPerceiver("dynperceiver_test", out_indices=range(4 if exporter == "torchscript" else stages)).eval()


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


@quiet_exporters
@pytest.mark.parametrize("exporter", ["torchscript", "torch.export"])
def test_one_file_for_every_image_size(exporter: str, tmp_path: Path) -> None:
    backbone = small(exporter, stages=2)
    session = exported(backbone, tmp_path / "backbone.onnx", exporter, (192, 256), free=True)
    for height, width in SIZES:
        check(session, backbone, torch.randn(1, 3, height, width))


@quiet_exporters
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exporter", ["torchscript", "torch.export"])
def test_one_file_for_one_image_size(exporter: str, size: tuple[int, int], tmp_path: Path) -> None:
    backbone = small(exporter, stages=1)
    session = exported(backbone, tmp_path / "backbone.onnx", exporter, size, free=False)
    check(session, backbone, torch.randn(1, 3, *size))


REPOSITORY = Path(__file__).parents[2]


@quiet_exporters
def test_example_exports_a_detector_that_finds_the_same_boxes(
    shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = REPOSITORY / "mm_configs" / "bccd" / "retinanet_dynperceiver_regnety_400mf_fpn_bccd_small.py"
    options = {
        "model.backbone.arch": "dynperceiver_test",
        "model.backbone.out_indices": [1, 2],
        "model.neck.in_channels": [40, 64],
        "model.neck.start_level": 0,
        "model.bbox_head.stacked_convs": 1,
    }
    config = Config.fromfile(path)
    config.merge_from_dict(options)
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope("mmdet"):
        detector = MODELS.build(config.model).eval()
    with torch.no_grad():  # so that many boxes score above the config's threshold, each differently
        head, maps = detector.bbox_head, detector.extract_feat(torch.randn(1, 3, 192, 256))
        for layer, outputs, wanted in zip((head.retina_cls, head.retina_reg), head(maps), (3.0, 0.3), strict=True):
            layer.weight *= wanted / torch.cat([level.flatten() for level in outputs]).std()
    torch.save(
        {"state_dict": detector.state_dict(), "meta": {"dataset_meta": dict(config.metainfo)}}, tmp_path / "d.pth"
    )

    image, output = shapes / "images" / "test_0.jpg", tmp_path / "exported"
    arguments = [image, "--config", path, "--checkpoint", tmp_path / "d.pth", "--output", output, "--cfg-options"]
    arguments += [f"{key}={value}".replace(" ", "") for key, value in options.items()]
    monkeypatch.setattr(sys, "argv", ["export_detector.py", *map(str, arguments)])
    runpy.run_path(str(REPOSITORY / "examples" / "export_detector.py"), run_name="__main__")
    said = re.search(r"(\d+) boxes, as MMDetection finds them; .* at most (\S+) pixels", capsys.readouterr().out)
    assert said and int(said[1]) > 10 and float(said[2]) < 1e-2
    with Image.open(output / "boxes.jpg") as picture:
        assert picture.size == (256, 96)

    # For images of one size shapes are numbers, batch norms are in the convolutions, and indexing is one node.
    count = Counter(node.op_type for node in onnx.load(output / "detector.onnx").graph.node)
    assert not count.keys() & {"Shape", "CastLike", "SequenceAt", "SplitToSequence", "Constant", "GatherND"}
    assert not count["BatchNormalization"] and sum(count.values()) <= 575
    assert count["Reshape"] <= 36 and count["Transpose"] <= 50 and count["Squeeze"] <= 6 and count["Slice"] <= 13
