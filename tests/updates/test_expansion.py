"""Parameter expansion of a Gaussian latent's scale: never below EM, and quick at the boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ClosedForm, ExactPosteriorEM
from pyro_em.updates import in_progress, m_step
from tests.dyestuff import BATCH, FIRST, SECOND


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def positive(name: str, start: float | Tensor) -> Tensor:
    return pyro.param(name, torch.as_tensor(start), constraint=constraints.positive)


def batches(y: Tensor, mean: float, spread: float) -> None:
    mu = pyro.param("mu", torch.tensor(mean))
    with pyro.plate("batches", 6):
        u = pyro.sample("u", dist.Normal(0.0, positive("between", spread)))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + u[BATCH], positive("within", spread)), obs=y)


def test_the_published_path_of_em_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evidence that enters each step, computed by hand from the textbook's updates."""
    plain = [-164.704957900, -164.427148444, -164.203185646]
    expanded = ExactPosteriorEM(batches).fit(FIRST, 1500.0, 50.0, max_steps=3, tol=0).history
    assert expanded[0] == pytest.approx(plain[0], abs=1e-8)
    assert all(a > b + 0.1 for a, b in zip(list(expanded)[1:], plain[1:], strict=True))
    monkeypatch.setattr(m_step, "expansions_of", lambda *_: ())
    monkeypatch.setattr(in_progress, "shifts_of", lambda *_: ())
    pyro.clear_param_store()
    history = ExactPosteriorEM(batches).fit(FIRST, 1500.0, 50.0, max_steps=3, tol=0).history
    assert list(history) == pytest.approx(plain, abs=1e-8)


def test_an_m_step_for_a_given_q_is_that_of_the_textbook() -> None:
    args = FIRST, 1500.0, 50.0
    em = ExactPosteriorEM(batches)
    for expected in (-164.427148444, -164.203185646):
        em.m_step(em.posterior(*args), *args)
        assert em.score(*args) == pytest.approx(expected, abs=1e-8)


def test_both_end_at_the_closed_form() -> None:
    result = ExactPosteriorEM(batches).fit(FIRST, 1500.0, 50.0, max_steps=500, tol=1e-11)
    assert result.log_evidence == pytest.approx(-163.663529941, abs=1e-8)
    p = result.params
    assert float(p["mu"]) == pytest.approx(1527.5, abs=1e-3)
    assert float(p["between"]) ** 2 == pytest.approx(1388.333333, abs=0.2)
    assert float(p["within"]) ** 2 == pytest.approx(2451.25, abs=0.2)


def test_a_variance_of_zero_is_reached_in_few_steps() -> None:
    """The maximum is one normal for all rows; EM alone is 3e-5 nats short after 100,000 steps."""
    best = dist.Normal(SECOND.mean(), SECOND.std(unbiased=False)).log_prob(SECOND).sum()
    result = ExactPosteriorEM(batches).fit(SECOND, 5.0, 2.0, max_steps=30, tol=0)
    assert float(best) - 1e-8 < result.log_evidence < float(best) + 1e-9
    assert min(torch.as_tensor(result.history).diff()) > -1e-9
    assert float(result.params["between"]) < 1e-3


def vectors(y: Tensor, x: Tensor, spread: Callable[[], dist.TorchDistribution]) -> None:
    beta = pyro.param("beta", torch.zeros(2))
    with pyro.plate("groups", 6):
        u = pyro.sample("u", spread())
    with pyro.plate("rows", len(y)):
        mean = x @ beta + (x * u[BATCH]).sum(-1)
        pyro.sample("y", dist.Normal(mean, positive("within", 1.0)), obs=y)


def normal(*shape: int) -> dist.TorchDistribution:
    return dist.Normal(torch.zeros(2), positive("between", torch.ones(shape))).to_event(1)


