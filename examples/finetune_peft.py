"""Fine-tune a vision transformer with adapters and early exits by transformers' Trainer; then run it within a budget.

    python examples/finetune_peft.py --data path/to/folder                        # a timm backbone, RepAdapter
    python examples/finetune_peft.py --data torch/cifar10 --data-dir torchvision --model hf:google/vit-base-patch16-224
    python examples/finetune_peft.py --data digits --model vit_tiny_patch16_224 --no-pretrained --img-size 32

The adapter and its early heads go to ``--output``; with the merged model and a policy solved on held-out images, the
script prints what exits save on the test images.
"""

import argparse
import json
from pathlib import Path

import timm
import torch
from peft import LoraConfig
from timm.data import create_transform, resolve_data_config
from torch.utils.data import DataLoader, Dataset
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

from exit_plugins import (
    BottleneckConfig,
    DynConfig,
    RepAdapterConfig,
    budgeted_curve,
    collect_exits,
    exit_costs,
    get_dyn_peft_model,
)
from exit_plugins.peft import DynTrainerCallback, compute_exit_metrics
from exit_plugins.timm.data import ImageView, open_splits


class Named(Dataset):
    """Samples by the names transformers uses."""

    def __init__(self, view: ImageView) -> None:
        self.view = view

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, index: int) -> dict:
        image, label = self.view[index]
        return {"pixel_values": image, "labels": label}


def normalisation(name: str) -> dict:
    """Mean and standard deviation of the images a transformers model was trained on, as its image processor says."""
    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise SystemExit(
            f"{name} has no preprocessor_config.json, which says how images are normalised; put the one of the model's "
            "page beside its weights."
        ) from error
    if not getattr(processor, "do_normalize", True):
        return {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    return {"mean": tuple(processor.image_mean), "std": tuple(processor.image_std)}


def make_backbone(args: argparse.Namespace, num_classes: int) -> tuple[torch.nn.Module, int, dict]:
    """The backbone with a classifier for the task, its image size and normalisation."""
    if args.model.startswith("hf:"):
        name = args.model.removeprefix("hf:")
        model = AutoModelForImageClassification.from_pretrained(
            name, num_labels=num_classes, ignore_mismatched_sizes=True
        )
        size = model.config.image_size
        return model, size if isinstance(size, int) else size[0], normalisation(name)
    kwargs = {"img_size": args.img_size} if args.img_size else {}
    model = timm.create_model(
        args.model, pretrained=args.pretrained, num_classes=num_classes, **kwargs, **args.model_kwargs
    )
    config = resolve_data_config({"img_size": args.img_size} if args.img_size else {}, model=model)
    return model, config["input_size"][-1], {"mean": config["mean"], "std": config["std"]}


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="an image folder, a timm dataset, or digits")
    parser.add_argument("--data-dir", help="where a timm dataset lies")
    parser.add_argument("--model", default="vit_base_patch16_224.augreg_in21k", help="timm name, or hf:NAME_OR_FOLDER")
    parser.add_argument("--model-kwargs", type=json.loads, default={}, help="as JSON, for timm.create_model")
    parser.add_argument("--pretrained", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--img-size", type=int)
    parser.add_argument("--method", choices=("repadapter", "lora", "bottleneck"), default="repadapter")
    parser.add_argument("--exit-interval", type=int, help="blocks per exit (default: a quarter)")
    parser.add_argument("--epochs", type=float, default=10)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--output", default="runs/finetune_peft")
    args = parser.parse_args(argv)

    splits = open_splits(args.data, args.data_dir)
    backbone, size, norm = make_backbone(args, len(splits.classes))
    transform = create_transform((3, size, size), interpolation="bicubic", crop_pct=1.0, crop_mode="squash", **norm)
    train, calibration, test = (v.with_transform(transform) for v in (splits.train, splits.calibration, splits.test))

    # Separate q, k and v projections in transformers, a fused one in timm.
    inputs = ["q_proj", "k_proj", "v_proj"] if args.model.startswith("hf:") else ["qkv"]
    config = {
        "repadapter": lambda: RepAdapterConfig(target_modules=[*inputs, "fc1"]),
        "lora": lambda: LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=inputs),
        "bottleneck": lambda: BottleneckConfig(target_modules=["fc2"]),
    }[args.method]()
    model = get_dyn_peft_model(backbone, config, DynConfig(exit_interval=args.exit_interval))
    model.print_trainable_parameters()

    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.output,
            per_device_train_batch_size=args.batch_size,
            per_device_eval_batch_size=args.batch_size,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            weight_decay=1e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.1,
            eval_strategy="epoch",
            save_strategy="epoch",
            save_total_limit=1,
            load_best_model_at_end=True,
            metric_for_best_model="accuracy",
            bf16=args.bf16,
            use_cpu=args.cpu,
            report_to=[],
        ),
        train_dataset=Named(train),
        eval_dataset=Named(calibration),
        compute_metrics=compute_exit_metrics,
        callbacks=[DynTrainerCallback(predict_exits=True)],
    )
    trainer.train(resume_from_checkpoint=args.resume or None)
    model.save_pretrained(str(Path(args.output, "adapter")))

    model = model.eval() if args.method == "bottleneck" else model.merge_and_unload()
    costs = exit_costs(model, (3, size, size)).macs
    tables = [collect_exits(model, DataLoader(view, batch_size=args.batch_size)) for view in (calibration, test)]
    points = budgeted_curve(*tables, costs, [max(share * costs[-1], costs[0]) for share in (0.4, 0.5, 0.7, 1.0)])
    accuracies = tables[1].correct.mean(1)
    print("test accuracy of every exit: " + "  ".join(f"{100 * a:.1f}" for a in accuracies))
    for point in points:
        shares = " ".join(f"{share:.2f}" for share in point.result.shares)
        print(f"{point.cost / costs[-1]:.2f} of the MACs: {100 * point.accuracy:.1f} %, leaving at the exits: {shares}")
    points[1].policy.save(str(Path(args.output, "policy.json")))
    return {"exit_accuracy": accuracies.tolist(), "points": [point.to_dict() for point in points]}


if __name__ == "__main__":
    main()
