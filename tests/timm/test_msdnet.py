import copy
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from multiscale import layer_counts, random_config, stated_reads, watched_reads
from torch import nn

from exit_plugins import AdaptiveModel, ExitPolicy, exit_costs
from exit_plugins.timm._scale_plan import plan_layers
from exit_plugins.timm.msdnet import MSDNet, checkpoint_filter_fn

GOLDEN = Path(__file__).parents[1] / "golden" / "msdnet"

# Figures of the public implementation: its own count per exit, pure MACs (conv + fc) per exit, both in millions, and
# the number of parameters in millions.
TABLE = {
    "msdnet_cifar_anytime": (
        [15.14, 25.51, 37.10, 46.33, 57.34, 66.96, 75.94],
        [14.97, 25.26, 36.78, 45.97, 56.93, 66.53, 75.49],
        3.068,
    ),
    "msdnet_cifar_batch": ([6.86, 14.35, 27.54, 41.71, 58.48], [6.79, 14.21, 27.28, 41.37, 58.09], 2.079),
    "msdnet_step4": (
        [339.90, 685.46, 1008.16, 1254.47, 1360.53],
        [337.21, 681.65, 1003.66, 1249.63, 1355.61],
        23.96,
    ),
    "msdnet_step6": ([514.66, 1171.18, 1844.52, 2501.40, 2742.06], None, 56.53),
    "msdnet_step7": (
        [615.69, 1436.39, 2283.21, 2967.42, 3253.79],
        [612.03, 1430.81, 2276.39, 2959.94, 3246.18],
        62.31,
    ),
}
SMALL = dict(form="cifar", num_classes=5, head_width=16)


def golden_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """A tensor of the golden model, which is computed from its name (tests/golden/msdnet/RULE.md)."""
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if key.endswith("running_mean"):
        z = np.float32(0.05) * z
    elif key.endswith("running_var"):
        z = 1 + np.float32(0.1) * np.abs(z)
    elif len(shape) >= 2:
        z = z / np.float32(np.sqrt(np.prod(shape[1:])))
    else:
        z = np.float32(0.02) * z if key.endswith("bias") else 1 + np.float32(0.05) * z
    return torch.from_numpy(z)


@pytest.fixture(scope="module")
def public_state() -> dict[str, torch.Tensor]:
    shapes = json.loads((GOLDEN / "msdnet_cifar100_batch5.json").read_text())["shapes"]
    return {key: golden_tensor(key, shape) for key, shape in shapes.items()}


