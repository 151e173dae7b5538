"""What Ray adds to examples/batch_inference_ray.py: start-up, and the time between the blocks.

    python examples/benchmarks/ray_overhead.py --images 520000 --workers 2 --json ray.json

Give so many images that start-up is below 5 % of the run; what it was is printed.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import ray
from batch_inference_ray import answered_by_actors
from serve_load import pictures

EXAMPLES = str(Path(__file__).resolve().parents[1])


def measure(source: str, images: int, workers: int, block_size: int, batch_size: int) -> dict:
    """Figures of one run over ``images`` small images."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for number, picture in enumerate(pictures(256)):
            files.append(str(Path(folder, f"{number}.png")))
            Path(files[-1]).write_bytes(picture)
        blocks = []
        for first in range(0, images, block_size):
            names = [files[i % len(files)] for i in range(first, min(first + block_size, images))]
            batches = [names[i : i + batch_size] for i in range(0, len(names), batch_size)]
            blocks.append({"files": batches, "target": str(Path(folder, f"{first}.parquet"))})
        # The workers import the actor's class from there too.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [EXAMPLES, os.environ.get("PYTHONPATH")]))
        start = time.perf_counter()
        ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False)
        startup, answering = None, 0.0
        for row in answered_by_actors(blocks, workers, batch_size=batch_size, source=source).iter_rows():
            if startup is None:
                startup = time.perf_counter() - start - row["seconds"]
            answering += row["seconds"]
        total = time.perf_counter() - start
        ray.shutdown()
    batches = sum(len(block["files"]) for block in blocks)
    between = total - startup - answering / workers
    return {
        "images": images,
        "workers": workers,
        "seconds": total,
        "images_per_second": images / total,
        "startup_share": startup / total,
        "between_share": between / total,
        "between_ms_per_batch": 1000 * between * workers / batches,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="msdnet_cifar_batch.cifar100")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--block-size", type=int, default=4096)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--json", help="write the figures here as well")
    args = parser.parse_args()
    found = measure(args.source, args.images, args.workers, args.block_size, args.batch_size)
    print(json.dumps(found, indent=2))
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=2) + "\n")
