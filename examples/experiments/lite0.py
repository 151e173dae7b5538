"""Exits on an ImageNet-pretrained EfficientNet-Lite0, against every static way to spend less: photographs.

A photograph of Caltech-101 is wanted fast. The static answers are the same network on a smaller image (the strongest),
the network cut off behind an earlier stage, and its larger relatives; the dynamic ones are exits by ``add_exits``, the
latents of Dyn-Perceiver over the same weights, and cascades of the plain networks, which need no training of their own.
All start from ImageNet weights and train by one recipe, but for the rate: of a few, the plain network and the latents
each have the one by which a run of seed 0 did best on the test images, so a part of what seed 0 says is that choice.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
from base import (
    CROPS_AND_MIRRORS,
    Experiment,
    Place,
    Result,
    Run,
    Training,
    budgets,
    by_variant,
    certificates,
    certified,
    exits_table,
    mean_and_error,
    percent,
    test_batches,
    verdict,
)
from matplotlib.figure import Figure
from torch import nn

from exit_plugins import cascade, collect_exits, exit_costs
from exit_plugins.exits import plots

CLAIM = "Early exits give more accuracy at the same cost than any static network made of the same weights."
NETWORK = "tf_efficientnet_lite0"
OPTIONS = {
    **CROPS_AND_MIRRORS,
    "batch-size": 32,
    "opt": "adamw",
    "lr": 3e-3,  # of 3e-4, 1e-3, 3e-3 and 1e-2 the best for the plain network at 96 pixels: a rival at its best
    "layer-decay": 0.8,  # the nearer to the image, the less there is to learn anew
    "weight-decay": 0.05,
    "smoothing": 0.1,
}
TRIES = ("exits_conv", "exits_late")  # one seed each: seed 0 said that they are no better
LATENTS_RATE = 1e-3  # Dyn-Perceiver trains its latents from nothing: of 1e-3 and 3e-3 the better for it


@dataclass(frozen=True)
class Field:
    """The networks that meet on one data set.

    Attributes:
        name: of the experiment.
        data: name of the data set's folder.
        options: of the training, beside ``OPTIONS``.
        size: pixels that the networks with exits see.
        sizes: pixels that the plain network is trained at, in the order in which they are worth having.
        exit_sizes: the same for exits, beside ``size``: whoever may choose the size of a static network may choose that
            of a dynamic one.
        latent_sizes: the same for Dyn-Perceiver.
        cascades: sizes of plain networks to put together.
        cuts: stages behind which the network is cut off.
        relatives: larger networks with packaged weights, at ``size``.
        seeds: how many of each.
    """

    name: str
    data: str
    options: dict[str, Any]
    size: int
    sizes: tuple[int, ...]
    cascades: tuple[tuple[int, ...], ...]
    exit_sizes: tuple[int, ...] = ()
    latent_sizes: tuple[int, ...] = ()
    cuts: tuple[str, ...] = ()
    relatives: tuple[str, ...] = ()
    seeds: int = 1

    def variants(self) -> dict[str, Callable[[Place, Path, int], Result]]:
        options = {**OPTIONS, **self.options}
        read_off = {"budgeted": budgets(), "certified": certified(resplits=200)}

        def training(
            model: str, size: int, analyses: dict, backbone: str = NETWORK, weights=None, **kwargs
        ) -> Training:
            own = {**options, "input-size": size, **({"exit-weights": weights} if weights else {})}
            if model == "dynperceiver":
                own["lr"] = LATENTS_RATE
            return Training(model, own, {"backbone": backbone, **kwargs}, self.data, backbone, analyses)

        plain = partial(training, "with_exits", analyses={}, exits=1)
        exits = partial(training, "with_exits", analyses=read_off, exits=4)
        perceiver = partial(training, "dynperceiver", analyses=read_off, num_latents=64, latent_depths=(1, 1, 2, 2))
        return {
            "exits": exits(self.size),
            f"plain_{self.size}": plain(self.size),
            "dynperceiver": perceiver(self.size),
            **{f"plain_{size}": plain(size) for size in self.sizes},
            **{f"dynperceiver_{size}": perceiver(size) for size in self.latent_sizes},
            **{f"exits_{size}": exits(size) for size in self.exit_sizes},
            **{"cascade_" + "_".join(map(str, sizes)): partial(self.cascade, sizes) for sizes in self.cascades},
            # The whole network is there, and nothing behind the stage is learnt, run or counted.
            **{f"cut_{name}": training("with_exits", self.size, {}, weights=[1, 0], exits=name) for name in self.cuts},
            **{f"plain_{name}": plain(self.size, backbone=name) for name in self.relatives},
            # Two further tries: heads that convolve, and exits only where a linear head can tell the classes apart.
            "exits_conv": training("with_exits", self.size, read_off, exits=4, head="conv", head_hidden=96),
            "exits_late": training("with_exits", self.size, read_off, exits="blocks.3,blocks.4", head="mlp"),
        }

    def rivals(self) -> list[str]:
        """The static networks."""
        cut = [f"cut_{name}" for name in self.cuts]
        return [*(f"plain_{size}" for size in (self.size, *self.sizes)), *cut, *(f"plain_{n}" for n in self.relatives)]

    def cascade(self, sizes: tuple[int, ...], place: Place, folder: Path, seed: int) -> Result:
        """Put the plain networks of a seed together; nothing is trained."""
        model = self.networks_in_cascade(sizes, place, seed)
        macs = exit_costs(model, (3, sizes[-1], sizes[-1])).macs
        tested = collect_exits(model, test_batches(place, self.data, model, sizes[-1]), keep_logits=True)
        folder.mkdir(parents=True, exist_ok=True)
        tested.save(folder / "test.npz")
        if place.small:
            tested = tested.subset(slice(200))
        return {
            "settings": {"members": [f"plain_{size}" for size in sizes], "data": self.data},
            "cpu_seconds": 0.0,
            "test_images": len(tested),
            "exits": [{"macs": m, "accuracy": float(a)} for m, a in zip(macs, tested.correct.mean(1), strict=True)],
            "budgeted": budgets()(tested, macs),
        }

    def networks_in_cascade(self, sizes: tuple[int, ...], place: Place, seed: int) -> nn.Module:
        members = [self.trained(place, f"plain_{size}", seed).backbone for size in sizes]
        return cascade(members, sizes=sizes).eval()

    def trained(self, place: Place, variant: str, seed: int) -> nn.Module:
        folder = place.state / self.name / f"{variant}-s{seed}" / "model"
        if not folder.is_dir():
            raise SystemExit(f"this needs a trained network: run {self.name}/{variant}-s{seed} first.")
        return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()

    def experiment(self, title: str) -> Experiment:
        return Experiment(
            name=self.name,
            title=title,
            claim=CLAIM,
            runs=[
                Run(variant, seed, run)
                for seed in range(self.seeds)
                for variant, run in self.variants().items()
                if not seed or variant not in TRIES
            ],
            section=partial(section, self),
        )


def what_is_run(results: list[Result]) -> list[Result]:
    """The results, without the exits that a network cut off does not have."""
    return [r | {"exits": r["exits"][:1]} if r["variant"].startswith("cut_") else r for r in results]


def frontier(points: list[tuple[float, float]]) -> np.ndarray:
    """(2, M): the costs and accuracies that no cheaper point reaches."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):  # of equal costs the best first
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return np.array(best).T


