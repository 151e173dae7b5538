"""Collecting an exit table: every exit asked about every sample, resumably, in one process or several."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler
from tqdm.auto import tqdm

from .confidence import check_measure, check_temperatures, confidence
from .digests import describe_checked, sample_digests, weights_digest
from .files import check_apart, check_target
from .parts import PartFile, Record
from .protocol import (
    AnyModel,
    MultiExitModule,
    check_multi_exit,
    evaluating,
    exit_device,
    forward_exits,
    in_precision_of,
)
from .table import ExitTable, class_indices

__all__ = ["collect_exits"]


def collect_exits(
    model: AnyModel,
    loader: Iterable[Any],
    device: torch.device | str | None = None,
    measure: str = "max_softmax",
    temperatures: Iterable[float] | None = None,
    keep_logits: bool = False,
    progress: bool | None = None,
    part_file: str | os.PathLike[str] | None = None,
    about: Mapping[str, Any] | None = None,
    save_as: str | os.PathLike[str] | None = None,
    finish: Callable[[ExitTable], ExitTable] | None = None,
) -> ExitTable:
    """Run every exit over a labelled loader and record what each says.

    In several processes (torchrun, ``accelerate launch``; the default process group must be initialised) every process
    calls it with the same loader, not sharded yet: process r takes batches r, r + world, ... Batches are those of a
    single process, so the numbers are too, and every process gets the whole table.

    Args:
        model: a multi-exit module; it is put in evaluation mode for the run, and every module in it back afterwards.
        loader: yields (images (B, C, H, W), target (B,)) batches: floating point numbers, which are taken to the
            precision of the model's weights, and class indices. Of a ``DataLoader`` only the batches needed are read.
        device: where to run; default where the model is. The model is moved there.
        measure: confidence measure, see ``exits.confidence``.
        temperatures: (K,) to divide the logits by.
        keep_logits: store the logits too (K * N * C float32).
        progress: show a bar on stderr; default only on a terminal.
        part_file: batches are appended here as they are done, and a run that was interrupted goes on from there. It is
            removed when the table is complete and, with ``save_as``, written. In several processes each has its own,
            with the rank in its name.
        about: what the caller knows of the data: ``transform``, ``data``, ``split``, ``classes``. The table's ``about``
            keeps it beside the model, its weights' digest and the input size.
        save_as: write the table here; that it can be written there is checked before the run. In several processes the
            first one writes.
        finish: what is to be done to the whole table before it is written, such as leaving samples out. If it raises,
            the part file stays. Only with it may targets be negative, as marks of samples that it leaves out.

    Returns:
        ExitTable over all N samples in the loader's order, each with the digest of its input.

    Raises:
        ValueError: the loader is empty, is sharded already, or its batches do not hold images and indices of the
            model's classes; or the part file is of other weights, data, input size or settings, or the file of
            ``save_as``. Of the data, its length and the inputs and labels of the first and the last batch in the part
            file are compared.
        OSError: ``save_as`` or ``part_file`` cannot be written. No batch that is done is lost: the part file stays.
    """
    model = check_multi_exit(model)
    check_measure(measure)
    temperatures = check_temperatures(temperatures, model.num_exits)
    device = torch.device(device) if device is not None else exit_device(model)
    rank, world = _process()
    _check_not_sharded(loader, world)
    known = {"transform": None, "data": None, "split": None, "classes": None, **(about or {})}
    known = {"model": describe_checked(model), "weights": weights_digest(model), **known}
    ask = _Asker(model, device, measure, temperatures, keep_logits, marked=finish is not None)
    path = None if part_file is None else Path(part_file if world == 1 else f"{part_file}.rank{rank}of{world}")
    if save_as is not None and path is not None:
        check_apart(save_as, [path])  # which goes once the table is there
    if save_as is not None and rank == 0:
        check_target(save_as, _bytes_at_least(model, loader, keep_logits))
    part = None
    if path is not None:
        if isinstance(getattr(loader, "sampler", None), RandomSampler):
            raise ValueError("a shuffled loader cannot be resumed; use shuffle=False with part_file.")
        part = PartFile(path, _run_header(loader, ask, known), model.num_exits, keep_logits)
    records = part.records if part is not None else []
    done = len(records)
    model.to(device)
    total = _length(loader)
    mine = None if total is None else len(range(rank, total, world))
    bar = tqdm(
        desc="exits",
        unit="batch",
        total=mine,
        initial=done,
        disable=True if rank else (None if progress is None else not progress),
    )
    try:
        with evaluating(model), torch.inference_mode():
            # The first and the last of the batches that are done are read again: are these the same samples?
            for index, batch in _own_batches(loader, rank, world, done):
                if part is not None and index < done:
                    part.check_batch(index, ask.inputs(batch))
                    continue
                records.append(ask(batch))
                if part is not None:
                    part.append(records[-1])
                bar.update()
    finally:
        bar.close()
        if part is not None:
            part.close()
    records = _gather(records, rank, world)
    if not records:
        raise ValueError("the loader yielded no batch; an exit table needs at least one sample.")
    sizes = {tuple(record.shape.tolist()) for record in records}
    table = ExitTable(
        np.concatenate([record.confidence for record in records], 1),
        np.concatenate([record.prediction for record in records], 1),
        np.concatenate([record.target for record in records]),
        np.concatenate([record.logits for record in records], 1) if keep_logits else None,
        measure,
        temperatures,
        np.concatenate([record.sample for record in records]),
        {**known, "input_size": list(sizes.pop()) if len(sizes) == 1 else None},
    )
    if finish is not None:
        table = finish(table)
        class_indices(table.target)
    if save_as is not None:
        _save_once(table, save_as, rank, world)
    if part is not None:
        part.remove()
    return table


class _Asker:
    """Asks every exit of a model about a batch."""

    def __init__(
        self,
        model: MultiExitModule,
        device: torch.device,
        measure: str,
        temperatures: tuple[float, ...],
        keep_logits: bool,
        marked: bool,
    ) -> None:
        self.model, self.device, self.marked = model, device, marked
        self.measure, self.temperatures, self.keep_logits = measure, temperatures, keep_logits

    def __call__(self, batch: Any) -> Record:
        images, target = _images_and_target(batch)
        known = self.inputs(batch)
        images = in_precision_of(self.model, images.to(self.device, non_blocking=True))
        outputs = forward_exits(self.model, images)
        class_indices(target, outputs[-1].shape[-1], self.marked)
        sure = [confidence(z, self.measure, t).float() for z, t in zip(outputs, self.temperatures, strict=True)]
        return known._replace(
            confidence=torch.stack(sure).cpu().numpy(),
            prediction=torch.stack([z.argmax(-1) for z in outputs]).cpu().numpy(),
            logits=torch.stack([z.float() for z in outputs]).cpu().numpy() if self.keep_logits else None,
        )

    def inputs(self, batch: Any) -> Record:
        """What identifies the samples of a batch; nothing is run."""
        images, target = _images_and_target(batch)
        nothing = np.empty((self.model.num_exits, 0))
        return Record(
            nothing,
            nothing,
            class_indices(target, marked=True),  # which there are, only the exits' answers tell
            sample_digests(images),
            np.array(images.shape[1:]),
        )


def _run_header(loader: Iterable[Any], ask: _Asker, known: dict[str, Any]) -> dict[str, Any]:
    """What must be the same for the batches in a part file to belong to this run, in plain JSON values."""
    header = {
        **known,
        "batches": _length(loader),
        "batch_size": getattr(loader, "batch_size", None),
        "samples": _length(getattr(loader, "dataset", None)),
        "measure": ask.measure,
        "temperatures": ask.temperatures,
        "keep_logits": ask.keep_logits,
    }
    plain: dict[str, Any] = json.loads(json.dumps(header, allow_nan=False))
    return plain


def _bytes_at_least(model: MultiExitModule, loader: Iterable[Any], keep_logits: bool) -> int:
    """A table's size on disk, or less: what hardly compresses, as far as it is known before the run."""
    samples = _length(getattr(loader, "dataset", None)) or 0
    per_exit = 1 + int(getattr(model, "num_classes", 0) or 0) * keep_logits
    return 2 * samples * model.num_exits * per_exit  # half of the float32 numbers' bytes


