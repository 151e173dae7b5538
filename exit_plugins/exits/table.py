"""What every exit said of every sample: the compact record from which thresholds, curves and certificates are made."""

import hashlib
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from tqdm.auto import tqdm

from .confidence import CONFIDENCES, confidence, running_ensemble
from .digests import describe_model, sample_digests, weights_digest
from .files import atomic_write
from .protocol import check_multi_exit, exit_device

__all__ = ["ExitTable", "collect_exits"]

_FORMAT = "exit_plugins.table/1"


def _array(value, dtype) -> np.ndarray:
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    return np.ascontiguousarray(np.asarray(value), dtype=dtype)


@dataclass(frozen=True, eq=False)
class ExitTable:
    """Confidence, prediction and target of N samples at K exits.

    Attributes:
        confidence: (K, N) float32. NaN is allowed and means "never sure enough to leave early".
        prediction: (K, N) int64, the class each exit chose.
        target: (N,) int64.
        logits: (K, N, C) or None; needed to fit temperatures or to change the confidence measure afterwards.
        measure: name of the confidence measure.
        temperatures: (K,) the logits were divided by before the confidence was taken.
        sample: (N,) uint64 or None, a digest of each sample's input as the model saw it: the same image under the same
            preprocessing has the same digest in every table.
        about: where the table comes from, in plain JSON values, or None: ``model`` (``describe_model``), the digest
            of its ``weights``, ``input_size`` (of one sample), and ``transform``, ``data``, ``split``, ``classes``
            (names, by index) as far as they are known.

    Numpy arrays, torch tensors and lists are all accepted and stored as numpy. ValueError if the shapes disagree.
    """

    confidence: np.ndarray
    prediction: np.ndarray
    target: np.ndarray
    logits: np.ndarray | None = None
    measure: str = "max_softmax"
    temperatures: tuple[float, ...] = field(default=())
    sample: np.ndarray | None = None
    about: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        set_(self, "confidence", _array(self.confidence, np.float32))
        set_(self, "prediction", _array(self.prediction, np.int64))
        set_(self, "target", _array(self.target, np.int64))
        if self.confidence.ndim != 2 or self.prediction.shape != self.confidence.shape:
            raise ValueError(
                "an ExitTable takes confidence and prediction of one shape (exits, samples), got "
                f"{self.confidence.shape} and {self.prediction.shape}."
            )
        if self.target.shape != self.confidence.shape[1:]:
            raise ValueError(f"target {self.target.shape} does not fit {self.confidence.shape[1]} samples.")
        if self.confidence.shape[0] == 0:
            raise ValueError("an ExitTable needs at least one exit.")
        if self.logits is not None:
            logits = self.logits.detach().cpu().numpy() if isinstance(self.logits, Tensor) else np.asarray(self.logits)
            if logits.ndim != 3 or logits.shape[:2] != self.confidence.shape:
                raise ValueError(f"logits {logits.shape} do not fit confidence {self.confidence.shape}.")
            set_(self, "logits", logits)
        if self.sample is not None:
            set_(self, "sample", _array(self.sample, np.uint64))
            if self.sample.shape != self.target.shape:
                raise ValueError(f"sample digests {self.sample.shape} do not fit {self.num_samples} samples.")
        if self.about is not None:
            _check_about(self.about, self.num_exits)
        set_(self, "temperatures", tuple(float(t) for t in self.temperatures) or (1.0,) * self.num_exits)
        if len(self.temperatures) != self.num_exits:
            raise ValueError(f"{len(self.temperatures)} temperatures do not fit {self.num_exits} exits.")

    @property
    def num_exits(self) -> int:
        return self.confidence.shape[0]

    @property
    def num_samples(self) -> int:
        return self.confidence.shape[1]

    @property
    def correct(self) -> np.ndarray:
        """(K, N) bool."""
        return self.prediction == self.target

    def __len__(self) -> int:
        return self.num_samples

    def digest(self) -> str:
        """SHA-256 of confidences, predictions, targets and sample digests, whatever file they came in."""
        hasher = hashlib.sha256(repr(self.confidence.shape).encode())
        for array in (self.confidence, self.prediction, self.target, self.sample):
            if array is not None:
                hasher.update(array.tobytes())
        return hasher.hexdigest()

    def subset(self, index: np.ndarray) -> "ExitTable":
        """The table of the samples in ``index`` (integers or a boolean mask over N)."""
        return replace(
            self,
            confidence=self.confidence[:, index],
            prediction=self.prediction[:, index],
            target=self.target[index],
            logits=None if self.logits is None else self.logits[:, index],
            sample=None if self.sample is None else self.sample[index],
        )

    def split(self, share: float = 0.5, seed: int = 0) -> tuple["ExitTable", "ExitTable"]:
        """Two disjoint random parts, the first with ``share`` of the samples."""
        if not 0.0 < share < 1.0:
            raise ValueError(f"share must lie strictly between 0 and 1, got {share}.")
        order = np.random.default_rng(seed).permutation(self.num_samples)
        cut = round(share * self.num_samples)
        return self.subset(np.sort(order[:cut])), self.subset(np.sort(order[cut:]))

    @classmethod
    def from_logits(
        cls,
        logits: np.ndarray | Tensor | Iterable[Tensor],
        target: np.ndarray | Tensor,
        measure: str = "max_softmax",
        temperatures: Iterable[float] | None = None,
        keep_logits: bool = True,
    ) -> "ExitTable":
        """Table of saved logits (K, N, C), or K arrays (N, C), whoever made them."""
        parts = [torch.as_tensor(z) for z in logits]
        if any(part.ndim != 2 for part in parts):
            raise ValueError(f"expected K arrays of logits (N, C), got shapes {[tuple(p.shape) for p in parts]}.")
        temperatures = tuple(temperatures or (1.0,) * len(parts))
        if len(temperatures) != len(parts):
            raise ValueError(f"{len(temperatures)} temperatures do not fit {len(parts)} exits.")
        return cls(
            torch.stack([confidence(z, measure, t).float() for z, t in zip(parts, temperatures, strict=True)]),
            torch.stack([z.argmax(-1) for z in parts]),
            target,
            torch.stack([z.float() for z in parts]) if keep_logits else None,
            measure,
            temperatures,
        )

    def with_confidence(self, measure: str | None = None, temperatures: Iterable[float] | None = None) -> "ExitTable":
        """The same samples under another measure or other temperatures; needs ``logits``."""
        if self.logits is None:
            raise ValueError("this table holds no logits; collect it with keep_logits=True.")
        temperatures = self.temperatures if temperatures is None else temperatures
        table = ExitTable.from_logits(self.logits, self.target, measure or self.measure, temperatures)
        return replace(table, sample=self.sample, about=self.about)

    def running_ensemble(self, costs: Sequence[float] | np.ndarray) -> "ExitTable":
        """The table of ``exits.confidence.running_ensemble`` over the exits, for anytime use; needs ``logits``."""
        if self.logits is None:
            raise ValueError("this table holds no logits; collect it with keep_logits=True.")
        mixed = running_ensemble(self.logits, costs, self.temperatures)
        return replace(ExitTable.from_logits(mixed, self.target, self.measure), sample=self.sample, about=self.about)

    def save(self, path: str | os.PathLike) -> None:
        """Write a compressed ``.npz``, whole or not at all."""
        arrays = {"confidence": self.confidence, "prediction": self.prediction, "target": self.target}
        arrays |= {name: getattr(self, name) for name in ("logits", "sample") if getattr(self, name) is not None}
        with atomic_write(path, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                measure=np.array(self.measure),
                temperatures=np.array(self.temperatures),
                about=np.array(json.dumps(self.about, allow_nan=False)),
                **arrays,
            )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExitTable":
        """Read what ``save`` wrote; ValueError if the file is something else or damaged."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"no exit table at {path}; write one with ExitTable.save.")
        try:
            with np.load(path, allow_pickle=False) as file:
                if str(file["format"]) != _FORMAT:
                    raise ValueError(f"format is {file['format']}, expected {_FORMAT}")
                return cls(
                    file["confidence"],
                    file["prediction"],
                    file["target"],
                    file.get("logits"),
                    str(file["measure"]),
                    tuple(file["temperatures"].tolist()),
                    file.get("sample"),
                    json.loads(str(file["about"])) if "about" in file else None,
                )
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable exit table ({error}); collect it again.") from error


def _check_about(about: Any, num_exits: int) -> None:
    if not isinstance(about, dict):
        raise ValueError(f"about is a mapping of plain values, got {type(about).__name__}.")
    try:
        json.dumps(about, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"about holds only what JSON can say: {error}.") from error
    described = about.get("model")
    if described is not None and not isinstance(described, dict):
        raise ValueError(f"about['model'] is what describe_model says, got {type(described).__name__}.")
    if (described or {}).get("num_exits", num_exits) != num_exits:
        raise ValueError(f"a table of {num_exits} exits is not of a model with {described['num_exits']}.")


# ---------------------------------------------------------------------------------------------------------------------
# Collecting
# ---------------------------------------------------------------------------------------------------------------------


def collect_exits(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | None = None,
    measure: str = "max_softmax",
    temperatures: Iterable[float] | None = None,
    keep_logits: bool = False,
    progress: bool | None = None,
    part_file: str | os.PathLike | None = None,
    about: Mapping[str, Any] | None = None,
) -> ExitTable:
    """Run every exit over a labelled loader and record what each says.

    In several processes (torchrun, ``accelerate launch``; the default process group must be initialised) every process
    calls it with the same loader, not sharded yet: process r takes batches r, r + world, ... Batches are those of a
    single process, so the numbers are too, and every process gets the whole table.

    Args:
        model: a multi-exit module; it is put in evaluation mode for the run and back afterwards.
        loader: yields (images (B, C, H, W), target (B,)) batches. Of a ``DataLoader`` only the batches needed are read.
        device: where to run; default where the model is. The model is moved there.
        measure: confidence measure, see ``exits.confidence``.
        temperatures: (K,) to divide the logits by.
        keep_logits: store the logits too (K * N * C float32).
        progress: show a bar on stderr; default only on a terminal.
        part_file: batches are appended here as they are done, and a run that was interrupted goes on from there. It is
            removed when the table is complete. In several processes each has its own, with the rank in its name.
        about: what the caller knows of the data: ``transform``, ``data``, ``split``, ``classes``. The table's ``about``
            keeps it beside the model, its weights' digest and the input size.

    Returns:
        ExitTable over all N samples in the loader's order, each with the digest of its input.

    Raises:
        ValueError: the loader is empty, is sharded already, or its batches do not hold images and class indices; or
            the part file is of another model, loader or setting.
    """
    check_multi_exit(model)
    if measure not in CONFIDENCES:
        raise ValueError(f"unknown confidence {measure!r}; choose one of {', '.join(CONFIDENCES)}.")
    temperatures = tuple(temperatures or (1.0,) * model.num_exits)
    if len(temperatures) != model.num_exits:
        raise ValueError(f"{len(temperatures)} temperatures do not fit {model.num_exits} exits.")
    device = torch.device(device) if device is not None else exit_device(model)
    rank, world = _process()
    _check_not_sharded(loader, world)
    part = None
    if part_file is not None:
        if isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError("a shuffled loader cannot be resumed; use shuffle=False with part_file.")
        path = Path(part_file) if world == 1 else Path(f"{part_file}.rank{rank}of{world}")
        part = _PartFile(path, _fingerprint(model, loader, measure, temperatures, keep_logits))
    records = part.records if part is not None else []
    training = model.training
    model.to(device).eval()
    total = _length(loader)
    mine = None if total is None else len(range(rank, total, world))
    bar = tqdm(
        desc="exits",
        unit="batch",
        total=mine,
        initial=len(records),
        disable=True if rank else (None if progress is None else not progress),
    )
    try:
        with torch.inference_mode():
            for batch in _own_batches(loader, rank, world, skip=len(records)):
                records.append(_ask(model, batch, device, measure, temperatures, keep_logits))
                if part is not None:
                    part.append(records[-1])
                bar.update()
    finally:
        bar.close()
        model.train(training)
        if part is not None:
            part.close()
    records = _gather(records, rank, world)
    if not records:
        raise ValueError("the loader yielded no batch; an exit table needs at least one sample.")
    confidences, predictions, targets, samples, shapes, logits = zip(*records, strict=True)
    sizes = {tuple(shape.tolist()) for shape in shapes}
    table = ExitTable(
        np.concatenate(confidences, 1),
        np.concatenate(predictions, 1),
        np.concatenate(targets),
        np.concatenate(logits, 1) if keep_logits else None,
        measure,
        temperatures,
        np.concatenate(samples),
        {
            "model": describe_model(model),
            "weights": weights_digest(model),
            "input_size": list(sizes.pop()) if len(sizes) == 1 else None,
            "transform": None,
            "data": None,
            "split": None,
            "classes": None,
            **(about or {}),
        },
    )
    if part is not None:
        part.path.unlink(missing_ok=True)
    return table


# confidence, prediction, target, sample, shape of one sample, logits
_Record = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]


def _ask(model, batch, device, measure, temperatures, keep_logits) -> _Record:
    images, target = _images_and_target(batch)
    outputs = model.forward_exits(images.to(device, non_blocking=True))
    sure = torch.stack([confidence(z, measure, t).float() for z, t in zip(outputs, temperatures, strict=True)])
    return (
        sure.cpu().numpy(),
        torch.stack([z.argmax(-1) for z in outputs]).cpu().numpy(),
        target.cpu().numpy(),
        sample_digests(images),
        np.array(images.shape[1:]),
        torch.stack([z.float() for z in outputs]).cpu().numpy() if keep_logits else None,
    )


def _images_and_target(batch) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"expected batches of (images, target), got {type(batch).__name__}.")
    images, target = batch[0], batch[1]
    if not isinstance(images, Tensor) or not isinstance(target, Tensor) or target.ndim != 1:
        raise ValueError("expected batches of an image tensor (B, C, H, W) and class indices (B,).")
    if len(images) != len(target):
        raise ValueError(f"a batch holds {len(images)} images and {len(target)} targets.")
    return images, target


def _length(loader: Iterable) -> int | None:
    """Number of batches, None for a loader that streams."""
    try:
        return len(loader)
    except TypeError:
        return None


# Several processes


def _process() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _check_not_sharded(loader: Iterable, world: int) -> None:
    inner = getattr(loader, "loader", loader)  # timm's PrefetchLoader keeps the DataLoader there
    sampler = getattr(inner, "sampler", None)
    replicas = getattr(sampler, "num_replicas", 1)
    if type(inner).__module__.startswith("accelerate") and world > 1:
        replicas = world
    if replicas and replicas > 1:
        raise ValueError(
            "this loader is sharded already (a distributed sampler, or prepared by accelerate), which drops or repeats "
            "samples; pass the loader a single process would use: collect_exits shares out its batches itself."
        )


def _own_batches(loader: Iterable, rank: int, world: int, skip: int) -> Iterator:
    """This process's batches, from the ``skip``-th on."""
    streams = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if type(loader) is DataLoader and loader.batch_sampler is not None and not streams:
        indices = list(loader.batch_sampler)
        if world > 1:
            # A shuffled loader draws another order in every process: the first one's counts.
            shared = [indices]
            dist.broadcast_object_list(shared, src=0)
            indices = shared[0]
        yield from DataLoader(
            loader.dataset,
            batch_sampler=indices[rank::world][skip:],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
        )
        return
    yield from islice(loader, rank + skip * world, None, world)


