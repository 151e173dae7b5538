"""The default threshold solver beside the optimum and on large tables; all solvers on the exits of a real model.

    python examples/benchmarks/solvers.py --json solvers.json
    exit-plugins evaluate MODEL --data DATA --split val --save-table val.npz ...      # solved on these images
    exit-plugins evaluate MODEL --data DATA --split test --save-table test.npz ...    # reported on these
    python examples/benchmarks/solvers.py val.npz test.npz --costs 2.1e6 3.4e6 5.0e6

Without tables: on random ones, how far the default stays below the optimum for three exits, and its time and memory on
50,000 samples of four exits and a million of eight. With tables, further: test accuracy, what was spent of the budget
on the test split, and CPU seconds per budget of every solver, and their gap to the optimum with three of the exits.
Budgets are fractions of the way from the first exit's cost to the last's. Seconds are CPU seconds of one thread.
"""

import argparse
import resource
import sys
import time
from itertools import combinations

import numpy as np
import torch
from timing import machine, write_json

from exit_plugins import ExitTable, solve_thresholds
from exit_plugins.exits.evaluation import evaluate_policy

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


def random_table(exits: int, samples: int, seed: int) -> ExitTable:
    """Samples of varying difficulty: deeper exits are surer and more often right, and all of them tend to agree."""
    rng = np.random.default_rng(seed)
    difficulty = 1.2 * rng.standard_normal(samples, dtype=np.float32)
    confidence, right = np.empty((exits, samples), dtype=np.float32), np.empty((exits, samples), dtype=bool)
    for k, skill in enumerate(np.linspace(0.0, 1.5, exits, dtype=np.float32)):
        evidence = skill - difficulty + 0.6 * rng.standard_normal(samples, dtype=np.float32)
        right[k] = rng.random(samples) < 1 / (1 + np.exp(-2 * evidence))
        confidence[k] = 1 / (1 + np.exp(-2 * evidence - 0.5 * rng.standard_normal(samples, dtype=np.float32)))
    return ExitTable(confidence, (~right).astype(np.int64), np.zeros(samples))  # class 0 is the right one


def random_costs(exits: int) -> np.ndarray:
    return np.cumsum(np.linspace(2.0, 1.0, exits))


def below_the_optimum(samples: int = 5000, tables: int = 10) -> dict[str, float]:
    """Accuracy that the default loses to the optimum of three exits, over random tables and budgets.

    On up to 4,000 samples it loses none: there it looks for the optimum itself.
    """
    costs, gaps = random_costs(3), []
    for seed in range(tables):
        table = random_table(3, samples, seed)
        for share in SHARES[:-1]:
            budget = float(costs[0] + share * (costs[-1] - costs[0]))
            best = solve_thresholds(table, costs, budget=budget, method="exact").source["accuracy"]
            gaps.append(best - solve("lagrangian", table, costs, budget)[0].source["accuracy"])
    return {"exits": 3, "samples": samples, "tables": tables, "mean": float(np.mean(gaps)), "worst": float(max(gaps))}


def time_of_default(samples: int, exits: int) -> dict:
    """CPU seconds per budget, and what the process had taken of memory at most by the end, table included."""
    table, costs = random_table(exits, samples, 0), random_costs(exits)
    seconds = [solve("lagrangian", table, costs, costs[0] + s * (costs[-1] - costs[0]))[1] for s in SHARES[:-1]]
    unit = 1 if sys.platform == "darwin" else 1024
    peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"samples": samples, "exits": exits, "seconds": seconds, "peak_bytes": peak}


def print_comparison(rows: list[dict]) -> None:
    for title, cell in (
        ("test accuracy [%]", lambda r: f"{100 * r['test_accuracy']:.2f}"),
        ("spent on test / budget", lambda r: f"{r['spent']:.3f}"),
        ("CPU seconds", lambda r: f"{r['seconds']:.2f}"),
    ):
        print(f"\n| {title} | " + " | ".join(f"{100 * s:.0f} %" for s in SHARES) + " |")
        print("|---" * (len(SHARES) + 1) + "|")
        for name in dict.fromkeys(r["method"] for r in rows):
            print(f"| {name} | " + " | ".join(cell(r) for r in rows if r["method"] == name) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", nargs="?", help="exit table thresholds are solved on")
    parser.add_argument("test", nargs="?", help="exit table that is reported on")
    parser.add_argument("--costs", type=float, nargs="+", help="cumulative cost of every exit of the tables")
    parser.add_argument("--trials", type=int, default=10, help="of the gap to the optimum on the table")
    parser.add_argument(
        "--large", nargs="+", default=["2500x5", "50000x4", "1000000x8"], metavar="NxK", help="samples x exits"
    )
    parser.add_argument("--json")
    args = parser.parse_args()
    if len({value is None for value in (args.val, args.test, args.costs)}) > 1:
        parser.error("give two tables and --costs, or none of them.")
    torch.set_num_threads(1)
    gap = below_the_optimum()
    print(f"three exits, {gap['samples']} samples, {gap['tables']} random tables: below the optimum by ", end="")
    print(f"{100 * gap['mean']:.3f} points in the mean, {100 * gap['worst']:.3f} in the worst")
    result = {"random_tables": gap, "large": []}
    for size in args.large:
        large = time_of_default(*map(int, size.split("x")))
        result["large"].append(large)
        print(
            f"{large['samples']:,} samples, {large['exits']} exits: {np.mean(large['seconds']):.2f} CPU seconds per "
            f"budget, at most {max(large['seconds']):.2f}; the process at most {large['peak_bytes'] / 1e9:.2f} GB"
        )
    if args.val:
        val, test, costs = ExitTable.load(args.val), ExitTable.load(args.test), np.array(args.costs)
        print(f"exits {val.num_exits}, solved on {len(val)} images, reported on {len(test)}")
        print("accuracy of each exit (test):", ", ".join(f"{100 * a:.2f}" for a in test.correct.mean(1)))
        result["comparison"] = compare(val, test, costs)
        print_comparison(result["comparison"])
        if val.num_exits >= 3:
            result["gap_to_optimum"] = gap_to_optimum(val, costs, 1500, args.trials)
            print("\nthree exits, 1500 samples, mean accuracy below the optimum [points]:")
            print("  " + ", ".join(f"{name} {100 * gap:.3f}" for name, gap in result["gap_to_optimum"].items()))
    write_json(args.json, {"command": vars(args), "machine": machine(), **result})


if __name__ == "__main__":
    main()
