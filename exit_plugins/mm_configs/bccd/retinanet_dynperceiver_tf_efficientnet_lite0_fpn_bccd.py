# Dyn-Perceiver over EfficientNet-Lite0: the network from the same ImageNet weights, the latents' part from random ones.
# The network's last 1x1 convolution belongs to the last stage.
_base_ = "../_base_/retinanet_bccd_lite.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="exit_plugins.DynPerceiver",
        arch="dynperceiver",
        model_args=dict(backbone="tf_efficientnet_lite0"),
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="package://tf_efficientnet_lite0"),
    ),
    neck=dict(in_channels=[24, 40, 112, 1280]),
)
