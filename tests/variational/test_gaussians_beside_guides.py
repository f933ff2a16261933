"""Gaussian latents leave a guide where they are exact given what it draws."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceMeanField_ELBO, autoguide
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import (
    ClosedForm,
    ExactPosteriorEM,
    Fixed,
    ModelError,
    MonteCarlo,
    PyroEMWarning,
    TraceExact_ELBO,
    UsageError,
    vectorized_markov,
)
from pyro_em.variational.drawn import DrawnPosterior

pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.errors.PyroEMWarning")

GROUPS = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 0, 2])
Y = torch.tensor([0.3, -0.8, 1.9, 2.2, 0.4, 1.1, -1.5, 2.4, 0.1, 1.7], dtype=torch.float64)
SLOPE = torch.tensor([1.0, -0.5, 0.3, 0.0, 2.0, -1.1, 0.7, 0.2, -0.4, 1.3], dtype=torch.float64)


@pytest.fixture(autouse=True)
def start_clean() -> Any:
    """Double precision, a seed and an empty param store."""
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def routes(em: ExactPosteriorEM, *args: Any) -> dict[str, str]:
    return {r.site: r.route for r in em.plan(*args).routes}


def reason(em: ExactPosteriorEM, site: str, *args: Any) -> str:
    """Why a Gaussian latent is not integrated: a field of its row, said in the row."""
    row = next(r for r in em.plan(*args).routes if r.site == site)
    assert row.not_exact is not None
    assert row.not_exact.what.rstrip(".") in row.reason
    return f"{row.not_exact.where} {row.not_exact.what} {' '.join(row.not_exact.fixes)}"


def intercepts(y: Tensor) -> None:
    """Random intercepts whose scale is drawn."""
    m, noise = pyro.param("m", torch.tensor(0.3)), positive("noise", 0.8)
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
    with pyro.plate("groups", 4):
        u = pyro.sample("u", dist.Normal(0.0, s))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(m + u[GROUPS], noise), obs=y)


def of_scale(y: Tensor) -> None:
    location, spread = pyro.param("location", torch.tensor(0.1)), positive("spread", 0.4)
    pyro.sample("s", dist.LogNormal(location, spread))


def product(y: Tensor) -> None:
    u, v = (pyro.sample(n, dist.Normal(0.5, 1.0)) for n in "uv")
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(u * v * SLOPE + w, positive("noise", 0.8)), obs=y)


# ------------------------------------------------------------------ who leaves


def test_a_gaussian_latent_leaves_the_guide_and_the_plan_says_so() -> None:
    em = ExactPosteriorEM(intercepts, AutoNormal)
    plan = em.plan(Y)
    assert {r.site: r.route for r in plan.routes} == {"s": "guide", "u": "Gaussian"}
    (note,) = [n for n in plan.notes if "'u'" in n]
    assert "strategy='guide'" in note and "'AutoNormal.locs.u', 'AutoNormal.scales.u'" in note
    unused = {n for n, u in plan.updates.items() if type(u.update).__name__ == "NoUpdate"}
    assert unused == {"AutoNormal.locs.u", "AutoNormal.scales.u"}
    assert "its guide site is not used" in str(plan)


def test_where_everything_leaves_the_model_is_exact() -> None:
    def model(y: Tensor) -> None:
        m, s = pyro.param("m", torch.tensor(0.3)), positive("s", 1.0)
        with pyro.plate("groups", 4):
            u = pyro.sample("u", dist.Normal(0.0, s))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m + u[GROUPS], 0.8), obs=y)

    alone = ExactPosteriorEM(model).fit(Y, max_steps=5, tol=0, progress=False)
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, AutoNormal)
    plan = em.plan(Y)
    assert not plan.stochastic and {r.route for r in plan.routes} == {"Gaussian"}
    (note,) = [n for n in plan.notes if "the guide is not used" in n]
    assert "strategy='guide'" in note
    beside = em.fit(Y, max_steps=5, tol=0, progress=False)
    assert beside.log_evidence == pytest.approx(alone.log_evidence, abs=1e-9)
    with pytest.raises(UsageError, match="strategy='guide'"):
        em.fit(Y, batch_size=2)


def test_strategies_keep_the_guide() -> None:
    for strategy in ("guide", {"u": "guide"}):
        em = ExactPosteriorEM(intercepts, AutoNormal, strategy=strategy)
        assert routes(em, Y) == {"s": "guide", "u": "guide"}
        assert "strategy='guide'" in reason(em, "u", Y)
    em = ExactPosteriorEM(intercepts, AutoNormal, strategy=MonteCarlo(3))
    assert routes(em, Y) == {"s": "guide", "u": "guide"}
    em = ExactPosteriorEM(intercepts, "map")
    assert routes(em, Y) == {"s": "point estimate", "u": "point estimate"}


JOINT = {
    "AutoMultivariateNormal": autoguide.AutoMultivariateNormal,
    "AutoDiagonalNormal": autoguide.AutoDiagonalNormal,
    "AutoLowRankMultivariateNormal": autoguide.AutoLowRankMultivariateNormal,
    "AutoIAFNormal": autoguide.AutoIAFNormal,
    "AutoStructured": autoguide.AutoStructured,
}


@pytest.mark.parametrize("name", JOINT)
def test_joint_guides_keep_all_their_sites(name: str) -> None:
    em = ExactPosteriorEM(intercepts, JOINT[name])
    assert routes(em, Y) == {"s": "guide", "u": "guide"}
    assert f"{name} draws its sites jointly" in reason(em, "u", Y)


def test_a_hand_written_joint_guide_keeps_its_sites() -> None:
    def guide(y: Tensor) -> None:
        e = pyro.sample(
            "e", dist.Normal(torch.zeros(5), 1.0).to_event(1), infer={"is_auxiliary": True}
        )
        pyro.sample("s", dist.Delta(e[0].exp()))
        with pyro.plate("groups", 4):
            pyro.sample("u", dist.Delta(e[1:]))

    em = ExactPosteriorEM(intercepts, guide)
    assert routes(em, Y) == {"s": "guide", "u": "guide"}
    assert "jointly with 's'" in reason(em, "u", Y)


def test_a_latent_that_the_guide_reads_stays() -> None:
    def guide(y: Tensor) -> None:
        with pyro.plate("groups", 4):
            u = pyro.sample("u", dist.Normal(pyro.param("a", torch.zeros(4)), 1.0))
        pyro.sample("s", dist.LogNormal(u.square().mean(), 0.3))

    em = ExactPosteriorEM(intercepts, guide)
    assert routes(em, Y) == {"s": "guide", "u": "guide"}
    assert "guide's site 's' depends on it" in reason(em, "u", Y)

    def given_s(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.1, 0.3))
        with pyro.plate("groups", 4):
            pyro.sample("u", dist.Normal(0.0, s))

    em = ExactPosteriorEM(intercepts, given_s)
    assert routes(em, Y) == {"s": "guide", "u": "guide"}
    assert "depends on the guide's 's'" in reason(em, "u", Y)


def test_a_list_of_guides_loses_the_part_that_is_a_factor() -> None:
    def guide(model: Any) -> AutoGuideList:
        out = AutoGuideList(model)
        out.append(AutoMultivariateNormal(poutine.block(model, expose=["s"])))
        out.append(AutoNormal(poutine.block(model, expose=["u"])))
        return out

    assert routes(ExactPosteriorEM(intercepts, guide), Y) == {"s": "guide", "u": "Gaussian"}


def test_factors_of_a_product_stay_unless_one_is_chosen() -> None:
    em = ExactPosteriorEM(product, AutoNormal)
    assert routes(em, Y) == {"u": "guide", "v": "guide", "w": "Gaussian"}
    assert "exact only given 'v'" in reason(em, "u", Y)
    assert "strategy={'u': 'exact'}" in reason(em, "u", Y)
    em = ExactPosteriorEM(product, AutoNormal, strategy={"u": "exact"})
    assert routes(em, Y) == {"u": "Gaussian", "v": "guide", "w": "Gaussian"}
    em = ExactPosteriorEM(product, AutoNormal, strategy={"u": "exact", "v": "exact"})
    with pytest.raises(UsageError, match="a product of latents 'u' and 'v'"):
        em.plan(Y)


def test_a_latent_that_is_not_linear_frees_those_beside_it() -> None:
    """exp(w) stays drawn whatever u and v are; they are linear given it, and so is the product."""

    def model(y: Tensor) -> None:
        u, v, w = (pyro.sample(n, dist.Normal(0.0, 1.0)) for n in "uvw")
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            loc = u * w.exp() + v * SLOPE
            pyro.sample("y", dist.Normal(loc, positive("noise", 0.8) + t.square()), obs=y)

    em = ExactPosteriorEM(model, AutoNormal)
    assert routes(em, Y) == {"u": "Gaussian", "v": "Gaussian", "w": "guide", "t": "guide"}
    assert "not linear in 'w' (exp)" in reason(em, "w", Y)
    assert "its scale depends on 't'" in reason(em, "t", Y)


REFUSED: dict[str, tuple[Any, str]] = {
    "Poisson of Gaussian 'u'": (lambda u, y: dist.Poisson(u.exp()), "Poisson"),
    "a branch": (lambda u, y: dist.Normal(u if u > 0 else 2 * u, 1.0), "outside autograd"),
    "square": (lambda u, y: dist.Normal(u * u, 1.0), "a product of 'u' with itself"),
    "where": (lambda u, y: dist.Normal(torch.where(u > 0, u, 2 * u), 1.0), "outside autograd"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_latent_without_an_exact_posterior_stays(name: str) -> None:
    child, words = REFUSED[name]

    def model(y: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(0.1, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", child(u, y), obs=y.abs().round())

    em = ExactPosteriorEM(model, AutoNormal)
    assert routes(em, Y) == {"u": "guide"}
    assert words in reason(em, "u", Y)
    notes = ExactPosteriorEM(model, AutoNormal, strategy={"u": "exact"}).plan(Y).notes
    assert [words in n for n in notes if n.startswith("strategy={'u': 'exact'}")] == [True]


def test_masks_and_weights_of_a_latent_keep_it() -> None:
    def model(y: Tensor, how: Any) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5))
        with pyro.plate("rows", len(y)), how:
            u = pyro.sample("u", dist.Normal(0.0, s))
            pyro.sample("y", dist.Normal(u, 1.0), obs=y)

    for how, words in (
        (poutine.mask(mask=Y > 0), "a mask covers it"),
        (poutine.scale(scale=2.0), "poutine.scale weighs it"),
    ):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, AutoNormal)
        assert routes(em, Y, how)["u"] == "guide" and words in reason(em, "u", Y, how)


def test_a_point_estimate_below_a_gaussian_keeps_it_where_it_is() -> None:
    def model(y: Tensor) -> None:
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        p = pyro.sample("p", dist.Normal(u, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(p, 1.0), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("u", dist.Normal(pyro.param("a", torch.tensor(0.0)), 1.0))
        pyro.sample("p", dist.Delta(pyro.param("b", torch.tensor(0.4))))

    em = ExactPosteriorEM(model, guide)
    assert routes(em, Y) == {"u": "guide", "p": "point estimate"}
    assert "point estimate" in reason(em, "u", Y)


def test_a_guide_that_lacks_a_latent_needs_no_more() -> None:
    em = ExactPosteriorEM(intercepts, of_scale)
    assert routes(em, Y) == {"s": "guide", "u": "Gaussian"}
    hidden = ExactPosteriorEM(intercepts, lambda model: AutoDelta(poutine.block(model, hide=["u"])))
    assert routes(hidden, Y) == {"s": "point estimate", "u": "Gaussian"}
    chosen = ExactPosteriorEM(intercepts, "map", strategy={"u": "exact"})
    assert routes(chosen, Y) == {"s": "point estimate", "u": "Gaussian"}
    # The objective is the log evidence of the intercepts plus the log prior of the scale.
    result = hidden.fit(Y, max_steps=200, tol=1e-9, progress=False)
    s, m, noise = (result.params[n] for n in ("AutoDelta.s", "m", "noise"))
    members = torch.nn.functional.one_hot(GROUPS, 4).double()
    covariance = s**2 * members @ members.T + noise**2 * torch.eye(len(Y))
    log_p = dist.MultivariateNormal(m.expand(len(Y)), covariance).log_prob(Y)
    assert result.log_evidence == pytest.approx(float(log_p), abs=1e-9)


# ------------------------------------------------------------------ the bound and its gradient


def linear_model(y: Tensor) -> None:
    """Draws reach coefficients, offsets and variances; one coefficient begins at zero."""
    m, b, k = (pyro.param(n, torch.tensor(v)) for n, v in (("m", 0.3), ("b", 0.0), ("k", 0.7)))
    t = positive("t", 0.9)
    s, w, c = (pyro.sample(n, dist.Gamma(2.0, 2.0)) for n in "swc")
    with pyro.plate("groups", 4):
        u = pyro.sample("u", dist.Normal(k * c, s))
        v = pyro.sample("v", dist.Normal(0.5 * u + k, t * w))
    with pyro.plate("rows", len(y)):
        loc = m + w * u[GROUPS] + SLOPE * b * v[GROUPS] + c
        pyro.sample("y", dist.Normal(loc, t), obs=y)


def dense_model(y: Tensor) -> None:
    """The same with u and v integrated by hand."""
    m, b, k = (pyro.param(n, torch.tensor(v)) for n, v in (("m", 0.3), ("b", 0.0), ("k", 0.7)))
    t = positive("t", 0.9)
    s, w, c = (pyro.sample(n, dist.Gamma(2.0, 2.0)) for n in "swc")
    members = torch.nn.functional.one_hot(GROUPS, 4).double()
    by_v = b * SLOPE[:, None] * members
    by_u = w * members + 0.5 * by_v
    loc = m + c + by_u.sum(-1) * k * c + by_v.sum(-1) * k
    covariance = s**2 * by_u @ by_u.T + (t * w) ** 2 * by_v @ by_v.T + t**2 * torch.eye(len(y))
    pyro.sample("y", dist.MultivariateNormal(loc, covariance), obs=y)


def draws(y: Tensor) -> None:
    for n in "swc":
        pyro.sample(
            n, dist.LogNormal(pyro.param(f"l{n}", torch.tensor(0.1)), positive(f"q{n}", 0.4))
        )


def loss_and_gradients(loss: Any, model: Any, guide: Any, *args: Any) -> tuple[float, Any]:
    store = pyro.get_param_store()._params
    for p in store.values():
        p.grad = None
    pyro.set_rng_seed(5)
    value = loss.loss_and_grads(model, guide, *args)
    return value, {n: None if p.grad is None else p.grad.clone() for n, p in store.items()}


def test_a_drawn_bound_and_its_gradient_are_those_of_the_integrated_model() -> None:
    loss = TraceExact_ELBO(num_particles=2)
    loss.loss(linear_model, draws, Y)  # looks at the model
    value, gradient = loss_and_gradients(loss, linear_model, draws, Y)
    want, by_hand = loss_and_gradients(Trace_ELBO(num_particles=2), dense_model, draws, Y)
    assert value == pytest.approx(want, abs=1e-10)
    assert set(by_hand) == {"m", "b", "k", "t", "ls", "lw", "lc", "qs", "qw", "qc"}
    assert float(by_hand["b"].abs()) > 0.1
    for name, g in by_hand.items():
        assert torch.allclose(gradient[name], g, rtol=0, atol=1e-10), name


def test_a_guide_that_is_kept_has_the_bound_that_it_always_had() -> None:
    def guide(y: Tensor) -> None:
        of_scale(y)
        with pyro.plate("groups", 4):
            pyro.sample("u", dist.Normal(pyro.param("a", torch.zeros(4)), positive("b", 0.6)))

    for strategy in ("guide", {"u": "guide"}):
        loss = TraceExact_ELBO(strategy=strategy)
        loss.loss(intercepts, guide, Y)
        value, gradient = loss_and_gradients(loss, intercepts, guide, Y)
        want, pyros = loss_and_gradients(TraceMeanField_ELBO(), intercepts, guide, Y)
        assert value == pytest.approx(want, abs=1e-10)
        for name, g in pyros.items():
            assert torch.allclose(gradient[name], g, rtol=0, atol=1e-10), name


def test_the_loss_of_a_model_that_is_all_gaussian() -> None:
    def model(y: Tensor) -> None:
        m, b = pyro.param("m", torch.tensor(0.3)), pyro.param("b", torch.tensor(0.0))
        with pyro.plate("groups", 4):
            u = pyro.sample("u", dist.Normal(0.7, positive("t", 0.9)))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(m + b * u[GROUPS], 0.8), obs=y)

    def dense(y: Tensor) -> None:
        m, b = pyro.param("m", torch.tensor(0.3)), pyro.param("b", torch.tensor(0.0))
        members = torch.nn.functional.one_hot(GROUPS, 4).double()
        covariance = (b * positive("t", 0.9)) ** 2 * members @ members.T + 0.64 * torch.eye(len(y))
        pyro.sample("y", dist.MultivariateNormal((m + 0.7 * b).expand(len(y)), covariance), obs=y)

    def nothing(y: Tensor) -> None:
        pass

    value, gradient = loss_and_gradients(TraceExact_ELBO(), model, nothing, Y)
    want, by_hand = loss_and_gradients(Trace_ELBO(), dense, nothing, Y)
    assert value == pytest.approx(want, abs=1e-10) and float(by_hand["b"].abs()) > 0.1
    for name, g in by_hand.items():
        assert torch.allclose(gradient[name], g, rtol=0, atol=1e-10), name
    assert ExactPosteriorEM(model).score(Y) == pytest.approx(-want, abs=1e-10)


MU = torch.tensor([[0.5, -0.3, 1.0], [-1.1, 0.4, 0.2]], dtype=torch.float64)
LOADINGS = torch.tensor(
    [[[1.0, 0.2], [-0.4, 0.9], [0.3, 0.3]], [[0.1, -0.8], [1.2, 0.5], [-0.6, 0.7]]],
    dtype=torch.float64,
)


def test_the_loss_of_a_chain_in_a_loop_over_indices() -> None:
    def model(y: Tensor) -> None:
        a, h = pyro.param("a", torch.tensor(0.8)), torch.tensor(0.2)
        for t in vectorized_markov("time", len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(a * h, positive("s", 0.7)))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("r", 0.5)), obs=y[t])

    def dense(y: Tensor) -> None:
        a, n = pyro.param("a", torch.tensor(0.8)), len(y)
        power = (torch.arange(n)[:, None] - torch.arange(n)).double()
        response = torch.where(power >= 0, a ** power.clamp(min=0), 0.0)
        covariance = positive("s", 0.7) ** 2 * response @ response.T
        covariance = covariance + positive("r", 0.5) ** 2 * torch.eye(n)
        loc = 0.2 * a ** (torch.arange(n) + 1)
        pyro.sample("y", dist.MultivariateNormal(loc, covariance), obs=y)

    def nothing(y: Tensor) -> None:
        pass

    value, gradient = loss_and_gradients(TraceExact_ELBO(), model, nothing, Y)
    want, by_hand = loss_and_gradients(Trace_ELBO(), dense, nothing, Y)
    assert value == pytest.approx(want, abs=1e-10)
    for name, g in by_hand.items():
        assert torch.allclose(gradient[name], g, rtol=0, atol=1e-10), name


def analysers(x: Tensor) -> None:
    """A mixture of factor analysers whose noise is drawn."""
    w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
    mu, loadings = pyro.param("mu", MU), pyro.param("W", LOADINGS)
    prior = pyro.param("prior", MU[:, :2])
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        h = pyro.sample("h", dist.Normal(prior[z], 1.0).to_event(1))
        loc = mu[z] + (loadings[z] @ h.unsqueeze(-1)).squeeze(-1)
        pyro.sample("x", dist.Normal(loc, s).to_event(1), obs=x)


def analysers_by_hand(x: Tensor) -> None:
    w, mu, loadings, prior = (pyro.param(n) for n in ("w", "mu", "W", "prior"))
    s = pyro.sample("s", dist.LogNormal(0.0, 0.5).expand([3]).to_event(1))
    with pyro.plate("rows", len(x)):
        loc = mu + (loadings @ prior.unsqueeze(-1)).squeeze(-1)
        each = dist.MultivariateNormal(loc, loadings @ loadings.mT + torch.diag(s**2))
        pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(w), each), obs=x)


def narrow(x: Tensor) -> None:
    """Draws without noise, and a log density without noise."""
    a = pyro.param("a", torch.tensor([0.8, 1.0, 1.3]))
    pyro.sample("s", dist.Uniform(a, a + 1e-9).to_event(1))


X = torch.tensor(
    [[0.3, -1.2, 0.4], [1.5, 0.2, -0.3], [-0.7, 0.8, 2.1], [0.0, 1.0, -1.0], [2.0, 0.1, 0.9]]
)


def test_bounds_of_batches_average_to_that_of_all_data() -> None:
    x = X.double()
    em = ExactPosteriorEM(analysers, narrow, lambda p: torch.optim.SGD(p, lr=0.0))
    assert routes(em, x) == {"s": "guide", "z": "enumerate", "h": "Gaussian"}
    full = em.elbo(x)
    by_hand = ExactPosteriorEM(analysers_by_hand, narrow).elbo(x).value
    assert full.value == pytest.approx(by_hand, abs=1e-6)
    result = em.fit(x, batch_size=2, num_epochs=1, seed=0, progress=False)
    weighed = np.average(list(result.history), weights=[2, 2, 1])
    assert weighed == pytest.approx(by_hand, abs=1e-6)
    assert result.elbo == pytest.approx(by_hand, abs=1e-6)


def test_the_terms_of_a_bound_and_the_moments_under_draws() -> None:
    """At a draw s all is a mixture of two Gaussians per row, whose moments are known."""
    x = X.double()
    em = ExactPosteriorEM(analysers, narrow)
    terms, q = em.elbo(x), em.posterior(x)
    assert isinstance(q, DrawnPosterior)
    s = pyro.param("a").detach()
    w, mu, loadings, prior = (pyro.param(n).detach() for n in ("w", "mu", "W", "prior"))
    precision = torch.eye(2) + loadings.mT @ torch.diag(s**-2) @ loadings
    covariance = torch.linalg.inv(precision)  # (K, Q, Q)
    residual = (x[:, None] - mu) / s**2
    mean = covariance @ ((loadings.mT @ residual.unsqueeze(-1)).squeeze(-1) + prior).unsqueeze(-1)
    mean = mean.squeeze(-1)  # (N, K, Q)
    each = dist.MultivariateNormal(
        mu + (loadings @ prior.unsqueeze(-1)).squeeze(-1), loadings @ loadings.mT + torch.diag(s**2)
    )
    log_joint = each.log_prob(x[:, None]) + w.log()
    r = torch.softmax(log_joint, -1)
    of_row = (r.unsqueeze(-1) * mean).sum(1)
    off = mean - of_row[:, None]
    mixed = (r[..., None, None] * (covariance + off[..., None] * off[..., None, :])).sum(1)
    assert torch.allclose(q.probs("z", num_particles=1), r, atol=1e-6)
    assert torch.allclose(q.mean("h", num_particles=1), of_row, atol=1e-6)
    assert torch.allclose(q.covariance("h", num_particles=2), mixed, atol=1e-6)
    assert q.mode()["h"].shape == (5, 2)
    known = dist.MultivariateNormal(torch.zeros(2), covariance).entropy()
    entropy = float((r * (known - r.log())).sum()) + 3 * np.log(1e-9)
    assert terms.entropy == pytest.approx(entropy, abs=1e-4)
    assert q.entropy() == pytest.approx(entropy, abs=1e-4)
    fitted = mu + (loadings @ mean.unsqueeze(-1)).squeeze(-1)
    spread = (loadings @ covariance @ loadings.mT).diagonal(dim1=-2, dim2=-1)
    log_p = dist.Normal(fitted, s).log_prob(x[:, None]).sum(-1) - 0.5 * (spread / s**2).sum(-1)
    assert terms.reconstruction == pytest.approx(float((r * log_p).sum()), abs=1e-4)
    assert terms.value == pytest.approx(terms.reconstruction - terms.kl, abs=1e-9)
    sampled = q.sample(25, seed=1)
    assert sampled["h"].shape == (25, 5, 2) and sampled["z"].shape == (25, 5)
    error = (mixed.diagonal(dim1=-2, dim2=-1) / 25).sqrt()
    assert bool(((sampled["h"].mean(0) - of_row).abs() < 5 * error).all())
    drawn = em.predictive(x, num_samples=3, seed=0)
    assert drawn["h"].shape == (3, 5, 2) and drawn["x"].shape == (3, 5, 3)


def test_a_latent_that_crosses_batches_is_refused_by_name() -> None:
    def model(y: Tensor) -> None:
        s, u = pyro.sample("s", dist.LogNormal(0.0, 0.5)), pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u, s), obs=y)

    em = ExactPosteriorEM(model, of_scale)
    with pytest.raises(UsageError, match=r"'u' connect(.|\n)*strategy=\{'u': 'guide'\}"):
        em.fit(Y, batch_size=5, num_epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        em.step(Y)
        em.step(Y)
    with pytest.warns(PyroEMWarning, match=r"'u' is integrated(.|\n)*strategy=\{'u': 'guide'\}"):
        em.step(Y[:5])


def test_an_autoguide_with_rows_of_its_own_takes_no_batches_though_they_are_unused() -> None:
    x = X.double()
    em = ExactPosteriorEM(analysers, AutoNormal)
    assert routes(em, x) == {"s": "guide", "z": "enumerate", "h": "Gaussian"}
    with pytest.raises(UsageError, match=r"each of the 5 rows of 'h'(.|\n)*hide=\['h'\]"):
        em.fit(x, batch_size=2, num_epochs=1, progress=False)


def test_a_fit_leaves_unused_parameters_alone_and_tells_once() -> None:
    em = ExactPosteriorEM(intercepts, AutoNormal, lambda p: torch.optim.Adam(p, lr=0.05))
    with pytest.warns(Warning, match="'AutoNormal.locs.u'") as told:
        em.fit(Y, max_steps=2, progress=False)
        before = pyro.param("AutoNormal.locs.u").detach().clone()
        m = float(pyro.param("m").detach())
        em.fit(Y, max_steps=2, progress=False)
    assert len([w for w in told if "AutoNormal.locs.u" in str(w.message)]) == 1
    assert torch.equal(pyro.param("AutoNormal.locs.u"), before)
    assert float(pyro.param("m").detach()) != m


def test_a_bound_without_the_guide_is_tighter() -> None:
    inside = ExactPosteriorEM(intercepts, AutoNormal).elbo(Y, num_particles=20)
    pyro.clear_param_store()
    drawn = ExactPosteriorEM(intercepts, AutoNormal, strategy="guide").elbo(Y, num_particles=100)
    assert inside.value > drawn.value + 3 * drawn.standard_error


def test_the_gap_of_a_guide_beside_an_exact_posterior() -> None:
    """strategy="guide" keeps the guide, and the gap is its divergence from the posterior."""

    def model(y: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(0.5, 2.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(h, positive("noise", 1.0)), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("h", dist.Normal(pyro.param("a", torch.tensor(0.2)), 0.6))

    em = ExactPosteriorEM(model, guide, strategy="guide")
    precision = 0.25 + len(Y)
    posterior = dist.Normal((0.125 + Y.sum()) / precision, precision**-0.5)
    given = dist.Normal(torch.tensor(0.2), torch.tensor(0.6))
    kl = float(torch.distributions.kl_divergence(given, posterior))
    assert em.elbo(Y, q={"h": given}).gap == pytest.approx(kl, abs=1e-9)
    drawn = em.elbo(Y, num_particles=200)
    assert drawn.log_evidence == pytest.approx(ExactPosteriorEM(model).score(Y), abs=1e-9)
    assert abs(drawn.gap - kl) < 4 * drawn.standard_error
    with pytest.raises(UsageError, match="without an exact posterior"):
        ExactPosteriorEM(intercepts, AutoNormal).elbo(Y, q={"u": dist.Normal(torch.zeros(4), 1.0)})


def test_a_draw_at_which_the_model_bends_is_refused() -> None:
    """A branch on what is drawn is seen at the draw that takes it."""

    def model(y: Tensor) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u.exp() if s > 5 else u, positive("noise", 1.0)), obs=y)

    def guide(y: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.0))
        pyro.sample("s", dist.LogNormal(a, 0.01))

    em = ExactPosteriorEM(model, guide)
    assert routes(em, Y) == {"s": "guide", "u": "Gaussian"}
    found = em._look((Y,), {})
    pyro.get_param_store()["a"] = torch.tensor(3.0)
    with pytest.raises(ModelError, match=r"not linear in 'u' \(exp\), at this draw"):
        found.loss((Y,), {})


def test_a_drawn_child_of_a_gaussian_is_as_good_as_observed() -> None:
    """log rates are drawn, as counts are not Gaussian; their mean is integrated given them."""

    def model(counts: Tensor) -> None:
        h = pyro.sample("h", dist.Normal(pyro.param("k", torch.tensor(0.2)), 1.5))
        with pyro.plate("rows", len(counts)):
            rate = pyro.sample("rate", dist.Normal(h, 0.7))
            pyro.sample("count", dist.Poisson(rate.exp()), obs=counts)

    def by_hand(counts: Tensor) -> None:
        k, n = pyro.param("k", torch.tensor(0.2)), len(counts)
        covariance = 0.49 * torch.eye(n) + 2.25 * torch.ones(n, n)
        rate = pyro.sample("rate", dist.MultivariateNormal(k.expand(n), covariance))
        pyro.sample("count", dist.Poisson(rate.exp()).to_event(1), obs=counts)

    def guide(counts: Tensor) -> None:
        a = pyro.param("a", torch.zeros(4))
        with pyro.plate("rows", len(counts)):
            pyro.sample("rate", dist.Normal(a, 0.5))

    def joint(counts: Tensor) -> None:
        pyro.sample("rate", dist.Normal(pyro.param("a", torch.zeros(4)), 0.5).to_event(1))

    counts = torch.tensor([1.0, 0.0, 4.0, 2.0])
    loss = TraceExact_ELBO()
    loss.loss(model, guide, counts)
    value, gradient = loss_and_gradients(loss, model, guide, counts)
    want, by_dense = loss_and_gradients(Trace_ELBO(), by_hand, joint, counts)
    assert value == pytest.approx(want, abs=1e-10)
    for name, g in by_dense.items():
        assert torch.allclose(gradient[name], g, rtol=0, atol=1e-10), name


def test_a_closed_form_beside_a_guide_takes_the_moments_of_what_is_integrated() -> None:
    """At a draw s = 0.9 the first M-step on the noise is that of the model with this scale."""

    def model(y: Tensor, s: Any = None) -> None:
        s = pyro.sample("s", dist.LogNormal(0.0, 0.5)) if s is None else s
        with pyro.plate("groups", 4):
            u = pyro.sample("u", dist.Normal(0.2, s))
        with pyro.plate("rows", len(y)):
            loc = pyro.param("m", torch.tensor(0.3)) + u[GROUPS]
            pyro.sample("y", dist.Normal(loc, positive("noise", 0.8)), obs=y)

    def guide(y: Tensor) -> None:
        pyro.sample("s", dist.Uniform(0.9, 0.9 + 1e-9))

    held = {"m": Fixed()}
    ExactPosteriorEM(model, updates=held).step(Y, 0.9)
    want = float(pyro.param("noise").detach())
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, guide, updates={"noise": ClosedForm(), **held})
    em.step(Y)
    assert abs(want - 0.8) > 0.01
    assert float(pyro.param("noise").detach()) == pytest.approx(want, abs=1e-6)
    em = ExactPosteriorEM(model, guide, updates={"m": ClosedForm()})
    with pytest.raises(UsageError, match="mean of site 'y'"):
        em.step(Y)


def test_a_chain_beside_a_guide_is_integrated_by_its_filter() -> None:
    """The loss of one draw is that of the walk's dense marginal, and so are its slopes."""
    y = torch.tensor([0.3, -0.8, 0.4, 1.1, 0.9, 1.7, 1.2, 2.0, 2.6])

    def model() -> None:
        step = pyro.sample("step", dist.LogNormal(0.0, 1.0))
        h = torch.zeros(())
        for t in range(len(y)):
            h = pyro.sample(f"h_{t}", dist.Normal(h, step))
            pyro.sample(f"y_{t}", dist.Normal(h, positive("noise", 0.7)), obs=y[t])

    def marginal() -> None:
        step, n = pyro.sample("step", dist.LogNormal(0.0, 1.0)), len(y)
        count = torch.arange(1.0, n + 1)
        walk = step**2 * torch.minimum(count, count.unsqueeze(-1))
        covariance = walk + positive("noise", 0.7) ** 2 * torch.eye(n)
        pyro.sample("y", dist.MultivariateNormal(torch.zeros(n), covariance), obs=y)

    def guide() -> None:
        pyro.sample("step", dist.Delta(positive("there", 0.8)))  # every draw is the same
        if _whole.get("whole"):
            for t in range(len(y)):
                pyro.sample(f"h_{t}", dist.Normal(pyro.param(f"m_{t}", torch.zeros(())), 1.0))

    _whole = {"whole": True}
    plan = str(ExactPosteriorEM(model, guide).plan())
    assert "h_0 … h_8 (9 sites)" in plan and "m_0" in plan
    found = []
    for own, loss in ((model, TraceExact_ELBO()), (marginal, Trace_ELBO())):
        _whole["whole"] = own is model
        pyro.clear_param_store()
        value = loss.loss_and_grads(own, guide)
        slopes = {n: pyro.get_param_store()._params[n].grad.clone() for n in ("there", "noise")}
        found.append((value, slopes))
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-9)
    for name, slope in found[0][1].items():
        torch.testing.assert_close(slope, found[1][1][name], rtol=1e-8, atol=1e-9)