def _save_once(table: ExitTable, path: str | os.PathLike[str], rank: int, world: int) -> None:
    """Process 0 writes; nobody goes on, and gives up its part file, before the table is there."""
    fault: list[str | None] = [None]
    try:
        if rank == 0:
            table.save(path)
    except Exception as error:
        fault = [str(error)]
        raise
    finally:
        if world > 1:
            dist.broadcast_object_list(fault, src=0)
    if fault[0] is not None:
        raise OSError(f"the first process could not write the table: {fault[0]}")


def _images_and_target(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        raise ValueError(f"expected batches of (images, target), got {type(batch).__name__}.")
    images, target = batch[0], batch[1]
    if not isinstance(images, Tensor) or not isinstance(target, Tensor) or target.ndim != 1:
        raise ValueError("expected batches of an image tensor (B, C, H, W) and class indices (B,).")
    if len(images) != len(target):
        raise ValueError(f"a batch holds {len(images)} images and {len(target)} targets.")
    return images, target


def _length(loader: Any) -> int | None:
    """Number of batches (of samples of a data set), None for one that streams."""
    try:
        return len(loader)
    except TypeError:
        return None


# Several processes


def _process() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _check_not_sharded(loader: Iterable[Any], world: int) -> None:
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


def _own_batches(loader: Iterable[Any], rank: int, world: int, done: int) -> Iterator[tuple[int, Any]]:
    """This process's batches with their numbers from 0: those not done yet, and the first and last that are."""
    again = sorted({0, done - 1}) if done else []
    streams = isinstance(getattr(loader, "dataset", None), IterableDataset)
    if type(loader) is DataLoader and loader.batch_sampler is not None and not streams:
        indices = list(loader.batch_sampler)
        if world > 1:
            # A shuffled loader draws another order in every process: the first one's counts.
            shared = [indices]
            dist.broadcast_object_list(shared, src=0)
            indices = shared[0]
        own = indices[rank::world]
        numbers = [*(number for number in again if number < len(own)), *range(done, len(own))]
        batches = DataLoader(
            loader.dataset,
            batch_sampler=[own[number] for number in numbers],
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            timeout=loader.timeout,
            multiprocessing_context=loader.multiprocessing_context,
            generator=loader.generator,  # of the workers' seeds
            worker_init_fn=loader.worker_init_fn,
            prefetch_factor=loader.prefetch_factor,
        )
        yield from zip(numbers, batches, strict=True)
        return
    for number, batch in enumerate(islice(loader, rank, None, world)):
        if number >= done or number in again:
            yield number, batch


def _gather(records: list[Record], rank: int, world: int) -> list[Record]:
    if world == 1:
        return records
    everyone: list[list[Record]] = [[] for _ in range(world)]
    dist.all_gather_object(everyone, records)
    merged = [record for turn in zip_longest(*everyone) for record in turn if record is not None]
    return merged
