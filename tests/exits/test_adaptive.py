"""AdaptiveModel against running everything and choosing afterwards, for small models and every registered one."""

import copy
import pickle
import warnings

import numpy as np
import pytest
import timm
import torch
from small_models import ConvExits, CountedRows, NestedExits, settle
from torch.utils._pytree import tree_leaves

import exit_plugins.timm
from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits.confidence import confidence
from exit_plugins.exits.costs import SegmentTimes, segment_times
from exit_plugins.exits.protocol import batch_size, select_samples

REGISTERED = [name for name in exit_plugins.timm.list_models(clips=False) if name.endswith("_test")]
SMALL = {"conv": ConvExits, "nested": NestedExits}


def build(name: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """A model whose exits disagree, and 24 images for it."""
    torch.manual_seed(0)
    if name in SMALL:
        model, size = SMALL[name](), (3, 32, 32)
    else:
        model = timm.create_model(name, num_classes=5)
        size = model.pretrained_cfg["input_size"]
    images = torch.randn(24, *size) * torch.rand(24, 1, 1, 1) * 3
    return settle(model, images), images


@pytest.fixture(scope="module", params=[*SMALL, *REGISTERED])
def case(request) -> tuple[torch.nn.Module, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Model, images (24, ...), all logits (K, 24, C) and confidences (K, 24)."""
    model, images = build(request.param)
    with torch.no_grad():
        logits = torch.stack(model.forward_exits(images))
    return model, images, logits, confidence(logits)


def mixes(sure: torch.Tensor) -> dict[str, list[float]]:
    """Thresholds that lie between the samples' confidences, never on one (ties are not what is tested)."""
    ordered = sure.sort(1).values
    between = (ordered[:, 1:] + ordered[:, :-1]) / 2
    early = len(sure) - 1
    return {
        "nobody": [2.0] * early,
        "everybody": [-1.0] * early,
        "half": [float(row[len(row) // 2]) for row in between[:-1]],
        "one": [float(row[-1]) for row in between[:-1]],
        "most": [float(row[3]) for row in between[:-1]],
        "closed": [float("inf")] * (early - 1) + [float(between[-2][4])],
    }


@pytest.mark.parametrize("batch", [1, 5, 24])
def test_equals_choosing_afterwards(case, batch):
    model, images, logits, sure = case
    for name, early in mixes(sure).items():
        adaptive = AdaptiveModel(model, ExitPolicy([*early, 0]))
        expected = torch.tensor(
            [next((k for k, t in enumerate(early) if sure[k, n] >= t), len(early)) for n in range(len(images))]
        )
        with CountedRows(adaptive.runner) as counted:
            parts = [adaptive(chunk) for chunk in images.split(batch)]
        found = torch.cat([p.exit_index for p in parts])
        assert found.tolist() == expected.tolist(), name
        chosen = logits[expected, torch.arange(len(images))]
        torch.testing.assert_close(torch.cat([p.logits for p in parts]), chosen, atol=1e-4, rtol=0)
        torch.testing.assert_close(
            torch.cat([p.confidence for p in parts]), sure[expected, torch.arange(len(images))], atol=1e-4, rtol=0
        )
        # Nothing deeper ran for a sample that had left.
        assert counted.rows == [int((expected >= k).sum()) for k in range(len(sure))], name


def test_the_state_of_some_samples_resumes_at_every_exit(case):
    """Sample independence, the promise compaction stands on."""
    model, images, logits, _ = case
    keep = torch.tensor([7, 2, 11])
    with torch.no_grad():
        state = model.begin_exits(images)
        for index in range(model.num_exits):
            assert batch_size(state) == len(images)
            resumed = select_samples(state, keep)
            for deeper in range(index, model.num_exits):
                out, resumed = model.forward_exit(deeper, resumed)
                torch.testing.assert_close(out, logits[deeper, keep], atol=1e-4, rtol=0)
            _, state = model.forward_exit(index, state)


def test_empty_batch(case):
    model, images, _, sure = case
    adaptive = AdaptiveModel(model, ExitPolicy([0.5] * len(sure)))
    with CountedRows(adaptive.runner) as counted:
        out = adaptive(images[:0])
    assert out.logits.shape == (0, 5) and out.exit_index.shape == out.confidence.shape == (0,)
    assert out.exit_index.dtype == torch.int64 and out.confidence.dtype == torch.float32
    assert counted.rows == [0] * len(sure)


def test_nan_images_go_to_the_last_exit_and_are_reported(case):
    model, images, logits, sure = case
    early = mixes(sure)["everybody"]
    images = images.clone()
    images[3] = float("nan")
    images[9, :, 4, 4] = float("nan")
    with pytest.warns(RuntimeWarning, match="2 of 24 samples have NaN logits"):
        out = AdaptiveModel(model, ExitPolicy([*early, 0]))(images)
    assert out.exit_index.nonzero()[:, 0].tolist() == [3, 9]
    assert (out.exit_index[[3, 9]] == len(sure) - 1).all()
    fine = [n for n in range(24) if n not in (3, 9)]
    torch.testing.assert_close(out.logits[fine], logits[0][fine], atol=1e-4, rtol=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        AdaptiveModel(model, ExitPolicy([*early, 0]))(images[:3])


def test_holds_the_weights_once():
    model, images = build("conv")
    for compile in (False, True):
        adaptive = AdaptiveModel(model, ExitPolicy([0.4, 0.4, 0]), compile=compile)
        assert set(adaptive.state_dict()) == {f"model.{name}" for name in model.state_dict()}
    copied = copy.deepcopy(AdaptiveModel(model, ExitPolicy([0.4, 0.4, 0])))
    assert copied.runner is copied.model is not model
    assert torch.equal(copied(images).exit_index, AdaptiveModel(model, ExitPolicy([0.4, 0.4, 0]))(images).exit_index)


def test_leaves_the_model_as_it_was():
    model, images = build("conv")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    AdaptiveModel(model, ExitPolicy([0.4, 0.4, 0]))(images)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.train()(images)[0].sum().backward()


@pytest.mark.parametrize("measure", ["max_softmax", "entropy", "margin"])
def test_measures_and_temperatures_of_the_policy_are_used(measure):
    model, images = build("nested")
    with torch.no_grad():
        outputs = model.forward_exits(images)
    temperatures = [0.5, 2.0, 1.5, 0.7]
    sure = torch.stack([confidence(z, measure, t) for z, t in zip(outputs, temperatures, strict=True)])
    policy = ExitPolicy([*mixes(sure)["half"], 0], measure=measure, temperatures=temperatures)
    out = AdaptiveModel(model, policy)(images)
    assert out.exit_index.tolist() == policy.choose(sure.numpy()).tolist()
    assert len(out.exit_index.unique()) > 2


def test_a_confidence_on_its_threshold_leaves():
    model, images = build("conv")
    sure = AdaptiveModel(model, ExitPolicy([0, 0, 0]))(images[:1]).confidence
    threshold = np.float32(sure.item())
    assert AdaptiveModel(model, ExitPolicy([threshold, 0, 0]))(images[:1]).exit_index.item() == 0
    above = np.nextafter(threshold, np.float32(2))
    assert AdaptiveModel(model, ExitPolicy([above, 0, 0]))(images[:1]).exit_index.item() == 1


def test_clear_errors():
    model, images = build("conv")
    with pytest.raises(ValueError, match="the policy has 4 thresholds and ConvExits has 3 exits"):
        AdaptiveModel(model, ExitPolicy([0.5] * 4))
    other = ExitPolicy([0.5] * 3, model={"architecture": "other", "num_exits": 3, "num_classes": 5})
    with pytest.raises(ValueError, match="made for architecture other"):
        AdaptiveModel(model, other)
    with pytest.raises(TypeError, match="not a multi-exit model"):
        AdaptiveModel(torch.nn.Linear(2, 2), ExitPolicy([0.5] * 3))
    adaptive = AdaptiveModel(model, ExitPolicy([0.5] * 3))
    with pytest.raises(ValueError, match=r"\(batch, channels, height, width\), got shape \(3, 32, 32\)"):
        adaptive(images[0])
    with pytest.raises(RuntimeError, match="only runs inference"):
        adaptive.train()


class Always:
    """Segment times under which dropping a sample always pays, or never does."""

    def __init__(self, pays: bool) -> None:
        self.answer, self.asked = pays, []

    def pays(self, index: int, rows: int, waiting: int) -> bool:
        self.asked.append((index, rows, waiting))
        return self.answer


@pytest.mark.parametrize("name", list(SMALL))
def test_samples_carried_along_change_nothing(name):
    model, images = build(name)
    with torch.no_grad():
        sure = confidence(torch.stack(model.forward_exits(images)))
    for mix in mixes(sure).values():
        adaptive = AdaptiveModel(model, ExitPolicy([*mix, 0]))
        dropped = adaptive(images)
        adaptive.times = Always(False)
        with CountedRows(model) as counted:
            carried = adaptive(images)
        reached = int(dropped.exit_index.max()) + 1
        assert counted.rows == [24] * reached + [0] * (len(sure) - reached)
        assert torch.equal(carried.exit_index, dropped.exit_index)
        torch.testing.assert_close(carried.logits, dropped.logits, atol=1e-4, rtol=0)
        # It is asked only at exits where somebody left, and never when nobody stays.
        for index, rows, waiting in adaptive.times.asked:
            assert rows == 24 and waiting == int((dropped.exit_index >= index).sum()) > 0
            assert (dropped.exit_index == index - 1).any()


def test_dropping_pays_only_when_it_saves_more_than_the_gather():
    times = SegmentTimes(
        sizes=np.array([1, 8, 16]),
        segment=np.array([[1.0, 8.0, 16.0], [5.0, 5.0, 5.0], [1.0, 8.0, 16.0]]),
        gather=np.array([[0.0, 0.0, 0.0], [0.1, 0.1, 0.1], [1.5, 1.5, 3.0]]),
    )
    assert not times.pays(1, 16, 2)  # the segment takes the same for any batch
    assert times.pays(2, 16, 8)  # 8 saved for 1.5
    assert not times.pays(2, 9, 8)  # 1 saved for 1.5
    assert times.pays(2, 160, 150) is False and times.pays(2, 160, 100) is True  # in proportion beyond 16


def test_measured_times_are_of_every_segment_and_size():
    model, images = build("nested")
    with CountedRows(model) as counted:
        times = segment_times(model, images, repeats=2, warmup=1)
    assert times.sizes.tolist() == [1, 6, 12, 18, 24]
    assert times.segment.shape == times.gather.shape == (4, 5)
    assert (times.segment > 0).all() and (times.gather[1:] > 0).all() and (times.gather[0] == 0).all()
    assert counted.rows == [3 * (1 + 6 + 12 + 18 + 24)] * 4
    adaptive = AdaptiveModel(model, ExitPolicy([0.5] * 4))
    adaptive.time_segments(images, repeats=1)
    assert adaptive.times.segment.shape == (4, 5)
    with pytest.raises(ValueError, match="images"):
        segment_times(model, images[:0])


def test_dropping_keeps_every_leaf_in_its_memory_layout():
    index = torch.tensor([3, 0])
    channels_last = torch.randn(4, 6, 5, 7).to(memory_format=torch.channels_last)
    tokens = torch.randn(4, 6, 35).transpose(1, 2)
    state = {"map": channels_last, "list": [tokens, torch.randn(1, 3).expand(4, -1), torch.randn(4)]}
    chosen = select_samples(state, index)
    assert chosen["map"].is_contiguous(memory_format=torch.channels_last) and chosen["list"][0].mT.is_contiguous()
    for mine, whole in zip(tree_leaves(chosen), tree_leaves(state), strict=True):
        assert torch.equal(mine, whole[[3, 0]])


def test_an_inference_copy_answers_alike_and_leaves_the_model_trainable(case):
    model, images, logits, sure = case
    early = mixes(sure)["half"]
    before = {name: (value.clone(), value.stride()) for name, value in model.state_dict().items()}
    fused = AdaptiveModel(model, ExitPolicy([*early, 0]), fuse=True)
    out, plain = fused(images), AdaptiveModel(model, ExitPolicy([*early, 0]), fuse=False)(images)
    assert torch.equal(out.exit_index, plain.exit_index)
    torch.testing.assert_close(out.logits, plain.logits, atol=1e-4, rtol=0)
    assert fused.model is model and fused.runner is not model
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name][0]) and value.stride() == before[name][1], name
    model.train()(images)[0].sum().backward()
    model.eval().zero_grad()
    model.load_state_dict({name: value for name, (value, _) in before.items()})


def test_models_with_a_form_for_inference_run_in_it(case):
    model, images, _, sure = case
    has_form = hasattr(model, "fuse")
    policy = ExitPolicy([*mixes(sure)["half"], 0])
    adaptive, plain = AdaptiveModel(model, policy), AdaptiveModel(model, policy, fuse=False)
    assert adaptive.model is model and (adaptive.runner is not model) == has_form and plain.runner is model
    assert adaptive.state_dict().keys() == plain.state_dict().keys()
    out, expected = adaptive(images), plain(images)
    assert torch.equal(out.exit_index, expected.exit_index)
    torch.testing.assert_close(out.logits, expected.logits, atol=1e-5, rtol=1e-5)


CHANGES = {
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "an optimiser's step": lambda model, other: [p.sub_(p.grad) for p in model.parameters() if p.grad is not None],
    "running statistics": lambda model, other: model.train()(torch.randn(8, 3, 64, 64)) and model.eval(),
    "another type": lambda model, other: model.double(),
    "new heads": lambda model, other: model.reset_classifier(7),
}


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_change_later_are_those_that_answer(change):
    torch.manual_seed(0)
    model, other = (timm.create_model("dynperceiver_test", num_classes=5).eval() for _ in range(2))
    images = torch.randn(6, 3, 64, 64)
    adaptive = AdaptiveModel(model, ExitPolicy([float("inf")] * 4))
    before, form = adaptive(images), adaptive.runner
    assert torch.equal(adaptive(images).logits, before.logits) and adaptive.runner is form  # nothing changed: no copy
    torch.stack(model.forward_exits(images)).sum().backward()
    with torch.no_grad():
        CHANGES[change](model, other)
        expected = model(images.to(next(model.parameters()).dtype))
    assert (
        expected.dtype != before.logits.dtype
        or expected.shape != before.logits.shape
        or not torch.allclose(expected.float(), before.logits, atol=1e-3)
    )
    torch.testing.assert_close(adaptive(images).logits, expected, atol=1e-5, rtol=1e-5)
    # What no counter sees has to be said.
    model.heads[-1].fc.bias.data.add_(1.0)
    adaptive.refresh()
    torch.testing.assert_close(adaptive(images).logits, expected + 1.0, atol=1e-5, rtol=1e-5)


def test_tensors_put_in_place_of_others_are_those_that_answer():
    model, images = build("conv")
    adaptive = AdaptiveModel(model, ExitPolicy([2.0, 2.0, 0]), fuse=True)
    for change in (
        lambda: model.load_state_dict({k: v * 2 for k, v in model.state_dict().items()}, assign=True),
        lambda: setattr(model.stages[0][1], "running_mean", torch.ones(8)),
        lambda: setattr(model.heads[2], "bias", torch.nn.Parameter(torch.ones(5))),
        lambda: setattr(model.heads[2], "bias", torch.nn.Parameter(model.heads[2].bias.data.add_(1))),  # same address
    ):
        before = adaptive(images).logits
        change()
        with torch.no_grad():
            expected = model(images)
        assert not torch.allclose(expected, before, atol=1e-2)
        torch.testing.assert_close(adaptive(images).logits, expected, atol=1e-4, rtol=1e-5)
        form = adaptive.runner
        assert adaptive(images) and adaptive.runner is form


@pytest.mark.parametrize("part", ["all of it", "a norm"])
def test_a_model_in_training_mode_answers_in_evaluation_or_not_at_all(part):
    model, images = build("conv")
    policy = ExitPolicy([2.0, 2.0, 0])
    itself, copied = AdaptiveModel(model, policy, fuse=False), AdaptiveModel(model, policy, fuse=True)
    expected, state = itself(images).logits, copy.deepcopy(model.state_dict())
    (model if part == "all of it" else model.stages[1][1]).train()
    for batch in (images, images[:1]):
        with pytest.raises(RuntimeError, match="in training mode.*call eval"):
            itself(batch)
    torch.testing.assert_close(copied(images).logits, expected, atol=1e-4, rtol=0)
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    itself.eval()
    assert torch.equal(itself(images).logits, expected)


@pytest.mark.parametrize("fuse", [False, True])
def test_copies_and_pickles_run_their_own_weights(fuse):
    model, images = build("conv")
    adaptive = AdaptiveModel(model, ExitPolicy([2.0, 2.0, 0]), fuse=fuse)
    for other in (copy.deepcopy(adaptive), pickle.loads(pickle.dumps(adaptive))):
        assert torch.equal(other(images).logits, adaptive(images).logits)
        with torch.no_grad():
            other.model.heads[2].bias.add_(1)
        torch.testing.assert_close(other(images).logits, adaptive(images).logits + 1, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_model_built_under_inference_mode_runs_in_its_form_too():
    torch.manual_seed(0)
    model, images = timm.create_model("dynperceiver_test", num_classes=5).eval(), torch.randn(6, 3, 64, 64)
    adaptive = AdaptiveModel(model, ExitPolicy([float("inf")] * 4))
    assert adaptive.runner is not model
    expected = model(images)
    torch.testing.assert_close(adaptive(images).logits, expected, atol=1e-5, rtol=1e-5)
    model.heads[-1].fc.bias.add_(1.0)
    adaptive.refresh()
    torch.testing.assert_close(adaptive(images).logits, expected + 1.0, atol=1e-5, rtol=1e-5)
    with torch.inference_mode(False):  # its parameters forget what they are made of
        model.to(memory_format=torch.channels_last)
    adaptive = AdaptiveModel(model, adaptive.policy)
    torch.testing.assert_close(adaptive(images).logits, expected + 1.0, atol=1e-5, rtol=1e-5)


def test_mixed_precision_and_other_weights(case):
    model, images, logits, sure = case
    nobody = ExitPolicy([float("inf")] * len(sure))
    half = AdaptiveModel(model, nobody, dtype=torch.bfloat16)(images)
    assert half.logits.dtype == half.confidence.dtype == torch.float32
    assert not torch.equal(half.logits, logits[-1])  # it did run in less
    scale = logits[-1].abs().max()
    torch.testing.assert_close(half.logits / scale, logits[-1] / scale, atol=0.1, rtol=0)
    double = AdaptiveModel(copy.deepcopy(model).double(), nobody)(images)
    assert double.logits.dtype == torch.float64 and double.confidence.dtype == torch.float32
    torch.testing.assert_close(double.logits.float(), logits[-1], atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="bfloat16 or torch.float16"):
        AdaptiveModel(model, nobody, dtype=torch.int8)
    with pytest.raises(ValueError, match="normalised to floating point"):
        AdaptiveModel(model, nobody)(images.to(torch.uint8))
