"""The ablations of DVT's tables 7 and 8: what each option changes, counted from its formulas and seen in what it reads.

The tables' network has two exits, T2T-ViT-12 with 7x7 and 10x10 tokens.
"""

from functools import cache

import pytest
import timm
import torch
import torch.nn.functional as F
from options import check_compiled, check_option
from torch import nn

from exit_plugins import exit_costs
from exit_plugins.timm.dvt import TokenResize

NAME, GRIDS = "dvt_t2t_vit_12", (7, 10)
D, HIDDEN, HEADS, DEPTH = 256, 512, 4, 12
CONTEXT, WIDTH = 128, 48  # f_l: D to CONTEXT to WIDTH channels
UP, TOKENS = 49, 101  # tokens of the exit before without the class token, tokens of this exit with it
F_L = D * CONTEXT + CONTEXT + CONTEXT * WIDTH + WIDTH  # weights without the norm
F_L_MACS = D * CONTEXT + CONTEXT * WIDTH  # per token
MAPS = HEADS * DEPTH
MAP = (UP + 1) ** 2  # positions of an attention map of the exit before

# Option, change of the parameters, change of the MACs of exit 2, and its GFLOPs in the paper.
FEATURES = dict(relation_reuse=False)
RELATIONS = dict(feature_reuse=False)
CHANGES = [
    (FEATURES, 0, 0, 1.43),
    (FEATURES | dict(feature_source="same"), 0, 0, 1.43),
    (FEATURES | dict(feature_class_token=True), 0, DEPTH * F_L_MACS, 1.43),
    (
        FEATURES | dict(feature_blocks="first"),
        # f_l with its norm, and the wider norm and first layer of the block's MLP.
        -(DEPTH - 1) * (F_L + 2 * D + 2 * WIDTH + WIDTH * HIDDEN),
        -(DEPTH - 1) * (UP * F_L_MACS + TOKENS * WIDTH * HIDDEN),
        1.38,
    ),
    (FEATURES | dict(feature_norm=False), -DEPTH * 2 * D, 0, 1.42),
    (RELATIONS, 0, 0, 1.41),
    (
        RELATIONS | dict(relation_source="same"),
        -(6 * MAPS * MAPS - 6 * MAPS * HEADS),
        -(6 * MAPS * MAPS - 6 * MAPS * HEADS) * MAP,
        1.38,
    ),
    (
        RELATIONS | dict(relation_source="last"),
        -3 * MAPS * (MAPS - HEADS),
        -3 * MAPS * (MAPS - HEADS) * MAP,
        1.39,
    ),
    (
        RELATIONS | dict(relation_mlp=False),
        -(6 * MAPS * MAPS + 3 * MAPS) + MAPS * MAPS,
        -5 * MAPS * MAPS * MAP,
        1.38,
    ),
    (RELATIONS | dict(relation_upsample="naive"), 0, 0, 1.41),
]


@cache
def counted(**options) -> tuple[int, int]:
    model = timm.create_model(NAME, device="meta", token_grids=GRIDS, **options)
    return sum(p.numel() for p in model.parameters()), int(exit_costs(model, (3, 224, 224)).macs[-1])


@pytest.mark.parametrize("options, params, macs, published", CHANGES, ids=lambda value: str(value))
def test_parameters_and_macs_change_as_they_must(options, params, macs, published):
    reuse = FEATURES if FEATURES.items() <= options.items() else RELATIONS
    whole, found = counted(**reuse), counted(**options)
    assert (found[0] - whole[0], found[1] - whole[1]) == (params, macs)
    # Both of the paper's figures have two digits, and count norms too.
    bare = counted(feature_reuse=False, relation_reuse=False)
    assert (found[1] - bare[1]) / 1e9 == pytest.approx(published - 1.37, abs=0.01)


OPTIONS = {
    "feature_source": dict(feature_source="same"),
    "feature_blocks": dict(feature_source="same", feature_blocks="first"),
    "feature_class_token": dict(feature_class_token=True),
    "feature_norm": dict(feature_norm=False),
    "relation_source": dict(relation_source="last"),
    "relation_mlp": dict(relation_source="same", relation_mlp=False),
    "relation_upsample": dict(relation_upsample="naive"),
}


def small(**options) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("dvt_test", num_classes=5, **options)


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains(option):
    model = check_option("dvt_test", OPTIONS[option])
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        dict(feature_source="same", feature_class_token=True, relation_source="last", relation_upsample="naive"),
        dict(feature_blocks="first", feature_norm=False, relation_source="same", relation_mlp=False),
    ],
    ids=("one half", "the other"),
)
def test_segments_of_options_compile_and_export(options):
    check_compiled(small(**options).eval())


