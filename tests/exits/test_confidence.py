import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import entropy

from exit_plugins import ExitTable
from exit_plugins.exits.calibration import calibration
from exit_plugins.exits.confidence import CONFIDENCES, confidence, fit_temperatures


def test_measures_equal_their_definitions():
    logits = torch.randn(40, 7) * 3
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    ranked = -np.sort(-p, axis=1)
    np.testing.assert_allclose(confidence(logits), ranked[:, 0], rtol=1e-5)
    np.testing.assert_allclose(confidence(logits, "margin"), ranked[:, 0] - ranked[:, 1], atol=1e-6)
    np.testing.assert_allclose(confidence(logits, "entropy"), 1 - entropy(p, axis=1) / math.log(7), atol=1e-5)
    np.testing.assert_allclose(confidence(logits, temperature=2.0), confidence(logits / 2), rtol=1e-6)


@pytest.mark.parametrize("measure", CONFIDENCES)
def test_certain_and_uniform_logits_are_the_ends(measure):
    certain = torch.tensor([[0.0, -math.inf, -math.inf]])
    assert confidence(certain, measure).item() == pytest.approx(1.0)
    low = {"max_softmax": 1 / 3, "entropy": 0.0, "margin": 0.0}[measure]
    assert confidence(torch.zeros(1, 3), measure).item() == pytest.approx(low, abs=1e-6)
    assert confidence(torch.full((1, 3), math.nan), measure).isnan().all()
    assert confidence(torch.tensor([[1e4, 0.0]], dtype=torch.float16), measure).item() == pytest.approx(1.0)


def test_single_class_is_certain_by_softmax_and_margin():
    assert confidence(torch.randn(3, 1)).tolist() == [1, 1, 1]
    assert confidence(torch.randn(3, 1), "margin").tolist() == [1, 1, 1]


def test_unknown_measure_and_impossible_temperature_are_refused():
    with pytest.raises(ValueError, match="unknown confidence 'luck'; choose one of max_softmax"):
        confidence(torch.zeros(1, 2), "luck")
    with pytest.raises(ValueError, match="temperature must be positive"):
        confidence(torch.zeros(1, 2), temperature=0.0)


def test_temperatures_minimise_the_likelihood_of_each_exit():
    generator = torch.Generator().manual_seed(0)
    honest = torch.randn(2000, 5, generator=generator) * 2
    target = torch.multinomial(honest.softmax(-1), 1, generator=generator)[:, 0]
    logits = [honest * 3, honest, honest / 2]
    found = fit_temperatures(logits, target)
    for z, temperature in zip(logits, found, strict=True):

        def nll(t, z=z):
            return torch.nn.functional.cross_entropy(z.double() / float(t[0]), target).item()

        assert temperature == pytest.approx(minimize(nll, [1.0], method="Nelder-Mead").x[0], rel=1e-3)
    assert found[0] == pytest.approx(3 * found[1], rel=1e-3)


def test_temperatures_are_not_fitted_on_nan_or_nothing():
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_temperatures(torch.full((1, 3, 2), math.nan), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="as many logits as targets, and some"):
        fit_temperatures(torch.zeros(1, 0, 2), torch.zeros(0, dtype=torch.int64))


def test_docs_name_modules_and_importing_gives_them():
    import exit_plugins.exits.confidence as module

    assert module.CONFIDENCES is CONFIDENCES and module.confidence is confidence


def test_fitting_on_a_table_without_logits_says_what_to_do():
    with pytest.raises(ValueError, match="collect the table with keep_logits=True"):
        fit_temperatures(None, torch.zeros(3))


@pytest.mark.parametrize("measure", CONFIDENCES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_confidences_lie_between_0_and_1_however_they_are_rounded(measure, dtype):
    for classes in range(2, 40):  # entropies of uniform answers come out a rounding above or below log C
        rows = torch.cat((torch.randn(20, classes) * 1e-4, torch.zeros(1, classes), torch.randn(20, classes) * 50))
        sure = confidence(rows.to(dtype), measure)
        assert sure.min() >= 0 and sure.max() <= 1
    table = ExitTable.from_logits(torch.zeros(2, 6, 7), torch.zeros(6), measure)
    assert len(calibration(table)) == 2
