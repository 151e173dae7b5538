"""DVT against the published code's figures, the paper's tables and naive restatements."""

import argparse
import copy
import importlib
import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from exit_plugins import AdaptiveModel, ExitPolicy, ExitTable, MultiExitLoss, exit_costs, solve_thresholds
from exit_plugins.timm import _dvt_reuse, kernels
from exit_plugins.timm._dvt_reuse import ReuseAttention
from exit_plugins.timm.dvt import DVT, DVTCfg, TokenResize, checkpoint_filter_fn, policies_from_checkpoint

GOLDEN = Path(__file__).parents[1] / "golden" / "dvt" / "dvt_t2t_vit_12_live"
STAGES = ("less_less_token", "less_token", "normal_token")


def value(key: str, shape: list[int], category: str) -> np.ndarray:
    """A weight of the golden model."""
    z = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if category == "norm_weight":
        return np.float32(1.0) + np.float32(0.05) * z
    if category in ("bias", "token"):
        return np.float32(0.02) * z
    scale = 1.0 / math.sqrt(math.prod(shape[1:]))
    if key.endswith(".kqv.weight"):
        scale *= 0.25
    if key.endswith(".w"):
        scale = 0.7
    return np.float32(scale) * z


def images() -> torch.Tensor:
    generator = np.random.Generator(np.random.PCG64(7))
    return torch.from_numpy(generator.standard_normal((2, 3, 224, 224), dtype=np.float32))


@pytest.fixture(scope="module")
def published() -> DVT:
    model = timm.create_model("dvt_t2t_vit_12").eval()
    state = model.state_dict()
    entries = json.loads(GOLDEN.with_suffix(".json").read_text())
    assert list(state.keys() ^ entries.keys()) == []
    for key, (shape, category) in entries.items():
        if category != "table":
            state[key] = torch.from_numpy(value(key, shape, category))
    model.load_state_dict(state)
    return model


@pytest.fixture(scope="module")
def figures() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN.with_suffix(".npz")) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def small(**kwargs) -> DVT:
    torch.manual_seed(0)
    model = timm.create_model("dvt_test", **kwargs).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # As initialised, attention is nearly uniform and every reuse path nearly silent.
            if name.endswith("weight") and parameter.ndim > 1:
                parameter.mul_(8)
    return model


def pixels(batch: int = 3, size: tuple[int, int] = (64, 64), in_chans: int = 3) -> torch.Tensor:
    return torch.randn(batch, in_chans, *size, generator=torch.Generator().manual_seed(1))


# --- parity with the published code ----------------------------------------------------------------------------------


