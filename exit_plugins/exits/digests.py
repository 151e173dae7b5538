"""Who is who: what a model is, which weights it has, which samples a table or a policy has seen."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .protocol import AnyModel, MultiExitModule, check_multi_exit
from .schema import plain

__all__ = ["SampleRecord", "describe_checked", "describe_model", "sample_digests", "weights_digest"]

_KEPT = 4096  # digests a record holds; enough to estimate an overlap to about 1.5 % and small enough for a JSON file


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

    A model whose weights torch does not hold (an exported one) says its own in an attribute ``weights``.
    """
    said = getattr(model, "weights", None)
    if isinstance(said, str):
        return said
    hasher = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            hasher.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            hasher.update(_bytes(value))
        else:  # a module's extra state
            hasher.update(f"{name} {value!r}".encode())
    return hasher.hexdigest()


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


@dataclass(frozen=True)
class SampleRecord:
    """Which samples something was made from, small enough to travel in a policy.

    Attributes:
        count: how many samples.
        digests: the lowest 4,096 of their digests (n,) uint64, sorted and without repeats (a bottom-k sketch: a random
            sample of them, since digests are random); None where the samples have none.
        limit: the highest digest kept, all up to it are here; None when all are.
    """

    count: int
    digests: NDArray[Any] | None = None
    limit: int | None = None

    @classmethod
    def of(cls, sample: NDArray[Any] | None, count: int) -> "SampleRecord":
        """Of a table's digests (N,), or of ``count`` samples that have none."""
        if sample is None:
            return cls(count)
        unique = np.unique(sample)
        return cls(count, unique[:_KEPT], int(unique[_KEPT - 1]) if len(unique) > _KEPT else None)

    def to_json(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "digests": None if self.digests is None else [f"{int(digest):016x}" for digest in self.digests],
            "limit": None if self.limit is None else f"{self.limit:016x}",
        }

    @classmethod
    def of_json(cls, value: Any) -> "SampleRecord | None":
        """What ``to_json`` wrote, or a plain count, as older policies have it; ValueError for anything else."""
        if value is None:
            return None
        if type(value) is int and value >= 0:
            return cls(value)
        if not isinstance(value, Mapping) or set(value) - {"count", "digests", "limit"}:
            raise ValueError(f"samples are a count, digests and a limit, got {str(value)[:80]}.")
        count, digests, limit = value.get("count"), value.get("digests"), value.get("limit")
        if type(count) is not int or count < 0:
            raise ValueError(f"samples have a count, got {count!r}.")
        if digests is not None and not isinstance(digests, list):
            raise ValueError(f"samples have a list of digests, got {str(digests)[:40]!r}.")
        numbers = None if digests is None else np.array(sorted(map(_from_hex, digests)), dtype=np.uint64)
        return cls(count, numbers, None if limit is None else _from_hex(limit))

    def overlap(self, sample: NDArray[Any]) -> int:
        """How many of the digests ``sample`` (N,) are among these; an estimate where not all are kept."""
        if self.digests is None:
            return 0
        seen = int(np.isin(sample, self.digests).sum())
        if self.limit is None:
            return seen
        kept = (self.limit + 1) / 2**64
        return min(len(sample), max(seen, round(seen / kept)))


def _from_hex(text: Any) -> int:
    if not isinstance(text, str) or not re.fullmatch("[0-9a-f]{16}", text):
        raise ValueError(f"a sample's digest is 16 hexadecimal digits, got {str(text)[:40]!r}.")
    return int(text, 16)
