"""Thresholds for a budget, an accuracy or a guarantee, written to a policy file.

Solve on images the model was not trained on. A guarantee (--certify) takes half of them for itself: the policy is then
the cheapest whose answers differ from the last exit's (or whose accuracy falls short of its) by at most --epsilon.

A budget in time (--cost latency) is solved for the batches that the policy leaves: where some leave, the others go on
in a smaller batch, which takes longer per image. It holds for one batch size in one mode on one machine, which the
policy file says.

examples:
  exit-plugins solve dynperceiver_regnety_400mf --checkpoint model.safetensors --data path/to/images --split val \\
      --budget 0.4G -o policy.json
  exit-plugins solve dynperceiver_regnety_400mf --checkpoint model.safetensors --table val.npz \\
      --cost latency --cost-batch 1 8 --budget 12ms -o policy.json
  exit-plugins solve dynperceiver_regnety_400mf --table val.npz --certify ucb --epsilon 0.02 -o policy.json
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ..exits.confidence import fit_temperatures
from ..exits.latency import LatencyProfile, solve_latency
from ..exits.policy import ExitPolicy
from ..exits.risk import LOSSES, RISK_METHODS, certify, samples_needed
from ..exits.samples import SampleRecord
from ..exits.table import ExitTable
from ..exits.thresholds import METHODS, SWEEPS, policy_path, solve_thresholds
from .common import (
    Output,
    add_confidence_arguments,
    add_cost_arguments,
    add_data_arguments,
    add_json_argument,
    amount,
    is_main,
    parse_budget,
    percent,
    print_json,
)
from .inputs import open_inputs
from .models import Classifier, add_model_arguments, number, whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    add_data_arguments(parser, splits=("validation",), max_bad=0)
    add_confidence_arguments(parser)
    add_cost_arguments(parser, several=True)
    parser.add_argument("--table", metavar="FILE", help="solve on this exit table instead of running the model")
    parser.add_argument("--save-table", metavar="FILE", help="write the exit table (.npz)")
    goal = parser.add_argument_group("goal (one of)").add_mutually_exclusive_group(required=True)
    goal.add_argument(
        "--budget", metavar="COST", help="highest mean cost per image: 0.4e9, 400M, 12ms, or 60%% of the last exit"
    )
    goal.add_argument("--accuracy", type=number(0, 1), metavar="A", help="lowest accuracy, e.g. 0.9")
    goal.add_argument(
        "--drop", type=number(0, 1), metavar="D", help="highest loss of accuracy to the last exit, e.g. 0.005"
    )
    goal.add_argument("--certify", choices=RISK_METHODS, help="cheapest policy with a guarantee, see --epsilon")
    how = parser.add_argument_group("how")
    how.add_argument("--method", choices=METHODS, default="lagrangian", help="(default: %(default)s)")
    how.add_argument("--sweep", choices=SWEEPS, help="of --method msdnet")
    how.add_argument("--seed", type=int, default=0, metavar="N", help="of splits and of --method genetic (default: 0)")
    how.add_argument(
        "--temperatures",
        action="store_true",
        help="fit one temperature per exit first (on the same images; with --certify on a part of their own)",
    )
    how.add_argument(
        "--max-exit",
        type=whole(1),
        metavar="K",
        help="hard cap, which thresholds are solved under: no image goes beyond exit K (1 is the first)",
    )
    risk = parser.add_argument_group("guarantee")
    share = number(0, 1, open_below=True, open_above=True)
    risk.add_argument("--epsilon", type=share, default=0.02, metavar="E", help="risk allowed (default: %(default)s)")
    risk.add_argument(
        "--delta", type=share, default=0.1, metavar="D", help="chance that it fails (default: %(default)s)"
    )
    risk.add_argument("--loss", choices=LOSSES, default="disagreement", help="(default: %(default)s)")
    parser.add_argument("-o", "--output", default="policy.json", metavar="FILE", help="(default: %(default)s)")
    add_json_argument(parser)


def outputs(args: argparse.Namespace) -> list[Output]:
    policies = [Output("output", path) for path in dict.fromkeys(_policy_files(args))]
    return [*policies, *([Output("save_table", args.save_table)] if args.save_table else [])]


def run(args: argparse.Namespace) -> int:
    _check(args)
    inputs = open_inputs(args)
    if not is_main():
        return 0
    model, table, costs = inputs.model, inputs.table, inputs.costs
    if args.max_exit is not None and args.max_exit > model.num_exits:
        raise ValueError(f"--max-exit {args.max_exit}: the model has {model.num_exits} exits.")
    if args.certify:
        policy, needed = _certified(args, table, costs, model)
        policy = _finished(policy, table)
        _write(args, {args.output: policy}, [float(costs[-1])], inputs.unit)
        if policy.certificate and (policy.thresholds[:-1] == np.inf).all():
            print(_nothing_certified(policy.certificate, needed), file=sys.stderr)
        return 0
    profiles: list[LatencyProfile | None] = [*inputs.latency] or [None]
    policies = [_finished(_solved(args, table, costs, model, profile), table) for profile in profiles]
    last = [costs[-1] if profile is None else profile.full_batches()[-1] for profile in profiles]
    _write(args, dict(zip(_policy_files(args), policies, strict=True)), last, inputs.unit)
    return 0


def _check(args: argparse.Namespace) -> None:
    """ValueError for options that mean nothing together."""
    if args.certify and args.max_exit is not None:
        raise ValueError(
            "--certify compares with the last exit, which --max-exit lets no image reach: give one of the two."
        )
    if args.budget is not None:  # what it comes to is known when costs are
        parse_budget(args.budget, np.ones(1), "s" if args.cost == "latency" else "MACs")
    if len(args.cost_batch) == 1:
        return
    if args.cost != "latency" or args.certify:
        raise ValueError(
            "several --cost-batch are for budgets in time: give --cost latency with a goal other than --certify."
        )
    if len(set(args.cost_batch)) < len(args.cost_batch):
        raise ValueError(f"--cost-batch names a size twice: {' '.join(map(str, args.cost_batch))}.")


def _policy_files(args: argparse.Namespace) -> list[Path]:
    """A policy's file; of several batch sizes each has its size in its name: a policy is for one."""
    path = Path(args.output)
    if len(args.cost_batch) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-b{batch}{path.suffix}") for batch in args.cost_batch]


