"""Bring an image folder into the layout of VTAB-1k: 800 training, 200 validation and the test images, as lists.

    python examples/image_lists.py --data caltech101 --output vtab-1k/caltech101
    python examples/vtab.py --root vtab-1k --datasets caltech101 --model ...

``--data`` holds train/ and test/ (or val/), each with one folder per class. Images are linked, not copied.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from torchvision.datasets.folder import IMG_EXTENSIONS


def images_of(folder: Path, classes: list[str]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in IMG_EXTENSIONS
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--train", type=int, default=800)
    parser.add_argument("--val", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    test_folder = next((args.data / name for name in ("test", "val") if (args.data / name).is_dir()), None)
    if test_folder is None or not (args.data / "train").is_dir():
        raise SystemExit(f"{args.data} has no train/ beside test/ or val/; expected one folder per class in each.")
    classes = sorted(path.name for path in (args.data / "train").iterdir() if path.is_dir())
    training = images_of(args.data / "train", classes)
    if len(training) < args.train + args.val:
        raise SystemExit(
            f"{args.data}/train holds {len(training)} images, and {args.train} + {args.val} were asked for."
        )
    order = np.random.default_rng(args.seed).permutation(len(training))
    training = [training[i] for i in order[: args.train + args.val]]
    parts = {"train800": training[: args.train], "val200": training[args.train :], "train800val200": training}
    parts["test"] = images_of(test_folder, classes)
    for part, samples in parts.items():
        home = "test" if part == "test" else "train800val200"
        (args.output / "images" / home).mkdir(parents=True, exist_ok=True)
        offset = args.train if part == "val200" else 0
        lines = []
        for number, (path, label) in enumerate(samples, offset):
            target = Path("images", home, f"{number:06d}{path.suffix.lower()}")
            if not (args.output / target).exists():
                os.symlink(path.resolve(), args.output / target)
            lines.append(f"{target.as_posix()} {label}\n")
        (args.output / f"{part}.txt").write_text("".join(lines))
    print(f"{len(classes)} classes, " + ", ".join(f"{len(samples)} in {part}.txt" for part, samples in parts.items()))


if __name__ == "__main__":
    main()
