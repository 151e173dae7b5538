"""What is saved is what loads, in a fresh process, whatever the method's options; merged models; broken writes."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import timm
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft_backbones import FAMILIES, make_backbone, make_images, plain_logits
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

from exit_plugins import BottleneckConfig, DynConfig, DynPeftModel, RepAdapterConfig, exit_costs, get_dyn_peft_model
from exit_plugins.peft import MultiExitBackbone

T = dict(target_modules=["qkv", "fc1"])
BLOCKS = dict(layers_to_transform=[0, 2], layers_pattern="blocks")
OPTIONS = {
    "lora bias all": lambda: LoraConfig(**T, bias="all"),
    "lora bias own": lambda: LoraConfig(**T, bias="lora_only"),
    "lora norms saved": lambda: LoraConfig(**T, modules_to_save=["norm", "norm1"]),
    "lora layers": lambda: LoraConfig(**T, **BLOCKS),
    "lora patterns": lambda: LoraConfig(
        **T, rank_pattern={"fc1": 3, r"blocks\.1\.attn\.qkv": 2}, alpha_pattern={"fc1": 5}
    ),
    "lora dora": lambda: LoraConfig(**T, use_dora=True, use_rslora=True),
    "lora bias term": lambda: LoraConfig(**T, lora_bias=True),
    "lora pissa": lambda: LoraConfig(**T, init_lora_weights="pissa"),
    "lora olora": lambda: LoraConfig(**T, init_lora_weights="olora"),
    "lora excluded": lambda: LoraConfig(target_modules="all-linear", exclude_modules=["head", "proj"]),
    "oft bias all": lambda: peft.OFTConfig(**T, bias="all", oft_block_size=8, r=0),
    "boft bias own": lambda: peft.BOFTConfig(**T, bias="boft_only", boft_block_size=4),
    "adalora": lambda: peft.AdaLoraConfig(**T, total_step=9, bias="all"),
    "loha layers": lambda: peft.LoHaConfig(**T, **BLOCKS, rank_pattern={"fc1": 3}),
    "vera unsaved projection": lambda: peft.VeraConfig(target_modules=["fc2"], save_projection=False),
    "vblora top": lambda: peft.VBLoRAConfig(**T, vector_length=8, num_vectors=8, save_only_topk_weights=True),
    "ia3 norms saved": lambda: peft.IA3Config(**T, feedforward_modules=["fc1"], modules_to_save=["norm"]),
    "repadapter bias all": lambda: RepAdapterConfig(**T, bias="all"),
    "repadapter all": lambda: RepAdapterConfig(
        **T, **BLOCKS, bias="repadapter_only", rank_pattern={"fc1": 4}, scale_pattern={"qkv": 2.0}, groups=1
    ),
    "bottleneck bias all": lambda: BottleneckConfig(target_modules=["fc2"], bias="all", rank_pattern={"0.mlp.fc2": 3}),
}
FRESH = """
import sys, warnings, torch
warnings.simplefilter("ignore")
sys.path.insert(0, {here!r})
from pathlib import Path
from huggingface_hub import ModelCard
from peft_backbones import make_backbone, make_images
from exit_plugins import DynPeftModel
for folder in sorted(Path({folder!r}).iterdir()):
    dyn = DynPeftModel.from_pretrained(make_backbone("vit"), folder)
    with torch.no_grad():
        torch.save(torch.stack(dyn.forward_exits(make_images())), folder / "exits.pt")
