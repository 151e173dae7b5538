"""Write docs/peft_methods.md: every PEFT method over backbones of four kinds, tried: works, or refused and why.

    python docs/peft_table.py            # minutes; --backbones and --methods for a part, which is printed only

Tried is what a user does: adapt, train two steps, save, load over a fresh backbone with the same answers at every exit,
and merge with the same answers. Networks are small and random.
"""

import argparse
import contextlib
import inspect
import io
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from exit_plugins import DynConfig, DynPeftModel, get_dyn_peft_model

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "peft"), str(ROOT / "tests" / "timm")]
import any_adapted  # noqa: E402
import peft_backbones  # noqa: E402

# Title: (maker, layers, layers for methods that want the same shape everywhere).
BACKBONES = {
    "timm ViT": (lambda: peft_backbones.make_backbone("vit"), ["qkv", "fc1"], ["fc2"]),
    "timm Swin": (lambda: peft_backbones.make_backbone("swin"), ["qkv", "fc1"], ["fc2"]),
    "timm EfficientNet": (lambda: any_adapted.make_backbone("test_efficientnet"), ["conv_pwl"], ["conv_pwl"]),
    "transformers ViT": (
        lambda: peft_backbones.make_backbone("hf_vit"),
        ["q_proj", "k_proj", "v_proj", "fc1"],
        ["fc2"],
    ),
}
ALIKE = ("VERA", "PVERA", "RANDLORA", "FROD")
# What the smallness of these networks asks for, and what a method cannot do without.
SETTINGS = {
    "ADALORA": dict(total_step=9),
    "BOFT": dict(boft_block_size=4),
    "C3A": dict(block_size=8),
    "IA3": dict(feedforward_modules=[]),
    "MISS": dict(r=8),
    "OFT": dict(oft_block_size=8, r=0),
    "ROAD": dict(group_size=8),
    "SHIRA": dict(r=4),
    "TRAINABLE_TOKENS": dict(token_indices=[0]),
    "VBLORA": dict(vector_length=8, num_vectors=8),
    "WAVEFT": dict(n_frequency=200),
    "XLORA": dict(hidden_size=32, adapters={"a": "b"}),
    "CPT": dict(task_type="CAUSAL_LM"),
}


def first_sentence(error: Exception) -> str:
    return str(error).strip().splitlines()[0].partition(". ")[0]


def attempt(method: str, backbone: str) -> str:
    """What came of one method over one backbone, in a few words."""
    make, layers, alike = BACKBONES[backbone]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[method]]
    settings = dict(SETTINGS.get(method, {}))
    if "target_modules" in inspect.signature(config_class).parameters:
        settings["target_modules"] = alike if method in ALIKE else layers
    torch.manual_seed(0)
    try:
        config = config_class(**settings)
        dyn = get_dyn_peft_model(make(), config, DynConfig(dropout_shallow=None, dropout_deep=None, mask=None))
    except Exception as error:
        return f"refused: {first_sentence(error)}"
    size = 32 if "EfficientNet" not in backbone else 64
    x, target = torch.randn(3, 3, size, size), torch.tensor([0, 3, 4])
    try:
        optimizer = torch.optim.SGD([p for p in dyn.parameters() if p.requires_grad], lr=0.01)
        dyn.train().set_progress(0.5)
        for _ in range(2):
            optimizer.zero_grad()
            dyn.loss(dyn(x), target).backward()
            optimizer.step()
        with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
            exits = torch.stack(dyn.eval().forward_exits(x))
            dyn.save_pretrained(folder)
            loaded = DynPeftModel.from_pretrained(make(), folder)
            torch.testing.assert_close(torch.stack(loaded.forward_exits(x)), exits, atol=1e-5, rtol=1e-4)
            try:
                merged = torch.stack(loaded.merge_and_unload().forward_exits(x))
            except Exception as error:
                return f"works; not merged: {first_sentence(error)}"
            torch.testing.assert_close(merged, exits, atol=1e-4, rtol=1e-3)
    except Exception as error:
        return f"fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return "works"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", choices=BACKBONES, default=list(BACKBONES))
    parser.add_argument("--methods", nargs="+", help="default: all that PEFT knows")
    args = parser.parse_args()
    methods = args.methods or sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
    lines = ["| method | " + " | ".join(args.backbones) + " |", "|---" * (len(args.backbones) + 1) + "|"]
    counts = dict.fromkeys(args.backbones, 0)
    for method in methods:
        cells = []
        for backbone in args.backbones:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")
                cells.append(attempt(method, backbone).replace("|", "/"))
            counts[backbone] += cells[-1].startswith("works")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    lines.append(f"| {len(methods)} methods | " + " | ".join(f"{counts[b]} work" for b in args.backbones) + " |")
    print(lines[-1])
    if args.methods is None:
        head = f"# PEFT's methods with exits\n\nWritten by `python docs/peft_table.py`, PEFT {peft.__version__}.\n\n"
        target = ROOT / "docs" / "peft_methods.md"
        target.write_text(head + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
