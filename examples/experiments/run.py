"""Run the experiments that are missing, and write docs/results.md from those that are there.

    python examples/experiments/run.py                           # whatever has no result yet, one run after the other
    python examples/experiments/run.py --only dvt chase/msdnet_cifar_batch-s0
    python examples/experiments/run.py --jobs 2                  # two side by side, one thread each
    python examples/experiments/run.py --small                   # a hundredth of the data, in minutes: does it run?
    python examples/experiments/run.py --list | --report

A run that was stopped (killed, too) goes on from its last checkpoint when the same command is given again. Several
queues may work on one folder: a run is locked by whoever trains it. ``--data`` holds the data sets in their standard
layouts: cifar100/{train,test}/CLASS/*.png, caltech101/{train,test}/CLASS/*.jpg, bccd/{images,*.json}.
"""

import argparse
import fcntl
import importlib
import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

from base import ROOT, Experiment, Place, Run  # noqa: E402
from results_page import write_report  # noqa: E402

EXPERIMENTS = (
    "lite0",
    "lite0_cifar",
    "branches",
    "components",
    "dvt",
    "chase",
    "attention",
    "motion",
    "motion_peft",
    "bccd",
    "vit",
    "adapters",
    "alignment",  # of networks trained before
    "frozen",  # best alone on the machine, as is
    "clock",  # of networks trained before, and best alone on the machine
)

# One thread a run, and a C library that keeps freed memory: activations are asked for anew at every step, and giving
# them back to the system in between takes a quarter of the time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="experiments, or EXPERIMENT/RUN")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("EXPERIMENTS_DATA", "datasets")))
    parser.add_argument("--state", type=Path, help="checkpoints and logs (default runs/experiments)")
    parser.add_argument("--results", type=Path, help="JSON files (default docs/results; with --small beside the state)")
    parser.add_argument("--small", action="store_true", help="a hundredth of the data")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side, one thread each")
    parser.add_argument("--nice", type=int, default=10, help="added to the niceness of the runs")
    parser.add_argument("--list", action="store_true", help="say what is done and what is missing")
    parser.add_argument("--report", action="store_true", help="only write the page from the results there are")
    parser.add_argument("--here", action="store_true", help="train in this process (what the queue starts)")
    args = parser.parse_args(argv)
    args.state = args.state or ROOT / "runs" / ("experiments-small" if args.small else "experiments")
    args.results = args.results or (args.state / "results" if args.small else ROOT / "docs" / "results")
    return args


def load_experiments(only: list[str] | None = None) -> list[tuple[Experiment, list[Run]]]:
    """The experiments with those of their runs that ``only`` names (all, if it is empty)."""
    found = []
    for name in EXPERIMENTS:
        experiment = importlib.import_module(name).EXPERIMENT
        runs = [r for r in experiment.runs if not only or name in only or f"{name}/{r.name}" in only]
        if runs:
            found.append((experiment, runs))
    known = {name for e, runs in found for name in (e.name, *(f"{e.name}/{r.name}" for r in runs))}
    unknown = set(only or ()) - known
    if unknown:
        raise SystemExit(f"no experiment or run {', '.join(sorted(unknown))}; --list names them.")
    return found


@contextmanager
def locked(path: Path):
    """Whether this process holds the run now. The lock goes with the process, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


def start(experiment: Experiment, run: Run, args: argparse.Namespace) -> subprocess.Popen:
    """Train one run in a process of its own: one that fails or is killed takes no other with it."""
    log = args.state / experiment.name / f"{run.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, __file__, "--here", "--only", f"{experiment.name}/{run.name}"]
    for name in ("data", "state", "results"):
        command += [f"--{name}", str(getattr(args, name).resolve())]
    command += ["--small"] * args.small
    with open(log, "a") as file:
        return subprocess.Popen(
            command,
            env=os.environ | ENVIRONMENT,
            stdout=file,
            stderr=subprocess.STDOUT,
            preexec_fn=lambda: os.nice(args.nice),
        )


def work_off(waiting: list[tuple[Experiment, Run]], args: argparse.Namespace, place: Place) -> int:
    """Train what is waiting, ``--jobs`` at a time; the number of runs that failed."""
    active: dict[subprocess.Popen, tuple[str, float]] = {}
    failed = 0
    try:
        while waiting or active:
            while waiting and len(active) < args.jobs:
                experiment, run = waiting.pop(0)
                if experiment.result(place, run) is None:
                    active[start(experiment, run, args)] = (f"{experiment.name}/{run.name}", time.monotonic())
                    print(f"{experiment.name}/{run.name}: started, {len(waiting)} more waiting", flush=True)
            for process in [p for p in active if p.poll() is not None]:
                name, began = active.pop(process)
                failed += process.returncode != 0
                ended = "done" if process.returncode == 0 else f"failed, see {args.state / (name + '.log')}"
                print(f"{name}: {ended} after {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
            time.sleep(0.5)
    finally:
        for process in active:
            process.terminate()
    return failed


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    place = Place(args.data, args.state, args.results, args.small)
    chosen = load_experiments(args.only)
    pairs = [(experiment, run) for experiment, runs in chosen for run in runs]
    if args.list:
        for experiment, run in pairs:
            done = "missing" if experiment.result(place, run) is None else "done   "
            print(f"{done} {experiment.name}/{run.name}")
        return 0
    failed = 0
    if args.here:
        for experiment, run in pairs:
            with locked(args.state / experiment.name / f"{run.name}.lock") as mine:
                if mine and experiment.result(place, run) is None:
                    experiment.execute(place, run)
                elif not mine:
                    print(f"{experiment.name}/{run.name} is being trained by another queue.")
        return 0
    if not args.report:
        if not args.data.is_dir():
            raise SystemExit(f"no data at {args.data}: give --data (or EXPERIMENTS_DATA) the folder of the data sets.")
        failed = work_off(pairs, args, place)
    page = args.results / "results.md" if args.small else ROOT / "docs" / "results.md"
    write_report([experiment for experiment, _ in load_experiments()], place, page)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
