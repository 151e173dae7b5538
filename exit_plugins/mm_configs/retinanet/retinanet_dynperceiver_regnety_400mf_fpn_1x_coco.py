# Differs in the backbone: Dyn-Perceiver on RegNetY-400MF; name your ImageNet weights.
_base_ = "./retinanet_dynperceiver_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="dynperceiver_regnety_400mf", init_cfg=dict(checkpoint="timm://dynperceiver_regnety_400mf")),
    neck=dict(in_channels=[48, 104, 208, 440]),
)
