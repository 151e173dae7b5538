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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import lite0
import lite0_cifar
import numpy as np
import torch
from base import Experiment, Place, Result, Run, by_variant, table, test_batches, verdict
from judging import MIDDLE, Comparison, Curve, compare, frontier
from lite0 import Field, families, label, mean_point
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
    """One network and its points, one for each budget and, of networks with exits, for each exit."""

    name: str
    static: bool
    model: nn.Module
    tested: int
    points: list["Point"]


@dataclass(frozen=True)
class Point:
    """A policy, accuracy and mean MACs of its budget on images that solved no threshold, and images to time it on.

    ``fixed``: all images leave by the same exit.
    """

    policy: ExitPolicy
    accuracy: float
    macs: float
    images: Tensor
    fixed: bool = False


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
    """A point for each of some budgets from the first exit's cost to the last one's, as far as they differ."""
    halves = [tested.split(0.5, seed * HALVINGS + halving) for halving in range(HALVINGS)]
    found: list[Point] = []
    for budget in np.linspace(macs[0], macs[-1], POLICIES + 1)[1:]:
        policies = [solve_thresholds(fitted, macs, budget=budget, model=model) for fitted, _ in halves]
        results = [evaluate_policy(policy, half, macs) for policy, (_, half) in zip(policies, halves, strict=True)]
        leaves = [policy.choose(tested.confidence) for policy in policies]
        median = np.argsort([macs[exits].mean() for exits in leaves])[HALVINGS // 2]
        if found and np.array_equal(policies[median].thresholds, found[-1].policy.thresholds):
            continue  # more to spend than it knows to use; timed twice, the luckier time would count
        chosen = typical(leaves[median], min(IMAGES, len(tested)), seed)
        accuracy, cost = (fmean(values) for values in zip(*((r.accuracy, r.cost) for r in results), strict=True))
        found.append(Point(policies[median], accuracy, cost, images[chosen]))
    return found


def fixed_points(exits: Sequence[int], tested: ExitTable, macs: np.ndarray, images: Tensor, seed: int) -> list[Point]:
    """A point for each of ``exits`` that all images leave by."""
    chosen = np.random.default_rng(seed).permutation(len(tested))[:IMAGES]
    found = []
    for index in exits:
        policy = ExitPolicy([np.inf] * index + [-np.inf] * (len(macs) - index), costs=macs)
        result = evaluate_policy(policy, tested, macs)
        found.append(Point(policy, result.accuracy, result.cost, images[chosen], fixed=True))
    return found


def ready(field: Field, place: Place, seeds: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """The variants that are trained for each of ``seeds``, and the sizes in their names."""
    found = {}
    for variant in field.variants():
        sizes = tuple(int(word) for word in variant.split("_")[1:] if word.isdigit())
        try:
            for seed in seeds:
                network(field, place, variant, sizes, seed)
        except SystemExit as missing:
            print(f"left out: {variant}, {missing}")
            continue
        found[variant] = sizes
    return found


def network(field: Field, place: Place, variant: str, sizes: tuple[int, ...], seed: int) -> nn.Module:
    if variant.startswith("cascade"):
        return field.networks_in_cascade(sizes, place, seed)
    return field.trained(place, variant, seed)


def contenders(field: Field, place: Place, seed: int) -> list[Contender]:
    """Every network of the field that all seeds have."""
    found = []
    batches: dict[int, Batches] = {}
    for variant, sizes in ready(field, place, range(1 if place.small else field.seeds)).items():
        model = network(field, place, variant, sizes, seed)
        size = sizes[-1] if sizes else field.size
        if size not in batches:
            batches[size] = test_batches(place, field.data, model, size)
        tested = collect_exits(model, batches[size])
        macs = exit_costs(model, (3, size, size)).macs
        images = torch.cat([images for images, _ in batches[size]])
        static = variant.startswith("cut") or model.num_exits == 1
        if static:  # what is cut off ends behind its first exit
            points = fixed_points([0], tested, macs, images, seed)
        else:
            points = points_of(tested, macs, model, images, seed)
            if not variant.startswith("cascade"):  # whose members are in the field themselves
                points += fixed_points(range(model.num_exits), tested, macs, images, seed)
        found.append(Contender(variant, static, model, len(tested), points))
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
                        about[key] = {"name": one.name, "static": one.static, "fixed": point.fixed}
                        about[key] |= {"accuracy": point.accuracy, "macs": point.macs}
                times = interleaved(runs, 1 if place.small else ROUNDS)
                for key, seconds in times.items():
                    milliseconds = 1e3 * seconds / (batch * 2 if place.small else IMAGES)
                    low, median, high = np.percentile(milliseconds, [25, 50, 75])
                    spent = {"ms": float(median), "iqr_ms": float(high - low)}
                    points.append({"engine": engine, "batch": batch, **about[key], **spent})
    settings = {"images": IMAGES, "rounds": ROUNDS, "halvings": HALVINGS, "data": data, "field": field.name}
    return {"settings": settings, "test_images": found[0].tested, "points": points}


# ---------------------------------------------------------------------------------------------------------------------
# What is said of the times
# ---------------------------------------------------------------------------------------------------------------------


def measured(result: Result, engine: str, batch: int) -> dict[str, list[dict[str, Any]]]:
    """The points of each network in one panel."""
    found: dict[str, list[dict[str, Any]]] = {}
    for point in result["points"]:
        if (point["engine"], point["batch"]) == (engine, batch):
            found.setdefault(point["name"], []).append(point)
    return found


def panels(results: list[Result]) -> dict[tuple[str, int], list[dict[str, list[dict[str, Any]]]]]:
    """For each engine and batch size the points of the networks that every seed has there, by seed."""
    found = {}
    for engine in ENGINES:
        for batch in BATCHES:
            seeds = [measured(result, engine, batch) for result in results]
            everywhere = set.intersection(*map(set, seeds))
            if everywhere:
                found[engine, batch] = [{n: points for n, points in s.items() if n in everywhere} for s in seeds]
    return found


def curve(networks: dict[str, list[dict[str, Any]]], wanted: Callable[[dict[str, Any]], bool]) -> Curve:
    """The best of the points that are ``wanted``: rows of milliseconds and accuracy."""
    return frontier([(p["ms"], p["accuracy"]) for points in networks.values() for p in points if wanted(p)])


def against(seeds: list[dict[str, list[dict[str, Any]]]], variants: list[str], images: int) -> list[Comparison | None]:
    """Networks against the static ones, without and with the fixed exits of others."""
    ours = [curve({name: seed[name] for name in variants}, lambda p: not p["fixed"]) for seed in seeds]
    rivals = [lambda p: p["static"], lambda p: p["static"] or p["fixed"]]
    return [compare(ours, [curve(seed, wanted) for seed in seeds], MIDDLE, images=images) for wanted in rivals]


def dynamic_variants(seeds: list[dict[str, list[dict[str, Any]]]]) -> list[str]:
    return [name for name, points in seeds[0].items() if not points[0]["static"]]


def draw(results: list[Result], size: int, path: Path) -> None:
    """One panel for each engine and batch size: the mean over the seeds of every point that all of them have."""
    found = panels(results)
    rows = len({engine for engine, _ in found})
    figure = Figure(figsize=(11, 4.4 * rows), layout="constrained")
    axes = figure.subplots(rows, len(BATCHES), squeeze=False).flatten()
    style = {"markersize": 4.5, "capsize": 2, "elinewidth": 0.8}
    for panel, ((engine, batch), seeds) in zip(axes, found.items(), strict=True):
        means = {name: mean_points([seed[name] for seed in seeds]) for name in seeds[0]}
        dynamic = dynamic_variants(seeds)
        static = [point for name in means if name not in dynamic for point, _ in means[name]]
        fixed = [point for name in dynamic for point, is_fixed in means[name] if is_fixed]
        lows = 100 * min(point[1] for point in static) - 8
        shown = np.array(static).T * [[1], [100], [100]]
        panel.errorbar(*shown, linestyle="", marker="s", color="0.4", label="static networks", **style)
        panel.plot(*(frontier(static)[:2] * [[1], [100]]), linestyle="--", color="0.4")
        if fixed:
            words = "all images at one exit of a network with exits"
            panel.plot(*(np.array(fixed).T[:2] * [[1], [100]]), linestyle="", marker="x", color="0.6", label=words)
        together = families(dynamic) or {label(variant, size): [variant] for variant in dynamic}
        for name, variants in together.items():
            points = [point for variant in variants for point, is_fixed in means[variant] if not is_fixed]
            panel.errorbar(*(frontier(points) * [[1], [100], [100]]), marker="o", label=name, **style)
        panel.set_ylim(bottom=lows)  # below the least accurate static network there is nothing to compare
        panel.set_title(f"{ENGINES[engine]}, batch {batch}")
        panel.set_xlabel("milliseconds per image")
        panel.set_ylabel("test accuracy (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=4)
    plots.save(figure, path)


def mean_points(of_seeds: list[list[dict[str, Any]]]) -> list[tuple[tuple[float, float, float], bool]]:
    """Mean milliseconds and accuracy over seeds, the accuracy's standard error, and whether the exit is fixed."""
    found = []
    for kind in (False, True):
        lists = [[point for point in points if point["fixed"] == kind] for points in of_seeds]
        # Budgets beyond what a network knows to use are left out: one seed may have a point less than another.
        found += [(mean_point(points, "ms"), kind) for points in zip(*lists, strict=False)]
    return found


def section(results: list[Result], pictures: Path) -> str:
    text = []
    header = ["", "batch", "", "ms compared", "least", "mean", "most", "least, fixed exits too", "mean", "most"]
    for data, group in by_variant(results).items():
        size, images = FIELDS[data].size, group[0]["test_images"]
        draw(group, size, pictures / f"{data}.png")
        text.append(f"![{data}: accuracy over measured milliseconds per image](results/clock/{data}.png)\n")
        rows, above = [], ([], [])
        for (engine, batch), seeds in panels(group).items():
            dynamic = dynamic_variants(seeds)
            together = families(dynamic) or {label(variant, size): [variant] for variant in dynamic}
            for name, variants in together.items():
                found = against(seeds, variants, images)
                if not all(found):
                    continue
                cells = [found[0].cells(1, 1), found[1].cells(1, 1)[1:]]
                rows.append([ENGINES[engine], batch, name, *cells[0], *cells[1]])
                if (engine, batch) == ("torch", 1):  # the wanted case: one image at a time, as torch runs it
                    for names, one in zip(above, found, strict=True):
                        names += [f"`{name}` ({one.mean} points)"] if one.above() else []
        text.append(
            f"{data}: accuracy in points above the best static network of the same time per image, over the middle "
            f"half of the range both cover, {len(group)} {'seeds' if len(group) > 1 else 'seed'}, "
            f"{group[0]['settings']['halvings']} halvings:\n"
        )
        text.append(table(header, rows))
        for names, words in zip(above, ("network without exits", "static network, fixed exits too,"), strict=True):
            sentence = f"{data}: one image at a time in PyTorch, above every {words} in all of the middle half: "
            text.append(verdict(True if names else None, sentence + (" and ".join(names) or "none") + "."))
    return "\n".join(text)


EXPERIMENT = Experiment(
    name="clock",
    title="On the clock",
    claim="What early exits save in MACs they save in milliseconds.",
    paper="Dyn-Perceiver (fig. 11) keeps its gain on an i5, a Jetson TX2 and an A100. None of the papers sets itself "
    "beside its own backbone on smaller images.",
    setup="The networks of the two sections on EfficientNet-Lite0 that all seeds have, fused in PyTorch and exported "
    f"to OpenVINO, one thread, {IMAGES} test images that leave by the exits in the shares of all test images, "
    f"interleaved, median of {ROUNDS} rounds. Decoding and scaling are left out, a cascade's own scaling is in. "
    "Accuracies are of all test images, thresholds solved on one half and scored on the other.",
    outlook="A processor on which early stages, with their large maps, take no more of the time than of the MACs; in "
    "batches, more images at once, so that those an exit leaves over still fill the processor.",
    runs=[Run(data, seed, partial(measure, data)) for data, field in FIELDS.items() for seed in range(field.seeds)],
    section=section,
    version=2,  # of typical images, many halvings, fixed exits
)
