# MMDetection's RTMDet-tiny (COCO, 300 epochs, AdamW 0.004 at batch 256) with another backbone: Dyn-Perceiver on
# RegNetY-400MF, whose weights expect RGB with ImageNet's statistics. Name yours with --cfg-options
# model.backbone.init_cfg.checkpoint=PATH.
_base_ = "mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py"

custom_imports = dict(imports=["exit_plugins.mmdet"])

model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(
        _delete_=True,
        type="exit_plugins.DynPerceiver",
        arch="dynperceiver_regnety_400mf",
        out_indices=(1, 2, 3),
        init_cfg=dict(type="Pretrained", checkpoint="timm://dynperceiver_regnety_400mf"),
    ),
    neck=dict(in_channels=[104, 208, 440]),
)
