"""Observed mixtures whose components become latents: the evidence is Pyro's own, each step that of the
model with the latent written out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.indexing import Vindex
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, Hard, vectorized_markov
from pyro_em.graph.mixtures import component_name, components_of_mixture, is_component
from tests.tracing.test_sparing import Largest

_DRAWN = torch.Generator().manual_seed(3)
SIGN = torch.tensor([-2.0, 2.0], dtype=torch.float64).repeat(15)
X = SIGN + torch.randn(30, generator=_DRAWN, dtype=torch.float64)
V = torch.stack([X, X.roll(2) + torch.randn(30, generator=_DRAWN, dtype=torch.float64)], 1)


def simplex(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64), constraint=C.simplex)


def real(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64))


def positive(name: str, *rows: Any) -> Tensor:
    return pyro.param(name, torch.tensor(rows, dtype=torch.float64), constraint=C.positive)


def observe(name: str, p: Tensor, fn: Callable[[Any], Any], x: Tensor, written_out: bool) -> None:
    """A mixture at a site: as a distribution, or with a latent of its own."""
    if written_out:
        c = pyro.sample(component_name(name), dist.Categorical(p))
        pyro.sample(name, fn(lambda a, event: Vindex(a)[(..., c, *(slice(None),) * event)]), obs=x)
    else:
        parts = fn(lambda a, event: a)
        pyro.sample(name, dist.MixtureSameFamily(dist.Categorical(p), parts), obs=x)


def plain(x: Tensor, written_out: bool) -> None:
    p, mu, sigma = simplex("p", 0.4, 0.6), real("mu", -1.0, 1.0), positive("sigma", 1.0, 2.0)
    with pyro.plate("n", len(x)):
        observe("x", p, lambda at: dist.Normal(at(mu, 0), at(sigma, 0)), x, written_out)


def vectors(x: Tensor, written_out: bool) -> None:
    p, mu = simplex("p", 0.4, 0.6), real("mu", [-1.0, 0.0], [1.0, 1.0])
    eye = torch.eye(2, dtype=torch.float64)
    L = pyro.param("L", 2 * eye.repeat(2, 1, 1), constraint=C.lower_cholesky)

    def fn(at: Any) -> Any:
        return dist.MultivariateNormal(at(mu, 1), scale_tril=at(L, 2))

    with pyro.plate("n", len(x)):
        observe("x", p, fn, x, written_out)


def below_a_latent(x: Tensor, written_out: bool) -> None:
    w, p = simplex("w", 0.3, 0.7), simplex("p", [0.4, 0.6], [0.2, 0.8])
    mu, sigma = real("mu", [-3.0, 0.5], [-1.0, 2.0]), positive("sigma", [1.0], [1.5])
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        own = mu[z], sigma[z].expand(*sigma[z].shape[:-1], 2)
        observe("x", p[z], lambda at: dist.Normal(at(own[0], 0), at(own[1], 0)), x, written_out)


def chain(x: Tensor, written_out: bool, steps: Any = pyro.markov) -> None:
    w, A = simplex("w", 0.3, 0.7), simplex("A", [0.7, 0.3], [0.4, 0.6])
    p, mu = simplex("p", [0.4, 0.6], [0.2, 0.8]), real("mu", [-3.0, 0.5], [-1.0, 2.0])
    z = None
    for t in steps(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(w if z is None else A[z]))
        own, one = mu[z], torch.ones(2, dtype=torch.float64)
        observe(f"x_{t}", p[z], lambda at: dist.Normal(at(own, 0), at(one, 0)), x[t], written_out)


def in_one_loop(x: Tensor, written_out: bool) -> None:
    chain(x, written_out, lambda steps: vectorized_markov("t", len(steps)))


def fitted(model: Callable[..., None], *args: Any, **how: Any) -> Any:
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(model, **how)
        return em.fit(*args, max_steps=3, tol=0, progress=False)


def same(a: Any, b: Any) -> None:
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-12)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-10, atol=1e-10)


CASES: dict[str, tuple[Callable[..., None], Tensor, str]] = {
    "plain": (plain, X, "mixture"),
    "vectors": (vectors, V, "mixture"),
    "below a latent": (below_a_latent, X, "mixture"),
    "chain": (chain, X[:8], ""),
    "chain in one loop": (in_one_loop, X[:8], ""),
}


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_with_the_latent_written_out(case: str) -> None:
    model, x, kernel = CASES[case]
    a, b = (fitted(model, x, written_out) for written_out in (False, True))
    same(a, b)
    assert a.plan.kernel == b.plan.kernel and kernel in (a.plan.kernel, "")
    assert {u.update for u in a.plan.updates.values()} == {
        u.update for u in b.plan.updates.values()
    }
    own = [r for r in a.plan.routes if is_component(r.site)]
    assert own and all(r.reason.startswith("the component of an observed mixture") for r in own)


def test_a_mixture_alone_is_textbook_em() -> None:
    x, (p, mu, sigma) = X.numpy()[:, None], np.array([[0.4, 0.6], [-1.0, 1.0], [1.0, 2.0]])
    for _ in range(3):
        r = p * np.exp(-0.5 * ((x - mu) / sigma) ** 2) / sigma
        r /= r.sum(1, keepdims=True)
        p, mu = r.mean(0), (r * x).sum(0) / r.sum(0)
        sigma = np.sqrt((r * (x - mu) ** 2).sum(0) / r.sum(0))
    result = fitted(plain, X, False)
    for name, expected in (("p", p), ("mu", mu), ("sigma", sigma)):
        np.testing.assert_allclose(result.params[name].numpy(), expected, rtol=1e-12)
    weights, parts = dist.Categorical(torch.tensor(p)), dist.Normal(*map(torch.tensor, (mu, sigma)))
    evidence = dist.MixtureSameFamily(weights, parts).log_prob(X).sum()
    assert result.log_evidence == pytest.approx(float(evidence), rel=1e-12)
    assert result.posterior.probs("x_component").shape == (30, 2)


def test_missing_entries_and_chunks() -> None:
    x = V.clone()
    x[::4, 1] = torch.nan
    a, b = (fitted(vectors, x, written_out, missing="nan") for written_out in (False, True))
    same(a, b)
    same(fitted(vectors, Chunks(x, rows=11), False, missing="nan"), b)


def test_point_estimates() -> None:
    def model(x: Tensor, written_out: bool) -> None:
        p = pyro.sample("p", dist.Dirichlet(torch.tensor([3.0, 2.0], dtype=torch.float64)))
        mu = real("mu", -1.0, 1.0)
        with pyro.plate("n", len(x)):
            one = torch.ones(2, dtype=torch.float64)
            observe("x", p, lambda at: dist.Normal(at(mu, 0), at(one, 0)), x, written_out)

    fits = []
    for written_out in (False, True):
        pyro.set_rng_seed(0)
        fits.append(fitted(model, X, written_out, guide="map"))
    same(*fits)
    assert "x_component" in [r.site for r in fits[0].plan.routes]


def test_where_it_stays_a_distribution() -> None:
    """Another E-step would mean another objective; a name may be taken."""
    with pyro.get_param_store().scope():
        plan = ExactPosteriorEM(below_a_latent, strategy=Hard()).plan(X, False)
        assert [r.site for r in plan.routes] == ["z"] and plan.updates["mu"].kind is None

    def model(x: Tensor) -> None:
        p, mu = simplex("p", 0.4, 0.6), real("mu", -1.0, 1.0)
        with pyro.plate("n", len(x)):
            pyro.sample("x_component", dist.Normal(mu[0], 1.0), obs=x)
            pyro.sample(
                "x", dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(mu, 1.0)), obs=x
            )

    with pyro.get_param_store().scope():
        plan = ExactPosteriorEM(model).plan(X)
        assert not plan.routes and plan.updates["p"].kind is None


def test_a_mixture_is_read_by_its_components_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No density of all components is made for all rows: the reading makes none of the mixture."""
    read = 0
    log_prob = torch.distributions.MixtureSameFamily.log_prob

    def counted(self: Any, value: Tensor) -> Tensor:
        nonlocal read
        read += 1
        return log_prob(self, value)

    monkeypatch.setattr(torch.distributions.MixtureSameFamily, "log_prob", counted)

    plan = ExactPosteriorEM(plain).plan(X, False)
    assert plan.kernel == "mixture" and read == 0


def test_derivatives_of_a_mixture_of_many_rows_have_no_cells_of_rows() -> None:
    """A plate expands the mixture: what is read of it is of the size of its parameters."""
    p, mu, sigma = (torch.ones(3).double().requires_grad_() for _ in range(3))
    fn = dist.MixtureSameFamily(dist.Categorical(p), dist.Normal(mu, sigma))
    parts = components_of_mixture(fn.expand([1000]))
    assert parts is not None
    loc, scale = (parts.arguments[name][0] for name in ("loc", "scale"))
    with Largest() as made:
        own = torch.autograd.grad((loc * scale).sum() + parts.weights.logits.sum(), (p, mu, sigma))
    assert made.bytes <= 8 * 3 and all(g.shape == (3,) for g in own)
