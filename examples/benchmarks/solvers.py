"""All threshold solvers at eight budgets on the exits of a real model, and two further checks of the default one.

    exit-plugins evaluate MODEL --data DATA --split val --save-table val.npz ...      # solved on these images
    exit-plugins evaluate MODEL --data DATA --split test --save-table test.npz ...    # reported on these
    python examples/benchmarks/solvers.py val.npz test.npz --costs 2.1e6 3.4e6 5.0e6

Prints Markdown tables: test accuracy, what was spent of the budget on the test split, CPU seconds per budget. Budgets
are fractions of the way from the first exit's cost to the last's. Then: the gap to the optimum with three of the exits,
and the time for 50,000 samples and four exits. Writes the same as JSON.
"""

import argparse
import json
import time
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from exit_plugins import ExitTable, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.files import atomic_write

SHARES = (0.05, 0.1, 0.2, 0.3, 0.45, 0.6, 0.8, 1.0)
METHODS = {
    "lagrangian": {},
    "lagrangian, holdout 20 %": {"method": "lagrangian", "holdout": 0.2},
    "genetic 60x100": {"method": "genetic"},
    "shared": {},
    "msdnet": {},
    "msdnet, dyn_perceiver sweep": {"method": "msdnet", "sweep": "dyn_perceiver"},
    "exact": {},
}


def solve(name: str, table: ExitTable, costs: np.ndarray, budget: float):
    options = dict({"method": name}, **METHODS[name])
    if "holdout" in options:
        held_out, table = table.split(options["holdout"])
        options["holdout"] = held_out
    start = time.process_time()
    policy = solve_thresholds(table, costs, budget=budget, **options)
    return policy, time.process_time() - start


def compare(val: ExitTable, test: ExitTable, costs: np.ndarray) -> list[dict]:
    rows = []
    for name in METHODS:
        if name == "exact" and val.num_exits > 3:
            continue
        for share in SHARES:
            budget = float(costs[0] + share * (costs[-1] - costs[0]))
            policy, seconds = solve(name, val, costs, budget)
            result = evaluate_policy(policy, test, costs, resamples=200)
            rows.append(
                {
                    "method": name,
                    "share": share,
                    "budget": budget,
                    "val_accuracy": policy.source["accuracy"],
                    "test_accuracy": result.accuracy,
                    "interval": result.interval,
                    "spent": result.cost / budget,
                    "seconds": seconds,
                }
            )
    return rows


def gap_to_optimum(val: ExitTable, costs: np.ndarray, samples: int, trials: int) -> dict[str, float]:
    """Mean accuracy lost to the optimum on the split solved on, over triples of the exits and random parts of it."""
    gaps: dict[str, list[float]] = {"lagrangian": [], "genetic 60x100": [], "shared": [], "msdnet": []}
    rng = np.random.default_rng(0)
    triples = list(combinations(range(val.num_exits), 3))
    for _ in range(trials):
        exits = list(triples[rng.integers(len(triples))])
        part = val.subset(rng.permutation(len(val))[:samples])
        part = ExitTable(part.confidence[exits], part.prediction[exits], part.target)
        own = costs[exits]
        for share in SHARES[:-1]:
            budget = float(own[0] + share * (own[-1] - own[0]))
            best = solve_thresholds(part, own, budget=budget, method="exact").source["accuracy"]
            for name, values in gaps.items():
                values.append(best - solve(name, part, own, budget)[0].source["accuracy"])
    return {name: float(np.mean(values)) for name, values in gaps.items()}


def time_of_default(val: ExitTable, costs: np.ndarray, samples: int = 50_000, exits: int = 4) -> list[float]:
    """Seconds per budget for that many samples, drawn from ``val`` with a little noise so that none are equal."""
    rng = np.random.default_rng(0)
    chosen = np.linspace(0, val.num_exits - 1, min(exits, val.num_exits)).round().astype(int)
    index = rng.integers(len(val), size=samples)
    noisy = val.confidence[chosen][:, index] + rng.normal(0, 1e-3, (len(chosen), samples))
    table = ExitTable(np.clip(noisy, 0, 1), val.prediction[chosen][:, index], val.target[index])
    own = costs[chosen]
    return [solve("lagrangian", table, own, own[0] + s * (own[-1] - own[0]))[1] for s in SHARES[:-1]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", type=Path, help="exit table thresholds are solved on")
    parser.add_argument("test", type=Path, help="exit table that is reported on")
    parser.add_argument("--costs", type=float, nargs="+", required=True, help="cumulative cost of every exit")
    parser.add_argument("--trials", type=int, default=10, help="of the gap to the optimum")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/solvers.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    val, test, costs = ExitTable.load(args.val), ExitTable.load(args.test), np.array(args.costs)
    print(f"exits {val.num_exits}, solved on {len(val)} images, reported on {len(test)}")
    print("accuracy of each exit (test):", ", ".join(f"{100 * a:.2f}" for a in test.correct.mean(1)))
    rows = compare(val, test, costs)
    result = {"comparison": rows}
    for title, cell in (
        ("test accuracy [%]", lambda r: f"{100 * r['test_accuracy']:.2f}"),
        ("spent on test / budget", lambda r: f"{r['spent']:.3f}"),
        ("CPU seconds", lambda r: f"{r['seconds']:.2f}"),
    ):
        print(f"\n| {title} | " + " | ".join(f"{100 * s:.0f} %" for s in SHARES) + " |")
        print("|---" * (len(SHARES) + 1) + "|")
        for name in dict.fromkeys(r["method"] for r in rows):
            print(f"| {name} | " + " | ".join(cell(r) for r in rows if r["method"] == name) + " |")
    if val.num_exits >= 3:
        result["gap_to_optimum"] = gap_to_optimum(val, costs, 1500, args.trials)
        print("\nthree exits, 1500 samples, mean accuracy below the optimum [points]:")
        print("  " + ", ".join(f"{name} {100 * gap:.3f}" for name, gap in result["gap_to_optimum"].items()))
    result["seconds_50000x4"] = time_of_default(val, costs)
    seconds = result["seconds_50000x4"]
    print(f"\n50,000 samples, 4 exits: {np.mean(seconds):.2f} CPU seconds per budget, at most {max(seconds):.2f}")
    with atomic_write(args.output) as file:
        json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
