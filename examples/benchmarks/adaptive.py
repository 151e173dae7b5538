"""How much of the ideal speed-up AdaptiveModel delivers, over five forced mixes of exits.

    python examples/benchmarks/adaptive.py --model dynperceiver_regnety_400mf --batch 1 8 32 128 --json adaptive.json

Speed-up is the time of the full network over that of the adaptive run on the same images. Ideal is what the same mix
would give if leaving cost nothing: full / sum(share reaching a segment * its cost), once with the measured time of the
segments on full batches (what the engine itself loses) and once with MACs (the whole, hardware included).

The mixes are forced: thresholds are set at quantiles of an untrained model's confidences so that the wanted share of
images leaves at each exit, in whatever order they come. They say nothing about accuracy.
"""

import argparse

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json

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


class Segments:
    """The segments of a model on full batches, one callable each, with the state they start from kept."""

    def __init__(self, model: torch.nn.Module, images: torch.Tensor) -> None:
        self.model, self.images, self.states = model, images, []
        state = model.begin_exits(images)
        for index in range(model.num_exits):
            self.states.append(state)
            _, state = model.forward_exit(index, state)

    def run(self, index: int) -> None:
        state = self.model.begin_exits(self.images) if index == 0 else self.states[index]
        self.model.forward_exit(index, state)


@torch.inference_mode()
def measure(
    model: torch.nn.Module, pool: torch.Tensor, batch: int, repeats: int, lazy: bool, cpu_time: bool, options: dict
) -> list[dict]:
    """One row per mix for one batch size."""
    device = pool.device
    num_exits = model.num_exits
    macs = np.diff(exit_costs(model, tuple(pool.shape[1:])).macs, prepend=0)
    labels = torch.zeros(len(pool), dtype=torch.int64)
    sure = collect_exits(model, [(pool, labels)], progress=False).confidence
    batches = pool.split(batch)
    policies = {name: forced_policy(sure, mix(num_exits)) for name, mix in MIXES.items()}
    engines = {name: AdaptiveModel(model, policy, **options) for name, policy in policies.items()}
    if lazy:
        for engine in engines.values():
            engine.measure(batches[0])
    exits = {name: torch.cat([engine(b).exit_index for b in batches]).cpu() for name, engine in engines.items()}
    full = AdaptiveModel(model, ExitPolicy([np.inf] * num_exits), **options).runner
    segments = Segments(full, batches[0])

    def whole_pool(run):
        def go() -> None:
            for images in batches:
                run(images)

        return go

    def everything(images: torch.Tensor) -> None:
        state = full.begin_exits(images)
        for index in range(num_exits):
            _, state = full.forward_exit(index, state)

    def single_segment(index: int):
        return lambda: [segments.run(index) for _ in batches] and None

    runs = {"full": whole_pool(everything)}
    runs |= {f"segment {index}": single_segment(index) for index in range(num_exits)}
    runs |= {name: whole_pool(engine) for name, engine in engines.items()}
    times = interleaved(runs, repeats, device=device, cpu_time=cpu_time)
    segment_time = np.array([np.median(times[f"segment {index}"]) for index in range(num_exits)])
    rows = []
    for name in MIXES:
        reach = np.array([(exits[name] >= index).float().mean() for index in range(num_exits)])
        measured = times["full"] / times[name]
        ideal = segment_time.sum() / (reach * segment_time).sum()
        rows.append(
            {
                "mix": name,
                "batch": batch,
                "reach": reach.round(3).tolist(),
                "speedup": float(np.median(measured)),
                "speedup_iqr": float(np.subtract(*np.percentile(measured, [75, 25]))),
                "ideal": float(ideal),
                "ideal_macs": float(macs.sum() / (reach * macs).sum()),
                "of_ideal": float(np.median(measured) / ideal),
                "per_call": spread(times[name] / len(batches)),
                "full_per_call": spread(times["full"] / len(batches)),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_400mf")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--size", type=int, help="image side in pixels; default the model's own")
    parser.add_argument(
        "--images", type=int, default=64, help="size of the pool (a multiple of every batch size is used)"
    )
    parser.add_argument("--repeats", type=int, default=15)
    add_clock_arguments(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="compile the segments (CUDA graphs on a GPU)")
    parser.add_argument("--fuse", action="store_true", help="run a copy with batch norms folded, in channels_last")
    parser.add_argument("--measure", action="store_true", help="drop samples only where measured times say it pays")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="mixed precision"
    )
    parser.add_argument("--json")
    args = parser.parse_args()

    torch.manual_seed(0)
    use_clock(args)
    model = timm.create_model(args.model).eval().to(args.device)
    _, height, width = model.pretrained_cfg["input_size"]
    options = {"compile": args.compile, "fuse": args.fuse, "dtype": getattr(torch, args.dtype)}
    rows = []
    for batch in args.batch:
        count = max(args.images // batch, 1) * batch
        pool = torch.randn(count, 3, args.size or height, args.size or width, device=args.device)
        rows += measure(
            model,
            pool * torch.rand(count, 1, 1, 1, device=args.device) * 3,
            batch,
            args.repeats,
            args.measure,
            args.cpu_time,
            options,
        )
    print(f"{args.model}, forced mixes, {args.threads} threads, {args.device}")
    print(f"{'batch':>5} {'mix':<10} {'speed-up':>8} {'iqr':>6} {'ideal':>6} {'of it':>6} {'MACs':>6} {'p50 ms':>8}")
    for row in rows:
        print(
            f"{row['batch']:>5} {row['mix']:<10} {row['speedup']:>8.3f} {row['speedup_iqr']:>6.3f} "
            f"{row['ideal']:>6.3f} "
            f"{row['of_ideal']:>6.3f} {row['ideal_macs']:>6.3f} {row['per_call']['median_ms']:>8.2f}"
        )
    write_json(args.json, {"command": vars(args), "machine": machine(args.device), "forced_mixes": True, "rows": rows})


if __name__ == "__main__":
    main()
