"""What exits cost in training, against PEFT's plain LoRA, and what they save in inference, against merged RepAdapter.

    python examples/benchmarks/dyn_peft.py --model vit_small_patch16_224 --batch-size 16 --json cpu.json
    python examples/benchmarks/dyn_peft.py --model vit_base_patch16_224 --batch-size 128 --device cuda --bf16

Training: time of a step (forward, loss, backward, optimiser) and peak memory, Dyn-LoRA over LoRA on the same backbone,
interleaved. On the GPU memory is what torch allocated at most; on the CPU each side runs in a process of its own and
memory is what its resident size grew by.

Inference: throughput with a share of the samples forced to leave at each exit so that on average 50 % and 70 % of the
MACs are spent, over the throughput of the merged plain RepAdapter on the same images. Ideal is the ratio of the MACs.
The backbone's weights are random: nothing here says anything about accuracy.
"""

import argparse
import json
import subprocess
import sys
import time

import numpy as np
import timm
import torch
from adaptive import forced_policy
from peft import LoraConfig, get_peft_model
from timing import interleaved, machine, spread, write_json
from torch import nn

from exit_plugins import AdaptiveModel, DynConfig, RepAdapterConfig, collect_exits, exit_costs, get_dyn_peft_model

KINDS = ("lora", "dyn-lora")


