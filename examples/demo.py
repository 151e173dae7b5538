"""From images to a model that leaves early, in a few minutes on a CPU.

    python examples/demo.py                        # scikit-learn's digits: real images that install with it
    python examples/demo.py --data path/to/folder  # your images: one subfolder per class, or train/ and test/

images -> segments -> logits -> table -> policy -> adaptive run: trains a small Dyn-Perceiver with timm's optimizer
and scheduler and this package's loss, asks every exit about held-out images, solves thresholds for a range of budgets
on a calibration split, and then measures on the test split what leaving early saves, in accuracy, MACs and time.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.data import create_transform
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from exit_plugins import (
    AdaptiveModel,
    MultiExitLoss,
    anytime_curve,
    budgeted_curve,
    collect_exits,
    exit_costs,
    exit_latency,
    solve_thresholds,
)
from exit_plugins.exits import plots
from exit_plugins.timm.data import Splits, open_splits

# The default network: dynperceiver_test with more behind its first exit than before it, as the paper's networks have.
DEMO_NETWORK = dict(num_latents=8, widths=(8, 16, 24, 192, 384), depths=(1, 1, 3, 2), latent_depths=(1, 1, 1, 1))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, an image folder, or a timm dataset (torch/cifar100)")
    parser.add_argument("--data-dir", help="where a timm dataset lies")
    parser.add_argument("--model", help="any model of this package; default a small Dyn-Perceiver")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def make_loader(view, args: argparse.Namespace, training: bool) -> DataLoader:
    # The digits' strokes must not be mirrored, nor cut off: a mild crop is augmentation enough for a demo.
    transform = create_transform(
        (3, args.image_size, args.image_size),
        is_training=training,
        scale=(0.7, 1.0),
        hflip=0.0,
        color_jitter=None,
        crop_pct=1.0,
        interpolation="bilinear",
    )
    return DataLoader(view.with_transform(transform), args.batch_size, shuffle=training, drop_last=training)


def train(model: torch.nn.Module, loader: DataLoader, args: argparse.Namespace) -> None:
    """timm's optimizer and scheduler, our loss over all exits, a plain loop."""
    loss_of = MultiExitLoss.for_model(model, label_smoothing=0.1)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=args.lr, weight_decay=0.05)
    steps = args.epochs * len(loader)
    scheduler = CosineLRScheduler(optimizer, steps, warmup_t=len(loader), warmup_lr_init=1e-5, t_in_epochs=False)
    model.train()
    with tqdm(total=steps, desc="training", unit="step", disable=None) as bar:
        for step in range(steps):
            if step % len(loader) == 0:
                batches = iter(loader)
            images, target = next(batches)
            loss = loss_of(model(images), target)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            scheduler.step_update(step + 1)
            bar.set_postfix(loss=f"{loss.item():.3f}")
            bar.update()
    model.eval()


@torch.inference_mode()
def measure_speedup(adaptive: AdaptiveModel, images: torch.Tensor, batch: int, macs: np.ndarray, rounds: int) -> dict:
    """Time of the whole network over time of the adaptive run, on the same images in turns, and what was possible.

    ``ideal``: the time of each segment on full batches, weighted by the share of images that reach it.
    ``ideal_macs``: the same with MACs in the place of times.
    """
    model, batches = adaptive.model, list(images.split(batch))
    batches = [x for x in batches if len(x) == batch] or batches  # the ideal is of full batches too
    model(batches[0]), adaptive(batches[0])
    ratios = []
    for _ in range(rounds):
        spent = {"full": 0.0, "adaptive": 0.0}
        for x in batches:
            for name, run in (("full", model), ("adaptive", adaptive)):
                start = time.perf_counter()
                run(x)
                spent[name] += time.perf_counter() - start
        ratios.append(spent["full"] / spent["adaptive"])
    exits = torch.cat([adaptive(x).exit_index for x in batches])
    share = np.array([(exits >= k).float().mean().item() for k in range(model.num_exits)])

    def ideal(cost: np.ndarray) -> float:
        return float(cost[-1] / (share * np.diff(cost, prepend=0.0)).sum())

    segments = exit_latency(model, batches[0])
    return {"measured": float(np.median(ratios)), "ideal": ideal(segments), "ideal_macs": ideal(macs)}


