"""One self-contained HTML page about a multi-exit model: curves, exit shares, reliability, images, similarity of exits.

Thresholds are solved on --solve-split, or, by default, on a random half of the images; every figure is of the others.

example:
  exit-plugins report dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images -o report.html
"""

import argparse
import base64
import html
import io
from datetime import datetime, timezone
from typing import Any

import numpy as np

from .._version import __version__
from ..exits import plots
from ..exits.evaluation import (
    anytime_curve,
    budgeted_curve,
    calibration,
    cka_matrix,
    ensemble_curve,
    evaluate_policy,
)
from ..exits.files import atomic_write
from ..exits.policy import ExitPolicy
from ..exits.table import ExitTable
from ..exits.thresholds import METHODS, solve_thresholds
from ..timm.data import ImageView
from .common import (
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    amount,
    costs_of,
    is_main,
    open_data,
    percent,
    print_json,
    start_processes,
)
from .models import (
    add_force_argument,
    add_model_arguments,
    data_config,
    known_model,
    match_classes,
    model_classes,
    open_model,
    whole,
)
from .tables import check_table, check_weights, collect, fit_table, overlap_note, overlap_record, shared_samples


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, splits=("validation", "test"))
    add_confidence_arguments(parser)
    add_cost_arguments(parser)
    parser.add_argument(
        "--solve-split", metavar="SPLIT", help="split thresholds are solved on (default: half of --split)"
    )
    parser.add_argument("--table", metavar="FILE", help="exit table of the images to report on, instead of running")
    parser.add_argument("--solve-table", metavar="FILE", help="exit table thresholds are solved on")
    parser.add_argument(
        "--policy", metavar="FILE", help="show this policy (default: cheapest within half a point of the best exit)"
    )
    parser.add_argument(
        "--budgets", type=whole(2), default=10, metavar="N", help="points of the curve (default: %(default)s)"
    )
    parser.add_argument("--method", choices=METHODS, default="lagrangian", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", default="report.html", metavar="FILE", help="(default: %(default)s)")
    add_force_argument(parser)
    add_json_argument(parser)


def run(args: argparse.Namespace) -> int:
    if not args.table and not args.data:
        raise ValueError("give --data to run the model on, or --table with a table that evaluate wrote.")
    start_processes(args)
    policy = ExitPolicy.load(args.policy) if args.policy else None
    stored = ExitTable.load(args.table) if args.table else None
    known = known_model(args, policy, stored)
    data, names = open_data(args) if args.data else (None, ())
    model = open_model(args, known, num_classes=len(names) or None, needs_weights=stored is None)
    config = data_config(args, model, known)
    table, solving, images = _tables(args, model, known, config, data, stored)
    if not is_main():
        return 0
    names = model_classes(model, known) or (images.classes if images is not None else ())
    costs, unit = costs_of(args, model, config)
    if policy is None:
        goal = max(0.0, float(solving.correct.mean(1).max()) - 0.005)
        policy = solve_thresholds(solving, costs, accuracy=goal, method=args.method, model=model)
    else:
        check_weights(policy, (table.about or {}).get("weights"), args.force)
    policy.check_model(model)
    overlap = max(policy.overlap(table) or 0, shared_samples(table, solving) or 0)
    anytime = anytime_curve(table, costs)
    points = budgeted_curve(solving, table, costs, args.budgets, method=args.method)
    under_policy = fit_table(table, policy)
    result = evaluate_policy(policy, under_policy, costs)
    honest = calibration(table)
    ensemble = ensemble_curve(table, costs) if table.logits is not None else None
    page = _Page(f"{args.model} on {args.data or args.table}")
    page.add_text(
        f"{table.num_samples} images reported on, thresholds solved on {solving.num_samples} others by method "
        f"{args.method}; confidence {table.measure}; costs in {unit} per image."
    )
    if overlap:
        page.add_text(f"No test: {overlap_note(overlap, table)}")
    page.add_numbers(
        [
            (percent(result.accuracy), "accuracy under the policy"),
            (percent(max(p.accuracy for p in anytime)), "accuracy of the best exit"),
            (percent(result.cost / costs[-1]), f"of the last exit's {unit} spent"),
            (f"{costs[-1] / result.cost:.2f}x", f"fewer {unit}"),
        ]
    )
    page.add_figure(
        "Accuracy over cost",
        plots.budget_curve({f"budgeted ({args.method})": points}, anytime, unit),
        "Bands: 95 % bootstrap intervals. Stars: everybody leaves at one exit.",
    )
    page.add_table(
        ["budget", "spent", "accuracy", "95 %", *(f"exit {k + 1}" for k in range(table.num_exits))],
        [
            [
                amount(p.budget, unit),
                f"{amount(p.cost, unit)} ({percent(p.cost / p.budget)})",
                percent(p.accuracy),
                f"{100 * p.interval[0]:.1f} to {100 * p.interval[1]:.1f}",
                *(percent(share) for share in p.shares),
            ]
            for p in points
        ],
        "Budgets hold on the images they were solved on; what was spent on these is beside them.",
    )
    page.add_figure(
        "Where images leave", plots.exit_shares(points, unit), "Share of the images per exit at each budget."
    )
    if images is not None:
        page.add_figure(
            "Easiest and hardest images",
            plots.easiest_and_hardest(images, under_policy, policy, names or None),
            "Under the policy: surest at the first exit, and left to the last. Orange: answered wrongly.",
        )
    page.add_figure(
        "Where each class leaves",
        plots.class_exits(result, names or None),
        "Under the policy: classes that leave earliest, and below the line those that leave latest.",
    )
    page.add_figure(
        "Reliability",
        plots.reliability(honest),
        "Accuracy over confidence; on the dashed line confidence can be taken at its word.",
    )
    head = ["", "cost", "accuracy", "95 %", *(["running ensemble"] if ensemble else []), "ECE", "AUROC", "AURC"]
    rows = []
    for k, (point, exit_) in enumerate(zip(anytime, honest, strict=True)):
        rows.append(
            [
                f"exit {k + 1}",
                amount(point.cost, unit),
                percent(point.accuracy),
                f"{100 * point.interval[0]:.1f} to {100 * point.interval[1]:.1f}",
                *([percent(ensemble[k].accuracy)] if ensemble else []),
                percent(exit_.ece),
                "-" if np.isnan(exit_.auroc) else f"{exit_.auroc:.3f}",
                f"{exit_.aurc:.3f}",
            ]
        )
    page.add_table(
        head,
        rows,
        "ECE: expected calibration error. AUROC: how well confidence tells right from wrong answers. AURC: mean error "
        "among the most confident, over all coverages (lower is better).",
    )
    if table.logits is not None:
        views = [_probabilities(z) for z in table.logits]
        labels = [*(f"exit {k + 1}" for k in range(table.num_exits)), "labels"]
        page.add_figure(
            "Similarity of exits",
            plots.cka_heatmap(cka_matrix(views, table.target), labels),
            "Linear CKA of the exits' probabilities, and of these and the labels.",
        )
    page.write(args.output)
    summary = {
        "report": str(args.output),
        "accuracy": result.accuracy,
        "cost": result.cost,
        "cost_unit": unit,
        **overlap_record(None if table.sample is None else overlap),
        "exits": [p.to_dict() for p in anytime],
        "budgets": [p.to_dict() for p in points],
    }
    if args.json:
        print_json(summary)
    else:
        if overlap:
            print(f"no test: {overlap_note(overlap, table)}")
        print(f"{args.output}: open it in a browser; it needs no other file.")
    return 0


def _tables(
    args: argparse.Namespace, model: Any, known: dict, config: dict, data: Any, table: ExitTable | None
) -> tuple[ExitTable, ExitTable, Any]:
    """(table to report on, table to solve on, images of the first or None)."""
    measure = args.measure or "max_softmax"
    data = match_classes(data, model, known)
    if table is None:
        table, data = collect(model, data, args, config, measure)
    else:
        check_table(table, model)
    if args.measure and table.measure != args.measure:
        table = table.with_confidence(args.measure)
    images = data if isinstance(data, ImageView) else None
    if images is not None and len(images) != table.num_samples:
        raise ValueError(
            f"{args.table} holds {table.num_samples} samples and the data {len(images)}; they must be the same."
        )
    if args.solve_table:
        solving = ExitTable.load(args.solve_table)
        check_table(solving, model)
        return table, solving.with_confidence(table.measure), images
    if args.solve_split:
        other = match_classes(open_data(args, args.solve_split)[0], model, known)
        return table, collect(model, other, args, config, measure, split=args.solve_split)[0], images
    order = np.random.default_rng(0).permutation(table.num_samples)
    half = len(order) // 2
    if half == 0:
        raise ValueError("one image cannot be both solved and reported on; give more, or --solve-split.")
    here = np.sort(order[half:])
    if images is not None:
        images = images.subset(here)
    return table.subset(here), table.subset(np.sort(order[:half])), images


def _probabilities(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


class _Page:
    """A page of figures and tables with everything inside it."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.parts: list[str] = []

    def add_text(self, text: str) -> None:
        self.parts.append(f"<p>{html.escape(text)}</p>")

    def add_numbers(self, numbers: list[tuple[str, str]]) -> None:
        cells = "".join(f"<div><b>{html.escape(n)}</b><span>{html.escape(what)}</span></div>" for n, what in numbers)
        self.parts.append(f'<div class="numbers">{cells}</div>')

    def add_figure(self, title: str, figure: Any, caption: str) -> None:
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        picture = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(
            f"<h2>{html.escape(title)}</h2><figure><img alt='{html.escape(title)}' "
            f"src='data:image/png;base64,{picture}'><figcaption>{html.escape(caption)}</figcaption></figure>"
        )

    def add_table(self, head: list[str], rows: list[list[str]], caption: str) -> None:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = line(head, "th") + "".join(line(row, "td") for row in rows)
        self.parts.append(f"<div class='wide'><table>{body}</table></div><p class='caption'>{html.escape(caption)}</p>")

    def write(self, path: str) -> None:
        made = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
        with atomic_write(path) as file:
            file.write(
                "<!doctype html><html lang='en'><head><meta charset='utf-8'>"
                "<meta name='viewport' content='width=device-width, initial-scale=1'>"
                f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head><body>"
                f"<h1>{html.escape(self.title)}</h1>{''.join(self.parts)}"
                f"<footer>exit-plugins {__version__}, {made}</footer></body></html>\n"
            )


_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem;margin:0 0 .5rem}
h2{font-size:1.2rem;margin:2.2rem 0 .4rem;border-top:1px solid #ddd;padding-top:1rem}
.numbers{display:flex;flex-wrap:wrap;gap:1rem;margin:1rem 0}
.numbers div{flex:1 1 9rem;background:#f4f6f8;border-radius:6px;padding:.7rem 1rem}
.numbers b{display:block;font-size:1.5rem}.numbers span{font-size:.85rem;color:#555}
figure{margin:0}img{max-width:100%;height:auto}figcaption,.caption,footer{font-size:.85rem;color:#555}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;margin:.8rem 0 .2rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e5e5e5;white-space:nowrap}
th:first-child,td:first-child{text-align:left}footer{margin-top:3rem}
"""
