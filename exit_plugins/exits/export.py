"""Deployment: one file per segment for ONNX Runtime or OpenVINO, or one ONNX file in which samples leave inside.

What is exported is the model's form for inference (its ``fuse()``, where it has one). Nothing is written that was not
first run beside the model itself in torch: every exit's logits, and adaptive runs in which nobody, some and everybody
leaves early, must agree within 1e-4. Needs the ``export`` extra.
"""

import copy
import functools
import hashlib
import os
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .adaptive import AdaptiveModel, ExitOutput, inference_copy
from .confidence import confidence
from .export_folder import FORMATS, POLICY, check_replaceable, read_manifest, write_manifest
from .export_folder import written_whole as _written_whole
from .files import atomic_path
from .policy import ExitPolicy
from .protocol import MultiExit, State, check_input_size, check_multi_exit
from .reading import reading

__all__ = [
    "ExportedAdaptiveModel",
    "ExportedSegments",
    "export_graph",
    "export_segments",
    "quantize_segments",
]

_TOLERANCE = 1e-4
_OPSET = 20


def export_segments(
    model: nn.Module,
    policy: ExitPolicy,
    folder: str | os.PathLike,
    input_size: Sequence[int],
    format: str = "onnx",
) -> "ExportedAdaptiveModel":
    """Write ``folder`` with one file per segment, the policy and a manifest; return it loaded and verified.

    Args:
        model: a multi-exit module in float32. It is copied, not changed.
        policy: thresholds for it; another policy can be given when the folder is loaded.
        folder: new, or an earlier export, which is replaced once the new one is verified: killed at any moment, one of
            the two stands there complete. Other files in it stay.
        input_size: (channels, height, width) of the images, (frames, channels, height, width) of clips; the batch
            stays free.
        format: ``onnx`` (run by ONNX Runtime) or ``openvino``.

    Raises:
        ImportError: the runtime is not installed.
        ValueError: the model is not float32, the folder holds something else, or a segment's computation depends on
            the number of samples.
        RuntimeError: the export does not give what torch gives; nothing is written then.
    """
    model = _prepared(model, policy)
    if format not in FORMATS:
        raise ValueError(f"unknown export format {format!r}; choose one of {', '.join(FORMATS)}.")
    folder = Path(folder)
    check_replaceable(folder)
    images = _images(model, input_size)
    with _written_whole(folder) as part:
        segments = []
        for index, onnx_model in enumerate(_onnx_segments(inference_copy(model), images)):
            name = f"segment_{index}.onnx"
            onnx_model.save(part / name)
            segments.append(name if format == "onnx" else _to_openvino(part / name))
        write_manifest(part, policy, segments, format, input_size, model)
        _verify(model, ExportedSegments(part), images)
    return ExportedAdaptiveModel(folder)


def export_graph(
    model: nn.Module, policy: ExitPolicy, path: str | os.PathLike, input_size: Sequence[int]
) -> Callable[[Tensor], ExitOutput]:
    """Write one ONNX file that runs the policy inside: nothing deeper runs for a sample that has left.

    Input ``images`` (batch, C, H, W) float32; outputs ``logits`` (batch, classes), ``exit_index`` (batch,) int64 and
    ``confidence`` (batch,). ``thresholds`` (exits,) is an optional input whose default is the policy's. After each exit
    the state of the samples that stay is gathered inside an ``If``, so that an empty remainder runs nothing. Exits
    beyond the policy's ``max_exit`` are not in the file.

    Returns a function from images to ExitOutput that runs the file. Arguments and errors as of ``export_segments``.
    """
    model = _prepared(model, policy)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file, for example {path / 'model.onnx'}.")
    images = _images(model, input_size)
    with atomic_path(path) as part:
        segments = [program.model_proto for program in _onnx_segments(inference_copy(model), images)]
        _require("onnx").save(_adaptive_graph(segments, policy), part)
        _verify_graph(model, policy, GraphRunner(part), images)
    return GraphRunner(path)


