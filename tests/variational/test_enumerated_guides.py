"""Discrete guide sites that are summed under the guide, above latents that are summed exactly.

Bounds and gradients are held against sums and quadrature that are written out.
"""

from __future__ import annotations

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM

from .test_variational import T, assert_mean, gradients, hierarchy_guide, leaf, variational

pytestmark = pytest.mark.slow

GIVEN = {"strategy": {"[abcy]": "guide"}}  # the rest is summed exactly


def log_normal(x, mean):
    return -0.5 * (x - mean) ** 2 - 0.5 * math.log(2 * math.pi)


# ------------------------------------------------------------------ everything is summed


def nested(x):
    """A global a, b per group, c per row; under them a label z per row, summed exactly."""
    a = pyro.sample("a", dist.Bernoulli(0.4))
    with pyro.plate("g", 2, dim=-2):
        b = pyro.sample("b", dist.Categorical(torch.stack([0.2 + 0.3 * a, 0.8 - 0.3 * a], -1)))
        with pyro.plate("n", x.shape[1], dim=-1):
            c = pyro.sample("c", dist.Bernoulli(0.3 + 0.2 * b))
            z = pyro.sample("z", dist.Categorical(T([0.3, 0.7])))
            pyro.sample("x", dist.Normal(c + b - a + T([-1.0, 2.0])[z], 1.0), obs=x)


def nested_bound(x, la, lb, lc, batch: float = 1.0):
    """Σ_a q(a) [… Σ_b q(b) [… Σ_c q(c) […]]], written out; rows of plate n count `batch` times."""
    total = 0.0
    for a in (0.0, 1.0):
        qa = dist.Bernoulli(logits=la).log_prob(T(a))
        inner = dist.Bernoulli(0.4).log_prob(T(a)) - qa
        for g in range(2):
            for b in (0, 1):
                qb = torch.log_softmax(lb[g], -1)[b]
                group = math.log([0.2 + 0.3 * a, 0.8 - 0.3 * a][b]) - qb
                for n in range(x.shape[1]):
                    for c in (0.0, 1.0):
                        qc = dist.Bernoulli(logits=lc + b - a).log_prob(T(c))
                        data = torch.logsumexp(
                            torch.stack(
                                [
                                    math.log(w) + log_normal(x[g, n], c + b - a + m)
                                    for w, m in ((0.3, -1.0), (0.7, 2.0))
                                ]
                            ),
                            0,
                        )
                        f = dist.Bernoulli(0.3 + 0.2 * b).log_prob(T(c)) + data - qc
                        group = group + batch * qc.exp() * f
                inner = inner + qb.exp() * group
        total = total + qa.exp() * inner
    return total


@pytest.mark.parametrize("batch", [1.0, 3.0])
def test_hierarchy_guides_are_summed_to_1e_8(batch: float) -> None:
    x = T([[0.3, 1.0, -0.2], [1.5, 0.1, 2.0]])
    em = ExactPosteriorEM(nested, hierarchy_guide, **GIVEN)
    v = variational(em, x)
    assert v.routing.enumerated == ("a", "b", "c") and v.routing.exact == ("z",)
    theta = [T(s, requires_grad=True) for s in (0.3, [[0.4, -0.2], [0.1, 0.6]], 0.5)]
    want = nested_bound(x, *theta, batch=batch)
    want.backward()
    loss = v.loss((x,), {}, 1, {"n": batch})
    assert float(loss.detach()) == pytest.approx(-float(want.detach()), abs=1e-8)
    got = gradients(v, ["la", "lb", "lc"], x, draws=1, factors={"n": batch})[0]
    assert torch.allclose(-got, torch.cat([t.grad.reshape(-1) for t in theta]), atol=1e-8)


def test_the_plan_and_the_terms_of_a_bound_without_draws() -> None:
    x = T([[0.3, 1.0, -0.2], [1.5, 0.1, 2.0]])
    em = ExactPosteriorEM(nested, hierarchy_guide, **GIVEN)
    plan = em.plan(x)
    for route in plan.routes:
        words = "exact sum" if route.site == "z" else "enumerated in the guide"
        assert words in route.reason, route
    assert "no draws" in str(plan)
    terms = em.elbo(x, num_particles=3)
    theta = [leaf(n).detach() for n in ("la", "lb", "lc")]
    bound = float(nested_bound(x, *theta))
    evidence = ExactPosteriorEM(nested).elbo(x).log_evidence
    assert terms.value == pytest.approx(bound, abs=1e-8) and terms.standard_error == 0
    assert terms.log_evidence == pytest.approx(evidence, abs=1e-8)
    assert terms.gap == pytest.approx(evidence - bound, abs=1e-8) and terms.gap > 0
    # Reconstruction and entropy from Pyro's own enumeration of the same q, z from its posterior.
    assert terms.reconstruction - terms.kl == pytest.approx(bound, abs=1e-8)
    assert terms.expected_log_joint + terms.entropy == pytest.approx(bound, abs=1e-8)
    reconstruction, entropy = nested_parts(x, *theta)
    assert terms.reconstruction == pytest.approx(reconstruction, abs=1e-8)
    assert terms.entropy == pytest.approx(entropy, abs=1e-8)