@torch.no_grad()
def test_golden_logits(published, figures):
    exits = published.forward_exits(images())
    for index, logits in enumerate(exits):
        torch.testing.assert_close(logits, figures[f"exit{index + 1}"], atol=1e-5, rtol=0)
    torch.testing.assert_close(published(images()), figures["exit3"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_golden_probes(published, figures):
    x, tokens, relations = images(), None, None
    for name in STAGES:
        stage = published[name]
        torch.testing.assert_close(
            stage.tokens_to_token(x)[:, :3, :8], figures[f"probe_{name}_embed"], atol=1e-5, rtol=0
        )
        kept, stage.hands_on_logits = stage.hands_on_logits, True
        try:
            final, tokens, relations = stage(x, tokens, relations)
        finally:
            stage.hands_on_logits = kept
        torch.testing.assert_close(final[:, :3, :8], figures[f"probe_{name}_tokens_out"], atol=1e-5, rtol=0)
        heads = relations.unflatten(1, (12, 4))[:, :, :2, :3, :4]
        torch.testing.assert_close(heads[:, 0], figures[f"probe_{name}_logits_first"], atol=1e-5, rtol=0)
        torch.testing.assert_close(heads[:, -1], figures[f"probe_{name}_logits_last"], atol=1e-5, rtol=0)


def bilinear(self, x):
    grid = x[..., 1:, :].transpose(-2, -1).reshape(-1, 1, *self.old_grid)
    grid = F.interpolate(grid, size=self.new_grid, mode="bilinear", align_corners=False)
    grid = grid.reshape(*x.shape[:-2], x.shape[-1], -1).transpose(-2, -1)
    return torch.cat([x[..., :1, :], grid], dim=-2)


class KeptClassRow(nn.Module):
    """Stands for f_l: gives the class token's row, which was cut off, a value like its neighbours'."""

    def forward(self, x, pad):
        assert pad == (0, 0, 1, 0)
        return torch.cat([x[:, :1], x], dim=1)


@pytest.mark.parametrize("fault", ["bilinear", "class row", "unrefined logits", "normalised features"])
@torch.no_grad()
def test_planted_faults_break_parity(published, figures, fault, monkeypatch):
    if fault == "bilinear":
        monkeypatch.setattr(TokenResize, "forward", bilinear)
    elif fault == "class row":
        monkeypatch.setattr(_dvt_reuse.F, "pad", KeptClassRow())
    elif fault == "unrefined logits":
        attend = ReuseAttention.forward

        def unrefined(self, x, added=None, return_logits=False):
            y, logits = attend(self, x, added, return_logits)
            return y, logits if logits is None or added is None else logits - added

        monkeypatch.setattr(ReuseAttention, "forward", unrefined)
    state = published.begin_exits(images())
    distance = []
    for index in range(3):
        logits, state = published.forward_exit(index, state)
        if fault == "normalised features" and state:
            state["tokens"] = published[STAGES[index]].norm(state["tokens"])
        distance.append((logits - figures[f"exit{index + 1}"]).abs().max().item())
    assert distance[0] < 1e-5
    assert distance[2] > 1e-3
    assert distance[1] < 1e-5 if fault == "unrefined logits" else distance[1] > 1e-3


@pytest.mark.parametrize("old, new", [((7, 7), (10, 10)), ((10, 10), (14, 14)), ((7, 14), (14, 14)), ((3, 4), (3, 7))])
def test_resize_is_upsampling_and_pooling(old, new):
    resize = TokenResize(old, new, dtype=torch.float64)
    x = torch.randn(2, 3, 1 + old[0] * old[1], 5, dtype=torch.float64)
    grid = x[:, :, 1:].transpose(-2, -1).reshape(2, 15, *old)
    upsampled = F.interpolate(grid, size=[-(-n // o) * o for o, n in zip(old, new, strict=True)], mode="nearest")
    pooled = F.adaptive_avg_pool2d(upsampled, new).reshape(2, 3, 5, -1).transpose(-2, -1)
    torch.testing.assert_close(resize(x), torch.cat([x[:, :, :1], pooled], dim=2))

    square = torch.randn(2, 3, x.shape[2], x.shape[2], dtype=torch.float64)
    matrix = resize(torch.eye(x.shape[2], dtype=torch.float64))  # K of the resized K A K^T
    torch.testing.assert_close(resize.both_axes(square), matrix @ square @ matrix.T)


# --- the paper's figures ---------------------------------------------------------------------------------------------

# Name, switches, parameters and buffers, trainable parameters, cumulative GMACs as fvcore counts them.
TABLE = [
    ("dvt_t2t_vit_12", {}, 22_461_516, 22_360_140, (0.4725, 1.4625, 3.4975)),
    ("dvt_t2t_vit_14", {}, 67_881_836, 67_735_916, (1.2065, 3.8409, 9.3276)),
    ("dvt_deit_small", {}, 70_442_232, 70_442_232, (1.1453, 3.6563, 8.8438)),
    ("dvt_t2t_vit_12", dict(feature_reuse=False, relation_reuse=False), 20_890_956, None, (0.4725, 1.3707, 3.1454)),
    ("dvt_t2t_vit_12", dict(relation_reuse=False), 22_433_484, None, (0.4725, 1.4251, 3.3077)),
    ("dvt_t2t_vit_12", dict(feature_reuse=False), 20_918_988, None, (0.4725, 1.4081, 3.3353)),
]


def other_macs(model: DVT) -> np.ndarray:
    """What fvcore counts besides products: 5 per entry of a LayerNorm, 1 per entry upsampled and per entry pooled."""
    norms, resizes, totals = [], 0, []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda module, args, output: norms.append(5 * output.numel()))
    state, stages = model.begin_exits(torch.empty(1, 3, 224, 224, device="meta")), list(model.values())
    for index in range(model.num_exits):
        _, state = model.forward_exit(index, state)
        if index:
            old, new = stages[index - 1].grid[0], stages[index].grid[0]
            upsampled = (-(-new // old) * old) ** 2
            if model.cfg.feature_reuse:
                resizes += 2 * upsampled * model.cfg.depth * model.cfg.context_width
            if model.cfg.relation_reuse:
                resizes += 2 * upsampled * model.cfg.depth * model.cfg.num_heads * (old**2 + 1 + new**2 + 1)
        totals.append(sum(norms) + resizes)
    return np.array(totals)


@pytest.mark.parametrize("name, switches, stored, trainable, gmacs", TABLE)
@pytest.mark.slow
def test_parameters_and_macs_are_the_papers(name, switches, stored, trainable, gmacs):
    model = timm.create_model(name, device="meta", **switches).eval()
    assert sum(t.numel() for t in model.state_dict().values()) == stored
    if trainable:
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable
    macs = exit_costs(model).macs
    np.testing.assert_allclose((macs + other_macs(model)) / 1e9, gmacs, rtol=1e-3)


def test_patches_are_the_papers():
    t2t, patch = (timm.create_model(name, device="meta") for name in ("dvt_t2t_vit_12", "dvt_deit_small"))
    assert [axes[0][:3] for axes in t2t._patches] == [(14, 8, 3), (11, 6, 5), (7, 4, 2)]
    assert [axes[1][:3] for axes in patch._patches] == [(32, 32, 0), (23, 23, 3), (16, 16, 0)]
    assert (
        [stage.grid for stage in t2t.values()]
        == [stage.grid for stage in patch.values()]
        == [(7, 7), (10, 10), (14, 14)]
    )
    two = timm.create_model("dvt_t2t_vit_12_2exit", device="meta")
    assert [(name, stage.grid) for name, stage in two.items()] == [("less_token", (7, 7)), ("normal_token", (14, 14))]


def test_positions_are_exempt_from_weight_decay_in_every_stage():
    learned = timm.create_model("dvt_deit_small", device="meta")
    assert learned.no_weight_decay() == {f"{s}.{p}" for s in STAGES for p in ("cls_token", "pos_embed")}
    fixed = timm.create_model("dvt_t2t_vit_12", device="meta")
    assert fixed.no_weight_decay() == {f"{s}.cls_token" for s in STAGES}


def test_initial_random_features_are_orthogonal():
    w = small()["normal_token"].tokens_to_token.attention2.w
    torch.testing.assert_close(w @ w.T, 16 * torch.eye(16), atol=1e-4, rtol=0)


# --- exits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("relations", [True, False])
@torch.no_grad()
def test_state_is_what_the_next_stage_reads(features, relations):
    model = small(feature_reuse=features, relation_reuse=relations)
    _, state = model.forward_exit(0, model.begin_exits(pixels()))
    expected = {"images"} | ({"tokens"} if features else set()) | ({"relations"} if relations else set())
    assert set(state) == expected
    _, state = model.forward_exit(1, state)
    assert set(state) == expected
    for key in expected:
        changed = {**state, key: state[key].flip(0)}
        assert not torch.allclose(model.forward_exit(2, changed)[0], model.forward_exit(2, state)[0], atol=1e-4), key
    assert model.forward_exit(2, state)[1] == {}


@torch.no_grad()
def test_later_stages_see_the_samples_that_stay_alone():
    model = small(num_classes=10)
    x = pixels(8)
    seen = []
    for stage in model.values():
        stage.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    sure = [logits.softmax(-1).amax(-1) for logits in model.forward_exits(x)]
    middle = [(s.sort().values[3] + s.sort().values[4]).item() / 2 for s in sure[:2]]
    seen.clear()
    out = AdaptiveModel(model, ExitPolicy([*middle, 0.0]))(x)
    leaves_first = sure[0] >= middle[0]
    stay = ~leaves_first & (sure[1] < middle[1])
    assert seen == [8, 4, int(stay.sum())][: len(seen)] and len(seen) == 2 + bool(stay.any())
    assert out.exit_index.tolist() == [0 if a else 2 if b else 1 for a, b in zip(leaves_first, stay, strict=True)]


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.fused = self.softmax = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.fused += "scaled_dot_product" in str(func)
        self.softmax += "_softmax" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "kwargs, unfused_stages", [({}, 2), (dict(token_grids=(2, 4)), 1), (dict(relation_reuse=False), 0)]
)
@torch.no_grad()
def test_attention_is_fused_unless_the_next_exit_reads_its_logits(kwargs, unfused_stages):
    model = small(**kwargs)
    with Kernels() as called:
        model(pixels())
    assert called.softmax == 3 * unfused_stages
    assert called.fused == 3 * (model.num_exits - unfused_stages)


@torch.no_grad()
@pytest.mark.parametrize("batch", [1, 6])  # few images, and enough for convolutions over tokens
@pytest.mark.parametrize("kwargs", [{}, dict(tokens="patch")])
def test_fuse_changes_no_answer_and_no_weight(kwargs, batch, monkeypatch):
    monkeypatch.setattr(kernels, "processor", lambda: "AuthenticAMD")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    model, x = small(**kwargs).double(), torch.randn(batch, 3, 64, 64, dtype=torch.float64)
    fused = copy.deepcopy(model).fuse()
    assert any(isinstance(module, kernels.TokenLinear) for module in fused.modules())
    assert fused.state_dict().keys() == model.state_dict().keys()
    for found, wanted in zip(fused.forward_exits(x), model.forward_exits(x), strict=True):
        torch.testing.assert_close(found, wanted)


@torch.no_grad()
def test_unfused_attention_computes_the_same(monkeypatch):
    model, x = small(), pixels()
    expected = model.forward_exits(x)
    for module in model.modules():
        if isinstance(module, ReuseAttention):
            monkeypatch.setattr(module, "fused_attn", False)
    torch.testing.assert_close(model.forward_exits(x), expected, atol=1e-4, rtol=1e-4)


def test_training_returns_what_the_exits_compute():
    model = small(num_classes=5, t2t_drop_rate=0.0, drop_path_rate=0.0).train()
    torch.testing.assert_close(model(pixels()), model.forward_exits(pixels()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_finite_in_mixed_precision(dtype):
    model = timm.create_model("dvt_test", num_classes=5).train()
    target = torch.eye(5)[[0, 3, 2]]
    with torch.autocast("cpu", dtype=dtype):
        outputs = model(pixels())
        loss = MultiExitLoss(3, "dvt")(outputs, target)
    plain_sum = sum(F.cross_entropy(logits.float(), target) for logits in outputs)
    torch.testing.assert_close(loss, plain_sum, atol=1e-5, rtol=0)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_genetic_search_finds_the_thresholds_of_a_brute_force():
    rng = np.random.default_rng(0)
    target = np.zeros(300, dtype=np.int64)
    hardness = rng.random(300)
    confidence = np.clip(1 - hardness + 0.2 * rng.standard_normal((3, 300)), 0, 1).astype(np.float32)
    wrong = rng.random((3, 300)) < hardness * np.array([[0.9], [0.6], [0.4]])
    table = ExitTable(confidence, wrong.astype(np.int64), target)
    costs = exit_costs(timm.create_model("dvt_t2t_vit_12", device="meta")).macs
    budget = 1.25e9
    policy = solve_thresholds(table, costs, budget=budget, method="genetic")
    exits = policy.choose(table.confidence)
    accuracy = (~wrong)[exits, np.arange(300)].mean()
    best = 0.0
    grid = [np.inf, *np.sort(confidence[0])[::3]], [np.inf, *np.sort(confidence[1])[::3]]
    for first in grid[0]:
        for second in grid[1]:
            chosen = np.where(confidence[0] >= first, 0, np.where(confidence[1] >= second, 1, 2))
            if costs[chosen].mean() <= budget:
                best = max(best, (~wrong)[chosen, np.arange(300)].mean())
    assert costs[exits].mean() <= budget
    assert accuracy >= best - 0.01


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_patches_keep_their_size_when_the_image_grows():
    def grids(name: str, **kwargs) -> list[tuple[int, int]]:
        return [stage.grid for stage in timm.create_model(name, device="meta", **kwargs).values()]

    for name in ("dvt_t2t_vit_12", "dvt_deit_small"):
        assert grids(name, img_size=256) == [(8, 8), (11, 11), (16, 16)]
        assert grids(name, img_size=(192, 256)) == [(6, 8), (8, 11), (12, 16)]
        assert grids(name, token_grids=(5, 10), img_size=320) == [(5, 5), (10, 10)]
        assert grids(name, token_grids=((4, 6), (8, 12)), img_size=(128, 192)) == [(4, 6), (8, 12)]


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (dict(img_size=230), "use 224 or 256, or name the token_grids"),
        (dict(token_grids=(17,)), "cannot be cut into 17 tokens"),
        (dict(token_grids=(14, 7)), "must not shrink"),
        (dict(token_grids=()), "positive token counts"),
        (dict(tokens="convolution"), "must be 't2t' or 'patch'"),
        (dict(num_heads=5), "does not divide into 5 heads"),
        (dict(global_pool="map"), "global_pool must be"),
    ],
)
def test_impossible_networks_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("dvt_t2t_vit_12", device="meta", **kwargs)


@pytest.mark.parametrize("shape", [(1, 3, 64, 96), (1, 1, 64, 64), (3, 64, 64)])
def test_images_of_another_shape_are_refused(shape):
    model = small()
    for run in (model, model.begin_exits, model.forward_intermediates):
        with pytest.raises(ValueError, match=r"expected images of shape \(batch, 3, 64, 64\)"):
            run(torch.zeros(shape))


@pytest.mark.parametrize("tokens", ["t2t", "patch"])
@torch.no_grad()
def test_a_resized_model_is_the_one_built_at_that_size(tokens, tmp_path):
    model = small(tokens=tokens)
    built = small(tokens=tokens, img_size=(96, 128))
    built.load_state_dict(checkpoint_filter_fn(model.state_dict(), built))
    model.set_input_size((96, 128))
    x = pixels(size=(96, 128))
    torch.testing.assert_close(model.forward_exits(x), built.forward_exits(x))
    timm.models.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(loaded.forward_exits(x), model.forward_exits(x))
    with pytest.raises(ValueError, match="use 64 or 96"):
        model.set_input_size(80)
    torch.testing.assert_close(model.forward_exits(x), built.forward_exits(x))


@torch.no_grad()
def test_a_dvt_over_another_transformer_is_one_line():
    model = DVT(DVTCfg(embed_dim=48, depth=2, num_heads=3, token_grids=(2, 3, 4, 6)), img_size=96, num_classes=4).eval()
    assert [tuple(logits.shape) for logits in model.forward_exits(pixels(size=(96, 96)))] == [(3, 4)] * 4
    named = timm.create_model("dvt_deit_small", embed_dim=48, depth=2, num_heads=3, img_size=96, token_grids=(2, 6))
    assert (named.num_exits, named.embed_dim, len(named["normal_token"].blocks)) == (2, 48, 2)


# --- checkpoints of the authors --------------------------------------------------------------------------------------


@pytest.fixture
def public_file(tmp_path) -> tuple[Path, DVT]:
    """A file in the authors' layout around the small network's weights."""
    model = small()
    path = tmp_path / "public.pth"
    thresholds = torch.linspace(1, 0, 59)[:, None].repeat(1, 3)
    thresholds[0, 0], thresholds[:, 2] = 1e8, -1e8
    torch.save(
        {
            "model_state_dict": {f"module.{key}": value for key, value in model.state_dict().items()},
            "flops": [0.4725, 1.4625, 3.4975],
            "anytime_classification": np.array([69.04, 75.65, 80.0]),
            "dynamic_threshold": thresholds,
            "budgeted_batch_classification": [(0.75, np.float64(73.7))],
        },
        path,
    )
    return path, model


@torch.no_grad()
def test_public_layout_loads(public_file):
    path, model = public_file
    overlay = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path)))
    loaded = timm.create_model("dvt_test", **overlay).eval()
    torch.testing.assert_close(loaded.forward_exits(pixels()), model.forward_exits(pixels()), rtol=0, atol=0)
    other = timm.create_model("dvt_test", num_classes=5, img_size=96, **overlay).eval()
    assert [logits.shape[1] for logits in other.forward_exits(pixels(size=(96, 96)))] == [5, 5, 5]
    backbone = timm.create_model("dvt_test", features_only=True, **overlay).eval()
    torch.testing.assert_close(backbone(pixels()), model.forward_intermediates(pixels(), intermediates_only=True))
    with pytest.raises(ValueError, match="less_less_token.*token_grids"):
        timm.create_model("dvt_test", token_grids=(2, 4), **overlay)
    with pytest.raises(ValueError, match="feature_resuse_mlp"):
        timm.create_model("dvt_test", feature_reuse=False, **overlay)


@torch.no_grad()
def test_public_layout_loads_into_one_channel(public_file):
    path, model = public_file
    grey = timm.create_model(
        "dvt_test", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), in_chans=1
    ).eval()
    key = "normal_token.tokens_to_token.attention1."
    area = 7 * 7
    for name in ("norm1.weight", "norm1.bias"):
        torch.testing.assert_close(grey.state_dict()[key + name], model.state_dict()[key + name].view(3, area).mean(0))
    # Three equal channels give the same logits as the one, up to the norm's parameters, which are made equal here.
    state = model.state_dict()
    for stage in STAGES:
        for name in ("norm1.weight", "norm1.bias"):
            part = f"{stage}.tokens_to_token.attention1.{name}"
            state[part] = grey.state_dict()[part].repeat(3)
    model.load_state_dict(state)
    x = pixels(in_chans=1)
    torch.testing.assert_close(grey.forward_exits(x), model.forward_exits(x.repeat(1, 3, 1, 1)), atol=1e-3, rtol=1e-3)


def test_stored_thresholds_become_policies(public_file, tmp_path):
    path, model = public_file
    policies = policies_from_checkpoint(path, model)
    assert len(policies) == 59 and all(policy.num_exits == 3 for policy in policies)
    assert policies[0].thresholds[0] == 1e8 and policies[0].thresholds[2] == -np.inf
    assert policies[30].costs.tolist() == [0.4725, 1.4625, 3.4975]
    policies[30].save(tmp_path / "policy.json")
    loaded = ExitPolicy.load(tmp_path / "policy.json")
    assert loaded.thresholds.tolist() == policies[30].thresholds.tolist()
    AdaptiveModel(model, loaded)
    content = {"dynamic_threshold": [[0.9, 0.8, 0.0], [0.5, torch.tensor(0.4), 0.0]]}
    costs = exit_costs(model, (3, 64, 64)).macs
    assert policies_from_checkpoint(content, costs=costs)[1].costs.tolist() == costs.tolist()
    for bad in ({}, {"dynamic_threshold": [0.5]}, {"dynamic_threshold": "none"}):
        with pytest.raises(ValueError, match="dynamic_threshold"):
            policies_from_checkpoint(bad)
    with pytest.raises(ValueError, match="2 thresholds do not fit a model with 3 exits"):
        policies_from_checkpoint({"dynamic_threshold": [[0.5, 0.0]]}, model)
    with pytest.raises(FileNotFoundError):
        policies_from_checkpoint(tmp_path / "none.pth")


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_counted_memory_is_what_the_allocator_records(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "examples" / "benchmarks"))
    benchmark = importlib.import_module("dvt_memory")
    figures = {}
    for count in (True, False):
        args = argparse.Namespace(device="cpu", amp=False, batch=16, count=count)
        for label in ("three plain ViTs", "DVT"):
            figures[label, count] = benchmark.measure("dvt_test", benchmark.VARIANTS[label], args, checkpointing=False)
    for label in ("three plain ViTs", "DVT"):
        counted, recorded = figures[label, True], figures[label, False]
        assert counted["train"] == pytest.approx(recorded["train"], rel=0.01)
        assert counted["inference"] <= recorded["inference"]  # kernels' inner copies are not counted
    assert figures["DVT", True]["train"] > figures["three plain ViTs", True]["train"]
    # Logits are handed on twice and never by the last exit.
    tokens, channels = (2 * 2 + 1, 3 * 3 + 1), 3 * 2
    assert benchmark.handed_on("dvt_test", 2) == [2 * channels * n * n * 4 for n in tokens] + [0]
