"""One self-contained HTML page about a multi-exit model: curves, exit shares, reliability, images, similarity of exits.

Thresholds are solved on --solve-split, or, by default, on a random half of the images; every figure is of the others.

example:
  exit-plugins report dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images -o report.html
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import softmax

from ..exits import plots
from ..exits.evaluation import (
    AnytimePoint,
    BudgetPoint,
    Calibration,
    PolicyResult,
    anytime_curve,
    budgeted_curve,
    calibration,
    cka_matrix,
    ensemble_curve,
    evaluate_policy,
)
from ..exits.policy import ExitPolicy
from ..exits.table import ExitTable
from ..exits.thresholds import METHODS, solve_thresholds
from .common import (
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    amount,
    is_main,
    percent,
    print_json,
)
from .inputs import Inputs, open_inputs
from .models import add_force_argument, add_model_arguments, whole
from .page import Page
from .tables import check_table, check_weights, fit_table, overlap_note, overlap_record, shared_samples


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
    policy = ExitPolicy.load(args.policy) if args.policy else None
    inputs = open_inputs(args, policy, as_policy=False, with_images=True)
    inputs, solving = _apart(args, inputs)
    if not is_main():
        return 0
    findings = _find(args, inputs, solving, policy)
    _page(args, inputs, findings).write(args.output)
    if args.json:
        print_json(_summary(args, inputs, findings))
        return 0
    if findings.overlap:
        print(f"no test: {overlap_note(findings.overlap, inputs.table)}")
    print(f"{args.output}: open it in a browser; it needs no other file.")
    return 0


def _apart(args: argparse.Namespace, inputs: Inputs) -> tuple[Inputs, ExitTable]:
    """(what is reported on, the table thresholds are solved on)."""
    table, images = inputs.table, inputs.images
    if args.solve_table:
        solving = ExitTable.load(args.solve_table)
        check_table(solving, inputs.model)
        return inputs, solving.with_confidence(table.measure)
    if args.solve_split:
        return inputs, inputs.table_of(args.solve_split)
    order = np.random.default_rng(0).permutation(table.num_samples)
    half = len(order) // 2
    if half == 0:
        raise ValueError("one image cannot be both solved and reported on; give more, or --solve-split.")
    here = np.sort(order[half:])
    reported = replace(inputs, table=table.subset(here), images=None if images is None else images.subset(here))
    return reported, table.subset(np.sort(order[:half]))


# ---------------------------------------------------------------------------------------------------------------------
# What is found
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Findings:
    """Everything the page shows, of the table that is reported on.

    Attributes:
        num_solved: images that thresholds were solved on.
        overlap: images reported on that thresholds were solved on too.
        under_policy: the table with the policy's confidences.
        ensemble: None where the table has no logits.
    """

    policy: ExitPolicy
    num_solved: int
    overlap: int
    under_policy: ExitTable
    result: PolicyResult
    anytime: list[AnytimePoint]
    calibration: list[Calibration]
    ensemble: list[AnytimePoint] | None
    budgets: list[BudgetPoint]


def _find(args: argparse.Namespace, inputs: Inputs, solving: ExitTable, policy: ExitPolicy | None) -> _Findings:
    table, costs = inputs.table, inputs.costs
    if policy is None:
        goal = max(0.0, float(solving.correct.mean(1).max()) - 0.005)
        policy = solve_thresholds(solving, costs, accuracy=goal, method=args.method, model=inputs.model)
    else:
        check_weights(policy, (table.about or {}).get("weights"), args.force)
    policy.check_model(inputs.model)
    under_policy = fit_table(table, policy)
    return _Findings(
        policy=policy,
        num_solved=solving.num_samples,
        overlap=max(policy.overlap(table) or 0, shared_samples(table, solving) or 0),
        under_policy=under_policy,
        result=evaluate_policy(policy, under_policy, costs),
        anytime=anytime_curve(table, costs),
        calibration=calibration(table),
        ensemble=ensemble_curve(table, costs) if table.logits is not None else None,
        budgets=budgeted_curve(solving, table, costs, args.budgets, method=args.method),
    )


def _summary(args: argparse.Namespace, inputs: Inputs, findings: _Findings) -> dict[str, Any]:
    return {
        "report": str(args.output),
        "accuracy": findings.result.accuracy,
        "cost": findings.result.cost,
        "cost_unit": inputs.unit,
        **overlap_record(None if inputs.table.sample is None else findings.overlap),
        "exits": [p.to_dict() for p in findings.anytime],
        "budgets": [p.to_dict() for p in findings.budgets],
    }


# ---------------------------------------------------------------------------------------------------------------------
# How it is shown
# ---------------------------------------------------------------------------------------------------------------------


def _page(args: argparse.Namespace, inputs: Inputs, findings: _Findings) -> Page:
    page = Page(f"{args.model} on {args.data or args.table}")
    _add_summary(page, args, inputs, findings)
    _add_budgets(page, args, inputs, findings)
    _add_images(page, inputs, findings)
    _add_exits(page, inputs, findings)
    return page


def _add_summary(page: Page, args: argparse.Namespace, inputs: Inputs, findings: _Findings) -> None:
    table, result, last = inputs.table, findings.result, inputs.costs[-1]
    page.add_text(
        f"{table.num_samples} images reported on, thresholds solved on {findings.num_solved} others by method "
        f"{args.method}; confidence {table.measure}; costs in {inputs.unit} per image."
    )
    if findings.overlap:
        page.add_text(f"No test: {overlap_note(findings.overlap, table)}")
    page.add_numbers(
        [
            (percent(result.accuracy), "accuracy under the policy"),
            (percent(max(p.accuracy for p in findings.anytime)), "accuracy of the best exit"),
            (percent(result.cost / last), f"of the last exit's {inputs.unit} spent"),
            (f"{last / result.cost:.2f}x", f"fewer {inputs.unit}"),
        ]
    )


def _add_budgets(page: Page, args: argparse.Namespace, inputs: Inputs, findings: _Findings) -> None:
    points, unit = findings.budgets, inputs.unit
    page.add_figure(
        "Accuracy over cost",
        plots.budget_curve({f"budgeted ({args.method})": points}, findings.anytime, unit),
        "Bands: 95 % bootstrap intervals. Stars: everybody leaves at one exit.",
    )
    page.add_table(
        ["budget", "spent", "accuracy", "95 %", *(f"exit {k + 1}" for k in range(inputs.table.num_exits))],
        [
            [
                amount(p.budget, unit),
                f"{amount(p.cost, unit)} ({percent(p.cost / p.budget)})",
                percent(p.accuracy),
                _interval(p.interval),
                *(percent(share) for share in p.shares),
            ]
            for p in points
        ],
        "Budgets hold on the images they were solved on; what was spent on these is beside them.",
    )
    page.add_figure(
        "Where images leave", plots.exit_shares(points, unit), "Share of the images per exit at each budget."
    )


def _add_images(page: Page, inputs: Inputs, findings: _Findings) -> None:
    if inputs.images is not None:
        page.add_figure(
            "Easiest and hardest images",
            plots.easiest_and_hardest(inputs.images, findings.under_policy, findings.policy, inputs.class_names),
            "Under the policy: surest at the first exit, and left to the last. Orange: answered wrongly.",
        )
    page.add_figure(
        "Where each class leaves",
        plots.class_exits(findings.result, inputs.class_names),
        "Under the policy: classes that leave earliest, and below the line those that leave latest.",
    )


def _add_exits(page: Page, inputs: Inputs, findings: _Findings) -> None:
    table, ensemble = inputs.table, findings.ensemble
    page.add_figure(
        "Reliability",
        plots.reliability(findings.calibration),
        "Accuracy over confidence; on the dashed line confidence can be taken at its word.",
    )
    head = ["", "cost", "accuracy", "95 %", *(["running ensemble"] if ensemble else []), "ECE", "AUROC", "AURC"]
    page.add_table(
        head,
        [
            [
                f"exit {k + 1}",
                amount(point.cost, inputs.unit),
                percent(point.accuracy),
                _interval(point.interval),
                *([percent(ensemble[k].accuracy)] if ensemble else []),
                percent(exit_.ece),
                "-" if np.isnan(exit_.auroc) else f"{exit_.auroc:.3f}",
                f"{exit_.aurc:.3f}",
            ]
            for k, (point, exit_) in enumerate(zip(findings.anytime, findings.calibration, strict=True))
        ],
        "ECE: expected calibration error. AUROC: how well confidence tells right from wrong answers. AURC: mean error "
        "among the most confident, over all coverages (lower is better).",
    )
    if table.logits is not None:
        views = [softmax(logits, axis=-1) for logits in table.logits]
        labels = [*(f"exit {k + 1}" for k in range(table.num_exits)), "labels"]
        page.add_figure(
            "Similarity of exits",
            plots.cka_heatmap(cka_matrix(views, table.target), labels),
            "Linear CKA of the exits' probabilities, and of these and the labels.",
        )


def _interval(interval: tuple[float, float]) -> str:
    return f"{100 * interval[0]:.1f} to {100 * interval[1]:.1f}"
