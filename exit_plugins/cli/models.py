"""Models at the command line: what is known of one before it is built, and building it."""

import argparse
import ast
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import timm
import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.models import load_checkpoint
from torch import nn

from ..exits.policy import ExitPolicy
from ..exits.protocol import AnyModel, MultiExitModule, check_multi_exit
from ..exits.reading import reading, text_lines
from ..exits.schema import plain
from ..exits.table import ExitTable
from ..timm import list_shipped, shipped_card
from ..timm.data import ImageView, class_names, open_dataset
from ..timm.images import input_config

# What tables, policies and cards say of a model; where two speak, they must agree.
_FACTS = ("architecture", "num_classes", "in_chans", "model_kwargs", "input_size", "classes")

# Arguments that timm's cards say of every model, whether it was built with them or not.
_ON_EVERY_CARD = ("global_pool", "img_size")


def add_model_arguments(parser: argparse.ArgumentParser, positional: bool = True) -> None:
    group = parser.add_argument_group("model")
    what = "timm name of a multi-exit model, or local-dir:FOLDER or hf-hub:NAME, whose weights it then has"
    if positional:
        parser.add_argument("model", metavar="MODEL", help=what)
    else:
        group.add_argument("--model", metavar="MODEL", help=what + " (default: the policy's)")
    group.add_argument("--checkpoint", metavar="FILE", help="weights (safetensors, or a training checkpoint)")
    group.add_argument("--pretrained", action="store_true", help="published weights")
    group.add_argument(
        "--num-classes", type=whole(1), metavar="N", help="default: those of the policy, table or data, or the model's"
    )
    group.add_argument(
        "--model-kwargs",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="more arguments of the model, e.g. in_chans=1 (default: those of the policy or table)",
    )
    group.add_argument(
        "--input-size",
        type=_input_size,
        metavar="SIZE",
        help="224, or 3,224,224 (default: that of the policy or table, or the model's)",
    )
    group.add_argument("--crop-pct", type=_crop, metavar="P", help="share of the resized image that is kept")
    group.add_argument("--device", metavar="DEVICE", help="default: cuda where there is one, else cpu")


def add_force_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--force", action="store_true", help="run a certified policy on other weights all the same")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers people type
# ---------------------------------------------------------------------------------------------------------------------


def whole(low: int) -> Any:
    """A type for argparse: a whole number from ``low`` on."""

    def parse(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"expected a whole number from {low} on, got {text!r}")
        return int(text)

    return parse


def number(low: float, high: float, open_below: bool = False, open_above: bool = False) -> Any:
    """A type for argparse: a finite number between two bounds."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        above = value > low if open_below else value >= low
        below = value < high if open_above else value <= high
        if not (math.isfinite(value) and above and below):
            ends = f"{'above' if open_below else 'from'} {low:g} {'and below' if open_above else 'to'} {high:g}"
            raise argparse.ArgumentTypeError(f"expected a number {ends}, got {text!r}")
        return value

    return parse


_crop = number(0, 1, open_below=True)


def _input_size(text: str) -> tuple[int, ...]:
    """(size,) or (channels, height, width)."""
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a size like 224 nor channels,height,width")
    return tuple(map(int, parts))


# ---------------------------------------------------------------------------------------------------------------------
# What is known of a model before it is built
# ---------------------------------------------------------------------------------------------------------------------


def known_model(
    args: argparse.Namespace, policy: ExitPolicy | None = None, table: ExitTable | None = None
) -> dict[str, Any]:
    """What arguments, policy, table and the card beside the checkpoint say of the model, by ``_FACTS``; None: nothing.

    Raises:
        ValueError: two of them disagree.
    """
    said = [("the arguments", _argument_facts(args)), *_card_facts(args)]
    if policy is not None:
        said.append(("the policy", policy.model or {}))
    if table is not None:
        about = table.about or {}
        said.append(("the table", {**about, **(about.get("model") or {})}))
        if table.logits is not None:
            said.append(("the table", {"num_classes": table.logits.shape[-1]}))
    known: dict[str, Any] = dict.fromkeys(_FACTS)
    origin: dict[str, str] = {}
    for where, facts in said:
        for key, value in plain(_sorted_out(facts), where).items():
            if value is None:
                continue
            if known[key] is None:
                known[key], origin[key] = value, where
            elif key == "model_kwargs" and origin[key] == "the arguments" and known[key].items() <= value.items():
                known[key] = value  # of many, one may be repeated
            elif key == "model_kwargs" and _agree(known[key], value):
                known[key] = known[key] | value
            elif known[key] != value:
                other = "the model has" if origin[key] == "the arguments" else f"{origin[key]} is for"
                raise ValueError(
                    f"{where} was made for {key} {_short(value)} and {other} {_short(known[key])}; they do not belong "
                    "together."
                )
    _settle_num_classes(known)
    return known


def _agree(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether both build the same model; what timm writes into every card may be missing on the other side."""
    different = {key for key in a | b if key not in a or key not in b or a[key] != b[key]}
    return all(key in _ON_EVERY_CARD and not (key in a and key in b) for key in different)


