"""Tables and policies at the command line: filling a table, and what belongs to what."""

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset

from ..exits.collecting import collect_exits
from ..exits.digests import sample_digests
from ..exits.policy import ExitPolicy, check_same_confidence, check_same_model, describe_model
from ..exits.table import ExitTable
from ..timm.data import ImageView
from ..timm.images import UnreadableImage
from .common import is_main, transformed
from .models import Classifier

_COMPARED = 8  # images of a data set that is given beside a table
_UNREADABLE = torch.iinfo(torch.int64).min  # target of an image that could not be read


class _Tolerant(Dataset[tuple[Any, int]]):
    """A view in which an unreadable image is a blank one with a target of its own, up to a number of them.

    So the batches are the same whatever can be read, and a run goes on from its part file. Each loader process counts
    for itself: more than ``most`` in one of them is more than that in all.
    """

    def __init__(self, view: ImageView, size: Sequence[int], most: float) -> None:
        self.view, self.size, self.most, self.bad = view, tuple(size), most, 0

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, item: int) -> tuple[Any, int]:
        try:
            return self.view[item]
        except UnreadableImage as error:
            self.bad += 1
            if self.bad > self.most:
                raise UnreadableImage(f"{error} --max-bad N leaves out up to N such images.") from error
            return torch.zeros(self.size), _UNREADABLE


def collect(
    model: Classifier,
    data: Any,
    args: argparse.Namespace,
    config: dict[str, Any],
    measure: str = "max_softmax",
    temperatures: Sequence[float] | None = None,
    split: str | None = None,
    save: str | None = None,
) -> tuple[ExitTable, Any]:
    """The exit table of a data set and the data set without the images that could not be read.

    With ``save`` the table is written there, and an interrupted run goes on where it was.
    """
    view, split = transformed(data, config), split or args.split
    kept: NDArray[Any] = np.arange(0)

    def finish(table: ExitTable) -> ExitTable:
        nonlocal kept
        kept = _readable(table, view, args)
        table = table.subset(kept) if len(kept) < len(table) else table
        check_table(table, model)
        return table

    dataset = _Tolerant(view, config["input_size"], args.max_bad) if isinstance(view, ImageView) else view
    table = collect_exits(
        model,
        DataLoader(dataset, args.batch_size, num_workers=args.workers),
        measure=measure,
        temperatures=temperatures,
        keep_logits=True,
        part_file=f"{save}.part" if save else None,
        about={
            "transform": json.dumps({key: config[key] for key in sorted(config) if key != "input_size"}),
            "data": args.data,
            "split": split if isinstance(split, str) else "/".join(split),
            "holdout": None if args.holdout is None else {"share": args.holdout, "seed": args.holdout_seed},
            "classes": list(data.classes) if isinstance(data, ImageView) and data.named else None,
        },
        save_as=save,
        finish=finish,
    )
    return table, data.subset(kept) if isinstance(data, ImageView) else data


def _readable(table: ExitTable, view: Any, args: argparse.Namespace) -> NDArray[Any]:
    """Places of the samples that could be read; the others are named.

    ``view`` gives what the model reads: clips are files until then, and show only then that they are damaged.
    """
    bad, good = np.flatnonzero(table.target == _UNREADABLE), np.flatnonzero(table.target != _UNREADABLE)
    what = "clips" if getattr(view, "holds_clips", False) else "images"
    if is_main() and len(bad):
        for item in bad:
            try:
                view[item]
            except UnreadableImage as error:
                print(f"left out: {error}", file=sys.stderr)
        print(f"{len(bad)} of {len(table)} {what} could not be read and are left out.", file=sys.stderr)
    if len(bad) > args.max_bad:
        raise ValueError(f"{len(bad)} {what} could not be read, --max-bad allows {args.max_bad:g}.")
    if len(good) == 0:
        raise ValueError(f"none of the {len(bad)} {what} could be read.")
    return good


def check_table(table: ExitTable, model: Classifier) -> None:
    """ValueError unless the table is of such a model: its exits, its classes and, where recorded, its name."""
    found = describe_model(model)
    if table.num_exits != model.num_exits:
        raise ValueError(
            f"the table has {table.num_exits} exits and {found['architecture']} has {model.num_exits}; they do not "
            "belong together."
        )
    check_same_model(found, (table.about or {}).get("model") or {}, "the table")
    classes = table.logits.shape[-1] if table.logits is not None else None
    if classes not in (None, model.num_classes):
        raise ValueError(f"the table has {classes} classes and the model {model.num_classes}.")
    highest = max(table.target.max(initial=-1), table.prediction.max(initial=-1))
    if highest >= model.num_classes or table.target.min(initial=0) < 0:
        wrong = highest if highest >= model.num_classes else table.target.min()
        raise ValueError(f"the table holds class {wrong} and the model has classes 0 to {model.num_classes - 1}.")


