"""Every kind of file a user hands over: how a good one is made, read, and saved again."""

import contextlib
import functools
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from small_models import ConvExits
from small_tables import costs_of, realistic_table
from torch.utils.data import DataLoader, TensorDataset

from exit_plugins import ExitPolicy, ExitTable, collect_exits, solve_thresholds
from exit_plugins.exits.export.manifest import read_manifest, write_manifest
from exit_plugins.timm._checkpoints import read_checkpoint


@dataclass(frozen=True)
class Format:
    """``make(path)`` writes a good one, ``load(path)`` reads it, ``save(value, path)`` writes what was read.

    ``right(value)``: what is read of a damaged file, if it is read at all, is what was in the good one.
    """

    make: Callable[[Path], None]
    load: Callable[[Path], Any]
    save: Callable[[Any, Path], None]
    right: Callable[[Any], bool] = lambda value: True


def model() -> ConvExits:
    torch.manual_seed(0)
    return ConvExits().eval()


def data() -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(12, 3, 16, 16, generator=generator)
    return DataLoader(TensorDataset(images, torch.randint(5, (12,), generator=generator)), 4)


def policy() -> ExitPolicy:
    return solve_thresholds(collect_exits(model(), data()), costs_of(3), budget=4.0, method="shared")


class _Stopped(Exception):
    pass


def _batches(count: int):
    for index, batch in enumerate(data()):
        if index == count:
            raise _Stopped
        yield batch


def _make_part(path: Path) -> None:
    with contextlib.suppress(_Stopped):
        collect_exits(model(), _batches(2), part_file=path)


def _load_part(path: Path) -> ExitTable:
    return collect_exits(model(), _batches(3), part_file=path)


@functools.cache
def _clean(count: int) -> str:
    return collect_exits(model(), _batches(count)).digest()


def _make_pth(path: Path) -> None:
    torch.save({"state_dict": model().state_dict(), "epoch": 3}, path)


def _make_safetensors(path: Path) -> None:
    save_file(model().state_dict(), path)


def _save_weights(value: dict[str, Any], path: Path) -> None:
    torch.save(value, io.BytesIO())


def _make_export(path: Path) -> None:
    """As ``export_segments`` leaves a folder, with networks that are only bytes: their digests come before them."""
    path.mkdir()
    names = [f"segment_{index}.onnx" for index in range(3)]
    for index, name in enumerate(names):
        (path / name).write_bytes(bytes(range(40 * index, 40 * index + 40)))
    write_manifest(path, policy(), names, "onnx", (3, 16, 16), model())


def _load_export(path: Path) -> Any:
    return read_manifest(path), ExitPolicy.load(path / "policy.json")


def _save_export(value: Any, path: Path) -> None:
    manifest, loaded = value
    path.mkdir()
    for name in manifest["segments"]:
        (path / name).write_bytes(b"x")
    write_manifest(path, loaded, manifest["segments"], manifest["runtime"], manifest["input_size"], model())


def _make_adapter(path: Path) -> None:
    _dyn().save_pretrained(path)


def _load_adapter(path: Path) -> Any:
    from exit_plugins import DynPeftModel

    return DynPeftModel.from_pretrained(_backbone(), path)


def _dyn() -> Any:
    from exit_plugins import DynConfig, RepAdapterConfig, get_dyn_peft_model

    config = RepAdapterConfig(target_modules=["qkv"], r=2, groups=1)
    return get_dyn_peft_model(_backbone(), config, DynConfig(exit_interval=1, num_classes=3))


def _backbone() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=16, embed_dim=12, depth=2, num_heads=2, num_classes=3
    )


def _is_the_table(table: ExitTable) -> bool:
    return table.digest() == realistic_table(3, 20).digest()


FORMATS = {
    "policy": Format(lambda path: policy().save(path), ExitPolicy.load, ExitPolicy.save),
    "table": Format(lambda path: realistic_table(3, 20).save(path), ExitTable.load, ExitTable.save, _is_the_table),
    "part file": Format(_make_part, _load_part, ExitTable.save, lambda table: table.digest() == _clean(3)),
    ".pth": Format(_make_pth, read_checkpoint, _save_weights),
    "safetensors": Format(_make_safetensors, read_checkpoint, _save_weights),
    "adapter folder": Format(_make_adapter, _load_adapter, lambda value, path: value.save_pretrained(path)),
    "export folder": Format(_make_export, _load_export, _save_export),
}
SUFFIX = {"policy": ".json", "table": ".npz", "part file": ".part", ".pth": ".pth", "safetensors": ".safetensors"}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
