# The paper's baseline (table 4, mAP 38.5): the plain RegNetY-1.6GF, from the ImageNet weights of the RegNet paper.
_base_ = "./retinanet_dynperceiver_regnety_1_6gf_fpn_1x_coco.py"

model = dict(
    backbone=dict(
        _delete_=True,
        type="exit_plugins.TimmBackbone",
        arch="regnety_016",
        out_indices=(0, 1, 2, 3),
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type="Pretrained", checkpoint="timm://regnety_016.pycls_in1k"),
    ),
)
