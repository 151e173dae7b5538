"""Temporal shift against a loop over frames, and Dyn-Perceivers and other networks on clips."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

import exit_plugins
from exit_plugins import AdaptiveModel, ExitPolicy, exit_costs
from exit_plugins.exits.clips import FrameNetwork
from exit_plugins.exits.policy import describe_model
from exit_plugins.timm.any_model import add_exits
from exit_plugins.timm.video import FrameStream, TemporalShift, shift_frames, shifts_of, temporal_shift


def shifted_by_hand(x: Tensor, num_frames: int, dim: int, online: bool = False) -> Tensor:
    """Frame by frame and channel by channel."""
    clips = x.movedim(dim, 1).reshape(-1, num_frames, x.shape[dim], *x.movedim(dim, 1).shape[2:])
    fold = x.shape[dim] // 8
    out = torch.zeros_like(clips)
    for t in range(num_frames):
        for channel in range(x.shape[dim]):
            source = t
            if channel < fold:
                source = t - 1
            elif channel < 2 * fold and not online:
                source = t + 1
            if 0 <= source < num_frames:
                out[:, t, channel] = clips[:, source, channel]
    return out.flatten(0, 1).movedim(1, dim)


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize("num_frames", [1, 2, 8])
def test_shift_is_that_of_a_loop_over_frames(num_frames, online):
    maps = torch.randn(2 * num_frames, 17, 3, 5)
    expected = shifted_by_hand(maps, num_frames, 1, online)
    assert torch.equal(shift_frames(maps, num_frames, 1, online), expected)
    wide = maps.to(memory_format=torch.channels_last)
    found = shift_frames(wide, num_frames, 1, online)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)
    tokens = torch.randn(2 * num_frames, 6, 17)
    assert torch.equal(shift_frames(tokens, num_frames, 2, online), shifted_by_hand(tokens, num_frames, 2, online))
    few = torch.randn(2 * num_frames, 7, 3, 3)  # fewer than eight channels: none to give away
    assert torch.equal(shift_frames(few, num_frames, 1, online), few)


def test_shift_passes_the_gradient_check():
    x = torch.randn(4, 9, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_frames(x, 2), (x,))
    tokens = torch.randn(3, 2, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: shift_frames(x, 3, 2), (tokens,))


def perceivers(**kwargs) -> tuple[nn.Module, nn.Module]:
    """A Dyn-Perceiver and the one on clips that has loaded its weights."""
    image = timm.create_model("dynperceiver_test", num_classes=5).eval()
    video = timm.create_model("tsm_dynperceiver_test", num_classes=5, **kwargs).eval()
    video.load_state_dict(image.state_dict())
    return image, video


@torch.no_grad()
@pytest.mark.parametrize("num_frames", [1, 2, 8])
def test_without_shift_clip_logits_are_the_mean_of_image_logits(num_frames):
    image, video = perceivers(num_frames=num_frames, features=False, latent=False)
    image, video = image.double(), video.double()
    x = torch.randn(2, num_frames, 3, 64, 64, dtype=torch.float64)
    for found, expected in zip(
        video.forward_exits(x), zip(*(image.forward_exits(clip) for clip in x), strict=True), strict=True
    ):
        torch.testing.assert_close(found, torch.stack(expected).mean(1), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("sites", [dict(latent=False), dict(features=False), dict()])
def test_shift_is_where_the_paper_puts_it(sites):
    """Against the image network with the same loop written into its blocks by hand."""
    image, video = perceivers(num_frames=4, **sites)

    def enters(module: nn.Module, dim: int) -> None:
        inner = module.forward
        module.forward = lambda x, *args, **kwargs: inner(shifted_by_hand(x, 4, dim), *args, **kwargs)

    for stage in image.stages:
        for block in stage.blocks if sites.get("features", True) else ():
            enters(block.conv1, 1)  # the identity path is ``downsample``, and goes on as it was
        for block in stage.self_attn if sites.get("latent", True) else ():
            enters(block.attn, 2)
    x = torch.randn(2, 4, 3, 64, 64)
    frames = image.forward_exits(x.flatten(0, 1))
    for found, expected in zip(video.forward_exits(x), frames, strict=True):
        torch.testing.assert_close(found, expected.unflatten(0, (2, 4)).mean(1), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_order_matters_with_shift_alone():
    x = torch.randn(1, 8, 3, 64, 64)
    _, blind = perceivers(features=False, latent=False)
    torch.testing.assert_close(blind(x), blind(x.flip(1)), rtol=1e-5, atol=1e-6)
    for sites in (dict(latent=False), dict(features=False), dict()):
        _, seeing = perceivers(**sites)
        assert not torch.allclose(seeing(x), seeing(x.flip(1)), atol=1e-4)


@pytest.mark.parametrize(
    ("name", "blocks", "latents"),
    [
        ("dynperceiver_resnet50_0_375x", 16, 18),
        ("dynperceiver_regnety_400mf", 16, 30),
        ("dynperceiver_mobilenetv3_0_75x", 10, 24),  # of 15 blocks those that add their input
    ],
)
def test_every_residual_block_and_latent_block_is_shifted(name, blocks, latents):
    with torch.device("meta"):
        model = timm.create_model(f"tsm_{name}")
        image = timm.create_model(name)
    assert [sum(shift.dim == dim for shift in shifts_of(model)) for dim in (1, 2)] == [blocks, latents]
    assert list(model.state_dict()) == list(image.state_dict())
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in image.state_dict().items()}


def test_the_papers_rival_has_a_shift_in_every_block():
    with torch.device("meta"):
        model = temporal_shift(timm.create_model("resnet50", num_classes=174))
    assert len(shifts_of(model)) == 16
    assert all(isinstance(m, nn.Conv2d) for m in model.modules() if m._forward_pre_hooks)
    # TSM reports 33 G for 8 frames, multiply-accumulates as here.
    assert 32e9 < exit_costs(model, (8, 3, 224, 224)).macs[0] < 34e9


@torch.no_grad()
def test_costs_are_those_of_the_frames():
    image, video = perceivers()
    macs = exit_costs(image, (3, 64, 64)).macs
    assert exit_costs(video, (8, 3, 64, 64)).macs == pytest.approx(8 * macs)


@torch.no_grad()
@pytest.mark.parametrize("name", ["dynperceiver_test", "dynperceiver_resnet50_0_375x"])
def test_fused_form_shifts_too(name):
    video = timm.create_model(f"tsm_{name}", num_classes=5, num_frames=4).eval()
    with torch.no_grad():
        for key, value in video.named_parameters():
            if "norm1.bias" in key:  # what is shifted in from beyond the ends is zero, not a norm's bias
                value.normal_()
    x = torch.randn(2, 4, 3, 64, 64)
    expected = video.forward_exits(x)
    fused = copy.deepcopy(video).fuse((64, 64))
    assert len(shifts_of(fused)) == len(shifts_of(video))
    for found, wanted in zip(fused.forward_exits(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="shift a model before fuse"):
        temporal_shift(timm.create_model("dynperceiver_test").eval().fuse())


@torch.no_grad()
@pytest.mark.slow
def test_adaptive_runs_and_compiled_ones_agree():
    _, video = perceivers(num_frames=2)
    x = torch.randn(6, 2, 3, 64, 64)
    middle = float(video.forward_exits(x)[0].softmax(1).amax(1).sort().values[2:4].mean())
    policy = ExitPolicy([middle, 0.9, 0.9, 0])
    plain = AdaptiveModel(video, policy)(x)
    assert 0 < int((plain.exit_index == 0).sum()) < len(x)
    fused = AdaptiveModel(video, policy, fuse=True)(x)
    assert torch.equal(fused.exit_index, plain.exit_index)
    torch.testing.assert_close(fused.logits, plain.logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fuse", [False, True])
def test_a_stream_says_frame_by_frame_what_the_clip_says(fuse):
    _, video = perceivers(num_frames=4, online=True)
    clip = torch.randn(2, 4, 3, 64, 64)
    expected = video.forward_exits(clip)  # of the whole clip, shifted from the past alone
    frames = [exits.unflatten(0, (2, 4)) for exits in FrameNetwork(video).forward_exits(clip.flatten(0, 1))]
    if fuse:
        video = video.fuse((64, 64))
    never, last = [float("inf")] * 3, video.num_exits - 1
    for at in range(video.num_exits):
        policy = ExitPolicy([*never, 0], max_exit=at)
        stream, own = FrameStream(video, policy), FrameStream(video, policy, window=1)
        for sample in range(2):
            stream.reset()
            own.reset()
            for t in range(4):
                out = stream(clip[sample, t])
                assert int(out.exit_index) == at
                torch.testing.assert_close(
                    own(clip[sample, t, None]).logits[0], frames[at][sample, t], rtol=1e-4, atol=1e-4
                )
            torch.testing.assert_close(out.logits[0], expected[at][sample], rtol=1e-4, atol=1e-4)
    if not fuse:  # the model itself is as it was
        assert torch.equal(video.forward_exits(clip)[last], expected[last])


@torch.no_grad()
def test_a_stream_leaves_early_frame_by_frame():
    _, video = perceivers(num_frames=4, online=True)
    torch.manual_seed(3)
    frames = torch.randn(12, 3, 64, 64)
    policy = ExitPolicy([0.0, 0, 0, 0], max_exit=3)
    assert {int(FrameStream(video, policy)(frame).exit_index) for frame in frames} == {0}
    # Frames 4 to 7 may leave at once: what is deeper has seen frame 3 last when frame 8 comes.
    stream = FrameStream(video, ExitPolicy([float("inf")] * 3 + [0]), window=1)
    skipping = FrameStream(video, ExitPolicy([float("inf")] * 3 + [0]), window=1)
    seen = [stream(frame) for frame in frames[:4]]
    for frame, before in zip(frames[:4], seen, strict=True):
        assert torch.equal(skipping(frame).logits, before.logits)
    deep = [memory["before"].clone() for memory in skipping.memories]
    skipping.adaptive.policy = ExitPolicy([0.0, 0, 0, 0])
    for frame in frames[4:8]:
        assert int(skipping(frame).exit_index) == 0
    same = [torch.equal(memory["before"], kept) for memory, kept in zip(skipping.memories, deep, strict=True)]
    assert any(same) and not all(same)
    skipping.adaptive.policy = ExitPolicy([float("inf")] * 3 + [0])
    assert int(skipping(frames[8]).exit_index) == 3
    with pytest.raises(ValueError, match="one frame"):
        stream(frames[:2])
    with pytest.raises(ValueError, match="online=True"):
        FrameStream(perceivers()[1], policy)
    with pytest.raises(TypeError, match="takes images"):
        FrameStream(perceivers()[0], policy)


@torch.no_grad()
def test_a_frame_that_does_not_get_through_leaves_the_stream_as_it_was():
    _, video = perceivers(num_frames=4, online=True)
    policy = ExitPolicy([float("inf")] * 3 + [0])
    frames = torch.randn(4, 3, 64, 64)
    expected = [FrameStream(video, policy)] * 4
    expected = [stream(frame).logits for stream, frame in zip(expected, frames, strict=True)]
    stream = FrameStream(video, policy)
    said = [stream(frame).logits for frame in frames[:2]]
    for bad in (torch.randn(3, 96, 64), torch.randn(64, 64), torch.randn(1, 64, 64), torch.randn(3, 32, 32)):
        with pytest.raises(ValueError, match="after frames of|one frame"):
            stream(bad)
    late = video.get_classifier()[-1] if isinstance(video.get_classifier(), nn.ModuleList) else video.get_classifier()
    handle = late.register_forward_hook(lambda *_: 1 / 0)  # fails behind every shift
    with pytest.raises(ZeroDivisionError):
        stream(torch.randn(3, 64, 64))
    handle.remove()
    said += [stream(frame).logits for frame in frames[2:]]
    assert all(map(torch.equal, said, expected))
    stream.reset()
    assert stream(torch.randn(3, 96, 64)).logits.shape == (1, 5)  # another clip may be of another size


def test_training_moves_every_parameter():
    model = timm.create_model("tsm_dynperceiver_test", num_classes=5, num_frames=2).train()
    sum(logits.square().mean() for logits in model(torch.randn(3, 2, 3, 64, 64))).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_saved_folder_loads_again(tmp_path):
    model = timm.create_model("tsm_dynperceiver_test", num_classes=5, num_frames=4, latent=False).eval()
    exit_plugins.timm.save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        assert all(map(torch.equal, loaded.forward_exits(x), model.forward_exits(x)))
    assert len(shifts_of(loaded)) == len(shifts_of(model))


@pytest.mark.parametrize("name", ["resnet18"])
def test_added_exits_are_shifted_as_the_network_is(name):
    network = timm.create_model(name, num_classes=5).eval()
    plain = temporal_shift(copy.deepcopy(network), 4)
    exits = temporal_shift(add_exits(network, exits=3), 4).eval()
    assert len(shifts_of(exits)) == len(shifts_of(plain)) > 0 and exits.num_exits == 3
    x = torch.randn(2, 4, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(exits.forward_exits(x)[-1], plain(x))
        before = exits.forward_exits(x)
        fused = copy.deepcopy(exits).fuse()  # cuts the network anew
        for found, expected in zip(fused.forward_exits(x), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    exits.reset_classifier(7)
    exits.set_grad_checkpointing()
    outputs = exits.train()(x)
    sum(logits.square().mean() for logits in outputs).backward()
    assert [tuple(logits.shape) for logits in outputs] == [(2, 7)] * 3
    assert all(p.grad is not None for p in exits.parameters())
    with pytest.raises(ValueError, match="give the image network exits, then shift it"):
        add_exits(plain)


def test_policies_of_images_are_not_for_clips():
    image, video = perceivers()
    policy = ExitPolicy([0.5] * 4, model=describe_model(image))
    with pytest.raises(ValueError, match="made for architecture dynperceiver_test"):
        AdaptiveModel(video, policy)
    AdaptiveModel(video, ExitPolicy([0.5] * 4, model=describe_model(video)))
    shifted = temporal_shift(timm.create_model("dynperceiver_test"))
    assert describe_model(shifted)["architecture"] == describe_model(video)["architecture"]


def test_what_cannot_be_shifted_is_refused():
    with pytest.raises(ValueError, match="no residual blocks"):
        temporal_shift(timm.create_model("msdnet_test"))
    with pytest.raises(ValueError, match="fold_div"):
        temporal_shift(timm.create_model("dynperceiver_test"), fold_div=1)
    model = timm.create_model("tsm_dynperceiver_test")
    count = len(shifts_of(model))
    with pytest.raises(ValueError, match="takes clips of 8 frames already"):
        temporal_shift(model)
    assert len(shifts_of(model)) == count
    with pytest.raises(ValueError, match="build dynperceiver_test"):
        timm.create_model("tsm_dynperceiver_test", features_only=True)
    assert isinstance(shifts_of(model)[0], TemporalShift)
