"""The pictures people expect of a multi-exit model. Needs matplotlib; every function returns a Figure.

Colours are Okabe and Ito's for categories and a ramp of even lightness for exits, and nothing is told by colour alone:
the pictures survive a black-and-white printer and colour blindness.
"""

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .files import atomic_write
from .policy import ExitPolicy
from .table import ExitTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .calibration import Calibration
    from .evaluation import AnytimePoint, BudgetPoint, PolicyResult

__all__ = [
    "budget_curve",
    "cka_heatmap",
    "cka_with_labels",
    "class_exits",
    "easiest_and_hardest",
    "exit_shares",
    "reliability",
    "sample_indices",
    "save",
    "si_unit",
]

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_MARKERS = ("o", "s", "^", "D", "v", "P")
_HATCHES = ("", "///", "...", "\\\\\\", "xx", "++", "oo", "--")


def _figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple["Figure", Any]:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ImportError("pictures need matplotlib: pip install 'exit-plugins[plots]'") from error
    # No pyplot: nothing global, nothing to close, no display looked for.
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **kwargs)


def _dress(axes: "Axes", xlabel: str, ylabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _exit_colours(num_exits: int) -> list[str]:
    """From light (first exit) to dark (last), telling apart also in grey."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return [to_hex(colormaps["viridis"](v)) for v in np.linspace(0.95, 0.1, num_exits)]


def si_unit(largest: float) -> tuple[float, str]:
    """Divisor and prefix that make ``largest`` readable: 4e8 -> (1e6, "M")."""
    for divisor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ")):
        if abs(largest) >= divisor:
            return divisor, prefix
    return 1.0, ""


def save(figure: "Figure", path: str | os.PathLike[str], dpi: int = 150) -> None:
    """Write the picture, whole or not at all; the format is the ending's (png, svg, pdf).

    ValueError for another ending.
    """
    ending = os.path.splitext(os.fspath(path))[1].lstrip(".").lower()
    if not ending:
        raise ValueError(f"{path} has no ending that says a picture format; use .png, .svg or .pdf.")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=ending, dpi=dpi)


def budget_curve(
    curves: Mapping[str, Sequence["BudgetPoint"]] | Sequence["BudgetPoint"],
    anytime: Sequence["AnytimePoint"] | None = None,
    unit: str = "MACs",
) -> "Figure":
    """Accuracy over what was spent on the test split, a line per curve with its interval; the exits as stars.

    Args:
        curves: name -> points of ``budgeted_curve``, or the points alone.
        anytime: ``anytime_curve`` with costs: what each exit gets when everybody leaves there.
        unit: of the costs; ``MACs`` gets its prefix, so does ``s``.

    Raises:
        ValueError: there are no points.
    """
    if not isinstance(curves, Mapping):
        curves = {"budgeted": curves}
    alone = [(p.cost, 100 * p.accuracy) for p in anytime or [] if p.cost is not None]
    if not any(len(points) for points in curves.values()) and not alone:
        raise ValueError("there is no point to draw.")
    figure, axes = _figure(6.4, 4.2)
    costs = [p.cost for points in curves.values() for p in points] + [cost for cost, _ in alone]
    divisor, prefix = si_unit(max(costs))
    for i, (name, points) in enumerate(curves.items()):
        points = sorted(points, key=lambda p: p.cost)
        x = [p.cost / divisor for p in points]
        # As many markers as colours: the second time round they are paired otherwise.
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[(i + i // len(_COLOURS)) % len(_MARKERS)]
        axes.plot(x, [100 * p.accuracy for p in points], color=colour, marker=marker, markersize=4.5, label=name)
        low, high = zip(*(p.interval for p in points), strict=True)
        axes.fill_between(x, 100 * np.array(low), 100 * np.array(high), color=colour, alpha=0.15, linewidth=0)
    if alone:
        x, y = [cost / divisor for cost, _ in alone], [accuracy for _, accuracy in alone]
        axes.plot(x, y, linestyle=":", color="0.35", marker="*", markersize=11, label="one exit for all")
        for k, point in enumerate(zip(x, y, strict=True)):
            axes.annotate(f"exit {k + 1}", point, xytext=(4, -12), textcoords="offset points", fontsize=8, color="0.35")
    _dress(axes, f"mean cost per image [{prefix}{unit}]", "accuracy [%]")
    axes.legend(frameon=False, loc="lower right")
    return figure


def exit_shares(points: Sequence["BudgetPoint"], unit: str = "MACs") -> "Figure":
    """Where the test samples left at each budget: stacked bars (DVT, Fig. 10). ValueError if there are no points."""
    if not points:
        raise ValueError("there is no point to draw.")
    figure, axes = _figure(6.4, 4.2)
    divisor, prefix = si_unit(max(p.budget for p in points))
    _stack(axes, np.stack([p.result.shares for p in points]), [f"{p.budget / divisor:.3g}" for p in points])
    axes.set_xlabel(f"budget per image [{prefix}{unit}]")
    axes.set_ylabel("images [%]")
    return figure


def _stack(axes: "Axes", shares: NDArray[Any], labels: Sequence[str], horizontal: bool = False) -> None:
    rows, num_exits = shares.shape
    base = np.zeros(rows)
    for k, colour in enumerate(_exit_colours(num_exits)):
        options: dict[str, Any] = dict(
            color=colour, edgecolor="white", linewidth=0.6, hatch=_HATCHES[k % len(_HATCHES)]
        )
        options["label"] = f"exit {k + 1}"
        if horizontal:
            axes.barh(range(rows), 100 * shares[:, k], left=base, height=0.8, **options)
        else:
            axes.bar(range(rows), 100 * shares[:, k], bottom=base, width=0.8, **options)
        base += 100 * shares[:, k]
    if horizontal:
        axes.set_yticks(range(rows), labels)
        axes.set_xlim(0, 100)
        axes.set_ylim(rows - 0.4, -0.6)
    else:
        axes.set_xticks(range(rows), labels)
        axes.set_ylim(0, 100)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        loc="lower center",
        bbox_to_anchor=(0.5, 1.0),
        ncols=min(num_exits, 6),
        fontsize=8,
        handlelength=1.6,
        columnspacing=1.2,
    )


def class_exits(result: "PolicyResult", class_names: Sequence[str] | None = None, most: int = 12) -> "Figure":
    """Where each class leaves: the ``most`` classes that leave earliest and as many that leave latest."""
    mean_exit = result.class_shares @ np.arange(result.class_shares.shape[1])
    order = np.argsort(mean_exit, kind="stable")
    if len(order) > 2 * most:
        order = np.concatenate([order[:most], order[-most:]])
    labels = [_class_name(result.classes[i], class_names) for i in order]
    figure, axes = _figure(6.4, max(2.4, 0.24 * len(order) + 1.0))
    _stack(axes, result.class_shares[order], labels, horizontal=True)
    axes.set_xlabel("images [%]")
    axes.tick_params(axis="y", labelsize=8)
    if len(result.classes) > 2 * most:
        axes.axhline(most - 0.5, color="black", linewidth=1.2)
    return figure


def _class_name(index: int, class_names: Sequence[str] | None) -> str:
    return str(class_names[index]) if class_names is not None and 0 <= index < len(class_names) else f"class {index}"


def reliability(calibrations: Sequence["Calibration"]) -> "Figure":
    """Reliability diagram of every exit: accuracy over confidence, with the share of samples in each bin below.

    ValueError if there is no exit.
    """
    count = len(calibrations)
    if count == 0:
        raise ValueError("there is no exit to draw.")
    columns = count if count <= 5 else 4
    rows = -(-count // columns)
    figure, grid = _figure(2.3 * columns + 0.6, 2.6 * rows, rows, columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    for axes, found in zip(grid.flat, calibrations, strict=False):
        bins = len(found.bin_share)
        centres = (np.arange(bins) + 0.5) / bins
        axes.bar(centres, found.bin_share, width=1 / bins, color="0.85", label="share of images")
        axes.plot([0, 1], [0, 1], color="0.5", linewidth=1, linestyle="--")
        known = found.bin_share > 0
        axes.plot(found.bin_confidence[known], found.bin_accuracy[known], color=_COLOURS[0], marker="o", markersize=3)
        axes.set_title(f"exit {found.exit_index + 1}: ECE {100 * found.ece:.1f} %", fontsize=9)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.set_xticks([0, 0.5, 1])
        axes.tick_params(labelbottom=True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("confidence", fontsize=10)
    figure.supylabel("accuracy (bars: share)", fontsize=10)
    return figure


def cka_heatmap(matrix: NDArray[Any], names: Sequence[str] | None = None) -> "Figure":
    """Similarity of exits, and of exits and labels (Dyn-Adapter, Fig. 4), from ``similarity.cka_matrix``.

    ValueError if it is not square.
    """
    matrix = np.asarray(matrix)
    size = len(matrix)
    if matrix.shape != (size, size) or size == 0:
        raise ValueError(f"expected a square matrix, got shape {matrix.shape}.")
    names = [f"exit {i + 1}" for i in range(size)] if names is None else list(names)
    figure, axes = _figure(0.62 * size + 1.9, 0.62 * size + 1.1)
    image = axes.imshow(matrix, vmin=0, vmax=1, cmap="cividis")
    axes.set_xticks(range(size), names, rotation=45, ha="right")
    axes.set_yticks(range(size), names)
    for i in range(size):
        for j in range(size):
            # Dark fields carry light figures and the other way round.
            ink = "black" if matrix[i, j] > 0.55 else "white"
            axes.text(j, i, f"{matrix[i, j]:.2f}", ha="center", va="center", fontsize=8, color=ink)
    figure.colorbar(image, ax=axes, label="linear CKA", shrink=0.85)
    return figure


def cka_with_labels(rows: Mapping[str, Sequence[float]]) -> "Figure":
    """Similarity of a model's layers and the labels, from shallow to deep, one row per model (Dyn-Adapter, Fig. 4).

    Args:
        rows: name of a model to its layers' ``similarity.cka`` with the labels, each in [0, 1].

    Raises:
        ValueError: there is nothing to draw.
    """
    if not rows or not all(len(values) for values in rows.values()):
        raise ValueError("cka_with_labels draws at least one model with at least one layer.")
    figure, axes = _figure(7.0, 0.9 * len(rows) + 0.9, rows=len(rows), squeeze=False)
    highest = max(max(max(values) for values in rows.values()), 1e-6)  # one scale for all, as fine as it can be
    for axis, (name, values) in zip(axes[:, 0], rows.items(), strict=True):
        image = axis.imshow(np.asarray([values], dtype=float), vmin=0, vmax=highest, cmap="Blues", aspect="auto")
        for index, value in enumerate(values):
            color = "white" if value > 0.5 * highest else "black"
            axis.text(index, 0, f"{value:.2f}", ha="center", va="center", color=color)
        axis.set_xticks(range(len(values)), [str(index + 1) for index in range(len(values))])
        axis.set_yticks([])
        axis.set_title(name, loc="left", fontsize=10)
    axes[-1, 0].set_xlabel("layer, shallow to deep")
    figure.colorbar(image, ax=list(axes[:, 0]), label="CKA with the labels")
    return figure


def sample_indices(table: ExitTable, policy: ExitPolicy, count: int = 8) -> tuple[NDArray[Any], NDArray[Any]]:
    """Easiest and hardest samples, (<= count,) indices each, as in Dyn-Perceiver's Fig. 12.

    Easiest: rightly answered at the first exit anybody left at, surest first. Hardest: rightly answered at the last
    exit anybody reached, those the earlier exits were least sure of first. Right answers come first; wrong ones fill
    up only where there are too few.

    Indices (n,) into the table's N samples.
    """
    exits = policy.choose(table.confidence)
    correct = table.correct[exits, np.arange(table.num_samples)]
    sure = np.nan_to_num(table.confidence, nan=0.0)

    def pick(exit_index: int, score: NDArray[Any]) -> NDArray[Any]:
        members = np.flatnonzero(exits == exit_index)
        surest: NDArray[Any] = members[np.lexsort((-score[members], ~correct[members]))][:count]
        return surest

    first, last = int(exits.min()), int(exits.max())
    # When all leave at one exit, the least sure of them are the hard ones.
    doubt = -sure[:last].max(0) if last > first else -sure[first]
    return pick(first, sure[first]), pick(last, doubt)


def easiest_and_hardest(
    images: Sequence[Any],
    table: ExitTable,
    policy: ExitPolicy,
    class_names: Sequence[str] | None = None,
    count: int = 8,
) -> "Figure":
    """The images that leave surest at the first exit, and those that need the last (Dyn-Perceiver, Fig. 12).

    Args:
        images: in the table's order, anything indexable: PIL images, (H, W, C) or (C, H, W) arrays or tensors of
            0..255 or 0..1, or a data set of (image, target). Only the images shown are read.
        table, policy: what decides.
        class_names: index -> name, written under each image; a wrong answer is written beside the truth.
        count: images per row.

    Raises:
        ValueError: the table holds no samples.
    """
    if table.num_samples == 0:
        raise ValueError("the table holds no samples; there is no image to show.")
    exits = policy.choose(table.confidence)
    easy, hard = sample_indices(table, policy, count)
    columns = max(len(easy), len(hard))
    figure, grid = _figure(1.25 * max(columns, 3), 3.9, 2, columns, squeeze=False)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 0.95), hspace=0.12)
    for row, (word, indices) in enumerate((("easiest", easy), ("hardest", hard))):
        for axes in grid[row]:
            axes.set_axis_off()
        for axes, i in zip(grid[row], indices, strict=False):
            axes.imshow(_pixels(images[int(i)]), interpolation="nearest")
            answer, truth = table.prediction[exits[i], i], table.target[i]
            name = _class_name(truth, class_names)
            wrong = answer != truth
            label = name if not wrong else f"{name}\n(said {_class_name(answer, class_names)})"
            ink = _COLOURS[1] if wrong else "black"
            axes.text(0.5, -0.05, label, transform=axes.transAxes, fontsize=7, ha="center", va="top", color=ink)
        if len(indices):
            share = 100 * (exits == exits[indices[0]]).mean()
            grid[row, 0].text(
                0.0,
                1.06,
                f"{word}: left at exit {exits[indices[0]] + 1}, as {share:.0f} % of the images did",
                transform=grid[row, 0].transAxes,
                fontsize=9,
                ha="left",
                va="bottom",
            ).set_in_layout(False)  # wider than the image it stands over
    return figure


def _pixels(image: Any) -> NDArray[Any]:
    if isinstance(image, (tuple, list)):
        image = image[0]
    pixels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.ndim != 3:
        raise ValueError(f"expected an image (H, W, C), got shape {pixels.shape}.")
    if pixels.shape[-1] not in (1, 3, 4) and pixels.shape[0] in (1, 3, 4):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.dtype.kind == "f":
        # Normalised images are stretched to the full range: they show what the model saw, in false brightness.
        low, high = (0.0, 1.0) if pixels.min() >= 0 and pixels.max() <= 1 else (pixels.min(), pixels.max())
        pixels = np.clip((pixels - low) / max(high - low, 1e-12), 0, 1)
    return pixels.repeat(3, axis=-1) if pixels.shape[-1] == 1 else pixels
