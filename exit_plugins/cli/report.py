"""One self-contained HTML page about a multi-exit model: curves, exit shares, reliability, images, similarity of exits.

Thresholds are solved on --solve-split, or, by default, on a random half of the images; every figure is of the others.

example:
  exit-plugins report dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images -o report.html
"""

import argparse
import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.special import softmax
from scipy.stats import beta

from ..exits.calibration import Calibration, calibration
from ..exits.evaluation import (
    AnytimePoint,
    BudgetPoint,
    PolicyResult,
    anytime_curve,
    budgeted_curve,
    ensemble_curve,
    evaluate_policy,
)
from ..exits.policy import ExitPolicy
from ..exits.risk import path_losses
from ..exits.similarity import cka_matrix
from ..exits.table import ExitTable
from ..exits.thresholds import METHODS, policy_path, solve_thresholds
from ..timm.data import ImageView
from .common import (
    Output,
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    is_main,
    print_json,
)
from .inputs import Inputs, open_inputs
from .models import add_force_argument, add_model_arguments, whole
from .page import write_page
from .tables import check_table, check_weights, fit_table, overlap_note, overlap_record, shared_samples

_STEPS = 33  # positions of the slider
_DELTA = 0.1  # how often a certified bound may fail
_PICTURES, _THUMBNAIL = 6, 112  # of each kind per exit; pixels
_CLASSES = 10  # of each kind


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


def outputs(args: argparse.Namespace) -> list[Output]:
    return [Output("output", args.output)]


def run(args: argparse.Namespace) -> int:
    policy = ExitPolicy.load(args.policy) if args.policy else None
    inputs = open_inputs(args, policy, as_policy=False)
    inputs, solving = _apart(args, inputs)
    if not is_main():
        return 0
    findings = _find(args, inputs, solving, policy)
    _write(args, inputs, findings)
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
        path: what policies from the cheapest to the fullest do, the positions of the page's slider; ``bounds`` of the
            share of their answers that differ from the last exit's, None where nothing can be certified.
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
    path: list[PolicyResult]
    bounds: list[float | None]


def _find(args: argparse.Namespace, inputs: Inputs, solving: ExitTable, policy: ExitPolicy | None) -> _Findings:
    table, costs = inputs.table, inputs.costs
    if policy is None:
        goal = max(0.0, float(solving.correct.mean(1).max()) - 0.005)
        policy = solve_thresholds(solving, costs, accuracy=goal, method=args.method, model=inputs.model)
    else:
        check_weights(policy, (table.about or {}).get("weights"), args.force)
    policy.check_model(inputs.model)
    under_policy = fit_table(table, policy)
    overlap = max(policy.overlap(table) or 0, shared_samples(table, solving) or 0)
    # Halves of one table are apart; of another one it must be known.
    apart = shared_samples(table, solving) == 0 or not (args.solve_table or args.solve_split)
    path = policy_path(solving, costs, _STEPS, args.method)
    return _Findings(
        policy=policy,
        num_solved=solving.num_samples,
        overlap=overlap,
        under_policy=under_policy,
        result=evaluate_policy(policy, under_policy, costs),
        anytime=anytime_curve(table, costs),
        calibration=calibration(table),
        ensemble=ensemble_curve(table, costs) if table.logits is not None else None,
        budgets=budgeted_curve(solving, table, costs, args.budgets, method=args.method),
        path=[evaluate_policy(policy, table, costs) for policy in path],
        bounds=disagreement_bounds(path, table).tolist() if apart else [None] * len(path),
    )


def disagreement_bounds(path: Sequence[ExitPolicy], table: ExitTable, delta: float = _DELTA) -> NDArray[Any]:
    """Upper bounds (S,) of the share of answers that differ from the last exit's, for each policy of a path.

    Clopper and Pearson's exact binomial bound of each at ``delta / S``: with probability 1 - ``delta`` over the samples
    of the table, which must not be those the path was solved on, all of them hold together, so that whoever looks at
    them may choose any.
    """
    losses = path_losses(path, table)
    count = losses.shape[1]
    differ = losses.sum(1)
    return np.where(differ < count, beta.ppf(1 - delta / len(path), differ + 1, np.maximum(count - differ, 1e-9)), 1.0)


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


def _write(args: argparse.Namespace, inputs: Inputs, findings: _Findings) -> None:
    table = inputs.table
    intro = (
        f"{table.num_samples} images reported on, thresholds solved on {findings.num_solved} others by method "
        f"{args.method}; confidence {table.measure}; costs in {inputs.unit} per image."
    )
    note = f"No test: {overlap_note(findings.overlap, table)}" if findings.overlap else None
    write_page(args.output, f"{args.model} on {args.data or args.table}", intro, note, _data(inputs, findings))


