"""A five-exit network small enough to train on a CPU in minutes, so that solvers and certificates have real exits.

    python examples/benchmarks/small_exits.py --data path/to/cifar100 --minutes 7 --output runs/small_exits
    cd runs/small_exits && python ../../examples/benchmarks/solvers.py val.npz test.npz --costs $(cat costs.txt)

Trains for a fixed time on images of 32 pixels (random crop and flip, AdamW, one cycle), with the unweighted sum of the
exits' cross-entropies. Writes val.npz (images held out from training), test.npz, costs.txt and model.safetensors.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models import register_model
from torch import Tensor, nn
from tqdm.auto import tqdm

from exit_plugins import MultiExit, MultiExitLoss, collect_exits, exit_costs
from exit_plugins.timm.data import ImageView, open_splits

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


class SmallExits(MultiExit, nn.Module):
    """Nine 3 x 3 convolutions in five segments, a linear head on mean and maximum after each."""

    num_exits = 5
    pretrained_cfg = {
        "architecture": "small_exits",
        "input_size": (3, 32, 32),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
    }

    def __init__(self, num_classes: int = 100) -> None:
        super().__init__()
        self.num_classes = num_classes
        stages, heads, width = [], [], 3
        for out, stride, depth in ((32, 2, 2), (64, 2, 2), (96, 1, 1), (128, 2, 2), (192, 1, 2)):
            layers = []
            for i in range(depth):
                conv = nn.Conv2d(width, out, 3, stride if i == 0 else 1, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(out), nn.ReLU()]
                width = out
            stages.append(nn.Sequential(*layers))
            heads.append(nn.Linear(2 * width, num_classes))
        self.stages, self.heads = nn.ModuleList(stages), nn.ModuleList(heads)

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.stages[index](state)
        return self.heads[index](torch.cat([state.mean((2, 3)), state.amax((2, 3))], 1)), state


@register_model
def small_exits(pretrained: bool = False, num_classes: int = 100, **kwargs) -> SmallExits:
    return SmallExits(num_classes)


def load(view: ImageView) -> tuple[Tensor, Tensor]:
    """All images of a split in memory, (N, 3, 32, 32) uint8, and their targets."""
    images = np.empty((len(view), 32, 32, 3), dtype=np.uint8)
    targets = np.empty(len(view), dtype=np.int64)
    for i in tqdm(range(len(view)), desc="reading", unit="image"):
        image, targets[i] = view[i]
        images[i] = np.asarray(image.convert("RGB").resize((32, 32)))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(targets)


def normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    return ((images.float() / 255 - mean) / std).to(memory_format=torch.channels_last)


def train(model: nn.Module, images: Tensor, targets: Tensor, seconds: float, batch: int = 128) -> int:
    """One cycle of AdamW that lasts ``seconds``; how many images it saw."""
    loss_fn = MultiExitLoss(model.num_exits, preset="dvt")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    start, seen, order = time.monotonic(), 0, torch.empty(0, dtype=torch.int64)
    while (progress := (time.monotonic() - start) / seconds) < 1:
        if len(order) < batch:
            order = torch.randperm(len(images))
        index, order = order[:batch], order[batch:]
        x = F.pad(images[index], (4, 4, 4, 4))
        top, left = torch.randint(9, (2,)).tolist()
        x = normalise(x[:, :, top : top + 32, left : left + 32])
        flip = torch.rand(batch) < 0.5
        x[flip] = x[flip].flip(3)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * min(progress / 0.2, (1 - progress) / 0.8) + 1e-6
        loss = loss_fn(model(x), targets[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen += batch
        if seen // batch % 100 == 0:
            print(f"{seen} images, {100 * progress:.0f} % of the time, loss per exit {loss.item() / 5:.3f}", flush=True)
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder, or data set timm reads, of small images")
    parser.add_argument("--data-dir")
    parser.add_argument("--minutes", type=float, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/small_exits"))
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    splits = open_splits(args.data, args.data_dir, calibration=0.1)
    model = timm.create_model("small_exits", num_classes=len(splits.classes)).to(memory_format=torch.channels_last)
    seen = train(model.train(), *load(splits.train), 60 * args.minutes)
    print(f"trained on {seen} images")
    args.output.mkdir(parents=True, exist_ok=True)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, args.output / "model.safetensors")
    costs = exit_costs(model, (3, 32, 32)).macs
    (args.output / "costs.txt").write_text(" ".join(f"{c:.0f}" for c in costs) + "\n")
    for name, view in (("val", splits.calibration), ("test", splits.test)):
        images, targets = load(view)
        batches = ((normalise(x), y) for x, y in zip(images.split(500), targets.split(500), strict=True))
        table = collect_exits(model, batches, keep_logits=True)
        table.save(args.output / f"{name}.npz")
        print(name, "accuracy of each exit:", ", ".join(f"{100 * a:.2f} %" for a in table.correct.mean(1)))


if __name__ == "__main__":
    main()
