"""What must hold of a timm network with exits, checked beside the network itself."""

import copy

import timm
import torch
from timm.models import _registry
from timm.models._input import get_model_input_config
from torch import Tensor, nn

from exit_plugins import add_exits
from exit_plugins.exits.protocol import batch_size, select_samples
from exit_plugins.timm import ARCHITECTURES
from exit_plugins.timm.any_model import WithExits

TOLERANCE = 1e-5  # of the largest value

# Networks of which even the smallest is large, made smaller.
_SHORT_VIT = dict(depth=4, embed_dim=96, num_heads=3)
SHRUNK = {
    "beit": dict(_SHORT_VIT, img_size=112),
    "deepseek_vit": dict(_SHORT_VIT, img_size=126),
    "gemma4_vit": dict(_SHORT_VIT, img_size=192),
    "naflexvit": _SHORT_VIT,
    "qwen3_vit": dict(_SHORT_VIT, img_size=192),
    "vgg": dict(mlp_ratio=0.05),
    "vision_transformer_sam": dict(_SHORT_VIT, global_attn_indexes=(1, 3)),
}


def modules_of_timm() -> dict[str, list[str]]:
    """Every model module of the installed timm, and the names of its models."""
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        module = _registry._model_to_module[name]
        if module not in ARCHITECTURES:
            found.setdefault(module, []).append(name)
    return found


def smallest(names: list[str]) -> str:
    """The model with the fewest parameters and pixels."""

    def size(name: str) -> float:
        model = timm.create_model(name, device="meta")
        height, width = model.default_cfg["input_size"][1:]
        return sum(p.numel() for p in model.parameters()) + 100 * height * width

    return min(names, key=size)


def make(name: str, **kwargs) -> nn.Module:
    """A network in double precision whose every part has a say in the answer."""
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs).double()
    with torch.no_grad():
        for parameter in model.parameters():  # scales and classifiers that start at zero
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.eval()


def images(model: nn.Module, batch: int) -> Tensor:
    """Small ones, where the network takes them."""
    config = get_model_input_config(model)
    size = config["input_size"]
    if not config["fixed_input_size"] and size[1] > 128:
        try:
            with torch.no_grad():
                copy.deepcopy(model).to("meta")(torch.empty(2, size[0], 128, 128, dtype=torch.float64, device="meta"))
            size = (size[0], 128, 128)
        except Exception:  # sizes that its windows do not divide
            pass
    return torch.randn(batch, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def assert_close(found: Tensor, expected: Tensor, what: str) -> None:
    scale = expected.abs().max().clamp_min(1e-12)
    error = ((found - expected).abs().max() / scale).item()
    assert found.shape == expected.shape and error <= TOLERANCE, f"{what}: {error:.1e} of the largest value"


def check_network(name: str, exits: int = 3, **kwargs) -> WithExits:
    """Assert that the exits change nothing of the network ``name``; return it with its exits."""
    plain = make(name, **kwargs)
    model = add_exits(copy.deepcopy(plain), exits=exits).double().eval()
    assert model.num_exits == exits
    _check_evaluation(plain, model)
    _check_resuming(model)
    _check_training(plain, model)
    return model


@torch.no_grad()
def _check_evaluation(plain: nn.Module, model: WithExits) -> None:
    for batch in (1, 5):
        x = images(plain, batch)
        outputs = model.forward_exits(x)
        assert_close(outputs[-1], plain(x), f"last exit, batch {batch}")
        assert all(logits.shape == outputs[-1].shape and logits.isfinite().all() for logits in outputs)


@torch.no_grad()
def _check_resuming(model: WithExits) -> None:
    """Every second sample leaves at every exit, and the others get the answers of the whole run."""
    x = images(model.backbone, 5)
    whole = model.forward_exits(x)
    state, kept = model.begin_exits(x), torch.arange(5)
    for index in range(model.num_exits):
        before = state
        logits, state = model.forward_exit(index, before)
        assert_close(logits, whole[index][kept], f"exit {index} of samples {kept.tolist()}")
        again, _ = model.forward_exit(index, before)  # a segment leaves its state as it was
        assert_close(again, logits, f"exit {index} once more")
        if index < model.num_exits - 1:
            assert batch_size(state) == len(kept)
            stay = torch.arange(len(kept))[index % 2 :: 2]
            state, kept = select_samples(state, stay), kept[stay]


def _check_training(plain: nn.Module, model: WithExits) -> None:
    x = images(plain, 4)
    gradients = []
    logits = []
    for net in (plain, model):
        net.train()
        torch.manual_seed(0)
        outputs = net(x)
        last = outputs if net is plain else outputs[-1]
        last.square().sum().backward()
        logits.append(last.detach())
        backbone = net if net is plain else net.backbone
        gradients.append({key: p.grad for key, p in backbone.named_parameters() if p.grad is not None})
    assert_close(logits[1], logits[0], "last exit in training")
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for key, expected in gradients[0].items():
        error = ((gradients[1][key] - expected).abs().max() / largest).item()
        assert error <= TOLERANCE, f"gradient of {key}: {error:.1e} of the largest"
    for key, buffer in plain.named_buffers():
        if buffer.is_floating_point():
            torch.testing.assert_close(model.backbone.get_buffer(key), buffer, msg=f"buffer {key} after training")