SPREADS: dict[str, Callable[[], dist.TorchDistribution]] = {
    "one number": lambda: normal(),
    "diagonal": lambda: normal(2),
    "triangle": lambda: dist.MultivariateNormal(
        torch.zeros(2),
        scale_tril=pyro.param("L", torch.eye(2), constraint=constraints.lower_cholesky),
    ),
    "matrix": lambda: dist.MultivariateNormal(
        torch.zeros(2),
        covariance_matrix=pyro.param("S", torch.eye(2), constraint=constraints.positive_definite),
    ),
}


@pytest.mark.parametrize("spread", SPREADS.values(), ids=list(SPREADS))
def test_it_never_falls_and_ends_where_the_dense_evidence_is_flat(spread) -> None:
    g = torch.Generator().manual_seed(4)
    x = torch.stack([torch.ones(30), torch.randn(30, generator=g)], -1)
    u = torch.randn(6, 2, generator=g) @ torch.tensor([[1.5, 0.5], [0.0, 0.8]])
    y = x @ torch.tensor([1.0, -2.0]) + (x * u[BATCH]).sum(-1) + torch.randn(30, generator=g)
    em = ExactPosteriorEM(vectors)
    assert "parameter expansion" in str(em.plan(y, x, spread))
    result = em.fit(y, x, spread, max_steps=8, tol=0)
    assert min(torch.as_tensor(result.history).diff()) > -1e-9
    result = em.fit(y, x, spread, max_steps=60, tol=1e-11)
    assert result.num_steps < 60, "the mean of all groups is learned at once"
    values = {n: v.clone().requires_grad_() for n, v in result.params.items()}

    def covariance() -> Tensor:
        if "L" in values:
            return values["L"] @ values["L"].mT
        if "S" in values:
            return values["S"]
        return (values["between"].expand(2) ** 2).diag()

    same = (BATCH[:, None] == BATCH).double()
    noise = values["within"] ** 2 * torch.eye(30)
    fn = dist.MultivariateNormal(x @ values["beta"], same * (x @ covariance() @ x.T) + noise)
    by_hand = fn.log_prob(y)
    assert result.log_evidence == pytest.approx(by_hand.item(), abs=1e-8)
    for slope in torch.autograd.grad(by_hand, list(values.values())):
        assert slope.tril().abs().max() < 1e-3 if slope.dim() == 2 else slope.abs().max() < 1e-3


def nested(y: Tensor, x: Tensor, group: Tensor, school: Tensor) -> None:
    """An intercept, schools and classes: both levels have means that the intercept takes in."""
    beta = pyro.param("beta", torch.zeros(1))
    with pyro.plate("by_school", 4):
        u = pyro.sample("u", dist.Normal(0.0, positive("schools", 1.0)))
    with pyro.plate("by_class", 12):
        v = pyro.sample("v", dist.Normal(0.0, positive("classes", 1.0)))
    with pyro.plate("rows", len(y)):
        mean = x @ beta + u[school] + v[group]
        pyro.sample("y", dist.Normal(mean, positive("within", 1.0)), obs=y)


def test_nested_groups_share_one_intercept() -> None:
    g = torch.Generator().manual_seed(7)
    group = torch.arange(48) // 4
    school = group // 3
    y = 50 + 3 * torch.randn(4, generator=g)[school] + torch.randn(12, generator=g)[group]
    y = y + torch.randn(48, generator=g)
    em = ExactPosteriorEM(nested)
    result = em.fit(y, torch.ones(48, 1), group, school, max_steps=200, tol=1e-10)
    assert result.converged and result.num_steps < 200
    assert min(torch.as_tensor(result.history).diff()) > -1e-9
    p = {n: v.clone().requires_grad_() for n, v in result.params.items()}
    same = (group == group[:, None]).double(), (school == school[:, None]).double()
    covariance = p["classes"] ** 2 * same[0] + p["schools"] ** 2 * same[1]
    covariance = covariance + p["within"] ** 2 * torch.eye(48)
    by_hand = dist.MultivariateNormal(p["beta"].expand(48), covariance).log_prob(y)
    assert result.log_evidence == pytest.approx(by_hand.item(), abs=1e-8)
    for slope in torch.autograd.grad(by_hand, list(p.values())):
        assert slope.abs().max() < 1e-3