def nested_parts(x, la, lb, lc) -> tuple[float, float]:
    """E_q[log p(x | ·)] and H(q) by walking every cell."""
    reconstruction = entropy = 0.0
    for a in (0.0, 1.0):
        qa = float(dist.Bernoulli(logits=la).log_prob(T(a)).exp())
        entropy -= qa * math.log(qa)
        for g in range(2):
            for b in (0, 1):
                qb = float(torch.softmax(lb[g], -1)[b])
                entropy -= qa * qb * math.log(qb)
                for n in range(x.shape[1]):
                    for c in (0.0, 1.0):
                        qc = float(dist.Bernoulli(logits=lc + b - a).log_prob(T(c)).exp())
                        entropy -= qa * qb * qc * math.log(qc)
                        like = T([float(log_normal(x[g, n], c + b - a + m)) for m in (-1.0, 2.0)])
                        post = torch.softmax(like + T([0.3, 0.7]).log(), 0)
                        reconstruction += qa * qb * qc * float((post * like).sum())
                        entropy -= qa * qb * qc * float((post * post.log()).sum())
    return reconstruction, entropy


# ------------------------------------------------------------------ something is drawn below


X = T([2.0, 3.0, -1.0], dtype=torch.float64)
MARKED = {"enumerate": "parallel"}


def tree(family):
    """y, then h given y, both from the guide; z is summed exactly under them."""

    def model(x):
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(T([0.2, 0.5, 0.3])))
            h = pyro.sample("h", family(T([0.7, 1.0, 2.5])[y]))
            z = pyro.sample("z", dist.Bernoulli(0.4)).long()
            pyro.sample("x", dist.Normal(h * T([1.0, -1.0])[z] + y, 1.0), obs=x)

    return model


def tree_guide(family):
    def guide(x):
        logits = pyro.param("logits", T([[0.1, 0.4, -0.2], [0.0, -0.5, 0.3], [0.9, 0.0, 0.0]]))
        at = pyro.param("at", T([0.9, 1.5, 2.0]), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(logits=logits[: len(x)]), infer=MARKED)
            pyro.sample("h", family(at[y]))

    return guide


def tree_bound(x, logits, at, values, log_p, log_q, weights):
    """Σ_y q(y) E_{q(h|y)}[log Σ_z p(x, z, h, y) − log q(h | y) − log q(y)] on a grid of h."""
    total = 0.0
    for n in range(len(x)):
        qs = torch.log_softmax(logits[n], 0)
        for y in range(3):
            h = values(at[y])
            data = torch.logaddexp(
                math.log(0.6) + log_normal(x[n], h + y), math.log(0.4) + log_normal(x[n], -h + y)
            )
            f = math.log([0.2, 0.5, 0.3][y]) - qs[y] + log_p(h, y) + data - log_q(h, at[y])
            total = total + qs[y].exp() * (weights(h, at[y]) * f).sum()
    return total


def poisson_bound(x, logits, at):
    k = torch.arange(60.0)
    return tree_bound(
        x,
        logits,
        at,
        lambda a: k,
        lambda h, y: dist.Poisson([0.7, 1.0, 2.5][y]).log_prob(h),
        lambda h, a: dist.Poisson(a).log_prob(h),
        lambda h, a: dist.Poisson(a).log_prob(h).exp(),
    )


def normal_bound(x, logits, at):
    e, w = np.polynomial.hermite_e.hermegauss(80)
    e, w = T(e), T(w / w.sum())
    return tree_bound(
        x,
        logits,
        at,
        lambda a: a + e,
        lambda h, y: log_normal(h, [0.7, 1.0, 2.5][y]),
        lambda h, a: log_normal(h, a),
        lambda h, a: w,
    )


KINDS = {
    "score function": (dist.Poisson, poisson_bound),
    "reparameterised": (lambda m: dist.Normal(m, 1.0), normal_bound),
}


def written_out(bound, x=X):
    logits = T([[0.1, 0.4, -0.2], [0.0, -0.5, 0.3], [0.9, 0.0, 0.0]], requires_grad=True)
    at = T([0.9, 1.5, 2.0], requires_grad=True)
    value = bound(x, logits, at)
    value.backward()
    assert logits.grad is not None and at.grad is not None
    return float(value.detach()), logits.grad, at.grad * at.detach()  # ∂/∂log at


