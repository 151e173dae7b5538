"""Pretrained weights: download, read, unwrap, and build a model from them through timm."""

import os
import pickle
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, load_state_dict, resolve_pretrained_cfg
from torch import Tensor
from tqdm import tqdm

from ..exits.reading import reading
from ._host import TimmModel, model_traits, resolve_pretrained_source
from ._switches import check_switches

__all__ = [
    "FEATURE_ARGUMENTS",
    "WholeOrPart",
    "build_with_checkpoint",
    "check_keys",
    "describe_keys",
    "fetch_checkpoint",
    "read_checkpoint",
    "share_link",
    "unwrap_state_dict",
]

# Where training scripts put the weights of a checkpoint, the averaged ones first.
_STATE_DICT_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model_state_dict", "model")
_WRAPPERS = ("module.", "_orig_mod.")
_CHUNK = 1 << 20


def fetch_checkpoint(
    url: str, filename: str, cache_dir: str | os.PathLike[str] | None = None, progress: bool = True, timeout: float = 30
) -> Path:
    """Path of ``filename`` in the checkpoint cache, downloaded from ``url`` if it is not there yet.

    The file appears under its name only when it is complete. The name is given because share links end in none.

    Args:
        url: Where the file is.
        filename: Its name in the cache.
        cache_dir: The cache; by default torch.hub's ``checkpoints`` folder.
        progress: Show a progress bar.
        timeout: Seconds without an answer until the download is given up.

    Raises:
        OSError: The download failed; the message says where to put the file by hand.
    """
    folder = Path(cache_dir) if cache_dir else Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / filename
    if path.is_file():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=folder, prefix=filename + ".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            request = urllib.request.Request(url, headers={"User-Agent": "exit-plugins"})
            with urllib.request.urlopen(request, timeout=timeout) as response:
                if response.headers.get_content_type() == "text/html":
                    raise OSError("the link answers with a web page, not with a file")
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size or None, unit="B", unit_scale=True, desc=filename, disable=not progress) as bar:
                    while chunk := response.read(_CHUNK):
                        file.write(chunk)
                        bar.update(len(chunk))
                    received = file.tell()
            if size and received != size:
                raise OSError(f"the connection broke off after {received} of {size} bytes")
        os.replace(partial, path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise OSError(
            f"cannot download {filename} from {url} ({reason}). Download it by other means and put it at {path}, or "
            "load your copy with create_model(..., pretrained=True, pretrained_cfg_overlay=dict(file='PATH'))."
        ) from error
    finally:
        Path(partial).unlink(missing_ok=True)
    return path


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The state dict in a checkpoint file, read without running any code in it.

    Takes safetensors, and torch files with a plain state dict or a training script's dictionary around it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds more than tensors, numbers and an ``argparse.Namespace``.
    """
    path = Path(path)
    with reading(path, "checkpoint", "download or save it again", "check the path"):
        try:
            checkpoint = load_state_dict(str(path), device="cpu")
        except (RuntimeError, pickle.UnpicklingError) as error:  # whose words are about pickles, not about the file
            unsafe = _unsafe_globals(path)
            raise ValueError(
                f"it holds objects that are not weights: {', '.join(unsafe)}" if unsafe else "damaged or cut short"
            ) from error
        return unwrap_state_dict(checkpoint)


def _unsafe_globals(path: Path) -> list[str]:
    try:
        return torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    except Exception:  # a file too damaged to be looked at
        return []


def unwrap_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The state dict inside what training scripts save, averaged weights (EMA) first.

    The names are without the prefixes that DataParallel and torch.compile put before all of them, in either order.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f"a checkpoint is a dictionary of weights, got {type(checkpoint).__name__}.")
    for key in _STATE_DICT_KEYS:
        inner = checkpoint.get(key)
        if isinstance(inner, Mapping) and inner:
            return unwrap_state_dict(inner)
    while names := [key for key, value in checkpoint.items() if isinstance(value, Tensor)]:
        prefix = next((p for p in _WRAPPERS if all(name.startswith(p) for name in names)), None)
        if prefix is None:
            break
        checkpoint = {key.removeprefix(prefix): v for key, v in checkpoint.items() if key.startswith(prefix)}
    return dict(checkpoint)


def describe_keys(kind: str, keys: Iterable[str], limit: int = 5) -> str:
    """``2 missing (a, b)``, with at most ``limit`` keys named."""
    keys = list(keys)
    if not keys:
        return f"no {kind} keys"
    more = ", ..." if len(keys) > limit else ""
    return f"{len(keys)} {kind} keys ({', '.join(keys[:limit])}{more})"


def check_keys(missing: Iterable[str], unexpected: Iterable[str], advice: str) -> None:
    """ValueError that names the keys and ends in ``advice``, unless both are empty."""
    missing, unexpected = sorted(missing), sorted(unexpected)
    if missing or unexpected:
        raise ValueError(
            f"this is no checkpoint of this model: {describe_keys('missing', missing)}; "
            f"{describe_keys('unexpected', unexpected)}. {advice}"
        )


def share_link(share: str) -> str:
    """Download link of a file that the authors of Dyn-Perceiver and DVT share at their university."""
    return f"https://cloud.tsinghua.edu.cn/f/{share}/?dl=1"


# Arguments of ``timm.create_model`` that say what becomes of the model once it is built.
FEATURE_ARGUMENTS = ("features_only", "out_indices", "feature_cls")


@dataclass(frozen=True)
class WholeOrPart:
    """Where pretrained weights of a model around other timm networks come from, and so whose they are.

    They are the networks' own, unless a configuration of the whole model is given (a saved folder, a hub repository) or
    registered for the variant with weights, or a file whose keys start as the whole model's do.

    Attributes:
        pretrained: Whether weights are to be loaded at all.
        whole: Whether they are the whole model's.
        given: The configuration that was given or registered, or an empty one.
        overlay: What replaces entries of the configuration, a file among it read already.
        file: Where it was.
    """

    pretrained: bool
    whole: bool
    given: dict[str, Any]
    overlay: dict[str, Any]
    file: str | None

    @classmethod
    def find(
        cls,
        prefix: str,
        variant: str,
        pretrained: bool,
        pretrained_cfg: Any = None,
        overlay: Mapping[str, Any] | None = None,
    ) -> "WholeOrPart":
        """From the arguments timm gives a model's builder; keys of the whole model start with ``prefix``."""
        if isinstance(pretrained_cfg, dict):
            given = dict(pretrained_cfg)
        else:  # the tag of a registered one, or None for the variant's first
            registered = resolve_pretrained_cfg(variant, pretrained_cfg)
            given = registered.to_dict() if registered.has_weights else {}
        overlay = dict(overlay or {})
        file = None if overlay.get("custom_load") else overlay.get("file")
        if pretrained and file:
            overlay["state_dict"] = read_checkpoint(file)
        whole = bool(given) or any(key.startswith(prefix) for key in overlay.get("state_dict") or ())
        return cls(pretrained, whole, given, overlay, file)

    @property
    def of_part(self) -> bool:
        """Whether the networks inside are to be built with pretrained weights."""
        return self.pretrained and not self.whole

    @property
    def part_overlay(self) -> dict[str, Any] | None:
        return None if self.whole else self.overlay

    def build(
        self,
        model: TimmModel,
        variant: str,
        cfg: dict[str, Any],
        cache_dir: Any = None,
        filter_fn: Callable[[dict[str, Any], TimmModel], dict[str, Any]] | None = None,
        **features: Any,
    ) -> Any:
        """``model`` as timm's builder leaves it: configured, loaded if the weights are its own, for features if asked.

        Args:
            model: The whole model, its networks inside.
            variant: Its registered name, which with its arguments makes it again.
            cfg: Its pretrained configuration, where none was given.
            cache_dir: Of downloads.
            filter_fn: timm's ``pretrained_filter_fn``: the weights as read, to the model's own layout.
            features: Of ``FEATURE_ARGUMENTS`` those that were given.
        """
        # Where the configuration fixes a size, timm records that one, whatever size the networks inside were built for.
        built_for = model_traits(model).get("img_size")
        size = {} if built_for is None else {"img_size": built_for}
        model = build_model_with_cfg(
            lambda **_: model,
            variant,
            self.pretrained and self.whole,
            **size,
            pretrained_cfg={**cfg, "architecture": variant, **self.given, **(self.overlay if self.whole else {})},
            pretrained_filter_fn=filter_fn,
            feature_cfg=dict(out_indices=tuple(range(len(model.feature_info))), feature_cls="getter"),
            cache_dir=cache_dir,
            in_chans=model.in_chans,
            **features,
        )
        self.forget_weights(model)
        return model

    def forget_weights(self, model: TimmModel) -> None:
        """The weights are in the model; its configuration need not hold them a second time."""
        if model.pretrained_cfg.pop("state_dict", None) is not None and self.file:
            model.pretrained_cfg["file"] = str(self.file)


def build_with_checkpoint(model_cls: Any, variant: str, pretrained: bool, **kwargs: Any) -> Any:
    """timm's ``build_model_with_cfg``, with pretrained weights fetched and read by this module.

    The model is of ``model_cls``, or with ``features_only`` what timm puts around it. Share links get a file name, and
    damaged files an error that says so, and so do switches that are neither on nor off. Everything else is timm's.
    """
    for taker in (model_cls, kwargs.get("model_cfg")):
        if taker is not None:
            check_switches(taker if isinstance(taker, type) else type(taker), kwargs)
    path = None
    if pretrained:
        overlay = dict(kwargs.get("pretrained_cfg_overlay") or {})
        cfg = resolve_pretrained_cfg(variant, kwargs.get("pretrained_cfg"), overlay)
        source, location = resolve_pretrained_source(cfg.to_dict())
        if source == "url":
            filename = ".".join(part for part in (variant, cfg.tag) if part) + ".pth"
            path = fetch_checkpoint(location, filename, cache_dir=kwargs.get("cache_dir"))
        elif source == "file":
            path = Path(location)
        if path is not None and not cfg.custom_load:
            kwargs["pretrained_cfg_overlay"] = {**overlay, "state_dict": read_checkpoint(path)}
    model = build_model_with_cfg(model_cls, variant, pretrained, **kwargs)
    if path is not None:
        # The weights are in the model; its configuration need not hold them a second time.
        for module in (model, getattr(model, "model", None)):
            card = getattr(module, "pretrained_cfg", None)
            if isinstance(card, dict):
                card.pop("state_dict", None)
                card["file"] = str(path)
    return model
