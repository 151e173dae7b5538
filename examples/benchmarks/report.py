"""Tables in Markdown, and a picture, of what the benchmarks left as JSON.

    python examples/benchmarks/report.py forward.json adaptive.json rivals.json --picture benchmarks.png

Every file makes a table; the picture shows them all.
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from exit_plugins.exits.files import atomic_write

MARKERS = "osD^vP*X"
Document = dict  # what timing.write_json wrote: command, machine, rows


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def where(document: Document) -> str:
    machine = document["machine"]
    device = "" if machine["device"] == "cpu" else f", {machine['device']}"
    return f"{machine['cpu']}{device}, {machine['threads']} thread(s), torch {machine['torch']}, {machine['date']}"


def by_case(rows: list[dict]) -> list[tuple[str, int, list[dict]]]:
    """(mode, batch, its rows), as they stand in the file."""
    return [(*key, list(group)) for key, group in groupby(rows, lambda row: (row["mode"], row["batch"]))]


def forward_table(document: Document) -> str:
    threads = str(document["machine"]["threads"])
    rows = []
    for mode, batch, exits in by_case(document["rows"]):
        cells = [f"{row['ratio']:.2f} ({row['ratio_folded']:.2f})" for row in exits]
        spread = max(row["ratio_iqr"] for row in exits)
        rows.append([mode, threads, str(batch), f"{exits[0]['plain_time']['median_ms']:.1f}", *cells, f"{spread:.2f}"])
    macs = [f"{row['macs_ratio']:.2f}" for row in by_case(document["rows"])[0][2]]
    rows.append(["MACs", "", "", "", *macs, ""])
    exits = [f"exit {k + 1}" for k in range(len(macs))]
    return table(["mode", "threads", "batch", f"{document['plain']} ms", *exits, "iqr up to"], rows)


def adaptive_table(document: Document) -> str:
    first = document["command"]["mode"][0]
    rows = [
        [
            row["mode"],
            str(document["machine"]["threads"]),
            str(row["batch"]),
            row["mix"],
            f"{row['speedup']:.2f}",
            f"{row['speedup_iqr']:.2f}",
            f"{row['ideal']:.2f}",
            f"{row['of_ideal']:.2f}",
            f"{row['ideal_macs']:.2f}",
            f"{row['per_call']['median_ms']:.1f}",
            f"{row['per_call']['p95_ms']:.1f}",
            f"{row['over_first_mode']:.2f}",
        ]
        for row in document["rows"]
    ]
    header = ["mode", "threads", "batch", "mix (forced)", "speed-up", "iqr", "ideal", "of ideal", "by MACs"]
    return table([*header, "p50 ms", "p95 ms", f"over {first}"], rows)


def rivals_table(document: Document) -> str:
    rows = [
        [
            row["name"],
            str(row["batch"]),
            f"{row['macs'] / 1e9:.3f}",
            f"{row['per_image']['median_ms']:.2f}",
            f"{row['per_image']['iqr_ms']:.2f}",
            f"{1e3 / row['per_image']['median_ms']:.0f}",
        ]
        for row in document["rows"]
    ]
    return table(["network", "batch", "GMACs", "ms per image", "iqr", "images/s"], rows)


def kind(document: Document) -> str:
    row = document["rows"][0]
    return "forward" if "macs_ratio" in row else "adaptive" if "of_ideal" in row else "rivals"


TABLES = {"forward": forward_table, "adaptive": adaptive_table, "rivals": rivals_table}


def picture(documents: list[Document], path: str) -> None:
    """Time to each exit over the plain network beside MACs, and measured beside ideal speed-up, all runs together.

    Colours are modes, markers batch sizes; open ones are runs on one thread.
    """
    forward, adaptive = (
        [(doc["machine"]["threads"], row) for doc in documents if kind(doc) == name for row in doc["rows"]]
        for name in ("forward", "adaptive")
    )
    modes = list(dict.fromkeys(row["mode"] for _, row in forward + adaptive))
    batches = sorted({row["batch"] for _, row in forward + adaptive})

    def style(threads: int, row: dict) -> dict:
        color = f"C{modes.index(row['mode'])}"
        marker = MARKERS[batches.index(row["batch"]) % 8]
        return dict(color=color, marker=marker, markerfacecolor="none" if threads == 1 else color, alpha=0.8)

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.4), layout="constrained")
    for (_, threads, _), case in groupby(forward, lambda pair: (pair[1]["mode"], pair[0], pair[1]["batch"])):
        exits = [row for _, row in case]
        macs, times = [row["macs_ratio"] for row in exits], [row["ratio"] for row in exits]
        left.plot(macs, times, linewidth=0.8, **style(threads, exits[0]))
    left.axline((1, 1), slope=1, color="grey", linestyle=":", zorder=0)
    left.set(xlabel="MACs to the exit over the plain network's", ylabel="time to the exit over the plain network's")
    left.set_title("Every exit against the plain network run the same way")
    for threads, row in adaptive:
        right.plot(row["ideal"], row["speedup"], linestyle="none", **style(threads, row))
    top = max([row["ideal"] for _, row in adaptive], default=2)
    right.plot([1, top], [1, top], color="grey", linestyle=":", zorder=0)
    right.plot([1, top], [0.9, 0.9 * top], color="grey", linestyle="--", linewidth=0.8, zorder=0)
    right.annotate("0.90 of ideal", (top, 0.9 * top), (0, -26), textcoords="offset points", ha="right", va="top")
    right.set(xlabel="ideal speed-up, from measured times to the exits", ylabel="measured speed-up")
    right.set_title("Adaptive runs under five forced mixes of exits")
    dots = dict(color="black", linestyle="none")
    handles = [Line2D([], [], color=f"C{k}", linewidth=4, label=mode) for k, mode in enumerate(modes)]
    handles += [Line2D([], [], marker=MARKERS[k % 8], label=f"batch {size}", **dots) for k, size in enumerate(batches)]
    handles += [Line2D([], [], marker="o", markerfacecolor="none", label="open: one thread", **dots)]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=9)
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png", dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", help="JSON files of forward.py, adaptive.py and rivals.py")
    parser.add_argument("--picture", help="PNG to write")
    args = parser.parse_args()
    documents = [json.loads(Path(path).read_text()) for path in args.results]
    for path, document in zip(args.results, documents, strict=True):
        print(f"{path}: {document['command'].get('model', '')} ({where(document)})\n")
        print(TABLES[kind(document)](document) + "\n")
    if args.picture:
        picture(documents, args.picture)


if __name__ == "__main__":
    main()
