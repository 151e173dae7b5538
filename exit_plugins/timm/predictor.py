"""From files to answers: a model, its policy, its preprocessing and the names of its classes in one, loaded once.

``Predictor`` is what ``exit-plugins predict`` and a server run. ``BatchPredictor`` is the same from plain values, so
that it can be sent to other machines: an actor of Ray Data, or a function of Spark.
"""

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset
from timm.models import load_checkpoint
from torch import Tensor, nn

from ..exits.adaptive import AdaptiveModel, ExitOutput
from ..exits.costs import exit_costs
from ..exits.policy import ExitPolicy, check_same_weights
from ._cards import load_from_hf
from ._host import TimmModel
from ._shipped import list_shipped, shipped_policy
from .clips import VIDEO_EXTENSIONS, ClipTransform, VideoFile
from .images import EXTENSIONS, MODES, UnreadableImage, input_config, read_image

__all__ = ["PREDICT_MODES", "UNSURE", "BatchPredictor", "Predictor", "SampleReader", "spoken_names"]

_ANSWERS = ("class", "label", "confidence", "exit", "macs", "top", "error")  # columns of a BatchPredictor
PREDICT_MODES = ("fused", "compiled", "onnx", "openvino")
UNSURE = "unsure"


class SampleReader:
    """One sample as a model reads it; small, so that the processes of a loader can have it without the model.

    Args:
        config: ``input_config`` of the model.

    ValueError for a model that reads neither one channel nor three.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.kind = "clip" if len(config["input_size"]) == 4 else "image"
        channels = config["input_size"][-3]
        if channels not in MODES:
            raise ValueError(f"{self.kind}s have 1 or 3 channels, the model takes {channels}.")
        self._mode = MODES[channels]
        self._transform: Callable[[Any], Tensor]
        if self.kind == "clip":
            self._transform = ClipTransform.of_config(config)
        else:
            self._transform = create_transform(**{**config, "is_training": False})

    @property
    def endings(self) -> tuple[str, ...]:
        """Of the files it reads."""
        return VIDEO_EXTENSIONS if self.kind == "clip" else EXTENSIONS

    def __call__(self, file: str | os.PathLike | bytes, name: str | None = None) -> Tensor:
        """(C, H, W) or (T, C, H, W), from a path or the bytes of an image; UnreadableImage names what is none."""
        if self.kind == "image":
            return self._transform(read_image(file, name).convert(self._mode))
        if isinstance(file, bytes):
            raise UnreadableImage(f"{name or 'the clip'}: clips are read from files, and these are bytes.")
        return self._transform(VideoFile(os.fspath(file)))


class Predictor:
    """Answers images, or clips where the model reads them, under a policy.

    Args:
        model: a multi-exit module, or an export (``exits.export.ExportedSegments``), which runs as it is.
        policy: thresholds for it.
        config: its preprocessing, as ``input_config`` gives it; default what the model says.
        classes: names of its classes by index; default the policy's, ImageNet's, or the numbers.
        mode: how a torch model is run: ``fused`` (its form for inference), ``compiled``, or exported first to ``onnx``
            or ``openvino`` in a temporary folder.
        top_k: also give the ``top_k`` likeliest classes with their probabilities.
        reject: below this confidence at the last exit the answer is ``UNSURE``, and its class None.

    Attributes:
        kind: ``image`` or ``clip``.
        read: the ``SampleReader`` of its preprocessing.
        macs: (K,) cumulative MACs of each exit, or None of an export whose network timm does not know.

    Raises:
        ValueError: the policy is not for the model, the names are not as many as its classes, or it reads neither one
            channel nor three.
    """

    def __init__(
        self,
        model: TimmModel,
        policy: ExitPolicy,
        config: Mapping[str, Any] | None = None,
        classes: Sequence[str] | None = None,
        mode: str = "fused",
        top_k: int = 1,
        reject: float | None = None,
    ) -> None:
        if mode not in PREDICT_MODES:
            raise ValueError(f"unknown mode {mode!r}; choose one of {', '.join(PREDICT_MODES)}.")
        self.policy = policy
        self.config = dict(input_config(model) if config is None else config)
        self.classes = list(classes or spoken_names(model, (policy.model or {}).get("classes")))
        if len(self.classes) != model.num_classes:
            raise ValueError(f"there are names for {len(self.classes)} classes and the model has {model.num_classes}.")
        if not 1 <= top_k <= len(self.classes):
            raise ValueError(f"top_k is a number of classes from 1 to {len(self.classes)}, got {top_k}.")
        self.top_k, self.reject = top_k, reject
        self.read = SampleReader(self.config)
        self.kind = self.read.kind
        self.device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        self.macs = _macs(model, self.config["input_size"])
        self._folder: tempfile.TemporaryDirectory | None = None
        self.adaptive = self._runner(model, mode)

    def run(self, pixels: Tensor) -> ExitOutput:
        """The adaptive run of a batch (B, *input_size)."""
        return self.adaptive(pixels.to(self.device))

    def rows(self, output: ExitOutput) -> list[dict[str, Any]]:
        """What a batch was answered, a row for each sample.

        ``class`` (0-based index) and ``label``, ``confidence`` (None where it is NaN), ``exit`` (from 1 on) and
        ``macs``; with ``top_k`` above 1 also ``top``, a list of (class, label, probability), likeliest first.
        """
        answers = output.logits.argmax(1).tolist()
        exits, sures = output.exit_index.tolist(), output.confidence.tolist()
        tops = self._top(output) if self.top_k > 1 else [None] * len(answers)
        rows = []
        for answer, exit_, sure, top in zip(answers, exits, sures, tops, strict=True):
            known = sure == sure
            unsure = self.reject is not None and exit_ == self.policy.last_exit and not sure >= self.reject
            row = {
                "class": None if unsure else answer,
                "label": UNSURE if unsure else self.classes[answer],
                "confidence": sure if known else None,
                "exit": exit_ + 1,
                "macs": None if self.macs is None else int(self.macs[exit_]),
            }
            rows.append(row if top is None else {**row, "top": top})
        return rows

    def _top(self, output: ExitOutput) -> list[list[dict[str, Any]]]:
        temperatures = output.logits.new_tensor(self.policy.temperatures.tolist()).cpu()[output.exit_index.cpu()]
        probabilities = (output.logits.cpu() / temperatures[:, None]).softmax(1)
        values, indices = probabilities.topk(self.top_k, 1)
        return [
            [
                {"class": c, "label": self.classes[c], "probability": p if p == p else None}
                for c, p in zip(classes, shares, strict=True)
            ]
            for classes, shares in zip(indices.tolist(), values.tolist(), strict=True)
        ]

    def _runner(self, model: TimmModel, mode: str) -> AdaptiveModel:
        if _is_export(model):
            return _exported(model.folder, self.policy)
        if mode in ("onnx", "openvino"):
            from ..exits.export import export_segments

            self._folder = tempfile.TemporaryDirectory(prefix="exit_plugins.")  # for as long as its files are mapped
            self.device = torch.device("cpu")
            export_segments(model.cpu(), self.policy, self._folder.name, self.config["input_size"], mode)
            return _exported(self._folder.name, self.policy)
        return AdaptiveModel(model, self.policy, fuse=True, compile=mode == "compiled")


class BatchPredictor(Predictor):
    """A ``Predictor`` made of plain values that answers a batch of encoded images: one actor, or one worker process.

    With Ray Data: ``dataset.map_batches(BatchPredictor, fn_constructor_kwargs=dict(source=...), concurrency=2)``; with
    pandas and Spark see docs/predict.md. Everything is loaded once, in the constructor.

    Args:
        source: the folder of an export; a policy file that names its model; ``local-dir:FOLDER`` or ``hf-hub:NAME`` of
            a card with its policy; or the name of a network that comes with the package.
        checkpoint: weights for the model of a policy file.
        policy: a policy file to run under, instead of the source's own.
        device: of a torch model; default a GPU where there is one.
        classes, mode, top_k, reject: see ``Predictor``.
        column: of the batch in which the encoded images are.

    Raises:
        FileNotFoundError, ValueError: there is no such source, or policy, weights and model do not belong together.
    """

    def __init__(
        self,
        source: str,
        checkpoint: str | None = None,
        policy: str | None = None,
        device: str | None = None,
        classes: Sequence[str] | None = None,
        mode: str = "fused",
        top_k: int = 1,
        reject: float | None = None,
        column: str = "bytes",
    ) -> None:
        model, own = _open(source, checkpoint)
        chosen = ExitPolicy.load(policy) if policy is not None else own
        if chosen is None:
            raise ValueError(f"no policy lies beside {source}; give policy=FILE.")
        chosen.check_model(model)
        check_same_weights(chosen, model)
        if not _is_export(model):
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        size = (chosen.model or {}).get("input_size")
        super().__init__(model, chosen, input_config(model, size and size[-2:]), classes, mode, top_k, reject)
        self.column = column

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, np.ndarray]:
        """Answers to a batch, column by column: Ray Data's numpy format, and a dictionary of lists as well.

        Args:
            batch: ``column`` with the bytes of each image, or a path where it holds text; every other column is handed
                on, and none of them may be called as an answer is.

        Returns:
            The other columns, and ``class`` (int64, -1 where there is no answer), ``label``, ``confidence`` (NaN where
            there is none), ``exit`` (from 1 on, 0 for an image that cannot be read), ``macs`` and ``error`` (empty, or
            what was wrong with the image).

        Raises:
            ValueError: the batch has no such ``column``, or others with the names of answers.
        """
        self._check_columns(batch)
        files = list(batch[self.column])
        kept = {name: np.asarray(values) for name, values in batch.items() if name != self.column}
        names = kept.get("path", [None] * len(files))
        pixels, places, errors = [], [], [""] * len(files)
        for place, (file, name) in enumerate(zip(files, names, strict=True)):
            try:
                pixels.append(self.read(_encoded(file), None if name is None else str(name)))
                places.append(place)
            except UnreadableImage as error:
                errors[place] = str(error)
        answers = {
            "class": np.full(len(files), -1, np.int64),
            "label": np.full(len(files), "", object),
            "confidence": np.full(len(files), np.nan),
            "exit": np.zeros(len(files), np.int64),
            "macs": np.full(len(files), np.nan),
        }
        rows = self.rows(self.run(torch.stack(pixels))) if pixels else []
        if self.top_k > 1:
            answers["top"] = np.full(len(files), None, object)
        for place, row in zip(places, rows, strict=True):
            for name, value in row.items():
                if value is not None:
                    answers[name][place] = value
        return {**kept, **answers, "error": np.array(errors, object)}

    def _check_columns(self, batch: Mapping[str, Sequence[Any]]) -> None:
        if self.column not in batch:
            raise ValueError(f"the batch has no column {self.column!r}, it has {', '.join(batch)}; give column=NAME.")
        answers = [name for name in _ANSWERS if name != "top" or self.top_k > 1]
        taken = [name for name in batch if name in answers and name != self.column]
        if taken:
            raise ValueError(
                f"the batch has columns that are called as answers are and would be lost: {', '.join(taken)}; rename "
                "or drop them first (in Ray Data: rename_columns, drop_columns)."
            )


def _encoded(file: Any) -> str | bytes:
    """The bytes or the path of an image, also in the struct that Hugging Face's data sets write."""
    if isinstance(file, Mapping):
        file = file.get("bytes") or file.get("path")
    if isinstance(file, (bytes, bytearray, memoryview)):
        return bytes(file)
    if not isinstance(file, (str, os.PathLike)):
        raise UnreadableImage(f"expected the bytes or the path of an image, got {type(file).__name__}.")
    return os.fspath(file)


