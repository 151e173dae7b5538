"""Exports carry arithmetic and no bookkeeping of shapes, and the forms they are written in are torch's functions."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from traced_models import SMALL, traced

import exit_plugins.timm
from exit_plugins.exits.export.openvino_runtime import openvino_session
from exit_plugins.exits.export.tracing import onnx_segments
from exit_plugins.exits.protocol import MultiExit

onnxruntime = pytest.importorskip("onnxruntime")
REGISTERED = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]


def kinds(name: str) -> list[Counter[str]]:
    """How many nodes of each kind every segment of a model has."""
    return [Counter(node.op_type for node in program.model_proto.graph.node) for program in traced(name)[2]]


@pytest.mark.parametrize("name", [*SMALL, *REGISTERED])
def test_segments_compute_no_types_and_hardly_a_shape(name):
    for count in kinds(name):
        assert not count.keys() & {"CastLike", "SequenceAt", "SplitToSequence", "Constant", "Sqrt"}
        # How many samples there are is asked where something is made for each of them: latents, tokens of a class,
        # random features' diagonals.
        assert count["Shape"] <= 4


def test_nodes_of_dyn_perceiver_do_not_grow_back():
    first, second, third, last = kinds("dynperceiver_test")
    moving = ("Reshape", "Transpose", "Gather", "Split", "Squeeze", "Unsqueeze", "Concat", "Expand", "Shape", "Slice")
    assert sum(first[kind] for kind in moving) <= 145 and sum(first.values()) <= 337
    assert sum(second[kind] for kind in moving) <= 50 and sum(second.values()) <= 138
    assert sum(third.values()) <= 18 and sum(last.values()) <= 40
    # What engines have a kernel for is one node.
    assert first["LayerNormalization"] == 27 and first["Gelu"] == first["Softmax"] == 9


def test_nodes_of_a_vision_transformer_with_exits_do_not_grow_back():
    segments = kinds("vit")
    for index, count in enumerate(segments):
        # Two blocks each: heads apart (a Reshape, a Transpose), one selection for queries, keys and values, keys turned
        # round, heads together again. The first segment makes tokens of the map and sets the class token before them.
        first, last = index == 0, index == len(segments) - 1
        assert count["Reshape"] == 4 + first and count["Transpose"] == 6 + first and count["Gather"] == 6 + last
        assert (
            count["Slice"] == (not last) and count["Shape"] == count["Expand"] == first
        )  # an exit's mean; one a sample
        assert not count.keys() & {"Squeeze", "Unsqueeze", "Split", "Cast"} and sum(count.values()) <= 62
        assert count["MatMul"] == 12 and count["Gelu"] == count["Softmax"] == 2


class Turned(MultiExit, nn.Module):
    """Slices and changes of order that do nothing, and some of the same shape that do something."""

    num_exits = 1

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, x: Tensor) -> tuple[Tensor, tuple]:
        same = x[:, :].permute(0, 1, 2).unsqueeze(1).view(x.shape[0], 4, 4)
        return (same.flip(2) + same.transpose(1, 2) + same[:, :, 1:].sum(2, keepdim=True)).flatten(1), ()


def test_only_what_does_nothing_is_left_out():
    model, x = Turned().eval(), torch.randn(5, 4, 4)
    (program,) = onnx_segments(model, x)
    count = Counter(node.op_type for node in program.model_proto.graph.node)
    assert (count["Slice"], count["Transpose"], count["Reshape"], count["Unsqueeze"]) == (2, 1, 1, 0)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in (1, 5):
        (found,) = session.run(None, {"leaf_0": x[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model.forward_exit(0, x[:size])[0])


class Attentive(MultiExit, nn.Module):
    """One segment that is one call of attention on heads that are unpacked from one tensor."""

    num_exits = 1

    def __init__(self, mask_size=(6, 6), **how) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("mask", None)
        if how.get("attn_mask") is bool:
            self.mask = torch.rand(mask_size, generator=torch.Generator().manual_seed(1)) > 0.3
        elif how.get("attn_mask") is float:
            self.mask = torch.randn(mask_size, generator=torch.Generator().manual_seed(1))
        self.how = {**how, "attn_mask": self.mask}

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, x: Tensor) -> tuple[Tensor, tuple]:
        q, k, v = x.unflatten(2, (3, 4, 8)).permute(2, 0, 3, 1, 4).unbind(0)
        if self.how.get("enable_gqa"):
            k, v = k[:, :2], v[:, :2]
        attended = F.scaled_dot_product_attention(q, k, v, **self.how)
        return attended.transpose(1, 2).flatten(1), ()


@pytest.mark.parametrize(
    "how",
    [{}, {"scale": 0.3}, {"attn_mask": float}, {"attn_mask": bool}, {"is_causal": True}, {"enable_gqa": True}],
    ids=str,
)
def test_attention_of_every_kind_is_torchs(how):
    model = Attentive(**how).eval()
    x = torch.randn(5, 6, 96)
    (program,) = onnx_segments(model, x)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for size in (1, 5):
        expected, _ = model.forward_exit(0, x[:size])
        (found,) = session.run(None, {"leaf_0": x[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=1e-5)


# OpenVINO takes heads and tokens for each other where there are as many of both and its batch is fixed.
@pytest.mark.parametrize("mask_size", [None, (4, 4), (4, 4, 4)], ids=str)
def test_attention_of_as_many_heads_as_tokens_is_torchs_in_openvino(tmp_path, mask_size):
    pytest.importorskip("openvino")
    model = Attentive(mask_size, attn_mask=float) if mask_size else Attentive()
    x = torch.randn(5, 4, 96)
    (program,) = onnx_segments(model.eval(), x)
    program.save(tmp_path / "segment.onnx")
    session = openvino_session(tmp_path / "segment.onnx", 1, False)
    for size in (1, 5):
        expected, _ = model.forward_exit(0, x[:size])
        (found,) = session([x[:size].numpy()])
        torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-6, rtol=1e-5)
