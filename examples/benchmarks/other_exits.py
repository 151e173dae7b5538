"""Exits on timm's ResNet-18 run by this package and by earlyon: images per second at the same answers.

    pip install earlyon==0.3.0
    python examples/benchmarks/other_exits.py --threads 1 --json docs/results/pretrained/earlyon.json

Both have the same heads behind the same layers and the same thresholds, set so that the images leave at the four exits
in equal shares. earlyon answers images one at a time, or takes a batch on until all of it is sure; both are timed.
"""

import argparse
import copy
from collections.abc import Sequence

import earlyon
import numpy as np
import timm
import torch
from adaptive import forced_policy
from earlyon.models.custom import custom_ee
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from torch import nn

from exit_plugins import AdaptiveModel, ExitTable, add_exits

LAYERS = ["layer1", "layer2", "layer3"]


class Shared(nn.Module):
    """A head of earlyon's, called as ours are: with the tensors of the cut."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features):
        return self.head(features[0])


def same_exits(network: nn.Module, layers: list[str], shape: Sequence[int]) -> tuple[nn.Module, nn.Module]:
    """Exits with earlyon's heads behind ``layers`` of a network on images of ``shape`` (C, H, W): ours, and earlyon's.

    Each has a copy of its own, so that what is folded or hooked in one is not in the other.
    """
    theirs = custom_ee(copy.deepcopy(network), layers, network.num_classes, input_shape=(1, *shape)).eval()
    heads = iter(copy.deepcopy(list(theirs.exit_heads.values())))
    ours = add_exits(copy.deepcopy(network), exits=layers, head=lambda cut, num_classes: Shared(next(heads))).eval()
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json")
    add_clock_arguments(parser)
    args = parser.parse_args()
    use_clock(args)
    torch.manual_seed(0)
    network = timm.create_model("resnet18").eval()
    ours, theirs = same_exits(network, LAYERS, (3, args.size, args.size))
    pool = torch.randn(max(*args.batch, 32), 3, args.size, args.size)
    with torch.inference_mode():
        table = ExitTable.from_logits(ours.forward_exits(pool), torch.zeros(len(pool), dtype=torch.int64))
    policy = forced_policy(table.confidence, [0.25, 0.25, 0.25])
    theirs.config.confidence_thresholds = [float(t) for t in policy.thresholds[:-1]]
    fused = AdaptiveModel(ours, policy, fuse=True)
    adaptive = AdaptiveModel(ours, policy, fuse=False)
    out = adaptive(pool)
    agree = sum(theirs(x[None]).exit_taken % 4 == int(k) for x, k in zip(pool, out.exit_index, strict=True))
    print(f"{agree} of {len(pool)} images leave at the same exit")
    clock = "CPU seconds" if args.cpu_time else "wall clock"
    report = {"machine": machine(), "clock": clock, "earlyon": earlyon.__version__}
    report |= {"images": len(pool), "agree": agree, "batches": {}}
    for batch in args.batch:
        x = pool[:batch]
        runs = {
            "exit_plugins": lambda x=x: adaptive(x),
            "exit_plugins, fused": lambda x=x: fused(x),
            "earlyon, one by one": lambda x=x: [theirs(image) for image in x.split(1)],
            "earlyon, batched": lambda x=x: theirs.forward_inference_batched(x),
            "the whole network": lambda x=x: network(x),
        }
        with torch.inference_mode():
            times = interleaved(runs, args.repeats, cpu_time=args.cpu_time)
        row = {name: {**spread(t), "images_per_second": batch / float(np.median(t))} for name, t in times.items()}
        report["batches"][batch] = row
        print(f"batch {batch}: " + "; ".join(f"{name} {r['images_per_second']:.1f}/s" for name, r in row.items()))
    write_json(args.json, report)


if __name__ == "__main__":
    main()
