"""Install MMDetection with its operators compiled against the torch that is installed.

    python -m exit_plugins.install_mmdet

Left to itself, pip builds mmcv in isolation, without torch, and silently without its operators. This needs a C++
compiler and 5 to 10 minutes on two cores. The operators belong to the torch they were compiled against: run it again
after another one is installed.

With a CUDA build of torch and ``nvcc`` of its version on the PATH, the operators are compiled for the GPU too (on a
machine without one, set ``FORCE_CUDA=1``); otherwise for the CPU alone.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

__all__ = ["main"]

_MMCV = "onedl-mmcv==2.3.6"
_BUILD_TOOLS = ["setuptools>=80", "wheel", "ninja", "packaging", "numpy<2.3"]
# Two OpenCV wheels arrive, and the one with a GUI, which needs libGL, would win: this one is laid over it last.
_OPENCV = "opencv-python-headless==4.12.0.88"
_CHECK = "import torch, mmcv.ops, mmdet"  # torch first: the operators link against its libraries


def _write_compiler(path: Path) -> None:
    """A C++ compiler that takes C++20 for C++17: torch 2.14 needs it, and mmcv's build asks for 17 last."""
    compiler = os.environ.get("CXX", "g++")
    path.write_text(f'#!/bin/sh\nexec {compiler} "$@" -std=c++20\n')
    path.chmod(0o755)


def _build_environment(compiler: Path, jobs: int) -> dict[str, str]:
    """What mmcv's build reads; what the user has set stays."""
    wanted = {
        "CXX": str(compiler),
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),  # ninja
        "CPPFLAGS": os.environ.get("CPPFLAGS", "-g0"),
        "MAX_JOBS": str(jobs),
    }
    if shutil.which("nvcc") is None:
        wanted["CUDA_VISIBLE_DEVICES"] = ""  # with a GPU in sight the build would ask for nvcc and stop
    return wanted


def _run(command: list[str], environment: Mapping[str, str], dry_run: bool) -> None:
    print(" ".join([*(f"{k}={shlex.quote(v)}" for k, v in environment.items()), shlex.join(command)]), flush=True)
    if not dry_run and subprocess.run(command, env={**os.environ, **environment}).returncode:
        raise SystemExit("this command failed; what it wrote above says why.")


def main(arguments: list[str] | None = None) -> None:
    """Install mmcv with its operators, then the extra ``mmdet``. SystemExit that says so where a command fails."""
    parser = argparse.ArgumentParser(
        "python -m exit_plugins.install_mmdet",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compilers at a time, about 1 GB each")
    parser.add_argument("--dry-run", action="store_true", help="print the commands only")
    args = parser.parse_args(arguments)

    pip = [sys.executable, "-m", "pip", "install"]
    with tempfile.TemporaryDirectory() as folder:
        compiler = Path(folder) / "g++-c++20"
        _write_compiler(compiler)
        build = _build_environment(compiler, args.jobs)
        alone = ["--no-build-isolation", "--no-deps", "--no-cache-dir", "--force-reinstall"]
        _run([*pip, *_BUILD_TOOLS], {}, args.dry_run)
        _run([*pip, *alone, _MMCV], build, args.dry_run)
    _run([*pip, "exit-plugins[mmdet]"], {}, args.dry_run)
    _run([*pip, "--no-deps", "--force-reinstall", _OPENCV], {}, args.dry_run)
    _run([sys.executable, "-c", _CHECK], {}, args.dry_run)


if __name__ == "__main__":
    main()
