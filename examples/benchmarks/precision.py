"""int8 and bfloat16 over float32 in OpenVINO, on trained networks: how much faster, and what it costs in accuracy.

    python examples/benchmarks/precision.py msdnet_cifar_batch.cifar100 --data torch/cifar100 --split test \\
        --threads 1 --batch 1 16 --json precision.json

The user's way throughout: `exit-plugins solve` finds a policy, `exit-plugins export` writes float32, int8 and bfloat16,
with thresholds solved again for the same budget, and says what that costs on images they were not solved on. Then the
exports take turns on images of --data: all to the last exit, and under each one's own policy. Several networks take as
many --data; a folder that timm saved is named local-dir:FOLDER. Exports take most of the time, on any machine:
--exports FOLDER keeps them, and times those it finds there.
"""

import argparse
import json
import tempfile
from contextlib import redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from modes import to_exit
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import default_collate

from exit_plugins.cli import main as exit_plugins_command
from exit_plugins.exits.export import LOWER_PRECISIONS, ExportedAdaptiveModel
from exit_plugins.timm.data import open_dataset
from exit_plugins.timm.images import input_config

TIMES = ("ms an image to the last exit", "speed-up", "ms an image under the policy", "speed-up ")
HEAD = ("network", "precision", "batch", *TIMES)


def export(name: str, data: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the exports of a network into ``folder``; what the command says of them."""
    words = [name, *([] if ":" in name else ["--pretrained"]), "--data", data, "--split", args.split]
    words += ["--limit", str(args.images)] if args.images else []
    policy = str(folder / "policy.json")
    _answer(["solve", *words, "--budget", args.budget, "-o", policy])
    words += ["--policy", policy, "--runtime", "openvino", "--output", str(folder / "float32")]
    for precision in args.precision:
        words += [f"--{precision}", str(folder / precision)]
    return _answer(["export", *words, "--calibration", str(args.calibration), "--max-drop", str(args.max_drop)])


def kept_export(name: str, data: str, args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """``export``, unless the folder holds one of the same network, images and settings."""
    settings = {"network": name, "data": data}
    settings |= {
        key: getattr(args, key) for key in ("split", "images", "precision", "budget", "calibration", "max_drop")
    }
    record = folder / "said.json"
    if record.is_file():
        kept: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if kept["settings"] != settings:
            raise SystemExit(f"{folder} holds exports with other settings: {kept['settings']}; name another --exports.")
    else:
        folder.mkdir(parents=True, exist_ok=True)
        kept = {"settings": settings, "said": export(name, data, args, folder)}
        write_json(str(record), kept)
    return kept["said"]


def _answer(words: list[str]) -> dict[str, Any]:
    with redirect_stdout(StringIO()) as answer:
        status = exit_plugins_command([*words, "--json"])
    if status:
        raise SystemExit(status)  # the command has said why
    said: dict[str, Any] = json.loads(answer.getvalue())
    return said


def images_of(data: str, split: str, model: ExportedAdaptiveModel, count: int) -> Tensor:
    """(count, C, H, W), drawn at random from the split."""
    config = input_config(model.model, None, None)
    view = open_dataset(data, split).with_transform(create_transform(**{**config, "is_training": False}))
    drawn = np.random.default_rng(1).permutation(len(view))[:count]
    return default_collate([view[int(item)][0] for item in drawn])


def under_policy(model: ExportedAdaptiveModel, batches: list[Tensor]) -> None:
    for batch in batches:
        model(batch)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="+", help="trained networks")
    parser.add_argument("--data", nargs="+", required=True, help="one for each network, as of exit-plugins")
    parser.add_argument("--split", default="test", help="that no network was trained on (default: test)")
    parser.add_argument("--images", type=int, help="of the split, drawn at random (default: all)")
    parser.add_argument("--precision", nargs="+", choices=LOWER_PRECISIONS, default=list(LOWER_PRECISIONS))
    parser.add_argument("--budget", default="60%", help="of the policy (default: %(default)s)")
    parser.add_argument("--calibration", type=int, default=300, help="images int8 ranges are set on")
    parser.add_argument("--max-drop", type=float, default=1.0, help="of the export; by default every fall is shown")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--timed", type=int, default=64, help="images the policies are timed on")
    parser.add_argument("--exports", metavar="FOLDER", help="keep the exports here, or time those that are here")
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args(argv)
    if len(args.data) != len(args.model):
        parser.error(f"{len(args.model)} networks need as many --data, got {len(args.data)}.")
    torch.manual_seed(0)
    use_clock(args)
    rows, accuracy = [], {}
    print(f"| {' | '.join(HEAD)} |")
    print("| --- " * len(HEAD) + "|")
    for name, data in zip(args.model, args.data, strict=True):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(args.exports or temporary, name.replace("/", "_"))
            said = kept_export(name, data, args, folder)
            accuracy[name] = {precision: said[precision] for precision in args.precision}
            names = ("float32", *args.precision)
            models = {each: ExportedAdaptiveModel(folder / each, threads=args.threads) for each in names}
        images = images_of(data, args.split, models["float32"], max(args.timed, *args.batch))
        last = models["float32"].model.num_exits - 1
        for batch in args.batch:
            runs = {("whole", each): partial(to_exit, model, last, images[:batch]) for each, model in models.items()}
            parts = list(images[: args.timed].split(batch))
            runs |= {("policy", each): partial(under_policy, model, parts) for each, model in models.items()}
            with torch.inference_mode():
                times = interleaved(runs, args.repeats, warmup=2, cpu_time=args.cpu_time)
            for each in names:
                found = {kind: times[kind, each] for kind in ("whole", "policy")}
                # Of the rounds, each against float32 in the same one.
                ratio = {kind: times[kind, "float32"] / value for kind, value in found.items()}
                row: dict[str, Any] = {"network": name, "precision": each, "batch": batch, "images": args.timed}
                for kind, value in found.items():
                    row |= {kind: spread(value), f"{kind}_speedup": float(np.median(ratio[kind]))}
                rows.append(row)
                count = {"whole": batch, "policy": args.timed}
                cells = [f"{row[k]['median_ms'] / count[k]:.2f} | {row[f'{k}_speedup']:.2f}" for k in found]
                print(f"| {name} | {each} | {batch} | {' | '.join(cells)} |", flush=True)
    print("\n| network | precision | accuracy | images | float32 [%] | here [%] | fall [points] | 95 % interval |")
    print("| --- " * 8 + "|")
    for name, found in accuracy.items():
        for each, figures in found.items():
            for where in ("at_last_exit", "under_policy"):
                figure = figures[where]
                numbers = [figure["float32"], figure[each], figure["drop"], *figure["interval"]]
                before, after, fall, low, high = (f"{100 * number:.2f}" for number in numbers)
                cells = [name, each, where.replace("_", " "), str(figure["samples"]), before, after, fall]
                print(f"| {' | '.join(cells)} | {low} to {high} |")
    write_json(args.json, {"command": vars(args), "machine": machine(), "accuracy": accuracy, "rows": rows})


if __name__ == "__main__":
    main()
