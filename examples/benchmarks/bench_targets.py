"""What speed was wanted, and whether the figures on docs/benchmarks.md reach it: all targets in one list."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench_tables import Document, grouped, table

Figures = dict[str, float]  # of what -> its figure


@dataclass(frozen=True)
class Target:
    """``figures`` are read from the JSON of benchmark ``name``; each is to be at most, or at least, ``limit``."""

    wanted: str
    name: str
    limit: float
    figures: Callable[[Document], Figures]
    at_most: bool = True

    def row(self, document: Document | None) -> list[str]:
        """What was wanted, what was found, what of it reaches the target."""
        if document is None:
            return [self.wanted, "not measured yet", ""]
        figures = self.figures(document)
        # NaN reaches nothing.
        good = [of for of, value in figures.items() if (value <= self.limit if self.at_most else value >= self.limit)]
        reached = "yes" if len(good) == len(figures) else ", ".join(good) or "no"
        return [self.wanted, ", ".join(f"{of} {value:.3g}" for of, value in figures.items()), reached]


def _to_exit(number: int, batch: int) -> Callable[[Document], Figures]:
    def figures(document: Document) -> Figures:
        rows = [row for row in document["rows"] if (row["exit"], row["batch"]) == (number, batch)]
        return {row["mode"]: row["ratio"] for row in rows}

    return figures


def _nobody(document: Document) -> Figures:
    rows = [row for row in document["rows"] if row["mix"] == "nobody"]
    return {f"{row['mode']} at {row['batch']}": 1 / row["speedup"] for row in rows}


def _of_ideal(batch: int) -> Callable[[Document], Figures]:
    def figures(document: Document) -> Figures:
        modes = grouped([row for row in document["rows"] if row["batch"] == batch], "mode")
        return {mode: min(row["of_ideal"] for row in rows) for (mode,), rows in modes}

    return figures


def _off_budget(document: Document) -> Figures:
    """The furthest from what was asked in percent, of every batch size."""
    batches = grouped(document["rows"], "batch")
    return {
        f"batch {batch}": 100 * max(abs(row["measured_over_budget"] - 1) for row in rows) for (batch,), rows in batches
    }


def _queue(document: Document) -> Figures:
    best = document["best"]
    return {"RequestQueue": best["a queue per segment"] / best["plain batching"] if best["plain batching"] else 0.0}


def _default(document: Document) -> Figures:
    mean = {row["mode"]: sum(row["latency"]) for row in document["modes"]}
    uncompiled = [mean[name] for name in ("plain", "channels_last", "fused") if name in mean]
    return {"fused": mean["fused"] / min(uncompiled)}


def _lower_precision(document: Document) -> Figures:
    rows = [row for row in document["rows"] if row["precision"] != "float32"]
    return {f"{row['network']} {row['precision']} at {row['batch']}": row["whole_speedup"] for row in rows}


def _accuracy_lost(document: Document) -> Figures:
    """The upper ends of the 95 % intervals: what few images cannot exclude is not reached."""
    networks = document["accuracy"].items()
    return {
        f"{name} {precision}": 100 * figures["under_policy"]["interval"][1]
        for name, found in networks
        for precision, figures in found.items()
    }


def _solver_gap(document: Document) -> Figures:
    return {name: 100 * document["random_tables"][name] for name in ("mean", "worst")}


def _solver_seconds(samples: int) -> Callable[[Document], Figures]:
    def figures(document: Document) -> Figures:
        rows = [row for row in document["large"] if row["samples"] == samples]
        return {f"{row['exits']} exits": max(row["seconds"]) for row in rows}

    return figures


def _solver_memory(document: Document) -> Figures:
    return {"the process": max(row["peak_bytes"] for row in document["large"]) / 1e9}


TARGETS = (
    Target("exit 1, batch 1: at most 0.80 of the plain network's time", "forward", 0.80, _to_exit(1, 1)),
    Target("exit 4, batch 1: at most 1.9 of it", "forward", 1.9, _to_exit(4, 1)),
    Target("exit 1, batch 16: at most 0.90 of it", "forward", 0.90, _to_exit(1, 16)),
    Target("exit 4, batch 16: at most 1.75 of it", "forward", 1.75, _to_exit(4, 16)),
    Target("nobody leaves: at most 1.03 of the full network's time", "adaptive", 1.03, _nobody),
    Target("batch 1, every mix: at least 0.95 of ideal", "adaptive", 0.95, _of_ideal(1), at_most=False),
    Target("batch 32, every mix: at least 0.90 of ideal", "adaptive", 0.90, _of_ideal(32), at_most=False),
    Target("the default: at most 1.03 of the fastest that torch has uncompiled", "modes", 1.03, _default),
    Target("a mean time asked for is kept within 5 %", "latency_budget", 5.0, _off_budget),
    Target("requests at equal p95: at least 1.2 times plain batching", "request_load", 1.2, _queue, at_most=False),
    Target("at least 1.5 times float32 in OpenVINO", "precision", 1.5, _lower_precision, at_most=False),
    Target("surely at most 0.5 points of accuracy for it, at the same budget", "precision", 0.5, _accuracy_lost),
    Target("thresholds at most 0.3 points below the optimum of three exits", "solvers", 0.3, _solver_gap),
    Target("50,000 samples of 4 exits solved in 2 s", "solvers", 2.0, _solver_seconds(50_000)),
    Target("1,000,000 samples of 8 exits solved in 20 s", "solvers", 20.0, _solver_seconds(1_000_000)),
    Target("solved in 2 GB", "solvers", 2.0, _solver_memory),
)


def targets(documents: Mapping[str, Document]) -> str:
    """The table of all targets; ``documents`` are those there are, by the benchmark's name."""
    rows = [target.row(documents.get(target.name)) for target in TARGETS]
    return table(["wanted", "found", "reached"], rows)
