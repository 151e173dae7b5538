# The plain RegNetY-400MF from random weights.
_base_ = "../_base_/retinanet_bccd_small.py"

model = dict(
    backbone=dict(_delete_=True, type="exit_plugins.TimmBackbone", arch="regnety_004"),
    neck=dict(in_channels=[48, 104, 208, 440]),
)
