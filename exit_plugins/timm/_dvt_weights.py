"""The authors' published checkpoints of DVT: reading the weights, and the thresholds that lie beside them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import Tensor, nn

from ..exits.policy import ExitPolicy, describe_model
from ..exits.reading import reading
from ._checkpoints import check_keys, unwrap_state_dict
from ._dvt_tokens import T2TTokens
from ._host import TimmModel

__all__ = ["allow_numpy_data", "checkpoint_filter_fn", "policies_from_checkpoint"]


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: TimmModel) -> dict[str, Any]:
    """State dict for ``model``, a DVT, from ours or the authors' (``{"model_state_dict": ...}``).

    Positions are resampled to the model's grids, and the first layers of the tokens-to-token modules to its channels.

    Raises:
        ValueError: The weights are of another cascade; the message names what is missing and unexpected.
    """
    state_dict = unwrap_state_dict(state_dict)
    wanted = model.state_dict()
    unexpected = state_dict.keys() - wanted.keys()
    if model.num_classes == 0:
        unexpected = {key for key in unexpected if ".head." not in key}
    check_keys(
        wanted.keys() - state_dict.keys(),
        unexpected,
        "Check the model's name, token_grids, feature_reuse and relation_reuse against the file.",
    )
    state_dict = {key: state_dict[key] for key in wanted}
    for name, stage in model.items():
        key = f"{name}.pos_embed"
        if not isinstance(stage.pos_embed, nn.Parameter):
            state_dict[key] = stage.pos_embed
        elif state_dict[key].shape != stage.pos_embed.shape:
            base = tuple(axis.count(side) for axis, side in zip(stage.patches, model.base_size, strict=True))
            old_size = base if 1 + base[0] * base[1] == state_dict[key].shape[1] else None
            state_dict[key] = resample_abs_pos_embed(state_dict[key], new_size=stage.grid, old_size=old_size)
        if stage.tokens_to_token is not None:
            _adapt_channels(state_dict, f"{name}.tokens_to_token.attention1.", stage.tokens_to_token, model.in_chans)
    return state_dict


def _adapt_channels(state_dict: dict[str, Any], prefix: str, tokens: T2TTokens, in_chans: int) -> None:
    """Give the layers that read unfolded pixels ``in_chans`` channels, as timm does with a first convolution."""
    area = tokens.kernel[0] * tokens.kernel[1]
    weight = state_dict[prefix + "kqv.weight"]
    base_chans = weight.shape[1] // area
    if base_chans == in_chans or weight.shape[1] % area:
        return
    weight = weight.unflatten(1, (base_chans, *tokens.kernel))
    state_dict[prefix + "kqv.weight"] = adapt_input_conv(in_chans, weight, base_chans).flatten(1)
    for key in (prefix + "norm1.weight", prefix + "norm1.bias"):
        per_pixel = state_dict[key].unflatten(0, (base_chans, area)).mean(0)
        state_dict[key] = per_pixel.repeat(in_chans)


def allow_numpy_data() -> AbstractContextManager[None]:
    """Let torch read numpy arrays and numbers from files it otherwise takes tensors from only: data, no code."""
    reconstruct = np.zeros(1).__reduce__()[0]
    scalar = np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "b1")}
    # numpy 2 moved these functions; files name them by the place they were in when written.
    moved: list[tuple[Any, str]] = [
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")
        for function, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))
    ]
    return torch.serialization.safe_globals([np.ndarray, np.dtype, *dtypes, *moved])


def policies_from_checkpoint(
    checkpoint: str | os.PathLike[str] | Mapping[str, Any],
    model: nn.Module | None = None,
    costs: Sequence[float] | np.ndarray | None = None,
) -> list[ExitPolicy]:
    """The thresholds stored in one of the authors' checkpoints, one policy per row, in the file's order.

    Args:
        checkpoint: The file, or what was in it: a mapping with ``dynamic_threshold``, a table (R, K) of thresholds.
        model: If given, it must have K exits, and the policies will only run on models like it.
        costs: Cumulative cost of each exit to write into the policies, such as ``exit_costs(model).macs``; by default
            the file's ``flops``, where these are K numbers.

    Returns:
        R policies; save each with ``policy.save(path)``.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file holds no thresholds, or not as many as the model has exits.
    """
    if not isinstance(checkpoint, Mapping):
        path = checkpoint
        with reading(path, "checkpoint", "download or save it again", "check the path"), allow_numpy_data():
            checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True)
    if not isinstance(checkpoint, Mapping) or "dynamic_threshold" not in checkpoint:
        raise ValueError(
            "the checkpoint holds no dynamic_threshold; solve thresholds with exit_plugins.solve_thresholds instead."
        )
    rows = _as_array(checkpoint["dynamic_threshold"])
    if rows is None or rows.ndim != 2 or rows.size == 0:
        raise ValueError("dynamic_threshold is not a table of numbers (rows, exits).")
    if costs is None:
        flops = _as_array(checkpoint.get("flops"))
        if flops is not None and flops.shape == rows.shape[1:]:
            costs = flops
    described = None if model is None else describe_model(model)
    return [
        ExitPolicy(row, costs=costs, model=described, source={"method": "msdnet", "dynamic_threshold_row": index})
        for index, row in enumerate(rows)
    ]


def _as_array(values: Any) -> np.ndarray | None:
    """Tensors, lists of numbers and lists of tensors as one float64 array; None if they are none of these."""
    if isinstance(values, Tensor):
        return values.detach().double().numpy()
    if isinstance(values, Iterable) and not isinstance(values, str | Mapping | np.ndarray):
        values = [_as_array(value) if isinstance(value, Iterable) else value for value in values]
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        return None
