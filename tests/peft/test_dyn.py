"""DynPeftModel as a whole: files, several adapters, schedule, dropout, mask, and what it refuses."""

import copy
import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import peft
import pytest
import timm
import torch
from peft import LoraConfig, PeftModel
from peft_backbones import make_backbone, make_images, plain_logits
from safetensors.torch import load_file, save_file
from torch import nn

from exit_plugins import BottleneckConfig, DynConfig, DynPeftModel, RepAdapterConfig, get_dyn_peft_model
from exit_plugins.peft import GradientMask, exit_weights

REP = dict(target_modules=["qkv", "fc1"], r=4)


def make(config=None, dyn_config=None, name="vit"):
    torch.manual_seed(1)
    return get_dyn_peft_model(
        make_backbone(name), config or RepAdapterConfig(**REP), dyn_config or DynConfig(exit_interval=1)
    )


def train(dyn, steps=3, optimizer=torch.optim.AdamW, **kwargs):
    x, target = make_images(), torch.tensor([0, 3, 4])
    optimizer = optimizer([p for p in dyn.parameters() if p.requires_grad], lr=0.05, **kwargs)
    mask = dyn.attach_mask(optimizer)
    dyn.train()
    for step in range(steps):
        dyn.set_progress(step / steps)
        optimizer.zero_grad()
        dyn.loss(dyn(x), target).backward()
        optimizer.step()
    if mask is not None:
        mask.detach()
    return dyn.eval()


def digest(model):
    """Hash of the backbone's own weights, under the names they have without PEFT."""
    result = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        own = key.replace(".base_layer", "").replace(".original_module", "")
        if not any(part in key for part in ("repadapter_", "lora_", "bottleneck_", "modules_to_save")):
            result.update(own.encode() + value.numpy().tobytes())
    return result.hexdigest()


# Files

FRESH_PROCESS = """
import sys, torch
sys.path.insert(0, {folder!r})
from peft_backbones import make_backbone, make_images
from exit_plugins import DynPeftModel
dyn = DynPeftModel.from_pretrained(make_backbone("vit"), {saved!r})
with torch.no_grad():
    exits = [z.clone() for z in dyn.forward_exits(make_images())]
    merged = dyn.merge_and_unload().forward_exits(make_images())
torch.save([exits, list(merged)], {out!r})
"""


@pytest.mark.slow
@pytest.mark.slow
def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    dyn = make()
    before = digest(dyn.backbone)
    assert before == digest(make_backbone("vit"))
    train(dyn)
    assert digest(dyn.backbone) == before
    dyn.save_pretrained(tmp_path / "adapter")
    code = FRESH_PROCESS.format(
        folder=str(Path(__file__).parent), saved=str(tmp_path / "adapter"), out=str(tmp_path / "out.pt")
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    loaded, merged = torch.load(tmp_path / "out.pt", weights_only=True)
    for mine, theirs, folded in zip(dyn.forward_exits(make_images()), loaded, merged, strict=True):
        torch.testing.assert_close(theirs, mine, atol=1e-5, rtol=0)
        torch.testing.assert_close(folded, mine, atol=1e-5, rtol=0)
    heads = load_file(tmp_path / "adapter" / "dyn_heads.safetensors")
    assert {key.split(".")[0] for key in heads} == {"0", "1", "2"}


def test_folder_is_small_and_is_a_plain_peft_adapter(tmp_path):
    with torch.device("meta"):
        vit = timm.create_model("vit_base_patch16_224", num_classes=100)
    vit = vit.to_empty(device="cpu")
    nn.init.zeros_(vit.head.weight)
    size = sum(p.numel() * 4 for p in vit.parameters())
    dyn = get_dyn_peft_model(vit, RepAdapterConfig(target_modules=["qkv", "fc1"]), DynConfig(num_classes=100))
    assert dyn.exit_after == (3, 6, 9, 12)
    dyn.save_pretrained(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.rglob("*")) <= 0.02 * size
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "REPADAPTER" and config["modules_to_save"] == ["head"]
    assert set(config["target_modules"]) == {"qkv", "fc1"}
    keys = load_file(tmp_path / "adapter_model.safetensors")
    assert all(key.startswith(("base_model.model.blocks.", "base_model.model.head.")) for key in keys)


def test_plain_peft_with_a_regular_expression_and_layers(tmp_path):
    for config in (
        RepAdapterConfig(target_modules=r"blocks\.[13]\.attn\.qkv"),
        RepAdapterConfig(target_modules=["qkv"], layers_to_transform=[1, 3], layers_pattern="blocks"),
    ):
        dyn = train(make(config))
        dyn.save_pretrained(tmp_path)
        plain = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
        torch.testing.assert_close(plain(make_images()), dyn(make_images()))


def test_several_adapters_have_their_own_exits(tmp_path):
    dyn, x = make(), make_images()
    train(dyn)
    first = dyn.forward_exits(x)
    dyn.add_adapter(
        "second", RepAdapterConfig(target_modules=["fc1"]), dyn_config=DynConfig(exit_interval=2, mask=None)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, dyn.forward_exits(x), strict=True))
    assert not any(p.requires_grad for p in dyn.exit_heads["second"].parameters())
    dyn.set_adapter("second")
    assert dyn.num_exits == 2 and len(dyn.exit_weights) == 2
    assert all(p.requires_grad for p in dyn.exit_heads["second"].parameters())
    assert not any(p.requires_grad for p in dyn.exit_heads["default"].parameters())
    train(dyn)
    second = dyn.forward_exits(x)
    dyn.set_adapter("default")
    assert all(torch.equal(a, b) for a, b in zip(first, dyn.forward_exits(x), strict=True))

    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    assert all(torch.equal(a, b) for a, b in zip(first, loaded.forward_exits(x), strict=True))
    loaded.set_adapter("second")
    assert all(torch.equal(a, b) for a, b in zip(second, loaded.forward_exits(x), strict=True))
    loaded.delete_adapter("default")
    assert list(loaded.exit_heads) == ["second"] and loaded.num_exits == 2
    with dyn.disable_adapter():
        torch.testing.assert_close(dyn(x), plain_logits(make_backbone("vit"), x))


