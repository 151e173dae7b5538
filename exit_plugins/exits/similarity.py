"""How alike the representations of exits, and of labels, are."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["cka", "cka_matrix"]


def cka(x: NDArray[Any] | Tensor, y: NDArray[Any] | Tensor) -> float:
    """Linear centred kernel alignment of two representations of the same samples (Kornblith et al. 2019, eq. 5).

    Args:
        x: (N, ...) and
        y: (N, ...), any number of features each; class indices (N,) are taken one-hot.

    Returns:
        A number in [0, 1], 1 for representations equal up to rotation and scale; NaN if one of them is constant.
        Dyn-Adapter's Fig. 4 compares layers and labels so.

    Raises:
        ValueError: the two are not of as many samples.
    """
    x, y = _features(x), _features(y)
    if len(x) != len(y) or len(x) == 0:
        raise ValueError(f"cka compares two views of the same samples, got {len(x)} and {len(y)}.")
    if min(x.shape[1], y.shape[1]) > len(x):
        # Fewer samples than features: the same figures from the N x N products.
        gram_x, gram_y = x @ x.T, y @ y.T
        cross, own_x, own_y = (gram_x * gram_y).sum(), (gram_x**2).sum(), (gram_y**2).sum()
    else:
        cross, own_x, own_y = ((x.T @ y) ** 2).sum(), ((x.T @ x) ** 2).sum(), ((y.T @ y) ** 2).sum()
    if own_x == 0 or own_y == 0:
        return float("nan")
    return float(cross / np.sqrt(own_x * own_y))


def cka_matrix(features: Sequence[NDArray[Any] | Tensor], target: NDArray[Any] | Tensor | None = None) -> NDArray[Any]:
    """`cka` (R, R) of every pair of representations; with ``target`` (N,) the labels are the last row and column."""
    views = [*features] if target is None else [*features, target]
    matrix = np.ones((len(views), len(views)))
    for i, first in enumerate(views):
        for j in range(i):
            matrix[i, j] = matrix[j, i] = cka(first, views[j])
    return matrix


def _features(values: NDArray[Any] | Tensor) -> NDArray[Any]:
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    array: NDArray[Any] = np.asarray(values)
    if array.ndim == 1 and array.dtype.kind in "iub":
        array = array[:, None] == np.unique(array)
    array = array.reshape(len(array), -1).astype(np.float64)
    return array - array.mean(0) if len(array) else array
