"""What every exit said of every sample: the compact record from which thresholds, curves and certificates are made."""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .confidence import check_measure, check_temperatures, confidence, running_ensemble
from .deprecation import moved
from .files import atomic_write
from .reading import reading, strict_json
from .schema import MODEL, Fields, check_fields, is_text, plain

__all__ = ["ExitTable", "check_not_empty", "class_indices"]

__getattr__ = moved(__name__, {"collect_exits": "exit_plugins.exits.collecting.collect_exits"})

_FORMAT, _EARLIER = "exit_plugins.table/2", "exit_plugins.table/1"
_ARRAYS = {"confidence": np.float32, "prediction": np.int64, "target": np.int64, "logits": None, "sample": np.uint64}
_TEXTS = ("format", "measure", "temperatures", "about", "sha256")  # the other members of the file


def _array(name: str, value: Any) -> NDArray[Any]:
    """``value`` in the type of the field ``name``; ValueError where that would change it."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    value, dtype = np.asarray(value), np.dtype(_ARRAYS[name])
    if value.dtype.kind not in ("biuf" if dtype.kind == "f" else "iuf"):
        raise ValueError(f"{name} must be numbers, got {value.dtype}.")
    if dtype.kind == "f":
        with np.errstate(over="ignore"):  # beyond float32's largest number is infinite in float32
            return np.ascontiguousarray(value, dtype=dtype)
    if value.dtype.kind == "f" and not (np.isfinite(value) & (value == np.floor(value))).all():
        raise ValueError(f"{name} must be whole numbers (class indices), got fractions, NaN or infinite ones.")
    limits = np.iinfo(dtype.name)
    if value.size and (int(value.min()) < limits.min or int(value.max()) > limits.max):
        raise ValueError(f"{name} must fit {dtype}, got {value.min()} to {value.max()}.")
    return np.ascontiguousarray(value, dtype=dtype)


def class_indices(
    target: ArrayLike | Tensor, num_classes: int | None = None, marked: bool = False
) -> NDArray[np.int64]:
    """``target`` (N,) as int64; ValueError unless they are whole numbers from 0 to ``num_classes`` - 1.

    None is "not known". ``marked`` lets negative numbers pass: marks of samples that will be left out.
    """
    indices: NDArray[np.int64] = _array("target", target)
    low = np.iinfo(np.int64).min if marked else 0
    high = np.iinfo(np.int64).max if num_classes is None else num_classes - 1
    wrong = indices[(indices < low) | (indices > high)]
    if len(wrong):
        classes = "classes from 0 on" if num_classes is None else f"classes 0 to {high}"
        raise ValueError(
            f"the targets hold class {wrong[0]} and the exits answer with {classes}; give class indices in the order "
            "of the model's classes, or a model of as many classes as the data has."
        )
    return indices


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

    Numpy arrays, torch tensors and lists are all accepted and stored as numpy. ValueError if the shapes disagree, for
    an unknown measure, temperatures that make no sense, or classes that are no whole numbers.
    """

    confidence: NDArray[Any]
    prediction: NDArray[Any]
    target: NDArray[Any]
    logits: NDArray[Any] | None = None
    measure: str = "max_softmax"
    temperatures: tuple[float, ...] = field(default=())
    sample: NDArray[Any] | None = None
    about: dict[str, Any] | None = None

    if TYPE_CHECKING:  # what it is made of is wider than what it holds

        def __init__(
            self,
            confidence: ArrayLike | Tensor,
            prediction: ArrayLike | Tensor,
            target: ArrayLike | Tensor,
            logits: NDArray[Any] | Tensor | None = None,
            measure: str = "max_softmax",
            temperatures: Iterable[float] = (),
            sample: ArrayLike | Tensor | None = None,
            about: dict[str, Any] | None = None,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_ = object.__setattr__
        for name in ("confidence", "prediction", "target"):
            set_(self, name, _array(name, getattr(self, name)))
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
            if logits.dtype.kind != "f":
                raise ValueError(f"logits must be floating point numbers, got {logits.dtype}.")
            set_(self, "logits", logits)
        if self.sample is not None:
            set_(self, "sample", _array("sample", self.sample))
            if self.sample.shape != self.target.shape:
                raise ValueError(f"sample digests {self.sample.shape} do not fit {self.num_samples} samples.")
        if self.about is not None:
            set_(self, "about", _check_about(self.about, self.num_exits))
        check_measure(self.measure)
        set_(self, "temperatures", check_temperatures(self.temperatures or None, self.num_exits))

    @property
    def num_exits(self) -> int:
        return self.confidence.shape[0]

    @property
    def num_samples(self) -> int:
        return self.confidence.shape[1]

    @property
    def correct(self) -> NDArray[Any]:
        """(K, N) bool."""
        right: NDArray[Any] = self.prediction == self.target
        return right

    def __len__(self) -> int:
        return self.num_samples

    def digest(self) -> str:
        """SHA-256 of confidences, predictions, targets and sample digests, whatever file they came in."""
        hasher = hashlib.sha256(repr(self.confidence.shape).encode())
        for array in (self.confidence, self.prediction, self.target, self.sample):
            if array is not None:
                hasher.update(array.tobytes())
        return hasher.hexdigest()

    def subset(self, index: NDArray[Any]) -> "ExitTable":
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
        logits: NDArray[Any] | Tensor | Iterable[Tensor],
        target: NDArray[Any] | Tensor,
        measure: str = "max_softmax",
        temperatures: Iterable[float] | None = None,
        keep_logits: bool = True,
    ) -> "ExitTable":
        """Table of saved logits (K, N, C), or K arrays (N, C), whoever made them."""
        parts = [torch.as_tensor(z) for z in logits]
        if any(part.ndim != 2 for part in parts):
            raise ValueError(f"expected K arrays of logits (N, C), got shapes {[tuple(p.shape) for p in parts]}.")
        temperatures = check_temperatures(temperatures, len(parts))
        target = class_indices(target, parts[0].shape[-1] if parts else 0)
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

    def running_ensemble(self, costs: Sequence[float] | NDArray[Any]) -> "ExitTable":
        """The table of ``exits.confidence.running_ensemble`` over the exits, for anytime use; needs ``logits``."""
        if self.logits is None:
            raise ValueError("this table holds no logits; collect it with keep_logits=True.")
        mixed = running_ensemble(torch.as_tensor(self.logits), torch.as_tensor(costs), self.temperatures)
        return replace(ExitTable.from_logits(mixed, self.target, self.measure), sample=self.sample, about=self.about)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a compressed ``.npz``, whole or not at all."""
        members = {
            "format": np.array(_FORMAT),
            "measure": np.array(self.measure),
            "temperatures": np.array(self.temperatures),
            "about": np.array(json.dumps(self.about, allow_nan=False)),
        }
        members |= {name: getattr(self, name) for name in _ARRAYS if getattr(self, name) is not None}
        members["sha256"] = np.array(_members_digest(members))
        # Not with allow_pickle=False: to NumPy 1.26 that is one member more. No member holds objects.
        with atomic_write(path, "wb") as file:
            np.savez_compressed(file, **members)  # type: ignore[arg-type]  # the stub takes a member for the option

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "ExitTable":
        """Read what ``save`` wrote; ValueError in one line if the file is something else, foreign or damaged."""
        with reading(path, "exit table", "collect it again", "write one with ExitTable.save"):
            if not zipfile.is_zipfile(path):
                raise ValueError("it is no .npz file, or was cut off")
            with np.load(path, allow_pickle=False) as file:
                members = {name: file[name] for name in file.files}
            written = str(members["format"])
            if written not in (_FORMAT, _EARLIER):
                raise ValueError(f"its format is {written[:40]}, expected {_FORMAT}")
            unknown = set(members) - set(_ARRAYS) - set(_TEXTS)
            if unknown:
                raise ValueError(f"it holds unknown fields: {', '.join(sorted(unknown))}")
            if written == _FORMAT and str(members.pop("sha256")) != _members_digest(members):
                raise ValueError("its checksum does not fit, it is damaged")
            for name, dtype in _ARRAYS.items():
                if name in members and dtype is not None and members[name].dtype != dtype:
                    raise ValueError(f"its {name} are {members[name].dtype}, expected {np.dtype(dtype)}")
            return cls(
                members["confidence"],
                members["prediction"],
                members["target"],
                members.get("logits"),
                str(members["measure"]),
                tuple(members["temperatures"].tolist()),
                members.get("sample"),
                strict_json(str(members["about"])) if "about" in members else None,
            )


def check_not_empty(table: ExitTable, otherwise: str = "there is nothing to evaluate") -> None:
    """TypeError for what is no table, ValueError for one of no samples."""
    if not isinstance(table, ExitTable):
        raise TypeError(f"expected an ExitTable, as collect_exits makes it, got {type(table).__name__}.")
    if table.num_samples == 0:
        raise ValueError(f"the table holds no samples; {otherwise}.")


def _members_digest(members: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 over every member of a file with its name, so that none can be lost or changed unnoticed."""
    hasher = hashlib.sha256()
    for name, array in sorted(members.items()):
        hasher.update(f"{name} {array.dtype.str} {array.shape}".encode())
        hasher.update(np.ascontiguousarray(array).tobytes())
    return hasher.hexdigest()


_ABOUT: Fields = {
    **{name: MODEL[name] for name in ("weights", "input_size", "classes")},
    **dict.fromkeys(("transform", "data", "split"), ("a text", is_text)),
}


def _check_about(about: Any, num_exits: int) -> dict[str, Any]:
    if not isinstance(about, dict):
        raise ValueError(f"about is a mapping of plain values, got {type(about).__name__}.")
    known: dict[str, Any] = plain(about, "about")
    described = known.get("model") or {}
    if not isinstance(described, dict):
        raise ValueError(f"about['model'] is what describe_model says, got {type(described).__name__}.")
    check_fields(described, "about['model']", MODEL)
    check_fields(known, "about", _ABOUT)
    if described.get("num_exits", num_exits) != num_exits:
        raise ValueError(f"a table of {num_exits} exits is not of a model with {described['num_exits']}.")
    return known
