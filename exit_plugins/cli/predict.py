"""Classify images or clips under a policy, from one picture to as many as there are: label, confidence, exit, MACs.

What the model reads decides: images, or video files for a model of clips. They may be files, folders, patterns
('photos/**/*.jpg'), lists (one path a line in a .txt file, or - for standard input) and tar shards as webdataset writes
them ('shards/{000..099}.tar'). The model is the one the policy was made for, or an export of it (--export). Rows are
printed as they come; a file that cannot be read is named on stderr, the others go on, and the exit status is then 1.

With --output rows go to a file that is there once all are answered. A run that was killed is gone on with by --resume
and the same options and images, and ends with the same file.

examples:
  exit-plugins predict photos/*.jpg --policy policy.json --checkpoint model.safetensors --class-names names.txt
  find /data -name '*.jpg' | exit-plugins predict - --policy policy.json --checkpoint model.safetensors \\
      --batch-size 64 --workers 4 --output answers.csv --resume
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ..exits.files import check_apart
from ..exits.policy import ExitPolicy, weights_digest
from ..timm._cards import own_policy
from ..timm._shipped import list_shipped
from ..timm.images import UnreadableImage
from ..timm.predictor import PREDICT_MODES, Predictor, spoken_names
from ..timm.sources import Item, check_sources, fingerprint, iterate_images
from .common import Output, add_json_argument, amount, percent
from .journal import Journal, Trail
from .models import (
    Classifier,
    add_force_argument,
    add_model_arguments,
    class_names_of,
    data_config,
    known_model,
    model_classes,
    number,
    open_model,
    whole,
)
from .rows import ENDINGS, FORMATS, make_format, print_line
from .tables import check_batches, check_weights


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="FILE", help="image or video files, folders, patterns, lists, tar shards, or -"
    )
    parser.add_argument(
        "--policy",
        metavar="FILE",
        help="policy file written by solve (default: the export's, or what comes with --model's weights)",
    )
    parser.add_argument("--export", metavar="FOLDER", help="run this export, written by exit-plugins export")
    add_model_arguments(parser, positional=False)
    parser.add_argument(
        "--class-names",
        metavar="FILE",
        help="text file with one class a line, or data as in --data, for its classes (default: the policy's)",
    )
    parser.add_argument("--data-dir", metavar="DIR", help="where timm data sets lie")
    group = parser.add_argument_group("how it is run")
    group.add_argument("--mode", choices=PREDICT_MODES, default="fused", help="(default: %(default)s)")
    group.add_argument(
        "--batch-size",
        type=whole(1),
        default=1,
        metavar="N",
        help="images at a time (default: %(default)s, as a service would: then the time is what each took to its exit)",
    )
    group.add_argument("--workers", type=whole(0), default=0, metavar="N", help="processes that read (default: 0)")
    group = parser.add_argument_group("what is answered")
    group.add_argument("--top-k", type=whole(1), default=1, metavar="K", help="also the K likeliest classes")
    group.add_argument(
        "--reject",
        type=number(0, 1),
        metavar="CONFIDENCE",
        help='below it at the last exit the answer is "unsure", and counted',
    )
    group.add_argument("--format", choices=FORMATS, help="of the rows (default: by the ending of --output, or text)")
    group.add_argument("-o", "--output", metavar="FILE", help="write the rows there instead of printing them")
    group.add_argument("--resume", action="store_true", help="go on with what a killed run left beside --output")
    group.add_argument("--no-progress", action="store_true", help="no progress bar (there is one with --output)")
    add_force_argument(parser)
    add_json_argument(parser)


def outputs(args: argparse.Namespace) -> list[Output]:
    return [Output("output", args.output)] if args.output else []


def run(args: argparse.Namespace) -> int:
    form = _form(args)
    if args.output and args.policy is None:  # it lies in the folder of the export, or of the card
        folder = args.export or args.model.removeprefix("local-dir:")
        check_apart(args.output, [Path(folder, "policy.json")])
    predictor = _open_predictor(args)
    check_sources(args.images, predictor.read.endings, predictor.kind, args.output)
    if args.output:
        return _to_file(args, predictor, form)
    answers = _Answers(args, predictor)
    if args.json:
        _print_json(answers, predictor.kind)
    else:
        rows = make_format(
            form, predictor.kind, predictor.classes, predictor.policy.num_exits, args.top_k, timed=form == "text"
        )
        for number_, row in enumerate(answers.rows()):
            if form != "text":
                row.pop("seconds")
            print_line(rows.head * (number_ == 0) + rows.line(row))
    return 1 if answers.failed else 0


def _form(args: argparse.Namespace) -> str:
    """The form of the rows; ValueError for options that mean nothing together."""
    if args.resume and not args.output:
        raise ValueError("--resume goes on with a file; give --output.")
    if args.json and (args.format or args.output):
        raise ValueError("--json prints one list; for a file or a stream of rows give --format jsonl.")
    ending = "." + args.output.rpartition(".")[2].lower() if args.output else ""
    form = args.format or ENDINGS.get(ending, "text")
    if form == "parquet" and not args.output:
        raise ValueError("parquet is a file, not a stream; give --output.")
    if args.policy is None and args.export is None and args.model is None:
        raise ValueError("give --policy, --export with a folder that holds one, or --model with a policy of its own.")
    if args.export and (args.model or args.checkpoint or args.pretrained):
        raise ValueError("--export is the model and its weights; leave out --model, --checkpoint and --pretrained.")
    return form


def _own_policy(args: argparse.Namespace) -> ExitPolicy:
    """What comes with the weights of ``--model``, which are loaded then."""
    policy = own_policy(args.model)
    if policy is None:
        shipped = ", ".join(list_shipped())
        raise ValueError(
            f"no policy comes with {args.model}; give --policy, a card's local-dir:FOLDER, or one of the networks of "
            f"this package: {shipped}."
        )
    args.pretrained = args.pretrained or args.checkpoint is None
    return policy


def _open_predictor(args: argparse.Namespace) -> Predictor:
    shown, args.class_names = class_names_of(args), None  # names to print, whatever the policy calls the classes
    if args.export:
        from ..exits.export import ExportedSegments

        model: Classifier = ExportedSegments(args.export)
        policy = ExitPolicy.load(args.policy or Path(args.export, "policy.json"))
        known = known_model(args, policy)
    else:
        policy = ExitPolicy.load(args.policy) if args.policy else _own_policy(args)
        known = known_model(args, policy)
        if args.model is None and known["architecture"] is None:
            raise ValueError("this policy does not say what model it is for; give --model.")
        model = open_model(args, known)
    policy.check_model(model)
    check_weights(policy, weights_digest(model), args.force)
    if shown is not None and len(shown) != model.num_classes:
        raise ValueError(f"--class-names names {len(shown)} classes, the model has {model.num_classes}.")
    network = cast(nn.Module, model)  # which no Protocol can say that it is
    names = shown or spoken_names(network, model_classes(model, known))
    predictor = Predictor(
        network, policy, data_config(args, model, known), names, mode=args.mode, top_k=args.top_k, reject=args.reject
    )
    check_batches(policy, args.batch_size, predictor.adaptive.mode)
    return predictor


# ---------------------------------------------------------------------------------------------------------------------
# Reading and answering
# ---------------------------------------------------------------------------------------------------------------------


class _Batch(NamedTuple):
    """Images read: of each its name, its fingerprint and what was wrong with it, if anything; pixels of the others."""

    paths: list[str]
    contents: list[str]
    errors: list[str | None]
    pixels: torch.Tensor | None


class _Files(Dataset[Any]):
    """What a loader reads when its "indices" are the items themselves: no list of all of them is needed anywhere."""

    def __init__(self, predictor: Predictor) -> None:
        self.read = predictor.read

    def __getitems__(self, items: list[tuple[Item, str]]) -> _Batch:
        errors: list[str | None] = []
        pixels = []
        for item, _ in items:
            error = item.error
            if error is None:
                try:
                    content = item.path if item.content is None else item.content
                    pixels.append(self.read(content, item.path))
                except UnreadableImage as unreadable:
                    error = str(unreadable)
            errors.append(error)
        paths, contents = [item.path for item, _ in items], [content for _, content in items]
        return _Batch(paths, contents, errors, torch.stack(pixels) if pixels else None)


def _unchanged(batch: Any) -> Any:
    return batch


class _Answers:
    """Runs through the images, batch by batch, from those on that ``journal`` does not hold yet."""

    def __init__(self, args: argparse.Namespace, predictor: Predictor, journal: Journal | None = None) -> None:
        self.args, self.predictor, self.journal = args, predictor, journal
        self.cold = journal is None  # rows that say how long each took
        self.failed = self.unsure = 0

    def _left(self) -> Iterator[tuple[Item, str]]:
        """The images to answer, each with what it is made of now; those answered before are compared, and passed."""
        images = self._images()
        if self.journal is not None and self.journal.state["items"]:
            trail, count, last = Trail(), 0, None
            for item, content in islice(images, self.journal.state["items"]):
                trail.add(item.path, content)
                count, last = count + 1, item.path
            following = next(images, None)
            self.journal.check_passed(trail, count, last, following is not None)
            images = chain([] if following is None else [following], images)
        yield from images

    def _images(self) -> Iterator[tuple[Item, str]]:
        # Once, and not for every image, it is asked what is there to be lost.
        output = self.args.output if self.args.output and Path(self.args.output).is_file() else None
        for item in iterate_images(self.args.images, self.predictor.read.endings):
            if output is not None:
                check_apart(output, [item.file or item.path])
            # Before it is read: what is changed meanwhile is then seen to have changed.
            yield item, fingerprint(item)

    def check_finished(self) -> None:
        """ValueError unless the journal's file answers these very images."""
        if next(self._left(), None) is not None:
            raise ValueError(f"{self.args.output} answers no image, and there are some; leave out --resume.")

    def batches(self) -> Iterator[tuple[_Batch, list[dict[str, Any]]]]:
        """Each batch read and the rows of those in it that could be; the others are named on stderr and counted."""
        loader = DataLoader(
            _Files(self.predictor),
            batch_sampler=_chunks(self._left(), self.args.batch_size),
            num_workers=self.args.workers,
            collate_fn=_unchanged,
        )
        for batch in loader:
            for error in filter(None, batch.errors):
                self.failed += 1
                print_error(error)
            yield batch, self._answer(batch)

    def rows(self) -> Iterator[dict[str, Any]]:
        for _, rows in self.batches():
            yield from rows

    def _answer(self, batch: _Batch) -> list[dict[str, Any]]:
        if batch.pixels is None:
            return []
        if self.cold:
            self.predictor.run(batch.pixels)  # the first run pays for set-up that is no image's
            self.cold = False
        start = time.perf_counter()
        rows = self.predictor.rows(self.predictor.run(batch.pixels))  # waits for the device
        seconds = (time.perf_counter() - start) / len(rows)
        self.unsure += sum(row["class"] is None for row in rows)
        read = [path for path, error in zip(batch.paths, batch.errors, strict=True) if error is None]
        return [{"path": path, **row, "seconds": seconds} for path, row in zip(read, rows, strict=True)]


