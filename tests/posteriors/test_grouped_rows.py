"""Mixtures whose parameters a known group of each row chooses: joint tables, tables, numpy."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor
from torch.distributions import constraints as C

import pyro_em.plan.program as programs
import pyro_em.posteriors.mixtures.grouped_rows as grouped_rows
from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.plan.eligibility import Kernel
from pyro_em.posteriors.mixtures.grouped_rows import GroupedRows
from pyro_em.testing import check_block

_DRAWN = torch.Generator().manual_seed(3)
N = 90
X = torch.randn(N, 2, generator=_DRAWN, dtype=torch.float64)
G = torch.randint(0, 3, (N,), generator=_DRAWN)
G[-1] = 3  # a group of one row
H = G.clamp(max=2)  # without it
S = torch.randint(0, 3, (N,), generator=_DRAWN)


def _param(name: str, value: Tensor, x: Tensor, constraint: Any = C.real) -> Tensor:
    return pyro.param(name, value.to(x.dtype), constraint=constraint)


def _prior(x: Tensor) -> Tensor:
    rows = [
        [0.3, 0.7],
        [0.5, 0.5],
        [0.8, 0.2],
        [0.4, 0.6],
        [0.1, 0.9],
    ]  # no row is of the last group
    return _param("p", torch.tensor(rows), x, C.simplex)


def priors(
    x: Tensor, g: Tensor, ok: Tensor | None = None, often: Tensor | None = None, full: bool = False
) -> None:
    """Weights by group; components are those of all."""
    p, mu = _prior(x), _param("mu", torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), x)
    s = _param("s", torch.tensor([[1.0, 1.2], [0.8, 1.0]]), x, C.positive)
    L = _param("L", torch.eye(2).repeat(2, 1, 1), x, C.lower_cholesky) if full else s
    counted = nullcontext() if often is None else pyro.poutine.scale(scale=often)
    with pyro.plate("n", len(x)), counted:
        z = pyro.sample("z", dist.Categorical(p[g]))
        fn = dist.MultivariateNormal(mu[z], scale_tril=L[z]) if full else dist.Normal(mu[z], s[z])
        fn = fn if full else fn.to_event(1)
        pyro.sample("x", fn if ok is None else fn.mask(ok), obs=x)


def full(x: Tensor, g: Tensor) -> None:
    """The same with full covariances."""
    priors(x, g, full=True)


def means(x: Tensor, g: Tensor, ok: Tensor | None = None, often: Tensor | None = None) -> None:
    """Weights and means by group; spreads by component, and a density that no group reaches."""
    p, mu = _prior(x), _param("mu", torch.arange(8.0).reshape(4, 2) / 4 - 1, x)
    s, nu = (
        _param("s", torch.tensor([1.0, 0.8]), x, C.positive),
        _param("nu", torch.tensor([0.0, 1]), x),
    )
    counted = nullcontext() if often is None else pyro.poutine.scale(scale=often)
    with pyro.plate("n", len(x)), counted:
        z = pyro.sample("z", dist.Categorical(p[g]))
        fn = dist.Normal(mu[g, z], s[z])
        pyro.sample("x", fn if ok is None else fn.mask(ok), obs=x[:, 0])
        pyro.sample("y", dist.Normal(nu[z], 1.0), obs=x[:, 1])


def own(x: Tensor, g: Tensor) -> None:
    """Means and covariances of each group and component, and a prior of all."""
    p = _param("p", torch.tensor([0.4, 0.6]), x, C.simplex)
    mu = _param("mu", torch.arange(12.0).reshape(3, 2, 2) / 8 - 1, x)
    L = _param("L", torch.eye(2).repeat(3, 2, 1, 1), x, C.lower_cholesky)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.MultivariateNormal(mu[g, z], scale_tril=L[g, z]), obs=x)


def crossed(x: Tensor, g: Tensor, s: Tensor) -> None:
    """Two ways in which rows are grouped, and no latent in one of them."""
    p, mu = _prior(x), _param("mu", torch.arange(6.0).reshape(3, 2) / 3 - 1, x)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("x", dist.Normal(mu[s, z], 1.0), obs=x[:, 0])
        pyro.sample(
            "c", dist.Poisson(_param("r", torch.tensor([0.7, 1.5]), x, C.positive)[z]), obs=s.to(x)
        )


def items(x: Tensor, g: Tensor, s: Tensor) -> None:
    """Latent classes: prevalences by group, and answers that depend on it."""
    p = _prior(x)
    q = _param(
        "q",
        torch.tensor([0.2, 0.7, 0.4, 0.6, 0.3, 0.5, 0.8, 0.1]).reshape(4, 2),
        x,
        C.unit_interval,
    )
    E = _param("E", torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.3, 0.5]]), x, C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("b", dist.Bernoulli(q[g, z]), obs=(x[:, 0] > 0).to(x))
        pyro.sample("s", dist.Categorical(E[z]), obs=s)


def tails(x: Tensor, g: Tensor) -> None:
    """Families with rows of their own kinds, by group."""
    p, mu = _prior(x), _param("mu", torch.arange(6.0).reshape(3, 2) / 4 - 1, x)
    a = _param("a", torch.linspace(1.0, 2.0, 6).reshape(3, 2), x, C.positive)
    b, k = (
        _param("b", torch.ones(3, 2), x, C.positive),
        _param("k", a.detach() + 0.3, x, C.positive),
    )
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("x", dist.StudentT(4.0, mu[g, z], 1.0), obs=x[:, 0])
        pyro.sample("y", dist.Gamma(a[g, z], b[g, z]), obs=x[:, 1].abs() + 0.1)
        pyro.sample("w", dist.Weibull(b[g, z], k[g, z]), obs=x[:, 0].abs() + 0.1)


def lines(x: Tensor, g: Tensor) -> None:
    """Regressions of components whose weights are those of the group."""
    p, w = _prior(x), _param("w", torch.tensor([[0.5, -0.5], [0.0, 1.0]]), x)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p[g]))
        pyro.sample("y", dist.Normal((x * w[z]).sum(-1), 1.0), obs=x[:, 0] - 0.5 * x[:, 1] ** 2)


OK = X[:, 0] > -0.8
CASES: dict[str, tuple[Callable[..., None], tuple[Tensor, ...]]] = {
    "priors": (priors, (X, G)),
    "weighed": (priors, (X, G, OK, X[:, 1].square() + 0.5)),
    "full": (full, (X, G)),
    "means": (means, (X, G, OK, X[:, 1].square() + 0.5)),
    "own": (own, (X, H)),
    "crossed": (crossed, (X, G, S)),
    "items": (items, (X, G, S)),
    "tails": (tails, (X, H)),
    "lines": (lines, (X, G)),
}


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups of few rows, in chunks of fewer than they have."""
    monkeypatch.setattr(grouped_rows, "_ROWS", 1)


