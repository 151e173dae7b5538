"""Exits on networks somebody else wrote: nothing of the network changes, and exits can be resumed. ``make test-hosts``
checks one network of every model module of timm the same way."""

import copy
import pickle
from itertools import pairwise

import any_network
import pytest
import timm
import torch
from torch import nn

from exit_plugins import AdaptiveModel, ExitPolicy, add_exits, exit_costs
from exit_plugins.exits.protocol import select_samples
from exit_plugins.timm import save_for_hf
from exit_plugins.timm.images import input_config
from exit_plugins.timm.split import Split, find_cuts, place_cuts, pool_features

# One of each kind of state and of layout, made small.
NETWORKS = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext": {},
    "test_byobnet": {},
    "test_mambaout": {},
    "test_maxvit": {},
    "test_vit": {},
    "test_vit4": {},
    "densenet121": dict(growth_rate=8, block_config=(1, 2, 1, 1)),
    "swin_tiny_patch4_window7_224": dict(embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), img_size=112),
    "xcit_nano_12_p16_224": dict(depth=3, embed_dim=48, num_heads=4, cls_attn_layers=1, img_size=64),
    "eva02_tiny_patch14_224": dict(depth=3, embed_dim=48, num_heads=4, img_size=56),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_exits_change_nothing_of_the_network(name):
    any_network.check_network(name, **NETWORKS[name])


@pytest.fixture
def resnet() -> nn.Module:
    return any_network.make("test_resnet", num_classes=5).float()


def images(batch: int = 3, size: int = 64) -> torch.Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


# --- places ----------------------------------------------------------------------------------------------------------


def test_a_number_shares_the_macs_most_evenly():
    model = timm.create_model("resnet18", device="meta")
    cuts = find_cuts(model)
    assert [cut.name for cut in cuts][-1] == "layer4" and all(a.macs < b.macs for a, b in pairwise(cuts))
    total = exit_costs(add_exits(copy.deepcopy(model), exits=["layer1"])).macs[-1]

    def unevenness(places) -> float:
        borders = [0.0, *(cut.macs for cut in places), total]
        return sum((b - a) ** 2 for a, b in pairwise(borders))

    chosen = place_cuts(model, 2)
    assert unevenness(chosen) <= min(unevenness((a, b)) for i, a in enumerate(cuts) for b in cuts[i + 1 :]) * (
        1 + 1e-3
    )  # heads are not counted here


def test_costs_at_a_cut_are_those_of_the_network_up_to_there():
    cut = {cut.name: cut for cut in find_cuts(timm.create_model("resnet18", device="meta"))}["layer2"]
    # 7x7 stem, two blocks at 56 px, two at 28 px of which one reduces.
    stem, layer1 = 112**2 * 49 * 3 * 64, 4 * 56**2 * 9 * 64 * 64
    layer2 = 28**2 * (9 * 64 * 128 + 3 * 9 * 128 * 128 + 64 * 128)
    assert cut.macs == stem + layer1 + layer2


def test_exits_stand_where_they_are_named(resnet):
    model = add_exits(resnet, exits=["layer2.0", "layer3"])
    assert model.exit_names == ("layer2.0", "layer3") and model.num_exits == 3
    text = timm.create_model("with_exits", backbone="test_resnet", exits="layer2.0, layer3")
    assert text.exit_names == model.exit_names


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        (["layer9"], "no module 'layer9'; it has .*layer4"),
        (["layer3", "layer2"], "in the order they run: layer2, layer3"),
        (["layer2", "layer2"], "more than once"),
        ([], "names no module"),
        (0, "1 or more"),
        (99, "places for early exits .* and 98 were asked for"),
        (["layer3.0.conv1"], None),  # inside a block, beside the shortcut
    ],
)
def test_places_that_do_not_exist_are_refused(resnet, exits, message):
    if message is None:
        assert len(add_exits(resnet, exits=exits).forward_exit(0, (images(),))[1]) == 2
        return
    with pytest.raises(ValueError, match=message):
        add_exits(resnet, exits=exits)