def _is_export(model: nn.Module) -> bool:
    return hasattr(model, "manifest")


def _exported(folder: str | os.PathLike, policy: ExitPolicy) -> AdaptiveModel:
    from ..exits.export import ExportedAdaptiveModel

    return ExportedAdaptiveModel(folder, policy)


def _open(source: str, checkpoint: str | None) -> tuple[nn.Module, ExitPolicy | None]:
    """The model a source names, and the policy that belongs to it."""
    if source.startswith(("local-dir:", "hf-hub:")):
        return load_from_hf(source)
    if source in list_shipped():
        return timm.create_model(source, pretrained=True).eval(), shipped_policy(source)
    path = Path(source)
    if path.is_dir():
        from ..exits.export import ExportedSegments

        return ExportedSegments(path), ExitPolicy.load(path / "policy.json")
    policy = ExitPolicy.load(path)
    about = policy.model or {}
    name = about.get("architecture")
    if name is None or not timm.is_model(name):
        raise ValueError(f"{source} does not say which of timm's models it is for ({name}); export the model first.")
    kwargs = dict(about.get("model_kwargs") or {})
    for key in ("num_classes", "in_chans"):
        if about.get(key) is not None:
            kwargs[key] = about[key]
    model = timm.create_model(name, **kwargs)
    if checkpoint is None:
        raise ValueError(f"{source} is a policy without weights; give checkpoint=FILE.")
    load_checkpoint(model, checkpoint)
    return model.eval(), policy


def spoken_names(model: TimmModel, names: Sequence[str] | None) -> list[str]:
    """What to call each class: the names, in words where they are ImageNet's codes, or the numbers."""
    subset = infer_imagenet_subset(model)
    info = ImageNetInfo(subset) if subset else None
    if info is not None and (names is None or list(names) == info.label_names()):
        return [info.index_to_description(index) for index in range(model.num_classes)]
    return list(names) if names else [str(index) for index in range(model.num_classes)]


def _macs(model: TimmModel, input_size: Sequence[int]) -> np.ndarray | None:
    """Cumulative MACs (K,); of an export those of the network it was made from."""
    if not _is_export(model):
        return exit_costs(model, input_size).macs
    described = model.manifest["model"]
    if not timm.is_model(described["architecture"]):
        return None
    kwargs = {key: described[key] for key in ("num_classes", "in_chans") if described.get(key)}
    with torch.device("meta"):
        network = timm.create_model(described["architecture"], **kwargs, **(described.get("model_kwargs") or {}))
    return exit_costs(network, input_size).macs
