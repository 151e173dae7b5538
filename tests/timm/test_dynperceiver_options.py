"""The ablations of Dyn-Perceiver's tables 2 and 3: what each option takes away, counted from its formulas."""

import copy
import re
from functools import cache
from typing import NamedTuple

import pytest
import timm
import torch
from options import check_compiled, check_option
from torch import nn

from exit_plugins import exit_costs
from exit_plugins.timm.dynperceiver import checkpoint_filter_fn

NAME = "dynperceiver_regnety_400mf"  # the network of the paper's ablations
C = (32, 48, 104, 208, 440)
SIDES = (112, 56, 28, 14, 7)  # of the map entering each stage, and of the last
LATENTS, DEPTHS, CLASSES = 128, (6, 6, 9, 9), 1000


class Cost(NamedTuple):
    """Parameters and multiply-accumulates."""

    params: int = 0
    macs: int = 0

    def __add__(self, other):
        return Cost(self.params + other.params, self.macs + other.macs)

    def __neg__(self):
        return Cost(-self.params, -self.macs)

    def __sub__(self, other):
        return self + -other


def linear(inputs: int, outputs: int, rows: int = 1, bias: bool = True) -> Cost:
    return Cost(inputs * outputs + bias * outputs, rows * inputs * outputs)


def norm(width: int) -> Cost:
    return Cost(2 * width)


def total(parts) -> Cost:
    return sum(parts, Cost())


def cross(query: int, width: int, attn: int, queries: int, tokens: int, positions: int = 0) -> Cost:
    """Cross-attention of ``queries`` x ``query`` to ``tokens`` x ``width``, and its MLP of one hidden width."""
    projections = linear(query, attn, queries, bias=False) + linear(width, 2 * attn, tokens, bias=False)
    mlp = linear(query, query, queries) + linear(query, query, queries)
    products = Cost(positions * attn, 2 * queries * tokens * attn)
    norms = norm(query) + norm(width) + norm(query)
    return norms + projections + products + linear(attn, query, queries) + mlp


def self_attention(width: int, tokens: int, ratio: int = 4) -> Cost:
    projections = linear(width, 3 * width, tokens, bias=False) + linear(width, width, tokens)
    mlp = linear(width, ratio * width, tokens) + linear(ratio * width, width, tokens)
    return norm(width) + norm(width) + projections + Cost(0, 2 * tokens * tokens * width) + mlp


def x2z(stage: int, width: int, tokens: int) -> Cost:
    return cross(width, C[stage], width, tokens, 49, positions=49)


def grid(stage: int) -> Cost:
    return Cost(50 * C[stage], 49 * C[stage] * SIDES[stage] ** 2)


