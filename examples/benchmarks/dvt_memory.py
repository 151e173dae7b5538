"""Peak memory of DVT's training step and inference, against the same transformers without reuse.

    python examples/benchmarks/dvt_memory.py --model dvt_t2t_vit_12 --batch 64 --json dvt_memory.json
    python examples/benchmarks/dvt_memory.py --model dvt_t2t_vit_12 --batch 64 --device cuda --amp

Memory is what a step adds to the model and the batch: activations, gradients, temporaries. On a GPU it is read from
torch's allocator, on a CPU it is the highest total in the allocator's own record (torch.profiler), so it does not
depend on how busy the machine is. "three plain ViTs" are the cascade's transformers with both kinds of reuse off,
trained in one step or run one after the other; for attention alone it is the logits that relation reuse adds.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from timing import machine, write_json
from torch.profiler import ProfilerActivity, profile

from exit_plugins import MultiExitLoss

VARIANTS = {
    "three plain ViTs": dict(feature_reuse=False, relation_reuse=False),
    "features reused": dict(relation_reuse=False),
    "relations reused": dict(feature_reuse=False),
    "DVT": dict(),
}


def peak_memory(step: Callable[[], None], device: torch.device) -> int:
    """Bytes that ``step`` adds at its worst moment."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    records = [event["args"] for event in events if event["name"] == "[memory]"]
    # The running total goes on from one profile to the next.
    before = records[0]["Total Allocated"] - records[0]["Bytes"]
    return max(record["Total Allocated"] for record in records) - before


def measure(name: str, options: dict, batch: int, device: torch.device, amp: bool, checkpointing: bool) -> dict:
    torch.manual_seed(0)
    model = timm.create_model(name, **options).to(device)
    images = torch.randn(batch, *model.default_cfg["input_size"], device=device)
    target = torch.zeros(batch, dtype=torch.int64, device=device)
    loss_of = MultiExitLoss(model.num_exits, "dvt")
    model.set_grad_checkpointing(checkpointing)

    def train() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            loss = loss_of(model(images), target)
        loss.backward()

    def infer() -> None:
        with torch.inference_mode(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            model.forward_exits(images)

    model.train()
    training = peak_memory(train, device)
    model.zero_grad(set_to_none=True)
    model.eval()
    return {"train": training, "inference": peak_memory(infer, device)}


def handed_on(name: str, batch: int) -> list[int]:
    """Bytes of attention logits in the state after each exit in float32: what relation reuse must keep."""
    model = timm.create_model(name, device="meta").eval()
    state = model.begin_exits(torch.empty(batch, *model.default_cfg["input_size"], device="meta"))
    sizes = []
    for index in range(model.num_exits):
        _, state = model.forward_exit(index, state)
        relations = state.get("relations")
        sizes.append(0 if relations is None else relations.numel() * relations.element_size())
    return sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="dvt_t2t_vit_12")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")
    parser.add_argument("--json")
    args = parser.parse_args()
    device = torch.device(args.device)

    cases = [(label, options, False) for label, options in VARIANTS.items()]
    cases += [(f"{label}, checkpointed", VARIANTS[label], True) for label in ("three plain ViTs", "DVT")]
    rows: dict[str, dict] = {}
    print(f"{args.model}, batch {args.batch}, {device}, {'bfloat16 mixed' if args.amp else 'float32'}; MiB and ratio")
    print(f"{'':<32} {'training step':>20} {'inference':>20}")
    for label, options, checkpointing in cases:
        rows[label] = measure(args.model, options, args.batch, device, args.amp, checkpointing)
        plain = rows["three plain ViTs"]
        cells = [f"{rows[label][k] / 2**20:>12.0f} {rows[label][k] / plain[k]:>6.2f}x" for k in ("train", "inference")]
        print(f"{label:<32} {cells[0]} {cells[1]}", flush=True)
    logits = handed_on(args.model, args.batch)
    print("attention logits in the state after each exit, MiB: " + ", ".join(f"{size / 2**20:.0f}" for size in logits))
    document = {"command": vars(args), "machine": machine(device), "bytes": rows, "logits_bytes": logits}
    write_json(args.json, document)


if __name__ == "__main__":
    main()
