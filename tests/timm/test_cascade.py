"""Cascades: every exit is a member seen at its size and in its normalisation, computed here by timm and torchvision."""

import copy

import pytest
import timm
import torch
from torchvision.transforms.functional import InterpolationMode, normalize, resize

from exit_plugins import AdaptiveModel, ExitPolicy, cascade, exit_costs
from exit_plugins.timm import save_for_hf
from exit_plugins.timm.cascade import _filter

TORCHVISION = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}


def network(name: str, **kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=6, **kwargs).eval()


@pytest.fixture
def members() -> list[torch.nn.Module]:
    small, large = network("test_efficientnet"), network("test_resnet", zero_init_last=False)
    small.pretrained_cfg.update(mean=(0.4, 0.5, 0.6), std=(0.2, 0.25, 0.3), interpolation="bilinear")
    large.pretrained_cfg.update(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return [small, large]


def pictures(batch: int = 4, size: int = 64) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def answer(net: torch.nn.Module, raw: torch.Tensor, size: int) -> torch.Tensor:
    """Of one member to raw pictures, resized by torchvision and normalised by its own configuration."""
    cfg = net.pretrained_cfg
    raw = resize(raw, [size, size], TORCHVISION[cfg["interpolation"]], antialias=True)
    return net(normalize(raw, cfg["mean"], cfg["std"]))


@torch.no_grad()
def test_members_see_pictures_as_their_configuration_says(members):
    model = cascade(members, sizes=(32, 64))
    raw = pictures()
    assert model.pretrained_cfg["input_size"] == (3, 64, 64) and model.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    x = normalize(raw, model.pretrained_cfg["mean"], model.pretrained_cfg["std"])
    first, second = model.forward_exits(x)
    torch.testing.assert_close(first, answer(members[0], raw, 32), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second, answer(members[1], raw, 64), rtol=1e-4, atol=1e-5)
    assert model(x).equal(second)


@torch.no_grad()
def test_averages_are_of_the_members_so_far(members):
    x = pictures()
    single = cascade(members, sizes=(32, 64)).forward_exits(x)
    model = cascade(members, sizes=(32, 64), average=True)
    first, second = model.forward_exits(x)
    assert first.equal(single[0])
    torch.testing.assert_close(second, (single[0] + single[1]) / 2)
    torch.testing.assert_close(model(x), second)


class Untraceable(torch.nn.Module):
    """Asks its pictures how many they are, in a way that no trace can follow."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        for name in ("num_classes", "num_features", "feature_info", "pretrained_cfg", "default_cfg"):
            setattr(self, name, getattr(net, name))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x) if float(x.abs().sum()) > 0 else self.net(x + 1)


@torch.no_grad()
@pytest.mark.parametrize("traceable", [True, False])
def test_fuse_folds_the_norms_of_every_member_that_can_be_traced(members, traceable, tmp_path):
    for module in (m for net in members for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        module.running_mean.normal_(0, 0.1)
        module.running_var.uniform_(0.5, 1.5)
    if not traceable:
        members[1] = Untraceable(members[1]).eval()
    model, x = cascade(members, sizes=(32, 64)), pictures()
    expected = model.forward_exits(x)
    fused = copy.deepcopy(model).fuse()
    norms = [sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules()) for net in fused.networks]
    assert norms[0] == 0 and (norms[1] == 0) == traceable
    for found, wanted in zip(fused.forward_exits(x), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item())
    assert AdaptiveModel(model, ExitPolicy([0.9, 0.0])).mode == "fused"
    with pytest.raises(ValueError, match="in its form for inference"):
        save_for_hf(fused, tmp_path)
    with pytest.raises(RuntimeError, match="eval"):
        model.train().fuse()


@torch.no_grad()
@pytest.mark.parametrize("average", [False, True])
def test_adaptive_runs_ask_the_second_member_of_the_unsure_alone(members, average):
    model = cascade(members, sizes=(32, 64), average=average)
    x = pictures(8)
    exits = torch.stack(model.forward_exits(x))
    threshold = exits[0].softmax(-1).amax(-1).median().item()
    seen = []
    members[1].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    out = AdaptiveModel(model, ExitPolicy([threshold, 0.0]))(x)
    assert seen == [int((out.exit_index == 1).sum())] and 0 < seen[0] < 8
    torch.testing.assert_close(out.logits, exits[out.exit_index, torch.arange(8)], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_one_network_at_rising_sizes_is_there_once(tmp_path):
    net = network("test_resnet", zero_init_last=False)
    model = cascade([net], sizes=(32, 48, 64))
    assert model.num_exits == 3 and len(model.state_dict()) == len(net.state_dict())
    x, mode = pictures(), TORCHVISION[net.pretrained_cfg["interpolation"]]
    for logits, size in zip(model.forward_exits(x), (32, 48, 64), strict=True):
        torch.testing.assert_close(logits, net(resize(x, [size] * 2, mode, antialias=True)))
    costs = exit_costs(model, (3, 64, 64))
    alone = [exit_costs(cascade([net], sizes=(s, s)), (3, s, s)).macs[0] for s in (32, 48, 64)]
    assert costs.macs.tolist() == [alone[0], alone[0] + alone[1], sum(alone)]
    assert len(set(costs.params.tolist())) == 1
    save_for_hf(model, tmp_path / "saved")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'saved'}", pretrained=True).eval()
    torch.testing.assert_close(loaded.forward_exits(x), model.forward_exits(x), rtol=0, atol=0)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("size", "wanted"), [(64, 32), (45, 32), (224, 96), (32, 64), (33, 33)])
def test_the_filter_of_graphs_is_that_of_torch(mode, size, wanted):
    x = pictures(2, size)
    matrix = _filter(size, wanted, mode, x)
    expected = resize(x, [wanted, wanted], TORCHVISION[mode], antialias=True)
    torch.testing.assert_close(matrix @ x @ matrix.T, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_checkpoints_of_the_members_load_by_name(members, tmp_path):
    files = []
    for index, net in enumerate(members):
        files.append(str(tmp_path / f"{index}.pth"))
        torch.save(net.state_dict(), files[-1])
    model = timm.create_model(
        "cascade", members="test_efficientnet, test_resnet", sizes=(32, 64), checkpoints=files, num_classes=6
    ).eval()
    for found, net in zip(model.networks, members, strict=True):
        torch.testing.assert_close(found.state_dict(), net.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(networks=["test_resnet"]), "two members or more"),
        (dict(sizes=(32,)), "1 sizes do not fit 2 networks"),
        (dict(sizes=(32, 0)), "a size is"),
        (dict(networks=["deit_tiny_patch16_224", "test_resnet"], sizes=(32, 64)), "takes images of .* only"),
        (dict(networks=["test_resnet", "dvt_test"]), "exits of its own"),
    ],
)
def test_members_that_do_not_fit_are_refused(change, message):
    names = change.pop("networks", ["test_resnet", "test_efficientnet"])
    with pytest.raises(ValueError, match=message):
        cascade([network(name) for name in names], **{"sizes": None, **change})


def test_classes_and_channels_must_agree():
    with pytest.raises(ValueError, match=r"\[6, 5\]"):
        cascade([network("test_resnet"), timm.create_model("test_resnet", num_classes=5)])
    with pytest.raises(ValueError, match=r"\[3, 1\] channels"):
        cascade([network("test_resnet"), network("test_resnet", in_chans=1)])
    labelled = [network("test_resnet"), network("test_resnet")]
    for net, names in zip(labelled, ("abcdef", "bacdef"), strict=True):
        net.pretrained_cfg["label_names"] = list(names)
    with pytest.raises(ValueError, match="labels differ"):
        cascade(labelled)
