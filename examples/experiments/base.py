"""What the experiments share: runs and their JSON, training through examples/train_cifar.py, what is read off a run.

An experiment tests one claim of a paper. It is one file here that defines ``EXPERIMENT``: its runs, and the section
that it writes into docs/results.md from their JSON files. A run is one training with one seed.
"""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

EXAMPLES = Path(__file__).resolve().parents[1]
ROOT = EXAMPLES.parent
for folder in (EXAMPLES, EXAMPLES / "benchmarks"):  # the examples are scripts, no package
    if str(folder) not in sys.path:
        sys.path.append(str(folder))

import train_cifar  # noqa: E402
from timing import machine  # noqa: E402
from torch import nn  # noqa: E402

from exit_plugins import ExitTable, budgeted_curve, certify, policy_path  # noqa: E402
from exit_plugins.exits import plots  # noqa: E402
from exit_plugins.exits.files import atomic_write  # noqa: E402
from exit_plugins.timm.data import open_splits  # noqa: E402
from exit_plugins.timm.weights import packaged_weights  # noqa: E402

# Options of train_cifar.py that leave only crops and mirrors of its augmentation: schedules are too short for more.
CROPS_AND_MIRRORS = {"mixup": 0, "cutmix": 0, "smoothing": 0, "randaug": 0, "reprob": 0, "ema-decay": 0}

Result = dict[str, Any]
Analysis = Callable[[ExitTable, np.ndarray], Any]


@dataclass(frozen=True)
class Place:
    """Where an invocation reads and writes.

    Attributes:
        data: folder with the data sets in their standard layouts: ``cifar100/{train,test}/CLASS/*``, ...
        state: checkpoints and logs; may be large, is not committed.
        results: one JSON file per finished run, ``EXPERIMENT/RUN.json``.
        small: a hundredth of the data and few steps, to see that everything runs; the figures mean nothing.
    """

    data: Path
    state: Path
    results: Path
    small: bool = False


