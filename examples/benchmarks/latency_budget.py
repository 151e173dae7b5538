"""Budgets in milliseconds: are they kept when the policy runs?

    python examples/benchmarks/latency_budget.py dynperceiver_regnety_400mf --batch 1 8 32 --json latency_budget.json

For every batch size the segments are timed, thresholds are solved for mean times between the first exit's and the
last's on one half of the images, and the policy runs on the other half, in turns with all the others: what a sample
took in the mean, over what was asked. Weights and images are random, so the confidences say nothing of accuracy, and do
as well as any for times.

Two ways to a budget: segment times on a full batch, as `exit-plugins solve --cost latency` takes them, and, since those
who stay run in smaller batches, the same once more with the batch sizes that such a policy leaves.
"""

import argparse
from functools import partial

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json

from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits, solve_thresholds
from exit_plugins.exits.costs import SegmentTimes

SHARES = (0.2, 0.4, 0.6, 0.8)


def costs_at(times: SegmentTimes, rows: np.ndarray) -> np.ndarray:
    """Cumulative seconds (K,) a sample takes where segment k runs on ``rows[k]`` samples."""
    each = []
    for index, count in enumerate(rows):
        count = max(float(count), 1.0)
        seconds = np.interp(count, times.sizes, times.segment[index]) + np.interp(
            count, times.sizes, times.gather[index]
        )
        each.append(float(seconds) / count)
    return np.cumsum(each)


def solve(table, times: SegmentTimes, batch: int, share: float, rounds: int) -> tuple[ExitPolicy, float]:
    """The policy for a budget, and the budget in seconds a sample. ``rounds`` > 0 follow the shrinking batches."""
    full = costs_at(times, np.full(table.num_exits, batch))
    budget = full[0] + share * (full[-1] - full[0])
    costs = full
    policy = solve_thresholds(table, costs, budget=budget)
    for _ in range(rounds):
        shares = np.bincount(policy.choose(table.confidence), minlength=table.num_exits) / len(table)
        reach = 1 - np.concatenate([[0.0], np.cumsum(shares[:-1])])
        costs = costs_at(times, np.maximum(reach * batch, 1.0))
        policy = solve_thresholds(table, costs, budget=max(budget, costs[0] * 1.0001))
    return policy, float(budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=128, help="half to solve on, half to run")
    parser.add_argument("--repeats", type=int, default=5, help="runs over all images of the second half")
    parser.add_argument("--rounds", type=int, default=3, help="of solving again for the batches that are left")
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    use_clock(args)
    model = timm.create_model(args.model).eval()
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(args.images, *size) * torch.linspace(0.2, 2.0, args.images)[torch.randperm(args.images)].view(
        -1, 1, 1, 1
    )
    half = args.images // 2
    targets = torch.zeros(args.images, dtype=torch.long)
    table = collect_exits(model, [(images[:half], targets[:half])])
    adaptive = AdaptiveModel(model, ExitPolicy([np.inf] * model.num_exits))
    rows = []
    print("| batch | asked, share | asked ms | full batches: measured / asked | batches left: measured / asked |")
    print("| --- | --- | --- | --- | --- |")
    for batch in args.batch:
        times = adaptive.time_segments(images[:batch], repeats=9)
        adaptive.times = None
        parts = images[half:].split(batch)
        parts = [part for part in parts if len(part) == batch] or [images[half : half + batch]]
        count = sum(map(len, parts))
        solved = {
            (share, rounds): solve(table, times, batch, share, rounds)
            for share in SHARES
            for rounds in (0, args.rounds)
        }

        def run(policy: ExitPolicy, parts=parts) -> None:
            adaptive.policy = policy
            for part in parts:
                adaptive(part)

        taken = interleaved(
            {str(key): partial(run, policy) for key, (policy, _) in solved.items()},
            args.repeats,
            cpu_time=args.cpu_time,
        )
        for share in SHARES:
            ratios = []
            for rounds in (0, args.rounds):
                _, budget = solved[share, rounds]
                seconds = taken[str((share, rounds))] / count
                ratios.append(float(np.median(seconds) / budget))
                rows.append(
                    {
                        "batch": batch,
                        "share": share,
                        "rounds": rounds,
                        "budget_ms": budget * 1e3,
                        "measured": spread(seconds),
                        "measured_over_budget": ratios[-1],
                    }
                )
            print(f"| {batch} | {share} | {budget * 1e3:.2f} | {ratios[0]:.3f} | {ratios[1]:.3f} |", flush=True)
    write_json(args.json, {"command": vars(args), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
