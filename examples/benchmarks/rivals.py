"""Early exits beside what makes a network cheaper without them, at equal MACs and each in its fastest mode.

    python examples/benchmarks/rivals.py --threads 2 --json rivals.json

Two networks with exits run under a forced even mix (as many images leave at every exit): a Dyn-Perceiver, and exits on
its plain network. Beside each stand, with the MACs nearest to what its mix takes in the mean: a network of timm's, the
plain network on images of another size, and beside the first token merging in a vision transformer. earlyon runs the
same exits on the same network at the same thresholds. Everything is timed in torch (norms folded, channels_last), ONNX
Runtime and OpenVINO as far as it can be exported, all in turns; the fastest mode is reported. Weights are random: only
time and MACs are compared here; accuracy needs trained weights of all of them.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from adaptive import MIXES, forced_policy
from modes import MODES, OneExit, runner
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from token_merging import MergingTransformer
from torch import Tensor, nn

from exit_plugins import AdaptiveModel, ExitPolicy, add_exits, collect_exits, exit_costs
from exit_plugins.timm.layers import fold_batch_norms

try:
    from other_exits import same_exits
except ModuleNotFoundError as error:
    if error.name != "earlyon":
        raise
    same_exits = None

STATIC = ("regnety_002", "regnety_004", "regnety_006", "regnety_008", "regnety_016", "resnet18", "resnet34", "resnet50")
SIDES = range(64, 353, 32)
MERGED = range(0, 17)  # tokens a block

Maker = tuple[Callable[[], nn.Module], int | None]  # a plain network, and the side of its images where it is not theirs


@dataclass
class Rival:
    """One way to spend ``macs`` on each of ``images`` (N, C, H, W), in every mode it runs in."""

    name: str
    images: Tensor
    macs: float = 0.0
    modes: dict[str, Callable[[Tensor], object]] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # mode -> why


class Contest:
    """All rivals on the same images. ``groups`` hold those that stand beside each mix of exits, which is the first."""

    def __init__(self, modes: list[str], threads: int, images: Tensor) -> None:
        self.modes, self.threads, self.images = modes, threads, images
        self.rivals: dict[str, Rival] = {}
        self.groups: list[list[Rival]] = []

    def enter(self, name: str, model: nn.Module, side: int | None = None, mix: np.ndarray | None = None) -> Rival:
        """``model``, of whose images the shares ``mix`` leave at the early exits; None: no image does."""
        if name in self.rivals:
            return self.rivals[name]
        images = self.images if side is None else F.interpolate(self.images, (side, side), mode="bilinear")
        size = tuple(images.shape[1:])
        macs = exit_costs(model, size).macs
        rival = self.rivals[name] = Rival(name, images)
        for mode in self.modes:
            try:
                engine = runner(model, mode, size, self.threads)
                if mix is not None:
                    engine.policy = policy_for(engine, images, mix)
                exits = engine(images).exit_index
            except (ImportError, RuntimeError, ValueError, TypeError, NotImplementedError) as refusal:
                rival.refused[mode] = (str(refusal).strip() or type(refusal).__name__).splitlines()[0]
                continue
            rival.modes[mode], rival.macs = engine, float(np.mean([macs[int(k)] for k in exits]))
        if not rival.modes:
            raise SystemExit(f"{name} runs in none of the modes: {rival.refused}")
        return rival

    def nearest(self, macs: float, makers: dict[str, Maker]) -> Rival:
        """Of named plain networks the one whose MACs are nearest in ratio."""

        def distance(name: str) -> float:
            make, side = makers[name]
            shape = (side, side) if side else self.images.shape[2:]
            return abs(math.log(exit_costs(OneExit(make()), (3, *shape)).macs[0] / macs))

        name = min(makers, key=distance)
        make, side = makers[name]
        return self.enter(name, OneExit(make()), side)

    def earlyon(self, name: str, mix: Rival, ours: nn.Module, theirs: Any, shares: np.ndarray) -> Rival:
        """earlyon at the thresholds at which ours lets ``shares`` leave."""
        fused = runner(ours, "fused", tuple(self.images.shape[1:]), self.threads)
        policy = policy_for(fused, self.images, shares)
        theirs.config.confidence_thresholds = [float(threshold) for threshold in policy.thresholds[:-1]]
        fold_batch_norms(theirs.to(memory_format=torch.channels_last))
        rival = self.rivals[name] = Rival(name, self.images, mix.macs)
        rival.modes["one by one"] = lambda images: [theirs(image) for image in images.split(1)]
        rival.modes["until all are sure"] = theirs.forward_inference_batched
        exports = [mode for mode in self.modes if mode.startswith(("onnx", "openvino"))]
        rival.refused = dict.fromkeys(exports, "it leaves the network by an exception, which no graph holds")
        return rival


def policy_for(engine: AdaptiveModel, images: Tensor, shares: np.ndarray) -> ExitPolicy:
    """Modes round differently: each has its own thresholds, so that all let the same share leave."""
    targets = torch.zeros(len(images), dtype=torch.int64)
    return forced_policy(collect_exits(engine.runner, [(images, targets)], progress=False).confidence, shares)


def contest(args: argparse.Namespace) -> Contest:
    """Everyone who is to be timed."""
    model = timm.create_model(args.model).eval()
    shape = model.pretrained_cfg["input_size"]
    found = Contest(args.mode, args.threads, torch.randn(args.images, *shape) * torch.rand(args.images, 1, 1, 1) * 3)
    static: dict[str, Maker] = {
        f"{name} at {shape[-1]} px": (partial(timm.create_model, name), None) for name in STATIC
    }
    sizes: dict[str, Maker] = {f"{args.plain} at {s} px": (partial(timm.create_model, args.plain), s) for s in SIDES}
    sizes.pop(f"{args.plain} at {shape[-1]} px", None)  # that is no other size

    mix = found.enter(f"{args.model}, even mix", model, mix=MIXES["even"](model.num_exits))
    beside = [found.enter(f"{args.model}, all exits", model)]
    beside += [found.nearest(mix.macs, makers) for makers in (static, sizes)]
    transformer = timm.create_model(args.transformer).eval()
    merging: dict[str, Maker] = {
        f"{args.transformer}, {count} tokens merged a block": (partial(MergingTransformer, transformer, count), None)
        for count in MERGED
    }
    beside += [found.nearest(mix.macs, merging), found.enter(args.transformer, OneExit(transformer))]
    found.groups.append([mix, *beside])

    network, shares = timm.create_model(args.plain).eval(), MIXES["even"](len(args.layers) + 1)
    name = f"{args.plain} with exits, even mix"
    if same_exits is None:
        print("earlyon is left out, it is not installed: pip install earlyon==0.3.0")
        mix, beside = found.enter(name, add_exits(network, exits=args.layers).eval(), mix=shares), []
    else:
        ours, theirs = same_exits(network, args.layers, shape)
        mix = found.enter(name, ours, mix=shares)
        beside = [found.earlyon(f"{name}, earlyon", mix, ours, theirs, shares)]
    beside += [found.nearest(mix.macs, makers) for makers in (static, sizes)]
    beside.append(found.enter(f"{args.plain} at {shape[-1]} px", OneExit(network)))
    found.groups.append([mix, *beside])
    return found


def measure(found: Contest, batch: int, args: argparse.Namespace) -> list[dict]:
    """A row for everyone in every group: the fastest mode, and what the others took."""

    def over(run: Callable[[Tensor], object], images: Tensor) -> Callable[[], None]:
        return lambda: [run(part) for part in images.split(batch)] and None

    runs = {(r.name, mode): over(run, r.images) for r in found.rivals.values() for mode, run in r.modes.items()}
    times = {key: taken / args.images for key, taken in interleaved(runs, args.repeats, cpu_time=args.cpu_time).items()}
    rows = []
    for group in found.groups:
        fastest = {r.name: min(r.modes, key=lambda mode, r=r: np.median(times[r.name, mode])) for r in group}
        mix = group[0]
        for rival in dict.fromkeys(r.name for r in group):
            entry, taken = found.rivals[rival], times[rival, fastest[rival]]
            row = {
                "beside": mix.name,
                "name": rival,
                "batch": batch,
                "macs": entry.macs,
                "mode": fastest[rival],
                "per_image": spread(taken),
                "macs_over_mix": entry.macs / mix.macs,
                "time_over_mix": float(np.median(taken / times[mix.name, fastest[mix.name]])),
                "modes_ms": {mode: spread(times[rival, mode])["median_ms"] for mode in entry.modes},
                "refused": entry.refused,
            }
            rows.append(row)
            print(
                f"{rival:<56} {batch:>5} {row['macs'] / 1e9:>6.3f} {row['mode']:<18} "
                f"{row['per_image']['median_ms']:>8.2f} {row['per_image']['iqr_ms']:>6.2f} "
                f"{row['macs_over_mix']:>9.2f} {row['time_over_mix']:>9.2f}",
                flush=True,
            )
    return rows


@torch.inference_mode()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_800mf")
    parser.add_argument("--plain", default="regnety_008", help="its network without exits")
    parser.add_argument("--layers", nargs="+", default=["s1", "s2", "s3"], help="of it, behind which exits stand")
    parser.add_argument("--transformer", default="deit_tiny_patch16_224")
    parser.add_argument("--mode", nargs="+", default=["fused", "onnx", "openvino"], choices=MODES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7)
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    use_clock(args)
    found = contest(args)
    for rival in found.rivals.values():
        for mode, why in rival.refused.items():
            print(f"{rival.name} does not run in {mode}: {why}")
    print(f"{args.threads} threads; ms of an image are medians of {args.repeats} interleaved runs, in the fastest mode")
    print(f"{'':<56} {'batch':>5} {'GMACs':>6} {'mode':<18} {'ms/image':>8} {'iqr':>6} {'MACs/mix':>9} {'time/mix':>9}")
    rows = [row for batch in args.batch for row in measure(found, batch, args)]
    write_json(args.json, {"command": vars(args), "machine": machine(), "forced_mixes": True, "rows": rows})


if __name__ == "__main__":
    main()
