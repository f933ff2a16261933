"""Point estimates under priors whose hyperparameters are free, and what BIC counts of them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import EMStatus, ExactPosteriorEM, Fixed

X = torch.tensor([3.0, 4.0, 1.0, 0.0, 7.0, 2.0], dtype=torch.float64)


def free(name: str, value: float = 1.5) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=C.positive)


PRIORS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "Normal": (lambda: dist.Normal(0.0, free("s")), "scale", "'s'"),
    "LogNormal": (lambda: dist.LogNormal(0.0, free("s")), "scale", "'s'"),
    "HalfNormal": (lambda: dist.HalfNormal(free("s")), "scale", "'s'"),
    "Laplace": (lambda: dist.Laplace(0.0, free("s")), "scale", "'s'"),
    "StudentT": (lambda: dist.StudentT(free("df"), 0.0, free("s")), "scale", "'s'"),
    "Exponential": (lambda: dist.Exponential(free("r")), "rate", "'r'"),
    "Gamma": (lambda: dist.Gamma(free("a"), 1.0), "concentration", "'a'"),
    "Gamma rate": (lambda: dist.Gamma(2.0, free("b")), "rate", "'b'"),
    "Beta": (lambda: dist.Beta(free("a"), free("b")), "concentration1", "'a', 'b'"),
    "InverseGamma": (lambda: dist.InverseGamma(free("a"), 1.0), "concentration", "'a'"),
    "Uniform": (lambda: dist.Uniform(0.0, free("high")), "high", "'high'"),
    "Dirichlet": (lambda: dist.Dirichlet(free("a") * torch.ones(3)), "concentration", "'a'"),
    "LKJ": (lambda: dist.LKJCholesky(3, free("eta")), "concentration", "'eta'"),
    "Wishart": (lambda: dist.Wishart(3.0 + free("nu"), torch.eye(3)), "df", "'nu'"),
    "MultivariateNormal": (
        lambda: dist.MultivariateNormal(torch.zeros(3), free("s") * torch.eye(3)),
        "covariance_matrix",
        "'s'",
    ),
}


def under(prior: Callable[[], Any]) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        h = pyro.sample("h", prior())
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(h.reshape(-1)[0], 1.0), obs=x)

    return model


@pytest.mark.filterwarnings("ignore:Singular sample:UserWarning")
@pytest.mark.filterwarnings("ignore:Low df:UserWarning")
@pytest.mark.parametrize("case", PRIORS.values(), ids=list(PRIORS))
def test_a_free_hyperparameter_above_a_point_estimate_is_noted(case) -> None:
    prior, argument, names = case
    plan = ExactPosteriorEM(under(prior), "map").plan(X)
    found = [n for n in plan.notes if "grows without bound" in n]
    assert len(found) == 1, plan.notes
    assert f"the {argument}" in found[0] and names in found[0]
    assert "leave the guide out where the latent has an exact route" in found[0]
    fixed = {n.strip("' "): Fixed() for n in names.split(",")}
    held = ExactPosteriorEM(under(prior), "map", updates=fixed).plan(X)
    assert not any("grows without bound" in n for n in held.notes)


def test_locations_and_degrees_of_freedom_leave_the_density_bounded() -> None:
    for prior in (
        lambda: dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0),
        lambda: dist.StudentT(free("df"), pyro.param("m", torch.tensor(0.0)), 1.0),
        lambda: dist.Gamma(2.0, 1.0),
    ):
        pyro.clear_param_store()
        plan = ExactPosteriorEM(under(prior), "map").plan(X)
        assert not any("grows without bound" in n for n in plan.notes)


def test_a_concentration_with_a_prior_of_its_own_is_not_noted() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        w = pyro.sample("w", dist.Dirichlet(a * torch.ones(3)))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Categorical(w), obs=(x % 3).long())

    notes = ExactPosteriorEM(model, "map").plan(X).notes
    assert not any("grows without bound" in n for n in notes)


def inverse_gamma(x: Tensor) -> None:
    s = pyro.sample("s", dist.InverseGamma(free("a"), free("b")))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(3.0, s), obs=x)


def wishart(x: Tensor) -> None:
    precision = pyro.sample("V", dist.Wishart(torch.tensor(4.0), free("a") * torch.eye(2)))
    with pyro.plate("n", 3):
        law = dist.MultivariateNormal(torch.zeros(2), precision_matrix=precision)
        pyro.sample("x", law, obs=x.reshape(3, 2))


def log_scale(x: Tensor) -> None:
    log_s = pyro.param("a", torch.tensor(0.4))
    m = pyro.param("m", torch.tensor(0.0))
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.LogNormal(m, log_s.exp()))
        pyro.sample("x", dist.Poisson(h), obs=x)


def covariance(x: Tensor) -> None:
    S = pyro.param("a", torch.eye(2), constraint=C.positive_definite)
    with pyro.plate("n", 3):
        h = pyro.sample("h", dist.MultivariateNormal(torch.zeros(2), S))
        pyro.sample("x", dist.Normal(h, 1.0).to_event(1), obs=x.reshape(3, 2))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model", [inverse_gamma, wishart, log_scale, covariance])
def test_a_run_without_a_maximum_does_not_end_as_converged(model) -> None:
    pyro.set_rng_seed(3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        result = ExactPosteriorEM(model, "map").fit(X, progress=False)
    assert result.converged is False
    assert result.status in (EMStatus.UNBOUNDED, EMStatus.DEGENERATE)
    assert "rises without end" in result.message and "nothing more is gained" not in str(result)
    assert "parameter 'a'" in result.message or "parameter 'b'" in result.message
    assert any("rises without end" in str(w.message) for w in said)


def test_an_estimate_that_stays_within_reason_ends_as_before() -> None:
    """A local maximum of the joint density; the note has said what there is to say."""

    def model(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, free("s")))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    with pytest.warns(UserWarning, match="grows without bound"):
        result = ExactPosteriorEM(model, "map").fit(X * 3, progress=False)
    assert result.converged and 1.0 < float(result.params["s"]) < 20.0


def test_point_estimates_of_rows_are_no_parameters() -> None:
    def model(x: Tensor, groups: int = 2) -> None:
        m = pyro.param("m", torch.tensor(0.0))
        t = pyro.sample("t", dist.Gamma(3.0, 1.0))
        with pyro.plate("k", groups):
            mu = pyro.sample("mu", dist.Normal(m, 3.0))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(groups) / groups))
            h = pyro.sample("h", dist.Normal(mu[z] if groups == 1 else m, 1.0))
            pyro.sample("x", dist.Normal(h + mu[z], t), obs=x)

    result = ExactPosteriorEM(model, "map").fit(X, max_steps=20, progress=False)
    assert result.num_free_parameters == 4  # m, t and two of mu
    assert result.num_local_estimates == len(X)
    assert result.bic == pytest.approx(-2 * result.log_evidence + 4 * math.log(len(X)))
    assert result.aic == pytest.approx(-2 * result.log_evidence + 8)
    assert "p does not count 6 point estimates of latents" in str(result)
    assert "point estimates not counted in p" in str(result.summary())


def test_global_point_estimates_are_parameters() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("k", 2):
            mu = pyro.sample("mu", dist.Normal(0.0, 3.0))
        w = pyro.sample("w", dist.Dirichlet(torch.ones(2)))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    result = ExactPosteriorEM(model, "map").fit(X, max_steps=20, progress=False)
    assert result.num_free_parameters == 3 and result.num_local_estimates == 0
    assert "does not count" not in str(result)
