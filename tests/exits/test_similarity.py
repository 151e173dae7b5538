import numpy as np
import pytest
import torch

from exit_plugins.exits.similarity import cka, cka_matrix


def centred_alignment(x: np.ndarray, y: np.ndarray) -> float:
    """CKA from its definition by the Hilbert-Schmidt criterion with an explicit centring matrix."""
    n = len(x)
    centre = np.eye(n) - np.full((n, n), 1 / n)

    def hsic(a, b):
        return np.trace(a @ a.T @ centre @ b @ b.T @ centre)

    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


@pytest.mark.parametrize("width", [3, 60])  # fewer and more features than samples
def test_cka_equals_its_definition(width):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, width)), rng.normal(size=(40, 5))
    assert cka(x, y) == pytest.approx(centred_alignment(x, y))


def test_cka_ignores_rotation_scale_and_shift_and_takes_labels_one_hot():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(30, 4))
    rotation, _ = np.linalg.qr(rng.normal(size=(4, 4)))
    assert cka(x, torch.tensor(3 * x @ rotation + 7)) == pytest.approx(1.0)
    labels = rng.integers(3, size=30)
    assert cka(x, labels) == pytest.approx(centred_alignment(x, np.eye(3)[labels]))
    assert np.isnan(cka(np.ones((30, 2)), x))
    matrix = cka_matrix([x, x[:, :2]], labels)
    assert matrix.shape == (3, 3) and (matrix == matrix.T).all() and (np.diag(matrix) == 1).all()
    assert matrix[0, 1] == pytest.approx(cka(x, x[:, :2]))
