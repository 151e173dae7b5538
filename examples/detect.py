"""Find objects with a detector on a Dyn-Perceiver: print the boxes, and draw them into OUTPUT/vis.

Training and evaluation are MMDetection's own scripts; with the blood cells of BCCD in data/bccd:

    TOOLS=$(python -c "import mmdet, pathlib; print(pathlib.Path(mmdet.__file__).parent / '.mim/tools')")
    CONFIG=mm_configs/bccd/retinanet_dynperceiver_regnety_400mf_fpn_bccd.py
    python $TOOLS/train.py $CONFIG --work-dir runs/bccd
    python $TOOLS/test.py $CONFIG runs/bccd/epoch_72.pth
    python examples/detect.py data/bccd/images/BloodImage_00007.jpg --config $CONFIG --checkpoint runs/bccd/epoch_72.pth

A classification run of this package goes into train.py as the backbone's first weights by
``--cfg-options model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint=CHECKPOINT``.
"""

import argparse
from pathlib import Path

import torch
from mmdet.apis import DetInferencer
from mmdet.apis.det_inferencer import IMG_EXTENSIONS
from mmengine.config import Config, DictAction


def images_of(path: Path) -> list[Path]:
    """The image, or those lying in the folder, by name."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and file.suffix.lower() in IMG_EXTENSIONS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image", type=Path, help="an image, or a folder of images")
    parser.add_argument("--config", type=Path, required=True, help="the config it was trained with")
    parser.add_argument("--checkpoint", type=Path, required=True, help="the weights train.py wrote")
    parser.add_argument("--threshold", type=float, default=0.3, help="lowest score of a box")
    parser.add_argument("--output", type=Path, default=Path("runs/detect"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cfg-options", nargs="+", action=DictAction, default={}, help="settings to change, key=value")
    args = parser.parse_args()
    for path in (args.image, args.checkpoint):
        if not path.exists():
            parser.error(f"there is no {path}")
    images = images_of(args.image)
    if not images:
        parser.error(f"no images in {args.image}: expected files ending in {', '.join(IMG_EXTENSIONS)}")

    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options)
    detector = DetInferencer(model=config, weights=str(args.checkpoint), device=args.device, show_progress=False)
    # Of a folder the inferencer would take its own selection in the order of the file system.
    names = [str(image) for image in images]
    results = detector(names, out_dir=str(args.output), pred_score_thr=args.threshold)

    classes = detector.visualizer.dataset_meta["classes"]
    for image, found in zip(images, results["predictions"], strict=True):
        boxes = zip(found["scores"], found["labels"], found["bboxes"], strict=True)
        boxes = [box for box in boxes if box[0] >= args.threshold]
        print(f"{image.name}: {len(boxes)} boxes with a score of at least {args.threshold}")
        for score, label, corners in boxes:
            print(f"  {classes[label]} {score:.2f} at {', '.join(f'{corner:.0f}' for corner in corners)}")
    print(f"drawn in {args.output / 'vis'}")


if __name__ == "__main__":
    main()
