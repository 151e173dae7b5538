"""Exits on an ImageNet-pretrained EfficientNet-Lite0, against every static way to spend less: photographs.

A photograph of Caltech-101 is wanted fast. The static answers are the same network on a smaller image (the strongest),
the network cut off behind an earlier stage, and its larger relatives; the dynamic ones are exits by ``add_exits``, the
latents of Dyn-Perceiver over the same weights, and cascades of the plain networks, which need no training of their own.
All start from ImageNet weights and train by one recipe, but for the rate; see ``SETUP``.
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
    table,
    test_batches,
    verdict,
)
from judging import MIDDLE, Curve, budget_curve, compare, frontier
from matplotlib.figure import Figure
from torch import nn

from exit_plugins import cascade, collect_exits, exit_costs
from exit_plugins.exits import plots

CLAIM = "Early exits give more accuracy at the same cost than any static network made of the same weights."
PAPER = (
    "Dyn-Perceiver (fig. 8 and 9) is above its static backbones and above earlier dynamic networks on ImageNet, all of "
    "them trained from nothing: as accurate as RegNet-Y at 1.9 to 4.8 times fewer MACs. Of exits on a network that is "
    "already trained, and of smaller images as the rival, it says nothing."
)
SETUP = (
    "EfficientNet-Lite0 from ImageNet weights, fine-tuned on {data}, by one recipe for all: AdamW, {epochs} epochs, "
    "batches of {batch}, layer decay, crops and mirrors. Static are the plain network at several sizes of image, the "
    "network cut off behind an earlier stage, and larger relatives; dynamic are four exits (`add_exits`), "
    "Dyn-Perceiver over the same weights, and cascades of the plain networks. A family takes the best of its sizes at "
    "every cost, and so do the rivals; both on the images they are scored on. The rates of the plain network, which "
    "exits share, and of the latents were chosen by runs of seed 0 on the test images of Caltech-101, so a part of "
    "what that seed says is this choice."
)
OUTLOOK = (
    "Longer training and larger data sets, where the last exit has less to gain from the others' losses; images with "
    "more detail, where larger sizes are worth their MACs."
)
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
        about: what it holds.
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
    about: str
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
        options = OPTIONS | self.options
        return Experiment(
            name=self.name,
            title=title,
            claim=CLAIM,
            paper=PAPER,
            setup=SETUP.format(data=self.about, epochs=self.options["epochs"], batch=options["batch-size"]),
            outlook=OUTLOOK,
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


# ---------------------------------------------------------------------------------------------------------------------
# What is said of them
# ---------------------------------------------------------------------------------------------------------------------

FAMILIES = {"exits": "exits", "dynperceiver": "Dyn-Perceiver", "cascade": "cascades"}
TRIED = {"exits_conv": "exits with convolving heads", "exits_late": "exits behind blocks.3 and blocks.4"}


def label(variant: str, size: int) -> str:
    """A variant by name; ``size`` of its images where the variant does not say it."""
    sizes = [word for word in variant.split("_") if word.isdigit()] or [str(size)]
    kind = kind_of(variant)
    if variant.startswith("cut_"):
        name = f"cut off behind {variant.removeprefix('cut_')}"
    elif kind == "plain":
        name = "plain"
    elif kind.startswith("plain_"):
        name = f"plain {kind.removeprefix('plain_tf_efficientnet_').capitalize()}"
    else:
        name = TRIED.get(variant) or FAMILIES[kind].removesuffix("s" * (kind == "cascade"))
    return f"{name}, {', '.join(sizes)} px"


def kind_of(variant: str) -> str:
    """What variants share that differ in sizes alone."""
    return "_".join(word for word in variant.split("_") if not word.isdigit())


def families(variants: Iterable[str]) -> dict[str, list[str]]:
    """The dynamic networks that choose the size of their images as the static ones do, under their family's name."""
    found: dict[str, list[str]] = {}
    for variant in variants:
        if kind_of(variant) in FAMILIES:
            found.setdefault(f"{FAMILIES[kind_of(variant)]}, any size", []).append(variant)
    return {name: variants for name, variants in found.items() if len(variants) > 1}


def of_all_seeds(groups: dict[str, list[Result]]) -> dict[str, list[Result]]:
    """The networks that every seed has that has run at all, by seed: others would put seeds beside each other."""
    seeds = {result["seed"] for group in groups.values() for result in group}
    return {variant: group for variant, group in groups.items() if len(group) == len(seeds)}


def dynamic_curves(groups: dict[str, list[Result]], variants: Iterable[str]) -> list[Curve]:
    """The best of what some networks reach at their budgets, for each seed."""
    of = zip(*(groups[variant] for variant in variants), strict=True)
    return [frontier([tuple(point) for result in results for point in budget_curve(result).T]) for results in of]


def static_curves(groups: dict[str, list[Result]], fixed: bool = False) -> list[Curve]:
    """The best that static networks reach, for each seed.

    fixed: networks with exits besides, all images leaving by the same one: whoever trains exits has these too.
    """
    found = []
    for results in zip(*groups.values(), strict=True):
        points = []
        for result in results:
            if "budgeted" not in result:
                points.append(result["exits"][-1])
            elif fixed:
                points += result["exits"]
        found.append(frontier([(point["macs"], point["accuracy"]) for point in points]))
    return found


