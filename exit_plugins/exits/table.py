"""What every exit said of every sample: the compact record from which thresholds, curves and certificates are made."""

import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._files import atomic_write
from .confidence import CONFIDENCES, confidence, running_ensemble
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

    Numpy arrays, torch tensors and lists are all accepted and stored as numpy. ValueError if the shapes disagree.
    """

    confidence: np.ndarray
    prediction: np.ndarray
    target: np.ndarray
    logits: np.ndarray | None = None
    measure: str = "max_softmax"
    temperatures: tuple[float, ...] = field(default=())

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

    def subset(self, index: np.ndarray) -> "ExitTable":
        """The table of the samples in ``index`` (integers or a boolean mask over N)."""
        return ExitTable(
            self.confidence[:, index],
            self.prediction[:, index],
            self.target[index],
            None if self.logits is None else self.logits[:, index],
            self.measure,
            self.temperatures,
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
        return ExitTable.from_logits(self.logits, self.target, measure or self.measure, temperatures)

    def running_ensemble(self, costs: Sequence[float] | np.ndarray) -> "ExitTable":
        """The table of ``exits.confidence.running_ensemble`` over the exits, for anytime use; needs ``logits``."""
        if self.logits is None:
            raise ValueError("this table holds no logits; collect it with keep_logits=True.")
        return ExitTable.from_logits(running_ensemble(self.logits, costs, self.temperatures), self.target, self.measure)

    def save(self, path: str | os.PathLike) -> None:
        """Write a compressed ``.npz``, whole or not at all."""
        arrays = {"confidence": self.confidence, "prediction": self.prediction, "target": self.target}
        if self.logits is not None:
            arrays["logits"] = self.logits
        with atomic_write(path, "wb") as file:
            np.savez_compressed(
                file,
                format=np.array(_FORMAT),
                measure=np.array(self.measure),
                temperatures=np.array(self.temperatures),
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
                )
        except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path} is not a readable exit table ({error}); collect it again.") from error


@torch.inference_mode()
def collect_exits(
    model: nn.Module,
    loader: Iterable,
    device: torch.device | str | None = None,
    measure: str = "max_softmax",
    temperatures: Iterable[float] | None = None,
    keep_logits: bool = False,
    progress: bool | None = None,
) -> ExitTable:
    """Run every exit over a labelled loader and record what each says.

    Args:
        model: a multi-exit module; it is put in evaluation mode for the run and back afterwards.
        loader: yields (images (B, C, H, W), target (B,)) batches.
        device: where to run; default where the model is. The model is moved there.
        measure: confidence measure, see ``exits.confidence``.
        temperatures: (K,) to divide the logits by.
        keep_logits: store the logits too (K * N * C float32).
        progress: show a bar on stderr; default only on a terminal.

    Returns:
        ExitTable over all N samples in the loader's order.

    Raises:
        ValueError: the loader is empty or its batches do not hold images and class indices.
    """
    check_multi_exit(model)
    if measure not in CONFIDENCES:
        raise ValueError(f"unknown confidence {measure!r}; choose one of {', '.join(CONFIDENCES)}.")
    temperatures = tuple(temperatures or (1.0,) * model.num_exits)
    if len(temperatures) != model.num_exits:
        raise ValueError(f"{len(temperatures)} temperatures do not fit {model.num_exits} exits.")
    device = torch.device(device) if device is not None else exit_device(model)
    training = model.training
    model.to(device).eval()
    confidences, predictions, targets, kept = [], [], [], []
    bar = tqdm(loader, desc="exits", unit="batch", disable=None if progress is None else not progress)
    try:
        for batch in bar:
            images, target = _images_and_target(batch)
            outputs = model.forward_exits(images.to(device, non_blocking=True))
            confidences.append(
                torch.stack([confidence(z, measure, t).float() for z, t in zip(outputs, temperatures, strict=True)])
            )
            predictions.append(torch.stack([z.argmax(-1) for z in outputs]))
            targets.append(target.cpu())
            if keep_logits:
                kept.append(torch.stack([z.float() for z in outputs]).cpu())
    finally:
        bar.close()
        model.train(training)
    if not targets:
        raise ValueError("the loader yielded no batch; an exit table needs at least one sample.")
    return ExitTable(
        torch.cat([c.cpu() for c in confidences], 1),
        torch.cat([p.cpu() for p in predictions], 1),
        torch.cat(targets),
        torch.cat(kept, 1) if keep_logits else None,
        measure,
        temperatures,
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
