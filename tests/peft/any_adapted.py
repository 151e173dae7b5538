"""What must hold of an adapted timm network with exits, checked beside the network's own forward."""

import tempfile
import warnings

import any_network
import torch
from peft import LoraConfig
from torch import nn

from exit_plugins import DynConfig, DynPeftModel, get_dyn_peft_model
from exit_plugins.exits.protocol import select_samples


def make_backbone(name: str, **kwargs) -> nn.Module:
    """The network with five classes, small random weights everywhere, the same at every call."""
    return any_network.make(name, num_classes=5, **kwargs).float()


def adapt(name: str, config=None, dyn: DynConfig | None = None, **kwargs) -> DynPeftModel:
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods without dropout are told so
        config = config or LoraConfig(r=2, init_lora_weights=False)
        return get_dyn_peft_model(make_backbone(name, **kwargs), config, dyn or DynConfig(mask=None)).eval()


def check_adapted(name: str, config=None, **kwargs) -> DynPeftModel:
    """Adapt, compare with the network's own forward, resume, train two steps, save, load, merge."""
    model = adapt(name, config, **kwargs)
    x, target = any_network.images(model.backbone, 3).float(), torch.tensor([0, 3, 4])
    with torch.no_grad():
        any_network.assert_close(model.forward_exits(x)[-1], model.backbone(x), "last exit")
    frozen = {k: v.clone() for k, v in model.backbone.state_dict().items() if ".base_layer." in k or "running" in k}
    frozen = {k: v for k, v in frozen.items() if "modules_to_save" not in k}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train().set_progress(0.5)
    for step in range(2):
        optimizer.zero_grad()
        model.loss(model(x), target).backward()
        # Random weights under batch norms that have seen nothing give logits of any size.
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not step:
            untouched = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
            assert not untouched, untouched
        optimizer.step()
    model.eval()
    state = model.backbone.state_dict()
    assert all(torch.equal(state[key], value) for key, value in frozen.items())  # batch norms among them
    with torch.no_grad():
        exits = model.forward_exits(x)
        keep = torch.tensor([2, 0])
        passed = model.begin_exits(x)
        for index, whole in enumerate(exits):
            logits, passed = model.forward_exit(index, passed)
            found = logits if len(logits) == 2 else logits[keep]
            any_network.assert_close(found, whole[keep], f"resumed at exit {index}")
            if len(logits) == 3:
                passed = select_samples(passed, keep)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = DynPeftModel.from_pretrained(make_backbone(name, **kwargs), folder)
        for mine, theirs in zip(exits, loaded.forward_exits(x), strict=True):
            any_network.assert_close(theirs, mine, "loaded")
        standardised = any(type(m).__name__.startswith(("StdConv", "ScaledStdConv")) for m in loaded.modules())
        misnamed = "base_layer" in loaded.backbone._modules
        if loaded.peft_type != "BOTTLENECK" and not standardised and not misnamed:  # what is refused when merging
            merged = loaded.merge_and_unload()
            scale = max(float(z.abs().max()) for z in exits)
            for mine, theirs in zip(exits, merged.forward_exits(x), strict=True):
                assert (mine - theirs).abs().max() <= 1e-3 * scale, "merged"
            exits = merged.forward_exits(x)
            for mine, theirs in zip(exits, merged.fuse().forward_exits(x), strict=True):
                assert (mine - theirs).abs().max() <= 1e-3 * scale, "fused"
    return model
