"""Accuracy over measured milliseconds: the networks of ``lite0`` and ``lite0_cifar`` against each other.

MACs are a promise; this is what the clock says of it. Every network runs in its form for inference, in PyTorch and in
OpenVINO, one image at a time and 32, one thread, all of them interleaved, so that whatever else the machine does
touches all alike. Decoding and scaling of the images are left out, a cascade's own scaling is in. A budget's accuracy
is the mean over many halvings of the test images, thresholds solved on one half; its time is that of the halving whose
thresholds cost the median, over images that leave by its exits in the same shares as all test images do.
A network that an engine answers wrongly for is refused by the export and left out there.
Run it on a machine that does nothing else: ``make experiments ONLY=clock JOBS=1``.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lite0
import lite0_cifar
import numpy as np
import torch
from base import Experiment, Place, Result, Run, by_variant, mean_and_error, percent, table, test_batches, verdict
from lite0 import Field, families, frontier, gains_in_the_middle
from matplotlib.figure import Figure
from timing import interleaved
from torch import Tensor, nn
from train_cifar import Batches

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, collect_exits, exit_costs, solve_thresholds
from exit_plugins.exits import plots
from exit_plugins.exits.adaptive import inference_copy
from exit_plugins.exits.evaluation import evaluate_policy
from exit_plugins.exits.export import ExportedAdaptiveModel, export_segments

FIELDS = {field.data: field for field in (lite0.FIELD, lite0_cifar.FIELD)}
ENGINES = {"torch": "PyTorch", "openvino": "OpenVINO"}
BATCHES = (1, 32)
IMAGES = 64
ROUNDS = 3
POLICIES = 6
HALVINGS = 20


@dataclass(frozen=True)
class Contender:
    """One network and its points, one for each budget."""

    name: str
    static: bool
    model: nn.Module
    points: list["Point"]


@dataclass(frozen=True)
class Point:
    """A policy, accuracy and mean MACs of its budget on images that solved no threshold, and images to time it on."""

    policy: ExitPolicy
    accuracy: float
    macs: float
    images: Tensor


def typical(leaves: np.ndarray, number: int, seed: int) -> np.ndarray:
    """Indices of ``number`` samples that leave by every exit in the same share as all do, in random order.

    Which exits they take is all that time depends on: a plain draw of few would be by chance easy or hard.

    Args:
        leaves: (N,), the exit that each of N samples leaves by, N >= number.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(leaves))
    order = order[np.argsort(leaves[order], kind="stable")]  # by exit, in random order within one
    places = (np.arange(number) + 0.5) * len(leaves) / number
    return rng.permutation(order[places.astype(int)])