def test_what_several_adapters_cannot_do_together():
    dyn, x = make(LoraConfig(target_modules=["qkv"])).eval(), make_images()
    dyn.add_adapter("second", LoraConfig(target_modules=["qkv"]))
    with pytest.raises(ValueError, match="cannot be added up.*set_adapter"):
        dyn.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mean")
    with pytest.raises(ValueError, match="(?s)got 2"):  # in PEFT's words: the classifier is one of modules_to_save
        dyn.base_model.set_adapter(["default", "second"])
    dyn.set_adapter("second")
    assert len(dyn.forward_exits(x)) == 4
    with pytest.raises(TypeError, match="adapter_names"):
        dyn(x, adapter_names=["default", "second", "default"])


def test_loading_is_strict(tmp_path):
    dyn = make()
    dyn.save_pretrained(tmp_path)
    for file, key, pattern in (
        (
            "adapter_model.safetensors",
            "base_model.model.blocks.0.attn.qkv.repadapter_A.weight",
            "Missing.*repadapter_A",
        ),
        ("dyn_heads.safetensors", "1.fc.bias", "Missing.*1.fc.bias"),
    ):
        tensors = load_file(tmp_path / file)
        save_file({k: v for k, v in tensors.items() if k != key}, tmp_path / file)
        with pytest.raises(ValueError, match=pattern):
            DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)
        save_file(tensors | {"extra": torch.zeros(1)}, tmp_path / file)
        with pytest.raises(ValueError, match="Unexpected.*extra"):
            DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)
        save_file(tensors, tmp_path / file)
    with pytest.raises(ValueError, match="trained over a VisionTransformer"):
        DynPeftModel.from_pretrained(make_backbone("eva"), tmp_path)
    (tmp_path / "dyn_config.json").unlink()
    with pytest.raises(ValueError, match="PeftModel.from_pretrained"):
        DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)


def test_a_deep_copy_is_independent():
    dyn, x = make(), make_images()
    other = copy.deepcopy(dyn)
    before = dyn.eval()(x)
    train(other)
    assert torch.equal(dyn(x), before) and not torch.equal(other(x), before)


# Schedule and dropout