def same(a: Any, b: Any, rtol: float = 1e-9) -> None:
    """The same evidence at every step, and the same parameters."""
    assert list(a.history) == pytest.approx(list(b.history), rel=rtol)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=100 * rtol, atol=100 * rtol)


def both(
    monkeypatch: pytest.MonkeyPatch, model: Callable[..., None], *data: Any, **how: Any
) -> tuple[Any, Any]:
    """The same fit by the kernel and through tables."""
    out = []
    for quick in (True, False):
        with monkeypatch.context() as patch, pyro.get_param_store().scope():
            if not quick:
                patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
            em = ExactPosteriorEM(model, **how)
            out.append(em.fit(*data, max_steps=3, tol=0, progress=False))
            assert out[-1].plan.kernel == ("mixture" if quick else "contraction")
    return out[0], out[1]


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_that_of_tables(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = CASES[case]
    seven = property(lambda self: 7, lambda self, size: None)
    monkeypatch.setattr(GroupedRows, "chunk", seven, raising=False)
    same(*both(monkeypatch, model, *data))


@pytest.mark.parametrize("case", ["priors", "means", "items"])
def test_against_the_joint_table(case: str) -> None:
    model, data = CASES[case]
    rows = torch.tensor([0, 1, 2, 3, 4, N - 1])
    check_block(GroupedRows, model, *(t[rows] for t in data[:3]), states=1)


def test_a_group_without_rows_keeps_its_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    same(*both(monkeypatch, means, X, H))


def test_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    same(*both(monkeypatch, priors, X.float(), G), rtol=1e-5)
    same(*both(monkeypatch, own, X.float(), H), rtol=1e-5)


def test_rows_that_occur_again_are_counted_in_their_group(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = []
    with monkeypatch.context() as patch:
        finished = GroupedRows._finished.__func__  # type: ignore[attr-defined]
        patch.setattr(
            GroupedRows,
            "_finished",
            classmethod(lambda *a: blocks.append(found := finished(*a)) or found),
        )
        same(*both(monkeypatch, items, (X.sign() + 1), G, S))
    assert 0 < blocks[0].N < 30


def test_a_fit_is_that_of_numpy() -> None:
    """Weights by group: ten steps of EM, written down once more."""
    x, g = X.numpy(), G.numpy()
    with pyro.get_param_store().scope():
        found = ExactPosteriorEM(priors).fit(X, G, max_steps=10, tol=0, progress=False)
    p = np.array([[0.3, 0.7], [0.5, 0.5], [0.8, 0.2], [0.4, 0.6], [0.1, 0.9]])
    mu, s = np.array([[-1.0, 0.5], [1.0, 0.0]]), np.array([[1.0, 1.2], [0.8, 1.0]])
    for _ in range(10):
        joint = np.log(p[g]) + norm.logpdf(x[:, None], mu, s).sum(-1)
        r = np.exp(joint - logsumexp(joint, 1, keepdims=True))
        for j in range(4):
            p[j] = r[g == j].mean(0)
        mu = r.T @ x / r.sum(0)[:, None]
        s = np.sqrt(np.einsum("nk,nkd->kd", r, (x[:, None] - mu) ** 2) / r.sum(0)[:, None])
    np.testing.assert_allclose(found.params["p"], p, rtol=1e-9)
    np.testing.assert_allclose(found.params["mu"], mu, rtol=1e-9)
    np.testing.assert_allclose(found.params["s"], s, rtol=1e-9)


@pytest.mark.parametrize("model", [priors, means])
def test_chunks_with_other_groups_say_the_same(model: Callable[..., None]) -> None:
    order = G.argsort()
    found = []
    for data in ((X[order], G[order]), (Chunks(X[order], G[order], rows=25),)):
        with pyro.get_param_store().scope():
            em = ExactPosteriorEM(model)
            found.append(em.fit(*data, max_steps=3, tol=0, progress=False))
    same(*found)


def test_what_differs_from_row_to_row_is_no_group() -> None:
    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.full((N, 2), 0.5).double(), constraint=C.simplex)
        mu = pyro.param("mu", torch.zeros(N, 2).double() + X[:2, 0])
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(p))
            pyro.sample("x", dist.Normal(mu[torch.arange(N), z], 1.0), obs=x)

    grouped_rows._ROWS = 16
    with pyro.get_param_store().scope():
        plan = ExactPosteriorEM(model).plan(X[:, 0])
    assert plan.kernel == "contraction"
    assert "differ from row to row" in plan.kernel_reason


