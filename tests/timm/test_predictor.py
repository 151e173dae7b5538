"""A predictor from plain values: what a worker on another machine loads and answers."""

import io
import pickle
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import exit_plugins
from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits.digests import describe_model, weights_digest
from exit_plugins.exits.export import export_segments
from exit_plugins.timm.predictor import UNSURE, BatchPredictor, Predictor, SampleReader

SHIPPED = "msdnet_cifar_batch.cifar100"


def encoded(seed: int, size: int = 40) -> bytes:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((size, size)).save(file, "png")
    return file.getvalue()


@pytest.fixture(scope="module")
def batch() -> dict:
    files = [encoded(seed) for seed in range(12)]
    files[4] = b"no image"
    return {"path": [f"{i}.png" for i in range(12)], "bytes": files}


def expected(batch, thresholds=None) -> tuple:
    """Timm's own preprocessing and the whole network, sample by sample; the exits by the policy's rule."""
    model = timm.create_model(SHIPPED, pretrained=True).eval()
    policy = exit_plugins.timm.shipped_policy(SHIPPED)
    policy = policy if thresholds is None else replace(policy, thresholds=thresholds)
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=model))
    pictures = [Image.open(io.BytesIO(file)) for file in batch["bytes"] if file != b"no image"]
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(torch.stack([transform(picture) for picture in pictures])))
    confidence = (logits / torch.tensor(policy.temperatures)[:, None, None]).softmax(-1).amax(-1)
    exits = policy.choose(confidence.numpy())
    return policy, exits, logits[exits, range(len(exits))], confidence[exits, range(len(exits))]


def test_a_batch_is_answered_column_by_column(batch):
    predictor = BatchPredictor(SHIPPED, top_k=3, device="cpu")
    answers = predictor({**batch, "number": np.arange(12)})
    policy, exits, logits, confidence = expected(batch)
    good = [i for i in range(12) if i != 4]
    assert answers["number"].tolist() == list(range(12)) and answers["path"].tolist() == batch["path"]
    assert answers["class"][good].tolist() == logits.argmax(1).tolist()
    assert answers["exit"][good].tolist() == (exits + 1).tolist() and len(set(exits)) > 1
    assert answers["confidence"][good] == pytest.approx(confidence.numpy(), rel=1e-4)
    assert answers["macs"][good].tolist() == policy.costs[exits].tolist()
    assert answers["label"][0] == policy.model["classes"][answers["class"][0]]
    likeliest = logits[0].topk(3).indices.tolist()
    assert [entry["class"] for entry in answers["top"][0]] == likeliest
    probability = (logits[0] / policy.temperatures[exits[0]]).softmax(0)[likeliest[1]]
    assert answers["top"][0][1]["probability"] == pytest.approx(float(probability), rel=1e-3)
    # The bad one is a row that says so.
    assert (answers["class"][4], answers["exit"][4], answers["label"][4]) == (-1, 0, "")
    assert "4.png is not an image" in answers["error"][4] and not any(answers["error"][good])


def test_columns_of_paths_of_structs_and_of_nothing(batch, tmp_path):
    predictor = BatchPredictor(SHIPPED, column="image", device="cpu")
    (tmp_path / "x.png").write_bytes(batch["bytes"][0])
    given = [batch["bytes"][0], str(tmp_path / "x.png"), {"bytes": batch["bytes"][0], "path": None}, None]
    answers = predictor({"image": given})
    assert len(set(answers["class"][:3].tolist())) == 1 and "NoneType" in answers["error"][3]
    assert len(predictor({"image": []})["class"]) == 0


def test_columns_called_as_answers_are_refused_and_named(batch):
    predictor = BatchPredictor(SHIPPED, device="cpu")
    with pytest.raises(ValueError, match="would be lost: label, error; rename or drop them"):
        predictor({**batch, "label": [0] * 12, "error": [""] * 12})
    with pytest.raises(ValueError, match="no column 'bytes', it has path"):
        predictor({"path": batch["path"]})
    # The column of the images is handed on to nobody.
    assert len(BatchPredictor(SHIPPED, column="label", device="cpu")({"label": batch["bytes"]})["label"]) == 12


def test_reject_counts_the_last_exit_alone(batch, tmp_path):
    policy, exits, _, confidence = expected(batch, [0.8, np.inf, np.inf, np.inf, 0])
    policy.save(tmp_path / "p.json")
    last = confidence.numpy()[exits == policy.last_exit]
    limit = float(np.median(last)) + 1e-4
    answers = BatchPredictor(SHIPPED, policy=str(tmp_path / "p.json"), reject=limit, device="cpu")(batch)
    unsure = [label == UNSURE for label in answers["label"] if label]
    assert unsure == ((exits == policy.last_exit) & (confidence.numpy() < limit)).tolist()
    assert 0 < sum(unsure) < len(last)


def test_exports_and_checkpoints_answer_as_the_model_does(batch, tmp_path):
    pytest.importorskip("onnxruntime")
    model = timm.create_model("msdnet_test", num_classes=3).eval()
    policy = ExitPolicy([0.36, 0.36, 0], model={**describe_model(model), "weights": weights_digest(model)})
    plain = Predictor(model, policy)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    policy.save(tmp_path / "policy.json")
    given = {"source": str(tmp_path / "policy.json"), "checkpoint": str(tmp_path / "w.safetensors")}
    by_file = BatchPredictor(**given, device="cpu")(batch)
    export_segments(model, policy, tmp_path / "onnx", (3, 32, 32))
    by_export = BatchPredictor(str(tmp_path / "onnx"))
    assert by_export.macs.tolist() == plain.macs.tolist()
    for answers in (BatchPredictor(**given, mode="onnx")(batch), by_export(batch)):
        assert answers["class"].tolist() == by_file["class"].tolist() and len(set(by_file["exit"])) > 1
        assert answers["confidence"] == pytest.approx(by_file["confidence"], rel=1e-4, nan_ok=True)
    other = {name: tensor.flip(0) if tensor.ndim == 4 else tensor for name, tensor in model.state_dict().items()}
    save_file({name: tensor.contiguous() for name, tensor in other.items()}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="solved with other weights"):
        BatchPredictor(given["source"], checkpoint=str(tmp_path / "other.safetensors"))
    with pytest.raises(ValueError, match="give checkpoint=FILE"):
        BatchPredictor(given["source"])
    with pytest.raises(FileNotFoundError, match="no policy at"):
        BatchPredictor(str(tmp_path / "nowhere"))


def test_what_reads_is_small_enough_to_send(batch):
    model = timm.create_model("msdnet_test", num_classes=3).eval()
    predictor = Predictor(model, ExitPolicy(thresholds=[0.9, 0.9, 0]), classes=["a", "b", "c"])
    reader: SampleReader = pickle.loads(pickle.dumps(predictor.read))
    assert len(pickle.dumps(reader)) < 10_000
    pixels = reader(batch["bytes"][0])[None]
    assert torch.equal(pixels, predictor.read(batch["bytes"][0])[None])
    out = predictor.run(pixels)
    assert torch.equal(out.exit_index, AdaptiveModel(model, predictor.policy)(pixels).exit_index)
    assert predictor.rows(out)[0]["label"] in "abc"
    for wrong in (dict(mode="fast"), dict(top_k=4), dict(classes=["a"])):
        with pytest.raises(ValueError, match="mode|top_k|names"):
            Predictor(model, predictor.policy, **wrong)
