"""Exports under OpenVINO, opened and left in any order: the process goes on."""

import signal
import subprocess
import sys

import pytest
from traced_models import SIZE, nobody, traced

from exit_plugins.exits import export
from exit_plugins.exits.export import writing

pytest.importorskip("openvino")

# A handler of Python's runs on the stack for signals, which OpenVINO exchanges; SIGCHLD comes with every process's end.
PROGRAM = """
import ctypes, gc, signal, subprocess, sys, threading
from exit_plugins.exits.export import ExportedSegments

heard = []
signal.signal(signal.SIGCHLD, lambda *_: heard.append(1))
opened, failed = {}, []

def signal_stack():
    entry = (ctypes.c_byte * 24)()
    ctypes.CDLL(None).sigaltstack(None, entry)
    return bytes(entry)

def work(words):
    before = signal_stack()
    for word in words:
        if word.isupper():
            opened.pop(word.lower())
        else:
            opened[word] = ExportedSegments(sys.argv[1])
        gc.collect()
        if signal_stack() != before:
            failed.append(word)

for words in sys.argv[2:]:
    if words[0] == "+":  # in a thread of its own
        thread = threading.Thread(target=work, args=(words[1:],))
        thread.start(), thread.join()
    else:
        work(words)
    subprocess.run(["true"], check=True)
assert len(heard) >= len(sys.argv[2:]) and not failed, (heard, failed)
"""


@pytest.fixture(scope="module")
def openvino_folder(tmp_path_factory):
    model, _, segments = traced("conv")
    folder = tmp_path_factory.mktemp("exported") / "openvino"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "onnx_segments", lambda *_: segments)
        export.export_segments(model, nobody(model), folder, SIZE, runtime="openvino")
    return folder


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGCHLD"), reason="a system without SIGCHLD")
@pytest.mark.parametrize("order", [("abAB",), ("a", "+bA", "B"), ("+a", "bA", "B")], ids=["main", "second", "first"])
def test_exports_may_be_left_in_any_order(order, openvino_folder):
    subprocess.run([sys.executable, "-c", PROGRAM, str(openvino_folder), *order], check=True, timeout=300)
