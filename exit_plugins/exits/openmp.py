"""OpenMP's idle threads, which make those of another pool slow."""

import ctypes
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch

__all__ = ["release_idle_workers"]

_SOFT = 1  # omp_pause_soft: what the program set stays set


def release_idle_workers() -> bool:
    """Let the OpenMP threads go that wait for the calling thread's next parallel operation.

    GNU's OpenMP, which torch uses on Linux, keeps a pool of them for every thread that ran something in parallel. Once
    all pools together have more threads than there are processors, none waits awake for its next operation any more,
    and every small one pays for waking them: on two cores a model took 1.5 times as long in a thread of its own as in
    the main one, only because the main one had run it before. Threads that hand work to another one call this before;
    their next parallel operation makes a new pool, in some ten microseconds.

    Returns:
        Whether there was an OpenMP to ask; False where torch has another one, or none that can.
    """
    pause = _pause()
    return pause is not None and pause(_SOFT) == 0


@cache
def _pause() -> "ctypes._NamedFuncPointer | None":
    """``omp_pause_resource_all`` of the OpenMP that torch has loaded."""
    if not hasattr(os, "RTLD_NOLOAD"):
        return None
    package = Path(torch.__file__).parent
    for path in [*package.glob("lib/libgomp*"), *package.parent.glob("torch.libs/libgomp*")]:
        with suppress(OSError, AttributeError):  # not the one that is loaded, or one from before OpenMP 5
            return ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW).omp_pause_resource_all
    return None