@pytest.mark.parametrize("kind", list(KINDS))
def test_draws_below_an_enumerated_site(kind: str) -> None:
    family, bound = KINDS[kind]
    em = ExactPosteriorEM(tree(family), tree_guide(family), **GIVEN)
    v = variational(em, X)
    assert v.routing.enumerated == ("y",) and v.routing.exact == ("z",)
    assert set(v.routing.drawn) == {"y", "h"} and not v.is_exact
    value, by_logits, by_at = written_out(bound)
    losses: list[torch.Tensor] = []
    rows = -gradients(v, ["logits", "at"], X, draws=125, losses=losses)
    assert_mean(rows, torch.cat([by_logits.reshape(-1), by_at]))
    assert_mean(torch.stack(losses)[:, None], -value)
    assert_mean(torch.stack(v.draws((X,), {}, 25))[:, None], value)
    terms = em.elbo(X, num_particles=50)
    assert abs(terms.value - value) < 3.5 * terms.standard_error
    assert terms.pointwise is not None
    assert float(terms.pointwise.sum()) == pytest.approx(terms.value, rel=1e-9)
    assert terms.expected_log_joint + terms.entropy == pytest.approx(terms.value, rel=1e-9)


def test_summing_y_takes_its_noise_out_of_the_gradient() -> None:
    family, bound = KINDS["reparameterised"]
    em = ExactPosteriorEM(tree(family), tree_guide(family), **GIVEN)
    v = variational(em, X)
    summed = -gradients(v, ["logits"], X, draws=50)
    drawn = -gradients(v.with_draws_only(), ["logits"], X, draws=50)
    assert_mean(drawn, written_out(bound)[1])
    assert float(summed.var(0).sum()) < 0.5 * float(drawn.var(0).sum())


def test_a_fit_and_its_posterior() -> None:
    family, bound = KINDS["reparameterised"]
    em = ExactPosteriorEM(
        tree(family), tree_guide(family), lambda p: torch.optim.Adam(p, lr=0.1), **GIVEN
    )
    result = em.fit(X, max_steps=50, seed=0, progress=False)
    logits, at = result.params["logits"], result.params["at"]
    best = float(bound(X, logits, at))
    assert best > written_out(bound)[0] + 0.3
    probs = result.posterior.probs("y")
    assert torch.allclose(probs, logits.softmax(-1), atol=1e-12)
    assert set(result.posterior.sample(3, seed=0)) == {"y", "h", "z"}
    assert result.posterior.sample(3, seed=0)["y"].shape == (3, 3)
    estimate = em.estimate_evidence(X, num_particles=200)
    assert estimate.value > best - 5 * (estimate.standard_error or 0.0)


def test_an_impossible_value_counts_nothing() -> None:
    """q(y = 0) = 0 where p(y = 0) = 0: no nan from 0 · ∞."""

    def model(x):
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(T([0.0, 0.5, 0.5])))
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(y + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Categorical(T([0.0, 0.25, 0.75])))

    em = ExactPosteriorEM(model, guide, **GIVEN)
    want = sum(
        q * (math.log(0.5 / q) + float(torch.logaddexp(zero, one)))
        for x in X
        for y, q in ((1, 0.25), (2, 0.75))
        for zero, one in [
            (math.log(0.6) + log_normal(x, y), math.log(0.4) + log_normal(x, y + 1.0))
        ]
    )
    assert em.elbo(X).value == pytest.approx(want, abs=1e-9)


# ------------------------------------------------------------------ what cannot be enumerated so


def reason(em: ExactPosteriorEM, site: str, *args) -> str:
    return next(r.reason for r in em.plan(*args).routes if r.site == site)


def test_a_site_whose_rows_are_coupled_is_drawn() -> None:
    """One label for all rows: Σ_z Π_n would need the values of every row at once."""

    def model(x):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(y + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Bernoulli(logits=pyro.param("l", torch.zeros(()))), infer=MARKED)

    em = ExactPosteriorEM(model, guide, **GIVEN)
    assert "score function" in reason(em, "y", X) and "outside its plates" in reason(em, "y", X)
    rows = gradients(variational(em, X), ["l"], X, draws=200)
    p = T(0.0, requires_grad=True)
    total = 0.0
    for code in range(8):
        y = T([(code >> i) & 1 for i in range(3)], dtype=torch.float64)
        log_q = dist.Bernoulli(logits=p).log_prob(y).sum()
        data = torch.logaddexp(
            math.log(0.6) + log_normal(X, y).sum(), math.log(0.4) + log_normal(X, y + 1).sum()
        )
        total = total + log_q.exp() * (dist.Bernoulli(0.3).log_prob(y).sum() + data - log_q)
    (-total).backward()
    assert p.grad is not None
    assert_mean(rows, p.grad)


@pytest.mark.parametrize(("size", "marked", "summed"), [(32, 0, 1), (33, 0, 0), (33, 1, 1)])
def test_small_or_marked(size: int, marked: bool, summed: bool) -> None:
    def model(x):
        with pyro.plate("n", len(x)):
            y = pyro.sample("y", dist.Categorical(torch.ones(size) / size))
            z = pyro.sample("z", dist.Bernoulli(0.4))
            pyro.sample("x", dist.Normal(y + z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("n", len(x)):
            pyro.sample("y", dist.Categorical(torch.ones(size)), infer=MARKED if marked else {})

    says = reason(ExactPosteriorEM(model, guide, **GIVEN), "y", X)
    assert ("enumerated in the guide" in says) is bool(summed), says
    assert ("score function" in says) is not bool(summed), says
