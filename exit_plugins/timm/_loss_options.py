"""How a training script weighs the exits: said on its command line or in timm's YAML file, and written down."""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import yaml
from torch import Tensor

from .._version import __version__
from ..exits import MultiExitLoss
from ..exits.files import atomic_write
from ..exits.losses import LOSS_PRESETS, ExitWeights, own_preset
from ..exits.protocol import AnyModel, check_multi_exit

__all__ = ["ExitLossOptions", "add_loss_arguments", "config_values", "options_of", "write_options"]

_WRITTEN_ALONG = ("exit_plugins", "timm")  # versions, in exit_args.yaml


@dataclass(frozen=True)
class ExitLossOptions:
    """How the exits are weighted; see ``exit_plugins.MultiExitLoss``.

    Attributes:
        preset: name of a preset, or None for the one of the model's own paper.
        alpha: of the preset ``paper``.
        ce, kl: weights of the classification and of the distillation term, one per exit, in the preset's place.
    """

    preset: str | None = None
    alpha: float | None = None
    ce: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None

    @property
    def explicit(self) -> bool:
        """Whether anything was asked for."""
        return self != ExitLossOptions()

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> "ExitLossOptions":
        """The options among the keys of a YAML file: ``exit_loss``, ``exit_loss_alpha``, ``_ce`` and ``_kl``.

        The weights are lists or, as on the command line, numbers between commas. What ``exit_args.yaml`` holds is read
        as it is, so that it can be a ``--config`` itself.

        Raises:
            ValueError: a key begins with ``exit`` and is none of ours, or a value makes no sense.
        """
        known = {
            "exit_loss": ("preset", _preset),
            "exit_loss_alpha": ("alpha", _share),
            "exit_loss_ce": ("ce", _weights),
            "exit_loss_kl": ("kl", _weights),
        }
        given: dict[str, Any] = {}
        for key, value in values.items():
            if not str(key).startswith(("exit_", "exit-")) or key in _WRITTEN_ALONG:
                continue
            if key not in known:
                raise ValueError(f"unknown key {key!r}; those of the exits are {', '.join(known)}.")
            name, parse = known[key]
            try:
                given[name] = None if value is None else parse(value)
            except argparse.ArgumentTypeError as error:
                raise ValueError(f"{key}: {error}.") from None
        return cls(**given)

    def over(self, others: "ExitLossOptions") -> "ExitLossOptions":
        """These options, and those of ``others`` where nothing is said here.

        A preset replaces whatever ``others`` weigh the exits by: its own weights would be none of theirs.
        """
        if self.preset is not None:
            return self
        return ExitLossOptions(**asdict(others) | {k: v for k, v in asdict(self).items() if v is not None})

    def check(self) -> "ExitLossOptions":
        """These options; ValueError where they contradict each other."""
        if self.alpha is not None and self.preset not in (None, "paper"):
            raise ValueError(f"exit_loss_alpha belongs to the preset paper, not to {self.preset}.")
        return self

    def loss(self, model: AnyModel, criterion: Callable[[Tensor, Tensor], Tensor]) -> MultiExitLoss:
        """The loss for a multi-exit ``model``, with the host's ``criterion`` at every exit."""
        preset = self.preset or own_preset(model)[0]
        if self.alpha is not None and preset != "paper":
            raise ValueError(
                f"--exit-loss-alpha belongs to the preset paper, and {type(model).__name__} is trained with {preset}: "
                "leave it out, or say --exit-loss paper."
            )
        num_exits = check_multi_exit(model).num_exits
        loss = MultiExitLoss(num_exits, preset, 0.5 if self.alpha is None else self.alpha, criterion=criterion)
        if self.ce is None and self.kl is None:
            return loss
        weights = ExitWeights(
            loss.weights.ce if self.ce is None else self.ce, loss.weights.kl if self.kl is None else self.kl
        )
        for name, given in zip(("ce", "kl"), (weights.ce, weights.kl), strict=True):
            if len(given) != num_exits:
                raise ValueError(
                    f"--exit-loss-{name} has {len(given)} weights and the model {num_exits} exits; give one per exit."
                )
        for index, pair in enumerate(zip(weights.ce, weights.kl, strict=True)):
            if not any(pair):
                raise ValueError(f"exit {index + 1} has no weight in the loss and would never be trained.")
        return MultiExitLoss(num_exits, preset, weights=weights, criterion=criterion)

    def reason(self, model: AnyModel) -> str:
        """Which preset ``loss(model)`` takes and why, in words for a log."""
        preset, why = (self.preset, "as asked for") if self.preset else own_preset(model)
        weighed = [f"exit_loss_{name}" for name in ("ce", "kl") if getattr(self, name) is not None]
        return f"{preset}, {why}" + (f", with {' and '.join(weighed)} as asked for" if weighed else "")


def options_of(loss: MultiExitLoss, asked: ExitLossOptions) -> dict[str, Any]:
    """What ``loss`` weighs the exits by, as the options that ask for the same again."""
    alpha = (0.5 if asked.alpha is None else asked.alpha) if loss.preset == "paper" else None
    stored = {"exit_loss": loss.preset, "exit_loss_alpha": alpha}
    return stored | {"exit_loss_ce": loss.weights.ce, "exit_loss_kl": loss.weights.kl}


def write_options(stored: dict[str, Any], folder: str) -> None:
    """Into ``exit_args.yaml`` of a run's folder, with the versions of this package and of timm."""
    stored = stored | dict(zip(_WRITTEN_ALONG, (__version__, timm.__version__), strict=True))
    with atomic_write(os.path.join(folder, "exit_args.yaml")) as file:
        yaml.safe_dump({k: list(v) if isinstance(v, tuple) else v for k, v in stored.items()}, file, sort_keys=False)


def _preset(text: Any) -> str:
    if not isinstance(text, str) or text not in LOSS_PRESETS:
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(LOSS_PRESETS)}, got {text!r}")
    return text


def _weights(text: Any) -> tuple[float, ...]:
    try:
        parts = text.split(",") if isinstance(text, str) else text if isinstance(text, (list, tuple)) else (text,)
        return tuple(float(weight) for weight in parts)
    except (TypeError, ValueError):
        raise argparse.ArgumentTypeError(f"expected numbers between commas, one per exit, got {text!r}") from None


def _share(text: Any) -> float:
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got {text!r}")
    return value


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exit-loss", choices=tuple(LOSS_PRESETS), help="weights of the exits (default: the model's own)"
    )
    parser.add_argument("--exit-loss-alpha", type=_share, metavar="A", help="of the preset paper (default: 0.5)")
    parser.add_argument("--exit-loss-ce", type=_weights, metavar="W,W,...", help="classification weight of every exit")
    parser.add_argument("--exit-loss-kl", type=_weights, metavar="W,W,...", help="distillation weight of every exit")


def config_values(argv: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """The YAML file that ``argv`` names for a script's ``--config``, found as the script finds it, and what it holds.

    Raises:
        ValueError: it is no YAML file, or holds no options.
    """
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-c", "--config", nargs="?", default="")
    path = parser.parse_known_args(argv)[0].config
    if not path:
        return "", {}
    try:
        with open(path, encoding="utf-8") as file:
            values = yaml.safe_load(file)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no options: expected lines of the form 'name: value'.")
    return path, values
