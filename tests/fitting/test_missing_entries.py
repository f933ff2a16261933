"""``missing="nan"``: fits of incomplete data, against EM in numpy and against masks by hand."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Annealed, ExactPosteriorEM, Fixed, vectorized_markov

N, D, K = 40, 3, 2


def with_holes(x: Tensor, share: float = 0.3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lost = torch.rand(x.shape, generator=generator, dtype=torch.float64) < share
    return x.clone().masked_fill(lost, torch.nan)


def rows_seen(x: Tensor) -> int:
    return int((~x.isnan().all(-1)).sum())


def some_rows(n: int = N, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randint(0, K, (n, 1), generator=g)
    x = torch.randn(n, D, generator=g, dtype=torch.float64) + 3 * z
    return x @ torch.randn(D, D, generator=g, dtype=torch.float64)


FULL = some_rows()
X = with_holes(FULL)
W = torch.tensor([0.4, 0.6], dtype=torch.float64)
MU = torch.stack([FULL.mean(0) - 1, FULL.mean(0) + 1])
S = torch.cov(FULL.T).repeat(K, 1, 1)
A = torch.tensor([[0.7, 0.3], [0.2, 0.8]], dtype=torch.float64)


def mixture(x, spread="covariance_matrix", tied=False):
    w = pyro.param("w", W.clone(), constraint=C.simplex)
    mu = pyro.param("mu", MU.clone())
    start = S[0] if tied else S
    if spread == "scale_tril":
        s = pyro.param("s", torch.linalg.cholesky(start), constraint=C.lower_cholesky)
    elif spread == "precision_matrix":
        s = pyro.param("s", torch.linalg.inv(start), constraint=C.positive_definite)
    else:
        s = pyro.param("s", start.clone(), constraint=C.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        given = {spread: s if tied else s[z]}
        pyro.sample("x", dist.MultivariateNormal(mu[z], **given), obs=x)


def marginal(x: np.ndarray, mu: np.ndarray, s: np.ndarray) -> float:
    o = ~np.isnan(x)
    return multivariate_normal.logpdf(x[o], mu[o], s[np.ix_(o, o)]) if o.any() else 0.0


def completed(x: np.ndarray, mu: np.ndarray, s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """E[x] and Cov[x] of a row, given what is seen."""
    o = ~np.isnan(x)
    out, cov = x.copy(), np.zeros_like(s)
    b = s[np.ix_(~o, o)] @ np.linalg.inv(s[np.ix_(o, o)])
    out[~o] = mu[~o] + b @ (x[o] - mu[o])
    cov[np.ix_(~o, ~o)] = s[np.ix_(~o, ~o)] - b @ s[np.ix_(o, ~o)]
    return out, cov


def little_and_rubin(x: Tensor, steps: int, tied: bool = False) -> tuple[list[float], Any]:
    """EM of a Gaussian mixture with missing entries; rows without any entry say nothing."""
    rows = x.numpy()
    w, mu, s = (t.numpy().copy() for t in (W, MU, S))
    evidence = []
    for _ in range(steps):
        table = np.array(
            [[np.log(w[k]) + marginal(r, mu[k], s[k]) for k in range(K)] for r in rows]
        )
        top = table.max(1, keepdims=True)
        mass = np.exp(table - top).sum(1, keepdims=True)
        evidence.append(float((top + np.log(mass)).sum()))
        q = np.exp(table - top) / mass
        w = q.mean(0)
        some = ~np.isnan(rows).all(1)
        total, scatter = [], []
        for k in range(K):
            r = q[some, k]
            moments = [completed(row, mu[k], s[k]) for row in rows[some]]
            mean = sum(v * m for v, (m, _) in zip(r, moments, strict=True)) / r.sum()
            scatter.append(
                sum(
                    v * (np.outer(m - mean, m - mean) + c)
                    for v, (m, c) in zip(r, moments, strict=True)
                )
            )
            mu[k] = mean
            total.append(r.sum())
        s = np.array([m / t for m, t in zip(scatter, total, strict=True)])
        if tied:
            s = np.repeat((sum(scatter) / sum(total))[None], K, 0)
    return evidence, (w, mu, s)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("spread", ["covariance_matrix", "scale_tril", "precision_matrix"])
def test_a_mixture_is_that_of_little_and_rubin_step_by_step(spread: str, tied: bool) -> None:
    x = X.clone()
    x[3] = torch.nan
    expected, (w, mu, s) = little_and_rubin(x, 7, tied)
    em = ExactPosteriorEM(mixture, missing="nan")
    result = em.fit(x, spread, tied, max_steps=6, tol=0)
    np.testing.assert_allclose([*result.history, result.log_evidence][:7], expected, rtol=1e-12)
    # One more M-step than evidences were taken at.
    em.step(x, spread, tied)
    np.testing.assert_allclose(pyro.param("w").detach(), w, rtol=1e-8)
    np.testing.assert_allclose(pyro.param("mu").detach(), mu, rtol=1e-8)
    found = pyro.param("s").detach()
    if spread == "scale_tril":
        found = found @ found.mT
    elif spread == "precision_matrix":
        found = torch.linalg.inv(found)
    np.testing.assert_allclose(found.expand(K, D, D), s, rtol=1e-8)
    assert result.num_rows == rows_seen(x) < N


def test_one_normal_vector_is_fitted_by_maximum_likelihood() -> None:
    """At the end the evidence is stationary, and the missing column of some rows is regressed."""

    def model(x):
        mu = pyro.param("mu", torch.zeros(2))
        s = pyro.param("s", torch.eye(2), constraint=C.positive_definite)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, s), obs=x)

    x = FULL[:, :2].clone()
    x[15:, 1] = torch.nan  # monotone missingness has a closed form (Anderson 1957)
    result = ExactPosteriorEM(model, missing="nan").fit(x, tol=1e-13, max_steps=5000)
    a, b = x[:, 0], x[:15]
    slope = torch.cov(b.T, correction=0)[0, 1] / b[:, 0].var(correction=0)
    left = (b[:, 1] - b[:, 1].mean() - slope * (b[:, 0] - b[:, 0].mean())).square().mean()
    mean = torch.stack([a.mean(), b[:, 1].mean() + slope * (a.mean() - b[:, 0].mean())])
    v = a.var(correction=0)
    s = torch.stack([torch.stack([v, slope * v]), torch.stack([slope * v, slope**2 * v + left])])
    torch.testing.assert_close(result.params["mu"], mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.params["s"], s, rtol=1e-5, atol=1e-5)


FAMILIES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "Normal": (
        lambda p, z: dist.Normal(p["a"][z], p["b"][z]),
        {"a": C.real, "b": C.positive},
        lambda x: x,
    ),
    "Poisson": (
        lambda p, z: dist.Poisson(p["b"][z]),
        {"b": C.positive},
        lambda x: x.abs().round(),
    ),
    "Bernoulli": (
        lambda p, z: dist.Bernoulli(p["c"][z]),
        {"c": C.unit_interval},
        lambda x: (x > 0) * 1.0,
    ),
    "Categorical": (
        lambda p, z: dist.Categorical(p["d"][z]),
        {"d": C.simplex},
        lambda x: x.abs().round().clamp(max=3),
    ),
    "Laplace": (
        lambda p, z: dist.Laplace(p["a"][z], p["b"][z]),
        {"a": C.real, "b": C.positive},
        lambda x: x,
    ),
    "Gamma": (
        lambda p, z: dist.Gamma(p["b"][z], p["b"].new_ones(())),
        {"b": C.positive},
        lambda x: x.abs() + 0.1,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_elements_of_their_own_are_masked(name: str) -> None:
    make, constraints, data = FAMILIES[name]
    g = torch.Generator().manual_seed(0)
    starts = {
        "a": torch.randn(K, D, generator=g),
        "b": torch.rand(K, D, generator=g) + 0.5,
        "c": torch.rand(K, D, generator=g),
        "d": torch.rand(K, D, 4, generator=g).softmax(-1),
    }
    x = with_holes(data(FULL))
    x[3] = torch.nan

    def model(x, by_hand):
        p = {n: pyro.param(n, starts[n].clone(), constraint=c) for n, c in constraints.items()}
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            fn = make(p, z)
            if by_hand:
                seen = ~x.isnan()
                pyro.sample("x", fn.mask(seen).to_event(1), obs=x.nan_to_num(1.0))
            else:
                pyro.sample("x", fn.to_event(1), obs=x)

    steps = 2 if name == "Gamma" else 5
    ours = ExactPosteriorEM(model, missing="nan").fit(x, False, max_steps=steps, tol=0)
    pyro.clear_param_store()
    by_hand = ExactPosteriorEM(model).fit(x, True, max_steps=steps, tol=0)
    assert ours.log_evidence == pytest.approx(by_hand.log_evidence, rel=1e-12)
    for n in constraints:
        torch.testing.assert_close(ours.params[n], by_hand.params[n], rtol=1e-9, atol=1e-9)
    assert ours.num_rows == by_hand.num_rows == rows_seen(x) < N


def test_a_mask_below_to_event_and_an_obs_mask_of_coordinates_mean_the_same() -> None:
    # The obs_mask needs a plate of features.
    def in_plates(x, how):
        mu = pyro.param("mu", MU.clone())
        mask = {"obs_mask": ~x.isnan()} if how == "obs_mask" else {}
        with pyro.plate("rows", len(x), dim=-2):
            z = pyro.sample("z", dist.Categorical(W))
            with pyro.plate("features", D, dim=-1):
                fn = dist.Normal(mu[z, torch.arange(D)], 1.0)
                pyro.sample("x", fn, obs=x, **mask)

    def below_to_event(x):
        mu = pyro.param("mu", MU.clone())
        seen = ~x.isnan()
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            fn = dist.Normal(mu[z], 1.0).mask(seen).to_event(1)
            pyro.sample("x", fn, obs=x.nan_to_num())

    ends = []
    for em, args in (
        (ExactPosteriorEM(in_plates, missing="nan"), (X, "")),
        (ExactPosteriorEM(in_plates), (X, "obs_mask")),
        (ExactPosteriorEM(in_plates, missing="nan"), (X, "obs_mask")),
        (ExactPosteriorEM(below_to_event), (X,)),
        (ExactPosteriorEM(below_to_event, missing="nan"), (X,)),
    ):
        pyro.clear_param_store()
        ends.append(em.fit(*args, max_steps=4, tol=0).log_evidence)
    np.testing.assert_allclose(ends, ends[0], rtol=1e-12)


def forward(rows: np.ndarray, spread: np.ndarray) -> float:
    """log p of one sequence by the forward recursion."""
    a = np.log(W.numpy())
    for t, row in enumerate(rows):
        if t:
            a = np.logaddexp.reduce(a[:, None] + np.log(A.numpy()), 0)
        a = a + [marginal(row, MU[k].numpy(), spread[k]) for k in range(K)]
    return float(np.logaddexp.reduce(a))


@pytest.mark.parametrize("complete", [0, 3, N])
@pytest.mark.parametrize("loop", ["markov", "vectorized_markov"])
@pytest.mark.parametrize("kind", ["MultivariateNormal", "Normal"])
def test_a_chain(kind: str, loop: str, complete: int) -> None:
    """Some steps without any missing entry, all of them, or none."""
    spread = S if kind == "MultivariateNormal" else torch.diag_embed(S.diagonal(dim1=1, dim2=2))

    def model(x):
        a = pyro.param("a", A.clone(), constraint=C.simplex)
        mu = pyro.param("mu", MU.clone())
        if kind == "Normal":
            s = pyro.param("s", S.diagonal(dim1=1, dim2=2).sqrt(), constraint=C.positive)
        else:
            s = pyro.param("s", S.clone(), constraint=C.positive_definite)
        steps = pyro.markov(range(len(x))) if loop == "markov" else vectorized_markov("t", len(x))
        z = None
        for t in steps:
            z = pyro.sample(f"z_{t}", dist.Categorical(W if z is None else a[z]))
            make = dist.MultivariateNormal if kind == "MultivariateNormal" else dist.Normal
            fn = make(mu[z], s[z])
            fn = fn.to_event(1) if kind == "Normal" else fn
            pyro.sample(f"x_{t}", fn, obs=x[t])

    x = X[:12].clone()
    x[6] = torch.nan
    x[:complete] = FULL[:12][:complete]
    em = ExactPosteriorEM(model, missing="nan")
    warnings.simplefilter("error")
    assert em.score(x) == pytest.approx(forward(x.numpy(), spread.numpy()), rel=1e-12)
    plan = em.plan(x)
    assert plan.kernel == "chain"
    assert sum(m.entries for m in plan.missing) == int(x.isnan().sum())
    assert all(m.site.startswith("x_") and "<" not in m.site for m in plan.missing)
    result = em.fit(x, max_steps=3, tol=0)
    evidence = [*result.history, result.log_evidence]
    assert min(np.diff(evidence)) > -1e-9
    assert evidence[0] == pytest.approx(forward(x.numpy(), spread.numpy()), rel=1e-12)


def test_a_discriminant_with_labels_seen_and_unseen() -> None:
    """Quadratic discriminant analysis: E[x] of each row at the parameters of its class."""

    def model(x, y, known):
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        mu = pyro.param("mu", MU.clone())
        s = pyro.param("s", S.clone(), constraint=C.positive_definite)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w), obs=y, obs_mask=known)
            pyro.sample("x", dist.MultivariateNormal(mu[z], s[z]), obs=x)

    g = torch.Generator().manual_seed(2)
    y = torch.randint(0, K, (N,), generator=g)
    for known in (torch.rand(N, generator=g) < 0.5, torch.ones(N, dtype=torch.bool)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, missing="nan")
        table = np.array(
            [
                [np.log(float(W[k])) + marginal(r, MU[k].numpy(), S[k].numpy()) for k in range(K)]
                for r in X.numpy()
            ]
        )
        at_label = table[np.arange(N), y.numpy()]
        expected = np.where(known.numpy(), at_label, np.logaddexp.reduce(table, 1)).sum()
        assert em.score(X, y, known) == pytest.approx(expected, rel=1e-12)
        result = em.fit(X, y, known, max_steps=5, tol=0)
        assert min(np.diff([*result.history, result.log_evidence])) > -1e-9
    moments = [completed(r, MU[k].numpy(), S[k].numpy()) for r, k in zip(X.numpy(), y, strict=True)]
    some = ~X.isnan().all(1)
    pyro.clear_param_store()
    em.step(X, y, known)
    for k in range(K):
        own = [m for (m, _), is_own in zip(moments, (y == k) & some, strict=True) if is_own]
        np.testing.assert_allclose(pyro.param("mu").detach()[k], np.mean(own, 0), rtol=1e-9)


def test_a_mixture_distribution_without_a_latent() -> None:
    """MixtureSameFamily over vectors: the marginal of each component."""

    def model(x, kind):
        mu, s = pyro.param("mu", MU.clone()), S
        parts = dist.MultivariateNormal(mu, s)
        if kind == "Normal":
            parts = dist.Normal(mu, s.diagonal(dim1=-2, dim2=-1).sqrt()).to_event(1)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MixtureSameFamily(dist.Categorical(W), parts), obs=x)

    x = X.clone()
    x[:, 2] = torch.nan
    x[3] = torch.nan
    for kind in ("MultivariateNormal", "Normal"):
        spread = S if kind == "MultivariateNormal" else torch.diag_embed(S.diagonal(dim1=1, dim2=2))
        table = [
            [np.log(float(W[k])) + marginal(r, MU[k].numpy(), spread[k].numpy()) for k in range(K)]
            for r in x.numpy()
        ]
        expected = np.logaddexp.reduce(table, 1).sum()
        em = ExactPosteriorEM(model, missing="nan")
        assert em.score(x, kind) == pytest.approx(expected, rel=1e-12)
        result = em.fit(x, kind, max_steps=2, tol=0)
        assert result.log_evidence > expected
        pyro.clear_param_store()


def test_parameters_without_a_closed_form_climb_the_marginal_density() -> None:
    def low_rank(x):
        mu = pyro.param("mu", MU.clone())
        factor = pyro.param("factor", torch.ones(K, D, 1))
        rest = pyro.param("rest", torch.ones(K, D), constraint=C.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.LowRankMultivariateNormal(mu[z], factor[z], rest[z]), obs=x)

    em = ExactPosteriorEM(low_rank, missing="nan")
    s = torch.ones(D, D) + torch.eye(D)
    table = [
        [np.log(float(W[k])) + marginal(r, MU[k].numpy(), s.numpy()) for k in range(K)]
        for r in X.numpy()
    ]
    assert em.score(X) == pytest.approx(np.logaddexp.reduce(table, 1).sum(), rel=1e-12)
    result = em.fit(X, max_steps=2, tol=0)
    assert min(np.diff([*result.history, result.log_evidence])) > -1e-9


def test_whole_events_are_lost_where_their_elements_are_no_coordinates() -> None:
    def model(x):
        a = pyro.param("a", torch.ones(3), constraint=C.positive)
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.Dirichlet(a), obs=x)

    x = torch.rand(6, 3).softmax(-1)
    x[2, 1] = torch.nan
    em = ExactPosteriorEM(model, missing="nan")
    assert em.score(x) == pytest.approx(5 * float(torch.tensor(2.0).log()))
    assert "whole events" in str(em.plan(x))


@settings(max_examples=25)
@given(st.data())
def test_random_patterns(data: st.DataObject) -> None:
    """Rows and columns without any entry, one row, one component, nothing at all, float32."""
    n, k, d = (
        data.draw(st.integers(1, 6)),
        data.draw(st.integers(1, 2)),
        data.draw(st.integers(1, 3)),
    )
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32]))
    is_diagonal = data.draw(st.booleans())
    seen = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n * d, max_size=n * d)))
    g = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    x = torch.randn(n, d, generator=g).masked_fill(~seen.reshape(n, d), torch.nan).to(dtype)
    root = torch.randn(k, d, d, generator=g)
    s, mu = root @ root.mT + 0.5 * torch.eye(d), torch.randn(k, d, generator=g)
    s = torch.diag_embed(s.diagonal(dim1=1, dim2=2)) if is_diagonal else s

    def model(x):
        loc = pyro.param("mu", mu.to(dtype))
        if is_diagonal:
            start = s.diagonal(dim1=1, dim2=2).sqrt().to(dtype)
            spread = pyro.param("s", start, constraint=C.positive)
        else:
            spread = pyro.param("s", s.to(dtype), constraint=C.positive_definite)
        w = pyro.param("w", torch.ones(k, dtype=dtype) / k, constraint=C.simplex)
        with pyro.plate("rows", n):
            z = pyro.sample("z", dist.Categorical(w))
            fn = dist.Normal(loc[z], spread[z]).to_event(1) if is_diagonal else None
            pyro.sample("x", fn or dist.MultivariateNormal(loc[z], spread[z]), obs=x)

    table = [
        [-np.log(k) + marginal(r, mu[j].numpy(), s[j].numpy()) for j in range(k)]
        for r in x.double().numpy()
    ]
    expected = np.logaddexp.reduce(table, 1).sum()
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, missing="nan")
    exact = dtype == torch.float64
    assert em.score(x) == pytest.approx(expected, rel=1e-11 if exact else 1e-4, abs=1e-5)
    responsibilities = em.posterior(x).probs("z")
    right = np.exp(np.array(table) - np.logaddexp.reduce(table, 1)[:, None])
    np.testing.assert_allclose(responsibilities, right, atol=1e-11 if exact else 1e-4)
    fixed = ExactPosteriorEM(model, missing="nan", updates={"s": Fixed()})
    result = fixed.fit(x, max_steps=3, tol=0)
    assert min(np.diff([*result.history, result.log_evidence])) > (-1e-9 if exact else -1e-4)


def test_what_no_row_has_seen_is_no_free_parameter() -> None:
    x = X.clone()
    x[:, 1] = torch.nan
    result = ExactPosteriorEM(mixture, missing="nan").fit(x, max_steps=3)
    pyro.clear_param_store()

    def two_columns(x):
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        mu = pyro.param("mu", MU[:, [0, 2]].clone())
        s = pyro.param("s", S[:, [0, 2]][:, :, [0, 2]].clone(), constraint=C.positive_definite)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], s[z]), obs=x)

    without = ExactPosteriorEM(two_columns, missing="nan").fit(x[:, [0, 2]], max_steps=3)
    assert result.log_evidence == pytest.approx(without.log_evidence, rel=1e-12)
    assert result.bic == pytest.approx(without.bic, rel=1e-12)


@pytest.mark.parametrize("kind", ["MultivariateNormal", "Normal"])
@pytest.mark.parametrize("how", ["chunks", "tables per chunk", "far off"])
def test_kernels_step_as_tables_do(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows in several chunks; too many patterns to be kept; spreads that are tiny beside the data."""
    if how == "tables per chunk":
        monkeypatch.setattr("pyro_em.incomplete.FACTORS", 0)
    full = some_rows(1500)
    full = full * 1e-3 + 1e4 if how == "far off" else full
    x = with_holes(full, 0.4)
    start = torch.cov(full.T).repeat(K, 1, 1)

    def model(x):
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        mu = pyro.param("mu", full[:K].clone())
        if kind == "Normal":
            s = pyro.param("s", start.diagonal(dim1=1, dim2=2).sqrt(), constraint=C.positive)
        else:
            s = pyro.param("s", start.clone(), constraint=C.positive_definite)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            fn = dist.Normal(mu[z], s[z]).to_event(1) if kind == "Normal" else None
            pyro.sample("x", fn or dist.MultivariateNormal(mu[z], s[z]), obs=x)

    em = ExactPosteriorEM(model, missing="nan")
    assert em.plan(x).kernel == "mixture"
    quick = em.fit(x, max_steps=3, tol=0)
    pyro.clear_param_store()
    # An E-step strategy that is exact at temperature one goes through tables.
    slow = ExactPosteriorEM(model, missing="nan", strategy=Annealed(lambda step: 1.0))
    assert slow.plan(x).kernel == "contraction"
    through_tables = slow.fit(x, max_steps=3, tol=0)
    assert quick.log_evidence == pytest.approx(through_tables.log_evidence, rel=1e-11)
    for name in ("w", "mu", "s"):
        expected = through_tables.params[name]
        torch.testing.assert_close(quick.params[name], expected, rtol=1e-6, atol=1e-10)


