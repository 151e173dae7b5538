"""A table in Markdown from the JSON of each benchmark on docs/benchmarks.md."""

import sys
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "docs") not in sys.path:
    sys.path.append(str(ROOT / "docs"))
from page_tables import table  # noqa: E402

Document = dict[str, Any]  # what a script's --json wrote: command, machine, rows; and made_by, the command as typed
RUNTIMES = {"torch": "torch", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def grouped(rows: list[dict], *keys: str) -> list[tuple[tuple, list[dict]]]:
    """Rows that have these keys in common and stand together in the file."""
    return [(key, list(group)) for key, group in groupby(rows, lambda row: tuple(row[name] for name in keys))]


def caption(document: Document) -> str:
    """The command, and where and when it ran."""
    machine = document["machine"]
    device = [] if machine["device"] == "cpu" else [machine["device"]]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    versions = [f"{title} {machine[name]}" for name, title in RUNTIMES.items() if name in machine]
    where = ", ".join([machine["cpu"], *device, threads, *versions, machine["date"]])
    return f"`{document['made_by']}` ({where})"


def forward(document: Document) -> str:
    rows = []
    for (mode, batch), exits in grouped(document["rows"], "mode", "batch"):
        cells = [f"{row['ratio']:.2f} ({row['ratio_folded']:.2f})" for row in exits]
        spread = max(row["ratio_iqr"] for row in exits)
        rows.append([mode, str(batch), f"{exits[0]['plain_time']['median_ms']:.1f}", *cells, f"{spread:.2f}"])
    macs = [f"{row['macs_ratio']:.2f}" for row in exits]
    rows.append(["MACs", "", "", *macs, ""])
    return table(["mode", "batch", f"{document['plain']} ms", *_exits(len(macs)), "iqr up to"], rows)


def adaptive(document: Document) -> str:
    rows = [
        [
            row["mode"],
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
    header = ["mode", "batch", "mix (forced)", "speed-up", "iqr", "ideal", "of ideal", "by MACs", "p50 ms", "p95 ms"]
    return table([*header, f"over {document['rows'][0]['mode']}"], rows)


def modes(document: Document) -> str:
    """Of `exit-plugins profile --modes`."""
    latency = {row["mode"]: row["latency"] for row in document["modes"]}
    mean = {name: sum(times) / len(times) for name, times in latency.items()}
    rows = [
        [
            f"**{name}**" if name == document["recommended"] else name,
            *(f"{1e3 * seconds:.1f}" for seconds in times),
            f"{mean[name] / mean['plain']:.2f}",
        ]
        for name, times in latency.items()
    ]
    exits = [f"{name} ms" for name in _exits(len(latency["plain"]))]
    refused = [f"\n\n`{name}` did not run: {why}" for name, why in document["refused"].items()]
    return table(["mode", *exits, "mean over plain"], rows) + "".join(refused)


def time_per_mac(document: Document) -> str:
    """The modes stand side by side, so that one sees what the later ones bring."""
    modes, rows = document["command"]["mode"], []
    networks = [name for (name,), _ in grouped(document["rows"], "network")]
    ordered = sorted(document["rows"], key=lambda row: (networks.index(row["network"]), row["batch"]))
    for (name, plain, batch), exits in grouped(ordered, "network", "plain", "batch"):
        by_mode = dict(grouped(exits, "mode"))
        cells = [name, plain, str(batch), " ".join(f"{row['macs'] / 1e9:.2f}" for row in by_mode[(modes[0],)])]
        cells += [" ".join(f"{row['per_mac_over_plain']:.2f}" for row in by_mode[(mode,)]) for mode in modes]
        rows.append([*cells, f"{max(row['iqr'] for row in exits):.2f}"])
    return table(["network", "plain", "batch", "GMACs to each exit", *modes, "iqr up to"], rows)


def latency_budget(document: Document) -> str:
    rows = [
        [
            str(row["batch"]),
            f"{row['share']:.0%}",
            *(f"{row[name]:.2f}" for name in ("budget_ms", "expected_ms")),
            f"{row['measured']['median_ms']:.2f}",
            f"{row['measured']['iqr_ms']:.2f}",
            f"{row['measured_over_budget']:.3f}",
        ]
        for row in document["rows"]
    ]
    header = ["batch", "of the way to the last exit", "asked ms", "expected of these images ms", "measured ms", "iqr"]
    return table([*header, "measured / asked"], rows)


def request_load(document: Document) -> str:
    rows = [
        [
            row["way"],
            f"{row['offered']:.1f}",
            f"{row['per_second']:.1f}",
            f"{row['p50_ms']:.0f}",
            f"{row['p95_ms']:.0f}",
            "yes" if row["within"] else "no",
        ]
        for row in document["rows"]
    ]
    limit = 1e3 * document["command"]["p95"] * document["full_batch_s"]
    best = ", ".join(f"{way} {rate:.1f}" for way, rate in document["best"].items())
    header = ["way", "offered/s", "answered/s", "p50 ms", "p95 ms", f"p95 within {limit:.0f} ms"]
    most = f"it would be {document['ceiling']:.2f} times what whole batches manage"
    said = f"The highest rate within that, in images/s: {best}. Were every batch of every segment full, {most}."
    return f"{table(header, rows)}\n\n{said}"


def rivals(document: Document) -> str:
    """Each group begins with the mix of exits that the others are compared with."""
    rows = []
    for row in document["rows"]:
        others = [f"{mode} {ms:.2f}" for mode, ms in row["modes_ms"].items() if mode != row["mode"]]
        rows.append(
            [
                f"**{row['name']}**" if row["name"] == row["beside"] else row["name"],
                str(row["batch"]),
                f"{row['macs'] / 1e9:.3f}",
                f"{row['macs_over_mix']:.2f}",
                row["mode"],
                f"{row['per_image']['median_ms']:.2f}",
                f"{row['per_image']['iqr_ms']:.2f}",
                f"{row['time_over_mix']:.2f}",
                ", ".join(others),
            ]
        )
    header = ["network", "batch", "GMACs", "over the mix's", "fastest mode", "ms per image", "iqr", "over the mix's "]
    refused = dict.fromkeys(
        (row["name"], mode, why) for row in document["rows"] for mode, why in row["refused"].items()
    )
    lines = [f"- {name} does not run in {mode}: {why}" for name, mode, why in refused]
    return table([*header, "in the other modes"], rows) + "".join(["\n\n", "\n".join(lines)] if lines else [])


def precision(document: Document) -> str:
    speed = [
        [
            row["network"],
            row["precision"],
            str(row["batch"]),
            *(
                f"{row[kind]['median_ms'] / images:.2f} | {row[f'{kind}_speedup']:.2f}"
                for kind, images in (("whole", row["batch"]), ("policy", row["images"]))
            ),
        ]
        for row in document["rows"]
    ]
    times = ["ms an image to the last exit", "speed-up", "ms an image under the policy", "speed-up "]
    header = ["network", "precision", "batch", *times]
    right = []
    for network, found in document["accuracy"].items():
        for name, figures in found.items():
            for where in ("at_last_exit", "under_policy"):
                figure = figures[where]
                numbers = (figure["float32"], figure[name], figure["drop"], *figure["interval"])
                before, after, fall, low, high = (f"{100 * number:.2f}" for number in numbers)
                cells = [network, name, where.replace("_", " "), str(figure["samples"]), before, after, fall]
                right.append([*cells, f"{low} to {high}"])
    columns = ["network", "precision", "accuracy", "images", "float32 %", "here %", "fall, points", "95 % interval"]
    return table(header, speed) + "\n\n" + table(columns, right)


def solvers(document: Document) -> str:
    rows = [
        [
            f"{large['samples']:,} x {large['exits']}",
            f"{sum(large['seconds']) / len(large['seconds']):.2f}",
            f"{max(large['seconds']):.2f}",
            f"{large['peak_bytes'] / 1e9:.2f}",
        ]
        for large in document["large"]
    ]
    gap = document["random_tables"]
    header = ["samples x exits", "CPU seconds a budget, mean", "at most", "memory of the process, at most GB"]
    return table(header, rows) + (
        f"\n\nBelow the optimum on {gap['tables']} random tables of {gap['samples']} samples and {gap['exits']} exits: "
        f"{100 * gap['mean']:.2f} points in the mean, {100 * gap['worst']:.2f} in the worst."
    )


def _exits(count: int) -> list[str]:
    return [f"exit {k + 1}" for k in range(count)]


TABLES: dict[str, Callable[[Document], str]] = {
    make.__name__: make
    for make in (forward, adaptive, modes, time_per_mac, latency_budget, request_load, rivals, precision, solvers)
}
