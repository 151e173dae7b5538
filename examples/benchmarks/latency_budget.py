"""Budgets in milliseconds: are they kept when the policy runs?

    python examples/benchmarks/latency_budget.py dynperceiver_regnety_400mf --batch 1 8 32 --json latency_budget.json

For every batch size adaptive calls are timed, thresholds are solved on one half of the images for mean times between
the first exit's and the last's, and the policies run on the other half, in turns with all the others: what a sample
took in the mean, over what was asked. Beside it what the timed calls let expect of the images that were run, of which
not the same share as of the first half may leave at each exit. Weights and images are random and the last exit is
right by definition: what the policies cost is that of any network, what they answer says nothing.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, collect_exits, profile_latency, solve_latency
from exit_plugins.exits.latency import exit_shares_of

SHARES = (0.2, 0.4, 0.6, 0.8)


def table_of(model: torch.nn.Module, images: torch.Tensor) -> ExitTable:
    table = collect_exits(model, [(part, torch.zeros(len(part), dtype=torch.long)) for part in images.split(32)])
    return replace(table, target=table.prediction[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--images", type=int, default=512, help="half to solve on, half to run")
    parser.add_argument("--repeats", type=int, default=3, help="runs over all images of the second half")
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    use_clock(args)
    model = timm.create_model(args.model).eval()
    size = model.pretrained_cfg["input_size"]
    # From faint to strong, so that confidences differ; each half has as many of every strength, in random order.
    half = args.images // 2
    order = torch.cat([2 * torch.randperm(half), 2 * torch.randperm(half) + 1])
    strength = torch.linspace(0.2, 2.0, 2 * half)[order]
    images = torch.randn(2 * half, *size) * strength.view(-1, 1, 1, 1)
    table, run_table = table_of(model, images[:half]), table_of(model, images[half:])
    adaptive = AdaptiveModel(model, ExitPolicy([np.inf] * model.num_exits))
    clock = time.process_time if args.cpu_time else time.perf_counter
    rows = []
    print("| batch | asked, of the way | asked ms | expected ms of these images | measured ms | measured / asked |")
    print("| --- | --- | --- | --- | --- | --- |")
    for batch in args.batch:
        if batch > half:
            raise SystemExit(f"batches of {batch} need at least {2 * batch} --images.")
        profile = profile_latency(adaptive, images[:batch], clock=clock)
        parts = [part for part in images[half:].split(batch) if len(part) == batch]
        count = batch * len(parts)
        full = profile.full_batches()
        budgets = {share: float(full[0] + share * (full[-1] - full[0])) for share in SHARES}
        policies = {share: solve_latency(table, profile, budget) for share, budget in budgets.items()}

        def run(policy: ExitPolicy, parts=parts) -> None:
            adaptive.policy = policy
            for part in parts:
                adaptive(part)

        runs = {str(share): partial(run, policy) for share, policy in policies.items()}
        taken = interleaved(runs, args.repeats, cpu_time=args.cpu_time)
        for share, budget in budgets.items():
            seconds = taken[str(share)] / count
            expected = profile.mean(exit_shares_of(policies[share], run_table))
            row = {
                "batch": batch,
                "share": share,
                "budget_ms": 1e3 * budget,
                "solved_ms": 1e3 * policies[share].source["cost"],
                "expected_ms": 1e3 * expected,
                "measured": spread(seconds),
                "measured_over_budget": float(np.median(seconds) / budget),
            }
            rows.append(row)
            cells = [str(batch), f"{share:.0%}", f"{row['budget_ms']:.2f}", f"{row['expected_ms']:.2f}"]
            cells += [f"{row['measured']['median_ms']:.2f}", f"{row['measured_over_budget']:.3f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
    write_json(args.json, {"command": vars(args), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
