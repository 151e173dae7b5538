"""One ONNX file out of those of the segments, in which samples leave inside."""

from collections.abc import Callable
from typing import Any

import numpy as np

from ..policy import ExitPolicy
from .runtimes import require

__all__ = ["adaptive_graph"]


def adaptive_graph(segments: list[Any], policy: ExitPolicy) -> Any:
    """One ONNX model from those of the segments: a chain of ``If`` nodes, each holding all that is deeper."""
    onnx = require("onnx")
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
    helper: Any, constant: Callable[..., Any], p: str, logits: str, measure: str, temperature: float
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
            node("Add", [p + "share", p + "one"], [p + "unbounded"]),
            node("Clip", [p + "unbounded", p + "zero_p", p + "one"], [p + "value"]),
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
