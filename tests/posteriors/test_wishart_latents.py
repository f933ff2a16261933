"""Latent precision matrices under a Wishart, against scipy's multivariate t and an EM in numpy."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.special
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, ModelError

pytestmark = pytest.mark.filterwarnings("ignore:Singular sample detected")


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, dtype=np.float64))


V = tensor([[1.0, 0.3], [0.3, 0.5]])
M = tensor([0.2, -0.1])
X = tensor([[0.5, -1.2], [1.4, 0.3], [-0.6, 0.8], [0.1, 2.2], [-1.5, 0.4]])
GROUP = torch.tensor([0, 1, 1, 0, 2])


def multivariate_t(x: Any, df: float, scale: Any, factor: float = 1.0) -> float:
    """Rows that share one precision matrix, one after the other: each given those before it."""
    inverse, size, total = np.linalg.inv(scale), scale.shape[-1], 0.0
    for row in np.asarray(x):
        free = df - size + 1
        total += st.multivariate_t.logpdf(row, M.numpy(), inverse / (factor * free), free)
        d = row - M.numpy()
        inverse, df = inverse + factor * np.outer(d, d), df + 1
    return total


def shared() -> None:
    precision = pyro.sample("L", dist.Wishart(tensor(4.0), covariance_matrix=V))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.MultivariateNormal(M, precision_matrix=precision), obs=X)


def per_row() -> None:
    with pyro.plate("rows", 5), pyro.poutine.scale(scale=2.0):
        root = torch.linalg.cholesky(V)
        precision = pyro.sample("L", dist.Wishart(tensor(4.0), scale_tril=root))
        pyro.sample("x", dist.MultivariateNormal(M, precision_matrix=3 * precision), obs=X)


def estimated_factor() -> None:
    b = pyro.param("b", tensor(3.0), constraint=constraints.positive)
    precision = pyro.sample("L", dist.Wishart(tensor(4.0), covariance_matrix=V))
    with pyro.plate("rows", 5):
        pyro.sample("x", dist.MultivariateNormal(M, precision_matrix=b * precision), obs=X)


def by_index() -> None:
    with pyro.plate("groups", 3):
        precision = pyro.sample("L", dist.Wishart(tensor(4.0), precision_matrix=V.inverse()))
    with pyro.plate("rows", 5), pyro.poutine.mask(mask=torch.arange(5) != 2):
        pyro.sample("x", dist.MultivariateNormal(M, precision_matrix=precision[GROUP]), obs=X)


DFS, SCALES = tensor([3.0, 6.0]), torch.stack([V, torch.eye(2, dtype=torch.float64)])


def mixture() -> None:
    with pyro.plate("rows", 5):
        z = pyro.sample("z", dist.Bernoulli(tensor(0.6))).long()
        precision = pyro.sample("L", dist.Wishart(DFS[z], covariance_matrix=SCALES[z]))
        pyro.sample("x", dist.MultivariateNormal(M, precision_matrix=precision), obs=X)


def _of_mixture() -> float:
    each = [
        [multivariate_t(x[None], float(n), s.numpy()) for n, s in zip(DFS, SCALES, strict=True)]
        for x in X
    ]
    return float(scipy.special.logsumexp(each, axis=1, b=[[0.4, 0.6]]).sum())


@pytest.mark.parametrize(
    ("model", "evidence"),
    [
        (shared, lambda: multivariate_t(X, 4.0, V.numpy())),
        (per_row, lambda: 2 * sum(multivariate_t(x[None], 4.0, V.numpy(), 3.0) for x in X)),
        (estimated_factor, lambda: multivariate_t(X, 4.0, V.numpy(), 3.0)),
        (
            by_index,
            lambda: sum(multivariate_t(X[i], 4.0, V.numpy()) for i in ([0, 3], [1], [4])),
        ),
        (mixture, _of_mixture),
    ],
    ids=["shared", "per row", "estimated factor", "by index", "mixture"],
)
def test_evidence_is_that_of_the_multivariate_t(
    model: Callable[[], None], evidence: Callable[[], float]
) -> None:
    q = ExactPosteriorEM(model).posterior()
    assert q.log_evidence == pytest.approx(evidence(), abs=1e-10)


def test_the_posterior_is_a_wishart_that_draws_and_answers() -> None:
    em = ExactPosteriorEM(shared)
    q = em.posterior()
    inverse = V.inverse() + (X - M).T @ (X - M)
    exact = dist.Wishart(tensor(9.0), covariance_matrix=inverse.inverse())
    own = q.marginal("L")
    assert type(own) is dist.Wishart
    assert torch.allclose(own.covariance_matrix, exact.covariance_matrix)
    assert torch.allclose(q.mean("L"), exact.mean)
    covariance = q.covariance("L")
    assert torch.allclose(covariance.diagonal().reshape(2, 2), exact.variance)
    draws = q.sample(10_000, seed=0)["L"]
    assert torch.allclose(draws.mean(0), exact.mean, atol=0.03)
    assert torch.allclose(torch.cov(draws.flatten(1).T), covariance, atol=0.03)
    assert em.elbo(q={"L": exact}).gap == pytest.approx(0.0, abs=1e-10)
    other = dist.Wishart(tensor(7.0), covariance_matrix=V)
    kl = float(torch.distributions.kl_divergence(other, exact).detach())
    assert em.elbo(q={"L": other}).gap == pytest.approx(kl, abs=1e-10)


def hierarchical(x: Tensor, group: Tensor) -> None:
    df = pyro.param("df", tensor(4.0), constraint=constraints.greater_than(1.0))
    scale = pyro.param("V", torch.eye(2).double(), constraint=constraints.positive_definite)
    loc = pyro.param("m", torch.zeros(2).double())
    with pyro.plate("groups", 10):
        precision = pyro.sample("L", dist.Wishart(df, covariance_matrix=scale))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.MultivariateNormal(loc, precision_matrix=precision[group]), obs=x)


def test_hyperparameters_and_a_mean_take_the_steps_of_em() -> None:
    rng = np.random.default_rng(0)
    roots = rng.normal(size=(10, 2, 3)) * [[[1.0], [0.5]]]
    group = np.arange(10).repeat(4)
    noise = np.linalg.solve(np.linalg.cholesky(roots @ roots.transpose(0, 2, 1)), np.eye(2))
    x = (noise[group].transpose(0, 2, 1) @ rng.normal(size=(40, 2, 1)))[..., 0] + [0.5, -1.0]
    result = ExactPosteriorEM(hierarchical).fit(
        tensor(x), torch.as_tensor(group), tol=0.0, max_steps=3
    )
    df, scale, m, path = 4.0, np.eye(2), np.zeros(2), []
    for _ in range(3):
        inverse = np.linalg.inv(scale)
        d = (x - m).reshape(10, 4, 2)
        after = inverse + d.transpose(0, 2, 1) @ d
        evidence = -40 * math.log(math.pi) + 5 * df * np.linalg.slogdet(inverse)[1]
        evidence -= (df + 4) / 2 * np.linalg.slogdet(after)[1].sum()
        evidence += 10 * _log_gamma(df + 4) - 10 * _log_gamma(df)
        path.append(evidence)
        mean = (df + 4) * np.linalg.inv(after)
        log_det = _digamma(df + 4) + 2 * math.log(2) - np.linalg.slogdet(after)[1]
        m = np.linalg.solve(4 * mean.sum(0), (mean @ x.reshape(10, 4, 2).sum(1)[..., None]).sum(0))[
            :, 0
        ]
        # Both at their joint maximum: V = E[L] / ν at the ν of the profile.
        rest = 2 * math.log(2) + np.linalg.slogdet(mean.mean(0))[1] - log_det.mean()
        df = scipy.optimize.brentq(
            lambda n, rest=rest: _digamma(n) - 2 * math.log(n) + rest, 1.01, 1e3, xtol=1e-13
        )
        scale = mean.mean(0) / df
    assert list(result.history)[:3] == pytest.approx(path, abs=1e-9)
    assert np.allclose(result.params["m"].numpy(), m, atol=1e-10)
    assert np.allclose(result.params["V"].numpy(), scale, atol=1e-10)
    assert float(result.params["df"]) == pytest.approx(df, abs=1e-9)


def _log_gamma(df: float) -> float:
    return float(scipy.special.multigammaln(df / 2, 2))


def _digamma(df: float) -> float:
    return float(scipy.special.digamma(df / 2) + scipy.special.digamma((df - 1) / 2))


@pytest.mark.parametrize(
    "argument",
    [
        lambda a: {"covariance_matrix": a},
        lambda a: {"precision_matrix": a + V},
        lambda a: {"precision_matrix": a * (1 + torch.eye(2).double())},
        lambda a: {"precision_matrix": a.flip(-1).flip(-2)},
        lambda a: {"precision_matrix": torch.linalg.inv(a)},
    ],
    ids=["covariance", "sum", "factors", "order", "inverse"],
)
def test_what_is_no_multiple_of_the_latent_is_refused(argument: Callable[[Tensor], Any]) -> None:
    def model() -> None:
        precision = pyro.sample("L", dist.Wishart(tensor(4.0), covariance_matrix=V))
        with pyro.plate("rows", 5):
            pyro.sample("x", dist.MultivariateNormal(M, **argument(precision)), obs=X)

    with pytest.raises(ModelError, match=r"MultivariateNormal.*'L'"):
        ExactPosteriorEM(model).posterior()