@dataclass(frozen=True)
class Training:
    """A training run of ``train_cifar.py``: the model, its arguments and the script's options.

    Attributes:
        model: timm name.
        options: the script's options by name, ``{"lr": 0.1, "compile": True}``.
        model_kwargs: arguments of the model, written as on the command line.
        data: name of the data set's folder.
        pretrained: one of ``exit_plugins.timm.weights.PACKAGES``, to start from its ImageNet weights.
        analyses: what else to read off the test images: name -> function of (table with logits, MACs), into the JSON.
    """

    model: str
    options: Mapping[str, Any]
    model_kwargs: Mapping[str, Any] = field(default_factory=dict)
    data: str = "cifar100"
    pretrained: str | None = None
    analyses: Mapping[str, Analysis] = field(default_factory=dict)

    def command(self, place: Place, output: Path, seed: int) -> list[str]:
        options = {"calibration": 0, "seed": seed, "device": "cpu", **self.options}
        if place.small:
            options |= {"epochs": 1, "batch-size": 16, "warmup-epochs": 0, "compile": False}
            options["samples"] = max(64, int(options.get("samples", 50_000)) // 100)
        words = ["--data", str(place.data / self.data), "--output", str(output), "--model", self.model]
        if self.pretrained:
            words += ["--pretrained-path", str(place.state / "weights" / f"{self.pretrained}.pth")]
        if self.model_kwargs:
            words += ["--model-kwargs", *(f"{name}={value}" for name, value in self.model_kwargs.items())]
        for name, value in options.items():
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no-{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        return words

    def __call__(self, place: Place, output: Path, seed: int) -> Result:
        command = self.command(place, output, seed)
        if self.pretrained:
            write_packaged_weights(self.pretrained, place.state / "weights" / f"{self.pretrained}.pth")
        trained = train_cifar.main(command)
        tested = ExitTable.load(output / "test.npz")
        if place.small:
            tested = tested.subset(slice(200))
        macs = np.array(trained["costs"]["macs"])
        # Data by its name: where it lies is the machine's affair.
        settings = {**trained["options"], "data": self.data, "pretrained": self.pretrained}
        history = trained["history"]
        return {
            "settings": settings,
            "epochs": len(history),
            "seconds": sum(entry["seconds"] for entry in history),
            "cpu_seconds": sum(entry["cpu_seconds"] for entry in history),
            "loss": [entry["loss"] for entry in history],
            "test_images": len(tested),
            "exits": [
                {"macs": m, "params": p, "accuracy": float(a)}
                for m, p, a in zip(macs, trained["costs"]["params"], tested.correct.mean(1), strict=True)
            ],
            **{name: analysis(tested, macs) for name, analysis in self.analyses.items()},
        }


def test_batches(place: Place, data: str, model: nn.Module, size: int) -> train_cifar.Batches:
    """The test images of a data set as the runs see them: of ``size`` pixels, normalised for ``model``."""
    view = open_splits(str(place.data / data), None, seed=0, calibration=0).test
    options = SimpleNamespace(batch_size=100, randaug=0, reprob=0, mixup=0, cutmix=0)
    return train_cifar.Batches(train_cifar.load_split(view, size, torch.device("cpu"), "test"), model, options)


def write_packaged_weights(name: str, path: Path) -> None:
    """The ImageNet weights of an installed package as a file in timm's layout, once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path, "wb") as file:
            torch.save(packaged_weights(name)["state_dict"], file)


@dataclass(frozen=True)
class Run:
    """One variant under one seed. ``work(place, folder, seed)`` trains it in ``folder``, going on where it stopped."""

    variant: str
    seed: int
    work: Callable[[Place, Path, int], Result]

    @property
    def name(self) -> str:
        return f"{self.variant}-s{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """One claim.

    Attributes:
        name: of its file, its folder of results and its section.
        title: heading of its section.
        claim: what is put to the test.
        paper: what the paper reports of it, with its figures.
        setup: what was run here instead: data, networks, training.
        outlook: what would change the verdict.
        runs: in the order in which they are worth having.
        section: Markdown from the results (those finished so far; at least one), pictures saved into the given folder.
        version: raised when runs come to do something else, so that results of before cannot stand beside new ones:
            these count as missing.
    """

    name: str
    title: str
    claim: str
    paper: str
    setup: str
    outlook: str
    runs: Sequence[Run]
    section: Callable[[list[Result], Path], str]
    version: int = 1

    def result_file(self, place: Place, run: Run) -> Path:
        return place.results / self.name / f"{run.name}.json"

    def result(self, place: Place, run: Run) -> Result | None:
        """What a run left; None if it has not ended, or was of another version."""
        path = self.result_file(place, run)
        result = json.loads(path.read_text()) if path.is_file() else {}
        return result if result and result.get("version", 1) == self.version else None

    def results(self, place: Place) -> list[Result]:
        return [result for run in self.runs if (result := self.result(place, run)) is not None]

    def execute(self, place: Place, run: Run) -> None:
        """Train (or go on training) one run, and write its JSON."""
        commit = git_commit()
        result = run.work(place, place.state / self.name / run.name, run.seed)
        path = self.result_file(place, run)
        path.parent.mkdir(parents=True, exist_ok=True)
        head = {"experiment": self.name, "variant": run.variant, "seed": run.seed, "small": place.small}
        head |= {"version": self.version} if self.version > 1 else {}
        with atomic_write(path) as file:
            json.dump({**head, "commit": commit, "machine": machine(), **result}, file, indent=1)
            file.write("\n")


def git_commit() -> str | None:
    """The commit the code is of, with ``+`` behind it where code was changed since; None without git."""
    try:
        said = [
            subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return said[0] + "+" * bool(said[1])


# ---------------------------------------------------------------------------------------------------------------------
# What is read off the test images of a run
# ---------------------------------------------------------------------------------------------------------------------


def budgets(measure: str = "max_softmax", points: int = 9, resplits: int = 5) -> Analysis:
    """Analysis: accuracy at ``points`` budgets from the first exit's cost to the last one's.

    The runs train on all training images, so thresholds are solved on one random half of the test images and scored on
    the other, over ``resplits`` seeded halvings; means are stored.
    """

    def analysis(tested: ExitTable, macs: np.ndarray) -> list[dict[str, float]]:
        tested = tested.with_confidence(measure)
        asked = np.linspace(macs[0], macs[-1], points)
        curves = [budgeted_curve(*tested.split(0.5, seed), macs, asked) for seed in range(resplits)]
        return [
            {
                "budget": float(budget),
                "cost": statistics.fmean(point.cost for point in found),
                "accuracy": statistics.fmean(point.accuracy for point in found),
            }
            for budget, found in zip(asked, zip(*curves, strict=True), strict=True)
        ]

    return analysis


def certified(epsilon: float = 0.01, delta: float = 0.1, resplits: int = 200) -> Analysis:
    """Analysis: policies certified to differ from the last exit on at most ``epsilon`` of the images, put to the test.

    Each resplit solves a path on a quarter of the test images, certifies on half of them, and counts on the other
    quarter how often the answers really differ and what was spent. The half is for the certificate because fewer than
    ln(1 / delta) / epsilon images (230 by default) certify nothing, even if no answer differs. Stored per method: how
    often more than ``epsilon`` differed (``delta`` is what the certificate allows), the mean of what differed, and the
    mean cost.
    """

    def analysis(tested: ExitTable, macs: np.ndarray) -> dict[str, Any]:
        found: dict[str, list[tuple[float, float]]] = {"ucb": [], "ltt": []}
        for seed in range(resplits):
            calibration, others = tested.split(0.5, seed)
            solved, measured = others.split(0.5, seed)
            path = policy_path(solved, macs, steps=17)
            for method, values in found.items():
                policy = certify(path, calibration, epsilon, delta, method, seed=seed)
                leaves = policy.choose(measured.confidence)
                answers = measured.prediction[leaves, np.arange(len(measured))]
                values.append((float((answers != measured.prediction[-1]).mean()), float(macs[leaves].mean())))
        summary = {"epsilon": epsilon, "delta": delta, "resplits": resplits}
        for method, values in found.items():
            differs, cost = np.array(values).T
            summary[method] = {
                "exceeded": float((differs > epsilon).mean()),
                "disagreement": float(differs.mean()),
                "cost": float(cost.mean()),
                "speed_up": float(macs[-1] / cost.mean()),
            }
        return summary

    return analysis


# ---------------------------------------------------------------------------------------------------------------------
# Words and tables
# ---------------------------------------------------------------------------------------------------------------------


def by_variant(results: Sequence[Result]) -> dict[str, list[Result]]:
    """The results of each variant, by seed, in the order of the experiment."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result["variant"], []).append(result)
    return {variant: sorted(group, key=lambda result: result["seed"]) for variant, group in found.items()}


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None in place of the error for a single value."""
    values = list(values)
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def percent(mean: float, error: float | None = None, sign: bool = False) -> str:
    """A share in percent, with its standard error where there is one."""
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if error is None else f"{text} ± {100 * error:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def exits_table(results: Sequence[Result], names: Mapping[str, str] | None = None) -> str:
    """Accuracy of every exit of every variant, and its MACs."""
    groups = by_variant(results)
    most = max(len(group[0]["exits"]) for group in groups.values())
    rows = []
    for variant, group in groups.items():
        exits = list(zip(*(result["exits"] for result in group), strict=True))
        cells = [percent(*mean_and_error([e["accuracy"] for e in seeds])) for seeds in exits]
        macs = " ".join(f"{seeds[0]['macs'] / 1e6:.1f}" for seeds in exits)
        # A network with fewer exits ends where the others end: its figures stand at the right.
        cells = [""] * (most - len(cells)) + cells
        rows.append([(names or {}).get(variant, variant), *cells, macs, len(group)])
    header = ["", *(f"exit {i + 1}" for i in range(most)), "MACs (M)", "seeds"]
    return table(header, rows)


def certificates(groups: Mapping[str, Sequence[Result]]) -> str:
    rows = []
    for variant, group in groups.items():
        for method in ("ucb", "ltt"):
            one = {
                key: statistics.fmean(result["certified"][method][key] for result in group)
                for key in ("disagreement", "exceeded", "speed_up")
            }
            figures = percent(one["disagreement"]), percent(one["exceeded"]), f"{one['speed_up']:.2f}x"
            rows.append([variant, method.upper(), *figures, len(group)])
    head = next(iter(groups.values()))[0]["certified"]
    words = (
        f"Policies certified to differ from the last exit on at most {percent(head['epsilon'])} % of the images, with "
        f"probability {percent(1 - head['delta'])} %, over {head['resplits']} random divisions of the test images "
        "(solved on a quarter, certified on half of them, measured on the last quarter):\n\n"
    )
    header = ["", "method", "differ (%)", "bound exceeded in (%) of the divisions", "MACs saved", "seeds"]
    return words + table(header, rows)


def draw_budgets(
    groups: Mapping[str, Sequence[Result]],
    path: Path,
    names: Mapping[str, str] | None = None,
) -> None:
    """Accuracy over mean MACs of every variant, mean over its seeds, exits as stars."""

    def mean_point(points: Sequence[dict[str, float]]) -> SimpleNamespace:
        mean = {name: statistics.fmean(point[name] for point in points) for name in ("budget", "cost", "accuracy")}
        return SimpleNamespace(**mean, interval=(mean["accuracy"],) * 2)

    curves = {
        (names or {}).get(variant, variant): [
            mean_point(points) for points in zip(*(result["budgeted"] for result in group), strict=True)
        ]
        for variant, group in groups.items()
    }
    figure = plots.budget_curve(curves)
    axes = figure.axes[0]
    divisor, _ = plots.si_unit(max(point.cost for points in curves.values() for point in points))
    for line, group in zip(axes.lines, groups.values(), strict=True):
        exits = list(zip(*(result["exits"] for result in group), strict=True))
        x = [seeds[0]["macs"] / divisor for seeds in exits]
        y = [100 * statistics.fmean(e["accuracy"] for e in seeds) for seeds in exits]
        axes.plot(x, y, linestyle="", marker="*", markersize=11, color=line.get_color())
    plots.save(figure, path)


def verdict(state: bool | None, sentence: str) -> str:
    """The line a section ends on. ``state``: True shown, False against, None not shown (undecided)."""
    word = {True: "Shown", False: "Against", None: "Not shown"}[state]
    return f"**{word}.** {sentence}\n"