def training_step(kind: str, args: argparse.Namespace):
    """A callable that takes one step of training on fixed random images."""
    device = torch.device(args.device)
    torch.manual_seed(0)
    backbone = timm.create_model(args.model, num_classes=args.num_classes)
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.1, target_modules=["qkv"])
    if kind == "lora":
        config.modules_to_save = ["head"]
        model = get_peft_model(backbone, config).to(device).train()
    else:
        model = get_dyn_peft_model(backbone, config, DynConfig()).to(device).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    if kind == "dyn-lora":
        model.attach_mask(optimizer)
    size = backbone.default_cfg["input_size"]
    images = torch.randn(args.batch_size, *size, device=device)
    labels = torch.randint(args.num_classes, (args.batch_size,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            outputs = model(images)
        if kind == "dyn-lora":
            model.set_progress(0.5)
            loss = model.loss(outputs, labels)
        else:
            loss = nn.functional.cross_entropy(outputs.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def with_cpu_time(step, seconds: list[float]):
    """``step``, noting the seconds of processor time of every call: other programs on the machine leave them alone."""

    def run() -> None:
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)

    return run


def peak_memory(kind: str, args: argparse.Namespace) -> float:
    """MiB that training steps need at most, beyond model and data on the CPU, all of it on the GPU."""
    if args.device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        step = training_step(kind, args)
        for _ in range(3):
            step()
        return torch.cuda.max_memory_allocated() / 2**20
    command = [sys.executable, __file__, "--memory-of", kind, "--model", args.model, "--threads", str(args.threads)]
    command += ["--batch-size", str(args.batch_size), "--num-classes", str(args.num_classes)]
    command += ["--bf16"] if args.bf16 else []
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(json.loads(output.splitlines()[-1]))


def resident_growth(kind: str, args: argparse.Namespace) -> float:
    import resource

    step = training_step(kind, args)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(3):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def shares_for(costs: np.ndarray, target: float) -> np.ndarray:
    """Shares proportional to p^k that spend ``target`` of the last cost on average."""
    low, high = 1e-6, 1e6
    for _ in range(200):
        p = np.sqrt(low * high)
        shares = p ** np.arange(len(costs)) / (p ** np.arange(len(costs))).sum()
        low, high = (p, high) if (shares @ costs) / costs[-1] < target else (low, p)
    return shares


@torch.inference_mode()
def inference(args: argparse.Namespace) -> list[dict]:
    device = torch.device(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = RepAdapterConfig(target_modules=["qkv", "fc1"], init_weights=False, scale=0.1)
    torch.manual_seed(0)
    plain = get_peft_model(timm.create_model(args.model, num_classes=args.num_classes), config).merge_and_unload()
    dyn = get_dyn_peft_model(timm.create_model(args.model, num_classes=args.num_classes), config).merge_and_unload()
    size = plain.default_cfg["input_size"]
    costs = exit_costs(dyn, size).macs
    full = costs[-1] - sum(p.numel() for p in dyn.early_heads.parameters() if p.ndim == 2)  # without early heads
    plain, dyn = (m.to(device, dtype).eval() for m in (plain, dyn))
    images = torch.randn(args.images, *size)
    batches = [batch.to(device, dtype) for batch in images.split(args.batch_size)]
    confidence = collect_exits(
        dyn, [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in batches]
    ).confidence
    rows, runs = [], {"plain": lambda: [plain(batch) for batch in batches]}
    for target in args.mixes:
        shares = shares_for(costs, target)
        policy = forced_policy(confidence, shares[:-1])
        adaptive = AdaptiveModel(dyn, policy)
        exits = torch.cat([adaptive(batch).exit_index.cpu() for batch in batches]).numpy()
        spent = costs[exits].mean()
        rows.append({"mix": target, "macs_spent": spent / full, "ideal": full / spent, "shares": shares.tolist()})
        runs[str(target)] = lambda adaptive=adaptive: [adaptive(batch) for batch in batches]
    cpu_times: dict[str, list[float]] = {name: [] for name in runs}
    runs = {name: with_cpu_time(run, cpu_times[name]) for name, run in runs.items()}
    times = interleaved(runs, args.repeats, 2, device)
    plain_time = np.median(times["plain"])
    print(f"{args.model}, batches of {args.batch_size}: merged RepAdapter {args.images / plain_time:.1f} img/s")
    for row in rows:
        seconds = np.median(times[str(row["mix"])])
        row |= {"img_per_s": args.images / seconds, "speed_up": plain_time / seconds}
        row["of_ideal"] = row["speed_up"] / row["ideal"]
        cpu_seconds = np.divide(cpu_times["plain"][2:], cpu_times[str(row["mix"])][2:])
        row["of_ideal_in_cpu_seconds"] = float(np.median(cpu_seconds)) / row["ideal"]
        print(
            f"  {row['macs_spent']:.3f} of the MACs: {row['img_per_s']:.1f} img/s, {row['speed_up']:.2f}x, ideal "
            f"{row['ideal']:.2f}x, {row['of_ideal']:.3f} of it ({row['of_ideal_in_cpu_seconds']:.3f} by CPU seconds)"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--num-classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--images", type=int, help="of the inference part; default: four batches")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--mixes", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--parts", nargs="+", choices=("training", "inference"), default=["training", "inference"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json")
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        print(resident_growth(args.memory_of, args))
        return
    args.images = args.images or 4 * args.batch_size
    document = {"machine": machine(args.device), "arguments": vars(args)}
    if "training" in args.parts:
        memory = {kind: peak_memory(kind, args) for kind in KINDS}
        cpu_times: dict[str, list[float]] = {kind: [] for kind in KINDS}
        steps = {kind: with_cpu_time(training_step(kind, args), cpu_times[kind]) for kind in KINDS}
        times = interleaved(steps, args.repeats, 2, args.device)
        ratio = float(np.median(times["dyn-lora"] / times["lora"]))
        cpu_ratio = float(np.median(np.divide(cpu_times["dyn-lora"][2:], cpu_times["lora"][2:])))
        document["training"] = {
            "time_ratio": ratio,
            "cpu_seconds_ratio": cpu_ratio,
            "memory_ratio": memory["dyn-lora"] / memory["lora"],
            **{kind: {**spread(times[kind]), "peak_mib": memory[kind]} for kind in KINDS},
        }
        for kind in KINDS:
            row = document["training"][kind]
            print(f"{kind:9s} {row['median_ms']:9.1f} ms a step, peak {row['peak_mib']:8.1f} MiB")
        memory_ratio = document["training"]["memory_ratio"]
        print(
            f"Dyn-LoRA over LoRA: time {ratio:.3f}x, CPU seconds {cpu_ratio:.3f}x, memory {memory_ratio:.3f}x",
            flush=True,
        )
    if "inference" in args.parts:
        document["inference"] = inference(args)
    write_json(args.json, document)


if __name__ == "__main__":
    main()
