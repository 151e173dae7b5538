"""Tables in Markdown, and a picture, of what the benchmarks left as JSON.

python examples/benchmarks/report.py forward.json adaptive.json rivals.json --picture benchmarks.png
"""

import argparse
import json
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

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
    """Time to each exit over the plain network beside MACs, and measured beside ideal speed-up, all runs together."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    cases = [
        (mode, f"{mode}, {document['machine']['threads']} thr., batch {batch}", exits)
        for document in documents
        if kind(document) == "forward"
        for mode, batch, exits in by_case(document["rows"])
    ]
    modes = list(dict.fromkeys(mode for mode, _, _ in cases))
    for number, (mode, label, exits) in enumerate(cases):
        shade = f"C{modes.index(mode)}"
        macs, times = [row["macs_ratio"] for row in exits], [row["ratio"] for row in exits]
        left.plot(macs, times, color=shade, alpha=0.5)
        marker = "os^vDP*X<>"[number % 10]
        left.scatter(
            [row["macs_ratio"] for row in exits],
            [row["ratio"] for row in exits],
            color=shade,
            marker=marker,
            label=label,
        )
    left.axline((1, 1), slope=1, color="grey", linestyle=":", zorder=0)
    left.set(xlabel="MACs to the exit over the plain network's", ylabel="time to the exit over the plain network's")
    left.set_title("Forward passes, each against the plain network run the same way")
    left.legend(fontsize=8)
    rows = [row for document in documents if kind(document) == "adaptive" for row in document["rows"]]
    for number, (mode, batch) in enumerate(dict.fromkeys((row["mode"], row["batch"]) for row in rows)):
        mine = [row for row in rows if (row["mode"], row["batch"]) == (mode, batch)]
        right.scatter(
            [row["ideal"] for row in mine],
            [row["speedup"] for row in mine],
            marker="os^vDP*X<>"[number % 10],
            label=f"{mode}, batch {batch}",
        )
    if rows:
        top = max(max(row["ideal"], row["speedup"]) for row in rows)
        line = np.array([1, top])
        right.plot(line, line, color="grey", linestyle=":", label="ideal")
        right.plot(line, 0.9 * line, color="grey", linestyle="--", linewidth=0.8, label="0.90 of ideal")
        right.legend(fontsize=8)
    right.set(xlabel="ideal speed-up, from measured times to the exits", ylabel="measured speed-up")
    right.set_title("Adaptive runs under five forced mixes of exits")
    figure.savefig(path, dpi=110)
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
