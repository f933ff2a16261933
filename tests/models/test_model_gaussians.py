"""Models of Gaussian latents in ``models/``, against numbers that are not ours."""

from __future__ import annotations

from types import ModuleType

import pyro
import pytest
import torch
from sklearn.datasets import load_iris
from sklearn.decomposition import FactorAnalysis
from sklearn.linear_model import BayesianRidge

from models import bayesian_regression, factor_analysis, random_effects
from tests.mains import run_main


@pytest.fixture(autouse=True)
def new_store():
    pyro.clear_param_store()


def test_the_sleep_study_is_fitted_as_published() -> None:
    """Bates, Mächler, Bolker and Walker (2015), by maximum likelihood: lmer(..., REML = FALSE)."""
    result = random_effects.fit(*random_effects.load_data())
    assert result.log_evidence == pytest.approx(-875.969672232, abs=1e-8)
    beta, L, sigma = (result.params[n] for n in ("beta", "L", "sigma"))
    assert beta.tolist() == pytest.approx([251.405104848, 10.467285960], abs=1e-5)
    covariance = (L @ L.T)[[0, 0, 1], [0, 1, 1]]
    assert covariance.tolist() == pytest.approx([565.5154, 11.0554, 32.6822], rel=1e-4)
    assert float(sigma) ** 2 == pytest.approx(654.94103, rel=1e-5)
    errors = result.standard_errors()["beta"]
    assert errors.tolist() == pytest.approx([6.632, 1.502], abs=1e-3)
    assert (result.num_free_parameters, result.num_rows) == (6, 180)
    assert (result.aic, result.bic) == pytest.approx((1763.939, 1783.097), abs=1e-3)


@pytest.mark.parametrize(
    ("q", "noise", "evidence"), [(1, 0.114139079557, -470.669458), (2, 0.050682147865, -404.962780)]
)
def test_one_noise_gives_principal_components(q: int, noise: float, evidence: float) -> None:
    """The flowers of iris: Tipping and Bishop's closed form."""
    x = torch.tensor(load_iris().data)
    assert factor_analysis.principal_components(x, q) == pytest.approx((noise, evidence), rel=1e-9)
    result = factor_analysis.fit(x, q, one_noise=True, tol=1e-8)
    assert result.log_evidence == pytest.approx(evidence, abs=1e-6)
    assert float(result.params["psi"]) ** 2 == pytest.approx(noise, rel=1e-4)
    variances, axes = torch.linalg.eigh(torch.cov(x.T, correction=0))
    W = result.params["W"]
    expected = axes[:, -q:] * (variances[-q:] - noise) @ axes[:, -q:].T
    torch.testing.assert_close(W @ W.T, expected, rtol=1e-3, atol=1e-3)


def test_factor_analysis_has_the_maximum_of_scikit_learn() -> None:
    x, _, _ = factor_analysis.load_data()
    theirs = FactorAnalysis(2, tol=1e-10, max_iter=5000, svd_method="lapack").fit(x.numpy())
    result = factor_analysis.fit(x, 2)
    assert result.log_evidence == pytest.approx(theirs.score(x.numpy()) * len(x), abs=1e-4)
    W = result.params["W"]
    covariance = W @ W.T + torch.diag(result.params["psi"] ** 2)
    torch.testing.assert_close(
        covariance, torch.tensor(theirs.get_covariance()), rtol=0.0, atol=1e-3
    )


def test_hyperparameters_are_those_of_bayesian_ridge() -> None:
    X, y, _ = bayesian_regression.load_data()
    flat = dict.fromkeys(("alpha_1", "alpha_2", "lambda_1", "lambda_2"), 0.0)
    ridge = BayesianRidge(max_iter=5000, tol=1e-14, fit_intercept=False, compute_score=True, **flat)
    ridge.fit(X.numpy(), y.numpy())
    result = bayesian_regression.fit(X, y)
    assert result.log_evidence == pytest.approx(ridge.scores_[-1], abs=1e-8)
    assert float(result.params["sigma"]) == pytest.approx(ridge.alpha_**-0.5, rel=1e-6)
    assert float(result.params["tau"]) == pytest.approx(ridge.lambda_**-0.5, rel=1e-6)
    mean = result.posterior.mean("w")
    assert mean.tolist() == pytest.approx(ridge.coef_.tolist(), abs=1e-6)
    covariance = torch.tensor(ridge.sigma_)
    torch.testing.assert_close(result.posterior.covariance("w"), covariance, rtol=1e-5, atol=1e-9)
    gamma = bayesian_regression.determined(result)
    assert float(result.params["tau"]) ** 2 == pytest.approx(float(mean @ mean) / gamma, rel=1e-5)


@pytest.mark.parametrize(
    ("module", "options", "expected"),
    [
        (random_effects, [], "their correlation 0.081"),
        (factor_analysis, ["--factors", "2"], "(p = 39) and"),
        (bayesian_regression, [], "The data determine γ = 8.5793 of 10 weights."),
    ],
)
def test_main_runs(module: ModuleType, options, expected, tmp_path, monkeypatch, capsys) -> None:
    assert expected in run_main(module, monkeypatch, capsys, tmp_path, *options)
