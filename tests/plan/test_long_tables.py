"""Rows that read discrete latents of another plate by an index, against sums written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, LeastSquares
from pyro_em.errors import DataError, ModelError

S, N = 5, 24
DRAWN = torch.Generator().manual_seed(0)
SUBJECT = torch.cat([torch.arange(S), torch.randint(0, S, (N - S,), generator=DRAWN)])
X = torch.randn(N, generator=DRAWN, dtype=torch.float64)
Y = torch.where(SUBJECT % 2 == 0, 1.0, -1.0) * X
Y = Y + 0.5 * torch.randn(N, generator=DRAWN, dtype=torch.float64)
EVENTS = torch.randint(0, S - 1, (9,), generator=DRAWN)  # the last subject has none
GAPS = torch.rand(len(EVENTS), generator=DRAWN, dtype=torch.float64)


def weights() -> Tensor:
    start = torch.tensor([0.4, 0.6], dtype=torch.float64)
    return pyro.param("weights", start, constraint=constraints.simplex)


def slopes() -> Tensor:
    return pyro.param("slopes", torch.tensor([0.5, -0.5], dtype=torch.float64))


def noise() -> Tensor:
    start = torch.tensor(1.0, dtype=torch.float64)
    return pyro.param("noise", start, constraint=constraints.positive)


def lines(x: Tensor, y: Tensor, subject: Tensor, seen: Tensor | None = None) -> None:
    """A class for each subject, with a line for its rows."""
    b, s = slopes(), noise()
    with pyro.plate("subjects", S):
        z = pyro.sample("z", dist.Categorical(weights()))
    with pyro.plate("rows", len(y)):
        fn = dist.Normal(b[z[subject]] * x, s)
        pyro.sample("y", fn if seen is None else fn.mask(seen), obs=y)


def joint(params: dict[str, Tensor], seen: Tensor | None = None) -> Tensor:
    """log p(z, y) of each subject and class. # (S, 2)"""
    rows = dist.Normal(params["slopes"] * X[:, None], params["noise"]).log_prob(Y[:, None])
    rows = rows if seen is None else torch.where(seen[:, None], rows, 0.0)
    out = params["weights"].log().expand(S, 2).clone()
    return out.index_add(0, SUBJECT, rows)


@pytest.mark.parametrize("seen", [None, torch.arange(N) % 3 > 0], ids=["whole", "masked"])
def test_rows_that_read_their_subject_are_summed_with_it(seen: Tensor | None) -> None:
    em = ExactPosteriorEM(lines)
    result = em.fit(X, Y, SUBJECT, seen, max_steps=8, tol=0)
    table = joint(dict(result.params), seen)
    assert float(table.logsumexp(1).sum()) == pytest.approx(result.log_evidence, abs=1e-10)
    assert torch.allclose(result.posterior.probs("z"), table.softmax(1), atol=1e-12)
    assert isinstance(em.plan(X, Y, SUBJECT, seen).updates["slopes"].update, LeastSquares)
    assert result.num_rows == S
    drawn = em.predictive(X, Y, SUBJECT, seen, num_samples=2, seed=0)
    assert drawn["y"].shape == (2, N)  # as the model is written


def test_a_step_is_that_of_the_table_in_wide_format() -> None:
    """Each subject's rows beside each other, and places that are left over masked."""

    def wide(x: Tensor, y: Tensor, seen: Tensor) -> None:
        b, s = slopes(), noise()
        with pyro.plate("subjects", S):
            z = pyro.sample("z", dist.Categorical(weights()))
            with pyro.plate("visits", x.shape[0]):
                pyro.sample("y", dist.Normal(b[z] * x, s).mask(seen), obs=y)

    counts = torch.bincount(SUBJECT)
    seen = torch.arange(int(counts.max()))[:, None] < counts
    x, y = torch.zeros(2, *seen.shape, dtype=torch.float64)
    for s in range(S):
        x[: counts[s], s], y[: counts[s], s] = X[s == SUBJECT], Y[s == SUBJECT]
    long = ExactPosteriorEM(lines).fit(X, Y, SUBJECT, max_steps=3, tol=0)
    pyro.clear_param_store()
    padded = ExactPosteriorEM(wide).fit(x, y, seen, max_steps=3, tol=0)
    assert long.history == pytest.approx(padded.history, abs=1e-11)
    for name, value in padded.params.items():
        assert torch.allclose(long.params[name], value, atol=1e-12)


