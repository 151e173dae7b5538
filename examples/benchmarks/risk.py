"""Do the certificates hold? A thousand calibration splits for each method, loss, size and epsilon.

    python examples/benchmarks/risk.py val.npz test.npz --costs 2.1e6 3.4e6 5.0e6

The path of policies is solved on the first table (exit-plugins evaluate --save-table writes them). The second is the
population: calibration splits are drawn from it with replacement, and its own mean is the true risk, so that a
violation is a violation and no accident of a test split. Promised: at most delta of the splits violate epsilon (UCB,
LTT); the mean risk over splits is at most epsilon (CRC). Prints a Markdown table and writes JSON.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from exit_plugins import ExitTable, policy_path
from exit_plugins.exits.costs import exit_counts, mean_cost
from exit_plugins.exits.files import atomic_write
from exit_plugins.exits.risk import LOSSES, RISK_METHODS, certified_step, path_losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("val", type=Path, help="exit table the path is solved on")
    parser.add_argument("test", type=Path, help="exit table calibration splits are drawn from")
    parser.add_argument("--costs", type=float, nargs="+", required=True, help="cumulative cost of every exit")
    parser.add_argument("--splits", type=int, default=1000)
    parser.add_argument("--delta", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=33, help="policies on the path")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/risk.json"))
    args = parser.parse_args()
    val, pool, costs = ExitTable.load(args.val), ExitTable.load(args.test), np.array(args.costs)
    path = policy_path(val, costs, args.steps)
    spent = np.array(
        [mean_cost(exit_counts(p.choose(pool.confidence), pool.num_exits), costs) / costs[-1] for p in path]
    )
    rng, rows = np.random.default_rng(0), []
    print("| loss | n | epsilon | method | violations | mean risk | mean cost / last exit | holds |")
    print("|---|---|---|---|---|---|---|---|")
    for loss, (_, low, high) in LOSSES.items():
        losses = path_losses(path, pool, loss)
        risk = losses.mean(1)
        for n in (100, 1000):
            draws = rng.integers(len(pool), size=(args.splits, n))
            for epsilon in (0.01, 0.02, 0.05):
                for method in RISK_METHODS:
                    steps = [
                        certified_step(losses[:, draw], epsilon, args.delta, method, (low, high)) for draw in draws
                    ]
                    violations, mean_risk = float((risk[steps] > epsilon).mean()), float(risk[steps].mean())
                    holds = mean_risk <= epsilon if method == "crc" else violations <= args.delta
                    row = {
                        "loss": loss,
                        "n": n,
                        "epsilon": epsilon,
                        "method": method,
                        "violations": violations,
                        "mean_risk": mean_risk,
                        "cost": float(spent[steps].mean()),
                        "holds": bool(holds),
                    }
                    rows.append(row)
                    print(
                        f"| {loss} | {n} | {100 * epsilon:.0f} % | {method} | {100 * violations:.1f} % | "
                        f"{100 * mean_risk:.2f} % | {row['cost']:.3f} | {'yes' if holds else 'NO'} |"
                    )
    with atomic_write(args.output) as file:
        json.dump({"delta": args.delta, "splits": args.splits, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