def _data(inputs: Inputs, findings: _Findings) -> dict[str, Any]:
    """What the page's script draws (cli/page.js)."""
    table, path, policy = inputs.table, findings.path, findings.result
    if findings.bounds[0] is None:
        says = "Nothing is certified: these images are not known to be others than those the thresholds were solved on."
    else:
        says = (
            f"Certified with {100 * (1 - _DELTA):.0f} % confidence, for all positions of the slider together, if later "
            "images are like these: at most this share of the answers differs from the last exit's."
        )
    costs = [point.cost for point in path]
    return {
        "unit": inputs.unit,
        "bound_says": says,
        "exits": _exits(findings),
        "points": [
            {**_accuracy(point), "shares": point.shares.tolist(), "bound": bound}
            for point, bound in zip(path, findings.bounds, strict=True)
        ],
        "start": int(np.argmin(np.abs(np.array(costs) - policy.cost))),
        "policy": _accuracy(policy),
        "reliability": [_bins(exit_) for exit_ in findings.calibration],
        "pictures_say": "Surest and least sure of those that leave at each.",
        "pictures": [] if inputs.images is None else _pictures(inputs, inputs.images, findings),
        "classes": _classes(policy, table.target, inputs.class_names),
        "similarity": _similarity(table),
    }


def _accuracy(found: AnytimePoint | PolicyResult) -> dict[str, float | None]:
    low, high = found.interval
    return {"cost": found.cost, "accuracy": float(found.accuracy), "low": float(low), "high": float(high)}


def _exits(findings: _Findings) -> list[dict[str, Any]]:
    ensemble: Sequence[AnytimePoint | None] = findings.ensemble or [None] * len(findings.anytime)
    return [
        {
            **_accuracy(point),
            "ensemble": None if running is None else float(running.accuracy),
            **{key: value for key, value in exit_.to_dict().items() if key != "exit_index"},
        }
        for point, running, exit_ in zip(findings.anytime, ensemble, findings.calibration, strict=True)
    ]


def _bins(exit_: Calibration) -> list[dict[str, float]]:
    bins = zip(exit_.bin_confidence.tolist(), exit_.bin_accuracy.tolist(), exit_.bin_share.tolist(), strict=True)
    return [{"confidence": sure, "accuracy": right, "share": share} for sure, right, share in bins if share > 0]


def _classes(result: PolicyResult, target: NDArray[Any], names: list[str] | None) -> list[dict[str, Any]]:
    """The classes that leave earliest, then those that leave latest; all where there are few."""
    depth = result.class_shares @ np.arange(result.class_shares.shape[1])
    order = np.argsort(depth, kind="stable")
    if len(order) > 2 * _CLASSES:
        order = np.concatenate([order[:_CLASSES], order[-_CLASSES:]])
    counts = np.bincount(target)
    return [
        {
            "name": _name(int(result.classes[i]), names),
            "shares": result.class_shares[i].tolist(),
            "accuracy": float(result.class_accuracy[i]),
            "count": int(counts[result.classes[i]]),
        }
        for i in order
    ]


def _name(index: int, names: list[str] | None) -> str:
    return names[index] if names is not None and index < len(names) else f"class {index}"


def _similarity(table: ExitTable) -> dict[str, Any] | None:
    if table.logits is None:
        return None
    matrix = cka_matrix([softmax(logits, axis=-1) for logits in table.logits], table.target)
    names = [*(f"exit {k + 1}" for k in range(table.num_exits)), "labels"]
    return {"names": names, "matrix": np.nan_to_num(matrix).tolist()}


def _pictures(inputs: Inputs, images: ImageView, findings: _Findings) -> list[dict[str, Any]]:
    """Of every exit anybody left at: the surest and the least sure of those who did."""
    table, result = findings.under_policy, findings.result
    groups = []
    for exit_ in range(table.num_exits):
        members = np.flatnonzero(result.exits == exit_)
        if len(members) == 0:
            continue
        sure = np.nan_to_num(table.confidence[exit_, members], nan=-np.inf)
        order = members[np.argsort(-sure, kind="stable")]
        easiest = order[:_PICTURES]
        hardest = order[len(easiest) :][::-1][:_PICTURES]
        groups.append(
            {
                "exit": exit_,
                "share": len(members) / table.num_samples,
                "accuracy": float(result.correct[members].mean()),
                "easiest": [_picture(inputs, images, table, exit_, int(i)) for i in easiest],
                "hardest": [_picture(inputs, images, table, exit_, int(i)) for i in hardest],
            }
        )
    return groups


def _picture(inputs: Inputs, images: ImageView, table: ExitTable, exit_: int, i: int) -> dict[str, Any]:
    image, _ = images[i]
    if not isinstance(image, Image.Image):
        image = image[len(image) // 2]  # a clip, by its middle frame
    sure, said, truth = table.confidence[exit_, i], int(table.prediction[exit_, i]), int(table.target[i])
    return {
        "source": _thumbnail(image),
        "truth": _name(truth, inputs.class_names),
        "said": _name(said, inputs.class_names),
        "right": said == truth,
        "confidence": None if np.isnan(sure) else float(sure),
    }


def _thumbnail(image: Image.Image) -> str:
    """The picture as an address that holds it; lossless where it is small already."""
    image, small = image.convert("RGB"), io.BytesIO()
    if max(image.size) <= _THUMBNAIL:
        image.save(small, "PNG")
        return f"data:image/png;base64,{base64.b64encode(small.getvalue()).decode()}"
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(small, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()}"
