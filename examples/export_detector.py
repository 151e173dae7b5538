"""Write a RetinaNet as one ONNX file, run it in ONNX Runtime on an image and draw its boxes beside MMDetection's.

    CONFIG=mm_configs/bccd/retinanet_dynperceiver_regnety_400mf_fpn_bccd.py
    python examples/export_detector.py data/bccd/images/BloodImage_00007.jpg --config $CONFIG \\
        --checkpoint runs/bccd/epoch_72.pth

The file holds everything between the pixels and the boxes: normalisation, padding, backbone, neck, head, decoding and
non-maximum suppression. It takes ``image`` (1, 3, H, W) uint8, in OpenCV's order BGR and resized as the config's test
pipeline does it, and gives ``boxes`` (N, 4) as left, top, right, bottom in its pixels, ``scores`` (N,) and ``labels``
(N,), best first. H and W are those of the given image, or any with ``--any-size``, which takes a few minutes longer.
"""

import argparse
import copy
from pathlib import Path

import mmcv
import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
import torchvision
from mmcv.transforms import Compose
from mmdet.apis import inference_detector, init_detector
from mmdet.registry import VISUALIZERS
from mmdet.structures import DetDataSample
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config, DictAction
from mmengine.structures import InstanceData
from torch import Tensor, nn
from torch.export import Dim

from exit_plugins.exits.export import onnx_program
from exit_plugins.timm.layers import fold_batch_norms


class OneImage(nn.Module):
    """A RetinaNet as a function of one image, its post-processing in operations that torch exports.

    What ``RetinaHead.predict`` does with its ``test_cfg``: MMDetection drops low scores before it takes the best
    ``nms_pre`` of a level, here they are dropped afterwards, which leaves the same boxes.
    """

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        head = getattr(detector, "bbox_head", None)
        if type(head).__name__ != "RetinaHead" or not head.use_sigmoid_cls or head.test_cfg.nms.type != "nms":
            raise ValueError(f"only RetinaNet with plain NMS is exported here, got {type(head).__name__}.")
        self.detector = detector

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """uint8 (1, 3, H, W) to boxes (N, 4), scores (N,), labels (N,)."""
        head, cfg = self.detector.bbox_head, self.detector.bbox_head.test_cfg
        size = image.shape[2:]
        scores, deltas = head(self.detector.extract_feat(self._prepared(image)))
        priors = head.prior_generator.grid_priors([level.shape[2:] for level in scores], device=image.device)
        levels = [self._best(*level) for level in zip(scores, deltas, priors, strict=True)]
        scores, labels, deltas, priors = (torch.cat(parts) for parts in zip(*levels, strict=True))
        boxes = head.bbox_coder.decode(priors, deltas, max_shape=size)
        kept = (scores > cfg.score_thr) & ((boxes[:, 2:] - boxes[:, :2]) > cfg.get("min_bbox_size", -1)).all(1)
        boxes, scores, labels = self._taken(kept.nonzero().squeeze(1), boxes, scores, labels)
        # Boxes of different classes do not suppress each other: each class has its own place.
        apart = boxes + labels.unsqueeze(1) * (size[0] + size[1])
        best = torchvision.ops.nms(apart, scores, cfg.nms.iou_threshold)[: cfg.max_per_img]
        return self._taken(best, boxes, scores, labels)

    @staticmethod
    def _taken(rows: Tensor, *columns: Tensor) -> tuple[Tensor, ...]:
        """Rows of all columns by their numbers: one node each, where indexing with a tensor is exported as seven."""
        return tuple(column.index_select(0, rows) for column in columns)

    def _prepared(self, image: Tensor) -> Tensor:
        """What the detector's data preprocessor does: RGB, normalised, padded at the right and below."""
        how = self.detector.data_preprocessor
        x = image.flip(1) if how._channel_conversion else image
        x = (x.float() - how.mean) / how.std
        height, width = x.shape[2:]
        step = how.pad_size_divisor
        return F.pad(x, (0, -width % step, 0, -height % step), value=how.pad_value)

    def _best(self, scores: Tensor, deltas: Tensor, priors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores, labels, deltas and anchors of the best ``nms_pre`` pairs of anchor and class of one level."""
        head = self.detector.bbox_head
        scores = scores[0].permute(1, 2, 0).flatten().sigmoid()
        scores, place = scores.topk(torch.sym_min(head.test_cfg.nms_pre, scores.shape[0]))
        anchor, label = place // head.cls_out_channels, place % head.cls_out_channels
        return (scores, label, *self._taken(anchor, deltas[0].permute(1, 2, 0).reshape(-1, 4), priors))


def export(detector: nn.Module, image: Tensor, path: Path, any_size: bool) -> None:
    """Write ``detector`` for images of the size of ``image`` (1, 3, H, W), or of any size."""
    detector = fold_batch_norms(copy.deepcopy(detector).eval())
    program = onnx_program(
        OneImage(detector).eval(),
        (image,),
        ["image"],
        ["boxes", "scores", "labels"],
        dynamic_shapes=({2: Dim.DYNAMIC, 3: Dim.DYNAMIC},) if any_size else None,
    )
    program.save(path, external_data=False)  # weights in the same file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="an image to compare on")
    parser.add_argument("--config", type=Path, required=True, help="the config it was trained with")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the weights train.py wrote")
    parser.add_argument("--any-size", action="store_true", help="let the file take images of any height and width")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a box that is drawn")
    parser.add_argument("--output", type=Path, default=Path("runs/export_detector"))
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="settings to change, key=value")
    args = parser.parse_args()
    for path in (args.image, args.checkpoint):
        if not path.exists():
            parser.error(f"there is no {path}")
    args.output.mkdir(parents=True, exist_ok=True)

    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    detector = init_detector(config, str(args.checkpoint), device="cpu")
    prepared = Compose(get_test_pipeline_cfg(config))(dict(img_path=str(args.image), img_id=0))
    image = prepared["inputs"].unsqueeze(0)
    path = args.output / "detector.onnx"
    export(detector, image, path, args.any_size)

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    boxes, scores, labels = map(torch.from_numpy, session.run(None, {"image": image.numpy()}))
    boxes = boxes / torch.tensor(prepared["data_samples"].scale_factor).repeat(2)  # to the picture's own pixels
    ours = InstanceData(bboxes=boxes, scores=scores, labels=labels)
    theirs = inference_detector(detector, str(args.image)).pred_instances
    if len(ours) == len(theirs) and torch.equal(ours.labels, theirs.labels):
        apart = float((ours.bboxes - theirs.bboxes).abs().max()) if len(ours) else 0.0
        print(f"{len(ours)} boxes, as MMDetection finds them; coordinates differ by at most {apart:.1g} pixels")
    else:
        print(f"the file finds {len(ours)} boxes, MMDetection {len(theirs)}, or in another order: look at the picture")

    visualizer = VISUALIZERS.build(config.visualizer)
    visualizer.dataset_meta = detector.dataset_meta
    picture = mmcv.imread(args.image, channel_order="rgb")
    drawn = []
    for found in (theirs, ours):
        sample = DetDataSample(pred_instances=found)
        visualizer.add_datasample("boxes", picture, sample, draw_gt=False, pred_score_thr=args.threshold)
        drawn.append(visualizer.get_image())
    mmcv.imwrite(np.concatenate(drawn, axis=1)[..., ::-1], str(args.output / "boxes.jpg"))
    print(f"wrote {path} and {args.output / 'boxes.jpg'}: MMDetection's boxes on the left, the file's on the right")


if __name__ == "__main__":
    main()
