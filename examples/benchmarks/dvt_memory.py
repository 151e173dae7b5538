"""Peak memory of DVT's training step and inference, against the same transformers without reuse.

    python examples/benchmarks/dvt_memory.py --model dvt_t2t_vit_12 --batch 64 --count --json dvt_memory.json
    python examples/benchmarks/dvt_memory.py --model dvt_t2t_vit_12 --batch 64 --device cuda --amp

Memory is what a step adds to the model and the batch: activations, gradients, temporaries. On a GPU it is read from
torch's allocator, on a CPU it is the highest total in the allocator's own record (torch.profiler), so it does not
depend on how busy the machine is. With --count nothing is computed: the CPU's kernels are walked through with tensors
that have a size and no content, and the sizes alive are added up. What a kernel allocates inside itself is left out;
at batch 4 both ways agree to the MiB for dvt_t2t_vit_12 and dvt_deit_small, apart from the checkpointed steps of the
latter, which are counted 19 MiB (7 %) too low.

"three plain ViTs" are the cascade's transformers with both kinds of reuse off, trained in one step or run one after
the other.
"""

import argparse
import json
import tempfile
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import timm
import torch
from timing import machine, write_json
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

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


class AliveStorages(TorchDispatchMode):
    """Adds up the storages made while it is on, until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: set[int] = set()
        self.before: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.before |= self._storages((args, kwargs)).keys() - self.alive
        result = func(*args, **(kwargs or {}))
        for key, storage in self._storages(result).items():
            if key not in self.alive and key not in self.before:
                self.alive.add(key)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, key, storage.nbytes())
        return result

    def _freed(self, key: int, size: int) -> None:
        self.alive.discard(key)
        self.now -= size

    @staticmethod
    def _storages(values) -> dict[int, torch.UntypedStorage]:
        tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
        return {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}


def counted_memory(step: Callable[[], None], device: torch.device) -> int:
    """``peak_memory`` of a step on fake tensors."""
    with AliveStorages() as storages:
        step()
    return storages.peak


def without_content(module: torch.nn.Module, mode: FakeTensorMode) -> torch.nn.Module:
    """``module`` with fake parameters and buffers."""
    for part in module.modules():
        for name, value in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(mode.from_tensor(value.detach())))
        for name, value in part.named_buffers(recurse=False):
            part._buffers[name] = mode.from_tensor(value)
    return module


def measure(name: str, options: dict, args: argparse.Namespace, checkpointing: bool) -> dict[str, int]:
    """Bytes of a training step and of inference to the last exit, every exit's logits computed."""
    torch.manual_seed(0)
    device, amp = torch.device(args.device), args.amp
    model = timm.create_model(name, **options).to(device)
    size, mode, read = model.default_cfg["input_size"], nullcontext(), peak_memory
    if args.count:
        mode, read = FakeTensorMode(), counted_memory
        model = without_content(model, mode)
    with mode:
        images = torch.randn(args.batch, *size, device=device)
        target = torch.zeros(args.batch, dtype=torch.int64, device=device)
    loss_of = MultiExitLoss.for_model(model)
    model.set_grad_checkpointing(checkpointing)

    def train() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            loss = loss_of(model(images), target)
        loss.backward()

    def infer() -> None:
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
            model.forward_exits(images)

    with mode:
        model.train()
        training = read(train, device)
        model.zero_grad(set_to_none=True)
        model.eval()
        return {"train": training, "inference": read(infer, device)}


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
    parser.add_argument("--count", action="store_true", help="count on tensors without content (CPU's kernels)")
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.count and args.device != "cpu":
        parser.error("--count walks through the CPU's kernels; leave --device out.")
    device = torch.device(args.device)

    cases = [(label, options, False) for label, options in VARIANTS.items()]
    cases += [(f"{label}, checkpointed", VARIANTS[label], True) for label in ("three plain ViTs", "DVT")]
    rows: dict[str, dict] = {}
    print(f"{args.model}, batch {args.batch}, {device}, {'bfloat16 mixed' if args.amp else 'float32'}; MiB and ratio")
    print(f"{'':<32} {'training step':>20} {'inference':>20}")
    for label, options, checkpointing in cases:
        rows[label] = measure(args.model, options, args, checkpointing)
        plain = rows["three plain ViTs"]
        cells = [f"{rows[label][k] / 2**20:>12.0f} {rows[label][k] / plain[k]:>6.2f}x" for k in ("train", "inference")]
        print(f"{label:<32} {cells[0]} {cells[1]}", flush=True)
    logits = handed_on(args.model, args.batch)
    print("attention logits in the state after each exit, MiB: " + ", ".join(f"{size / 2**20:.0f}" for size in logits))
    document = {"command": vars(args), "machine": machine(device), "bytes": rows, "logits_bytes": logits}
    write_json(args.json, document)


if __name__ == "__main__":
    main()
