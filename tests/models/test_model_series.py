"""Models of series in ``models/``, against published numbers and dense joints in numpy."""

from __future__ import annotations

import itertools
import math
import re

import numpy as np
import pyro
import pytest
import torch
from torch.distributions import constraints

from models import ar, dynamic_factor, local_level, regimes
from pyro_em import ExactPosteriorEM
from tests.mains import run_main


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()


@pytest.fixture
def results(monkeypatch):
    """What a model's ``main`` fits; slow ones to a hundredth of a nat."""
    found = []
    for module in (ar, dynamic_factor, local_level, regimes):

        def kept(data, fit=module.fit, own=(0.01,) if module in (ar, regimes) else ()):
            found.append(fit(data, *own))
            return found[-1]

        monkeypatch.setattr(module, "fit", kept)
    return found


def log_normal(value: np.ndarray, mean: np.ndarray, covariance: np.ndarray) -> float:
    """The log density of the numbers that are seen."""
    seen = ~np.isnan(value)
    r, S = (value - mean)[seen], covariance[np.ix_(seen, seen)]
    whitened = np.linalg.solve(np.linalg.cholesky(S), r)
    return -0.5 * (whitened @ whitened + len(r) * math.log(2 * math.pi) + np.linalg.slogdet(S)[1])


def assert_is_a_maximum(objective, theta: np.ndarray, places) -> None:
    """Nothing around is higher, each number moved by itself."""
    here = objective(theta)
    for i, sign in itertools.product(places, (-1, 1)):
        moved = theta.copy()
        moved[i] += sign * 0.02 * max(abs(theta[i]), 0.2)
        assert objective(moved) < here, (i, sign)


def test_the_nile_has_its_published_maximum(results, monkeypatch, capsys, tmp_path) -> None:
    """statsmodels' smoother with the same prior; Durbin and Koopman report 1469.1 and 15099."""
    out = run_main(local_level, monkeypatch, capsys, tmp_path, "--years", "2")
    assert "level's steps 1468.5, of the flow about it 15099.7" in out
    (result,) = results
    assert result.log_evidence == pytest.approx(-641.585578346, abs=1e-7)
    assert float(result.params["noise"]) ** 2 == pytest.approx(15099.687, rel=1e-4)
    assert float(result.params["drift"]) ** 2 == pytest.approx(1468.501, rel=1e-3)
    # The smoothed level of the last year is what is predicted of all that follow.
    assert f"{float(result.posterior.mean('level_99')):.2f}" in out


def test_the_lynx_cycle_takes_ten_years(results, monkeypatch, capsys, tmp_path) -> None:
    out = run_main(ar, monkeypatch, capsys, tmp_path, "--years", "2")
    assert re.search(r"a cycle of (9.9|10.0)\d years", out)
    (result,) = results
    y = ar.load_data().numpy()

    def objective(theta: np.ndarray) -> float:
        first, second, c, sigma, rho = theta
        T = len(y)
        moves = np.eye(T)
        for t in range(2, T):
            moves[t, t - 1], moves[t, t - 2] = -first, -second
        back = np.linalg.inv(moves)
        start = np.arange(T) < 2
        mean = back @ np.where(start, 3.0, c)
        covariance = back @ np.diag(np.where(start, 1.0, sigma**2)) @ back.T
        return log_normal(y, mean, covariance + rho**2 * np.eye(T))

    theta = torch.cat([result.params[n].reshape(-1) for n in ("phi", "c", "sigma", "rho")]).numpy()
    assert result.log_evidence == pytest.approx(objective(theta), abs=1e-8)
    assert_is_a_maximum(objective, theta, range(3))


@pytest.mark.slow
def test_the_factor_of_shares_is_their_market(results, monkeypatch, capsys, tmp_path) -> None:
    out = run_main(dynamic_factor, monkeypatch, capsys, tmp_path, "--since", "2016")
    assert "correlation of the factor with the Nasdaq: 0.9" in out
    (result,) = results
    x, _, names, times = dynamic_factor.load_data(2016)
    assert x.isnan().any() and len(x) == len(times) and x.shape[1] == len(names) == 8
    T, D = x.shape

    def objective(theta: np.ndarray) -> float:
        phi, a, w, s = theta[0], theta[1 : 1 + D], theta[1 + D : 1 + 2 * D], theta[1 + 2 * D :]
        back = np.linalg.inv(np.eye(T) - phi * np.eye(T, k=-1))
        covariance = np.kron(back @ back.T, np.outer(w, w)) + np.kron(np.eye(T), np.diag(s**2))
        return log_normal(x.reshape(-1).numpy(), np.tile(a, T), covariance)

    theta = torch.cat([result.params[n].reshape(-1) for n in ("phi", "a", "w", "s")]).numpy()
    assert result.log_evidence == pytest.approx(objective(theta), abs=1e-7)
    assert_is_a_maximum(objective, theta, (0, 1, 1 + D, 1 + 2 * D))


def test_regimes_of_gnp_have_the_published_log_likelihood_and_dates(
    results, monkeypatch, capsys, tmp_path
) -> None:
    """Hamilton (1989): -181.263 at his estimates, and about the dates of the NBER."""
    growth = regimes.load_data()
    kinds = {"start": "simplex", "move": "simplex", "noise": "positive"}
    for name, value in regimes.PUBLISHED.items():
        constraint = getattr(constraints, kinds.get(name, "real"))
        pyro.param(name, growth.new_tensor(value), constraint=constraint)
    assert ExactPosteriorEM(regimes.model).score(growth) == pytest.approx(-181.2634, abs=1e-4)
    pyro.clear_param_store()
    out = run_main(regimes, monkeypatch, capsys, tmp_path)
    (result,) = results
    assert -181.28 < result.log_evidence < -181.252
    for dates in ("1953 III to 1954 II", "1960 II to 1960 IV", "1981 II to 1982 IV"):
        assert dates in out