def _finished(policy: ExitPolicy, table: ExitTable) -> ExitPolicy:
    """With what the table knows of its images."""
    about = table.about or {}
    origin = {key: about.get(key) for key in ("data", "split", "holdout", "transform")}
    return replace(policy, source={**policy.source, "data": origin})


def _write(
    args: argparse.Namespace, policies: Mapping[str | Path, ExitPolicy], last: Sequence[float], unit: str
) -> None:
    """Save the policies and print what they promise, beside the ``last`` exit's cost for each."""
    for path, policy in policies.items():
        policy.save(path)
    if args.json:
        found = [
            {"policy": str(path), "thresholds": [str(t) for t in policy.thresholds], **_about(policy)}
            for path, policy in policies.items()
        ]
        print_json(found[0] if len(found) == 1 else {"policies": found})
        return
    for (path, policy), most in zip(policies.items(), last, strict=True):
        _print(path, policy, most, unit)


def _options(args: argparse.Namespace) -> dict[str, Any]:
    options = {"method": args.method}
    if args.sweep:
        options["sweep"] = args.sweep
    if args.method == "genetic":
        options["seed"] = args.seed
    return options


def _solved(
    args: argparse.Namespace,
    table: ExitTable,
    costs: NDArray[Any],
    model: Classifier,
    profile: LatencyProfile | None,
) -> ExitPolicy:
    if args.temperatures:
        table = _calibrated(table, table)
    if profile is not None:
        costs = profile.full_batches()
    target: dict[str, Any] = {"max_exit": None if args.max_exit is None else args.max_exit - 1}
    if args.budget is not None:
        target["budget"] = parse_budget(args.budget, costs, "MACs" if profile is None else "s")
    elif args.drop is not None:
        target["accuracy"] = max(0.0, float(table.correct[-1].mean()) - args.drop)
    else:
        target["accuracy"] = args.accuracy
    if profile is not None:
        return solve_latency(table, profile, model=model, **target, **_options(args))
    return solve_thresholds(table, costs, model=model, **target, **_options(args))


