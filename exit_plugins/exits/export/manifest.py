"""The folder an export is: its files, the manifest that lists them with their digests, and how it is replaced."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..digests import describe_checked, file_digest, weights_digest
from ..files import atomic_folder, recover_folder
from ..policy import ExitPolicy
from ..protocol import MultiExitModule
from ..reading import reading, strict_json
from ..schema import MODEL, Fields, check_fields, is_mapping, is_sha256, is_size, is_text, plain

__all__ = ["MANIFEST", "POLICY", "RUNTIMES", "read_manifest", "written_whole", "write_manifest"]

RUNTIMES = ("onnx", "openvino")  # what runs the segments; a format is that of a file
MANIFEST, POLICY = "export.json", "policy.json"
_FORMAT, _VERSION = "exit_plugins.export", 2
_PREPROCESSING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # as timm names them

_FIELDS: Fields = {
    "runtime": (f"one of {', '.join(RUNTIMES)}", lambda value: value in RUNTIMES),
    "precision": ("a name", is_text),
    "input_size": ("(channels, height, width)", is_size),
    "model": ("a mapping", is_mapping),
    "preprocessing": ("a mapping", is_mapping),
    "torch": ("a version", is_text),
    "segments": ("a list of files", lambda value: isinstance(value, list) and all(map(is_text, value))),
    "files": ("digests by name", lambda value: is_mapping(value) and all(map(is_sha256, value.values()))),
    "quantisation": ("a mapping", is_mapping),
}


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the place of the export in ``folder``, if there is one, when the block ends well.

    Killed at any moment, a complete old or new export stands there. What a user put into the old one stays; what the
    old export itself wrote goes.
    """
    check_replaceable(folder)
    with atomic_folder(folder, without=_own_files(folder)) as part:
        yield part


def check_replaceable(folder: Path) -> None:
    """ValueError if ``folder`` is a file, or holds files and no export."""
    recover_folder(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; name a folder to export into.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} holds files that are not an export; name a new folder.")


def _own_files(folder: Path) -> set[str]:
    """Names an earlier export left in ``folder``, damaged or of an earlier version though it may be."""
    try:
        document = json.loads((folder / MANIFEST).read_bytes())
        entries = [*document.get("files", ()), *document.get("segments", ())]
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        entries = []
    names = [entry.get("file") if isinstance(entry, dict) else entry for entry in entries]
    plain_names = {name for name in names if isinstance(name, str) and _is_plain_name(name)}
    weights = {str(Path(name).with_suffix(".bin")) for name in plain_names if name.endswith(".xml")}
    return {MANIFEST, POLICY, *plain_names, *weights}


def write_manifest(
    folder: Path,
    policy: ExitPolicy,
    segments: Sequence[str],
    runtime: str,
    input_size: Sequence[int],
    model: MultiExitModule,
    weights: str | None = None,
    **more: Any,
) -> None:
    """Write the policy and the manifest beside the segments.

    ``weights`` is their digest where it is not the model's; ``more`` replaces or adds fields of the manifest.
    """
    policy.save(folder / POLICY)
    config = getattr(model, "pretrained_cfg", None) or {}
    config = config if isinstance(config, dict) else vars(config)
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    document = {
        "format": _FORMAT,
        "version": _VERSION,
        "runtime": runtime,
        "precision": "float32",
        "input_size": list(input_size),
        "model": {**describe_checked(model), "weights": weights or weights_digest(model)},
        "preprocessing": {key: config[key] for key in _PREPROCESSING if config.get(key) is not None},
        "torch": torch.__version__,
        "segments": list(segments),
        "files": files,
        **more,
    }
    document = plain(document, "the manifest")
    _check(document)
    (folder / MANIFEST).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of an export all of whose files are there and as they were written.

    FileNotFoundError where there is no export; ValueError in one line for one that is damaged, holds other files than
    it says, or names files outside the folder.
    """
    recover_folder(folder)
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"no export in {folder} (it has no {MANIFEST}); write one with export_segments.")
    with reading(folder, "export", "export again"):
        document = strict_json(path.read_bytes())
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise ValueError(f"the format field of its {MANIFEST} is not {_FORMAT!r}")
        version = document.get("version")
        if type(version) is not int or version != _VERSION:
            raise ValueError(f"it has version {version}, this package reads version {_VERSION}")
        _check(plain(document, MANIFEST))
        for name, digest in document["files"].items():
            file = folder / name
            if file.is_symlink() or not file.is_file() or file_digest(file) != digest:
                raise ValueError(f"{name} is missing or not the file that was exported")
    return document


def _check(document: Mapping[str, Any]) -> None:
    missing = [name for name in _FIELDS if document.get(name) is None and name != "quantisation"]
    unknown = set(document) - set(_FIELDS) - {"format", "version"}
    if missing or unknown:
        raise ValueError(f"{MANIFEST} lacks {missing or 'nothing'} and has unknown {sorted(unknown) or 'nothing'}")
    check_fields(document, MANIFEST, _FIELDS)
    model, segments, files = document["model"], document["segments"], document["files"]
    check_fields(model, f"{MANIFEST}['model']", MODEL)
    if len(segments) != model.get("num_exits") or model.get("architecture") is None:
        raise ValueError(f"{MANIFEST} lists {len(segments)} segments of a model with {model.get('num_exits')} exits")
    outside = [name for name in (*segments, *files) if not _is_plain_name(name)]
    if outside:
        raise ValueError(f"{MANIFEST} names {outside[0]!r}, which does not lie in the folder")
    unlisted = [name for name in (*segments, POLICY) if name not in files]
    if unlisted:
        raise ValueError(f"{MANIFEST} has no digest of {unlisted[0]}")


def _is_plain_name(name: str) -> bool:
    """Of a file in the folder itself: no path, no parent, on no system."""
    return name not in ("", ".", "..") and not any(sign in name for sign in (os.sep, "/", "\\", ":", "\0"))