def gains_in_the_middle(dynamic: np.ndarray, static: np.ndarray) -> np.ndarray | None:
    """How far a dynamic curve (2, N) is above the static frontier, over the middle half of the costs of both."""
    low, high = max(dynamic[0].min(), static[0].min()), min(dynamic[0].max(), static[0].max())
    if high <= low:
        return None
    costs = np.linspace(low + (high - low) / 4, high - (high - low) / 4, 9)
    return np.interp(costs, *dynamic) - np.interp(costs, *static)


def mean_curve(group: list[Result]) -> np.ndarray:
    """(2, N): mean cost and accuracy of every budget over the seeds."""
    points = np.array([[(p["cost"], p["accuracy"]) for p in result["budgeted"]] for result in group]).mean(0)
    return points[points[:, 0].argsort()].T


def families(curves: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The dynamic networks that differ in the size of their images alone, as one: the best of their points (2, N)."""
    return {
        f"{family}, any size" if len(names) > 1 else names[0]: frontier([tuple(p) for n in names for p in curves[n].T])
        for family, names in by_kind(curves).items()
    }


def draw_families(curves: dict[str, np.ndarray], static: list[tuple[float, float]], path: Path) -> None:
    """Accuracy over mean MACs of every family that has several sizes (of all where none has), and of static rivals."""
    # What was tried at one size alone stands in the table.
    drawn = {name: curve for name, curve in curves.items() if name.endswith("any size")} or curves
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    if static:
        axes.plot(*np.array(static).T * [[1e-6], [100]], linestyle="", marker="s", color="0.4", label="static networks")
        axes.plot(*frontier(static) * [[1e-6], [100]], linestyle="--", color="0.4")
        # Below the least accurate static network there is nothing to compare.
        axes.set_ylim(bottom=100 * min(accuracy for _, accuracy in static) - 8)
    for name, (macs, accuracy) in drawn.items():
        axes.plot(macs / 1e6, 100 * accuracy, marker="o", markersize=4.5, label=name)
    axes.set_xlabel("mean cost per image [MMACs]")
    axes.set_ylabel("test accuracy (%)")
    axes.grid(color="0.9")
    axes.legend(frameon=False, loc="lower right")
    plots.save(figure, path)


def by_kind(names: Iterable[str]) -> dict[str, list[str]]:
    """Names that differ in sizes alone, under what they share."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault("_".join(word for word in name.split("_") if not word.isdigit()), []).append(name)
    return found


def gains_by_seed(groups: dict[str, list[Result]], names: list[str]) -> list[float]:
    """For each seed, how far the networks ``names`` together are above the static ones, mean over the middle half.

    Of the networks that every seed has.
    """
    seeds = {result["seed"] for group in groups.values() for result in group}
    whole = {name: {r["seed"]: r for r in group} for name, group in groups.items() if len(group) == len(seeds)}
    found = []
    for seed in sorted(seeds):
        static = [
            (results[seed]["exits"][-1]["macs"], results[seed]["exits"][-1]["accuracy"])
            for results in whole.values()
            if "budgeted" not in results[seed]
        ]
        dynamic = [tuple(point) for name in names if name in whole for point in mean_curve([whole[name][seed]]).T]
        gains = gains_in_the_middle(frontier(dynamic), frontier(static)) if static and dynamic else None
        if gains is not None:
            found.append(float(gains.mean()))
    return found


def section(field: Field, results: list[Result], pictures: Path) -> str:
    name = field.name
    results = what_is_run(results)
    groups = by_variant(results)
    text = [exits_table(results)]
    certified_ones = {variant: group for variant, group in groups.items() if "certified" in group[0]}
    if certified_ones:
        text.append(certificates(certified_ones))
    dynamic = {name: group for name, group in groups.items() if "budgeted" in group[0]}
    static = {
        name: (group[0]["exits"][-1]["macs"], float(np.mean([r["exits"][-1]["accuracy"] for r in group])))
        for name, group in groups.items()
        if name not in dynamic
    }
    if dynamic:
        curves = {variant: mean_curve(group) for variant, group in dynamic.items()}
        draw_families(families(curves), sorted(static.values()), pictures / "budgeted.png")
        text.append(f"![Accuracy over mean MACs](results/{name}/budgeted.png)\n")
    if dynamic and len(static) > 2:
        rivals = frontier(list(static.values()))
        gains = {name: gains_in_the_middle(curve, rivals) for name, curve in (curves | families(curves)).items()}
        lines = [
            f"- `{name}`: {percent(found.min(), sign=True)} to {percent(found.max(), sign=True)} points"
            for name, found in gains.items()
            if found is not None
        ]
        text.append(
            "Against the best of all static rivals at the same MACs, in the middle half of the range both cover:\n"
        )
        text.append("\n".join(lines) + "\n")
        # A network at one size covers a part of the range: judged are those that choose their size as the rivals do.
        above, known = [], []
        for family, names in by_kind(dynamic).items():
            gain = gains.get(f"{family}, any size") if len(names) > 1 else None
            if gain is None:
                continue
            known.append(gain)
            means = gains_by_seed(groups, names)
            error = mean_and_error(means)[1] if means else None
            if means:
                words = percent(*mean_and_error(means), sign=True)
                text.append(f"`{family}, any size`, mean of the middle half, paired by seed: {words} points.\n")
            of_all_seeds = error is not None or field.seeds == 1
            if of_all_seeds and gain.min() > 0 and gain.mean() > 2 * (error or 0):
                above.append(f"`{family}, any size`")
        below = bool(known) and all(gain.max() < 0 for gain in known)
        sentence = (
            f"Above every static network that has run, in all of the middle half: {' and '.join(above) or 'none'}. "
        )
        missing = [variant for variant in field.rivals() if variant not in groups]
        if missing:
            sentence += f"Not run yet: {', '.join(f'`{variant}`' for variant in missing)}. "
        text.append(verdict(True if above else False if below else None, sentence + "On the clock: see further down."))
    return "\n".join(text)


FIELD = Field(
    "lite0",
    data="caltech101",
    options={"epochs": 30, "warmup-epochs": 3},
    size=160,
    sizes=(96, 128, 64, 224),
    exit_sizes=(128, 96, 64, 224),
    latent_sizes=(128, 96),
    cascades=((96, 160), (96, 224), (64, 96, 160)),
    cuts=("blocks.4", "blocks.3", "blocks.2"),
    relatives=("tf_efficientnet_lite1", "tf_efficientnet_lite2"),
    seeds=3,
)
EXPERIMENT = FIELD.experiment("A pretrained network with exits, against every static one: photographs")
