"""What the benchmarks share: interleaved timing, the machine's description and the JSON they leave."""

import json
import platform
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: dict[str, Callable[[], None]], repeats: int, warmup: int = 1, device: torch.device | str = "cpu"
) -> dict[str, np.ndarray]:
    """Seconds (repeats,) of every callable. Each repeat runs all of them: a drift of the machine touches all alike."""
    times = {name: np.zeros(repeats) for name in runs}
    device = torch.device(device)
    for repeat in range(-warmup, repeats):
        # The order is turned round every time: whoever runs after a large neighbour finds cold caches.
        for name in runs if repeat % 2 else reversed(runs):
            synchronize(device)
            start = time.perf_counter()
            runs[name]()
            synchronize(device)
            if repeat >= 0:
                times[name][repeat] = time.perf_counter() - start
    return times


def spread(times: np.ndarray) -> dict[str, float]:
    """Median, p95 and interquartile range of some times, in milliseconds."""
    low, median, high, p95 = np.percentile(np.asarray(times) * 1e3, [25, 50, 75, 95])
    return {"median_ms": float(median), "p95_ms": float(p95), "iqr_ms": float(high - low)}


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Where and when a figure was measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    device = torch.device(device)
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def write_json(path: str | None, document: dict) -> None:
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(document, indent=2) + "\n")
        print(f"written to {path}")
