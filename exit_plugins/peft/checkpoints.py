"""Weights of a backbone from a file: of a classifier, or of self-supervised training (MoCo v3, MAE)."""

import os

from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ..timm._checkpoints import describe_keys, read_checkpoint
from .timm_family import timm_classifiers

__all__ = ["load_backbone"]

# MoCo v3 keeps the encoder that is transferred beside a momentum copy of it and a predictor.
_MOCO = "base_encoder."
# MAE's decoder and mask token, which no classifier has.
_MAE = ("decoder_", "mask_token")


def load_backbone(backbone: nn.Module, path: str | os.PathLike) -> nn.Module:
    """Load all weights of ``backbone`` but its classifier's, which is the new task's; returns ``backbone``.

    Read are checkpoints of timm and of training scripts (averaged weights first), and those that MoCo v3 and MAE
    publish: the encoder is taken out of what was trained beside it. Position embeddings of another grid are resampled.

    Raises:
        ValueError: weights are missing or too many; they are named.
    """
    state = {key: value for key, value in read_checkpoint(path).items() if isinstance(value, Tensor)}
    if any(key.startswith(_MOCO) for key in state):
        state = {key.removeprefix(_MOCO): value for key, value in state.items() if key.startswith(_MOCO)}
    state = {key: value for key, value in state.items() if not key.startswith(_MAE)}
    heads = tuple(f"{name}." for name in timm_classifiers(backbone))
    if isinstance(backbone, VisionTransformer):
        state = checkpoint_filter_fn(state, backbone)
    state = {key: value for key, value in state.items() if not key.startswith(heads)}
    own = {key: value for key, value in backbone.state_dict().items() if not key.startswith(heads)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    wrong = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or wrong:
        said = [describe_keys(kind, keys) for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
        said += [f"{key} is {tuple(state[key].shape)} for {tuple(own[key].shape)}" for key in sorted(wrong)[:5]]
        raise ValueError(
            f"{path} does not hold the weights of this {type(backbone).__name__}: {'; '.join(said)}. Create the "
            "backbone that they were trained in."
        )
    backbone.load_state_dict(state, strict=False)
    return backbone
