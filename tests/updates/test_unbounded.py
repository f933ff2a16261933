"""Objectives without a maximiser under gradient updates: ended by name; slow limits: not."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints

from pyro_em import DegenerateError, EMStatus, ExactPosteriorEM

ZEROS = torch.zeros(6, dtype=torch.float64)


def param(name, value, constraint=constraints.real):
    return pyro.param(name, torch.tensor(value, dtype=torch.float64), constraint=constraint)


def equal_data(x):
    p = param("p", 1.0, constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.StudentT(3.0, 0.0, p), obs=x)


def equal_data_softplus(x):
    p = param("p", 1.0, constraints.softplus_positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.StudentT(3.0, 0.0, p), obs=x)


def equal_data_bare(x):
    """The scale is the parameter's own sigmoid: the constraint does not say that it is one."""
    p = param("p", 0.0)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.StudentT(3.0, 0.0, p.sigmoid()), obs=x)


def equal_counts(x):
    p = param("p", 1.0, constraints.positive)
    q = param("q", 1.0, constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Gamma(p, q), obs=x + 2)


def vectors(x, constraint=constraints.lower_cholesky):
    p = param("p", [[1.0, 0.0], [0.0, 1.0]], constraint)
    with pyro.plate("n", len(x)):
        rows = torch.stack([x, torch.arange(len(x)) - 2.5], -1)
        pyro.sample("x", dist.MultivariateStudentT(5.0, rows.new_zeros(2), p), obs=rows)


def vectors_softplus(x):
    vectors(x, constraints.softplus_lower_cholesky)


@pytest.mark.parametrize(
    "model",
    [equal_data, equal_data_softplus, equal_data_bare, equal_counts, vectors, vectors_softplus],
)
def test_a_climb_without_end_names_parameter_and_site(model) -> None:
    em = ExactPosteriorEM(model)
    em.plan(ZEROS)
    start = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    with pytest.warns(match=r"(?s)parameter '[pq]'.*rises without end.*site 'x'"):
        result = em.fit(ZEROS, progress=False)
    assert result.status is EMStatus.DEGENERATE and "site 'x'" in result.message
    for name, value in start.items():
        torch.testing.assert_close(pyro.param(name).detach(), value, rtol=0, atol=0)
    with pytest.raises(DegenerateError, match="rolled back"):
        em.step(ZEROS)


def test_a_component_that_collapses_is_named_and_the_others_are_not() -> None:
    def model(x):
        p = param("p", [1.0, 1.0], constraints.positive)
        mu = param("mu", [3.0, 0.0])
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64)))
            pyro.sample("x", dist.StudentT(3.0, mu[z], p[z]), obs=x)

    x = torch.tensor([0.0, 0.0, 0.0, 0.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    with pytest.warns(match=r"(?s)parameter 'p', component 1.*site 'x'"):
        ExactPosteriorEM(model).fit(x, progress=False)


# ------------------------------------------------------------------ limits that exist


def separable(x):
    """The slope goes to infinity, the evidence to zero."""
    b = param("b", [0.0, 0.0])
    h = torch.linspace(-1, 1, len(x), dtype=torch.float64)
    with pyro.plate("n", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=b[0] + b[1] * h), obs=(h > 0).double())


def light_tails(x):
    """Two values of equal size have lighter tails than any Student-t: its df go to infinity."""
    df = param("df", 3.0, constraints.positive)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.StudentT(df, 0.0, 1.0), obs=x + torch.tensor([1.0, -1.0]).repeat(3))


def all_ones(x):
    p = param("p", 0.5, constraints.unit_interval)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Bernoulli(p * p), obs=x + 1)


def far_away(x):
    """A start that is wrong by fifteen orders of magnitude, in both directions of a scale."""
    mu, s = param("mu", 1e8), param("s", 1e-7, constraints.positive)
    with pyro.plate("n", len(x)):
        data = x + torch.arange(6.0, dtype=torch.float64)
        pyro.sample("x", dist.StudentT(3.0, mu * 1.0 + 0.0, s * 2.0 + 0.0), obs=data)


@pytest.mark.parametrize("model", [separable, light_tails, all_ones, far_away])
def test_a_limit_that_exists_is_no_runaway(model) -> None:
    em = ExactPosteriorEM(model)
    before = em.elbo(ZEROS).value
    result = em.fit(ZEROS, progress=False, max_steps=50)
    assert result.status is not EMStatus.DEGENERATE
    assert result.elbo > before