def test_lambda_curve():
    curve = [exit_weights(4, t / 10) for t in range(11)]
    assert curve[0] == [0.1, 0.1, 1.0, 1.0]
    assert curve[10] == pytest.approx([0.5, 0.5, 0.5, 0.5])
    for t, (s1, s2, d1, d2) in enumerate(curve):
        assert s1 == s2 == pytest.approx(0.1 + 0.04 * t) and d1 == d2 == pytest.approx(1.0 - 0.05 * t)
        assert 0 < s1 <= d1
    assert exit_weights(3, 0.0) == [0.1, 1.0, 1.0]
    assert exit_weights(4, 0.7, shallow=(1, 1), deep=(1, 1)) == [1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        exit_weights(4, 1.2)


def test_loss_is_the_weighted_sum():
    dyn = make(dyn_config=DynConfig(exit_interval=1, label_smoothing=0.1)).eval()
    outputs, target = dyn.forward_exits(make_images()), torch.tensor([0, 3, 4])
    for progress in (0.0, 0.3, 1.0):
        dyn.set_progress(progress)
        expected = sum(
            w * nn.functional.cross_entropy(z, target, label_smoothing=0.1)
            for w, z in zip(exit_weights(4, progress), outputs, strict=True)
        )
        torch.testing.assert_close(dyn.loss(outputs, target), expected)
        by_name = dyn(pixel_values=make_images(), labels=target)
        torch.testing.assert_close(by_name.loss, expected)
        assert by_name.exit_logits.shape == (3, 4, 5)
    soft = nn.functional.one_hot(target, 5).float()
    smooth = 0.9 * soft + 0.1 / 5
    torch.testing.assert_close(dyn.loss(outputs, smooth), dyn.loss(outputs, target))
    names = set(dyn.state_dict())
    dyn.criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0, 0, 2.0, 3.0]))
    assert set(dyn.state_dict()) == names  # a criterion is no part of the model
    torch.testing.assert_close(
        dyn.loss(outputs, target), sum(0.5 * dyn.criterion(z, target) for z in outputs), atol=1e-6, rtol=1e-5
    )
    dyn.criterion = lambda logits, labels: logits.sum() * 0 + 1
    assert dyn.loss(outputs, target) == 2.0
    with pytest.raises(ValueError, match="all 4 exits"):
        dyn.loss(outputs[-1], target)
    assert "exit_weights" not in dyn.state_dict()


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    [
        RepAdapterConfig(**REP, dropout=0.3),
        BottleneckConfig(target_modules=["fc2"], dropout=0.3),
        LoraConfig(target_modules=["qkv"], lora_dropout=0.0),
        LoraConfig(target_modules=["qkv"], lora_dropout=0.3, use_dora=True),
    ],
    ids=["repadapter", "bottleneck", "lora", "dora"],
)
def test_two_rates_of_dropout_also_after_loading(config, tmp_path):
    dyn = make(config)

    def rates(model):
        found = {}
        for name, module in model.named_modules():
            if "dropout.default" in name:
                found.setdefault(int(name.split("blocks.")[1][0]), set()).add(getattr(module, "p", 0.0))
        return [found[index] for index in range(4)]

    assert rates(dyn) == [{0.5}, {0.5}, {0.1}, {0.1}]
    dyn.save_pretrained(tmp_path)
    loaded = DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    assert rates(loaded) == [{0.5}, {0.5}, {0.1}, {0.1}]
    assert torch.equal(loaded(make_images()), loaded(make_images()))  # evaluation: no dropout left on
    own = make(config, DynConfig(exit_interval=1, dropout_shallow=None, dropout_deep=0.2))
    kept = 0.0 if config.peft_type == "LORA" and not config.lora_dropout else 0.3
    assert rates(own) == [{kept}, {kept}, {0.2}, {0.2}]


def test_a_method_without_dropout_is_told_so():
    with pytest.warns(UserWarning, match="no effect"):
        make(peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]))