def _gather(records: list[_Record], rank: int, world: int) -> list[_Record]:
    if world == 1:
        return records
    everyone: list[list[_Record]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, records)
    merged = [record for turn in zip_longest(*everyone) for record in turn if record is not None]
    return merged


# The part file


def _fingerprint(model, loader, measure, temperatures, keep_logits) -> dict:
    """What must be the same for the batches in a part file to belong to this run."""
    hasher = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        # Sums rather than bytes: quick on any device, and another checkpoint has other sums.
        hasher.update(f"{name} {tuple(tensor.shape)} {tensor.double().sum().item()!r}".encode())
    return {
        "format": "exit_plugins.part/1",
        "model": hasher.hexdigest(),
        "batches": _length(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "measure": measure,
        "temperatures": list(temperatures),
        "keep_logits": keep_logits,
    }


class _PartFile:
    """Records appended one by one, each behind its length and checksum; a torn last one is cut off on opening."""

    def __init__(self, path: Path, header: dict) -> None:
        self.path = path
        self.records: list[_Record] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        self.file = path.open("r+b")
        try:
            first = self._read()
            if first is not None:
                self._check(first, header)
                while (payload := self._read()) is not None:
                    self.records.append(_unpack(payload))
        except BaseException:
            self.file.close()
            raise
        self.file.truncate()
        if first is None:
            self._write(json.dumps(header).encode())

    def _check(self, payload: bytes, header: dict) -> None:
        try:
            found = json.loads(payload)
        except ValueError:
            found = {}
        different = [key for key in header if found.get(key) != header[key]]
        if different:
            raise ValueError(
                f"the part file {self.path} is of another run (its {', '.join(different)} differs); delete it to start "
                "afresh, or name another."
            )

    def _read(self) -> bytes | None:
        """The next whole record, or None, standing where it would begin."""
        start = self.file.tell()
        head = self.file.read(12)
        if len(head) == 12:
            length, checksum = struct.unpack("<QI", head)
            whole = start + 12 + length <= os.fstat(self.file.fileno()).st_size
            payload = self.file.read(length) if whole else b""
            if whole and zlib.crc32(payload) == checksum:
                return payload
        if start == 0 and head:
            raise ValueError(f"{self.path} is not a part file of collect_exits; delete it or name another.")
        self.file.seek(start)
        return None

    def _write(self, payload: bytes) -> None:
        self.file.write(struct.pack("<QI", len(payload), zlib.crc32(payload)) + payload)
        self.file.flush()

    def append(self, record: _Record) -> None:
        buffer = io.BytesIO()
        for array in record:
            if array is not None:
                np.save(buffer, array, allow_pickle=False)
        self._write(buffer.getvalue())

    def close(self) -> None:
        self.file.close()


def _unpack(payload: bytes) -> _Record:
    buffer, arrays = io.BytesIO(payload), []
    while buffer.tell() < len(payload):
        arrays.append(np.load(buffer, allow_pickle=False))
    return (*arrays, None) if len(arrays) == 5 else tuple(arrays)