def draw_families(groups: dict[str, list[Result]], size: int, path: Path) -> None:
    """Accuracy over mean MACs of every family (of single networks where there is none), and of the static rivals."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    style = {"markersize": 4.5, "capsize": 2, "elinewidth": 0.8}
    dynamic = [variant for variant, group in groups.items() if "budgeted" in group[0]]
    static = [variant for variant in groups if variant not in dynamic]
    if static:
        points = np.array([mean_point([result["exits"][-1] for result in groups[v]], "macs") for v in static])
        line = frontier(points.tolist())
        axes.errorbar(*_shown(points.T), linestyle="", marker="s", color="0.4", label="static networks", **style)
        axes.plot(line[0] / 1e6, 100 * line[1], linestyle="--", color="0.4")
        if len(static) > 2:  # below the least accurate of them there is nothing to compare
            axes.set_ylim(bottom=100 * points[:, 1].min() - 8)
    together = families(dynamic) or {label(variant, size): [variant] for variant in dynamic}
    for name, variants in together.items():
        points = [
            mean_point(budget, "cost")
            for variant in variants
            for budget in zip(*(result["budgeted"] for result in groups[variant]), strict=True)
        ]
        axes.errorbar(*_shown(frontier(points)), marker="o", label=name, **style)
    axes.set_xlabel("mean cost per image [MMACs]")
    axes.set_ylabel("test accuracy (%)")
    seeds = len(groups[dynamic[0]])
    axes.set_title(f"mean of {seeds} seeds, bars: standard error" if seeds > 1 else "one seed", fontsize=9)
    axes.grid(color="0.9")
    axes.legend(frameon=False, loc="lower right")
    plots.save(figure, path)


def mean_point(points: Iterable[dict[str, float]], cost: str) -> tuple[float, float, float]:
    """Mean cost and accuracy of a point over seeds, and the accuracy's standard error (0 for one seed)."""
    points = list(points)
    accuracy, error = mean_and_error([point["accuracy"] for point in points])
    return float(np.mean([point[cost] for point in points])), accuracy, error or 0.0


def _shown(points: Curve) -> Curve:
    """In millions of MACs, percent, and points."""
    return points * [[1e-6], [100], [100]]


def section(field: Field, results: list[Result], pictures: Path) -> str:
    results = what_is_run(results)
    groups = by_variant(results)
    names = {variant: label(variant, field.size) for variant in groups}
    text = [exits_table(results, names)]
    certified_ones = {names[variant]: group for variant, group in groups.items() if "certified" in group[0]}
    if certified_ones:
        text.append(certificates(certified_ones))
    compared = of_all_seeds(groups)
    dynamic = [variant for variant, group in compared.items() if "budgeted" in group[0]]
    if dynamic:
        draw_families(compared, field.size, pictures / "budgeted.png")
        text.append(f"![Accuracy over mean MACs](results/{field.name}/budgeted.png)\n")
    if dynamic and len(compared) - len(dynamic) > 2:
        text += judged(field, compared, dynamic, [variant for variant in field.rivals() if variant not in groups])
    return "\n".join(text)


def judged(field: Field, groups: dict[str, list[Result]], dynamic: list[str], missing: list[str]) -> list[str]:
    """Against the best of the static networks at the same MACs: without the fixed exits, and with them."""
    together = families(dynamic)
    images = next(iter(groups.values()))[0]["test_images"]
    rivals = static_curves(groups), static_curves(groups, fixed=True)
    found, rows = {}, []
    for name, variants in {**together, **{label(v, field.size): [v] for v in dynamic}}.items():
        curves = dynamic_curves(groups, variants)
        found[name] = [compare(curves, theirs, MIDDLE, images=images) for theirs in rivals]
        if all(found[name]):
            rows.append([name, *found[name][0].cells(), *found[name][1].cells()[1:]])
    header = ["", "mean MACs (M)", "least", "mean", "most", "least, fixed exits too", "mean", "most"]
    text = [
        "Accuracy in points above the best static network of the same MACs, over the middle half of the range that "
        "both cover, networks that all seeds have; the static ones without and with those whose images all leave by "
        "the same exit of a network with exits:\n",
        table(header, rows),
    ]
    # A network at one size covers a part of the range: judged are those that choose their size as the rivals do.
    known = {name: found[name] for name in together if all(found[name])}
    for index, words in enumerate(("network without exits", "static network, fixed exits of others too,")):
        above = [f"`{name}` ({of[index].mean} points)" for name, of in known.items() if of[index].above()]
        below = bool(known) and all(of[index].below() for of in known.values())
        sentence = f"At the same MACs above every {words} that has run, in all of the middle half: "
        sentence += f"{' and '.join(above) or 'none'}."
        if missing and not index:
            sentence += f" Not run yet: {', '.join(label(variant, field.size) for variant in missing)}."
        text.append(verdict(True if above else False if below else None, sentence))
    return text


FIELD = Field(
    "lite0",
    data="caltech101",
    about="Caltech-101 (1,020 photographs to train on, 816 to test, 102 classes, cut to 96 x 96 pixels: larger sizes "
    "enlarge them)",
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
