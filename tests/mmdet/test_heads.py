"""Other detectors of MMDetection over Dyn-Perceiver: losses, gradients, an empty picture, predictions."""

import pytest
import torch
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.config import ConfigDict
from mmengine.hub import get_config
from mmengine.registry import MODELS, DefaultScope

WIDTH, CLASSES = 32, 3
DETECTORS = {  # MMDetection's config, and the levels its neck reads
    "fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py": (0, 1, 2, 3),
    "mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py": (0, 1, 2, 3),
    "cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py": (0, 1, 2, 3),
    "rtmdet/rtmdet_tiny_8xb32-300e_coco.py": (1, 2, 3),
    "deformable_detr/deformable-detr_r50_16xb2-50e_coco.py": (1, 2, 3),
}
CHANNELS = (24, 40, 64, 96)  # of dynperceiver_test
SMALLER = {  # wherever it stands in the model
    "feat_channels": WIDTH,
    "conv_out_channels": WIDTH,
    "embed_dims": WIDTH,
    "fc_out_channels": 64,
    "feedforward_channels": 64,
    "num_feats": WIDTH // 2,
    "num_layers": 1,
    "num_convs": 1,
    "num_queries": 20,
    "max_per_img": 20,
    "stacked_convs": 1,
    "num_classes": CLASSES,
}


def shrink(part: object) -> None:
    """Set ``SMALLER`` and the channels between neck and heads in every dict below ``part``."""
    if isinstance(part, list):
        for item in part:
            shrink(item)
    elif isinstance(part, dict):
        for key, value in part.items():
            if key in SMALLER:
                part[key] = SMALLER[key]
            elif key in ("in_channels", "out_channels") and isinstance(value, int):
                part[key] = WIDTH
            elif key == "norm_cfg" and value and value.get("type") == "SyncBN":
                value["type"] = "BN"  # one process
            else:
                shrink(value)


def small_detector(name: str) -> torch.nn.Module:
    model: ConfigDict = get_config(f"mmdet::{name}").model
    levels = DETECTORS[name]
    shrink(model)
    model.backbone = dict(type="exit_plugins.DynPerceiver", arch="dynperceiver_test", out_indices=levels)
    if "decoder" in model:
        model.bbox_head.embed_dims = WIDTH  # a default of the head's, not in the config
    model.neck.in_channels = [CHANNELS[level] for level in levels]
    with DefaultScope.overwrite_default_scope("mmdet"):
        return MODELS.build(model)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_trains_and_predicts_over_dynperceiver(name: str) -> None:
    torch.manual_seed(0)
    register_all_modules(init_default_scope=False)
    detector = small_detector(name)
    detector.init_weights()
    masks = detector.with_mask
    # One picture of two has nothing in it.
    batch = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_items=[4, 0], num_classes=CLASSES, with_mask=masks)
    with DefaultScope.overwrite_default_scope("mmdet"):
        losses = detector(**detector.data_preprocessor(batch, True), mode="loss")
        total, _ = detector.parse_losses(losses)
        total.backward()
        assert torch.isfinite(total)
        unused = [n for n, p in detector.backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
        assert not unused
        detector.eval()
        with torch.no_grad():
            found = detector.test_step(batch)
    for sample in found:
        boxes = sample.pred_instances
        assert boxes.bboxes.isfinite().all() and (boxes.labels < CLASSES).all()
        assert not masks or boxes.masks.shape == (len(boxes), 96, 128)