def main() -> int:
    args = parse_args()
    torch.manual_seed(args.seed)
    try:
        data: Splits = open_splits(args.data, args.data_dir, args.seed)
        network = {} if args.model else DEMO_NETWORK
        model = timm.create_model(args.model or "dynperceiver_test", num_classes=len(data.classes), **network)
    except (FileNotFoundError, ValueError, RuntimeError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    costs = exit_costs(model, (3, args.image_size, args.image_size))
    print(f"{len(data.train)} images to train on, {len(data.calibration)} to calibrate on, {len(data.test)} to test on")

    train(model, make_loader(data.train, args, training=True), args)
    calibration = collect_exits(model, make_loader(data.calibration, args, training=False))
    test_loader = make_loader(data.test, args, training=False)
    test = collect_exits(model, test_loader)

    print("\nexit  accuracy      MACs")
    exits = [{"accuracy": p.accuracy, "macs": p.cost} for p in anytime_curve(test, costs.macs)]
    for index, point in enumerate(exits):
        print(f"{index + 1:4d}  {100 * point['accuracy']:7.2f}%  {point['macs'] / 1e6:7.2f}M")

    # Closer together at the cheap end, where a little compute buys most.
    budgets = costs.macs[0] + (costs.macs[-1] - costs.macs[0]) * np.linspace(0, 1, 12) ** 2
    points = budgeted_curve(calibration, test, costs.macs, budgets)
    curve = [{"budget": p.budget, "accuracy": p.accuracy, "macs": p.cost} for p in points]
    print("\nbudget    spent     accuracy   (solved on the calibration split, reported on the test split)")
    for point in curve:
        print(f"{point['budget'] / 1e6:6.2f}M  {point['macs'] / 1e6:6.2f}M  {100 * point['accuracy']:7.2f}%")

    # The policy to use: the cheapest that keeps the last exit's accuracy, within half a point, on calibration images.
    policy = solve_thresholds(
        calibration, costs.macs, accuracy=float(calibration.correct[-1].mean()) - 0.005, model=model
    )
    adaptive = AdaptiveModel(model, policy)
    images = torch.cat([x for x, _ in test_loader])
    speedup = {
        "batch_1": measure_speedup(adaptive, images[:128], 1, costs.macs, rounds=3),
        "batch_32": measure_speedup(adaptive, images, 32, costs.macs, rounds=7),
    }
    print("\nspeed-up over the whole network   measured   ideal (times)   ideal (MACs)")
    for name, s in speedup.items():
        print(f"{name:32s}  {s['measured']:7.2f}x  {s['ideal']:12.2f}x  {s['ideal_macs']:12.2f}x")

    args.output.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), args.output / "model.safetensors")
    policy.save(args.output / "policy.json")
    report = args.output / "report.json"
    report.with_suffix(".tmp").write_text(json.dumps({"exits": exits, "curve": curve, "speedup": speedup}, indent=2))
    report.with_suffix(".tmp").replace(report)
    plots.save(plots.budget_curve({"budgeted": points}, anytime_curve(test, costs.macs)), args.output / "curve.png")
    raw = [data.test[i][0] for i in range(len(data.test))]
    plots.save(plots.easiest_and_hardest(raw, test, policy, data.classes), args.output / "easy_and_hard.png")

    print(f"\n1. Look at {args.output / 'curve.png'} and {args.output / 'easy_and_hard.png'}.")
    print(f"2. Run it: AdaptiveModel(model, ExitPolicy.load('{args.output / 'policy.json'}'))(images).")
    print("3. Train on your own images: make demo DATA=path/to/folder.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
