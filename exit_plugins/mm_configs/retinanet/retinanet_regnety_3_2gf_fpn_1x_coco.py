# The paper's larger baseline (table 4, mAP 39.3): the plain RegNetY-3.2GF.
_base_ = "./retinanet_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(arch="regnety_032", init_cfg=dict(checkpoint="timm://regnety_032.pycls_in1k")),
    neck=dict(in_channels=[72, 216, 576, 1512]),
)
