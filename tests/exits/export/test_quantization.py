"""Int8 exports: near what they were made from, and known as what they are."""

import numpy as np
import pytest
import torch
from traced_models import traced

from exit_plugins.exits import export

pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")


def test_int8(folder, tmp_path):
    model, images, _ = traced("conv")
    report = export.quantize_segments(folder, tmp_path / "int8", images.split(8))
    quantised = export.ExportedSegments(tmp_path / "int8")
    assert quantised.manifest["precision"] == "int8" and quantised.manifest["quantisation"] == report
    with torch.no_grad():
        before, after = torch.stack(model.forward_exits(images)), torch.stack(quantised.forward_exits(images))
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, atol=0.1 * float(before.abs().max()), rtol=0)
    same = (before.argmax(2) == after.argmax(2)).float().mean(1)
    np.testing.assert_allclose(report["agreement"], same, atol=1e-6)
    assert export.ExportedAdaptiveModel(tmp_path / "int8")(images).logits.shape == (24, 5)
    with pytest.raises(ValueError, match="needs images"):
        export.quantize_segments(folder, tmp_path / "other", [])
