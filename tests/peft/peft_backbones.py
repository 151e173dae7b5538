"""Small backbones of every family, with random weights."""

import timm
import torch
import transformers

VIT = dict(img_size=32, patch_size=8, embed_dim=32, depth=4, num_heads=2, num_classes=5)
EVA = VIT | dict(use_rot_pos_emb=True, ref_feat_shape=(4, 4), mlp_ratio=2)
HF = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
HF = HF | dict(num_labels=5, initializer_range=0.1)

QKV = ["q_proj", "k_proj", "v_proj", "fc1"]
TIMM = ["qkv", "fc1"]


def _vit(**kwargs):
    return timm.models.VisionTransformer(**VIT | kwargs)


def _eva(**kwargs):
    return timm.models.Eva(**EVA | kwargs)


def _hf(name, **kwargs):
    config = getattr(transformers, f"{name}Config")(**HF | kwargs)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def _deit_with_teacher():
    return transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**HF))


BEIT = dict(use_relative_position_bias=True, use_mean_pooling=True)
# name: (constructor, target modules of RepAdapter, module behind the MLP)
FAMILIES = {
    "vit": (_vit, TIMM, "fc2"),
    "deit": (lambda: timm.models.VisionTransformer(**VIT, class_token=True, qkv_bias=False), TIMM, "fc2"),
    "deit_distilled": (lambda: timm.models.deit.VisionTransformerDistilled(**VIT), TIMM, "fc2"),
    "deit3": (lambda: _vit(no_embed_class=True, init_values=0.1), TIMM, "fc2"),
    "augreg_mean": (lambda: _vit(global_pool="avg", class_token=False, fc_norm=True), TIMM, "fc2"),
    "dinov2_reg": (lambda: _vit(reg_tokens=2, init_values=0.1, dynamic_img_size=True), TIMM, "fc2"),
    "clip": (lambda: _vit(pre_norm=True), TIMM, "fc2"),
    "siglip": (lambda: _vit(class_token=False, global_pool="map"), TIMM, "fc2"),
    "eva": (_eva, TIMM, "fc2"),
    "eva_mixed": (lambda: _eva(rope_type="mixed"), TIMM, "fc2"),
    "eva_dynamic": (lambda: _eva(dynamic_img_size=True), TIMM, "fc2"),
    "dinov3": (
        lambda: _eva(use_abs_pos_emb=False, num_reg_tokens=2, qkv_bias=False, rope_type="dinov3", init_values=0.1),
        TIMM,
        "fc2",
    ),
    "swin": (
        lambda: timm.models.SwinTransformer(
            img_size=32,
            patch_size=2,
            embed_dim=16,
            depths=(1, 1, 2, 1),
            num_heads=(1, 2, 2, 2),
            window_size=4,
            num_classes=5,
        ),
        TIMM,
        "fc2",
    ),
    "convnext": (
        lambda: timm.models.ConvNeXt(depths=(1, 1, 2, 1), dims=(8, 16, 24, 32), num_classes=5, patch_size=2),
        ["fc1"],
        "fc2",
    ),
    "convnext_conv_mlp": (
        lambda: timm.models.ConvNeXt(
            depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_classes=5, patch_size=2, conv_mlp=True
        ),
        ["fc1"],
        "fc2",
    ),
    "hf_vit": (lambda: _hf("ViT"), QKV, "fc2"),
    "hf_deit": (lambda: _hf("DeiT"), QKV, "fc2"),
    "hf_deit_teacher": (_deit_with_teacher, QKV, "fc2"),
    "hf_dinov2": (lambda: _hf("Dinov2", layerscale_value=0.5), QKV, "fc2"),
    "hf_beit": (lambda: _hf("Beit", **BEIT), QKV, "fc2"),
    "hf_beit_shared": (lambda: _hf("Beit", use_shared_relative_position_bias=True, use_mean_pooling=False), QKV, "fc2"),
}


def _registers():
    config = transformers.Dinov2WithRegistersConfig(**HF, num_register_tokens=2, layerscale_value=0.5)
    return transformers.Dinov2WithRegistersForImageClassification(config)


def _tower(name):
    """The vision tower alone of a model of images and text, for classification."""
    config = getattr(transformers, f"{name}Config")(vision_config=HF | dict(initializer_range=0.1), num_labels=5)
    return getattr(transformers, f"{name}ForImageClassification")(config)


def _timm_wrapper():
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={k: v for k, v in VIT.items() if k != "num_classes"},
        num_labels=5,
        do_pooling=False,
    )
    return transformers.TimmWrapperForImageClassification(config)


HF_STAGES = dict(image_size=32, patch_size=2, depths=[1, 1, 2, 1], num_labels=5, initializer_range=0.1)
FAMILIES |= {
    "hf_dinov2_reg": (_registers, QKV, "fc2"),
    "hf_clip": (lambda: _tower("CLIP"), QKV, "fc2"),
    # SigLIP's pooling head, which its classifier does not read, has an fc1 too.
    "hf_siglip": (lambda: _tower("Siglip"), r".*encoder.*\.(q_proj|k_proj|v_proj|fc1)", "fc2"),
    "hf_swin": (
        lambda: transformers.SwinForImageClassification(
            transformers.SwinConfig(**HF_STAGES, embed_dim=16, num_heads=[1, 2, 2, 2], window_size=2)
        ),
        QKV,
        "fc2",
    ),
    "hf_convnext": (
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(**HF_STAGES, hidden_sizes=[8, 16, 24, 32])
        ),
        ["pwconv1"],
        "pwconv2",
    ),
    "hf_timm_wrapper": (_timm_wrapper, TIMM, "fc2"),
}


def make_backbone(name):
    """A backbone of the family in evaluation mode; the same weights at every call."""
    torch.manual_seed(0)
    return FAMILIES[name][0]().eval()


def plain_logits(model, x):
    """What the backbone itself answers."""
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def make_images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(7))
