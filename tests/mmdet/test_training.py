"""What MMDetection's users switch on, once each, on a few pictures: averaged weights, empty pictures, a subset of the
classes, resuming, and test-time augmentation. Mixed precision stands in test_detector.py."""

import json
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.runner import Runner

CONFIG = Path(__file__).parents[2] / "mm_configs" / "bccd" / "retinanet_tf_efficientnet_lite0_fpn_bccd.py"


@pytest.fixture
def data(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The drawn data set, with every second training picture empty."""
    root = tmp_path / "data"
    root.mkdir()
    (root / "images").symlink_to(shapes / "images")
    for split in ("train", "val", "test"):
        content = json.loads((shapes / f"{split}.json").read_text())
        if split == "train":
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 2]
        (root / f"{split}.json").write_text(json.dumps(content))
    monkeypatch.setenv("BCCD_ROOT", str(root))
    return root


def settings(work: Path, **options: object) -> Config:
    config = Config.fromfile(CONFIG)
    few = dict(batch_size=4, num_workers=0, persistent_workers=False)
    subset = dict(classes=("WBC", "Platelets"), palette=[(65, 105, 225), (255, 165, 0)])
    for loader in (config.train_dataloader, config.val_dataloader, config.test_dataloader):
        loader.update(few)
        loader.dataset.metainfo = subset
        for transform in loader.dataset.pipeline:
            if transform.type == "Resize":
                transform.scale = (128, 96)
    config.train_dataloader.dataset.filter_cfg = dict(filter_empty_gt=False)
    config.model.bbox_head.num_classes = 2
    config.model.backbone.init_cfg = None  # weights of another package may not be here
    config.merge_from_dict(
        {
            "work_dir": str(work),
            "default_scope": "mmdet",
            "train_cfg.max_epochs": 1,
            "train_cfg.val_interval": 1,
            "custom_hooks": [dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.5, priority=49)],
            "default_hooks.checkpoint.interval": 1,
            "vis_backends": [dict(type="LocalVisBackend")],
            "visualizer.vis_backends": [dict(type="LocalVisBackend")],
            "model.test_cfg.score_thr": 0.0,
            **options,
        }
    )
    return config


def test_averages_subsets_empty_pictures_resuming_and_augmented_tests(data: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    runner = Runner.from_cfg(settings(work))
    assert len(runner.train_dataloader.dataset) == 8  # the empty ones too
    runner.train()
    saved = torch.load(work / "epoch_1.pth", weights_only=False)
    key = "backbone.features.model.conv_stem.weight"
    averaged = saved["ema_state_dict"]["module." + key]  # MMEngine swaps the two when it saves
    assert not torch.equal(saved["state_dict"][key], averaged)

    config = settings(work, resume=True, **{"train_cfg.max_epochs": 2})
    runner = Runner.from_cfg(config)
    runner.train()
    assert (work / "epoch_2.pth").is_file() and runner.iter == 4

    # As tools/test.py --tta sets it up: the picture as it is and flipped, at two sizes.
    pipeline = config.test_dataloader.dataset.pipeline
    sizes = [dict(type="Resize", scale=scale, keep_ratio=True) for scale in ((128, 96), (160, 120))]
    pack = dict(
        type="PackDetInputs",
        meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "flip", "flip_direction"),
    )
    annotations = next(transform for transform in pipeline if transform.type == "LoadAnnotations")
    flips = [dict(type="RandomFlip", prob=1.0), dict(type="RandomFlip", prob=0.0)]
    config.test_dataloader.dataset.pipeline = [
        pipeline[0],
        dict(type="TestTimeAug", transforms=[sizes, flips, [annotations], [pack]]),
    ]
    config.model = dict(
        type="DetTTAModel",
        module=config.model,
        tta_cfg=dict(nms=dict(type="nms", iou_threshold=0.5), max_per_img=100),
    )
    config.resume, config.load_from = False, str(work / "epoch_2.pth")
    metrics = Runner.from_cfg(config).test()
    assert 0 <= metrics["coco/bbox_mAP"] <= 1
