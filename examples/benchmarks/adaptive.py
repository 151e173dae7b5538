"""How much of the ideal speed-up AdaptiveModel delivers, over forced mixes of exits, in every way of running.

    python examples/benchmarks/adaptive.py --mode eager fused openvino --batch 1 8 32 128 --json adaptive.json

Speed-up is the time of the full network over that of the adaptive run on the same images. Ideal is what the same mix
would give if deciding and dropping cost nothing, full / sum(share leaving at an exit * its cost): once with the time
measured of running full batches to each exit and no further (what the engine itself loses) and once with MACs (the
whole, hardware included). All modes take turns in one run, so that their times compare as well.

The mixes are forced: thresholds are set at quantiles of an untrained model's confidences so that the wanted share of
images leaves at each exit, in whatever order they come. They say nothing about accuracy.
"""

import argparse
import copy
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import numpy as np
import timm
import torch
from modes import MODES, runner, to_exit
from timing import add_clock_arguments, interleaved, machine, spread, synchronize, use_clock, write_json
from torch import Tensor

from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits, exit_costs

MIXES = {  # share leaving at the first exits, for any number of them; the rest goes to the last
    "nobody": lambda k: np.zeros(k - 1),
    "few": lambda k: np.full(k - 1, 0.25 / (k - 1)),
    "even": lambda k: np.full(k - 1, 1 / k),
    "most": lambda k: np.r_[0.6, np.full(k - 2, 0.3 / max(k - 2, 1))],
    "everybody": lambda k: np.r_[1.0, np.zeros(k - 2)],
}


def forced_policy(confidence: np.ndarray, shares: np.ndarray) -> ExitPolicy:
    """Thresholds at which the given shares of the samples leave at the early exits."""
    waiting = np.arange(confidence.shape[1])
    thresholds = []
    for sure, share in zip(confidence, shares, strict=False):
        count = min(round(share * confidence.shape[1]), len(waiting))
        order = waiting[np.argsort(-sure[waiting])]
        if count == 0:
            thresholds.append(np.inf)
        elif count == len(order):
            thresholds.append(-np.inf)
        else:
            thresholds.append((sure[order[count - 1]] + sure[order[count]]) / 2)
        waiting = order[count:]
    return ExitPolicy([*thresholds, -np.inf])


def over(batches: tuple[Tensor, ...], run: Callable[[Tensor], object], calls: list[float]) -> Callable[[], None]:
    """One pass over the pool; the seconds of every call go to ``calls``."""

    def go() -> None:
        for images in batches:
            start = time.perf_counter()
            run(images)
            synchronize(images.device)
            calls.append(time.perf_counter() - start)

    return go


@torch.inference_mode()
def measure(
    models: dict[str, AdaptiveModel], macs: np.ndarray, pool: Tensor, batch: int, args: argparse.Namespace
) -> list[dict]:
    """One row per mode and mix for one batch size; ``models`` are the modes', none of which leaves early."""
    num_exits = len(macs)
    batches = pool.split(batch)
    runs, engines, calls = {}, {}, defaultdict(list)
    for mode, nobody in models.items():
        # Modes round differently: each has its own thresholds, so that all let the same share leave.
        with torch.autocast(pool.device.type, nobody.dtype, enabled=nobody.dtype is not None):
            sure = collect_exits(nobody.runner, [(pool, torch.zeros(len(pool)).long())], progress=False).confidence
        for exit_index in range(num_exits):
            runs[mode, exit_index] = over(batches, partial(to_exit, nobody, exit_index), calls[mode, exit_index])
        for mix in args.mix:
            engine = engines[mode, mix] = copy.copy(nobody)
            engine.policy = forced_policy(sure, MIXES[mix](num_exits))
            if args.measure:
                engine.time_segments(batches[0])
            runs[mode, mix] = over(batches, engine, calls[mode, mix])
    exits = {key: torch.cat([engine(b).exit_index for b in batches]).cpu() for key, engine in engines.items()}
    times = interleaved(runs, args.repeats, device=pool.device, cpu_time=args.cpu_time)
    measured_calls = args.repeats * len(batches)  # without those that warmed up
    rows = []
    for mode, mix in engines:
        share = np.bincount(exits[mode, mix], minlength=num_exits) / len(pool)
        full = times[mode, num_exits - 1]
        to_exits = np.array([np.median(times[mode, exit_index]) for exit_index in range(num_exits)])
        measured = full / times[mode, mix]
        ideal = to_exits[-1] / (share @ to_exits)
        rows.append(
            {
                "mode": mode,
                "mix": mix,
                "batch": batch,
                "share": share.round(3).tolist(),
                "speedup": float(np.median(measured)),
                "speedup_iqr": float(np.subtract(*np.percentile(measured, [75, 25]))),
                "ideal": float(ideal),
                "ideal_macs": float(macs[-1] / (share @ macs)),
                "of_ideal": float(np.median(measured) / ideal),
                "over_first_mode": float(np.median(times[args.mode[0], mix] / times[mode, mix])),
                "per_call": spread(calls[mode, mix][-measured_calls:]),
                "full_per_call": spread(calls[mode, num_exits - 1][-measured_calls:]),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_400mf")
    parser.add_argument("--mode", nargs="+", default=["fused"], choices=MODES)
    parser.add_argument("--mix", nargs="+", default=list(MIXES), choices=MIXES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--size", type=int, help="image side in pixels; default the model's own")
    parser.add_argument("--images", type=int, default=64, help="size of the pool, rounded to a multiple of the batch")
    parser.add_argument("--repeats", type=int, default=15)
    add_clock_arguments(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--measure", action="store_true", help="drop samples only where measured times say it pays")
    parser.add_argument("--json")
    args = parser.parse_args()

    torch.manual_seed(0)
    use_clock(args)
    model = timm.create_model(args.model).eval().to(args.device)
    channels, height, width = model.pretrained_cfg["input_size"]
    size = (channels, args.size or height, args.size or width)
    macs = exit_costs(model, size).macs
    models = {mode: runner(model, mode, size, args.threads) for mode in args.mode}
    rows = []
    print(f"{args.model}, forced mixes, {args.threads} threads, {args.device}")
    print(
        f"{'mode':<17} {'batch':>5} {'mix':<10} {'speed-up':>8} {'iqr':>6} {'ideal':>6} {'of it':>6} {'MACs':>6} "
        f"{'p50 ms':>8} {'p95 ms':>8}  over {args.mode[0]}"
    )
    for batch in args.batch:
        count = max(args.images // batch, 1) * batch
        pool = torch.randn(count, *size, device=args.device)
        contrast = torch.rand(count, 1, 1, 1, device=args.device) * 3
        for row in measure(models, macs, pool * contrast, batch, args):
            rows.append(row)
            print(
                f"{row['mode']:<17} {row['batch']:>5} {row['mix']:<10} {row['speedup']:>8.3f} "
                f"{row['speedup_iqr']:>6.3f} {row['ideal']:>6.3f} {row['of_ideal']:>6.3f} {row['ideal_macs']:>6.3f} "
                f"{row['per_call']['median_ms']:>8.2f} {row['per_call']['p95_ms']:>8.2f}  "
                f"{row['over_first_mode']:.2f}",
                flush=True,
            )
    write_json(args.json, {"command": vars(args), "machine": machine(args.device), "forced_mixes": True, "rows": rows})


if __name__ == "__main__":
    main()
