# Differs in the backbone: Dyn-Perceiver on RegNetY-800MF, from the weights its authors published.
_base_ = "./retinanet_dynperceiver_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="dynperceiver_regnety_800mf", init_cfg=dict(checkpoint="timm://dynperceiver_regnety_800mf")),
    neck=dict(in_channels=[64, 144, 320, 784]),
)