class ExportedSegments(MultiExit, nn.Module):
    """The segments of an export, run by ONNX Runtime or OpenVINO; a multi-exit model like the one exported.

    So everything that takes a model takes it: ``collect_exits`` for its accuracy, ``exit_latency`` for its times. Runs
    on the CPU, without gradients. The state is a tuple of the exported state's tensors.

    Args:
        folder: what ``export_segments`` or ``quantize_segments`` wrote.
        threads: CPU threads; default as many as torch uses.
        bfloat16: let OpenVINO compute in bfloat16 where the CPU does. By default it computes in float32, like torch.

    FileNotFoundError or ValueError for a folder that is missing or damaged; ImportError without the runtime.
    """

    def __init__(self, folder: str | os.PathLike, threads: int | None = None, bfloat16: bool = False) -> None:
        super().__init__()
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        described = self.manifest["model"]
        self.num_exits = described["num_exits"]
        self.num_classes = described.get("num_classes") or 0
        self.in_chans = described.get("in_chans")
        self.model_kwargs = described.get("model_kwargs")
        self.weights = described.get("weights")
        self.input_size = tuple(self.manifest["input_size"])
        self.sample_ndim = len(self.input_size)
        self.pretrained_cfg = {
            "architecture": described["architecture"],
            "input_size": self.input_size,
            **self.manifest["preprocessing"],
        }
        if bfloat16 and self.manifest["runtime"] != "openvino":
            raise ValueError("bfloat16 is a choice of OpenVINO; export with format='openvino' for it.")
        load = _onnx_session if self.manifest["runtime"] == "onnx" else _openvino_session
        with reading(self.folder, "export", "export again"):
            self._sessions = [load(self.folder / name, threads, bfloat16) for name in self.manifest["segments"]]
        self.eval()

    def train(self, mode: bool = True) -> "ExportedSegments":
        if mode:
            raise RuntimeError("an exported model only runs inference; train the model it was exported from.")
        return super().train(False)

    def begin_exits(self, x: Tensor) -> tuple[Tensor, ...]:
        if tuple(x.shape[1:]) != self.input_size:
            raise ValueError(
                f"this export takes images of shape (batch, {', '.join(map(str, self.input_size))}), got "
                f"{tuple(x.shape)}; export again for another size."
            )
        return (x.float(),)

    def forward_exit(self, index: int, state: State) -> tuple[Tensor, State]:
        logits, *state = self._sessions[index]([leaf.detach().cpu().contiguous().numpy() for leaf in state])
        return torch.from_numpy(logits), tuple(torch.from_numpy(leaf) for leaf in state)


