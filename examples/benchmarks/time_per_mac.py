"""Time per MAC of every architecture over that of its plain network, each run the same way.

    python examples/benchmarks/time_per_mac.py --threads 1 --batch 1 16 --json time_per_mac.json

1.0 means that a MAC of the network with exits takes as long as one of the plain network. Torch's form for inference;
within a batch size the networks of one architecture take turns. Weights are random; time does not depend on them.
"""

import argparse
from functools import partial

import numpy as np
import timm
import torch
from modes import MODES, OneExit, runner, to_exit
from timing import add_clock_arguments, interleaved, machine, use_clock, write_json

from exit_plugins import add_exits, exit_costs

# Architecture -> how to make it, and timm's plain network of the same kind and about the same size.
PAIRS = {
    "dynperceiver_regnety_400mf": "regnety_004",
    "dynperceiver_mobilenetv3_1_0x": "mobilenetv3_large_100",
    "dvt_deit_small": "deit_small_patch16_224",
    "msdnet_step4": "densenet121",
    "chase_step5": "densenet121",
    "regnety_004 + exits": "regnety_004",
    "deit_tiny_patch16_224 + exits": "deit_tiny_patch16_224",
}


def network(name: str) -> torch.nn.Module:
    plain, _, exits = name.partition(" + ")
    return add_exits(timm.create_model(plain), exits=4) if exits else timm.create_model(name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--mode", nargs="+", choices=MODES, default=["fused"])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=15)
    add_clock_arguments(parser)
    parser.add_argument("--json")
    args = parser.parse_args()
    torch.manual_seed(0)
    use_clock(args)
    rows = []
    print("| network | plain | mode | batch | GMACs | ms | plain ms | time per MAC over plain | iqr |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    with torch.inference_mode():
        for name in args.model:
            model, plain = network(name).eval(), OneExit(PAIRS[name]).eval()
            size = plain.network.pretrained_cfg["input_size"]
            macs, plain_macs = exit_costs(model, size).macs, exit_costs(plain, size).macs[0]
            for mode in args.mode:
                ours, theirs = (runner(each, mode, size, args.threads) for each in (model, plain))
                for batch in args.batch:
                    images = torch.randn(batch, *size)
                    runs = {"plain": partial(to_exit, theirs, 0, images)}
                    runs |= {f"exit {k + 1}": partial(to_exit, ours, k, images) for k in range(model.num_exits)}
                    times = interleaved(runs, args.repeats, warmup=2, cpu_time=args.cpu_time)
                    plain_per_mac = times["plain"] / plain_macs
                    for k in range(model.num_exits):
                        ratio = times[f"exit {k + 1}"] / macs[k] / plain_per_mac
                        low, middle, high = np.percentile(ratio, [25, 50, 75])
                        row = {
                            "network": name,
                            "exit": k + 1,
                            "plain": PAIRS[name],
                            "mode": mode,
                            "batch": batch,
                            "macs": float(macs[k]),
                            "ms": float(np.median(times[f"exit {k + 1}"]) * 1e3),
                            "plain_ms": float(np.median(times["plain"]) * 1e3),
                            "per_mac_over_plain": float(middle),
                            "iqr": float(high - low),
                        }
                        rows.append(row)
                        print(
                            f"| {name}, exit {k + 1} | {PAIRS[name]} | {mode} | {batch} | {macs[k] / 1e9:.3f} | "
                            f"{row['ms']:.1f} | {row['plain_ms']:.1f} | {middle:.2f} | {high - low:.2f} |",
                            flush=True,
                        )
    write_json(args.json, {"command": vars(args), "machine": machine(), "rows": rows})


if __name__ == "__main__":
    main()
