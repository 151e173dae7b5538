# Dyn-Perceiver on RegNetY-400MF from random weights, so that nothing is frozen.
_base_ = "../_base_/retinanet_bccd.py"

model = dict(
    backbone=dict(_delete_=True, type="exit_plugins.DynPerceiver", arch="dynperceiver_regnety_400mf"),
    neck=dict(in_channels=[48, 104, 208, 440]),
)
