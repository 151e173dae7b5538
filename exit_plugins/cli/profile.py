"""Parameters, MACs and latency of every exit, beside the plain backbone where there is one.

Latency is wall-clock time to reach an exit when every image goes that far, median over repeats; the plain network is
timed in turns with the model, so that a drift of the machine touches both. With --modes every way this machine can run
the model is timed instead, in turns too, and the fastest is named.

example:
  exit-plugins profile dynperceiver_regnety_400mf --batch-size 1 --threads 1
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import timm
import torch
from numpy.typing import NDArray
from torch import nn

from ..exits.costs import exit_costs, exit_latency
from ..timm.video import temporal_shift
from .common import (
    add_json_argument,
    amount,
    print_json,
    print_table,
)
from .models import Classifier, add_model_arguments, data_config, open_model, whole
from .modes import MODES, recommended, time_modes

# What a user would have run instead: name of ours (its beginning) -> timm's network without exits.
PLAIN = {
    "dynperceiver_regnety_400mf": "regnety_004",
    "dynperceiver_regnety_800mf": "regnety_008",
    "dynperceiver_regnety_1_6gf": "regnety_016",
    "dynperceiver_regnety_3_2gf": "regnety_032",
    "dynperceiver_mobilenetv3_0_75x": "mobilenetv3_large_075",
    "dynperceiver_mobilenetv3_1_0x": "mobilenetv3_large_100",
    "dvt_deit_small": "deit_small_patch16_224",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument("--batch-size", type=whole(1), default=1, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=whole(1), default=20, metavar="N", help="timed runs (default: %(default)s)")
    parser.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads")
    parser.add_argument(
        "--plain", metavar="NAME", help="timm network to compare with (default: the model's own backbone)"
    )
    timed = parser.add_mutually_exclusive_group()
    timed.add_argument("--no-latency", action="store_true", help="count only")
    timed.add_argument("--modes", action="store_true", help=f"time every way to run it: {', '.join(MODES)}")
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if args.threads:
        torch.set_num_threads(args.threads)
    model = open_model(args, needs_weights=False)
    size = data_config(args, model)["input_size"]
    if args.modes:
        return _modes(args, model, size)
    plain = _plain_network(args, model, size)
    found = _counted(args, model, plain, size)
    if not args.no_latency:
        images = _images(args, model, size)
        latency, plain_latency = _in_turns(model, plain, images, args.repeats)
        for row, seconds in zip(found["exits"], latency, strict=True):
            row["latency"] = seconds
        if plain is not None:
            found["plain"]["latency"] = plain_latency
    if args.json:
        print_json(found)
    else:
        _print(args, found)
    return 0


def _images(args: argparse.Namespace, model: Classifier, size: Sequence[int]) -> torch.Tensor:
    images = torch.randn((args.batch_size, *size), generator=torch.Generator().manual_seed(0))
    return images.to(next(model.parameters()).device)


def _modes(args: argparse.Namespace, model: Classifier, size: Sequence[int]) -> int:
    """Time every mode; print a line for each and name the fastest."""
    latency, refused = time_modes(model, _images(args, model, size), args.repeats)
    best = recommended(latency)
    found = {
        "model": args.model,
        "input_size": list(size),
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "modes": [{"mode": name, "latency": times} for name, times in latency.items()],
        "refused": refused,
        "recommended": best,
    }
    if args.json:
        print_json(found)
        return 0
    threads = f"{found['threads']} thread{'s' if found['threads'] > 1 else ''}"
    print(f"{args.model} at {'x'.join(map(str, size))}, batch {args.batch_size}, {threads}: time to each exit")
    rows = [
        [name, *(amount(seconds, "s") for seconds in times), f"{times.mean() / latency['plain'].mean():.2f}x"]
        for name, times in latency.items()
    ]
    print_table(["mode", *(f"exit {k + 1}" for k in range(model.num_exits)), "mean/plain"], rows)
    for name, why in refused.items():
        print(f"{name} does not run here: {why}")
    print(f"fastest here: {best} ({MODES[best]})")
    return 0


def _plain_network(args: argparse.Namespace, model: Classifier, size: Sequence[int]) -> nn.Module | None:
    """What a user would have run instead, as a model of one exit; None where nothing is named and none is known."""
    name = args.plain or next((plain for ours, plain in PLAIN.items() if args.model.startswith(ours)), None)
    if name is None:
        return None
    plain = timm.create_model(name, num_classes=model.num_classes, in_chans=size[-3])
    if len(size) == 4:  # the rival on clips has the shift too
        plain = temporal_shift(plain, size[0])
    return _Single(name, plain).to(next(model.parameters()).device).eval()


def _counted(
    args: argparse.Namespace, model: Classifier, plain: nn.Module | None, size: Sequence[int]
) -> dict[str, Any]:
    costs = exit_costs(model, size)
    found = {
        "model": args.model,
        "input_size": list(size),
        "batch_size": args.batch_size,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "exits": [
            {"exit": k + 1, "macs": m, "params": int(p)}
            for k, (m, p) in enumerate(zip(costs.macs, costs.params, strict=True))
        ],
        "plain": None,
    }
    if plain is not None:
        found["plain"] = {
            "name": plain.name,
            "macs": exit_costs(plain, size).macs[0],
            "params": sum(p.numel() for p in plain.parameters()),
        }
    return found


def _print(args: argparse.Namespace, found: dict[str, Any]) -> None:
    print(
        f"{args.model} at {'x'.join(map(str, found['input_size']))}: {amount(found['parameters'], '')} parameters, "
        f"batch {args.batch_size}, {found['threads']} threads"
    )
    rows = [_row(f"exit {row['exit']}", row, found["plain"]) for row in found["exits"]]
    if found["plain"]:
        rows.append(_row(f"plain {found['plain']['name']}", found["plain"], None))
    head = ["", "parameters", "MACs", *([] if args.no_latency else ["latency"])]
    if found["plain"]:
        head += ["MACs/plain", *([] if args.no_latency else ["time/plain"])]
    print_table(head, [row[: len(head)] + [""] * (len(head) - len(row)) for row in rows])


def _row(name: str, row: dict[str, Any], plain: dict[str, Any] | None) -> list[str]:
    cells = [name, amount(row["params"], ""), amount(row["macs"], "")]
    if "latency" in row:
        cells.append(amount(row["latency"], "s"))
    if plain is not None:
        cells.append(f"{row['macs'] / plain['macs']:.2f}x")
        if "latency" in row:
            cells.append(f"{row['latency'] / plain['latency']:.2f}x")
    return cells


class _Single(nn.Module):
    """A plain network as a model of one exit, so that it is counted and timed as the others are."""

    num_exits = 1

    def __init__(self, name: str, network: nn.Module) -> None:
        super().__init__()
        self.name = name
        self.network = network
        self.sample_ndim = getattr(network, "sample_ndim", 3)

    def begin_exits(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def forward_exit(self, index: int, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.network(state), state


def _in_turns(
    model: Classifier, plain: nn.Module | None, images: torch.Tensor, repeats: int
) -> tuple[NDArray[Any], float | None]:
    """Latency (K,) of the model and of the plain network, measured in alternating rounds."""
    rounds = min(4, repeats)
    ours, theirs = [], []
    started = time.perf_counter()
    for index in range(rounds):
        count = repeats // rounds + (index < repeats % rounds)
        ours.append(exit_latency(model, images, repeats=count, warmup=2 if index == 0 else 0))
        if plain is not None:
            theirs.append(exit_latency(plain, images, repeats=count, warmup=2 if index == 0 else 0)[0])
        if time.perf_counter() - started > 120:
            break
    return np.median(ours, axis=0), float(np.median(theirs)) if theirs else None
