"""Work killed the hard way at a line of ours: a forked process counts the lines it passes, and dies at one of them."""

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import exit_plugins

POINTS = int(os.environ.get("CRASH_POINTS", 0))  # the long form; 0: as few as each test says
HERE = str(Path(exit_plugins.__file__).parent)


def in_child(work: Callable[[], None]) -> int:
    """Exit code of ``work`` in a forked process: 0, minus the signal that ended it, or 1 and 2 for errors."""
    child = os.fork()
    if child == 0:
        try:
            # The parent's pool of threads is not here, and whoever asks it for work waits for ever (torch's DataLoader
            # does the same in its workers).
            torch.set_num_threads(1)
            work()
        except OSError:
            os._exit(1)
        except BaseException:
            import traceback

            with contextlib.suppress(OSError):  # a child that must not write: it would go on as a second test run
                traceback.print_exc()
            os._exit(2)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def count_lines(work: Callable[[], Any], stop: int = 0, within: tuple[str, ...] = (HERE,)) -> int:
    """Run ``work`` and count the lines it passes in files whose paths begin with one of ``within``, the package's.

    At the line ``stop`` the process kills itself.
    """
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(within):
            return None
        if event == "line":
            seen += 1
            if seen == stop:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
    return seen


def points(total: int, short: int) -> list[int]:
    """Some of the lines 1 to ``total``, drawn at random: ``short`` of them, or as many as CRASH_POINTS says."""
    count = min(POINTS or short, total)
    return sorted(np.random.default_rng(0).choice(np.arange(1, total + 1), count, replace=False).tolist())