def _chunks(items: Iterator[tuple[Item, str]], size: int) -> Iterator[list[tuple[Item, str]]]:
    while chunk := list(islice(items, size)):
        yield chunk


def print_error(error: str) -> None:
    tqdm.write(f"exit-plugins predict: {error}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------------------------------


def _print_json(answers: _Answers, kind: str) -> None:
    """A JSON list, row by row, closed whatever happens."""
    print("[", end="")
    try:
        for number_, row in enumerate(answers.rows()):
            shown = {kind if name == "path" else name: value for name, value in row.items()}
            print("," * (number_ > 0) + "\n  " + json.dumps(shown, allow_nan=False), end="", flush=True)
    finally:
        print("\n]")


def _to_file(args: argparse.Namespace, predictor: Predictor, form: str) -> int:
    rows = make_format(form, predictor.kind, predictor.classes, predictor.policy.num_exits, args.top_k)
    journal = Journal(args.output, rows, _run_facts(args, predictor, form), args.resume, args.top_k)
    answers, state = _Answers(args, predictor, journal), journal.state
    if journal.finished:
        answers.check_finished()
        print(f"{args.output} is there, whole, and no run to go on with.", file=sys.stderr)
        return 0
    start, done = time.perf_counter(), state["items"]
    hidden = True if args.no_progress else None  # None: unless standard error is no terminal
    try:
        with tqdm(initial=done, unit=f" {predictor.kind}s", disable=hidden, dynamic_ncols=True) as bar:
            for batch, answered in answers.batches():
                for row in answered:
                    row.pop("seconds")
                failed = len(batch.paths) - len(answered)
                unsure = sum(row["class"] is None for row in answered)
                journal.add(answered, batch.paths, batch.contents, failed, unsure)
                bar.set_postfix_str(_shares(state["exits"], predictor.policy.num_exits), refresh=False)
                bar.update(len(batch.paths))
    except BaseException:
        journal.close()
        raise
    journal.finish()
    seconds = time.perf_counter() - start
    _print_summary(args.output, predictor, state, (state["items"] - done) / seconds)
    return 1 if state["failed"] else 0


def _run_facts(args: argparse.Namespace, predictor: Predictor, form: str) -> dict[str, Any]:
    """What decides the rows: a run that goes on must share all of it."""
    policy = predictor.policy
    return {
        "inputs": args.images,
        "model": weights_digest(predictor.adaptive.model),
        "thresholds": [str(t) for t in policy.thresholds],
        "temperatures": policy.temperatures.tolist(),
        "measure": policy.measure,
        "preprocessing": {key: str(value) for key, value in sorted(predictor.config.items())},
        "classes": predictor.classes,
        "mode": args.mode if not args.export else "export",
        "device": predictor.device.type,
        "batch-size": args.batch_size,  # the last digits of a confidence depend on it
        "top-k": args.top_k,
        "reject": args.reject,
        "format": form,
    }


def _shares(exits: dict[str, int], num_exits: int) -> str:
    total = sum(exits.values()) or 1
    return "exits " + " ".join(f"{100 * exits.get(str(k), 0) / total:.0f}%" for k in range(1, num_exits + 1))


def _print_summary(output: str, predictor: Predictor, state: dict[str, Any], rate: float) -> None:
    exits = state["exits"]
    counts = [exits.get(str(k + 1), 0) for k in range(predictor.policy.num_exits)]
    answered = sum(counts)
    parts = [f"{answered} {predictor.kind}s answered, {rate:.4g} a second"]
    if state["failed"]:
        parts.append(f"{state['failed']} not readable")
    if predictor.reject is not None:
        parts.append(f"{state['unsure']} unsure")
    if answered:
        parts.append("left at " + ", ".join(f"exit {k + 1} {percent(c / answered)}" for k, c in enumerate(counts)))
        if predictor.macs is not None:
            mean = sum(c * m for c, m in zip(counts, predictor.macs, strict=True)) / answered
            parts.append(f"{amount(mean, 'MACs')} each ({percent(mean / predictor.macs[-1])} of the last exit's)")
    print(f"{output}: " + "; ".join(parts), file=sys.stderr)
