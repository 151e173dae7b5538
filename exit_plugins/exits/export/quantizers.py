"""One segment in int8, with ranges from the states that reach it: by ONNX Runtime, and by NNCF for OpenVINO."""

import io
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, TypeAlias

from numpy.typing import NDArray

from .openvino_runtime import keep_signal_stack, openvino_core
from .runtimes import leaf_names, require

__all__ = ["QUANTIZERS", "Feeds", "feeds_of"]

Feeds: TypeAlias = "list[dict[str, NDArray[Any]]]"  # what a segment reads, by the names in its file

_ATTENTION = {
    "Softmax",
    "ScaledDotProductAttention",
}  # operations of OpenVINO; a classifier's own softmax is not exported


def feeds_of(states: list[list[NDArray[Any]]], read: list[str]) -> Feeds:
    """Batches of states, leaves (B, ...), under the names of those that a segment ``read``s."""
    return [
        {name: leaf for name, leaf in zip(leaf_names(len(state)), state, strict=True) if name in read}
        for state in states
    ]


def quantize_onnx(source: Path, target: Path, feeds: Feeds, weights_only: bool) -> None:
    """The ONNX file ``source`` as int8 at ``target``: weights per channel, activations in uint8."""
    quantization = require("onnxruntime.quantization", "onnxruntime")
    preprocess = require("onnxruntime.quantization.shape_inference", "onnxruntime").quant_pre_process
    optimised = target.with_name("optimised.onnx")
    preprocess(source, optimised, skip_symbolic_shape=True)
    if weights_only:
        quantization.quantize_dynamic(optimised, target, op_types_to_quantize=["MatMul", "Gemm"])
    else:

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc, name-defined]  # the runtime is optional
            def __init__(self) -> None:
                self.rewind()

            def get_next(self) -> dict[str, NDArray[Any]] | None:
                return next(self.left, None)

            def rewind(self) -> None:
                self.left = iter(feeds)

        kinds = ["Conv", "MatMul", "Gemm"]
        quantization.quantize_static(optimised, target, Reader(), op_types_to_quantize=kinds, per_channel=True)
    optimised.unlink()


def quantize_openvino(source: Path, target: Path, feeds: Feeds, weights_only: bool) -> None:
    """OpenVINO's network ``source`` (.xml) as int8 at ``target``; asymmetric activations where there is attention."""
    if weights_only:
        raise ValueError("weights alone are quantised for ONNX Runtime; leave out weights_only for OpenVINO.")
    nncf, openvino = require("nncf"), require("openvino")
    model = openvino_core().read_model(source)
    # The extremes over all images, as ONNX Runtime takes them. NNCF's default, the mean of every image's extremes, cuts
    # half of them off: an MSDNet's exits lost 1.0 points of accuracy on CIFAR-100 in the mean, and 0.6 like this
    # (asymmetric; so are the figures on biases below).
    extremes = require("nncf.quantization.range_estimator", "nncf").RangeEstimatorParametersSet.MINMAX
    attention = any(operation.get_type_name() in _ATTENTION for operation in model.get_ops())
    with _quietly("nncf"), keep_signal_stack():  # NNCF has cores of its own, which come and go
        quantised = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            # Symmetric elsewhere, which is faster: docs/benchmarks.md, What did not work.
            preset=nncf.QuantizationPreset.MIXED if attention else nncf.QuantizationPreset.PERFORMANCE,
            subset_size=len(feeds),
            # Biases corrected layer after layer, each behind those that are: of the 0.6 points the fast way lost at the
            # last exit, none was lost so (3,000 images), in a third more time.
            fast_bias_correction=False,
            model_type=nncf.ModelType.TRANSFORMER if attention else None,
            advanced_parameters=nncf.AdvancedQuantizationParameters(activations_range_estimator_params=extremes),
        )
    openvino.save_model(quantised, target, compress_to_fp16=False)


QUANTIZERS: dict[str, Callable[[Path, Path, Feeds, bool], None]] = {
    "onnx": quantize_onnx,
    "openvino": quantize_openvino,
}


@contextmanager
def _quietly(name: str) -> Iterator[None]:
    """Without the bars and remarks that a library prints on stdout, which is the caller's."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
