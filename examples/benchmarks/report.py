"""Write the tables and the picture of docs/benchmarks.md from what the benchmarks left as JSON.

    python examples/benchmarks/report.py        # make benchmarks measures what is missing, and does this

Every table of the page stands between marks that name its file, `<!-- table: forward -->` for forward.json; the prose
around them stays as it is. A benchmark whose file is not there says so in the place of its table.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from bench_tables import ROOT, TABLES, Document, caption, grouped
from bench_targets import targets
from matplotlib.lines import Line2D
from page_tables import fill

from exit_plugins.exits.files import atomic_write

RESULTS = ROOT / "docs" / "results" / "benchmarks"
PAGE = ROOT / "docs" / "benchmarks.md"
DRAWN = ("forward", "adaptive")
MARKERS = "osD^vP*X"


def read(results: Path) -> dict[str, Document]:
    """The benchmarks' JSON that is there, by the benchmark's name."""
    files = {name: results / f"{name}.json" for name in TABLES}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in files.items() if path.is_file()}


def filled(page: str, documents: Mapping[str, Document], picture_name: str) -> str:
    """The page's text with every table made of ``documents``.

    Raises:
        ValueError: the page asks for a table there is none of, or a file is not what its benchmark writes.
    """

    def make(name: str) -> str:
        if name == "targets":
            return targets(documents)
        if name == "picture":
            missing = [each for each in DRAWN if each not in documents]
            return _missing(missing[0]) if missing else f"![Time to each exit, and speed-up]({picture_name})"
        if name not in TABLES:
            raise ValueError(f"no benchmark makes a table {name!r}: {', '.join(['targets', 'picture', *TABLES])}.")
        if name not in documents:
            return _missing(name)
        try:
            return f"{TABLES[name](documents[name])}\n\n{caption(documents[name])}"
        except (KeyError, IndexError, StopIteration) as error:
            again = f"measure again: make benchmarks ONLY={name} FORCE=1"
            raise ValueError(f"{name}.json is not what its benchmark writes now ({error!r}); {again}") from error

    return fill(page, make)


def _missing(name: str) -> str:
    return f"Not measured yet: `make benchmarks ONLY={name}`."


def picture(forward: Document, adaptive: Document, path: Path) -> None:
    """Time to each exit over the plain network beside MACs, and measured beside ideal speed-up.

    Colours are modes, markers batch sizes.
    """
    rows = forward["rows"] + adaptive["rows"]
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    batches = sorted({row["batch"] for row in rows})

    def style(row: dict) -> dict:
        return dict(color=f"C{modes.index(row['mode'])}", marker=MARKERS[batches.index(row["batch"]) % 8], alpha=0.8)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for _, exits in grouped(forward["rows"], "mode", "batch"):
        macs, times = [row["macs_ratio"] for row in exits], [row["ratio"] for row in exits]
        left.plot(macs, times, linewidth=0.8, **style(exits[0]))
    left.axline((1, 1), slope=1, color="grey", linestyle=":", zorder=0)
    left.set(xlabel="MACs to the exit over the plain network's", ylabel="time to the exit over the plain network's")
    left.set_title("Every exit against the plain network run the same way")
    for row in adaptive["rows"]:
        right.plot(row["ideal"], row["speedup"], linestyle="none", **style(row))
    top = max(row["ideal"] for row in adaptive["rows"])
    right.plot([1, top], [1, top], color="grey", linestyle=":", zorder=0)
    right.plot([1, top], [0.9, 0.9 * top], color="grey", linestyle="--", linewidth=0.8, zorder=0)
    right.annotate("0.90 of ideal", (top, 0.9 * top), (0, -26), textcoords="offset points", ha="right", va="top")
    right.set(xlabel="ideal speed-up, from measured times to the exits", ylabel="measured speed-up")
    right.set_title("Adaptive runs under forced mixes of exits")
    dots = dict(color="black", linestyle="none")
    handles = [Line2D([], [], color=f"C{k}", linewidth=4, label=mode) for k, mode in enumerate(modes)]
    handles += [Line2D([], [], marker=MARKERS[k % 8], label=f"batch {size}", **dots) for k, size in enumerate(batches)]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def write(page: Path, results: Path) -> None:
    """Fill the page in place, and draw the picture beside it where both of its files are there."""
    documents = read(results)
    image = page.with_suffix(".png")
    text = filled(page.read_text(encoding="utf-8"), documents, image.name)
    if all(name in documents for name in DRAWN):
        picture(documents["forward"], documents["adaptive"], image)
    with atomic_write(page) as file:
        file.write(text)
    print(f"{page}: {len(documents)} of {len(TABLES)} benchmarks are measured")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    parser.add_argument("--page", type=Path, default=PAGE)
    args = parser.parse_args(argv)
    try:
        write(args.page, args.results)
    except ValueError as error:
        raise SystemExit(f"{args.page}: {error}") from error


if __name__ == "__main__":
    main()