class ExportedAdaptiveModel(AdaptiveModel):
    """AdaptiveModel over an export: ``forward(images) -> ExitOutput``, policy and all.

    Args:
        folder: what ``export_segments`` or ``quantize_segments`` wrote.
        policy: default the one exported.
        threads, bfloat16: see ``ExportedSegments``.

    Threads may share it and swap its policy meanwhile: every call runs under one policy from beginning to end. With
    OpenVINO they take turns at each segment; load the folder once for every thread to run in parallel.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        policy: ExitPolicy | None = None,
        threads: int | None = None,
        bfloat16: bool = False,
    ) -> None:
        segments = ExportedSegments(folder, threads, bfloat16)
        super().__init__(segments, policy or ExitPolicy.load(Path(folder) / POLICY))

    def forward(self, images: Tensor) -> ExitOutput:
        # torch only takes confidences and gathers here. A second thread gains nothing for that, and spins on afterwards
        # on a core that the runtime needs for the next segment: 9 % of a run at batch 8 on two cores. Unlike
        # torch.set_num_threads, the limit holds for this thread alone.
        torch.get_num_threads()  # a thread's first question to torch sets its number, and would undo the limit
        with _openmp().limit(limits=1):
            return super().forward(images)


class GraphRunner:
    """Runs a file of ``export_graph`` with ONNX Runtime: images (B, C, H, W) to ExitOutput.

    ``thresholds`` (exits,) replaces those in the file for one call. ``threads`` as of ``ExportedSegments``.
    """

    def __init__(self, path: str | os.PathLike, threads: int | None = None) -> None:
        with reading(path, "exported graph", "export it again", "write one with export_graph"):
            self.session = _inference_session(Path(path), threads)

    def __call__(self, images: Tensor, thresholds: Sequence[float] | None = None) -> ExitOutput:
        feed = {"images": images.detach().cpu().float().contiguous().numpy()}
        if thresholds is not None:
            feed["thresholds"] = np.asarray(thresholds, dtype=np.float32)
        return ExitOutput(*map(torch.from_numpy, self.session.run(["logits", "exit_index", "confidence"], feed)))


def quantize_segments(
    folder: str | os.PathLike, destination: str | os.PathLike, batches: Iterable[Tensor], weights_only: bool = False
) -> dict[str, Any]:
    """Write an int8 version of an ONNX export, with ONNX Runtime's static quantisation of every segment.

    Args:
        folder: an export in format ``onnx``.
        destination: folder for the int8 export, loaded like any other.
        batches: images (B, C, H, W), preprocessed as for the model; a hundred or more that look like what will come.
            They set the ranges of the activations.
        weights_only: quantise weights and leave the ranges to be found at run time. Keeps more of the accuracy of
            transformers; convolutions stay in float32.

    Returns:
        What quantisation changed on ``batches``, also kept in the manifest: per exit the share of predictions that
        stayed (``agreement``) and the mean absolute change of the confidence (``confidence_change``). Accuracy is
        measured by ``collect_exits(ExportedSegments(destination), loader)`` or ``exit-plugins evaluate``; confidences
        move, so solve thresholds on that table again.
    """
    quantization = _require("onnxruntime.quantization", "onnxruntime")
    preprocess = _require("onnxruntime.quantization.shape_inference", "onnxruntime").quant_pre_process
    exported = ExportedSegments(folder)
    if exported.manifest["runtime"] != "onnx":
        raise ValueError(f"{folder} is an OpenVINO export; quantise an ONNX one.")
    batches = list(batches)
    if not batches:
        raise ValueError("quantisation needs images to find the ranges of the activations with.")
    destination = Path(destination)
    check_replaceable(destination)
    states = [exported.begin_exits(images) for images in batches]
    with _written_whole(destination) as part:
        names = []
        for index, name in enumerate(exported.manifest["segments"]):
            source = part / "optimised.onnx"
            preprocess(exported.folder / name, source, skip_symbolic_shape=True)
            if weights_only:
                quantization.quantize_dynamic(source, part / name, op_types_to_quantize=["MatMul", "Gemm"])
            else:
                quantization.quantize_static(
                    source,
                    part / name,
                    _Calibration(quantization, exported, index, states),
                    op_types_to_quantize=["Conv", "MatMul", "Gemm"],
                    per_channel=True,
                )
            source.unlink()
            names.append(name)
            states = [exported.forward_exit(index, state)[1] for state in states]
        policy = ExitPolicy.load(exported.folder / POLICY)
        # Its weights are no longer those of the model: they are known by what they were made from and how.
        weights = hashlib.sha256(b"".join((part / name).read_bytes() for name in names)).hexdigest()
        about = {"weights": weights, "precision": "int8"}
        write_manifest(part, policy, names, "onnx", exported.input_size, exported, **about)
        report = _change(exported, ExportedSegments(part), batches)
        write_manifest(part, policy, names, "onnx", exported.input_size, exported, quantisation=report, **about)
    return report


def _Calibration(quantization: ModuleType, exported: ExportedSegments, index: int, states: list[State]) -> Any:
    """A reader of ONNX Runtime's kind over the states that reach segment ``index``."""
    names = exported._sessions[index].inputs

    class Reader(quantization.CalibrationDataReader):
        def __init__(self) -> None:
            self.rewind()

        def get_next(self) -> dict[str, np.ndarray] | None:
            state = next(self.left, None)
            return state and {n: leaf.contiguous().numpy() for n, leaf in zip(names, state, strict=True)}

        def rewind(self) -> None:
            self.left = iter(states)

    return Reader()


def _change(before: ExportedSegments, after: ExportedSegments, batches: list[Tensor]) -> dict[str, list[float]]:
    same, moved = [], []
    for images in batches:
        pairs = list(zip(before.forward_exits(images), after.forward_exits(images), strict=True))
        same.append(torch.stack([(a.argmax(1) == b.argmax(1)).float() for a, b in pairs]))
        moved.append(torch.stack([(confidence(a) - confidence(b)).abs() for a, b in pairs]))
    return {
        "agreement": torch.cat(same, 1).mean(1).tolist(),
        "confidence_change": torch.cat(moved, 1).mean(1).tolist(),
    }


# From torch to ONNX