@pytest.mark.parametrize(
    "config",
    [
        peft.BOFTConfig(target_modules=["qkv"], boft_block_size=4, boft_dropout=0.2),
        peft.OFTConfig(target_modules=["qkv"], oft_block_size=4),
    ],
    ids=["boft", "oft"],
)
def test_what_drops_blocks_of_weights_is_left_as_the_method_has_it(config):
    plain = peft.get_peft_model(make_backbone("vit"), copy.deepcopy(config))
    with pytest.warns(UserWarning, match="no effect"):
        dyn = make(config)

    def dropouts(model):
        found = [(name, m) for name, m in model.named_modules() if name.endswith("dropout.default")]
        return [(name, type(m), getattr(m, "p", None)) for name, m in found]

    assert len(dropouts(plain)) == 4 and dropouts(dyn) == dropouts(plain)


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@pytest.mark.parametrize("method", ["repadapter", "bottleneck", "lora"])
def test_new_modules_are_in_the_mode_of_the_model_over_a_backbone_in_either(name, method):
    layers = {"repadapter": ["fc1"], "bottleneck": ["fc2"], "lora": ["fc1"]}[method]
    make_config = {"repadapter": RepAdapterConfig, "bottleneck": BottleneckConfig, "lora": LoraConfig}[method]
    for mode in (False, True):
        dyn = get_dyn_peft_model(make_backbone(name).train(mode), make_config(target_modules=layers), DynConfig())
        assert dyn.training
        assert [m.training for n, m in dyn.named_modules() if n.endswith("dropout.default")] == [True] * 4
    # The adapter added later is in the mode of the model by then, with dropout of its own or the schedule's.
    dyn.eval()
    for rate, other in ((0.5, "other"), (None, "third")):
        dyn.add_adapter(
            other,
            make_config(target_modules=["fc1", "fc2"]),
            dyn_config=DynConfig(dropout_shallow=rate, dropout_deep=rate),
        )
    assert not any(module.training for module in dyn.modules())


# Mask


def test_masked_share_and_freshness():
    parameters = [nn.Parameter(torch.zeros(300, 100)), nn.Parameter(torch.zeros(7000))]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    GradientMask(parameters, share=0.1).attach(optimizer)
    moved = []
    for _ in range(4):
        before = [p.detach().clone() for p in parameters]
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        moved.append(torch.cat([(p != b).flatten() for p, b in zip(parameters, before, strict=True)]))
        steps = torch.cat([(b - p).flatten() for p, b in zip(parameters, before, strict=True)])
        assert set(steps.unique().tolist()) <= {0.0, 1.0}  # no rescaling
    for mask in moved:
        assert abs((~mask).float().mean() - 0.1) < 0.01
    # Independent draws leave the same entry out with probability p squared.
    assert abs((~moved[0] & ~moved[1]).float().mean() - 0.01) < 0.003
    assert len({tuple(mask.tolist()) for mask in moved}) == 4


@pytest.mark.parametrize("mode", ["gradient", "update"])
def test_update_mode_holds_entries_still_under_adamw(mode):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4000))
    optimizer = torch.optim.AdamW([p], lr=0.1, weight_decay=0.1)
    mask = GradientMask([p], share=0.25, mode=mode).attach(optimizer)
    for _ in range(5):
        p.grad = torch.randn_like(p)
        expected = mask.draw([p])[0]
        before = p.detach().clone()
        optimizer.step()
        moved = p != before
        if mode == "update":
            assert torch.equal(moved, expected)
        else:
            assert moved.all()  # weight decay and momentum move what the gradient leaves out


@pytest.mark.parametrize("mode", ["gradient", "update"])
@pytest.mark.parametrize("by_name", [False, True])
def test_a_step_with_a_closure_moves_what_a_step_without_one_moves(mode, by_name):
    torch.manual_seed(0)
    start = torch.randn(400)
    ways = [nn.Parameter(start.clone()) for _ in range(2)]
    optimizers = [torch.optim.AdamW([p], lr=0.1) for p in ways]
    masks = [GradientMask([p], 0.25, mode).attach(o) for p, o in zip(ways, optimizers, strict=True)]

    def closure(p):
        p.grad = None
        loss = (p**3).sum()
        loss.backward()
        return loss

    for step in range(3):
        closure(ways[0])
        optimizers[0].step()
        second = partial(closure, ways[1])
        optimizers[1].step(closure=second) if by_name else optimizers[1].step(second)
        assert [mask.step for mask in masks] == [step + 1] * 2
    assert torch.equal(*ways) and not torch.equal(ways[0], start)
    p = nn.Parameter(start.clone())
    optimizer = torch.optim.LBFGS([p], line_search_fn="strong_wolfe")  # calls its closure again and again
    mask = GradientMask([p], 0.25, mode).attach(optimizer)
    kept = mask.draw([p])[0]
    optimizer.step(partial(closure, p))
    assert torch.equal(p != start, kept) and mask.step == 1


