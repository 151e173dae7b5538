"""Run the benchmarks behind docs/benchmarks.md that have no result yet, and write the page.

    python examples/benchmarks/measure_all.py --data datasets         # or: make benchmarks EXPERIMENTS_DATA=datasets
    python examples/benchmarks/measure_all.py --only forward rivals --force

For a quiet machine with two cores; half an hour. Each leaves docs/results/benchmarks/NAME.json with the command, the
machine and the day. ``--data`` holds cifar100/ and caltech101/ with a folder for each split and class, as for the
experiments; without it, what needs trained networks and images is left out.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import report
from timing import machine, write_json

HERE = Path(__file__).resolve().parent
MODEL = "dynperceiver_regnety_400mf"

# The name of a table on the page -> the command as a user types it.
RUNS = {
    "forward": "forward.py --threads 2 --batch 1 16 --mode fused onnx openvino",
    "adaptive": "adaptive.py --threads 2 --batch 1 32 --images 32 --repeats 9 --mode fused served onnx openvino "
    "--mix nobody even most everybody",
    "modes": f"exit-plugins profile {MODEL} --modes --threads 2",
    "time_per_mac": "time_per_mac.py --mode eager fused --threads 1 --batch 1 8 --repeats 5",
    "latency_budget": f"latency_budget.py {MODEL} --threads 1 --batch 1 8 32",
    "request_load": "request_load.py --threads 2 --requests 200 --rates 0.5 0.6 0.7 0.8 0.9 1 1.1",
    "rivals": "rivals.py --threads 2 --repeats 5",
    "precision": "precision.py msdnet_cifar_batch.cifar100 with_exits_tf_efficientnet_lite0.caltech101 "
    "--data cifar100 caltech101 --split test --budget 85% --threads 1 --batch 1 16",
    "solvers": "solvers.py",
}
NEED_DATA = ("precision",)
EXPORTS = HERE.parents[1] / "runs" / "benchmarks" / "exports"  # of precision.py: made once, timed as often as wanted


def measure(name: str, data: Path | None) -> dict:
    """Run one benchmark; its JSON, with the command that made it."""
    script, *options = shlex.split(RUNS[name])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        if script == "exit-plugins":  # prints its JSON
            words = [sys.executable, "-m", "exit_plugins", *options, "--json"]
            path.write_bytes(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
            threads = int(options[options.index("--threads") + 1])
            document = {"machine": machine() | {"threads": threads}, **json.loads(path.read_text(encoding="utf-8"))}
            made_by = RUNS[name]
        else:
            kept = ["--exports", EXPORTS] if name == "precision" else []
            # From the folder of the data, whose place on this machine is nobody's concern.
            subprocess.run([sys.executable, HERE / script, *options, *kept, "--json", path], check=True, cwd=data)
            document = json.loads(path.read_text(encoding="utf-8"))
            for place in ("json", "exports"):
                document["command"].pop(place, None)
            made_by = f"python examples/benchmarks/{RUNS[name]}"
    return {"made_by": made_by, **document}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the data sets")
    parser.add_argument("--only", nargs="*", default=[], choices=RUNS, metavar="NAME", help=f"of {', '.join(RUNS)}")
    parser.add_argument("--force", action="store_true", help="measure again what is measured")
    args = parser.parse_args(argv)
    failed = []
    for name in args.only or RUNS:
        path = report.RESULTS / f"{name}.json"
        if path.is_file() and not args.force:
            print(f"{name}: measured already")
        elif name in NEED_DATA and (args.data is None or not args.data.is_dir()):
            print(f"{name}: left out, there is no --data to run it on")
        else:
            started = time.perf_counter()
            print(f"{name}: {RUNS[name]}", flush=True)
            try:
                document = measure(name, args.data if name in NEED_DATA else None)
            except subprocess.CalledProcessError as error:
                failed.append(f"{name} (status {error.returncode})")
                continue
            report.RESULTS.mkdir(parents=True, exist_ok=True)
            write_json(str(path), document)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    report.main([])
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