def reads(model: nn.Module, block: int) -> list[bool]:
    """Which blocks of exit 1 exit 2's ``block`` reads: where noise behind them changes its f_l's input."""
    first, second = (model[name] for name in model.stage_names[:2])
    x, seen = torch.randn(1, *model.pretrained_cfg["input_size"]), []
    second.blocks[block].feature_resuse_mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    outputs = []
    for upstream in first.blocks:
        hook = upstream.register_forward_hook(lambda _, __, output: outputs.append(output[0]))
        with torch.no_grad():
            model.forward_exits(x)
        hook.remove()
    return [torch.equal(seen[0], output[:, 1:]) for output in outputs]


def test_which_blocks_features_come_from():
    depth = len(small().normal_token.blocks)
    last = [index == depth - 1 for index in range(depth)]
    for block in range(depth):
        assert reads(small().eval(), block) == last
        assert reads(small(feature_source="same").eval(), block) == [index == block for index in range(depth)]
    model = small(feature_blocks="first")
    assert [block.feature_resuse_mlp is not None for block in model.normal_token.blocks] == [True] + [False] * (
        depth - 1
    )
    assert reads(model.eval(), 0) == last
    # The state holds what is read and no more.
    model = small(feature_source="same", feature_blocks="first", relation_reuse=False).eval()
    _, state = model.forward_exit(0, model.begin_exits(torch.randn(2, *model.pretrained_cfg["input_size"])))
    assert state["tokens"].shape[:2] == (2, 1)


@torch.no_grad()
def test_the_class_token_takes_part_or_not():
    for takes_part in (False, True):
        model = small(feature_class_token=takes_part).eval()
        block, seen = model.normal_token.blocks[0], []
        block.norm2.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        model(torch.randn(1, *model.pretrained_cfg["input_size"]))
        assert seen[0][:, 0, model.embed_dim :].any() == takes_part
        assert seen[0][:, 1:, model.embed_dim :].any()


def test_which_maps_relations_come_from():
    def jacobian(**options) -> torch.Tensor:
        """[block of this exit, block of the exit before]: whether the one reads the other's maps."""
        model = small(**options).eval()
        stage = model.normal_token
        heads, depth = stage.num_heads, len(stage.blocks)
        read = stage.relation_reuse_conv[0].in_channels
        side = stage.upstream_tokens
        maps = torch.randn(1, heads if options.get("relation_source") == "last" else read, side, side)
        maps.requires_grad_()
        rows = []
        for block in range(depth):
            out = stage.read_relations(maps)[:, block * heads : (block + 1) * heads]
            (gradient,) = torch.autograd.grad(out.square().sum(), maps)
            rows.append(gradient.abs().sum((0, 2, 3)).unflatten(0, (-1, heads)).sum(1) > 0)
        return torch.stack(rows)

    depth = len(small().normal_token.blocks)
    assert jacobian().all() and jacobian(relation_mlp=False).all()
    assert jacobian(relation_source="same").equal(torch.eye(depth, dtype=torch.bool))
    # The last block's maps are the last channels of all.
    x = torch.randn(2, *small().pretrained_cfg["input_size"])
    whole, model = small().eval(), small(relation_source="last").eval()
    first = model.stage_names[0]
    model[first].load_state_dict(whole[first].state_dict())
    with torch.no_grad():
        states = [net.forward_exit(0, net.begin_exits(x))[1]["relations"] for net in (whole, model)]
    heads = model.normal_token.num_heads
    torch.testing.assert_close(states[1], states[0][:, -heads:])


def test_naive_upsampling_takes_a_map_for_an_image():
    resize = TokenResize((2, 3), (4, 5), naive_maps=True)
    maps = torch.randn(2, 3, 7, 7)
    out = resize.both_axes(maps)
    assert out.shape == (2, 3, 21, 21)
    torch.testing.assert_close(out[:, :, 0, 0], maps[:, :, 0, 0])
    torch.testing.assert_close(out[:, :, 1:, 1:], F.interpolate(maps[:, :, 1:, 1:], (20, 20), mode="bilinear"))
    torch.testing.assert_close(
        out[:, :, 0, 1:], F.interpolate(maps[:, :, 0, 1:], 20, mode="linear"), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(
        out[:, :, 1:, 0], F.interpolate(maps[:, :, 1:, 0], 20, mode="linear"), rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(out, TokenResize((2, 3), (4, 5)).both_axes(maps))


@pytest.mark.parametrize("option", ["feature_source", "feature_blocks", "relation_source", "relation_upsample"])
def test_unknown_choices_are_refused(option):
    with pytest.raises(ValueError, match=f"{option} must be one of .*, got 'none'"):
        timm.create_model("dvt_test", **{option: "none"})
