"""Trained networks that come with the package: nothing to download.

Each is a folder in ``shipped/`` named like the model in timm: weights in half precision, a policy solved on held-out
images, and a card that says what it was trained on, by which command, and how often each exit is right.
``examples/experiments/ship.py`` writes and checks them.
"""

import json
from pathlib import Path
from typing import Any

from ..exits import ExitPolicy

__all__ = ["list_shipped", "shipped_card", "shipped_policy", "shipped_weights"]

WEIGHTS = Path(__file__).with_name("shipped")


def list_shipped() -> list[str]:
    """Names for ``timm.create_model(name, pretrained=True)`` whose weights are in the package."""
    return sorted(path.parent.name for path in WEIGHTS.glob("*/model.safetensors"))


def shipped_weights(name: str) -> str:
    """Path of the weights of a shipped model, for its default configuration."""
    return str(WEIGHTS / name / "model.safetensors")


def shipped_policy(name: str) -> ExitPolicy:
    """The policy of a shipped model, e.g. ``"msdnet_cifar_batch.cifar100"``.

    Raises:
        ValueError: no model of this name is shipped.
    """
    return ExitPolicy.load(_folder(name) / "policy.json")


def shipped_card(name: str) -> dict[str, Any]:
    """What is known of a shipped model: training, classes, and every exit's accuracy. ValueError as above."""
    return json.loads((_folder(name) / "card.json").read_text())


def _folder(name: str) -> Path:
    if name not in list_shipped():
        raise ValueError(f"no weights of {name!r} come with this package; those that do: {', '.join(list_shipped())}.")
    return WEIGHTS / name
