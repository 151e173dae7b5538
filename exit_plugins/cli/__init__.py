"""The command ``exit-plugins``: what COMMANDS names, one module each."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from .._version import __version__

__all__ = ["main"]

# Command -> what it does. Each is a module here with add_arguments(parser), run(args) -> int and, where it writes
# files, outputs(args), which are tried before it runs; only the one that is asked for is imported.
COMMANDS = {
    "profile": "parameters, MACs and latency of every exit, beside the plain backbone",
    "evaluate": "accuracy, cost and calibration of every exit on a data set, and of a policy",
    "solve": "thresholds for a budget, an accuracy or a guarantee, written to a policy file",
    "predict": "classify images under a policy, one or any number: label, confidence, exit taken, MACs",
    "report": "one self-contained HTML page with curves, shares, reliability, images and similarity of exits",
    "export": "ONNX or OpenVINO files that really stop early",
    "configs": "MMDetection configurations that come with the package",
    "train": "train by timm's own train.py with every exit in the loss",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0 if it worked, 2 with one line on stderr if not."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    if not argv or argv[0] not in COMMANDS:
        args = parser.parse_args(argv)
        parser.print_help()
        return 0 if args.command is None and not argv else 2
    if argv[0] == "train":
        # timm's launcher reads its own options, help included.
        return int(import_module("exit_plugins.timm.train").main(argv[1:]))
    module = import_module(f".{argv[0]}", __name__)
    command = argparse.ArgumentParser(
        prog=f"exit-plugins {argv[0]}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(command)
    command.add_argument("--traceback", action="store_true", help="show where an error came from")
    args = command.parse_args(argv[1:])
    from .common import check_outputs, leave_processes

    try:
        if hasattr(module, "outputs"):
            check_outputs(args, module.outputs(args))
        return int(module.run(args))
    except KeyboardInterrupt:
        print("exit-plugins: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output (head, less) has had enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.traceback:
            raise
        line = " ".join(str(error).split()) or type(error).__name__
        print(f"exit-plugins {argv[0]}: {line}", file=sys.stderr)
        return 2
    finally:
        leave_processes()


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="exit-plugins",
        usage="exit-plugins COMMAND ...",
        description="Early exits for vision models: measure, tune, certify, run.\n\ncommands:\n" + commands,
        epilog="`exit-plugins COMMAND --help` shows its options and an example.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"exit-plugins {__version__}")
    parser.add_argument("command", nargs="?", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    return parser
