"""Classify a folder or parquet files of images on as many machines as Ray has, and go on where a run was stopped.

    python examples/batch_inference_ray.py msdnet_cifar_batch.cifar100 photos/ --output answers --workers 8
    python examples/batch_inference_ray.py exported/ shards/ --column image --output answers --address auto

The source is what BatchPredictor takes: an export, a policy file (with --checkpoint), a card, or a shipped network. The
images lie where every machine sees them. Each block of files becomes one parquet file, whole or not at all; the blocks
that are there already are not answered again. At the end the shares of the exits of all blocks are printed.
"""

import argparse
import hashlib
import json
import time
from itertools import groupby, islice
from pathlib import Path

import pyarrow as pa
import ray
from pyarrow import compute, parquet

from exit_plugins.exits.files import atomic_path
from exit_plugins.timm.images import EXTENSIONS
from exit_plugins.timm.predictor import BatchPredictor
from exit_plugins.timm.sources import iterate_images


class BlockWriter:
    """An actor: answers one block of files after the other, with a model that is loaded once."""

    def __init__(self, batch_size: int, **predictor) -> None:
        self.batch_size, self.predictor = batch_size, BatchPredictor(**predictor)

    def __call__(self, block: dict) -> dict:
        start = time.perf_counter()
        answered = [self.table(batch) for file in block["files"] for batch in self.batches(file)]
        with atomic_path(block["target"]) as temporary:
            parquet.write_table(pa.concat_tables(answered), temporary)
        seconds = time.perf_counter() - start
        return {"target": block["target"], "images": sum(map(len, answered)), "seconds": seconds}

    def table(self, batch: dict) -> pa.Table:
        # What an unreadable image has no value of is null in the file, not a number that equals nothing.
        return pa.table({name: pa.array(of, from_pandas=True) for name, of in self.predictor(batch).items()})

    def batches(self, files: list[str]):
        if files[0].endswith(".parquet"):
            for batch in parquet.ParquetFile(files[0]).iter_batches(self.batch_size):
                yield batch.to_pydict()
        else:
            yield {"path": files, self.predictor.column: files}


def blocks(args: argparse.Namespace, options: dict) -> list[dict]:
    """Files cut into blocks, each with a name that says which files and options it answers."""
    files = (item.path for item in iterate_images(args.images, (*EXTENSIONS, ".parquet")))
    found = []
    for is_table, group in groupby(files, lambda path: path.endswith(".parquet")):
        while chunk := list(islice(group, 1 if is_table else args.block_size)):
            name = hashlib.blake2b(json.dumps([options, chunk]).encode(), digest_size=8).hexdigest()
            batches = [chunk[start : start + args.batch_size] for start in range(0, len(chunk), args.batch_size)]
            found.append({"files": batches, "target": str(Path(args.output).resolve() / f"{name}.parquet")})
    return found


def answered_by_actors(left: list[dict], workers: int, **predictor) -> ray.data.Dataset:
    """A row for each block that was written, as they come."""
    pool = ray.data.ActorPoolStrategy(size=min(workers, len(left)))
    data = ray.data.from_items(left, override_num_blocks=len(left))
    return data.map(BlockWriter, fn_constructor_kwargs=predictor, compute=pool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("images", nargs="+", help="folders, patterns, lists")
    parser.add_argument("--output", required=True, help="folder for the answers")
    parser.add_argument("--checkpoint", help="weights for a policy file")
    parser.add_argument("--mode", default="fused")
    parser.add_argument("--column", default="bytes", help="of parquet files: where the images are")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--block-size", type=int, default=4096, help="images to a parquet file")
    parser.add_argument("--address", help="of a running Ray cluster; default: start one here")
    args = parser.parse_args()
    options = {"source": args.source, "checkpoint": args.checkpoint, "mode": args.mode, "column": args.column}
    every = blocks(args, options)
    left = [block for block in every if not Path(block["target"]).exists()]
    print(f"{len(every)} blocks, {len(every) - len(left)} of them answered already")
    if left:
        ray.init(address=args.address, num_cpus=None if args.address else args.workers, include_dashboard=False)
        for row in answered_by_actors(left, args.workers, batch_size=args.batch_size, **options).iter_rows():
            print(f"{row['images']} images in {row['seconds']:.2f} s: {row['target']}")
    exits: dict[int, int] = {}
    for block in every:
        for entry in compute.value_counts(parquet.read_table(block["target"], columns=["exit"])["exit"]).to_pylist():
            exits[entry["values"]] = exits.get(entry["values"], 0) + entry["counts"]
    answered = sum(count for number, count in exits.items() if number)
    print(f"{answered} images answered, {exits.get(0, 0)} not readable")
    print(", ".join(f"exit {k}: {100 * count / answered:.2f}%" for k, count in sorted(exits.items()) if k))


if __name__ == "__main__":
    main()