def check_images(table: ExitTable, images: ImageView, config: dict[str, Any], name: str) -> None:
    """ValueError unless the table, ``name`` of its file, is of these images.

    There must be as many, and some of them, the first and the last too, are compared: what the network was given of
    them, under the preprocessing that the table records, and their classes. ``config`` is the model's, where the table
    records none.
    """
    about = table.about or {}
    origin = ", ".join(f"{key} {about[key]}" for key in ("data", "split", "holdout") if about.get(key))
    remedy = f"give the --data and --split it was made from{f' ({origin})' if origin else ''}, or leave out --data"
    if len(images) != table.num_samples:
        raise ValueError(f"{name} holds {table.num_samples} samples and the data {len(images)}; {remedy}.")
    places = np.unique(np.linspace(0, len(images) - 1, _COMPARED).astype(int))
    view = transformed(images.subset(places), _recorded(about, config))
    for number, place in enumerate(places):
        pixels, target = view[number]
        same = table.sample is None or sample_digests(pixels[None])[0] == table.sample[place]
        if not same or target != table.target[place]:
            of_class = " of its class" if same else ""
            raise ValueError(
                f"{name} is of other images than the data: its number {place + 1} is not {images.name(place)}"
                f"{of_class}; {remedy}."
            )


def _recorded(about: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The preprocessing a table was made under, as far as it says."""
    try:
        said = json.loads(about.get("transform") or "{}")
    except ValueError:  # in words of somebody's own
        said = {}
    said = {key: tuple(value) if isinstance(value, list) else value for key, value in said.items() if key in config}
    size = about.get("input_size")
    return {**config, **said, **({"input_size": tuple(size)} if size else {})}


def check_weights(policy: ExitPolicy, weights: str | None, force: bool) -> None:
    """Warn if the policy was solved with other weights than these (their digest); ValueError if it is certified."""
    solved_with = (policy.model or {}).get("weights")
    if None in (solved_with, weights) or solved_with == weights:
        return
    message = "the policy was solved with other weights of this architecture"
    if policy.certificate is None:
        print(f"warning: {message}; its budget and accuracy are not those promised.", file=sys.stderr)
    elif force:
        print(f"warning: {message}; its certificate does not hold.", file=sys.stderr)
    else:
        raise ValueError(f"{message}, and its certificate does not hold for these; certify again, or give --force.")


def check_batches(policy: ExitPolicy, batch_size: int, mode: str) -> None:
    """Say it if the policy keeps to a mean time in other batches, or in another mode, than it will run in."""
    latency = policy.source.get("latency") or {}
    solved = latency.get("batch_size"), latency.get("mode")
    if latency and solved != (batch_size, mode):
        print(
            f"note: the policy's budget is a mean time in batches of {solved[0]} ({solved[1]}), and these are of "
            f"{batch_size} ({mode}), which take other times; solve with --cost latency --cost-batch {batch_size}.",
            file=sys.stderr,
        )


def shared_samples(table: ExitTable, other: ExitTable) -> int | None:
    """How many samples of a table are in another one too; None where one of them does not know its samples."""
    if table.sample is None or other.sample is None:
        return None
    return int(np.isin(table.sample, other.sample).sum())


def overlap_note(overlap: int, table: ExitTable) -> str:
    """One line on a policy that is scored on samples it was made from."""
    return (
        f"{overlap} of these {table.num_samples} images are among those the policy was solved or certified on, so its "
        "figures are not those of new images; take another split (see --split and --holdout)."
    )


def overlap_record(overlap: int | None) -> dict[str, Any]:
    """The same as JSON; None where the policy or the table does not know its samples."""
    return {"overlap": overlap, "is_test": None if overlap is None else overlap == 0}


def fit_table(table: ExitTable, policy: ExitPolicy) -> ExitTable:
    """The table under the policy's confidence measure and temperatures."""
    try:
        check_same_confidence(policy, table)
    except ValueError:
        table = table.with_confidence(policy.measure, policy.temperatures.tolist())
    return table