def test_a_cut_that_parts_the_samples_is_refused():
    model = timm.create_model("swin_tiny_patch4_window7_224", embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    with pytest.raises(ValueError, match="samples first"):
        add_exits(model, exits=["layers.0.blocks.0.attn"])


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("test_vit", dict(head="conv"), "conv head reads maps"),
        ("test_resnet", dict(head="forest"), "unknown head 'forest'"),
        ("test_resnet", dict(train="some"), "unknown train='some'"),
        ("test_resnet", dict(heads_first=1.0), "heads_first"),
        ("dvt_test", {}, "exits of its own"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        add_exits(timm.create_model(model), exits=3, **arguments)


@torch.no_grad()
def test_one_exit_is_the_network_alone(resnet):
    model = add_exits(resnet, exits=1).eval()
    assert model.num_exits == 1 and not len(model.heads)
    (logits,) = model.forward_exits(images())
    torch.testing.assert_close(logits, resnet(images()))
    assert len(model.train()(images())) == 1


# --- state -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_state_is_what_lives_across_the_cut_and_no_number_of_samples():
    arguments = NETWORKS["xcit_nano_12_p16_224"]
    model = add_exits(any_network.make("xcit_nano_12_p16_224", **arguments), exits=["blocks.0", "blocks.1"])
    _, state = model.forward_exit(0, model.begin_exits(any_network.images(model.backbone, 4)))
    tokens, sizes = state
    # Height and width of the grid go as the shape of a leaf without elements.
    assert tokens.shape == (4, 16, 48) and sizes.shape == (4, 0, 4, 4)


@torch.no_grad()
def test_modules_are_called_by_name_whatever_stands_there(resnet):
    model = add_exits(resnet, exits=["layer2", "layer3"]).eval()
    before = model.forward_exits(images())

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return 2 * self.inner(x)

    resnet.layer4[0].conv1 = Doubled(resnet.layer4[0].conv1)
    after = model.forward_exits(images())
    assert all(a.equal(b) for a, b in zip(before[:2], after[:2], strict=True)) and not before[2].equal(after[2])
    torch.testing.assert_close(after[2], resnet(images()))


@torch.no_grad()
def test_pooled_features_are_timms(resnet):
    split = Split(resnet, ["layer2", "layer4"])
    features, state = split.run(resnet, 0, (images(),))
    maps = resnet.forward_intermediates(images(), intermediates_only=True)
    torch.testing.assert_close(pool_features(features, split.cuts[0]), maps[2].mean((2, 3)))
    (last,), _ = split.run(resnet, 1, state)
    torch.testing.assert_close(last, maps[4])
    vit = timm.create_model("test_vit").eval()
    split = Split(vit, ["blocks.0"])
    features, _ = split.run(vit, 0, (images(size=160),))
    ((tokens, prefix),) = vit.forward_intermediates(
        images(size=160), indices=[0], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    torch.testing.assert_close(pool_features(features, split.cuts[0]), tokens.mean(1))
    torch.testing.assert_close(pool_features(features, split.cuts[0], "cls"), prefix[:, 0])


# --- heads and training ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["linear", "mlp", "conv"])
def test_heads_learn(resnet, head):
    model = add_exits(resnet, exits=3, head=head, train="heads").train()
    target = torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for _ in range(40):
        outputs = model(images(4))
        loss = sum(nn.functional.cross_entropy(logits, target) for logits in outputs[:-1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_heads_alone_leave_the_network_as_it_is_to_the_bit(resnet):
    expected = copy.deepcopy(resnet)
    model = add_exits(resnet, exits=3, train="heads").train()
    assert not resnet.training and model.heads.training
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if name.startswith("heads.")}
    outputs = model(images())
    sum(logits.square().mean() for logits in outputs).backward()
    torch.optim.SGD(model.parameters(), lr=1.0, weight_decay=0.1).step()
    with torch.no_grad():
        assert outputs[-1].equal(expected(images())) and model.eval()(images()).equal(expected(images()))
    assert all(a.equal(b) for a, b in zip(resnet.state_dict().values(), expected.state_dict().values(), strict=True))


def test_a_new_classifier_learns_with_the_heads():
    model = timm.create_model("with_exits", backbone="test_resnet", exits=3, train="heads", num_classes=7)
    learning = {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("backbone.")}
    assert learning == {"backbone.fc.weight", "backbone.fc.bias"}
    kept = timm.create_model("with_exits", backbone="test_resnet", exits=3, train="heads")
    assert not any(p.requires_grad for p in kept.backbone.parameters())


def test_heads_first_then_everything(resnet):
    resnet.conv1.requires_grad_(False)  # what the user froze stays frozen
    model = add_exits(resnet, exits=3, heads_first=0.5).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    weight = resnet.layer3[0].conv1.weight
    for progress, learns in ((0.0, False), (0.4, False), (0.5, True), (1.0, True)):
        model.set_progress(progress)
        assert resnet.training == learns and weight.requires_grad == learns
        before = weight.detach().clone()
        optimizer.zero_grad()
        sum(logits.square().mean() for logits in model(images())).backward()
        optimizer.step()
        assert before.equal(weight) != learns
        assert not any(p.requires_grad for p in resnet.conv1.parameters())


def test_a_head_of_ones_own(resnet):
    class Head(nn.Module):
        def __init__(self, cut, num_classes):
            super().__init__()
            self.fc = nn.Linear(cut.width, num_classes)

        def forward(self, features):
            return self.fc(features[0].amax((2, 3)))

    model = add_exits(resnet, exits=3, head=Head).eval()
    assert [logits.shape for logits in model.forward_exits(images())] == [(3, 5)] * 3
    model.reset_classifier(2)
    assert [logits.shape for logits in model.forward_exits(images())] == [(3, 2)] * 3
    model.reset_classifier(4, "")  # timm makes a classifier of maps, which does not run
    with pytest.raises(ValueError, match="reset_classifier"):
        model.forward_exits(images())
    model.reset_classifier(6, "avg")
    assert [logits.shape for logits in model.forward_exits(images())] == [(3, 6)] * 3


# --- tools -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_copies_pickles_and_saved_folders_compute_the_same(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet", num_classes=5).eval()
    model = add_exits(network, exits=["layer2", "layer3.0"], head="mlp", head_hidden=8)
    expected = model.forward_exits(images())
    save_for_hf(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert loaded.exit_names == model.exit_names
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        for found, wanted in zip(other.forward_exits(images()), expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@pytest.mark.parametrize("arguments", [{"exits": 3, "num_classes": 7, "train": "heads"}, {"exits": 1}])
@torch.no_grad()
def test_saved_folders_remember_what_timm_can_build(resnet, arguments, tmp_path):
    model = add_exits(resnet, **arguments).eval()
    save_for_hf(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    assert loaded.exit_names == model.exit_names
    for found, wanted in zip(loaded.forward_exits(images()), model.forward_exits(images()), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)


@torch.no_grad()
def test_pretrained_weights_are_the_networks(tmp_path):
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    torch.save(network.state_dict(), tmp_path / "network.pth")
    overlay = dict(file=str(tmp_path / "network.pth"))
    model = timm.create_model(
        "with_exits", backbone="test_resnet", exits=3, pretrained=True, pretrained_cfg_overlay=overlay
    ).eval()
    torch.testing.assert_close(model(images()), network(images()), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_exits(images())[-1], network(images()))
    assert "state_dict" not in {**model.pretrained_cfg, **model.backbone.pretrained_cfg}


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_fuse_folds_every_batch_norm_of_a_cnn(name):
    model = add_exits(any_network.make(name).float(), exits=3).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    expected = model.forward_exits(images())
    with pytest.raises(RuntimeError, match="eval"):
        model.train().fuse()
    fused = copy.deepcopy(model.eval()).fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for found, wanted in zip(fused.forward_exits(images()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())


@torch.no_grad()
def test_fuse_leaves_alone_what_an_exit_reads(resnet):
    model = add_exits(resnet, exits=["conv1", "layer3"]).eval()  # the norm of conv1 comes behind the exit
    resnet.bn1.running_mean.normal_()
    expected = model.forward_exits(images())
    torch.testing.assert_close(copy.deepcopy(model).fuse().forward_exits(images()), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_adaptive_runs_give_the_answers_of_the_exits(resnet):
    model = add_exits(resnet, exits=3).eval()
    for head in model.heads:
        nn.init.normal_(head.fc.weight)
    x = images(8)
    exits = torch.stack(model.forward_exits(x))
    sure = exits.softmax(-1).amax(-1)
    out = AdaptiveModel(model, ExitPolicy([sure[0].median().item(), sure[1].median().item(), 0.0]))(x)
    assert len(out.exit_index.unique()) > 1
    torch.testing.assert_close(out.logits, exits[out.exit_index, torch.arange(8)], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_state_keeps_its_layout(resnet):
    model = add_exits(resnet, exits=3).eval().to(memory_format=torch.channels_last)
    _, state = model.forward_exit(0, model.begin_exits(images(4).contiguous(memory_format=torch.channels_last)))
    assert select_samples(state, torch.tensor([0, 2]))[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("by_name", (True, False), ids=("registry", "add_exits"))
def test_a_network_built_for_another_size_is_counted_saved_and_read_at_that_size(by_name, tmp_path):
    given = {"img_size": 48, "num_classes": 5}
    if by_name:
        model = timm.create_model("with_exits", backbone="test_vit", exits=2, **given).eval()
    else:
        model = add_exits(timm.create_model("test_vit", **given), exits=2).eval()
    assert input_config(model)["input_size"] == (3, 48, 48)
    save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert input_config(again)["input_size"] == (3, 48, 48)
    images = torch.randn(2, 3, 48, 48)
    for ours, theirs in zip(model.forward_exits(images), again.forward_exits(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