def test_factors_of_data_far_from_the_start_find_their_mean_at_once() -> None:
    g = torch.Generator().manual_seed(2)
    x = 1e3 + torch.randn(40, 2, generator=g) @ torch.randn(2, 4, generator=g)
    x = x + torch.randn(40, 4, generator=g)

    def factors(x: Tensor) -> None:
        w = pyro.param("W", lambda: torch.randn(4, 1, generator=torch.Generator().manual_seed(0)))
        mu = pyro.param("mu", torch.zeros(4))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            fn = dist.Normal(h[:, None] * w[:, 0] + mu, positive("s", torch.ones(4)))
            pyro.sample("x", fn.to_event(1), obs=x)

    result = ExactPosteriorEM(factors).fit(x, max_steps=300, tol=1e-9)
    torch.testing.assert_close(result.params["mu"], x.mean(0))
    pyro.clear_param_store()
    centred = ExactPosteriorEM(factors).fit(x - x.mean(0), max_steps=300, tol=1e-9)
    assert result.log_evidence == pytest.approx(centred.log_evidence, abs=1e-5)


def fewer_groups_than_slopes(x: Tensor, scale_tril: bool = False) -> None:
    """Three correlated coefficients in each of two groups: the best covariance is singular."""
    noise = pyro.param("noise", torch.tensor(1.0), constraint=constraints.positive)
    if scale_tril:
        tril = pyro.param("tril", torch.eye(3), constraint=constraints.lower_cholesky)
        spread = {"scale_tril": tril}
    else:
        S = pyro.param("S", torch.eye(3), constraint=constraints.positive_definite)
        spread = {"covariance_matrix": S}
    with pyro.plate("groups", 2):
        w = pyro.sample("w", dist.MultivariateNormal(torch.zeros(3), **spread))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.Normal((POWERS * w[GROUP]).sum(-1), noise), obs=x)


POWERS = torch.stack([torch.arange(7.0, dtype=torch.float64) / 7], -1) ** torch.arange(3)
GROUP = torch.tensor([0, 0, 1, 1, 0, 1, 0])
CURVES = torch.tensor(
    [1.6614, 1.2669, 1.0617, 1.6213, 0.5481, 0.8339, -0.5228], dtype=torch.float64
)


@pytest.mark.parametrize("scale_tril", [False, True])
@pytest.mark.parametrize("x", [CURVES, 1 + 0.01 * CURVES])
def test_a_covariance_that_goes_to_a_singular_one_stays_inside(x: Tensor, scale_tril: bool) -> None:
    result = ExactPosteriorEM(fewer_groups_than_slopes).fit(x, scale_tril=scale_tril, max_steps=60)
    S = result.params["tril"] @ result.params["tril"].T if scale_tril else result.params["S"]
    marginal = POWERS @ S @ POWERS.T * (GROUP[:, None] == GROUP)
    marginal = marginal + torch.eye(7) * result.params["noise"] ** 2
    expected = torch.distributions.MultivariateNormal(torch.zeros(7), marginal).log_prob(x)
    assert float(result.log_evidence) == pytest.approx(float(expected), abs=1e-6)
    history = torch.tensor(list(result.history))
    assert (history.diff() > -1e-9).all()


@pytest.mark.parametrize("how", ["floor", "interval"])
def test_a_spread_that_has_an_end_is_not_multiplied(how: str) -> None:
    low = constraints.interval(0.5, 3.0) if how == "interval" else constraints.positive

    def model(y: Tensor) -> None:
        with pyro.plate("batches", 6):
            scale = pyro.param("between", torch.tensor(1.0), constraint=low)
            u = pyro.sample("u", dist.Normal(0.0, scale))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(5.7 + u[BATCH], positive("within", 2.0)), obs=y)

    updates = {"between": ClosedForm(floor=0.25)} if how == "floor" else {}
    em = ExactPosteriorEM(model, updates=updates)
    assert "parameter expansion" not in str(em.plan(SECOND))
    result = em.fit(SECOND, max_steps=200, tol=1e-9)
    assert float(result.params["between"]) == pytest.approx(0.5, abs=1e-3)
