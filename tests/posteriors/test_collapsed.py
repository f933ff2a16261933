"""Rows that are all alike: a few rows with the same sums give the steps of all."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import DegenerateError, EMStatus, ExactPosteriorEM, Fixed, PyroEMWarning
from pyro_em.graph.all_data import Vectors
from pyro_em.posteriors.continuous import collapsed

ROWS, D, Q = 40, 4, 2


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def data(offset: float = 0.0) -> Tensor:
    g = torch.Generator().manual_seed(3)
    w = torch.randn(Q, D, generator=g)
    noise = 0.5 * torch.randn(ROWS, D, generator=g)
    return torch.randn(ROWS, Q, generator=g) @ w + noise + offset


def factors(x: Tensor, tied: bool, offset: float = 0.0) -> None:
    w = pyro.param("W", lambda: torch.randn(D, Q, generator=torch.Generator().manual_seed(1)))
    mu = pyro.param("mu", lambda: torch.full((D,), offset))
    start = torch.ones(()) if tied else torch.ones(D)
    s = pyro.param("s", start, constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + mu, s).to_event(1), obs=x)


def deep(x: Tensor) -> None:
    """Two latents, one below the other, and two observed sites."""
    a = pyro.param("a", torch.tensor(0.7))
    b = pyro.param("b", torch.tensor(0.3))
    s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
    low = pyro.param("low", torch.eye(3), constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        v = pyro.sample("v", dist.Normal(a * u + b, 0.8))
        pyro.sample("x", dist.Normal(u + v, s), obs=x[:, 0])
        mean = torch.stack([v, a * u, u - v], -1)
        pyro.sample("y", dist.MultivariateNormal(mean, scale_tril=low), obs=x[:, 1:])


def known(x: Tensor) -> None:
    """Known means, a prior with correlations, loadings in rows of their own."""
    w = pyro.param("W", lambda: torch.randn(Q, D, generator=torch.Generator().manual_seed(1)))
    s = pyro.param("s", torch.ones(D), constraint=constraints.positive)
    low = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.MultivariateNormal(torch.zeros(Q), scale_tril=low))
        pyro.sample("x", dist.Normal(h @ w + 0.1, s).to_event(1), obs=x)


FACTORS = "factor analysis kernel, on sums over rows"
SUMS = "Gaussian blocks, on sums over rows"
CASES = {
    "factor analysis": (factors, (data(), False), FACTORS),
    "probabilistic PCA": (factors, (data(), True), FACTORS),
    "far from zero": (factors, (data(1e6), False, 1e6), FACTORS),
    "known means": (known, (data(),), FACTORS),
    "a network": (deep, (data(),), SUMS),
}


@pytest.mark.parametrize(("model", "args", "words"), CASES.values(), ids=list(CASES))
def test_its_steps_are_those_of_all_rows(
    model, args, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {}
    for kernel in dict.fromkeys((words, SUMS, "Gaussian blocks")):
        if kernel != FACTORS:
            monkeypatch.setattr("pyro_em.plan.eligibility.factor_rows", lambda *_: None)
        if kernel == "Gaussian blocks":
            monkeypatch.setattr("pyro_em.plan.eligibility.collapsed_rows", lambda *_: None)
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        assert em.plan(*args).iterations == kernel
        found[kernel] = em.fit(*args, max_steps=6, tol=0)
    slow = found.pop("Gaussian blocks")
    for quick in found.values():
        assert list(quick.history) == pytest.approx(list(slow.history), rel=1e-10, abs=1e-7)
        assert quick.log_evidence == pytest.approx(slow.log_evidence, rel=1e-10, abs=1e-7)
        for name, value in slow.params.items():
            torch.testing.assert_close(quick.params[name], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(
            quick.posterior.pointwise, slow.posterior.pointwise, rtol=1e-6, atol=1e-6
        )


def test_the_bound_after_each_m_step_lies_between() -> None:
    """ELBO(q, θ_new): above the evidence before, below the evidence after."""
    result = ExactPosteriorEM(factors).fit(data(), False, max_steps=8, tol=0)
    entering = [*result.history, result.log_evidence]
    for before, bound, after in zip(
        entering, result.history.after_m_step, entering[1:], strict=False
    ):
        assert before < bound <= after + 1e-9


def test_a_noise_that_vanishes_is_named() -> None:
    """A Heywood case: the kernel hands over, and the step through tables says what is wrong."""
    x = data()
    x[:, 1] = x[:, 0]
    with pytest.warns(PyroEMWarning, match="variance collapses"):
        result = ExactPosteriorEM(factors).fit(x, False, max_steps=3000, tol=1e-12)
    assert result.status is EMStatus.DEGENERATE and "parameter 's', component" in result.message


def test_the_evidence_is_that_of_all_rows() -> None:
    x = data()
    result = ExactPosteriorEM(factors).fit(x, False, max_steps=4, tol=0)
    w, mu, s = (result.params[n] for n in ("W", "mu", "s"))
    by_hand = dist.MultivariateNormal(mu, w @ w.T + (s**2).diag()).log_prob(x)
    assert result.log_evidence == pytest.approx(float(by_hand.sum()), rel=1e-11)
    torch.testing.assert_close(result.posterior.pointwise, by_hand)


@pytest.mark.parametrize("root", ["of the rows", "of their scatter"])
def test_few_rows_have_number_mean_and_scatter_of_all(root: str) -> None:
    x = data(100.0)
    centred = x - x.mean(0)
    scatter = centred.T @ centred
    if root == "of the rows":
        upper = torch.linalg.qr(centred)[1]
    else:
        upper = collapsed.root_of(scatter)
    few, weight = collapsed._with_equal_sums(Vectors(ROWS, x.mean(0), scatter), upper)
    assert few.shape == (D + 1, D) and weight * len(few) == pytest.approx(ROWS)
    torch.testing.assert_close(few.mean(0), x.mean(0))
    own = few - few.mean(0)
    torch.testing.assert_close(weight * own.T @ own, centred.T @ centred)


@pytest.mark.parametrize("how", ["covariate", "mask", "few rows", "gradient", "fixed"])
def test_rows_that_differ_are_not_collapsed(how: str) -> None:
    x = data()[: 9 if how == "few rows" else ROWS]

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(D))
        c = pyro.param("c", torch.tensor(0.5))
        slope = torch.arange(len(x))[:, None] * c if how == "covariate" else c
        if how == "gradient":
            slope = c.exp()
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            fn = dist.Normal(h[:, None] * w + slope, 1.0)
            fn = fn.mask(x > 0) if how == "mask" else fn
            pyro.sample("x", fn.to_event(1), obs=x)

    updates = {"w": Fixed(), "c": Fixed()} if how == "fixed" else {}
    plan = ExactPosteriorEM(model, updates=updates).plan(x)
    assert "Gaussian blocks" in plan.iterations and "sums" not in plan.iterations


def test_one_object_on_other_data_and_other_parameters() -> None:
    """Nothing of an earlier call is answered: data of one form, of another, parameters in between."""
    em, first, second = ExactPosteriorEM(factors), data(), data() + 2
    em.fit(first, False, max_steps=2, tol=0)
    for x in (first, second, second[:25], first):
        w, mu, s = (pyro.param(n).detach() for n in ("W", "mu", "s"))
        dense = float(dist.MultivariateNormal(mu, w @ w.T + (s**2).diag()).log_prob(x).sum())
        assert em.elbo(x, False).log_evidence == pytest.approx(dense, rel=1e-11)
        assert em.score(x, False) == pytest.approx(dense, rel=1e-11)
        em.fit(x, False, max_steps=1, tol=0)


def test_observations_without_noise_are_named() -> None:
    """Where validation of arguments is passed by: a step that rounds a scale to zero."""
    x = data()
    program = ExactPosteriorEM(factors)._session.look((x, True), {})
    (group,) = program.graph.groups
    values = {n: p.value() for n, p in program.graph.parameters.items()}
    arguments = group.evaluate_arguments({**values, "s": torch.zeros(())})
    with pytest.raises(DegenerateError, match="its observation noise is exactly zero") as caught:
        group.log_density(arguments)
    assert str(caught.value).startswith("site 'x': ") and "give it a floor" in str(caught.value)