"""


def make(config=None, name="vit", **dyn):
    torch.manual_seed(1)
    config = config or RepAdapterConfig(target_modules=FAMILIES[name][1], r=4, init_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # methods without dropout are told so
        return get_dyn_peft_model(make_backbone(name), config, DynConfig(**{"mask": None} | dyn))


def train(dyn, steps=2):
    optimizer = torch.optim.AdamW([p for p in dyn.parameters() if p.requires_grad], lr=0.02)
    dyn.train()
    dyn.set_progress(0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        dyn.loss(dyn(make_images()), torch.tensor([0, 3, 4])).backward()
        optimizer.step()
    return dyn.eval()


@torch.no_grad()
def exits(model):
    return torch.stack(list(model.forward_exits(make_images())))


@pytest.mark.slow
def test_every_option_comes_back_in_a_fresh_process(tmp_path):
    expected = {}
    for name, config in OPTIONS.items():
        torch.manual_seed(2)
        dyn = train(make(config()))
        folder = tmp_path / name.replace(" ", "_")
        dyn.save_pretrained(folder)
        expected[folder] = exits(dyn)
    code = FRESH.format(here=str(Path(__file__).parent), folder=str(tmp_path))
    subprocess.run([sys.executable, "-c", code], check=True)
    for folder, mine in expected.items():
        torch.testing.assert_close(
            torch.load(folder / "exits.pt", weights_only=True), mine, atol=1e-6, rtol=1e-6, msg=folder.name
        )


@pytest.mark.parametrize(
    "config", [LoraConfig(**T), LoraConfig(**T, bias="all"), peft.VBLoRAConfig(**T, vector_length=8)]
)
def test_pefts_own_state_dict_functions_carry_the_early_heads(config):
    dyn = train(make(config))
    state = get_peft_model_state_dict(dyn)
    assert sum(key.startswith("exit_heads.") for key in state) >= len(dyn.early_heads.state_dict())
    other = make(config).eval()
    assert not torch.allclose(exits(other), exits(dyn))
    result = set_peft_model_state_dict(other, state)
    assert not any("exit_heads" in key for key in (*result.missing_keys, *result.unexpected_keys))
    torch.testing.assert_close(exits(other), exits(dyn))


def test_a_second_adapter_has_the_backbones_classes():
    dyn = make()
    with pytest.raises(ValueError, match="5 classes and DynConfig says 7"):
        dyn.add_adapter("second", RepAdapterConfig(target_modules=["fc1"]), dyn_config=DynConfig(num_classes=7))
    assert list(dyn.peft_config) == list(dyn.exit_heads) == ["default"]


# Folders


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("writer", ["adapter_config.json", "adapter_model.safetensors", "dyn_heads.safetensors"])
def test_a_failed_save_leaves_what_was_there(tmp_path, writer, monkeypatch):
    dyn = make()
    folder = tmp_path / "adapter"
    dyn.save_pretrained(folder)
    (folder / "notes.txt").write_text("mine")
    before = contents(folder)
    train(dyn)
    place = {
        "adapter_config.json": (peft.PeftConfig, "save_pretrained"),
        "adapter_model.safetensors": (peft.peft_model, "safe_save_file"),
        "dyn_heads.safetensors": (sys.modules["exit_plugins.peft.dyn"], "write_exits"),
    }[writer]

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*place, full)
    with pytest.raises(OSError, match="No space"):
        dyn.save_pretrained(folder)
    assert contents(folder) == before and os.listdir(tmp_path) == ["adapter"]
    monkeypatch.undo()
    dyn.save_pretrained(folder)
    after = contents(folder)
    assert after["notes.txt"] == b"mine" and after["adapter_model.safetensors"] != before["adapter_model.safetensors"]
    torch.testing.assert_close(exits(DynPeftModel.from_pretrained(make_backbone("vit"), folder)), exits(dyn))


def test_saving_in_the_older_format_leaves_no_stale_weights(tmp_path):
    dyn = make()
    dyn.save_pretrained(tmp_path)
    train(dyn)
    dyn.save_pretrained(tmp_path, safe_serialization=False)
    assert not (tmp_path / "adapter_model.safetensors").exists()
    torch.testing.assert_close(exits(DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)), exits(dyn))


def test_damaged_files_are_named(tmp_path):
    make().save_pretrained(tmp_path)
    for name, damaged in (
        ("dyn_config.json", b"{"),
        ("dyn_config.json", b"[1]"),
        ("dyn_heads.safetensors", b"\0" * 20),
    ):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match="not a readable|has format"):
            DynPeftModel.from_pretrained(make_backbone("vit"), tmp_path)
        (tmp_path / name).write_bytes(whole)


# Merged models


@pytest.mark.parametrize("name", ["vit", "deit", "eva", "swin", "convnext", "hf_vit", "hf_dinov2", "hf_beit"])
def test_a_merged_model_is_written_whole_and_read(name, tmp_path):
    merged = train(make(name=name)).merge_and_unload()
    merged.save_pretrained(tmp_path)
    loaded = MultiExitBackbone.from_pretrained(tmp_path, make_backbone(name))
    assert torch.equal(exits(loaded), exits(merged)) and not loaded.training
    if name.startswith("hf_"):
        anew = MultiExitBackbone.from_pretrained(tmp_path)
        assert torch.equal(exits(anew), exits(merged))
        # Transformers' own way gives the last exit. (Its BEiT has no bias for keys, which softmax does not see.)
        plain = AutoModelForImageClassification.from_pretrained(tmp_path).eval()
        torch.testing.assert_close(plain_logits(plain, make_images()), exits(merged)[-1], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="MultiExitBackbone.from_pretrained"):
        DynPeftModel.from_pretrained(make_backbone(name), tmp_path)
    with pytest.raises(ValueError, match="was trained over a"):
        MultiExitBackbone.from_pretrained(tmp_path, make_backbone("hf_deit"))


def test_a_merged_timm_model_of_the_registry_needs_no_backbone(tmp_path):
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", **kwargs)
    dyn = train(get_dyn_peft_model(vit, LoraConfig(**T), DynConfig()))
    merged = dyn.merge_and_unload().half().float()
    merged.save_pretrained(tmp_path)
    assert torch.equal(exits(MultiExitBackbone.from_pretrained(tmp_path)), exits(merged))
    plain = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(plain(make_images()), exits(merged)[-1])


@pytest.mark.parametrize("name", ["vit", "swin", "hf_vit", "hf_deit_teacher"])
@pytest.mark.parametrize("method", [RepAdapterConfig, LoraConfig, peft.VeraConfig])
def test_a_wider_last_head_is_trained_saved_and_merged(name, method, tmp_path):
    if method is peft.VeraConfig and name == "swin":
        pytest.skip("VeRA shares projections between layers, and Swin's widths differ by stage")
    _, targets, behind = FAMILIES[name]
    config = method(target_modules=targets if method is not peft.VeraConfig else [behind])
    plain = make(method(target_modules=config.target_modules), name)
    dyn = make(config, name, last_head_width=7)
    names = dyn.family.classifiers(dyn.backbone)
    width = plain.backbone.get_submodule(names[0]).weight.shape[1]
    more = len(names) * ((width * 7 + 7 + 7 * 5 + 5) - (width * 5 + 5))
    assert dyn.get_nb_trainable_parameters()[0] - plain.get_nb_trainable_parameters()[0] == more
    before = exits(dyn.eval())
    train(dyn)
    assert (exits(dyn) != before).any(-1).all()
    dyn.save_pretrained(tmp_path / "adapter")
    loaded = DynPeftModel.from_pretrained(make_backbone(name), tmp_path / "adapter")
    torch.testing.assert_close(exits(loaded), exits(dyn))
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(exits(merged), exits(dyn), atol=1e-5, rtol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' own files have no place for it, which is said
        merged.save_pretrained(tmp_path / "merged")
    again = MultiExitBackbone.from_pretrained(tmp_path / "merged", make_backbone(name))
    torch.testing.assert_close(exits(again), exits(merged))
    with pytest.raises(ValueError, match="last_head_width=0 was asked for.*with 7"):
        dyn.add_adapter("second", method(target_modules=config.target_modules), dyn_config=DynConfig())


def test_a_model_with_adapters_is_no_merged_one(tmp_path):
    dyn = make()
    with pytest.raises(ValueError, match="merge_and_unload"):
        dyn.get_base_model().save_pretrained(tmp_path)
    dyn.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="DynPeftModel.from_pretrained"):
        MultiExitBackbone.from_pretrained(tmp_path, make_backbone("vit"))


@pytest.mark.parametrize("name", ["vit", "hf_vit"])
@pytest.mark.parametrize("merged", [False, True])
def test_methods_that_would_lose_the_exits_are_not_the_backbones(name, merged, tmp_path):
    model = make(name=name)
    heads = sum(p.numel() for p in model.early_heads.parameters())
    model = model.merge_and_unload() if merged else model
    own = sum(p.numel() for p in model.backbone.parameters())
    assert model.num_parameters() == own + heads
    lost = (
        ["reset_classifier", "prune_intermediate_layers", "group_matcher", "load_pretrained"]
        if name == "vit"
        else ["get_memory_footprint", "init_weights", "resize_token_embeddings", "get_parameter_or_buffer"]
    )
    for method in lost:
        assert hasattr(model.backbone, method), method
        with pytest.raises(AttributeError, match=r"knows nothing of the exits.*model\.backbone"):
            getattr(model, method)
    if name == "vit":
        assert model.num_classes == 5 and model.get_classifier() is model.backbone.head
        assert {key for key, _ in model.named_parameters() if "pos_embed" in key} <= model.no_weight_decay()
    else:
        assert model.config is model.backbone.config and model.get_input_embeddings() is not None
    # Everything that is defined once for both kinds of model keeps the exits.
    model.half()
    assert all(p.dtype == torch.float16 for p in model.early_heads.parameters())
    model.float()


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("TRAINABLE_TOKENS", lambda: peft.TrainableTokensConfig(target_modules=["qkv"], token_indices=[0])),
        ("POLY", lambda: peft.PolyConfig(**T)),
        ("XLORA", lambda: peft.XLoraConfig(hidden_size=32, adapters={"a": "b"})),
        ("SHADOW", lambda: peft.ShadowConfig(target_modules=["qkv"])),
    ],
)
def test_methods_that_fit_no_image_classifier(method, config):
    with pytest.raises(TypeError, match=f"{method} cannot adapt an image classifier: .*LoRA, RepAdapter"):
        get_dyn_peft_model(make_backbone("vit"), config())


def test_plain_peft_still_reads_the_adapter_alone(tmp_path):
    dyn = train(make(LoraConfig(**T, bias="all")))
    dyn.save_pretrained(tmp_path)
    assert not any("exit_heads" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    plain = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    torch.testing.assert_close(plain(make_images()), exits(dyn)[-1])
    record = json.loads((tmp_path / "dyn_config.json").read_text())
    assert record["kind"] == "adapter" and record["base_model_class"] == "VisionTransformer"


# Cards


def test_the_card_says_what_it_is_what_exits_cost_and_how_to_load(tmp_path):
    torch.manual_seed(0)
    kwargs = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
    vit = timm.create_model("vit_tiny_patch16_224.augreg_in21k", **kwargs)
    dyn = get_dyn_peft_model(vit, RepAdapterConfig(**T), DynConfig(exit_interval=2))
    dyn.save_pretrained(tmp_path / "adapter", accuracies=[61.5, 70.25], dataset="five colours")
    card = ModelCard.load(tmp_path / "adapter" / "README.md")
    data, macs = card.data.to_dict(), exit_costs(dyn, (3, 32, 32)).macs
    assert data["library_name"] == "peft" and data["pipeline_tag"] == "image-classification"
    assert data["base_model"] == "timm/vit_tiny_patch16_224.augreg_in21k"
    assert {"early-exit", "repadapter", "base_model:adapter:timm/vit_tiny_patch16_224.augreg_in21k"} <= set(
        data["tags"]
    )
    assert f"| 1 | 2 | {macs[0] / 1e9:.3g} G | {macs[0] / macs[1]:.2f} | 61.50 |" in card.text
    assert f"| 2 | 4 | {macs[1] / 1e9:.3g} G | 1.00 | 70.25 |" in card.text
    for words in (
        "REPADAPTER over",
        "five colours",
        "5 classes",
        "DynPeftModel.from_pretrained",
        "PeftModel.from_pretrained",
    ):
        assert words in card.text
    assert "More Information Needed" not in card.text and "PEFT 0." in card.text
    with pytest.raises(ValueError, match="3 accuracies were given for 2 exits"):
        dyn.save_pretrained(tmp_path / "adapter", accuracies=[1, 2, 3])

    # What a user wrote stays; what is ours is written anew, once.
    card.text = "Mine above.\n" + card.text + "\nMine below."
    card.data["license"] = "mit"
    card.save(tmp_path / "adapter" / "README.md")
    dyn.save_pretrained(tmp_path / "adapter")
    again = ModelCard.load(tmp_path / "adapter" / "README.md")
    assert (
        again.text.count("How to load") == 1 and "61.50" not in again.text and again.data.to_dict()["license"] == "mit"
    )
    assert "Mine above." in again.text and "Mine below." in again.text

    dyn.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = ModelCard.load(tmp_path / "merged" / "README.md")
    assert "MultiExitBackbone.from_pretrained" in merged.text and "local-dir:FOLDER" in merged.text
    assert merged.data.to_dict()["library_name"] == "timm" and "repadapter" not in merged.data.to_dict()["tags"]


@pytest.mark.parametrize("merged", [False, True])
def test_a_pushed_model_has_our_card_and_keeps_what_a_user_wrote_on_the_hub(merged, tmp_path, monkeypatch):
    repository, messages, load = tmp_path / "hub", [], ModelCard.load
    repository.mkdir()

    def upload(api, repo_id, folder_path, commit_message, **kwargs):
        messages.append(commit_message)
        shutil.copytree(folder_path, repo_id, dirs_exist_ok=True)
        return "done"

    def load_from_hub(where, **kwargs):
        if where != str(repository):
            return load(where)
        if not Path(where, "README.md").is_file():
            raise EntryNotFoundError("there is no card yet")
        return load(Path(where, "README.md"))

    monkeypatch.setattr(HfApi, "create_repo", lambda api, repo_id, **kwargs: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    monkeypatch.setattr(ModelCard, "load", load_from_hub)
    dyn = make(RepAdapterConfig(**T)).eval()
    expected, accuracies = exits(dyn), [50.0 + i for i in range(dyn.num_exits)]
    model = dyn.merge_and_unload() if merged else dyn
    assert model.push_to_hub(str(repository), accuracies=accuracies, tags=["mine"]) == "done"
    card = load(repository / "README.md")
    assert f"{len(expected)} exits" in card.text and "| 50.00 |" in card.text and "How to load" in card.text
    assert {"early-exit", "mine"} <= set(card.data.tags) and "automatically generated" not in card.text
    card.text += "\nWritten on the hub.\n"
    card.save(repository / "README.md")
    assert model.push_to_hub(str(repository), private=True, commit_message="again", max_shard_size="1GB") == "done"
    assert "Written on the hub." in load(repository / "README.md").text and messages[-1] == "again"
    loaded = (
        MultiExitBackbone.from_pretrained(repository, make_backbone("vit"))
        if merged
        else DynPeftModel.from_pretrained(make_backbone("vit"), repository)
    )
    torch.testing.assert_close(exits(loaded), expected, atol=1e-5, rtol=1e-4)


def test_a_card_names_no_folder_of_this_machine(tmp_path):
    make_backbone("hf_vit").save_pretrained(tmp_path / "base")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base")
    dyn = get_dyn_peft_model(base, LoraConfig(target_modules=["q_proj"]))
    dyn.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text().partition("How to load")[0]
    assert str(tmp_path) not in text and "transformers" in text


def test_the_card_says_what_plain_peft_needs(tmp_path):
    def beit():
        torch.manual_seed(0)
        size = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
        model = timm.create_model("beit_base_patch16_224", **size).eval()
        with torch.no_grad():  # far enough from zero for adapters to show
            for p in model.parameters():
                p.copy_(0.3 * torch.randn(p.shape))
        return model

    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    dyn = get_dyn_peft_model(beit(), LoraConfig(target_modules=["qkv"], init_lora_weights=False), DynConfig()).eval()
    dyn.save_pretrained(tmp_path / "beit")
    expected = dyn(images)
    assert "qkv_bias_separate = True" in (tmp_path / "beit" / "README.md").read_text()
    plain, switched = beit(), beit()
    for module in switched.modules():
        if hasattr(module, "qkv_bias_separate"):
            module.qkv_bias_separate = True
    assert not torch.allclose(PeftModel.from_pretrained(plain, tmp_path / "beit")(images), expected, atol=1e-3)
    torch.testing.assert_close(PeftModel.from_pretrained(switched, tmp_path / "beit")(images), expected)
    wide = get_dyn_peft_model(
        make_backbone("vit"), LoraConfig(target_modules=["qkv"]), DynConfig(exit_interval=1, last_head_width=16)
    )
    wide.save_pretrained(tmp_path / "wide")
    assert "`peft.PeftModel` cannot read the adapter" in (tmp_path / "wide" / "README.md").read_text()
    with pytest.raises(RuntimeError):
        PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "wide")