# --- the public implementation -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["", "module."])
def test_public_checkpoint_gives_the_public_logits(public_state, prefix, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save({"epoch": 1, "state_dict": {prefix + k: v for k, v in public_state.items()}}, file)
    model = timm.create_model("msdnet_cifar_batch", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))
    x = np.random.Generator(np.random.PCG64(7)).standard_normal((2, 3, 32, 32), dtype=np.float32)
    exits = model.eval().forward_exits(torch.from_numpy(x))
    golden = np.load(GOLDEN / "msdnet_cifar100_batch5.npz")
    assert len(exits) == 5
    for index, logits in enumerate(exits):
        np.testing.assert_allclose(logits, golden[f"exit{index}"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(logits, golden[f"exit{index}_f64"], rtol=0, atol=2e-6)
    fused = copy.deepcopy(model).fuse()
    assert not [m for m in fused.modules() if isinstance(m, nn.BatchNorm2d)]
    for before, after in zip(exits, fused.forward_exits(torch.from_numpy(x)), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=2e-6)


def test_public_imagenet_keys_are_this_model():
    shapes = json.loads((GOLDEN / "msdnet_imagenet_step4.keys.json").read_text())["shapes"]
    model = timm.create_model("msdnet_step4", device="meta")
    state = checkpoint_filter_fn({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, model)
    ours = {key: value.shape for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert {key: value.shape for key, value in state.items()} == ours


@torch.no_grad()
def test_bias_of_the_public_imagenet_stem_is_absorbed():
    shapes = json.loads((GOLDEN / "msdnet_imagenet_step4.keys.json").read_text())["shapes"]
    prefix = "blocks.0.0.layers.0."
    public = {key: golden_tensor(key, shape) for key, shape in shapes.items() if key.startswith(prefix)}
    conv, norm = nn.Conv2d(3, 32, 7, 2, 3), nn.BatchNorm2d(32)
    conv.load_state_dict({key: public[f"{prefix}0.{key}"] for key in ("weight", "bias")})
    norm.load_state_dict({key: public[f"{prefix}1.{key}"] for key in norm.state_dict() if key != "num_batches_tracked"})
    model = timm.create_model("msdnet_step4").eval()
    model.load_state_dict(checkpoint_filter_fn(public, model), strict=False)
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model.stem.finest[0](x), norm.eval()(conv(x)).relu())


@pytest.mark.parametrize("blocks", [1, 2])
def test_public_keys_without_bottlenecks(blocks):
    units = {
        "blocks.0.0.layers.0.net": "stem.finest.0",
        "blocks.0.0.layers.1.net": "stem.coarser.0",
        "blocks.0.1.layers.0.conv_normal.net": "layers.0.scales.0.normal.conv",
        "blocks.0.1.layers.1.conv_down.net": "layers.0.scales.1.down.conv",
        "blocks.0.1.layers.1.conv_normal.net": "layers.0.scales.1.normal.conv",
        "classifier.0.m.0.net": "heads.0.convs.0",
        "classifier.0.m.1.net": "heads.0.convs.1",
    }
    if blocks == 2:
        units |= {
            "blocks.1.0.layers.0.conv_down.net": "layers.1.scales.1.down.conv",
            "blocks.1.0.layers.0.conv_normal.net": "layers.1.scales.1.normal.conv",
            "blocks.1.1.m.0.net": "layers.1.scales.1.transition",
            "classifier.1.m.0.net": "heads.1.convs.0",
            "classifier.1.m.1.net": "heads.1.convs.1",
        }
    names = {f"{public}.0.weight": f"{ours}.conv.weight" for public, ours in units.items()}
    for name in ("weight", "bias", "running_mean", "running_var"):
        names |= {f"{public}.1.{name}": f"{ours}.bn.{name}" for public, ours in units.items()}
    for exit_index in range(blocks):
        for name in ("weight", "bias"):
            names[f"classifier.{exit_index}.linear.{name}"] = f"heads.{exit_index}.classifier.fc.{name}"
    config = dict(blocks=blocks, base=1, step=1, width=8, growth=4, growth_factors=(1, 2), bottleneck=False)
    model = MSDNet(**SMALL, **config)
    renamed = checkpoint_filter_fn({key: torch.tensor(i) for i, key in enumerate(names)}, model)
    if blocks == 1:
        # Nothing reads the finest scale behind the last layer: this package leaves out what is there for nothing.
        names = {key: ours for key, ours in names.items() if not ours.startswith("layers.0.scales.0")}
    assert set(renamed) == set(names.values())
    assert set(renamed) == {key for key in model.state_dict() if not key.endswith("num_batches_tracked")}


def test_other_class_count_keeps_the_rest_of_a_public_checkpoint(public_state, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(public_state, file)
    overlay = dict(file=str(file))
    model = timm.create_model("msdnet_cifar_batch", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7)
    assert model.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    torch.testing.assert_close(model.stem.finest[0].conv.weight, public_state["blocks.0.0.layers.0.net.0.weight"])


def test_checkpoint_of_another_configuration_is_refused(public_state, tmp_path):
    file = tmp_path / "checkpoint.pth"
    torch.save(public_state, file)
    with pytest.raises(RuntimeError, match=r"Missing key|size mismatch|Unexpected key"):
        timm.create_model("msdnet_cifar_anytime", pretrained=True, pretrained_cfg_overlay=dict(file=str(file)))


@pytest.mark.parametrize("name", TABLE)
def test_costs_of_every_exit(name):
    official, pure, params = TABLE[name]
    model = timm.create_model(name, device="meta").eval()
    size = model.default_cfg["input_size"]
    costs = exit_costs(model, size)
    if pure:
        np.testing.assert_allclose(costs.macs / 1e6, pure, rtol=1e-3)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=6e-3 if params > 9 else 6e-4)
    assert costs.params[-1] == sum(p.numel() for p in model.parameters())

    # The public implementation's own count, written out: what it adds to the convolutions' MACs.
    total = 0

    def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(module, nn.Conv2d):
            total += output.numel() * module.in_channels * math.prod(module.kernel_size)
        elif isinstance(module, nn.Linear):
            total += module.weight.numel() + module.bias.numel()
        elif isinstance(module, nn.ReLU):
            total += output.numel()
        elif isinstance(module, nn.MaxPool2d):
            total += 9 * output.numel()
        elif isinstance(module, timm.layers.SelectAdaptivePool2d):
            total += args[0].numel()

    for module in model.modules():
        module.register_forward_hook(count)
    counted = []
    with torch.no_grad():
        state = model.begin_exits(torch.empty(1, *size, device="meta"))
        for index in range(model.num_exits):
            _, state = model.forward_exit(index, state)
            counted.append(total / 1e6)
    np.testing.assert_allclose(counted, official, rtol=0, atol=0.006)


# --- structure -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_every_function_reads_what_the_paper_says(seed):
    config = random_config(seed)
    stated = stated_reads(config, new_finer=False)
    seen = watched_reads(MSDNet(**SMALL, **config), size=32)
    assert seen.h == stated.h
    assert seen.f == stated.f
    assert seen.heads == stated.heads


@pytest.mark.parametrize(
    "options",
    [
        dict(prune="min"),
        dict(prune="min", step_mode="lin_grow", reduction=0.7),
        dict(reduction=0),
        dict(bottleneck=False),
        dict(bottleneck_factors=(1, 1, 2)),
        dict(growth_factors=(1, 2, 4, 8), base=1),
        dict(base=1, step=1, blocks=2),
        dict(growth_factors=(1,), step_mode="lin_grow"),
    ],
    ids=str,
)
def test_nothing_is_there_for_nothing(options):
    config = dict(blocks=3, base=2, step=2, width=8, growth=4, growth_factors=(1, 2, 4)) | options
    model = MSDNet(**SMALL, **config).double()
    assert len(model.layers) == layer_counts(dict(config, step_mode=config.get("step_mode", "even")))[-1]
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    exits = model(x)
    sum(logits.square().sum() for logits in exits).backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    # Each map handed on is read by something behind it.
    model.eval()
    state = model.begin_exits(x)
    for index in range(model.num_exits):
        state = [leaf.detach().requires_grad_() for leaf in state]
        later, rest = [], state
        for deeper in range(index, model.num_exits):
            logits, rest = model.forward_exit(deeper, rest)
            later.append(logits.square().sum())
        gradients = torch.autograd.grad(sum(later), state)
        assert all(gradient.abs().sum() > 0 for gradient in gradients)
        _, state = model.forward_exit(index, state)
    assert state == []


def test_pruning_min_keeps_a_scale_as_long_as_the_last_exit_can_read_it():
    plans = plan_layers(9, 3, 8, 4, prune="min")
    assert [plan.returns for plan in plans] == [(0, 1, 2)] * 7 + [(1, 2), (2,)]
    assert [layer for layer, plan in enumerate(plans, start=1) if plan.transition] == [3, 6]
    assert [plan.out_width for plan in plans] == [12, 16, 10, 14, 18, 11, 15, 19, 23]


@torch.no_grad()
def test_pruned_features_are_the_features():
    model = MSDNet(**SMALL, blocks=3, base=2, step=2, width=8, growth=4, growth_factors=(1, 2, 4)).eval()
    x = torch.randn(2, 3, 32, 32)
    maps = model.forward_intermediates(x, intermediates_only=True)
    for indices in ([0], [1], [2], [0, 2]):
        pruned = copy.deepcopy(model)
        assert pruned.prune_intermediate_layers(indices) == indices
        torch.testing.assert_close(
            pruned.forward_intermediates(x, indices=indices, intermediates_only=True), [maps[i] for i in indices]
        )
        pruned.reset_classifier(4, "avg")
        assert pruned(x).shape == (2, 4) and pruned.num_exits == len(pruned.train()(x)) == 1
        trained = copy.deepcopy(pruned)
        with torch.enable_grad():
            sum(m.sum() for m in trained.forward_intermediates(x, indices=indices, intermediates_only=True)).backward()
        assert {n for n, p in trained.named_parameters() if p.grad is None} <= {
            n for n, _ in trained.named_parameters() if n.startswith("heads.")
        }
        lost = [i for i in range(3) if i not in indices]
        with pytest.raises(ValueError, match="pruned"):
            pruned.forward_intermediates(x, indices=lost)


@torch.no_grad()
def test_finished_samples_cost_nothing_and_answers_stay():
    model = timm.create_model("msdnet_test").eval()
    x = torch.randn(6, 3, 32, 32)
    exits = model.forward_exits(x)
    sure = exits[0].softmax(-1).amax(-1)
    threshold = float(sure.sort().values[2:4].mean())  # between two of them, so that no rounding decides
    out = AdaptiveModel(model, ExitPolicy(thresholds=[threshold, math.inf, -math.inf]))(x)
    assert out.exit_index.tolist() == [0 if s >= threshold else 2 for s in sure.tolist()]
    for row, index in enumerate(out.exit_index.tolist()):
        torch.testing.assert_close(out.logits[row], exits[index][row], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [
        dict(form="mnist"),
        dict(step_mode="odd"),
        dict(prune="some"),
        dict(blocks=0),
        dict(growth=3),
        dict(growth_factors=()),
        dict(bottleneck_factors=(1, 2)),
        dict(reduction=1e-3),
    ],
    ids=str,
)
def test_configurations_that_cannot_be_built(wrong):
    arguments = SMALL | dict(blocks=3, base=2, step=2, width=8, growth=4, growth_factors=(1, 1, 1)) | wrong
    with pytest.raises(ValueError, match=next(iter(wrong)) if "form" not in wrong else "form"):
        MSDNet(**arguments)


def test_an_exit_that_is_not_there():
    model = timm.create_model("msdnet_test")
    with pytest.raises(IndexError, match="exits 0 to 2"):
        model.forward_exit(3, model.begin_exits(torch.zeros(2, 3, 32, 32)))
    with pytest.raises(ValueError, match="in_chans=1"):
        model(torch.zeros(2, 1, 32, 32))
