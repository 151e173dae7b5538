# Differs in the backbone: Dyn-Perceiver on ResNet-50 at half width; name your ImageNet weights.
_base_ = "./retinanet_dynperceiver_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="dynperceiver_resnet50_0_5x", init_cfg=dict(checkpoint="timm://dynperceiver_resnet50_0_5x")),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
