"""AdaptiveModel against running everything and choosing afterwards, for small models and every registered one."""

import warnings

import numpy as np
import pytest
import timm
import torch
from small_models import ConvExits, CountedRows, NestedExits, settle

import exit_plugins.timm
from exit_plugins import AdaptiveModel, ExitPolicy
from exit_plugins.exits import confidence

REGISTERED = [name for name in exit_plugins.timm.list_models() if name.endswith("_test")]
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
        with CountedRows(model) as counted:
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
    from exit_plugins.exits.protocol import batch_size, select_samples

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
    with CountedRows(model) as counted:
        out = AdaptiveModel(model, ExitPolicy([0.5] * len(sure)))(images[:0])
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
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got shape \(3, 32, 32\)"):
        adaptive(images[0])
    with pytest.raises(RuntimeError, match="only runs inference"):
        adaptive.train()