def test_two_tables_of_one_latent_one_with_a_subject_that_has_no_rows() -> None:
    def model(subject: Tensor, events: Tensor) -> None:
        rates = pyro.param(
            "rates", torch.tensor([1.0, 3.0]).double(), constraint=constraints.positive
        )
        b, s = slopes(), noise()
        with pyro.plate("subjects", S):
            z = pyro.sample("z", dist.Categorical(weights()))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(b[z[subject]] * X, s), obs=Y)
        with pyro.plate("events", len(events)):
            pyro.sample("gap", dist.Exponential(rates[z[..., events]]), obs=GAPS)

    result = ExactPosteriorEM(model).fit(SUBJECT, EVENTS, max_steps=4, tol=0)
    gaps = dist.Exponential(result.params["rates"]).log_prob(GAPS[:, None])
    table = joint(dict(result.params)).index_add(0, EVENTS, gaps)
    assert float(table.logsumexp(1).sum()) == pytest.approx(result.log_evidence, abs=1e-10)


def test_a_class_and_an_intercept_of_each_subject_are_integrated_together() -> None:
    def model(subject: Tensor) -> None:
        b, s = slopes(), noise()
        with pyro.plate("subjects", S):
            z = pyro.sample("z", dist.Categorical(weights()))
            u = pyro.sample("u", dist.Normal(0.0, pyro.param("spread", torch.tensor(1.0).double())))
        with pyro.plate("rows", N):
            pyro.sample("y", dist.Normal(b[z[subject]] * X + u[subject], s), obs=Y)

    result = ExactPosteriorEM(model).fit(SUBJECT, max_steps=3, tol=0)
    p, total = result.params, 0.0
    for s in range(S):
        own = s == SUBJECT
        covariance = p["noise"] ** 2 * torch.eye(int(own.sum())) + p["spread"] ** 2
        loc = p["slopes"][:, None] * X[own]
        both = dist.MultivariateNormal(loc, covariance.double()).log_prob(Y[own])
        total += float((p["weights"].log() + both).logsumexp(0))
    assert total == pytest.approx(result.log_evidence, abs=1e-9)


def pairs(first: Tensor, second: Tensor) -> None:
    with pyro.plate("nodes", S):
        z = pyro.sample("z", dist.Categorical(weights()))
    table = torch.tensor([[0.7, 0.2], [0.3, 0.6]], dtype=torch.float64)
    with pyro.plate("edges", len(first)):
        pyro.sample("e", dist.Bernoulli(table[z[first], z[second]]), obs=torch.ones(len(first)))


def shifted(first: Tensor, second: Tensor) -> None:
    with pyro.plate("nodes", S):
        z = pyro.sample("z", dist.Categorical(weights()))
    with pyro.plate("rows", N):
        loc = slopes()[z[first]] + z.double().mean()
        pyro.sample("y", dist.Normal(loc, 1.0), obs=Y)


def inflated(first: Tensor, second: Tensor) -> None:
    """A distribution that is made of others, of which no rows can be taken."""
    with pyro.plate("nodes", S):
        z = pyro.sample("z", dist.Categorical(weights()))
    with pyro.plate("rows", N):
        fn = dist.ZeroInflatedPoisson(rate=slopes().exp()[z[first]], gate=torch.tensor(0.3))
        pyro.sample("y", fn, obs=second.double())


def test_numbers_that_no_row_can_have_are_named_alone() -> None:
    with pytest.raises(DataError, match=rf"^site 'y': 1 of {N} observed values are NaN"):
        ExactPosteriorEM(lines).fit(X, torch.where(torch.arange(N) == 3, torch.nan, Y), SUBJECT)


@pytest.mark.parametrize("model", [pairs, shifted, inflated])
def test_rows_that_cannot_be_laid_out_are_refused(model: Callable[..., None]) -> None:
    with pytest.raises(ModelError, match="from outside that plate"):
        ExactPosteriorEM(model).fit(SUBJECT, SUBJECT.flip(0))