def test_what_is_known_of_rows_stays_with_them() -> None:
    """Rows that are put in the order of their groups keep their totals."""
    totals = torch.arange(N).double() % 7 + 1
    seen = torch.minimum(totals, S.double())

    def model(g: Tensor, s: Tensor, n: Tensor) -> None:
        p = pyro.param("p", torch.tensor([0.2, 0.7]).double(), constraint=C.unit_interval)
        q = pyro.param("q", torch.rand(4, 2, 3).double().softmax(-1), constraint=C.simplex)
        with pyro.plate("n", len(g)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6]).double()))
            pyro.sample("s", dist.Categorical(q[g, z]), obs=S)
            pyro.sample("x", dist.Binomial(n, p[z]), obs=s)

    with pyro.get_param_store().scope():
        found = ExactPosteriorEM(model).fit(G, seen, totals, max_steps=1, progress=False)
    with pyro.get_param_store().scope() as store:
        model(G, seen, totals)
        store["p"], store["q"] = found.params["p"], found.params["q"]
        joint = torch.tensor([0.4, 0.6]).double().log() + store["q"][G, :, S].log()
        joint = joint + dist.Binomial(totals.unsqueeze(-1), store["p"]).log_prob(seen[:, None])
    assert found.log_evidence == pytest.approx(float(joint.logsumexp(-1).sum()), rel=1e-10)


def test_latents_without_data_are_no_rows_of_a_kernel() -> None:
    def model(x: Tensor, g: Tensor) -> None:
        p, mu = _prior(x), _param("mu", torch.zeros(2), x)
        with pyro.plate("n", len(x)):
            pyro.sample("z", dist.Categorical(p[g]))
            pyro.sample("x", dist.Normal(mu, 1.0).to_event(1), obs=x)

    with pyro.get_param_store().scope():
        found = ExactPosteriorEM(model).fit(X, G, max_steps=1, progress=False)
    torch.testing.assert_close(found.params["mu"], X.mean(0))