class _Segment(nn.Module):
    """One segment as a function from the leaves of its state to logits and the leaves of the next one."""

    def __init__(self, model: nn.Module, index: int, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.model, self.index, self.spec = model, index, spec

    def forward(self, *leaves: Tensor) -> tuple[Tensor, ...]:
        state = pytree.tree_unflatten(leaves, self.spec)
        if self.index == 0:
            state = self.model.begin_exits(state)
        logits, state = self.model.forward_exit(self.index, state)
        outputs = [logits]
        if self.index < self.model.num_exits - 1:
            outputs += pytree.tree_leaves(state)
        # What is handed on unchanged or twice must be a value of its own: one name in the file cannot stand for two.
        taken = [id(leaf) for leaf in leaves]
        for position, output in enumerate(outputs):
            if id(output) in taken:
                outputs[position] = output.clone()
            taken.append(id(output))
        return tuple(outputs)


@torch.no_grad()
def _onnx_segments(model: nn.Module, images: Tensor) -> Iterable[Any]:
    """Each segment as a torch.onnx program, with inputs leaf_0... and outputs logits, next_0... and a free batch."""
    _require("onnx")
    _require("onnxscript")
    state: State = images[:3]
    for index in range(model.num_exits):
        leaves, spec = pytree.tree_flatten(state)
        leaves = tuple(leaf.clone(memory_format=torch.contiguous_format) for leaf in leaves)
        segment = _Segment(model, index, spec).eval()
        dynamic = (tuple({0: torch.export.Dim("batch")} for _ in leaves),)
        # oneDNN's choice of kernels would bind the batch to a range; the exported graph has no such kernels.
        with _quietly(), torch.backends.mkldnn.flags(enabled=False):
            try:
                program = torch.export.export(segment, leaves, dynamic_shapes=dynamic)
            except Exception as error:
                raise ValueError(
                    f"segment {index} of {type(model).__name__} cannot be exported with a free batch size: "
                    f"{str(error).splitlines()[0]} (write x.shape[0] rather than len(x), and no branches on values)."
                ) from error
            outputs = segment(*leaves)
            yield torch.onnx.export(
                program,
                dynamo=True,
                opset_version=_OPSET,
                input_names=_leaf_names(len(leaves)),
                output_names=["logits", *(f"next_{i}" for i in range(len(outputs) - 1))],
                verbose=False,
                # onnxscript's rewriting got attention with random features wrong; the runtimes optimise themselves.
                optimize=False,
            )
        if index < model.num_exits - 1:
            state = model.begin_exits(state) if index == 0 else state
            _, state = model.forward_exit(index, state)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporters' remarks on their own progress."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _adaptive_graph(segments: list[Any], policy: ExitPolicy) -> Any:
    """One ONNX model from those of the segments: a chain of ``If`` nodes, each holding all that is deeper."""
    onnx = _require("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    float32, int64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64
    last = policy.last_exit
    opset = next(entry.version for entry in segments[0].opset_import if entry.domain == "")
    prefixed = [onnx.compose.add_prefix(segment, f"segment{i}/") for i, segment in enumerate(segments[: last + 1])]
    if any(segment.functions for segment in prefixed):
        prefixed = [onnx.inliner.inline_local_functions(segment) for segment in prefixed]

    def constant(name: str, value: Any, dtype: type = np.float32) -> Any:
        return numpy_helper.from_array(np.asarray(value, dtype=dtype), name)

    def chain(index: int, given: list[str]) -> tuple[list[Any], list[Any], list[str]]:
        """Nodes and constants that answer the samples whose state is in ``given``, and the names of the answers."""
        graph, p = prefixed[index].graph, f"exit{index}/"
        node = helper.make_node
        nodes = [node("Identity", [name], [value.name]) for name, value in zip(given, graph.input, strict=True)] + list(
            graph.node
        )
        constants = list(graph.initializer)
        logits, *state = [value.name for value in graph.output]
        sure, more = _confidence_nodes(helper, constant, p, logits, policy.measure, float(policy.temperatures[index]))
        nodes += sure
        constants += [*more, constant(p + "index", index, np.int64)]
        nodes += [
            node("Shape", [p + "confidence"], [p + "rows"]),
            node("Expand", [p + "index", p + "rows"], [p + "at"]),
        ]
        here = [logits, p + "at", p + "confidence"]
        if index == last:
            return nodes, constants, here
        constants += [constant(p + "k", index, np.int64), constant(p + "zero", 0, np.int64)]
        constants += [constant(p + "axis0", [0], np.int64), constant(p + "axis1", [1], np.int64)]
        nodes += [
            node("Gather", ["thresholds", p + "k"], [p + "threshold"], axis=0),
            # Not(>=), so that a confidence of NaN stays.
            node("GreaterOrEqual", [p + "confidence", p + "threshold"], [p + "leaves"]),
            node("Not", [p + "leaves"], [p + "stays"]),
            node("NonZero", [p + "stays"], [p + "found"]),
            node("Squeeze", [p + "found", p + "axis0"], [p + "keep"]),
            node("Unsqueeze", [p + "keep", p + "axis1"], [p + "into"]),
            node("Size", [p + "keep"], [p + "count"]),
            node("Greater", [p + "count", p + "zero"], [p + "any"]),
        ]
        names = ("logits", "exit_index", "confidence")
        kinds = (float32, int64, float32)
        shapes = [[None, None], [None], [None]]

        def branch(name: str, body: list[Any], body_constants: list[Any], results: list[str]) -> Any:
            outputs = [
                helper.make_tensor_value_info(result, kind, shape)
                for result, kind, shape in zip(results, kinds, shapes, strict=True)
            ]
            return helper.make_graph(body, p + name, [], outputs, body_constants)

        gathered = [f"{p}stay_{i}" for i in range(len(state))]
        body = [node("Gather", [leaf, p + "keep"], [out], axis=0) for leaf, out in zip(state, gathered, strict=True)]
        deeper, deeper_constants, answers = chain(index + 1, gathered)
        merged = [f"{p}merged_{name}" for name in names]
        body += deeper + [
            node("ScatterND", [mine, p + "into", theirs], [out])
            for mine, theirs, out in zip(here, answers, merged, strict=True)
        ]
        kept = [f"{p}kept_{name}" for name in names]
        results = [f"{p}result_{name}" for name in names]
        nodes.append(
            node(
                "If",
                [p + "any"],
                results,
                then_branch=branch("go_on", body, deeper_constants, merged),
                else_branch=branch(
                    "all_left", [node("Identity", [a], [b]) for a, b in zip(here, kept, strict=True)], [], kept
                ),
            )
        )
        return nodes, constants, results

    nodes, constants, results = chain(0, ["images"])
    outputs = ("logits", "exit_index", "confidence")
    nodes += [helper.make_node("Identity", [a], [b]) for a, b in zip(results, outputs, strict=True)]
    size = [dim.dim_value for dim in prefixed[0].graph.input[0].type.tensor_type.shape.dim][1:]
    classes = [dim.dim_value for dim in prefixed[0].graph.output[0].type.tensor_type.shape.dim][1]
    graph = helper.make_graph(
        nodes,
        "early_exits",
        [
            helper.make_tensor_value_info("images", float32, ["batch", *size]),
            helper.make_tensor_value_info("thresholds", float32, [len(segments)]),
        ],
        [
            helper.make_tensor_value_info("logits", float32, ["batch", classes]),
            helper.make_tensor_value_info("exit_index", int64, ["batch"]),
            helper.make_tensor_value_info("confidence", float32, ["batch"]),
        ],
        [constant("thresholds", policy.thresholds), *constants],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=segments[0].ir_version,
        producer_name="exit-plugins",
    )
    onnx.checker.check_model(model)
    return model


def _confidence_nodes(
    helper: Any, constant: Callable, p: str, logits: str, measure: str, temperature: float
) -> tuple[list[Any], list[Any]]:
    """``exits.confidence`` in ONNX: from ``logits`` to the value ``p + "confidence"``; NaN logits give NaN."""
    node = helper.make_node
    constants = [constant(p + "temperature", temperature), constant(p + "nan", np.nan)]
    constants.append(constant(p + "classes", [1], np.int64))
    nodes = [
        node("Div", [logits, p + "temperature"], [p + "scaled"]),
        node("Softmax", [p + "scaled"], [p + "p"], axis=1),
        node("ReduceSum", [p + "p", p + "classes"], [p + "total"], keepdims=0),
        node("IsNaN", [p + "total"], [p + "undefined"]),
    ]
    if measure == "entropy":
        constants += [constant(p + "zero_p", 0.0), constant(p + "one", 1.0)]
        nodes += [
            node("LogSoftmax", [p + "scaled"], [p + "log_p"], axis=1),
            node("Mul", [p + "p", p + "log_p"], [p + "p_log_p"]),
            node("Equal", [p + "p", p + "zero_p"], [p + "impossible"]),
            node("Where", [p + "impossible", p + "zero_p", p + "p_log_p"], [p + "terms"]),
            node("ReduceSum", [p + "terms", p + "classes"], [p + "minus_h"], keepdims=0),
            # log C from the shape of the logits; one class counts as two, as in exits.confidence.
            node("Shape", [logits], [p + "c_int"], start=1),
            node("Cast", [p + "c_int"], [p + "c"], to=1),
            node("Max", [p + "c", p + "two"], [p + "c2"]),
            node("Log", [p + "c2"], [p + "log_c"]),
            node("Div", [p + "minus_h", p + "log_c"], [p + "share"]),
            node("Add", [p + "share", p + "one"], [p + "value"]),
        ]
        constants.append(constant(p + "two", [2.0]))
    elif measure == "margin":
        constants.append(constant(p + "two", [2], np.int64))
        nodes += [
            node("TopK", [p + "p", p + "two"], [p + "top", p + "which"], axis=1),
            node("Split", [p + "top"], [p + "first", p + "second"], axis=1, num_outputs=2),
            node("Sub", [p + "first", p + "second"], [p + "column"]),
            node("Squeeze", [p + "column", p + "classes"], [p + "value"]),
        ]
    else:
        nodes.append(node("ReduceMax", [p + "p", p + "classes"], [p + "value"], keepdims=0))
    nodes.append(node("Where", [p + "undefined", p + "nan", p + "value"], [p + "confidence"]))
    return nodes, constants


def _to_openvino(path: Path) -> str:
    """Convert an ONNX file to OpenVINO's .xml and .bin beside it, in float32, and remove it; return the new name."""
    openvino = _require("openvino")
    openvino.save_model(openvino.convert_model(path), path.with_suffix(".xml"), compress_to_fp16=False)
    path.unlink()
    return path.with_suffix(".xml").name


def _leaf_names(count: int) -> list[str]:
    """Names of a segment's inputs in the files."""
    return [f"leaf_{index}" for index in range(count)]


# Runtimes


class _Session:
    """A loaded segment: leaves in, logits and leaves out, all numpy."""

    def __init__(self, inputs: list[str], run: Callable[[list[np.ndarray]], list[np.ndarray]]) -> None:
        self.inputs, self._run = inputs, run

    def __call__(self, leaves: list[np.ndarray]) -> list[np.ndarray]:
        return self._run(leaves)


def _inference_session(path: Path, threads: int | None) -> Any:
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or torch.get_num_threads()
    # Every session has threads of its own, which spin for a while after a run: on the cores of the next segment.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _onnx_session(path: Path, threads: int | None, bfloat16: bool) -> _Session:
    session = _inference_session(path, threads)
    names = _leaf_names(len(session.get_inputs()))
    return _Session(names, lambda leaves: session.run(None, dict(zip(names, leaves, strict=True))))


def _openvino_session(path: Path, threads: int | None, bfloat16: bool) -> _Session:
    openvino = _require("openvino")
    # Left to itself OpenVINO computes in bfloat16 where the CPU can, without a word.
    config: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": "bf16" if bfloat16 else "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads or torch.get_num_threads(),
    }
    core = openvino.Core()
    model = core.read_model(path)
    for_batches = core.compile_model(model, "CPU", config)
    # Single samples run in a network of fixed shape, which OpenVINO plans better.
    model.reshape({value: [1, *[d.get_length() for d in list(value.partial_shape)[1:]]] for value in model.inputs})
    for_one = core.compile_model(model, "CPU", config)
    turn = threading.Lock()  # a compiled network runs one request at a time
    # OpenVINO orders inputs and outputs as it likes, and joins outputs that are the same tensor: names tell.
    read = {name for value in model.inputs for name in value.names}
    written = {name for value in model.outputs for name in value.names}
    names = ["logits", *(f"next_{index}" for index in range(len(written)) if f"next_{index}" in written)]

    def run(leaves: list[np.ndarray]) -> list[np.ndarray]:
        compiled = for_one if len(leaves[0]) == 1 else for_batches
        given = zip(_leaf_names(len(leaves)), leaves, strict=True)
        with turn:
            results = compiled({name: leaf for name, leaf in given if name in read}, share_inputs=True)
            return [results[name] for name in names]

    return _Session(sorted(read), run)


@functools.cache
def _openmp() -> Any:
    """The OpenMP pools of the process, torch's among them."""
    return _require("threadpoolctl").ThreadpoolController().select(user_api="openmp")


def _require(name: str, package: str | None = None) -> ModuleType:
    try:
        return import_module(name)
    except ImportError as error:
        package = package or name
        raise ImportError(
            f"this needs {package}, which is not installed: pip install 'exit-plugins[export]'"
        ) from error


# The folder


def _prepared(model: nn.Module, policy: ExitPolicy) -> nn.Module:
    """A float32 copy on the CPU in evaluation mode."""
    check_multi_exit(model)
    policy.check_model(model)
    wrong = {p.dtype for p in model.parameters() if p.is_floating_point() and p.dtype != torch.float32}
    if wrong:
        raise ValueError(f"exports are verified in float32; the model has {wrong.pop()}: call model.float() first.")
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _images(model: nn.Module, input_size: Sequence[int]) -> Tensor:
    """Sixteen images to verify with: noise of differing contrast, so that confidences differ."""
    check_input_size(model, input_size)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(16, *input_size, generator=generator)
    images *= torch.linspace(0.2, 2.0, 16).view(-1, *[1] * len(input_size))
    with torch.no_grad():
        model.forward_exits(images[:2])  # an image the model refuses shall be refused in the model's words
    return images


# Verification


@torch.no_grad()
def _verify(model: nn.Module, exported: ExportedSegments, images: Tensor) -> None:
    """RuntimeError unless every exit, and adaptive runs of all kinds, agree with torch at several batch sizes."""
    for size in (1, 2, len(images)):
        expected = model.forward_exits(images[:size])
        for index, (mine, theirs) in enumerate(zip(exported.forward_exits(images[:size]), expected, strict=True)):
            _compare(f"exit {index} at batch {size}", mine, theirs)
    for name, policy in _trial_policies(model, images):
        for size in (1, len(images)):
            mine, theirs = AdaptiveModel(exported, policy)(images[:size]), AdaptiveModel(model, policy)(images[:size])
            _compare_outputs(f"{name} at batch {size}", mine, theirs)


@torch.no_grad()
def _verify_graph(model: nn.Module, policy: ExitPolicy, runner: GraphRunner, images: Tensor) -> None:
    for name, trial in _trial_policies(model, images, policy):
        for size in (1, 2, len(images)):
            theirs = AdaptiveModel(model, trial)(images[:size])
            _compare_outputs(f"{name} at batch {size}", runner(images[:size], trial.thresholds), theirs)


def _trial_policies(model: nn.Module, images: Tensor, policy: ExitPolicy | None = None) -> list[tuple[str, ExitPolicy]]:
    """Nobody, everybody and some leave early. Thresholds lie between confidences: a tie may fall either way."""
    policy = policy or ExitPolicy([0.0] * model.num_exits)
    rows = [
        confidence(logits, policy.measure, float(t)).sort().values
        for logits, t in zip(model.forward_exits(images), policy.temperatures, strict=True)
    ]
    # The widest gap in the middle half of the confidences.
    some = []
    for row in rows:
        quarter = len(row) // 4
        at = quarter + int((row[quarter + 1 : -quarter] - row[quarter : -quarter - 1]).argmax())
        some.append(float(row[at] + row[at + 1]) / 2)
    trials = {
        "everybody leaving at exit 0": [-np.inf] * len(rows),
        "nobody leaving early": [np.inf] * len(rows),
        "some leaving early": some,
        "everybody leaving at the last exit but one": [np.inf] * (len(rows) - 2) + [-np.inf] * 2,
    }
    return [
        (name, ExitPolicy(thresholds[: len(rows)], policy.measure, policy.temperatures, max_exit=policy.max_exit))
        for name, thresholds in trials.items()
    ]


def _compare_outputs(what: str, mine: ExitOutput, theirs: ExitOutput) -> None:
    if not torch.equal(mine.exit_index, theirs.exit_index):
        raise RuntimeError(f"the export lets samples leave elsewhere than torch does ({what}); it was not written.")
    _compare(what, mine.logits, theirs.logits)
    _compare(what, mine.confidence, theirs.confidence)


def _compare(what: str, mine: Tensor, theirs: Tensor) -> None:
    worst = float((mine - theirs).abs().max()) if mine.shape == theirs.shape else float("nan")
    # Logits of a large scale carry float32's relative error.
    if not worst <= _TOLERANCE * max(1.0, float(theirs.abs().max())):
        raise RuntimeError(
            f"the export differs from torch by {worst:.1e} ({what}), more than {_TOLERANCE:.0e}; it was not written."
        )
