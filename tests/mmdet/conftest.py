"""A detection data set drawn on the spot: coloured rectangles and discs, in the layout the BCCD configs read."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

CLASSES = ("RBC", "WBC", "Platelets")
COLOURS = ((220, 60, 60), (70, 70, 220), (240, 200, 60))
SIZE = (128, 96)


def _write_split(root: Path, split: str, count: int, rng: np.random.Generator) -> None:
    images, annotations = [], []
    for index in range(count):
        picture = Image.fromarray(rng.integers(150, 200, (SIZE[1], SIZE[0], 3), dtype=np.uint8))
        draw = ImageDraw.Draw(picture)
        name = f"{split}_{index}.jpg"
        images.append(dict(id=index, file_name=name, width=SIZE[0], height=SIZE[1]))
        for _ in range(4):
            label = int(rng.integers(3))
            width, height = (int(v) for v in rng.integers(20, 40, 2))
            x, y = int(rng.integers(0, SIZE[0] - width)), int(rng.integers(0, SIZE[1] - height))
            (draw.ellipse if label else draw.rectangle)((x, y, x + width, y + height), fill=COLOURS[label])
            annotations.append(
                dict(
                    id=len(annotations),
                    image_id=index,
                    category_id=label + 1,
                    bbox=[x, y, width, height],
                    area=width * height,
                    iscrowd=0,
                )
            )
        picture.save(root / "images" / name)
    categories = [dict(id=index + 1, name=name) for index, name in enumerate(CLASSES)]
    (root / f"{split}.json").write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Root of the data set: images/, train.json, val.json, test.json."""
    root = tmp_path_factory.mktemp("shapes")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 3), ("test", 3)):
        _write_split(root, split, count, rng)
    return root
