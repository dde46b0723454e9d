"""The Marchenko-Pastur bulk: its law by quadrature of its density, and what matrices made to measure give."""

import numpy as np
import pytest
from scipy.integrate import quad

from spectune.spectrum.bulk import fit_bulk


def values(W):
    return np.linalg.svd(W, compute_uv=False)


def noise(m, n, sigma=1.0, seed=0):
    return sigma * np.random.RandomState(seed).randn(m, n)


def quantile_values(shape, sigma, count):
    """Return the quantiles of the law, by integrating its density of squares and bisecting."""
    long, g = max(shape), min(shape) / max(shape)
    a, b = (1 - g**0.5) ** 2, (1 + g**0.5) ** 2

    def mass(x):
        return quad(lambda t: ((b - t) * (t - a)) ** 0.5 / (2 * np.pi * g * t), a, x, limit=200)[0]

    found = []
    for p in (np.arange(count) + 0.5) / count:
        low, high = a, b
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if mass(middle) < p else (low, middle)
        found.append(sigma * (long * low) ** 0.5)
    return np.array(found[::-1])


@pytest.mark.parametrize("shape", [(90, 30), (40, 50), (30, 30)])
def test_the_quantiles_of_the_law_are_fitted_exactly(shape):
    bulk = fit_bulk(quantile_values(shape, 0.3, min(shape)), shape)
    assert bulk.sigma == pytest.approx(0.3, rel=5e-3)
    assert bulk.outliers == 0
    assert bulk.distance == pytest.approx(0.5 / min(shape), rel=0.1)  # half a step: as near as steps can be


@pytest.mark.parametrize("shape", [(600, 200), (200, 600), (300, 300), (400, 390)])
def test_noise_has_its_sigma_and_no_outliers(shape):
    for seed in range(3):
        bulk = fit_bulk(values(noise(*shape, 0.02, seed)), shape)
        assert bulk.sigma == pytest.approx(0.02, rel=0.03)
        assert bulk.edge == pytest.approx(0.02 * (shape[0] ** 0.5 + shape[1] ** 0.5), rel=0.03)
        assert bulk.outliers == 0
        assert bulk.distance < 0.025


@pytest.mark.parametrize(("spikes", "shape"), [(1, (400, 150)), (12, (400, 150)), (30, (150, 300)), (60, (300, 300))])
def test_spikes_above_noise_are_counted_and_leave_sigma_alone(spikes, shape):
    U, V = (np.linalg.qr(noise(n, spikes, seed=5))[0] for n in shape)
    edge = 0.1 * (shape[0] ** 0.5 + shape[1] ** 0.5)
    W = noise(*shape, 0.1) + (U * np.linspace(2, 9, spikes) * edge) @ V.T
    bulk = fit_bulk(values(W), shape)
    assert bulk.outliers == spikes
    assert bulk.sigma == pytest.approx(0.1, rel=0.03)


def test_scale_and_side_do_not_matter():
    W = noise(120, 80) + np.outer(noise(120, 1, seed=1), noise(80, 1, seed=2))
    a, b = fit_bulk(values(W), (120, 80)), fit_bulk(values(1e-3 * W.T), (80, 120))
    assert (a.outliers, a.distance) == (b.outliers, pytest.approx(b.distance))
    assert a.sigma == pytest.approx(1e3 * b.sigma)


@pytest.mark.parametrize("S", [np.ones(5), np.zeros(50), np.array([3.0] * 10 + [0.0] * 40)])
def test_where_there_is_no_bulk_there_is_none(S):
    assert fit_bulk(S, (100, len(S))) is None
