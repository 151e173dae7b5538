# RetinaNet on BCCD, 364 photographs of blood cells at 640x480 (MIT licence), from random weights.
# The folder $BCCD_ROOT (default data/bccd) holds images/, train.json, val.json and test.json in COCO's format.
# Differs from MMDetection's RetinaNet 1x in data, classes and schedule: AdamW and cosine, as from random weights SGD's
# 12 epochs of 205 images are too few.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["exit_plugins.mmdet"])

data_root = "{{$BCCD_ROOT:data/bccd}}/"
metainfo = dict(classes=("RBC", "WBC", "Platelets"), palette=[(220, 20, 60), (65, 105, 225), (255, 165, 0)])
image_scale = (640, 480)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    # Cells look alike from every side.
    dict(type="RandomFlip", prob=[0.25, 0.25, 0.25], direction=["horizontal", "vertical", "diagonal"]),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=image_scale, keep_ratio=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="train.json",
        data_prefix=dict(img="images/"),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="val.json",
        data_prefix=dict(img="images/"),
        pipeline=test_pipeline,
    )
)
test_dataloader = dict(
    dataset=dict(
        data_root=data_root,
        metainfo=metainfo,
        ann_file="test.json",
        data_prefix=dict(img="images/"),
        pipeline=test_pipeline,
    )
)
val_evaluator = dict(ann_file=data_root + "val.json")
test_evaluator = dict(ann_file=data_root + "test.json")

model = dict(bbox_head=dict(num_classes=3))

max_epochs = 72
train_cfg = dict(max_epochs=max_epochs, val_interval=4)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=5e-4, weight_decay=0.05),
    clip_grad=dict(max_norm=10.0),
)
auto_scale_lr = dict(base_batch_size=8)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type="CosineAnnealingLR", eta_min=1e-6, by_epoch=True, begin=0, end=max_epochs, convert_to_iter_based=True),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=4, max_keep_ckpts=2, save_best="coco/bbox_mAP"))
vis_backends = [dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")]
visualizer = dict(vis_backends=vis_backends)
