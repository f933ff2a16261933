"""Numbers that multiply known matrices, matrices that known numbers multiply, degrees of freedom."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.optimize
import scipy.stats as st
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.updates.update import ClosedForm, NewtonOnProfile

A = torch.tensor([[1.0, 0.3, 0.1], [0.3, 0.7, 0.2], [0.1, 0.2, 0.5]], dtype=torch.float64)
ROOT = torch.linalg.cholesky(A)


def data(n: int, seed: int = 0) -> Tensor:
    return torch.as_tensor(np.random.default_rng(seed).normal(size=(n, 3)) * [1.0, 2.0, 0.7] + 0.5)


ARGUMENTS: dict[str, Any] = {
    "covariance_matrix": (lambda s: {"covariance_matrix": s * A}, lambda q, n: q / n),
    "scale_tril": (lambda s: {"scale_tril": ROOT * s}, lambda q, n: (q / n) ** 0.5),
    "precision_matrix": (lambda s: {"precision_matrix": s * A}, lambda q, n: n / q),
}


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_a_number_that_multiplies_a_known_matrix(argument: str) -> None:
    """Two groups with a number of their own, and a shared mean that is known: q = Σ dᵀ Λ d over n D."""
    of, solution = ARGUMENTS[argument]

    def model(x: Tensor, group: Tensor) -> None:
        s = pyro.param("s", torch.tensor([2.0, 0.4]).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            arguments = of(s[group][..., None, None])
            pyro.sample("x", dist.MultivariateNormal(torch.zeros(3).double(), **arguments), obs=x)

    x, group = data(9), torch.arange(9) % 2
    em = ExactPosteriorEM(model)
    decided = em.fit(x, group, max_steps=2, tol=0.0)
    assert isinstance(em.plan(x, group).updates["s"].update, ClosedForm)
    matrix = A.numpy() if argument == "precision_matrix" else np.linalg.inv(A.numpy())
    each = np.einsum("ni,ij,nj->n", x.numpy(), matrix, x.numpy())
    expected = [solution(each[group.numpy() == g].sum(), 3 * (group == g).sum()) for g in (0, 1)]
    assert np.allclose(decided.params["s"].numpy(), expected, rtol=1e-12)


def test_a_mixture_of_multiples_climbs_to_its_maximum_also_in_chunks() -> None:
    x = torch.cat([0.6 * data(20), data(20, 1) + 4])

    def model(x: Tensor) -> None:
        share = pyro.param("share", torch.ones(2).double() / 2, constraint=constraints.simplex)
        m = pyro.param("m", torch.tensor([[0.0] * 3, [3.0] * 3]).double())
        s = pyro.param("s", torch.tensor(1.5).double(), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(share))
            pyro.sample("x", dist.MultivariateNormal(m[z], covariance_matrix=s * A), obs=x)

    result = ExactPosteriorEM(model).fit(x, max_steps=200, tol=1e-12)
    free = {n: v.clone().requires_grad_() for n, v in result.params.items()}
    each = dist.MultivariateNormal(free["m"], covariance_matrix=free["s"] * A)
    value = (each.log_prob(x[:, None]) + free["share"].log()).logsumexp(-1).sum()
    slopes = torch.autograd.grad(value, [free["m"], free["s"]])
    assert result.log_evidence == pytest.approx(float(value.detach()), abs=1e-10)
    assert all(float(slope.abs().max()) < 1e-4 for slope in slopes)
    pyro.clear_param_store()
    whole = ExactPosteriorEM(model).fit(x, max_steps=3, tol=0.0)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(model).fit(Chunks(x, rows=16), max_steps=3, tol=0.0)
    assert list(parts.history) == pytest.approx(list(whole.history), abs=1e-9)


@pytest.mark.parametrize("argument", ARGUMENTS)
def test_the_matrix_of_a_multivariate_t_is_in_closed_form_under_latent_weights(
    argument: str,
) -> None:
    """Robust location and scatter, against iterations in numpy (Lange, Little and Taylor 1989)."""
    x = data(12)
    x[0] += 6
    link = {
        "covariance_matrix": lambda s, w: s / w,
        "scale_tril": lambda s, w: s * w.rsqrt(),
        "precision_matrix": lambda s, w: s * w,
    }[argument]
    inside = (
        constraints.lower_cholesky if argument == "scale_tril" else constraints.positive_definite
    )

    def model() -> None:
        m = pyro.param("m", torch.zeros(3).double())
        s = pyro.param("s", torch.eye(3).double(), constraint=inside)
        with pyro.plate("rows", len(x)):
            w = pyro.sample("w", dist.Gamma(torch.tensor(2.0).double(), 2.0))
            given = {argument: link(s, w[:, None, None])}
            pyro.sample("x", dist.MultivariateNormal(m, **given), obs=x)

    history = ExactPosteriorEM(model).fit(max_steps=5, tol=0.0).history
    m, v, path, rows = np.zeros(3), np.eye(3), [], x.numpy()
    for _ in range(5):
        path.append(st.multivariate_t.logpdf(rows, m, v, 4).sum())
        q = np.einsum("ni,ij,nj->n", rows - m, np.linalg.inv(v), rows - m)
        w = 3.5 / (2 + q / 2)
        m = w @ rows / w.sum()
        v = (w[:, None] * (rows - m)).T @ (rows - m) / len(rows)
    assert list(history)[:5] == pytest.approx(path, abs=1e-10)


_NUMBERS = ("multiples", "of inverses")


@pytest.mark.parametrize(
    "how", ["one scale", "one number", "a known scale", "multiples", "of inverses"]
)
def test_degrees_of_freedom_are_at_the_joint_maximum_after_one_step(how: str) -> None:
    """Observed Wisharts in two groups, against scipy's optimum of their log density."""
    rng = np.random.default_rng(1)
    w = np.stack(
        [st.wishart.rvs(df, np.eye(2) + 0.3, random_state=rng) for df in [5] * 6 + [9] * 8]
    )
    group = torch.tensor([0] * 6 + [1] * 8)
    shared_scale, shared_df = how == "one scale", how == "one number"
    known = torch.eye(2).double() + 0.4

    def model(w: Tensor) -> None:
        first = torch.full((() if shared_df else (2,)), 4.0).double()
        df = pyro.param("df", first, constraint=constraints.greater_than(1.0))
        if how in _NUMBERS:
            s = pyro.param("s", torch.ones(2).double(), constraint=constraints.positive)
            scale = (s[group] * torch.tensor([1.0] * 8 + [2.0] * 6))[:, None, None] * known
        elif how == "a known scale":
            scale = known
        else:
            eye = torch.eye(2).double().expand(*(() if shared_scale else (2,)), 2, 2).clone()
            scale = pyro.param("v", eye, constraint=constraints.positive_definite)
            scale = scale if shared_scale else scale[group]
        with pyro.plate("rows", len(w)):
            own = df if shared_df else df[group]
            name = "precision_matrix" if how == "of inverses" else "covariance_matrix"
            pyro.sample("w", dist.Wishart(own, **{name: scale}), obs=w)

    em = ExactPosteriorEM(model)
    result = em.fit(torch.as_tensor(w), max_steps=1, tol=0.0)
    assert isinstance(em.plan(torch.as_tensor(w)).updates["df"].update, NewtonOnProfile)

    def loss(at: np.ndarray) -> float:
        df = 1 + np.exp(at[: 1 if shared_df else 2])
        rest = at[1 if shared_df else 2 :]
        roots = rest.reshape(-1, 3) if how not in _NUMBERS else rest
        total = 0.0
        for g in (0, 1):
            own = group.numpy() == g
            if how in _NUMBERS:
                # Each with a number of its own: Λ / c is of the scale without it.
                c = np.array([1.0] * 8 + [2.0] * 6)[own]
                v = np.exp(at[2 + g]) * known.numpy()
                if how == "of inverses":
                    c, v = 1 / c, np.linalg.inv(v)
                each = w[own].transpose(1, 2, 0) / c
                total += st.wishart.logpdf(each, df[g], v).sum() - 3 * np.log(c).sum()
                continue
            if how == "a known scale":
                v = known.numpy()
            else:
                a, b, c = roots[min(g, len(roots) - 1)]
                root = np.array([[np.exp(a), 0.0], [b, np.exp(c)]])
                v = root @ root.T
            mine = w[own].transpose(1, 2, 0)
            total += st.wishart.logpdf(mine, df[min(g, len(df) - 1)], v).sum()
        return -total

    scales = 0 if how == "a known scale" else 1 if shared_scale else 2
    start = np.zeros(4 if how in _NUMBERS else (1 if shared_df else 2) + 3 * scales)
    best = scipy.optimize.minimize(loss, start, tol=1e-12)
    assert em.score(torch.as_tensor(w)) == pytest.approx(-best.fun, abs=1e-6)
    df = 1 + np.exp(best.x[: 1 if shared_df else 2])
    assert np.allclose(result.params["df"].numpy().reshape(-1), df, rtol=1e-4)
