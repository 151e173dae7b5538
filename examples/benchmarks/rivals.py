"""Early exits beside what needs no early exits: token merging, and a smaller static network, at equal MACs.

    python examples/benchmarks/rivals.py --model dynperceiver_regnety_800mf --batch 1 32

Early exits run under a forced mix (an even share leaves at every exit). The static rival is the timm network, of the
candidates below, whose MACs are nearest to the mix's mean. Token merging follows ToMe (Bolya et al., ICLR 2023): in
every block of a vision transformer the r tokens most alike in their keys are averaged, with r chosen for the same MACs.
Only time and MACs are compared here; accuracy needs trained weights of all of them.
"""

import argparse
import math

import numpy as np
import timm
import torch
import torch.nn.functional as F
from adaptive import MIXES, forced_policy
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from exit_plugins import AdaptiveModel, collect_exits, exit_costs
from exit_plugins.timm.layers import fold_batch_norms

STATIC = ("regnety_002", "regnety_004", "regnety_006", "regnety_008", "regnety_016", "resnet18", "resnet34", "resnet50")


class MergingBlock(nn.Module):
    """A timm vision transformer block that averages the ``merged`` most similar pairs of tokens after its attention."""

    def __init__(self, block: nn.Module, merged: int) -> None:
        super().__init__()
        self.block, self.merged = block, merged

    def forward(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B, N, C) and how many patches each stands for, (B, N, 1)."""
        block, attn = self.block, self.block.attn
        batch, count, width = x.shape
        qkv = attn.qkv(block.norm1(x)).view(batch, count, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = attn.q_norm(qkv[0]), attn.k_norm(qkv[1]), qkv[2]
        # Proportional attention: a token that stands for s patches counts s times.
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=size.log()[:, None, None, :, 0])
        x = x + block.ls1(attn.proj(attended.transpose(1, 2).reshape(batch, count, width)))
        if self.merged:
            x, size = merge_tokens(x, k.mean(1), size, self.merged)
        return x + block.ls2(block.mlp(block.norm2(x))), size


def merge_tokens(x: Tensor, keys: Tensor, size: Tensor, merged: int) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: each of the ``merged`` even tokens nearest to an odd one is averaged into it."""
    keys = F.normalize(keys, dim=-1)
    scores = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    scores[:, 0] = -math.inf  # the class token stays itself
    best, partner = scores.max(-1)
    order = best.argsort(-1, descending=True)
    merged = min(merged, order.shape[1] - 1)
    gone, kept = order[:, :merged, None], order[:, merged:, None].sort(1).values
    partner = partner.gather(1, gone[..., 0])[..., None]

    def joined(t: Tensor) -> Tensor:
        even, odd = t[:, ::2], t[:, 1::2]
        wide = (-1, -1, t.shape[-1])
        moved = even.gather(1, gone.expand(wide))
        return torch.cat((even.gather(1, kept.expand(wide)), odd.scatter_add(1, partner.expand(wide), moved)), 1)

    total = joined(size)
    return joined(x * size) / total, total


class MergingTransformer(nn.Module):
    """A timm vision transformer with token merging in every block."""

    def __init__(self, network: nn.Module, merged: int) -> None:
        super().__init__()
        self.network = network
        self.blocks = nn.ModuleList(MergingBlock(block, merged) for block in network.blocks)

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        x = network.norm_pre(network.patch_drop(network._pos_embed(network.patch_embed(x))))
        size = x.new_ones(x.shape[0], x.shape[1], 1)
        for block in self.blocks:
            x, size = block(x, size)
        return network.forward_head(network.norm(x))


@torch.inference_mode()
def macs_of(model: nn.Module, size: tuple[int, ...]) -> float:
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    return counter.get_total_flops() / 2


def nearest(candidates: dict, target: float, size: tuple[int, ...]):
    """Key, model and MACs of the candidate whose MACs are nearest to ``target`` in ratio."""
    built = {key: make() for key, make in candidates.items()}
    macs = {key: macs_of(model, size) for key, model in built.items()}
    key = min(macs, key=lambda name: abs(math.log(macs[name] / target)))
    return key, built[key], macs[key]


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_800mf")
    parser.add_argument("--transformer", default="deit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=10)
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args()

    torch.manual_seed(0)
    use_clock(args)
    model = timm.create_model(args.model).eval()
    size = model.pretrained_cfg["input_size"]
    macs = exit_costs(model, size).macs
    pool = torch.randn(args.images, *size) * torch.rand(args.images, 1, 1, 1) * 3
    table = collect_exits(model, [(pool, torch.zeros(len(pool), dtype=torch.int64))], progress=False)
    engine = AdaptiveModel(model, forced_policy(table.confidence, MIXES["even"](model.num_exits)), fuse=True)
    mean_macs = float(np.mean([macs[int(k)] for k in engine(pool).exit_index]))

    static_name, static, static_macs = nearest(
        {name: lambda name=name: timm.create_model(name).eval() for name in STATIC}, mean_macs, size
    )
    transformer = timm.create_model(args.transformer).eval()
    merged, merging, merging_macs = nearest(
        {r: lambda r=r: MergingTransformer(transformer, r).eval() for r in range(0, 17)}, mean_macs, size
    )
    last = AdaptiveModel(model, type(engine.policy)([np.inf] * model.num_exits), fuse=True)
    static = fold_batch_norms(static).to(memory_format=torch.channels_last)
    rivals = {
        f"{args.model}, all exits": (last, macs[-1]),
        f"{args.model}, even mix (forced)": (engine, mean_macs),
        static_name: (static, static_macs),
        args.transformer: (transformer, macs_of(transformer, size)),
        f"{args.transformer}, {merged} tokens merged a block": (merging, merging_macs),
    }
    rows = []
    print(f"{args.threads} threads; ms and images/s are medians of {args.repeats} interleaved runs")
    print(f"{'':<52} {'batch':>5} {'GMACs':>6} {'ms/image':>8} {'iqr':>6} {'images/s':>8}")
    for batch in args.batch:
        batches = pool.split(batch)

        def over_pool(run, batches=batches):
            return lambda: [run(images) for images in batches] and None

        times = interleaved(
            {name: over_pool(run) for name, (run, _) in rivals.items()}, args.repeats, cpu_time=args.cpu_time
        )
        for name, (_, cost) in rivals.items():
            each = spread(times[name] / len(pool))
            rows.append({"name": name, "batch": batch, "macs": float(cost), "per_image": each})
            print(
                f"{name:<52} {batch:>5} {cost / 1e9:>6.3f} {each['median_ms']:>8.2f} {each['iqr_ms']:>6.2f} "
                f"{1e3 / each['median_ms']:>8.1f}",
                flush=True,
            )
    write_json(args.json, {"command": vars(args), "machine": machine(), "forced_mixes": True, "rows": rows})


if __name__ == "__main__":
    main()
