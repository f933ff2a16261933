"""Questions to a model that was fitted to data with missing entries."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal

from pyro_em import ExactPosteriorEM, Fixed
from tests.fitting.test_missing_entries import MU, K, S, W, X, completed, marginal, mixture


def test_imputations_are_draws_given_what_is_seen() -> None:
    em = ExactPosteriorEM(mixture, missing="nan")
    x = X[:6]
    draws = em.predictive(x, num_samples=500, seed=0, keep_observed=True)["x"]
    seen = ~x.isnan()
    assert torch.equal(draws[:, seen], x[seen].expand(len(draws), -1))
    assert bool(torch.isfinite(draws).all())
    for i, row in enumerate(x.numpy()):
        log_p = [np.log(float(W[k])) + marginal(row, MU[k].numpy(), S[k].numpy()) for k in range(K)]
        q = np.exp(log_p - np.logaddexp.reduce(log_p))
        if np.isnan(row).all():
            continue
        mean = sum(q[k] * completed(row, MU[k].numpy(), S[k].numpy())[0] for k in range(K))
        error = draws[:, i].std(0).numpy() / np.sqrt(len(draws))
        assert (abs(draws[:, i].mean(0).numpy() - mean) <= 5 * error + 1e-12).all()
    anew = em.predictive(x, num_samples=3, seed=0)["x"]
    assert bool(torch.isfinite(anew).all()) and not torch.equal(anew[0][seen], x[seen])


def test_imputations_of_elements_of_their_own() -> None:
    def model(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Poisson(3.0 * torch.ones(2)).to_event(1), obs=x)

    x = torch.tensor([[1.0, torch.nan], [torch.nan, 4.0]])
    em = ExactPosteriorEM(model, missing="nan")
    draws = em.predictive(x, num_samples=400, keep_observed=True, seed=1)["x"]
    assert bool((draws[:, 0, 0] == 1).all()) and bool((draws[:, 1, 1] == 4).all())
    assert float(draws[:, 0, 1].mean()) == pytest.approx(3.0, abs=0.4)


@pytest.mark.parametrize("kind", ["MultivariateNormal", "Normal"])
def test_imputations_by_a_mixture_distribution(kind: str) -> None:
    """The component is drawn given what is seen: it is certain here, and so is the rest."""
    mu = torch.tensor([[-50.0, -5.0], [50.0, 5.0]])

    def model(x):
        parts = dist.MultivariateNormal(mu, torch.eye(2))
        parts = dist.Normal(mu, 1.0).to_event(1) if kind == "Normal" else parts
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(W), parts), obs=x)

    nan = torch.nan
    x = torch.tensor([[-49.0, nan], [51.0, nan], [nan, 4.5], [nan, nan], [50.0, 5.0]])
    em = ExactPosteriorEM(model, missing="nan")
    draws = em.predictive(x, num_samples=200, keep_observed=True, seed=0)["x"]
    assert torch.equal(draws[:, ~x.isnan()], x[~x.isnan()].expand(200, -1))
    assert float(draws[:, 0, 1].mean()) == pytest.approx(-5.0, abs=0.4)
    assert float(draws[:, 1, 1].mean()) == pytest.approx(5.0, abs=0.4)
    assert float(draws[:, 2, 0].mean()) == pytest.approx(50.0, abs=0.4)
    assert float((draws[:, 3, 0] < 0).double().mean()) == pytest.approx(float(W[0]), abs=0.12)


def test_standard_errors_are_of_the_observed_information() -> None:
    """With Σ known the information of μ is Σ_n Σ_oo⁻¹, over what each row has seen."""

    def model(x):
        mu = pyro.param("mu", torch.zeros(3))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, S[0]), obs=x)

    result = ExactPosteriorEM(model, missing="nan").fit(X, tol=1e-12)
    information = torch.zeros(3, 3)
    for row in X:
        o = ~row.isnan()
        part = torch.zeros(3, 3)
        part[o.nonzero(), o.nonzero().T] = torch.linalg.inv(S[0][o][:, o])
        information += part
    expected = torch.linalg.inv(information).diagonal().sqrt()
    torch.testing.assert_close(
        torch.as_tensor(result.standard_errors()["mu"]), expected, rtol=1e-6, atol=0
    )


def test_files_pickles_and_other_data(tmp_path: Path) -> None:
    em = ExactPosteriorEM(mixture, missing="nan")
    result = em.fit(X, max_steps=3)
    score = em.score(X)
    assert em.model is mixture
    assert pickle.loads(pickle.dumps(em)).score(X) == pytest.approx(score)
    assert pickle.loads(pickle.dumps(result)).plan.missing == tuple(result.plan.missing)
    assert em.score(X.flip(0)) == pytest.approx(score)
    assert em.score(X[:7]) + em.score(X[7:]) == pytest.approx(score)
    complete = X[~X.isnan().any(1)]
    assert em.score(complete) == pytest.approx(ExactPosteriorEM(mixture).score(complete))
    em.save(tmp_path / "file.pt")
    pyro.clear_param_store()
    other = ExactPosteriorEM(mixture, missing="nan")
    other.load(tmp_path / "file.pt", X)
    assert other.score(X) == pytest.approx(score)


@pytest.mark.slow
def test_a_drawn_bound_takes_the_marginal_of_what_is_seen() -> None:
    """A guide at one point: its bound is the log joint there, and the entropy of the guide."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 10.0).to_event(1))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, S[0]), obs=x)

    def guide(x):
        pyro.sample("mu", dist.Normal(MU[0], 1e-9).to_event(1))

    em = ExactPosteriorEM(model, guide, missing="nan", strategy="guide")
    prior = dist.Normal(torch.zeros(3), 10.0).log_prob(MU[0]).sum()
    entropy = dist.Normal(MU[0], 1e-9).entropy().sum()
    seen = sum(marginal(r, MU[0].numpy(), S[0].numpy()) for r in X.numpy())
    bound = float(em.elbo(X, num_particles=50))
    assert bound == pytest.approx(float(prior + entropy) + seen, abs=0.6)
    fitted = ExactPosteriorEM(model, AutoNormal, missing="nan", strategy="guide")
    assert np.isfinite(fitted.fit(X, max_steps=3, seed=0).elbo)


def test_point_estimates() -> None:
    """The mode of a mean with a Normal prior, by Newton's method in one step."""

    def model(x):
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        s = pyro.param("s", S[0].clone())
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, s), obs=x)

    em = ExactPosteriorEM(model, "map", missing="nan", updates={"s": Fixed()})
    result = em.fit(X, tol=1e-14, max_steps=2000)
    precision, weighted = torch.eye(3), torch.zeros(3)
    for row in X:
        o = (~row.isnan()).nonzero().squeeze(-1)
        own = torch.linalg.inv(S[0][o][:, o])
        precision[o[:, None], o] += own
        weighted[o] += own @ row[o]
    torch.testing.assert_close(
        result.params["mu"], torch.linalg.solve(precision, weighted), rtol=1e-5, atol=1e-6
    )
