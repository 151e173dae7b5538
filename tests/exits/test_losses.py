import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from exit_plugins import MultiExitLoss
from exit_plugins.exits.losses import ExitWeights


def naive_loss(outputs, target, ce, kl, smoothing=0.0) -> float:
    """The weighted sum, class by class in numpy; ``target`` are probabilities (B, C)."""
    total = 0.0
    teacher = np.exp(log_softmax(outputs[-1], axis=1))
    target = target * (1 - smoothing) + smoothing / target.shape[1]
    for k, z in enumerate(outputs):
        log_p = log_softmax(z, axis=1)
        total += ce[k] * -(target * log_p).sum(1).mean()
        total += kl[k] * (teacher * (np.log(teacher) - log_p)).sum(1).mean()
    return total


PRESETS = {
    "paper": ([0.3, 0.3, 0.3, 1.0], [0.7, 0.7, 0.7, 0.0]),
    "released": ([0.5, 0.5, 1.0, 1.0], [0.5, 0.5, 0.5, 0.0]),
    "dvt": ([1.0] * 4, [0.0] * 4),
    "chase": ([1.0] * 4, [0.0] * 4),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_presets_equal_their_formulas_for_hard_and_soft_targets(preset, smoothing):
    rng = np.random.default_rng(0)
    outputs = [rng.normal(size=(6, 5)) * 2 for _ in range(4)]
    tensors = tuple(torch.tensor(z) for z in outputs)
    hard = rng.integers(5, size=6)
    soft = rng.dirichlet(np.ones(5), size=6)
    loss = MultiExitLoss(4, preset=preset, alpha=0.3, label_smoothing=smoothing)
    ce, kl = PRESETS[preset]
    expected = naive_loss(outputs, np.eye(5)[hard], ce, kl, smoothing)
    assert loss(tensors, torch.tensor(hard)).item() == pytest.approx(expected, rel=1e-5)
    # Soft targets come smoothed already.
    assert loss(tensors, torch.tensor(soft)).item() == pytest.approx(naive_loss(outputs, soft, ce, kl), rel=1e-5)


def test_no_gradient_reaches_the_teacher_by_distillation():
    outputs = tuple(torch.randn(3, 4, requires_grad=True) for _ in range(2))
    loss = MultiExitLoss(2, weights=ExitWeights(ce=(0.0, 0.0), kl=(1.0, 0.0)))
    loss(outputs, torch.zeros(3, dtype=torch.int64)).backward()
    assert outputs[0].grad.abs().sum() > 0
    assert outputs[1].grad is None


def test_plain_tensor_gets_its_cross_entropy():
    logits, target = torch.randn(5, 3), torch.randint(3, (5,))
    expected = torch.nn.functional.cross_entropy(logits, target)
    assert MultiExitLoss(4)(logits, target).item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_exits=0), "at least 1"),
        (dict(num_exits=2, preset="best"), "unknown loss preset 'best'"),
        (dict(num_exits=2, alpha=2.0), r"alpha must lie in \[0, 1\]"),
        (dict(num_exits=2, label_smoothing=1.0), "label_smoothing"),
        (dict(num_exits=2, weights=ExitWeights((1.0,), (0.0,))), "do not fit 2 exits"),
    ],
)
def test_loss_that_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MultiExitLoss(**arguments)


def test_wrong_number_of_exits_and_of_classes_is_named():
    with pytest.raises(ValueError, match="made for 4 exits and got 3; use MultiExitLoss"):
        MultiExitLoss(4)((torch.zeros(1, 2),) * 3, torch.zeros(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="soft targets"):
        MultiExitLoss(2)((torch.zeros(1, 2),) * 2, torch.zeros(1, 3))
