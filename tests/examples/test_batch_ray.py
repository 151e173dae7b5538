"""Images answered by two actors of Ray, from files and from parquet, in blocks that are not answered twice."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from exit_plugins.timm.predictor import BatchPredictor

pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
EXAMPLE = Path(__file__).parents[2] / "examples" / "batch_inference_ray.py"
SHIPPED = "msdnet_cifar_batch.cifar100"


def run(*words) -> str:
    # Ray lets its workers stand back behind everything else on the machine (nice 15), tests beside them too.
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    done = subprocess.run(
        [sys.executable, EXAMPLE, SHIPPED, *map(str, words)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_blocks_are_answered_by_two_actors_and_once(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(10):
        pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "7.png").write_bytes(b"no image")
    words = [tmp_path / "images", "--output", tmp_path / "out", "--block-size", "3", "--batch-size", "2"]
    said = run(*words)
    assert "4 blocks, 0 of them" in said and "9 images answered, 1 not readable" in said
    table = parquet.read_table(tmp_path / "out").sort_by("path").to_pydict()
    paths = [str(tmp_path / "images" / f"{number}.png") for number in range(10)]
    answers = BatchPredictor(SHIPPED, device="cpu")({"bytes": paths})
    assert table["path"] == paths and table["class"] == answers["class"].tolist()
    assert table["exit"] == answers["exit"].tolist() and "7.png is not an image" in table["error"][7]
    assert table["confidence"][7] is None and table["macs"][7] is None
    shares = re.findall(r"exit (\d): ([\d.]+)%", said)
    assert {int(k): round(float(s) * 9 / 100) for k, s in shares} == {
        int(k): int((answers["exit"] == k).sum()) for k in set(answers["exit"]) - {0}
    }
    # Nothing is answered twice; where one block of four is missing, that one is.
    first, *others = sorted((tmp_path / "out").iterdir())
    times, content = [path.stat().st_mtime_ns for path in others], parquet.read_table(first)
    assert "4 of them answered already" in run(*words)
    first.unlink()
    # The same images as bytes in a parquet file are one block more.
    good = [path for path in paths if not path.endswith("7.png")]
    rows = {"path": good, "bytes": [Path(path).read_bytes() for path in good]}
    (tmp_path / "table").mkdir()
    parquet.write_table(pa.table(rows), tmp_path / "table" / "0.parquet")
    said = run(tmp_path / "images", tmp_path / "table", *words[1:])
    assert "5 blocks, 3 of them answered already" in said and "18 images answered, 1 not readable" in said
    assert parquet.read_table(first) == content and [path.stat().st_mtime_ns for path in others] == times
