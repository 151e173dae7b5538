# MMDetection's RetinaNet 1x (COCO, 12 epochs, SGD 0.01 at batch 16, RGB ImageNet normalisation) with another backbone:
# Dyn-Perceiver on RegNetY-1.6GF, mAP 40.2 in table 4 of the paper, from ImageNet weights. None are published for this
# one: name yours with --cfg-options model.backbone.init_cfg.checkpoint=PATH.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

# The types below are found without this import; it checks mmcv's operators before MMDetection needs them.
custom_imports = dict(imports=["exit_plugins.mmdet"])

model = dict(
    backbone=dict(
        _delete_=True,
        type="exit_plugins.DynPerceiver",
        arch="dynperceiver_regnety_1_6gf",
        out_indices=(0, 1, 2, 3),
        features="after_z2x",
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="timm://dynperceiver_regnety_1_6gf"),
    ),
    neck=dict(in_channels=[48, 120, 336, 888]),
)
