"""Who is who: what a model is, which weights it has, which samples a table or a policy has seen."""

import hashlib
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .deprecation import moved
from .protocol import COMPILED, AnyModel, MultiExitModule, check_multi_exit, unwrapped
from .schema import plain

__all__ = ["describe_checked", "describe_model", "file_digest", "sample_digests", "weights_digest"]

__getattr__ = moved(__name__, {"SampleRecord": "exit_plugins.exits.samples.SampleRecord"})


def describe_model(model: AnyModel) -> dict[str, Any]:
    """What tables and policies remember of a model, in plain JSON values.

    ``architecture``, ``num_exits``, ``num_classes`` and ``in_chans`` must be the same for a policy to run on it; None
    is "not known". ``model_kwargs`` is what the model was built with beyond those, where whoever built it left that in
    ``model.model_kwargs`` or, as ``timm.create_model`` does, in ``model._model_args``: with it
    ``timm.create_model(architecture, **model_kwargs)`` builds the model again. Dropout rates and where weights came
    from are no part of it; None where an argument is nothing JSON can hold.
    """
    return describe_checked(check_multi_exit(model))


def describe_checked(model: MultiExitModule) -> dict[str, Any]:
    """``describe_model`` of a module already known to follow the protocol."""
    config: Any = getattr(model, "pretrained_cfg", None)
    architecture = config.get("architecture") if hasattr(config, "get") else getattr(config, "architecture", None)
    return {
        "architecture": architecture or type(model).__name__,
        "model_kwargs": _model_kwargs(model),
        "num_exits": int(model.num_exits),
        "num_classes": int(getattr(model, "num_classes", 0) or 0) or None,
        "in_chans": _in_chans(model),
    }


def _model_kwargs(model: AnyModel) -> dict[str, Any] | None:
    said: dict[str, Any] | None = getattr(model, "model_kwargs", None)
    if said is not None:
        return said
    kept = vars(model).get("_model_args")  # its own: wrappers pass on what they wrap, which was built otherwise
    if kept is None:
        return None
    # Said elsewhere, or without effect on what the model computes once it has its weights.
    left_out = re.compile("num_classes|in_chans|pretrained.*|.*drop_rate|drop_(path|block)_rate")
    try:
        kwargs: dict[str, Any] = plain({k: v for k, v in kept.items() if not left_out.fullmatch(k)}, "model_kwargs")
        return kwargs
    except (TypeError, ValueError):
        return None


def _in_chans(model: AnyModel) -> int | None:
    """Channels of the images: what the model says, else what its first convolution reads."""
    said = getattr(model, "in_chans", None)
    if isinstance(said, int):
        return said
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def weights_digest(model: AnyModel) -> str:
    """SHA-256 of every tensor of the state dict with its name, dtype and shape, in the order of the names.

    Names are the model's own, whatever torch.compile, DataParallel or DistributedDataParallel put around it. A model
    whose weights torch does not hold (an exported one) says its own in an attribute ``weights``.
    """
    said = getattr(unwrapped(model), "weights", None)
    if isinstance(said, str):
        return said
    hasher = hashlib.sha256()
    state = {_own_name(name): value for name, value in unwrapped(model).state_dict().items()}
    for name, value in sorted(state.items()):
        if isinstance(value, Tensor):
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(_bytes(value))
        else:  # a module's extra state
            hasher.update(f"{name} {value!r}".encode())
    return hasher.hexdigest()


def _own_name(name: str) -> str:
    """A name of the state dict without what compiling a module inside the model put into it."""
    return ".".join(part for part in name.split(".") if part != COMPILED)


def _bytes(tensor: Tensor) -> memoryview:
    """The elements in row order, whatever the memory layout, device or dtype (numpy has no bfloat16)."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def sample_digests(images: Tensor) -> NDArray[Any]:
    """(B,) uint64: a 64-bit BLAKE2b digest of each sample of a batch, with its dtype and shape."""
    head = f"{images.dtype} {tuple(images.shape[1:])}".encode()
    digests = []
    for image in images.detach().cpu():
        hasher = hashlib.blake2b(head, digest_size=8)
        hasher.update(_bytes(image))
        digests.append(hasher.digest())
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            hasher.update(chunk)
    return hasher.hexdigest()