def _certified(
    args: argparse.Namespace, table: ExitTable, costs: NDArray[Any], model: Classifier
) -> tuple[ExitPolicy, int | None]:
    """The certified policy, and how many images it would take to certify one under which somebody leaves early.

    Temperatures, thresholds and the certificate each come from images of their own: what was fitted to the images that
    certify could certify anything.
    """
    solving, apart = table.split(0.5, args.seed)
    source = {}
    if args.temperatures:
        fitting, solving = solving.split(0.5, args.seed + 1)
        if not min(len(fitting), len(solving), len(apart)):
            raise ValueError(
                f"{len(table)} images are too few for three parts: temperatures, thresholds and certificate."
            )
        solving, apart = _calibrated(solving, fitting), _calibrated(apart, fitting)
        source["temperature_samples"] = SampleRecord.of(fitting.sample, len(fitting)).to_json()
    path = policy_path(solving, costs, model=model, **_options(args))
    policy = certify(path, apart, args.epsilon, args.delta, args.certify, args.loss, args.seed)
    needed = samples_needed(path, apart, args.epsilon, args.delta, args.certify, args.loss, args.seed)
    return replace(policy, source={**policy.source, **source}), needed


def _calibrated(table: ExitTable, fitting: ExitTable) -> ExitTable:
    """The table under temperatures fitted on another, or on itself."""
    if fitting.logits is None:
        raise ValueError("temperatures need a table with logits; collect it with keep_logits=True, as evaluate does.")
    found = fit_temperatures(torch.as_tensor(fitting.logits), torch.as_tensor(fitting.target))
    return table.with_confidence(temperatures=found)


def _print(path: str | Path, policy: ExitPolicy, last: float, unit: str) -> None:
    about = policy.source
    latency = about.get("latency")
    batches = f", in batches of {latency['batch_size']} ({latency['mode']})" if latency else ""
    print(
        f"{path}: accuracy {percent(about['accuracy'])}, mean cost {amount(about['cost'], unit)} "
        f"({percent(about['cost'] / last)} of the last exit{batches}), on the {about['samples']['count']} images it "
        "was solved on"
    )
    print("thresholds", ", ".join(f"{t:.4g}" for t in policy.thresholds))
    if policy.certificate:
        c = policy.certificate
        chance = "in expectation" if c["delta"] is None else f"with probability {1 - c['delta']:.0%}"
        count = c["samples"]["count"]
        print(f"certified ({c['method']}, {count} images): {c['loss']} at most {c['epsilon']:.2%}, {chance}")


def _nothing_certified(certificate: dict[str, Any], needed: int | None) -> str:
    count, loss, epsilon = certificate["samples"]["count"], certificate["loss"], certificate["epsilon"]
    begin = f"nothing is certified: under this policy nobody leaves early, since {count} images do not show that "
    begin += f"any earlier exit keeps the {loss} at or below {epsilon:.2%}; "
    if needed is None:
        return begin + "no number of images would, as the risk measured is not below it; allow more by --epsilon."
    return begin + f"about {needed} images to certify on ({2 * needed} given to solve), or a larger --epsilon, would."


def _about(policy: ExitPolicy) -> dict[str, Any]:
    blocks = {"source": policy.source, "certificate": policy.certificate, "max_exit": policy.max_exit}
    about: dict[str, Any] = _without_digests(blocks)
    return about


def _without_digests(value: Any) -> Any:
    """Thousands of sample digests are for the policy file; whoever reads the printed JSON asks how many there were."""
    if isinstance(value, Mapping):
        return {key: _without_digests(item) for key, item in value.items() if key not in ("digests", "limit")}
    return value
