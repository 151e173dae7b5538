"""Time to every exit over that of the plain timm network, each run the same way.

    python examples/benchmarks/forward.py --model dynperceiver_regnety_400mf --batch 1 16 --mode eager onnx openvino

Modes: eager (batch norms folded, channels_last), compiled (torch.compile), onnx (ONNX Runtime), openvino (float32).
Within one run all exits and the plain network take turns, and the ratio is taken turn by turn. Weights are random; the
time does not depend on them.
"""

import argparse
import tempfile
from collections.abc import Callable

import numpy as np
import timm
import torch
from timing import add_clock_arguments, interleaved, machine, spread, use_clock, write_json
from torch import Tensor, nn

from exit_plugins import AdaptiveModel, ExitPolicy, MultiExit, exit_costs
from exit_plugins.exits.export import ExportedSegments, export_segments
from exit_plugins.timm.layers import fold_batch_norms

PLAIN = {
    "dynperceiver_regnety_400mf": "regnety_004",
    "dynperceiver_regnety_800mf": "regnety_008_tv",
    "dynperceiver_regnety_1_6gf": "regnety_016",
    "dynperceiver_regnety_3_2gf": "regnety_032",
    "dynperceiver_mobilenetv3_1_0x": "mobilenetv3_large_100",
    "dvt_deit_small": "deit_small_patch16_224",
}


class OneExit(MultiExit, nn.Module):
    """A plain network seen as a multi-exit model with one exit, so that it takes the same paths."""

    num_exits = 1

    def __init__(self, name: str) -> None:
        super().__init__()
        self.network = timm.create_model(name).eval()
        self.num_classes = self.network.num_classes

    def begin_exits(self, x: Tensor) -> Tensor:
        return x

    def forward_exit(self, index: int, state: Tensor) -> tuple[Tensor, tuple]:
        return self.network(state), ()

    def fuse(self) -> "OneExit":
        fold_batch_norms(self)
        return self


def prepared(model: nn.Module, mode: str, size: tuple[int, ...], threads: int) -> nn.Module:
    """The model as the mode runs it, still a multi-exit model."""
    policy = ExitPolicy([np.inf] * model.num_exits)
    if mode in ("eager", "compiled"):
        return AdaptiveModel(model, policy, fuse=True, compile=mode == "compiled").runner
    with tempfile.TemporaryDirectory() as folder:
        export_segments(model, policy, f"{folder}/export", size, mode)
        return ExportedSegments(f"{folder}/export", threads)


def to_exit(model: nn.Module, last: int, images: Tensor) -> Callable[[], None]:
    def run() -> None:
        state = model.begin_exits(images)
        for index in range(last + 1):
            _, state = model.forward_exit(index, state)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dynperceiver_regnety_400mf")
    parser.add_argument("--plain", help="timm network to compare with; default the model's backbone")
    parser.add_argument("--mode", nargs="+", default=["eager"], choices=("eager", "compiled", "onnx", "openvino"))
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
    print(f"{'mode':<9} {'batch':>5} {'exit':>5} {'ms':>8} {'plain ms':>8} {'ratio':>6} {'iqr':>6} {'MACs':>6}")
    with torch.inference_mode():
        for mode in args.mode:
            ours, theirs = (prepared(network, mode, size, args.threads) for network in (model, plain))
            for batch in args.batch:
                images = torch.randn(batch, *size, device=args.device)
                runs = {"plain": to_exit(theirs, 0, images)}
                runs |= {f"exit {k + 1}": to_exit(ours, k, images) for k in range(model.num_exits)}
                times = interleaved(runs, args.repeats, warmup=2, device=args.device, cpu_time=args.cpu_time)
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
                        "macs_ratio": float(macs[k] / plain_macs),
                    }
                    rows.append(row)
                    print(
                        f"{mode:<9} {batch:>5} {k + 1:>5} {row['time']['median_ms']:>8.2f} "
                        f"{row['plain_time']['median_ms']:>8.2f} {row['ratio']:>6.2f} {row['ratio_iqr']:>6.2f} "
                        f"{row['macs_ratio']:>6.2f}",
                        flush=True,
                    )
    write_json(args.json, {"command": vars(args), "plain": plain_name, "machine": machine(args.device), "rows": rows})


if __name__ == "__main__":
    main()
