"""Compiled segments: the same answers, and no compilation after the first batches, by torch's own counters."""

import copy
import pickle
from collections.abc import Iterable

import pytest
import timm
import torch
from small_models import ConvExits, NestedExits, settle
from torch._dynamo.utils import counters

import exit_plugins.timm
from exit_plugins import AdaptiveModel, ExitPolicy, collect_exits
from exit_plugins.exits.compiled import CompiledSegments
from exit_plugins.exits.confidence import confidence

# Every architecture is traced and run; only the small models go through code generation, which takes most of the time.
REGISTERED = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(autouse=True)
def fresh_counters():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def without_codegen(monkeypatch):
    """torch.compile that captures and guards as always, and runs the captured graph as it is."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: compile_(function, backend="eager", **kwargs))


def check_compiled_once(
    model: torch.nn.Module, pool: torch.Tensor, warm_up: Iterable[int], sizes: Iterable[int]
) -> None:
    """Answers equal the eager ones at every batch size, with no compilation after the warm-up."""
    with torch.no_grad():
        sure = confidence(torch.stack(model.forward_exits(pool)))
    ordered = sure.sort(1).values
    policies = [
        ExitPolicy([float(row[k : k + 2].mean()) for row in ordered]) for k in (len(pool) // 3, len(pool) * 2 // 3)
    ]
    nobody = AdaptiveModel(model, ExitPolicy([float("inf")] * len(sure)), compile=True)
    for size in warm_up:
        nobody(pool[:size])
    assert counters["graph_break"] == {}
    warm = graphs()
    assert model.num_exits <= warm <= 3 * model.num_exits
    compiled = []
    for policy in policies:
        adaptive = AdaptiveModel(model, policy, compile=True)
        adaptive.runner = nobody.runner
        compiled.append((adaptive, AdaptiveModel(model, policy)))
    for size in sizes:
        images = pool[torch.arange(size) * 7 % len(pool)]
        for adaptive, eager in compiled:
            out, expected = adaptive(images), eager(images)
            assert torch.equal(out.exit_index, expected.exit_index)
            torch.testing.assert_close(out.logits, expected.logits, atol=1e-4, rtol=0)
    assert graphs() == warm


@pytest.mark.parametrize("kind", [ConvExits, NestedExits])
def test_compiled_once_for_all_batch_sizes(kind):
    torch.manual_seed(0)
    pool = torch.randn(64, 3, 32, 32)
    check_compiled_once(settle(kind(), pool), pool, (1, 2, 64), range(1, 65))


def test_timing_and_evaluating_leave_compiled_segments_in_evaluation(without_codegen):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    model = settle(ConvExits(), images)
    adaptive = AdaptiveModel(model, ExitPolicy([float("inf")] * model.num_exits), compile=True)
    before = adaptive(images)
    adaptive.time_segments(images, repeats=1)
    collect_exits(adaptive.runner, [(images, torch.zeros(8, dtype=torch.int64))], progress=False)
    assert not any(module.training for module in (adaptive, adaptive.runner, *model.modules()))
    torch.testing.assert_close(adaptive(images).logits, before.logits)
    with pytest.raises(RuntimeError, match="only run inference"):
        adaptive.runner.train()


@pytest.mark.parametrize("fuse", [False, True])
def test_copies_compile_their_own_weights_and_new_tensors_are_compiled_anew(fuse, without_codegen):
    torch.manual_seed(0)
    images = torch.randn(8, 3, 32, 32)
    model = settle(ConvExits(), images)
    adaptive = AdaptiveModel(model, ExitPolicy([float("inf")] * 3), compile=True, fuse=fuse)
    before = adaptive(images).logits
    for other in (copy.deepcopy(adaptive), pickle.loads(pickle.dumps(adaptive))):
        with torch.no_grad():
            other.model.heads[2].bias.add_(1)
        torch.testing.assert_close(other(images).logits, before + 1, atol=1e-4, rtol=0)
        assert torch.equal(adaptive(images).logits, before)
    runner = adaptive.runner
    model.load_state_dict({name: value * 2 for name, value in model.state_dict().items()}, assign=True)
    torch.testing.assert_close(adaptive(images).logits, model(images), atol=1e-3, rtol=1e-4)
    assert adaptive.runner is not runner


@pytest.mark.parametrize("name", REGISTERED)
def test_every_architecture_is_captured_once(name, without_codegen):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5)
    pool = torch.randn(8, *model.pretrained_cfg["input_size"])
    check_compiled_once(settle(model, pool), pool, (1, 2), (1, 3, 8))


def test_models_with_many_exits_do_not_use_up_each_others_recompile_limit(without_codegen):
    class Chain(ConvExits):
        num_exits = 12

        def begin_exits(self, x):
            return x.mean((2, 3))

        def forward_exit(self, index, state):
            return state * (index + 1), state + index

    pool = torch.randn(64, 3, 4, 4)
    runner = CompiledSegments(Chain())
    with torch.no_grad():
        for size in (1, 2, 64, 5, 33):
            for mine, expected in zip(
                runner.forward_exits(pool[:size]), Chain().forward_exits(pool[:size]), strict=True
            ):
                torch.testing.assert_close(mine, expected)
    assert graphs() == 24


def test_bad_images_get_the_models_own_message(without_codegen):
    model = timm.create_model("dynperceiver_test", num_classes=5).eval()
    adaptive = AdaptiveModel(model, ExitPolicy([0.5] * 4), compile=True)
    with pytest.raises(ValueError, match="3 channels, got 4"):
        adaptive(torch.randn(2, 4, 64, 64))
    assert adaptive(torch.randn(0, 3, 64, 64)).logits.shape == (0, 5)