def test_once_per_optimiser_step_under_accumulation():
    from accelerate import Accelerator

    dyn = make()
    optimizer = torch.optim.AdamW([p for p in dyn.parameters() if p.requires_grad], lr=0.01)
    mask = dyn.attach_mask(optimizer)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, wrapped = accelerator.prepare(dyn, optimizer)
    model.train()
    for _ in range(8):
        with accelerator.accumulate(model):
            loss = model(pixel_values=make_images(), labels=torch.tensor([0, 3, 4])).loss
            accelerator.backward(loss)
            wrapped.step()
            wrapped.zero_grad()
    assert mask.step == 2


def test_scope_of_the_mask():
    names = {}
    for scope in ("all", "adapters", "heads"):
        dyn = make(dyn_config=DynConfig(exit_interval=1, mask_scope=scope))
        optimizer = torch.optim.SGD([p for p in dyn.parameters() if p.requires_grad], lr=0.1)
        chosen = {id(p) for p in dyn.attach_mask(optimizer).parameters}
        names[scope] = {name for name, p in dyn.named_parameters() if id(p) in chosen}
    assert names["all"] == names["adapters"] | names["heads"] and not names["adapters"] & names["heads"]
    assert all("repadapter" in name for name in names["adapters"])
    assert any("modules_to_save" in name for name in names["heads"])
    assert make(dyn_config=DynConfig(exit_interval=1, mask=None)).attach_mask(optimizer) is None
    with pytest.raises(ValueError, match="none of the masked"):
        make().attach_mask(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))


def test_masks_agree_between_processes_and_after_resuming():
    p = nn.Parameter(torch.zeros(50))
    one, two = (GradientMask([p], 0.5, seed=3) for _ in range(2))
    one.step = two.step = 17
    assert torch.equal(one.draw([p])[0], two.draw([p])[0])
    two.step = 18
    assert not torch.equal(one.draw([p])[0], two.draw([p])[0])


# Refusals


@pytest.mark.parametrize(
    ("config", "dyn_config", "message"),
    [
        (None, DynConfig(exit_interval=3), r"does not cut 4 blocks.*\[1, 2\]"),
        (None, DynConfig(exit_interval=4), "two or more"),
        (None, DynConfig(num_classes=7), "5 classes and DynConfig says 7"),
        (RepAdapterConfig(target_modules=["query"]), None, r"name no module.*attn.qkv, attn.proj, mlp.fc1, mlp.fc2"),
        (RepAdapterConfig(**REP, task_type="SEQ_CLS"), None, "language models"),
        (None, DynConfig(exit_interval=1, head_widths=(8, 8, 8, 8)), "3 early heads"),
    ],
)
def test_what_does_not_fit(config, dyn_config, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        make(config, dyn_config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(token="register"), "cls or mean"),
        (dict(mask="hard"), "gradient or update"),
        (dict(mask_scope="body"), "adapters"),
        (dict(mask_share=1.0), "mask_share"),
        (dict(lambda_deep=(1.0,)), "pair"),
        (dict(head_widths=(-1,)), "head_widths"),
    ],
)
def test_bad_configuration(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynConfig(**arguments)


def test_other_refusals():
    with pytest.raises(ValueError, match="no classifier"):
        get_dyn_peft_model(timm.models.VisionTransformer(depth=4, num_classes=0), RepAdapterConfig(**REP), DynConfig())
    with pytest.raises(ValueError, match="no class token"):
        make(dyn_config=DynConfig(token="cls"), name="augreg_mean")
    with pytest.raises(TypeError, match="does not wrap layers"):
        get_dyn_peft_model(make_backbone("vit"), peft.PrefixTuningConfig(num_virtual_tokens=2), DynConfig())
    dyn = make().train()
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        dyn(pixel_values=make_images())
    with pytest.raises(TypeError, match="once"):
        dyn()
    backbone = make_backbone("vit")
    config = RepAdapterConfig(**REP)
    get_dyn_peft_model(backbone, config, DynConfig(exit_interval=1))
    assert config.modules_to_save is None  # the caller's configuration is left alone