def z2x(stage: int, width: int, tokens: int) -> Cost:
    return cross(C[stage + 1], width, C[stage + 1] // 8, SIDES[stage + 1] ** 2, tokens)


def mixer(stage: int) -> Cost:
    tokens = LATENTS >> stage
    down = norm(tokens) + linear(tokens, tokens // 2, C[stage])
    return down + norm(C[stage]) + linear(C[stage], C[stage + 1], tokens // 2)


def transfer(width: int = C[3]) -> Cost:
    return linear(CLASSES, width) + norm(width)


def latents(mixed: bool) -> Cost:
    """Everything the latents pass through and are read by."""
    cost = Cost(LATENTS * C[0])
    for stage, depth in enumerate(DEPTHS):
        width, tokens = (C[stage], LATENTS >> stage) if mixed else (C[0], LATENTS)
        out, left = (C[min(stage + 1, 3)], LATENTS >> min(stage + 1, 3)) if mixed else (C[0], LATENTS)
        cost += grid(stage) + x2z(stage, width, tokens) + z2x(stage, out, left)
        cost += total(self_attention(width, tokens) for _ in range(depth))
        if mixed and stage < 3:
            cost += mixer(stage)
    return cost


def heads(widths: tuple[int, ...]) -> Cost:
    return total(linear(width, CLASSES) for width in widths)


HEADS = heads((C[2], 2 * C[3], C[4], C[4] + 2 * C[3])) + norm(C[4] + 2 * C[3]) + transfer() + transfer()
PLAIN_LAST = heads((C[4] + C[3],)) + norm(C[4] + C[3])

# What each option adds to the whole network.
CHANGES = {
    "x2z": (dict(x2z=False), -total(grid(s) + x2z(s, C[s], LATENTS >> s) for s in (1, 2, 3))),
    "grid_conv": (dict(grid_conv=False), -total(grid(s) for s in range(4))),
    "z2x": (dict(z2x=False), -total(z2x(s, C[min(s + 1, 3)], LATENTS >> min(s + 1, 3)) for s in range(4))),
    "fkt": (dict(fkt=False), heads((C[2], C[3], C[4])) + PLAIN_LAST - HEADS),
    "token_mixer": (
        dict(token_mixer=False),
        latents(False)
        - latents(True)
        + heads((C[0], 2 * C[0], C[4], C[4] + 2 * C[0]))
        + norm(C[4] + 2 * C[0])
        + transfer(C[0])
        + transfer(C[0])
        - HEADS,
    ),
    "feature": (
        dict(early_exits="feature"),
        heads((C[3], C[4], C[4] + 2 * C[3])) + norm(C[4] + 2 * C[3]) + transfer() - HEADS,
    ),
    "none": (dict(early_exits="none"), PLAIN_LAST - HEADS),
    "convolutions": (dict(latent_branch=False), heads((C[3], C[4])) - latents(True) - HEADS),
    "convolutions, one exit": (dict(latent_branch=False, early_exits="none"), heads((C[4],)) - latents(True) - HEADS),
}


@cache
def cost(**options) -> Cost:
    model = timm.create_model(NAME, device="meta", **options)
    return Cost(sum(p.numel() for p in model.parameters()), int(exit_costs(model, (3, 224, 224)).macs[-1]))


@pytest.mark.parametrize("option", CHANGES)
def test_parameters_and_macs_change_as_they_must(option):
    options, change = CHANGES[option]
    assert cost(**options) == cost() + change


ALL_OFF = dict(x2z=False, grid_conv=False, z2x=False, fkt=False, token_mixer=False)
OPTIONS = [options for options, _ in CHANGES.values()] + [ALL_OFF]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_trains_in_every_form(options, tmp_path):
    model = check_option("dynperceiver_test", options)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_exits(x)
        torch.testing.assert_close(copy.deepcopy(model).fuse().forward_exits(x), expected, rtol=1e-4, atol=1e-5)
        scripted = torch.jit.script(model)
        torch.testing.assert_close(scripted(x), expected[-1], rtol=1e-4, atol=1e-5)
        features = model.forward_features(x)
        torch.testing.assert_close(model.forward_intermediates(x)[0], features)
        assert model.forward_head(features, pre_logits=True).shape == (3, model.num_features)
    # timm's name for what depends on the number of classes.
    names = {
        key
        for key, module in model.named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(r"(heads|transfers)\.\d\.fc", key)
    }
    assert set(model.pretrained_cfg["classifier"]) == names
    # Its own weights load again, and another number of classes keeps all but the heads.
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    overlay = dict(file=str(tmp_path / "weights.pth"))
    again = timm.create_model(
        "dynperceiver_test", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=7, **options
    )
    kept = {key: value for key, value in model.state_dict().items() if not key.startswith(("heads", "transfers"))}
    assert all(again.state_dict()[key].equal(value) for key, value in kept.items())
    model.reset_classifier(0)
    assert [logits.ndim for logits in model.forward_exits(x)] == [2] * model.num_exits


@pytest.mark.parametrize(
    "options",
    [
        ALL_OFF | dict(early_exits="feature"),
        dict(early_exits="feature"),
        dict(early_exits="none"),
        dict(latent_branch=False),
    ],
    ids=str,
)
def test_segments_of_options_compile_and_export(options):
    check_compiled(timm.create_model("dynperceiver_test", num_classes=5, **options).eval())


@pytest.mark.parametrize("family", ["resnet50_0_375x", "mobilenetv3_0_75x"])
def test_options_in_the_other_families(family):
    for options in (ALL_OFF, dict(early_exits="feature"), dict(latent_branch=False, early_exits="none")):
        model = timm.create_model(f"dynperceiver_{family}", device="meta", latent_depths=(1, 1, 1, 1), **options)
        exits = model.forward_exits(torch.empty(2, 3, 64, 64, device="meta"))
        assert [logits.shape for logits in exits] == [(2, 1000)] * model.num_exits


@torch.no_grad()
def test_the_convolutional_branch_alone_is_timms_regnet():
    theirs = timm.create_model("regnety_004", num_classes=7).double().eval()
    ours = timm.create_model(NAME, num_classes=7, latent_branch=False, early_exits="none").double().eval()
    renamed = {}
    for key, value in theirs.state_dict().items():
        if key.startswith("s"):
            stage, _, rest = key.partition(".")
            if stage != "stem":
                block, _, rest = rest.partition(".")
                key = f"stages.{int(stage[1:]) - 1}.blocks.{int(block[1:]) - 1}.{rest}"
        renamed[key.replace("head.fc", "heads.0.fc")] = value
    ours.load_state_dict(renamed)
    x = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    (logits,) = ours.forward_exits(x)
    torch.testing.assert_close(logits, theirs(x))


def reached(model: nn.Module, exit: int) -> set[str]:
    """The parts with a parameter that the logits of ``exit`` depend on."""
    parameters = dict(model.named_parameters())
    logits = model.forward_exits(torch.randn(2, 3, 64, 64))[exit]
    gradients = torch.autograd.grad(logits.square().sum(), parameters.values(), allow_unused=True)
    names = [key for key, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    return {".".join(key.split(".")[: 3 if key.startswith("stages") else 1]) for key in names}


def test_what_the_exits_depend_on():
    def make(**options) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model("dynperceiver_test", num_classes=5, **options)

    # The first X2Z stays; what it reads is the stem's map.
    seen = reached(make(x2z=False, z2x=False), 0)
    assert {"stages.0.x2z", "stages.0.grid", "stem"} <= seen
    assert not {part for part in seen if part.endswith((".blocks", ".z2x")) or part == "stages.1.x2z"}
    # Without Z2X the map knows nothing of the latents, at its exit.
    assert "latent" not in reached(make(z2x=False), 2) and "latent" in reached(make(), 2)
    # Exits in the feature branch read the map behind the stages' convolutions, before the next X2Z and this Z2X.
    model = make(early_exits="feature")
    for exit, stage in ((0, 2), (1, 3)):
        seen = reached(model, exit)
        assert f"stages.{stage}.blocks" in seen and "latent" in seen
        assert not {f"stages.{stage}.self_attn", f"stages.{stage}.z2x", "transfers"} & seen
    assert {"transfers", "stages.3.self_attn", "stages.3.z2x"} <= reached(model, 2)
    assert "transfers" not in reached(make(fkt=False), 1) and "transfers" in reached(make(), 1)
    # The latents keep their number and width.
    state = make(token_mixer=False).eval().forward_exit(0, (torch.randn(2, 3, 64, 64),))[1]
    assert state[1].shape == (2, 32, 16)


def test_states_hold_what_is_still_read():
    def leaves(**options) -> list[int]:
        model = timm.create_model("dynperceiver_test", num_classes=5, **options).eval()
        state, count = model.begin_exits(torch.randn(2, 3, 64, 64)), []
        for index in range(model.num_exits):
            _, state = model.forward_exit(index, state)
            count.append(len(state))
        return count

    assert leaves() == [3, 3, 3, 0]
    assert leaves(fkt=False) == [2, 2, 2, 0]
    assert leaves(early_exits="feature") == [3, 3, 0]
    assert leaves(early_exits="none") == [0]
    assert leaves(latent_branch=False) == [1, 0]


def test_options_that_cannot_be_built():
    with pytest.raises(ValueError, match="unknown early_exits 'both'; expected one of classification, feature, none"):
        timm.create_model("dynperceiver_test", early_exits="both")
    with pytest.raises(ValueError, match="latent_branch=True"):
        timm.create_model("dynperceiver_test", early_exits="classification", latent_branch=False)
    model = timm.create_model("dynperceiver_test", fkt=False, z2x=False)
    with pytest.raises(ValueError, match="other values of z2x, fkt;"):
        checkpoint_filter_fn({"latent": model.latent}, model)