def points_of(tested: ExitTable, macs: np.ndarray, model: nn.Module, images: Tensor, seed: int) -> list[Point]:
    """A point for each of some budgets from the first exit's cost to the last one's."""
    halves = [tested.split(0.5, seed * HALVINGS + halving) for halving in range(HALVINGS)]
    found = []
    for budget in np.linspace(macs[0], macs[-1], POLICIES + 1)[1:]:
        policies = [solve_thresholds(fitted, macs, budget=budget, model=model) for fitted, _ in halves]
        results = [evaluate_policy(policy, half, macs) for policy, (_, half) in zip(policies, halves, strict=True)]
        leaves = [policy.choose(tested.confidence) for policy in policies]
        median = np.argsort([macs[exits].mean() for exits in leaves])[HALVINGS // 2]
        chosen = typical(leaves[median], min(IMAGES, len(tested)), seed)
        accuracy, cost = (fmean(values) for values in zip(*((r.accuracy, r.cost) for r in results), strict=True))
        found.append(Point(policies[median], accuracy, cost, images[chosen]))
    return found


def contenders(field: Field, place: Place, seed: int) -> list[Contender]:
    """Every network of the field that is trained."""
    found = []
    batches: dict[int, Batches] = {}
    for variant in field.variants():
        sizes = tuple(int(word) for word in variant.split("_")[1:] if word.isdigit())
        try:
            if variant.startswith("cascade"):
                model = field.networks_in_cascade(sizes, place, seed)
            else:
                model = field.trained(place, variant, seed)
        except SystemExit as missing:
            print(f"left out: {variant}, {missing}")
            continue
        size = sizes[-1] if sizes else field.size
        if size not in batches:
            batches[size] = test_batches(place, field.data, model, size)
        tested = collect_exits(model, batches[size])
        macs = exit_costs(model, (3, size, size)).macs
        images = torch.cat([images for images, _ in batches[size]])
        static = variant.startswith("cut") or model.num_exits == 1
        if static:  # everybody leaves by the first exit, where it is cut off
            policy = ExitPolicy([-np.inf] * model.num_exits, costs=macs)
            result = evaluate_policy(policy, tested, macs)
            chosen = typical(policy.choose(tested.confidence), min(IMAGES, len(tested)), seed)
            points = [Point(policy, result.accuracy, result.cost, images[chosen])]
        else:
            points = points_of(tested, macs, model, images, seed)
        found.append(Contender(variant, static, model, points))
    return found


def runner(engine: str, contender: Contender, folder: Path) -> nn.Module:
    """The network ready to answer in an engine, one copy for all of its policies. Exported into ``folder``."""
    policy, images = contender.points[0].policy, contender.points[0].images
    if engine == "torch" and contender.model.num_exits == 1:
        return inference_copy(contender.model.to(memory_format=torch.channels_last))  # as its users run it
    if engine == "torch":
        return AdaptiveModel(contender.model.to(memory_format=torch.channels_last), policy, fuse=True)
    export_segments(contender.model, policy, folder, tuple(images.shape[1:]), "openvino")
    return ExportedAdaptiveModel(folder, policy=policy, threads=torch.get_num_threads())


@torch.inference_mode()
def over(model: nn.Module, policy: ExitPolicy, images: Tensor, batch: int) -> None:
    model.policy = policy
    for part in images.split(batch):
        model(part)


def measure(data: str, place: Place, folder: Path, seed: int) -> Result:
    """Time every point of every network; milliseconds per image."""
    field = FIELDS[data]
    found = contenders(field, place, seed)
    if len(found) < 3:
        raise SystemExit(f"fewer than three networks of {field.name} are trained; run that experiment first.")
    points: list[dict[str, Any]] = []
    for engine in ENGINES:
        with tempfile.TemporaryDirectory() as exported:
            models: dict[str, nn.Module] = {}
            for one in found:
                try:
                    models[one.name] = runner(engine, one, Path(exported) / one.name)
                except RuntimeError as refused:
                    print(f"left out: {one.name} in {ENGINES[engine]}, {refused}")
            for batch in BATCHES:
                runs: dict[str, Callable[[], None]] = {}
                about: dict[str, dict[str, Any]] = {}
                for one in found:
                    if one.name not in models:
                        continue
                    for index, point in enumerate(one.points):
                        key = f"{one.name} {index}"
                        images = point.images[: batch * 2] if place.small else point.images
                        runs[key] = partial(over, models[one.name], point.policy, images, batch)
                        about[key] = {"name": one.name, "static": one.static}
                        about[key] |= {"accuracy": point.accuracy, "macs": point.macs}
                times = interleaved(runs, 1 if place.small else ROUNDS)
                for key, seconds in times.items():
                    milliseconds = 1e3 * seconds / (batch * 2 if place.small else IMAGES)
                    low, median, high = np.percentile(milliseconds, [25, 50, 75])
                    spent = {"ms": float(median), "iqr_ms": float(high - low)}
                    points.append({"engine": engine, "batch": batch, **about[key], **spent})
    settings = {"images": IMAGES, "rounds": ROUNDS, "halvings": HALVINGS, "data": data, "field": field.name}
    return {"settings": settings, "points": points}


def measured_engines(result: Result) -> list[str]:
    """The engines that any network was timed in."""
    return [engine for engine in ENGINES if any(point["engine"] == engine for point in result["points"])]


def in_all(results: list[Result]) -> set[str]:
    """The networks that every seed has."""
    return set.intersection(*({point["name"] for point in result["points"]} for result in results))


def over_seeds(results: list[Result], everywhere: set[str]) -> Result:
    """The mean of every point of the networks ``everywhere`` over the seeds."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in results:
        policies: dict[tuple[Any, ...], int] = {}
        for point in result["points"]:
            if point["name"] in everywhere:
                of = (point["engine"], point["batch"], point["name"])
                policies[of] = policies.get(of, -1) + 1
                found.setdefault((*of, policies[of]), []).append(point)
    points = [
        {**points[0], **{key: fmean(point[key] for point in points) for key in ("accuracy", "macs", "ms", "iqr_ms")}}
        for points in found.values()
        if len(points) == len(results)  # an engine may refuse a network of one seed
    ]
    return {**results[0], "points": points}


def curves(result: Result, engine: str, batch: int, cost: str = "ms") -> dict[str, np.ndarray]:
    """Cost and accuracy (2, N) of the dynamic networks, sizes together, and of ``static``: all rivals together."""
    points: dict[str, list[tuple[float, float]]] = {}
    for point in result["points"]:
        if (point["engine"], point["batch"]) == (engine, batch):
            points.setdefault("static" if point["static"] else point["name"], []).append(
                (point[cost], point["accuracy"])
            )
    found = {name: np.array(sorted(values)).T for name, values in points.items()}
    static = found.pop("static")
    return {"static": static, **families(found)}


def draw(result: Result, path: Path) -> None:
    """One panel for each engine and batch size."""
    engines = measured_engines(result)
    figure = Figure(figsize=(11, 4.4 * len(engines)), layout="constrained")
    axes = figure.subplots(len(engines), len(BATCHES), squeeze=False)
    for row, engine in zip(axes, engines, strict=True):
        for panel, batch in zip(row, BATCHES, strict=True):
            found = curves(result, engine, batch)
            several = any(name.endswith("any size") for name in found)
            for name, (ms, accuracy) in found.items():
                if several and name != "static" and not name.endswith("any size"):
                    continue  # what was tried at one size alone stands in the table
                if name == "static":
                    panel.plot(ms, 100 * accuracy, linestyle="", marker="s", color="0.4", label="static networks")
                    best_ms, best = frontier(list(zip(ms, accuracy, strict=True)))
                    panel.plot(best_ms, 100 * best, linestyle="--", color="0.4")
                else:
                    panel.plot(ms, 100 * accuracy, marker="o", label=name.replace("_", " "))
            panel.set_title(f"{ENGINES[engine]}, batch {batch}")
            panel.set_xlabel("milliseconds per image")
            panel.set_ylabel("test accuracy (%)")
    axes[0][0].legend(frameon=False, loc="lower right")
    plots.save(figure, path)


def gains_over_static(result: Result, engine: str, batch: int) -> dict[str, np.ndarray]:
    """How far every dynamic network is above the static ones of the same time per image, in the middle half."""
    found = curves(result, engine, batch)
    rivals = frontier(list(zip(*found.pop("static"), strict=True)))
    gains = {name: gains_in_the_middle(curve, rivals) for name, curve in found.items()}
    return {name: gain for name, gain in gains.items() if gain is not None}


def section(results: list[Result], pictures: Path) -> str:
    text = []
    for data, group in by_variant(results).items():
        everywhere = in_all(group)
        mean = over_seeds(group, everywhere)
        draw(mean, pictures / f"{data}.png")
        text.append(f"![{data}: accuracy over measured milliseconds per image](results/clock/{data}.png)\n")
        rows, above = [], []
        for engine in measured_engines(mean):
            for batch in BATCHES:
                gains = gains_over_static(mean, engine, batch)
                by_seed = [gains_over_static(over_seeds([result], everywhere), engine, batch) for result in group]
                for name, gain in gains.items():
                    means = [of_seed[name].mean() for of_seed in by_seed if name in of_seed]
                    cells = percent(gain.min(), sign=True), percent(gain.max(), sign=True)
                    error = mean_and_error(means)[1] if means else None
                    words = percent(gain.mean(), error, sign=True)
                    rows.append([ENGINES[engine], batch, name, cells[0], words, cells[1]])
                    # The wanted case: one image at a time, as torch runs it.
                    if not error and len(group) > 1:
                        continue
                    if (engine, batch) == ("torch", 1) and gain.min() > 0 and gain.mean() > 2 * (error or 0):
                        above.append(f"`{name}`")
        halvings = min(result["settings"].get("halvings", 1) for result in group)  # results of old have one
        text.append(
            f"{data}: accuracy in points above the best static network of the same time per image, over the middle "
            f"half of the range both cover, {len(group)} {'seeds' if len(group) > 1 else 'seed'}, thresholds solved on "
            f"one half of the test images and scored on the other ({halvings} halving{'s' * (halvings > 1)}):\n"
        )
        text.append(table(["", "batch", "", "least", "mean", "most"], rows))
        some = {point["name"] for result in group for point in result["points"]} - everywhere
        if some:
            text.append(f"Left out, since not every seed has them yet: {', '.join(sorted(some))}.\n")
        text.append(
            verdict(
                True if above else None,
                f"{data}: one image at a time in PyTorch, above every static network in all of the middle half, by "
                f"more than two standard errors: {' and '.join(above) or 'none'}.",
            )
        )
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="clock",
    title="On the clock",
    claim="What early exits save in MACs they save in milliseconds.",
    runs=[Run(data, seed, partial(measure, data)) for data, field in FIELDS.items() for seed in range(field.seeds)],
    section=section,
)
