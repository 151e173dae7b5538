"""What the benchmarks share: interleaved timing, the machine's description and the JSON they leave."""

import argparse
import ctypes
import json
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import date
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import torch
from tqdm import tqdm

from exit_plugins.exits.files import atomic_write
from exit_plugins.exits.latency import processor_name


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleaved(
    runs: dict[str, Callable[[], None]],
    repeats: int,
    warmup: int = 1,
    device: torch.device | str = "cpu",
    cpu_time: bool = False,
) -> dict[str, np.ndarray]:
    """Seconds (repeats,) of every callable. Each repeat runs all of them: a drift of the machine touches all alike.

    With ``cpu_time`` these are the process's CPU seconds. On one thread of an idle machine both are the same; on a
    machine that others use too, only CPU seconds leave the waiting for them out.
    """
    clock = time.process_time if cpu_time else time.perf_counter
    times = {name: np.zeros(repeats) for name in runs}
    device = torch.device(device)
    for repeat in tqdm(range(-warmup, repeats), desc="timing", unit="round", leave=False, disable=None):
        # The order is turned round every time: whoever runs after a large neighbour finds cold caches.
        for name in runs if repeat % 2 else reversed(runs):
            synchronize(device)
            start = clock()
            runs[name]()
            synchronize(device)
            if repeat >= 0:
                times[name][repeat] = clock() - start
    return times


def spread(times: np.ndarray) -> dict[str, float]:
    """Median, p95 and interquartile range of some times, in milliseconds."""
    low, median, high, p95 = np.percentile(np.asarray(times) * 1e3, [25, 50, 75, 95])
    return {"median_ms": float(median), "p95_ms": float(p95), "iqr_ms": float(high - low)}


def add_clock_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="CPU seconds of one thread instead of the clock, for a machine that others use too",
    )
    parser.add_argument(
        "--system-malloc",
        action="store_true",
        help="leave the C library's allocator as it is: it gives large blocks back to the system at once",
    )


def use_clock(args: argparse.Namespace) -> None:
    if args.cpu_time and args.threads != 1:
        raise SystemExit("--cpu-time adds up the seconds of all threads: give --threads 1 with it.")
    torch.set_num_threads(args.threads)
    if not args.system_malloc:
        keep_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, as the allocators of servers do (jemalloc, tcmalloc); no effect elsewhere.

    By default it returns blocks over 32 MB to the system and asks for them anew, so that networks on large batches are
    timed zeroing pages: the same network then takes once or twice the time, by chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_max, trim_threshold = -4, -1  # as malloc.h numbers them
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, -1)  # never


def machine(device: torch.device | str = "cpu") -> dict[str, str | int]:
    """Where and when a figure was measured."""
    device = torch.device(device)
    return {
        "cpu": processor_name(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        **_runtimes(),
        "date": date.today().isoformat(),
    }


def _runtimes() -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for name in ("onnxruntime", "openvino"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def write_json(path: str | None, document: dict) -> None:
    if path:
        with atomic_write(path) as file:
            file.write(json.dumps(document, indent=2) + "\n")
        print(f"written to {path}")
