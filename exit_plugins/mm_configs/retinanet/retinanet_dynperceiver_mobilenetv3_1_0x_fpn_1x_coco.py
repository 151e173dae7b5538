# Differs in the backbone: Dyn-Perceiver on MobileNetV3-Large; name your ImageNet weights. Its stages end at strides 8,
# 16, 32 and 32, so the pyramid starts at the first and takes the last of the two at stride 32.
_base_ = "./retinanet_dynperceiver_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        arch="dynperceiver_mobilenetv3_1_0x",
        out_indices=(0, 1, 3),
        init_cfg=dict(checkpoint="timm://dynperceiver_mobilenetv3_1_0x"),
    ),
    neck=dict(in_channels=[40, 80, 960], start_level=0),
)
