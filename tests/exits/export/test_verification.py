"""Nothing wrong is written, and whoever asks for something impossible is told what."""

import pytest
import torch
from small_models import ConvExits
from traced_models import SIZE, nobody, traced

from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits import export
from exit_plugins.exits.export import exported, runtimes

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


@pytest.mark.parametrize("wrong", ["logits", "state"])
def test_an_export_that_differs_is_not_written(folder, tmp_path, monkeypatch, wrong):
    model, _, _ = traced("conv")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    right = exported.onnx_session

    def slightly_wrong(path, *args):
        session = right(path, *args)
        at = 0 if wrong == "logits" else 1

        def run(leaves):
            results = session(leaves)
            if len(results) > at:
                results[at] = results[at] + 1e-2
            return results

        return runtimes.Session(session.inputs, run)

    monkeypatch.setattr(exported, "onnx_session", slightly_wrong)
    with pytest.raises(RuntimeError, match="differs from torch by .* it was not written"):
        export.export_segments(model, nobody(model), folder, SIZE)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["export"]

    monkeypatch.setattr(
        export.GraphRunner, "__call__", lambda self, images, thresholds: AdaptiveModel(model, nobody(model))(images)
    )
    with pytest.raises(RuntimeError, match="leave elsewhere than torch does .* it was not written"):
        export.export_graph(model, nobody(model), tmp_path / "model.onnx", SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_clear_errors(folder, tmp_path, monkeypatch):
    model, images, _ = traced("conv")
    policy = nobody(model)
    with pytest.raises(ValueError, match="unknown runtime 'tflite'; choose one of onnx, openvino"):
        export.export_segments(model, policy, tmp_path / "new", SIZE, runtime="tflite")
    with pytest.raises(ValueError, match="call model.float"):
        export.export_segments(ConvExits().double(), policy, tmp_path / "new", SIZE)
    with pytest.raises(ValueError, match="4 thresholds"):
        export.export_segments(model, ExitPolicy([0.5] * 4), tmp_path / "new", SIZE)
    with pytest.raises(ValueError, match="4 thresholds"):
        export.ExportedAdaptiveModel(folder, ExitPolicy([0.5] * 4))
    with pytest.raises(ValueError, match=r"images of shape \(batch, 3, 32, 32\), got \(2, 4, 32, 32\)"):
        export.ExportedAdaptiveModel(folder)(torch.randn(2, 4, 32, 32))
    with pytest.raises(ValueError, match="a choice of OpenVINO"):
        export.ExportedSegments(folder, bfloat16=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep me")
    with pytest.raises(ValueError, match="not an export; name a new folder"):
        export.export_segments(model, policy, tmp_path / "mine", SIZE)
    with pytest.raises(FileNotFoundError, match="no export in"):
        export.ExportedSegments(tmp_path / "mine")
    with pytest.raises(FileNotFoundError, match="no exported graph"):
        export.GraphRunner(tmp_path / "none.onnx")
    file = folder / "segment_1.onnx"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(ValueError, match="missing or not the file that was exported"):
        export.ExportedSegments(folder)
    (folder / "export.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable export"):
        export.ExportedSegments(folder)

    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setattr(runtimes, "import_module", missing)
    with pytest.raises(ImportError, match="needs onnx, which is not installed: pip install 'exit-plugins.export.'"):
        export.export_graph(model, policy, tmp_path / "new", SIZE)
    assert not (tmp_path / "new").exists()


def test_a_batch_size_frozen_by_the_model_is_refused(tmp_path):
    class Frozen(ConvExits):
        def forward_exit(self, index, state):
            logits, state = super().forward_exit(index, state)
            return logits, state.reshape(len(state), *state.shape[1:])

    with pytest.raises(ValueError, match=r"cannot be exported with a free batch size: .*write x.shape\[0\]"):
        export.export_segments(Frozen().eval(), nobody(Frozen()), tmp_path / "new", SIZE)
    assert not list(tmp_path.iterdir())
