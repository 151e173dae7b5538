"""Time to every exit over that of the plain timm network, each run the same way.

    python examples/benchmarks/forward.py --model dynperceiver_regnety_400mf --batch 1 16 --mode fused onnx openvino

The plain network runs in the same mode. In torch it runs twice: as timm builds it, in channels_last, and with its batch
norms folded into its convolutions; ONNX Runtime and OpenVINO fold by themselves. Within one run all exits and the plain
networks take turns, and ratios are taken turn by turn. Weights are random; the time does not depend on them.
"""

import argparse
from functools import partial

import numpy as np
import timm
import torch
from modes import MODES, OneExit, adaptive_options, runner, to_exit
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json

from exit_plugins import AdaptiveModel, ExitPolicy, exit_costs

PLAIN = {
    "dynperceiver_regnety_400mf": "regnety_004",
    "dynperceiver_regnety_800mf": "regnety_008_tv",
    "dynperceiver_regnety_1_6gf": "regnety_016",
    "dynperceiver_regnety_3_2gf": "regnety_032",
    "dynperceiver_mobilenetv3_1_0x": "mobilenetv3_large_100",
    "dvt_deit_small": "deit_small_patch16_224",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_400mf")
    parser.add_argument("--plain", help="timm network to compare with; default the model's backbone")
    parser.add_argument("--mode", nargs="+", default=["fused"], choices=MODES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--repeats", type=int, default=30)
    add_clock_arguments(parser)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json")
    args = parser.parse_args()
    plain_name = args.plain or PLAIN.get(args.model)
    if plain_name is None:
        parser.error(f"name the plain network to compare {args.model} with: --plain NAME")

    torch.manual_seed(0)
    use_clock(args)
    model, plain = timm.create_model(args.model).eval().to(args.device), OneExit(plain_name).eval().to(args.device)
    size = model.pretrained_cfg["input_size"]
    macs, plain_macs = exit_costs(model, size).macs, exit_costs(plain, size).macs[0]
    rows = []
    print(f"{args.model} over {plain_name}, {args.threads} threads, {args.device}")
    print(f"{'mode':<17} {'batch':>5} {'exit':>5} {'ms':>8} {'plain ms':>8} {'ratio':>6} {'iqr':>6} {'folded':>6} MACs")
    with torch.inference_mode():
        for mode in args.mode:
            ours = runner(model, mode, size, args.threads)
            theirs = folded = runner(plain, mode, size, args.threads)
            if not mode.startswith(("onnx", "openvino")):
                theirs = AdaptiveModel(plain, ExitPolicy([np.inf]), **adaptive_options(mode) | {"fuse": False})
            for batch in args.batch:
                images = torch.randn(batch, *size, device=args.device)
                runs = {"plain": partial(to_exit, theirs, 0, images), "folded": partial(to_exit, folded, 0, images)}
                runs |= {f"exit {k + 1}": partial(to_exit, ours, k, images) for k in range(model.num_exits)}
                times = interleaved(runs, args.repeats, warmup=3, device=args.device, cpu_time=args.cpu_time)
                for k in range(model.num_exits):
                    ratio = times[f"exit {k + 1}"] / times["plain"]
                    row = {
                        "mode": mode,
                        "batch": batch,
                        "exit": k + 1,
                        "time": spread(times[f"exit {k + 1}"]),
                        "plain_time": spread(times["plain"]),
                        "ratio": float(np.median(ratio)),
                        "ratio_iqr": float(np.subtract(*np.percentile(ratio, [75, 25]))),
                        "ratio_folded": float(np.median(times[f"exit {k + 1}"] / times["folded"])),
                        "macs_ratio": float(macs[k] / plain_macs),
                    }
                    rows.append(row)
                    print(
                        f"{mode:<17} {batch:>5} {k + 1:>5} {row['time']['median_ms']:>8.2f} "
                        f"{row['plain_time']['median_ms']:>8.2f} {row['ratio']:>6.2f} {row['ratio_iqr']:>6.2f} "
                        f"{row['ratio_folded']:>6.2f} {row['macs_ratio']:>4.2f}",
                        flush=True,
                    )
    write_json(args.json, {"command": vars(args), "plain": plain_name, "machine": machine(args.device), "rows": rows})


if __name__ == "__main__":
    main()