def _sorted_out(facts: dict[str, Any]) -> dict[str, Any]:
    """The facts by ``_FACTS``, each in its one place whether it came as an argument of the model or by name."""
    kwargs = facts.get("model_kwargs")
    found = {key: facts.get(key) for key in _FACTS}
    if kwargs is not None:
        found["model_kwargs"] = {key: kwargs[key] for key in kwargs if key not in ("in_chans", "num_classes")}
        for key in ("in_chans", "num_classes"):
            found[key] = kwargs.get(key) if found[key] is None else found[key]
    return found


def _settle_num_classes(known: dict[str, Any]) -> None:
    names, count = known["classes"], known["num_classes"]
    if names is not None and count is None:
        known["num_classes"] = len(names)
    elif names is not None and len(names) != count:
        raise ValueError(f"there are names for {len(names)} classes and the model has {count}.")


def _argument_facts(args: argparse.Namespace) -> dict[str, Any]:
    # Not the architecture: several names may stand for one, so the built model is asked for it.
    return {
        "num_classes": args.num_classes,
        "model_kwargs": parse_kwargs(args.model_kwargs) or None,
        "classes": class_names_of(args),
    }


def _card_facts(args: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """A shipped network's card, or timm's config.json beside the weights, as ``timm.save_for_hf`` of ours writes it."""
    if args.pretrained and not args.checkpoint and args.num_classes is None and timm.is_model(args.model or ""):
        config = timm.get_pretrained_cfg(args.model)
        shipped = f"{config.architecture}.{config.tag}" if config else ""
        return [(f"the card of {shipped}", shipped_card(shipped))] if shipped in list_shipped() else []
    if args.checkpoint:
        path = Path(args.checkpoint).parent / "config.json"
    elif (args.model or "").startswith("local-dir:"):
        path = Path(args.model.partition(":")[2]) / "config.json"
    else:
        return []
    try:
        card = json.loads(path.read_text(encoding="utf-8-sig"))
        facts = {
            "architecture": card["architecture"],
            "num_classes": card["num_classes"],
            "model_kwargs": card.get("model_args") or None,
            "classes": _names_of(card.get("label_names")),
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # there is none, or it is another program's
        return []
    return [(f"{path}", facts)]


def _names_of(names: Any) -> list[str] | None:
    """Names in the order of their indices, from what timm's ``label_names`` may be."""
    if isinstance(names, dict):
        names = [names[key] for key in sorted(names, key=int)]
    return [str(name) for name in names] if names else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."


def parse_kwargs(pairs: Sequence[str]) -> dict[str, Any]:
    """``["in_chans=1"]`` as ``{"in_chans": 1}``."""
    kwargs = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"--model-kwargs takes NAME=VALUE, got {pair!r}.")
        try:
            kwargs[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            # As YAML and JSON write them; as texts both would count as true.
            kwargs[key] = {"true": True, "false": False}.get(value.lower(), value)
        try:
            json.dumps(kwargs[key], allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"--model-kwargs {pair}: {error}; give a number, a text, a list or None.") from error
    return kwargs


# ---------------------------------------------------------------------------------------------------------------------
# Building
# ---------------------------------------------------------------------------------------------------------------------


class Classifier(MultiExitModule, Protocol):
    """A multi-exit model of timm's: one that knows its classes."""

    num_classes: int
    model_kwargs: Mapping[str, Any]


def open_model(
    args: argparse.Namespace,
    known: dict[str, Any] | None = None,
    num_classes: int | None = None,
    needs_weights: bool = True,
) -> Classifier:
    """The multi-exit model the arguments name, in evaluation mode on the device asked for.

    ``known`` is what ``known_model`` found; ``num_classes`` is the data's, where that says nothing.
    ``needs_weights=False`` where only its costs are wanted.
    """
    known = known_model(args) if known is None else known
    name = args.model or known["architecture"]
    kwargs = dict(known["model_kwargs"] or {})
    classes = known["num_classes"] or num_classes
    if classes:
        kwargs["num_classes"] = classes
    if known["in_chans"] not in (None, 3):
        kwargs["in_chans"] = known["in_chans"]
    if args.checkpoint and not Path(args.checkpoint).is_file():
        raise FileNotFoundError(f"no checkpoint at {args.checkpoint}.")
    if ":" not in name and not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:4]
        raise ValueError(f"timm knows no model {name!r}" + (f"; did you mean {', '.join(near)}?" if near else "."))
    # A folder or a repository stands for its weights; the costs alone are asked for without them.
    of_name = ":" in name and needs_weights and not args.checkpoint
    model = timm.create_model(name, pretrained=args.pretrained or of_name, **kwargs)
    classifier = cast(Classifier, check_multi_exit(model))  # timm's models say their number of classes
    # Tables and policies remember it, so that they can build the model again.
    if ":" not in name:
        classifier.model_kwargs = known["model_kwargs"] or {}
    if args.checkpoint:
        _load_weights(model, name, args.checkpoint)
    if needs_weights and not (args.checkpoint or args.pretrained or of_name):
        print(f"warning: {name} has random weights; give --checkpoint or --pretrained.", file=sys.stderr)
    return classifier.to(device_of(args)).eval()


def _load_weights(model: nn.Module, name: str, checkpoint: str) -> None:
    """Strictly; torch names every tensor that does not fit, a line should do."""
    misfit = None
    with reading(checkpoint, "checkpoint", "download or save it again", "check --checkpoint"):
        try:
            load_checkpoint(model, checkpoint)
        except RuntimeError as error:
            if "loading state_dict" not in str(error):
                raise
            misfit = error
    if misfit is None:
        return
    faults = [line.strip() for line in str(misfit).splitlines()[1:]] or [str(misfit)]
    first = faults[0] if len(faults[0]) < 160 else faults[0][:160] + "..."
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    raise ValueError(
        f"{checkpoint} does not fit {name} with {getattr(model, 'num_classes', '?')} classes: {first}{more}; check "
        "the name, --num-classes and --model-kwargs."
    ) from misfit


def device_of(args: argparse.Namespace) -> torch.device:
    if args.device:
        return torch.device(args.device)
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("cpu")


def data_config(args: argparse.Namespace, model: AnyModel, known: dict[str, Any] | None = None) -> dict[str, Any]:
    """timm's preprocessing of the model, with what the arguments change of it, at the known input size.

    Raises:
        ValueError: the channels asked for are not the model's, or the size is not that of the policy or table.
    """
    size = (known or {}).get("input_size")
    if args.input_size is not None:
        asked = args.input_size[-2:] * (2 if len(args.input_size) == 1 else 1)
        if size is not None and tuple(size[-2:]) != asked:
            raise ValueError(
                f"--input-size {asked[0]}x{asked[1]} is not that of the policy or table, {size[-2]}x{size[-1]}."
            )
        size = args.input_size if len(args.input_size) == 3 else asked
    return input_config(model, size, args.crop_pct)


# ---------------------------------------------------------------------------------------------------------------------
# Classes
# ---------------------------------------------------------------------------------------------------------------------


def class_names_of(args: argparse.Namespace) -> list[str] | None:
    """The names ``--class-names`` gives: a text file with one a line, or a data set whose classes are meant."""
    given = getattr(args, "class_names", None)
    if given is None:
        return None
    if Path(given).is_file():
        with reading(given, "list of class names", "write one name a line, in UTF-8"):
            lines = text_lines(given)
        return [line.strip() for line in lines if line.strip()]
    return list(class_names(open_dataset(given, ("train", "validation", "test"), args.data_dir)))


def model_classes(model: Classifier, known: dict[str, Any]) -> list[str] | None:
    """Names of the model's classes by index, where anything says them."""
    config = getattr(model, "pretrained_cfg", None) or {}
    names = known["classes"] or _names_of(config.get("label_names") if hasattr(config, "get") else None)
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"there are names for {len(names)} classes and the model has {model.num_classes}.")
    return names


def match_classes(data: Any, model: Classifier, known: dict[str, Any]) -> Any:
    """The data with its labels numbered as the model's outputs are; a data set that streams as it is.

    Raises:
        ValueError: the data has classes the model does not know, or nothing says which of the model's classes its are.
    """
    if not isinstance(data, ImageView):
        return data
    names = model_classes(model, known)
    if names is None and data.named and (subset := infer_imagenet_subset(model)):
        synsets = ImageNetInfo(subset).label_names()  # type: ignore[no-untyped-call]  # timm leaves it untyped
        names = synsets if set(data.classes) <= set(synsets) else None
    if names is not None and data.named:
        present = data.own_classes
        data = data.with_classes(names)
        absent = len(names) - len(present)
        if absent:
            print(f"note: {absent} of the model's {len(names)} classes are not in the data.", file=sys.stderr)
    elif len(data.classes) > model.num_classes or (data.named and len(data.classes) < model.num_classes):
        raise ValueError(
            f"the data has {len(data.classes)} classes and the model {model.num_classes}, and nothing says which is "
            "which: put the training split beside it, give --class-names, or a policy or card that names them."
        )
    return data
