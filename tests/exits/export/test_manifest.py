"""The folder of an export: what is not as it was written is refused, what the user put there stays."""

import json
from pathlib import Path

import pytest
from traced_models import SIZE, nobody, traced

from exit_plugins.exits import export
from exit_plugins.exits.export import writing
from exit_plugins.exits.policy import describe_model, weights_digest

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def rewrite(folder, change) -> None:
    document = json.loads((folder / "export.json").read_text())
    change(document)
    (folder / "export.json").write_text(json.dumps(document))


def move_out(folder, name: str) -> None:
    """The first segment, under a name that leads out of the folder."""
    outside = Path(folder, name)
    (folder / "segment_0.onnx").rename(outside)

    def change(document):
        document["segments"][0] = name
        document["files"][name] = document["files"].pop("segment_0.onnx")

    rewrite(folder, change)


def link_out(folder) -> None:
    (folder / "segment_0.onnx").rename(folder.parent / "real.onnx")
    (folder / "segment_0.onnx").symlink_to("../real.onnx")


def append(folder, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.write(b" ")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: move_out(f, "../out.onnx"), "'../out.onnx', which does not lie in the folder"),
        (lambda f: move_out(f, str(f.parent / "out.onnx")), "out.onnx', which does not lie in the folder"),
        (link_out, "segment_0.onnx is missing or not the file that was exported"),
        (lambda f: append(f, "policy.json"), "policy.json is missing or not the file that was exported"),
        (lambda f: (f / "policy.json").unlink(), "policy.json is missing"),
        (lambda f: append(f, "segment_1.onnx"), "segment_1.onnx is missing or not the file"),
        (lambda f: rewrite(f, lambda d: d["files"].pop("policy.json")), "no digest of policy.json"),
        (lambda f: rewrite(f, lambda d: d.update(version=2.0)), "it has version 2.0"),
        (lambda f: rewrite(f, lambda d: d.update(version=True)), "it has version True"),
        (lambda f: rewrite(f, lambda d: d["segments"].pop()), "lists 2 segments of a model with 3 exits"),
        (lambda f: rewrite(f, lambda d: d.update(input_size=[3, "32", 32])), "'input_size'"),
        (lambda f: rewrite(f, lambda d: d.update(segments="abc")), "must be a list of files"),
        (lambda f: rewrite(f, lambda d: d.update(runtime="tflite")), "one of onnx, openvino"),
        (lambda f: rewrite(f, lambda d: d.update(note=1)), r"unknown \['note'\]"),
        (lambda f: rewrite(f, lambda d: d.pop("torch")), r"lacks \['torch'\]"),
        (lambda f: (f / "export.json").write_text('{"format": 1, "format": 2}'), "'format' comes twice"),
    ],
)
def test_what_is_not_as_it_was_exported_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message) as caught:
        export.ExportedSegments(folder)
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_weights_beside_a_network_belong_to_its_digest(tmp_path, monkeypatch):
    model, _, segments = traced("conv")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), tmp_path / "out", SIZE, runtime="openvino")
    weights = tmp_path / "out" / "segment_1.bin"
    spoiled = bytearray(weights.read_bytes())
    spoiled[len(spoiled) // 2] ^= 1
    weights.write_bytes(spoiled)
    with pytest.raises(ValueError, match="segment_1.bin is missing or not the file that was exported"):
        export.ExportedSegments(tmp_path / "out")


def test_replacing_an_export_removes_its_files_and_keeps_the_users(folder, monkeypatch):
    model, _, segments = traced("conv")
    (folder / "notes.txt").write_text("keep me")
    monkeypatch.setattr(writing, "onnx_segments", lambda *_: segments)
    export.export_segments(model, nobody(model), folder, SIZE, runtime="openvino")
    kinds = sorted(path.suffix for path in folder.iterdir())
    assert kinds == [".bin"] * 3 + [".json"] * 2 + [".txt"] + [".xml"] * 3
    assert (folder / "notes.txt").read_text() == "keep me" and [p.name for p in folder.parent.iterdir()] == ["export"]


def test_an_export_knows_its_model_and_weights(folder, tmp_path):
    model, images, _ = traced("conv")
    exported = export.ExportedSegments(folder)
    assert describe_model(exported) == describe_model(model) and weights_digest(exported) == weights_digest(model)
    export.quantize_segments(folder, tmp_path / "int8", [images[:8]])
    assert weights_digest(export.ExportedSegments(tmp_path / "int8")) != weights_digest(model)