def test_many_coordinates() -> None:
    """More than one integer can hold the pattern of."""
    d = 70
    g = torch.Generator().manual_seed(0)
    x = with_holes(torch.randn(30, d, generator=g), 0.5)

    def model(x):
        mu = pyro.param("mu", torch.zeros(d))
        with pyro.plate("rows", len(x)):
            pyro.sample("x", dist.MultivariateNormal(mu, 2.0 * torch.eye(d)), obs=x)

    em = ExactPosteriorEM(model, missing="nan")
    expected = dist.Normal(0.0, 2.0**0.5).log_prob(x.nan_to_num())[~x.isnan()].sum()
    assert em.score(x) == pytest.approx(float(expected), rel=1e-12)
    result = em.fit(x, tol=1e-12)
    torch.testing.assert_close(result.params["mu"], x.nanmean(0), rtol=1e-5, atol=1e-5)


def test_several_outputs_of_a_regression() -> None:
    """Each output is its own regression on the rows that have it."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(N, 2, generator=g)
    y = with_holes(u @ torch.randn(2, D, generator=g) + 0.1 * torch.randn(N, D, generator=g))

    def model(u, y):
        b = pyro.param("b", torch.zeros(2, D))
        s = pyro.param("s", torch.ones(D), constraint=C.positive)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(u @ b, s).to_event(1), obs=y)

    result = ExactPosteriorEM(model, missing="nan").fit(u, y)
    for j in range(D):
        own = ~y[:, j].isnan()
        b = torch.linalg.lstsq(u[own], y[own, j : j + 1]).solution[:, 0]
        torch.testing.assert_close(result.params["b"][:, j], b)
        s = (y[own, j] - u[own] @ b).square().mean().sqrt()
        torch.testing.assert_close(result.params["s"][j], s, rtol=1e-6, atol=0)


def test_equal_rows_are_equal_in_what_is_missing_too() -> None:
    """Whole numbers, each row several times: rows are merged where all of them agree."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 3, (12, D), generator=g).double()
    x = with_holes(rows, 0.3)[torch.randint(0, 12, (400,), generator=g)]

    def model(x):
        w = pyro.param("w", W.clone(), constraint=C.simplex)
        mu = pyro.param("mu", torch.stack([torch.zeros(D), 2 * torch.ones(D)]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], torch.eye(D)), obs=x)

    em = ExactPosteriorEM(model, missing="nan")
    assert em.plan(x).kernel == "mixture"
    quick = em.fit(x, max_steps=3, tol=0)
    pyro.clear_param_store()
    slow = ExactPosteriorEM(model, missing="nan", strategy=Annealed(lambda step: 1.0))
    tables = slow.fit(x, max_steps=3, tol=0)
    assert quick.log_evidence == pytest.approx(tables.log_evidence, rel=1e-12)
    torch.testing.assert_close(quick.params["mu"], tables.params["mu"])
