"""Every writer killed at thirty points, and on a full disk: nothing is lost, and a resumed run ends the same.

What the writers are given is small; test_crash_training.py kills whole training runs.
"""

import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from killing import count_lines, in_child, points
from small_models import ConvExits
from small_tables import costs_of, realistic_table
from torch.utils.data import DataLoader, TensorDataset

import exit_plugins
from exit_plugins import ExitPolicy, ExitTable, collect_exits, solve_thresholds
from exit_plugins.exits.export.manifest import read_manifest, write_manifest, written_whole

SHORT = {"adapters": 4, "save_for_hf": 4}  # slow ones; the others always have all thirty
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@dataclass(frozen=True)
class Writer:
    """``write(folder, version)`` writes version 0 or 1; ``read(folder)`` says which one stands there whole, or None."""

    write: Callable[[Path, int], Any]
    read: Callable[[Path], int | None]


def _policy(version: int) -> ExitPolicy:
    return solve_thresholds(realistic_table(3, 400, seed=version), costs_of(3), budget=4.0, method="shared")


def _write_export(folder: Path, version: int) -> None:
    with written_whole(folder / "out") as part:
        names = [f"segment_{index}.onnx" for index in range(3)]
        for name in names:
            (part / name).write_bytes(bytes([version]) * 3000)
        write_manifest(part, _policy(version), names, "onnx", (3, 16, 16), ConvExits())


def _read_export(folder: Path) -> int:
    manifest = read_manifest(folder / "out")
    return (folder / "out" / manifest["segments"][2]).read_bytes()[0]


def _model() -> ConvExits:
    torch.manual_seed(0)
    return ConvExits().eval()


def _collect(folder: Path, version: int) -> ExitTable:
    generator = torch.Generator().manual_seed(version)
    images, target = torch.randn(24, 3, 16, 16, generator=generator), torch.arange(24) % 5
    loader = DataLoader(TensorDataset(images, target), 4)
    return collect_exits(_model(), loader, part_file=folder / f"{version}.part", save_as=folder / "t.npz")


def _version_of(digests: list[str], path: Path) -> int:
    return digests.index(ExitTable.load(path).digest())


def _save_dyn(folder: Path, version: int) -> None:
    from exit_plugins import DynConfig, RepAdapterConfig, get_dyn_peft_model

    config = RepAdapterConfig(target_modules=["qkv"], r=2, groups=1)
    dyn = get_dyn_peft_model(_vit(), config, DynConfig(exit_interval=1, num_classes=3))
    with torch.no_grad():
        for parameter in dyn.exit_heads.parameters():
            parameter.fill_(version)
    dyn.save_pretrained(folder / "adapter")


def _read_dyn(folder: Path) -> int:
    dyn = exit_plugins.DynPeftModel.from_pretrained(_vit(), folder / "adapter")
    (found,) = {float(parameter.flatten()[0]) for parameter in dyn.exit_heads.parameters()}
    return int(found)


def _vit() -> torch.nn.Module:
    import timm

    torch.manual_seed(0)
    return timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=12, depth=2, num_heads=2, num_classes=3)


def _save_hf(folder: Path, version: int) -> None:
    import timm

    torch.manual_seed(version)
    exit_plugins.timm.save_for_hf(timm.create_model("msdnet_test", num_classes=3 + version), folder / "hub")


def _read_hf(folder: Path) -> int:
    import timm

    return timm.create_model(f"local-dir:{folder / 'hub'}", pretrained=True).num_classes - 3


TABLES = [realistic_table(3, 400, seed=version) for version in (0, 1)]
WRITERS = {
    "policy": Writer(
        lambda folder, version: _policy(version).save(folder / "p.json"),
        lambda folder: [_policy(v).source["sha256"] for v in (0, 1)].index(
            ExitPolicy.load(folder / "p.json").source["sha256"]
        ),
    ),
    "table": Writer(
        lambda folder, version: TABLES[version].save(folder / "t.npz"),
        lambda folder: _version_of([table.digest() for table in TABLES], folder / "t.npz"),
    ),
    "export": Writer(_write_export, _read_export),
    "adapters": Writer(_save_dyn, _read_dyn),
    "save_for_hf": Writer(_save_hf, _read_hf),
}


def left_over(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob(".*")]


@pytest.mark.parametrize("name", WRITERS)
def test_killed_anywhere_the_old_or_the_new_stands_there_whole(name, tmp_path):
    if name == "adapters":
        pytest.importorskip("peft.utils")
    writer = WRITERS[name]
    writer.write(tmp_path, 0)
    total = count_lines(lambda: writer.write(tmp_path, 1))
    assert writer.read(tmp_path) == 1
    for stop in points(total, SHORT.get(name, 30)):
        writer.write(tmp_path, 0)
        assert in_child(lambda stop=stop: count_lines(lambda: writer.write(tmp_path, 1), stop)) == -signal.SIGKILL
        assert writer.read(tmp_path) in (0, 1), stop
    writer.write(tmp_path, 1)
    assert writer.read(tmp_path) == 1 and not left_over(tmp_path)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("size", [0, 1500])
def test_on_a_full_disk_the_old_stays(name, size, tmp_path):
    if name == "adapters":
        pytest.importorskip("peft.utils")
    writer = WRITERS[name]
    writer.write(tmp_path, 0)

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        writer.write(tmp_path, 1)

    code = in_child(full)
    assert code in (1, 2) or (code == 0 and size)  # what is smaller than the limit fits
    assert writer.read(tmp_path) == int(code == 0) and not left_over(tmp_path)


def test_a_killed_collection_goes_on_and_ends_the_same(tmp_path):
    expected = _collect(tmp_path, 1).digest()
    total = count_lines(lambda: _collect(tmp_path, 1))
    for stop in points(total, 30):
        (tmp_path / "t.npz").unlink()
        assert in_child(lambda stop=stop: count_lines(lambda: _collect(tmp_path, 1), stop)) == -signal.SIGKILL
        assert _collect(tmp_path, 1).digest() == expected == ExitTable.load(tmp_path / "t.npz").digest()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["t.npz"]


@pytest.mark.filterwarnings("ignore:.*cut off in its header")  # a disk too full for it: it starts anew, and says so
@pytest.mark.parametrize("size", [0, 100, 1500, 4000])
def test_a_collection_on_a_full_disk_keeps_what_is_done(tmp_path, size):
    _collect(tmp_path, 0)
    old = ExitTable.load(tmp_path / "t.npz").digest()

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        _collect(tmp_path, 1)

    assert in_child(full) == 1
    assert ExitTable.load(tmp_path / "t.npz").digest() == old
    assert _collect(tmp_path, 1).digest() == ExitTable.load(tmp_path / "t.npz").digest() != old
