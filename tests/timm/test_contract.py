"""What a timm user tries on a model, on the small model of every registered architecture.

A new architecture is picked up by itself: it registers a ``*_test`` model. timm's own test file, run by tests/hosts/
over the same models, checks shapes and metadata; here stands what it leaves out, and what exits add.
"""

import copy
import io

import pytest
import timm
import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.export import Dim
from torch.nn.parallel import DistributedDataParallel

from exit_plugins import exit_costs
from exit_plugins.exits.protocol import check_multi_exit, select_samples
from exit_plugins.timm import ARCHITECTURES, list_models, model_card, save_for_hf

SMALL = [name for name in list_models(clips=False) if name.endswith("_test")]

pytestmark = pytest.mark.parametrize("name", SMALL)


def make(name: str, **kwargs) -> nn.Module:
    """An evaluation model with non-trivial weights and running statistics, the same on every call."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.weight.device.type != "meta":
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def images(model: nn.Module, batch: int = 2, size: tuple[int, int] | None = None, **kwargs) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = size or model.default_cfg["input_size"][1:]
    return torch.randn(batch, model.in_chans, *size, generator=generator).to(**kwargs)


def classifiers(model: nn.Module) -> list[str]:
    names = model.default_cfg["classifier"]
    return [names] if isinstance(names, str) else list(names)


def test_every_architecture_has_a_small_model(name):
    assert {timm.models._registry._model_to_module[small] for small in SMALL} == set(ARCHITECTURES) - {"video"}


# --- exits -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_train_returns_every_exit_and_eval_the_last(name):
    model = check_multi_exit(make(name, num_classes=7))
    x = images(model)
    exits = model.forward_exits(x)
    assert len(exits) == model.num_exits >= 2
    assert all(logits.shape == (2, 7) for logits in exits)
    torch.testing.assert_close(model(x), exits[-1])
    assert isinstance(model(x), Tensor)
    outputs = model.train()(x)
    assert isinstance(outputs, tuple) and len(outputs) == model.num_exits


@torch.no_grad()
def test_any_sample_can_leave_at_any_exit(name):
    model = make(name)
    x = images(model, batch=4)
    expected = model.forward_exits(x)
    state, kept = model.begin_exits(x), torch.arange(4)
    for index in range(model.num_exits):
        logits, state = model.forward_exit(index, state)
        torch.testing.assert_close(logits, expected[index][kept], rtol=1e-4, atol=1e-5)
        if len(kept) > 1:
            stay = torch.tensor([i for i in range(len(kept)) if i != index % len(kept)])
            state, kept = select_samples(state, stay), kept[stay]


# --- creation --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("in_chans", [1, 4])
def test_input_channels(name, in_chans):
    model = make(name, in_chans=in_chans)
    assert model.in_chans == in_chans
    assert model(images(model)).shape == (2, model.num_classes)


@torch.no_grad()
def test_other_sizes_and_aspect_ratios(name):
    model = make(name)
    height, width = model.default_cfg["input_size"][1:]
    for size in ((height * 2, width), (height, width * 3 // 2)):
        if model.default_cfg.get("fixed_input_size"):
            model = make(name, img_size=size)
        exits = model.forward_exits(images(model, size=size))
        assert all(logits.shape == (2, model.num_classes) and logits.isfinite().all() for logits in exits)


@torch.no_grad()
@pytest.mark.parametrize("rate", ["drop_rate", "drop_path_rate"])
def test_drop_rates_act_in_training_alone(name, rate):
    model = make(name, **{rate: 0.5})
    x = images(model, batch=4)
    torch.testing.assert_close(model(x), make(name)(x))

    def training_pass(drop: float, seed: int) -> Tensor:
        model = make(name, **{rate: drop}).train()
        torch.manual_seed(seed)
        return model(x)[-1]

    assert not torch.allclose(training_pass(0.5, seed=0), training_pass(0.5, seed=1))
    # Some models drop a little by default; the same seed shows that it is this rate that acts.
    assert not torch.allclose(training_pass(0.5, seed=0), training_pass(0.0, seed=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@torch.no_grad()
def test_dtype_of_the_factory_reaches_every_tensor(name, dtype):
    model = make(name, dtype=dtype)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    assert not {n for n, t in tensors.items() if t.is_floating_point() and t.dtype != dtype}
    assert all(logits.dtype == dtype for logits in model.forward_exits(images(model, dtype=dtype)))


@torch.no_grad()
def test_device_of_the_factory_reaches_every_tensor(name):
    model = timm.create_model(name, device="meta").eval()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    assert model(images(model, device="meta")).shape == (2, model.num_classes)


@torch.no_grad()
@pytest.mark.parametrize("flag", ["scriptable", "exportable"])
def test_scriptable_and_exportable_models_compute_the_same(name, flag):
    model = make(name, **{flag: True})
    torch.testing.assert_close(model(images(model)), make(name)(images(model)))


def test_unknown_arguments_are_refused(name):
    with pytest.raises(TypeError, match="no_such_argument"):
        timm.create_model(name, no_such_argument=1)


# --- classifier ------------------------------------------------------------------------------------------------------


def test_reset_classifier_changes_every_exit_and_nothing_else(name):
    model = make(name, num_classes=7).to(torch.float64)
    before = copy.deepcopy(model.state_dict())
    model.reset_classifier(5)
    assert model.num_classes == 5
    with torch.no_grad():
        assert all(logits.shape == (2, 5) for logits in model.forward_exits(images(model, dtype=torch.float64)))
    after = model.state_dict()
    assert {t.dtype for t in model.parameters()} == {torch.float64} and not model.training
    heads = tuple(f"{classifier}." for classifier in classifiers(model))
    changed = {
        key for key in before | after if key not in before or key not in after or not before[key].equal(after[key])
    }
    assert changed == {key for key in before | after if key.startswith(heads)}


@torch.no_grad()
def test_without_classes_the_model_gives_pooled_features(name):
    model = make(name, num_classes=0)
    full = make(name)
    x = images(model)
    features = model(x)
    assert features.shape == (2, model.head_hidden_size)
    assert not [key for key in model.state_dict() if key.startswith(tuple(f"{c}." for c in classifiers(full)))]
    full.reset_classifier(0)
    assert full(x).shape == features.shape
    expected = make(name)
    torch.testing.assert_close(full(x), expected.forward_head(expected.forward_features(x), pre_logits=True))


# --- features --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_features_only_gives_the_maps_of_forward_intermediates(name):
    model = make(name)
    backbone = timm.create_model(name, features_only=True).eval()
    inner = {key.removeprefix("model."): key for key in backbone.state_dict()}
    backbone.load_state_dict({inner[k]: v for k, v in model.state_dict().items() if k in inner})
    x = images(model)
    maps = backbone(x)
    torch.testing.assert_close(maps, model.forward_intermediates(x, intermediates_only=True))
    for fmap, channels, reduction in zip(
        maps, backbone.feature_info.channels(), backbone.feature_info.reduction(), strict=True
    ):
        assert fmap.shape == (2, channels, *(side // reduction for side in x.shape[2:]))
    first = timm.create_model(name, features_only=True, out_indices=(0,))
    assert sum(p.numel() for p in first.parameters()) < sum(p.numel() for p in backbone.parameters())


@torch.no_grad()
def test_forward_intermediates_options(name):
    model = make(name)
    x = images(model)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, model.forward_features(x))
    last = len(maps) - 1
    for wanted, expected in ((1, maps[-1:]), ([0, -1], [maps[0], maps[-1]]), ([last], maps[-1:])):
        torch.testing.assert_close(model.forward_intermediates(x, indices=wanted, intermediates_only=True), expected)
    early = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early, maps[:1])
    with pytest.raises((AssertionError, ValueError)):
        model.forward_intermediates(x, output_fmt="nonsense")


# --- training --------------------------------------------------------------------------------------------------------


def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for enabled in (False, True):
        model = make(name).double().train()
        model.set_grad_checkpointing(enabled)
        sum(logits.square().mean() for logits in model(images(model, dtype=torch.float64))).backward()
        gradients.append({key: p.grad for key, p in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_layer_decay_grows_from_the_stem_to_the_heads(name):
    model = make(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05, layer_decay=0.5)
    scale = {id(p): group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    names = dict(model.named_parameters())
    assert set(scale) == {id(p) for p in names.values()}
    first = model.default_cfg["first_conv"]
    stem = scale[id(names[f"{first if isinstance(first, str) else first[0]}.weight"])]
    assert stem == min(scale.values())
    assert all(scale[id(names[f"{classifier}.weight"])] == 1.0 for classifier in classifiers(model))
    assert len(set(scale.values())) > 2


def test_no_weight_decay_on_what_the_model_names_and_on_vectors(name):
    model = make(name)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=0.1, weight_decay=0.05)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    exempt = model.no_weight_decay()
    assert exempt <= set(dict(model.named_parameters()))
    for key, parameter in model.named_parameters():
        expected = 0.0 if key in exempt or parameter.ndim <= 1 else 0.05
        assert decay[id(parameter)] == expected, key


def test_ddp_needs_no_search_for_unused_parameters(name, tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = make(name).train()
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # DDP complains in the step after one that left a parameter out
            sum(logits.mean() for logits in wrapped(images(model))).backward()
    finally:
        dist.destroy_process_group()
    assert all(p.grad is not None for p in model.parameters())


# --- compilation and export ------------------------------------------------------------------------------------------


def test_compiles_into_one_graph(name):
    torch._dynamo.reset()
    model = make(name)
    x = images(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
    model.train()
    sum(logits.mean() for logits in compiled(x)).backward()
    assert all(p.grad is not None for p in model.parameters())


@torch.no_grad()
def test_exports_with_any_batch_size(name):
    model = make(name)
    batch = Dim("batch", max=2**31 - 1)  # torch 2.6 asks for an end where images are cut by an unfold, as in DVT
    program = torch.export.export(model, (images(model),), dynamic_shapes=({0: batch},))
    x = images(model, batch=5)
    torch.testing.assert_close(program.module()(x), model(x))


class EveryExit(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.model.forward_exits(x)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # of the checks, which are no part of the graph
@pytest.mark.parametrize("kind", ["trace", "trace fused", "export fused"])
def test_a_graph_is_right_at_every_image_size_or_refuses_it(name, kind):
    """Nothing of the size that an exporter saw may stay in the graph without a word."""
    model = make(name, num_classes=7)
    every = EveryExit(model.fuse() if "fused" in kind and hasattr(model, "fuse") else model).eval()
    height, width = model.default_cfg["input_size"][1:]
    other = images(model, batch=3, size=(2 * height + 5, width + 32))
    try:
        expected = every(other)
    except ValueError:  # an architecture of one image size
        expected = None
    if "trace" in kind or expected is None:
        graph = torch.jit.trace(every, (images(model),), check_trace=False)
    else:
        free = {axis: Dim.DYNAMIC for axis in (0, 2, 3)}
        graph = torch.export.export(every, (images(model),), dynamic_shapes=(free,)).module()
    if expected is None:
        with pytest.raises(RuntimeError):
            graph(other)
    else:
        torch.testing.assert_close(graph(other), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_torchscript_keeps_the_last_exit(name):
    model = make(name, scriptable=True)
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(model), file)
    file.seek(0)
    x = images(model)
    torch.testing.assert_close(torch.jit.load(file)(x), model(x))


# --- saving and loading ----------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("safe", [True, False])
def test_saved_folder_loads_again(name, tmp_path, safe):
    model = make(name, num_classes=7, in_chans=1)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=safe)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded) is type(model)
    x = images(model)
    torch.testing.assert_close(loaded.forward_exits(x), model.forward_exits(x), rtol=0, atol=0)


def test_card_names_exits_and_costs(name, tmp_path):
    model = make(name)
    costs = exit_costs(model, model.default_cfg["input_size"])
    accuracies = [50.0 + k for k in range(model.num_exits)]
    save_for_hf(model, tmp_path, accuracies, "cifar100")
    text = (tmp_path / "README.md").read_text()
    for index in range(model.num_exits):
        gmacs, params = costs.macs[index] / 1e9, costs.params[index] / 1e6
        line = f"exit {index + 1}: {gmacs:.4g} GMACs, {params:.2f} M parameters, {accuracies[index]:.2f} % top-1"
        assert line in text
    assert "early-exit" in text and "cifar100" in text
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with pytest.raises(ValueError, match="one per exit"):
        model_card(model, accuracies[1:])


@torch.no_grad()
def test_own_checkpoint_files_load_by_path(name, tmp_path):
    model = make(name)
    x = images(model)
    path = tmp_path / "last.pth.tar"
    # As timm's CheckpointSaver writes it.
    torch.save({"epoch": 1, "arch": name, "state_dict": model.state_dict()}, path)
    torch.manual_seed(1)
    loaded = timm.create_model(name, checkpoint_path=path).eval()
    torch.testing.assert_close(loaded.forward_exits(x), model.forward_exits(x), rtol=0, atol=0)


@torch.no_grad()
def test_pretrained_file_loads_and_other_classes_drop_every_head(name, tmp_path):
    model = make(name)
    path = tmp_path / "weights.pth"
    torch.save(model.state_dict(), path)
    overlay = dict(file=str(path))
    same = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = images(model)
    torch.testing.assert_close(same.forward_exits(x), model.forward_exits(x), rtol=0, atol=0)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5).eval()
    assert all(logits.shape == (2, 5) for logits in other.forward_exits(x))
    body = {k for k in model.state_dict() if not k.startswith(tuple(f"{c}." for c in classifiers(model)))}
    assert all(other.state_dict()[key].equal(model.state_dict()[key]) for key in body)
    grey = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, in_chans=1)
    first = model.default_cfg["first_conv"]
    for conv in [first] if isinstance(first, str) else first:
        old, new = model.state_dict()[f"{conv}.weight"], grey.state_dict()[f"{conv}.weight"]
        if old.shape[1] == 3:
            torch.testing.assert_close(new, old.sum(1, keepdim=True))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(path.read_bytes()[:1000])
    with pytest.raises((ValueError, RuntimeError)):
        timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(damaged)))


def test_channels_last_weights_are_saved_too(name, tmp_path):
    model = make(name).to(memory_format=torch.channels_last)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
