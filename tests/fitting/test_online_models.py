"""Online EM of models whose sums are more than counts, against algorithms that are written out here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.optimize import brentq
from scipy.special import digamma, gammaln
from torch import Tensor
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

from pyro_em import Chunks, ExactPosteriorEM, Gradient, StepSize, UsageError
from pyro_em.fitting.batches import online_steps

Arrays = Sequence[Any]
_random = np.random.default_rng(7)
HALVES = np.array([0.5, 0.5])


def written_out(
    parts: Sequence[Arrays],
    e_step: Callable[..., Arrays],
    m_step: Callable[..., Arrays],
    theta: Arrays,
    online: StepSize | str,
    epochs: int,
) -> Arrays:
    """Cappé and Moulines (2009), or Neal and Hinton (1998), on sums that do not depend on θ."""
    total, held, average, t = sum(len(p[0]) for p in parts), {}, None, 0
    for _ in range(epochs):
        for i, part in enumerate(parts):
            own = e_step(*part, *theta)
            if isinstance(online, str):
                held[i] = own, len(part[0])
                seen = sum(n for _, n in held.values())
                sums = [
                    total / seen * sum(s) for s in zip(*(s for s, _ in held.values()), strict=True)
                ]
            else:
                new = [s * total / len(part[0]) for s in own]
                size = 1.0 if t == 0 else (t + 2) ** -online.exponent
                both = zip(new if average is None else average, new, strict=True)
                sums = average = [(1 - size) * a + size * b for a, b in both]
                t += 1
            theta = m_step(sums, *theta)
    return theta


def parted(*arrays: np.ndarray, rows: int) -> list[Arrays]:
    return [[a[i : i + rows] for a in arrays] for i in range(0, len(arrays[0]), rows)]


def fit(model: Any, chunks: Any, online: Any, epochs: int, **options: Any) -> Any:
    pyro.clear_param_store()
    own = {n: options.pop(n) for n in ("guide", "updates", "missing") if n in options}
    em = ExactPosteriorEM(model, **own)
    return em.fit(chunks, online=online, num_epochs=epochs, progress=False, **options)


def param(name: str, value: Any, constraint: Any = constraints.real) -> Tensor:
    return pyro.param(name, torch.as_tensor(value), constraint=constraint)


def responsibilities(log_p: np.ndarray) -> np.ndarray:
    r = np.exp(log_p - log_p.max(1, keepdims=True))
    return r / r.sum(1, keepdims=True)


def assert_agrees(params: Any, expected: Arrays, names: str) -> None:
    for name, value in zip(names.split(), expected, strict=True):
        np.testing.assert_allclose(params[name].numpy(), value, rtol=1e-9, atol=1e-10)


# ---------------------------------------------------------------- regressions

C = _random.normal(size=(40, 2))
Y = np.where(_random.random(40) < 0.4, 1 + C @ [1.0, 2.0], -1 - C @ [1.0, 0.5])
Y += 0.3 * _random.normal(size=40)
B = np.array([[0.5, 0.5], [-0.5, -0.2]])


def lines(c: Tensor, y: Tensor) -> None:
    w, b = param("w", HALVES, constraints.simplex), param("b", B)
    s = param("s", HALVES + 0.5, constraints.positive)
    with pyro.plate("rows", len(y)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("y", dist.Normal((b[z] * c).sum(-1), s[z]), obs=y)


def sums_of_lines(c: Any, y: Any, w: Any, b: Any, s: Any) -> Arrays:
    r = responsibilities(np.log(w) - np.log(s) - 0.5 * ((y[:, None] - c @ b.T) / s) ** 2)
    gram = np.einsum("nk,ni,nj->kij", r, c, c)
    return r.sum(0), gram, np.einsum("nk,ni,n->ki", r, c, y), r.T @ y**2


def best_lines(sums: Arrays, w: Any, b: Any, s: Any) -> Arrays:
    n, gram, right, squares = sums
    b = np.stack([np.linalg.solve(g, v) for g, v in zip(gram, right, strict=True)])
    rest = squares - 2 * (b * right).sum(1) + np.einsum("ki,kij,kj->k", b, gram, b)
    return n / n.sum(), b, np.sqrt(rest / n)


# ---------------------------------------------------------------- missing entries

X = np.where(_random.random((40, 1)) < 0.5, -2.0, 2.0)
X = X + _random.normal(size=(40, 3)) @ np.array([[1, 0.5, 0], [0, 1, 0.3], [0, 0, 1]])
X[15:30, 1] = np.nan
X[20:25, 2] = np.nan  # the first chunk is complete
M, V = np.stack([-np.ones(3), np.ones(3)]), np.stack([np.eye(3), np.eye(3)])


def clusters(x: Tensor) -> None:
    w, m = param("w", HALVES, constraints.simplex), param("m", M)
    v = param("v", V, constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(m[z], v[z]), obs=x)


def completed_sums(x: Any, w: Any, m: Any, v: Any) -> Arrays:
    log_p, mean, left = np.zeros((len(x), 2)), np.zeros((len(x), 2, 3)), np.zeros((len(x), 2, 3, 3))
    for i, k in np.ndindex(log_p.shape):
        o = ~np.isnan(x[i])
        gain = v[k][:, o] @ np.linalg.inv(v[k][np.ix_(o, o)])
        off = x[i, o] - m[k, o]
        log_p[i, k] = np.log(w[k]) - 0.5 * off @ np.linalg.solve(v[k][np.ix_(o, o)], off)
        log_p[i, k] -= 0.5 * np.linalg.slogdet(2 * np.pi * v[k][np.ix_(o, o)])[1]
        mean[i, k], left[i, k] = m[k] + gain @ off, v[k] - gain @ v[k][o]
    r = responsibilities(log_p)
    second = left + np.einsum("nki,nkj->nkij", mean, mean)
    return r.sum(0), np.einsum("nk,nki->ki", r, mean), np.einsum("nk,nkij->kij", r, second)


def best_clusters(sums: Arrays, w: Any, m: Any, v: Any) -> Arrays:
    n, first, second = sums
    m = first / n[:, None]
    return n / n.sum(), m, second / n[:, None, None] - np.einsum("ki,kj->kij", m, m)


# ---------------------------------------------------------------- Gaussian latents

L = np.array([[0.5], [0.7], [-0.3]])


def factors(x: Tensor) -> None:
    loadings, m = param("L", L), param("m", np.zeros(3))
    s = param("s", np.ones(3), constraints.positive)
    with pyro.plate("rows", len(x)):
        u = pyro.sample("u", dist.Normal(torch.zeros(1, dtype=torch.float64), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(m + u @ loadings.T, s).to_event(1), obs=x)


def sums_of_factors(x: Any, loadings: Any, m: Any, s: Any) -> Arrays:
    seen, gain = ~np.isnan(x), loadings[:, 0] / s**2
    left = 1 / (1 + seen @ (loadings[:, 0] * gain))
    u = left * (np.nan_to_num(x - m) @ gain)
    phi = np.stack([np.stack([u**2 + left, u]), np.stack([u, np.ones_like(u)])])
    known = np.nan_to_num(x)
    right = np.stack([known.T @ u, known.sum(0)], -1)
    return np.einsum("nd,ijn->dij", seen, phi), right, (known**2).sum(0), seen.sum(0).astype(float)


def best_factors(sums: Arrays, loadings: Any, m: Any, s: Any) -> Arrays:
    phi, right, squares, n = sums
    b = np.stack([np.linalg.solve(p, v) for p, v in zip(phi, right, strict=True)])
    rest = squares - 2 * (b * right).sum(1) + np.einsum("di,dij,dj->d", b, phi, b)
    return b[:, :1], b[:, 1], np.sqrt(rest / n)


T = _random.normal(size=(16, 4))
SLOPES = _random.multivariate_normal([1, 2], [[1, 0.4], [0.4, 0.5]], size=16)
G = SLOPES[:, :1] + SLOPES[:, 1:] * T + 0.5 * _random.normal(size=(16, 4))


def slopes(t: Tensor, y: Tensor) -> None:
    a, v = param("a", np.zeros(2)), param("v", np.eye(2), constraints.positive_definite)
    s = param("s", np.array(1.0), constraints.positive)
    with pyro.plate("groups", len(y), dim=-2):
        u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2, dtype=torch.float64), v))
        with pyro.plate("times", y.shape[1], dim=-1):
            mean = a[0] + a[1] * t + u[..., 0] + u[..., 1] * t
            pyro.sample("y", dist.Normal(mean, s), obs=y)


def sums_of_slopes(t: Any, y: Any, a: Any, v: Any, s: Any) -> Arrays:
    x = np.stack([np.ones_like(t), t], -1)
    left = np.linalg.inv(np.linalg.inv(v) + np.einsum("gti,gtj->gij", x, x) / s**2)
    u = np.einsum("gij,gtj,gt->gi", left, x, y - x @ a) / s**2
    rest = y - np.einsum("gti,gi->gt", x, u)
    noise = (rest**2).sum() + np.einsum("gti,gij,gtj->", x, left, x)
    gram, right = np.einsum("gti,gtj->ij", x, x), np.einsum("gti,gt->i", x, rest)
    return gram, right, noise, u.T @ u + left.sum(0), float(len(y))


def best_slopes(sums: Arrays, a: Any, v: Any, s: Any) -> Arrays:
    gram, right, noise, second, n = sums
    a = np.linalg.solve(gram, right)
    rest = noise - 2 * a @ right + a @ gram @ a
    return a, second / n, np.sqrt(rest / (n * T.shape[1]))


# ---------------------------------------------------------------- Student distributions


def students(x: Tensor) -> None:
    w, m = param("w", HALVES, constraints.simplex), param("m", M[:, 0])
    s, df = (param(n, HALVES * k, constraints.positive) for n, k in (("s", 2), ("df", 10)))
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.StudentT(df[z], m[z], s[z]), obs=x)


def sums_of_students(x: Any, w: Any, m: Any, s: Any, df: Any) -> Arrays:
    t, half = ((x[:, None] - m) / s) ** 2, (df + 1) / 2
    log_p = np.log(w) + gammaln(half) - gammaln(df / 2) - 0.5 * np.log(df) - np.log(s)
    r = responsibilities(log_p - half * np.log1p(t / df))
    u = (df + 1) / (df + t)
    logs = np.log(u) + digamma(half) - np.log(half)
    weighed = r * u
    return r.sum(0), weighed.sum(0), weighed.T @ x, weighed.T @ x**2, (r * (logs - u)).sum(0)


def best_students(sums: Arrays, w: Any, m: Any, s: Any, df: Any) -> Arrays:
    n, zeroth, first, second, logs = sums
    m = first / zeroth

    def slope(v: float, k: int) -> float:
        return float(np.log(v / 2) - digamma(v / 2) + 1 + logs[k] / n[k])

    df = np.array([brentq(slope, 1e-2, 1e7, args=(k,), xtol=1e-12) for k in range(2)])
    return n / n.sum(), m, np.sqrt((second - 2 * m * first + m**2 * zeroth) / n), df


STUDENTS = np.where(_random.random(60) < 0.4, -3.0, 3.0) + _random.standard_t(3, size=60)

CASES: dict[str, tuple[Any, ...]] = {
    "lines": (lines, (C, Y), sums_of_lines, best_lines, (HALVES, B, HALVES + 0.5), "w b s"),
    "clusters": (clusters, (X,), completed_sums, best_clusters, (HALVES, M, V), "w m v"),
    "students": (
        students,
        (STUDENTS,),
        sums_of_students,
        best_students,
        (HALVES, M[:, 0], 2 * HALVES, 10 * HALVES),
        "w m s df",
    ),
    "factors": (
        factors,
        (X,),
        sums_of_factors,
        best_factors,
        (L, np.zeros(3), np.ones(3)),
        "L m s",
    ),
    "slopes": (slopes, (T, G), sums_of_slopes, best_slopes, (np.zeros(2), np.eye(2), 1.0), "a v s"),
}


@pytest.mark.parametrize("name", CASES)
def test_steps_are_those_of_the_algorithm(name: str) -> None:
    model, data, e_step, m_step, start, names = CASES[name]
    rows = len(data[0]) // 3
    online: Any = "incremental" if name in ("lines", "slopes") else StepSize(0.7)
    expected = written_out(parted(*data, rows=rows), e_step, m_step, start, online, 2)
    chunks = Chunks(*map(torch.as_tensor, data), rows=rows)
    missing = "nan" if name in ("clusters", "factors") else None
    result = fit(model, chunks, online, 2, missing=missing)
    assert_agrees(result.params, expected, names)


def test_one_group_at_a_time() -> None:
    """Which alone shows no difference between groups."""
    model, data, e_step, m_step, start, names = CASES["slopes"]
    parts = parted(*(a[:4] for a in data), rows=1)
    expected = written_out(parts, e_step, m_step, start, StepSize(0.7), 1)
    chunks = Chunks(*(torch.as_tensor(a[:4]) for a in data), rows=1)
    assert_agrees(fit(model, chunks, StepSize(0.7), 1).params, expected, names)
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    for part in parts:
        em.partial_fit(*map(torch.as_tensor, part), online=StepSize(0.7))
    assert_agrees({n: pyro.param(n).detach() for n in names.split()}, expected, names)


def test_batches_one_after_the_other_are_completed() -> None:
    model, data, e_step, m_step, start, names = CASES["clusters"]
    parts = parted(*data, rows=10)
    expected = written_out(parts, e_step, m_step, start, StepSize(0.7), 1)
    pyro.clear_param_store()
    em = ExactPosteriorEM(model, missing="nan")
    for (part,) in parts:
        before = em.score(torch.tensor(part))
        found = em.partial_fit(torch.tensor(part), online=StepSize(0.7))
        assert found == pytest.approx(before, rel=1e-10)
    assert_agrees({n: pyro.param(n).detach() for n in names.split()}, expected, names)


def test_a_gradient_climbs_on_sums() -> None:
    features = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
    x = X[:, 0]

    def model(x: Tensor) -> None:
        b, m = param("b", np.array([0.3, 0.2])), param("m", np.array([-0.5, 0.4]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=(features @ b) ** 3))
            pyro.sample("x", dist.Normal((4 * torch.tanh(m))[z], 1.0), obs=x)

    def e_step(x: Any, w: Any, m: Any) -> Arrays:
        r = responsibilities(np.log(w) - 0.5 * (x[:, None] - 4 * np.tanh(m)) ** 2)
        return r.sum(0), r.T @ x

    def m_step(sums: Arrays, w: Any, m: Any) -> Arrays:
        return sums[0] / sums[0].sum(), np.arctanh(sums[1] / sums[0] / 4)

    logits = np.array([0.3, 0.5]) ** 3
    start = (np.exp(logits) / np.exp(logits).sum(), np.array([-0.5, 0.4]))
    expected = written_out(parted(x, rows=20), e_step, m_step, start, StepSize(0.6), 1)
    params = fit(model, Chunks(torch.tensor(x), rows=20), StepSize(0.6), 1).params
    np.testing.assert_allclose(params["m"].numpy(), expected[1], rtol=1e-9)
    weights = torch.softmax((features @ params["b"]) ** 3, -1).numpy()
    np.testing.assert_allclose(weights, expected[0], rtol=1e-9)


def test_one_chunk_is_em_on_all_data_whatever_is_outside_the_rows() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(0.0, 2.0).expand([2]).to_event(1))
        s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
        t = param("t", np.array(0.5))
        pyro.sample("once", dist.Normal(t, s), obs=torch.tensor(1.0, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(m[z] + t, s), obs=x)

    x, results = torch.tensor(X[:, 0]), []
    for data, options in (
        (Chunks(x, rows=100), {"online": "incremental", "num_epochs": 2}),
        (x, {"max_steps": 2, "tol": 0}),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = ExactPosteriorEM(model, guide="map")
        results.append(em.fit(data, progress=False, **options))
    assert list(results[0].history) == pytest.approx(list(results[1].history), rel=1e-9)
    torch.testing.assert_close(
        dict(results[0].params), dict(results[1].params), rtol=1e-6, atol=1e-8
    )


def of_several_rows(x: Tensor, e: Tensor) -> None:
    """Exposures, numbers of trials, levels that rows read by an index."""
    r, p = param("r", np.array([1.0, 3.0]), constraints.positive), param("p", HALVES)
    m, s = param("m", np.zeros(2)), param("s", np.array(1.0), constraints.positive)
    level = (x[:, 2] > 0).long()
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4)).long()
        pyro.sample("count", dist.Poisson(r[z] * e), obs=(e * x[:, 1].abs()).round())
        pyro.sample("wins", dist.Binomial((2 + e).round(), p[z]), obs=(x[:, 0] > 1).to(x))
        pyro.sample("x", dist.Normal(m[level], s), obs=x[:, 2])


def vectors(x: Tensor, e: Tensor) -> None:
    """Lines with correlated noise, a kernel alone has the sums of."""
    b = param("b", np.stack([np.eye(2), -np.eye(2)]))
    v = param("v", np.stack([np.eye(2)] * 2), constraints.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Bernoulli(0.4)).long()
        mean = (b[z] @ x[:, :2].unsqueeze(-1)).squeeze(-1)
        y = torch.stack([(x[:, 0] * e).sin(), x[:, 1] - e * x[:, 0]], -1)
        pyro.sample("y", dist.MultivariateNormal(mean, v[z]), obs=y)


@pytest.mark.parametrize("model", [of_several_rows, vectors])
def test_one_batch_is_em_on_all_data(model: Any) -> None:
    x = torch.tensor(np.nan_to_num(X))
    e = 1.0 + x[:, 0].abs()
    one = fit(model, Chunks(x, e, rows=100), "incremental", 3)
    pyro.clear_param_store()
    whole = ExactPosteriorEM(model).fit(x, e, max_steps=3, tol=0, progress=False)
    assert list(one.history) == pytest.approx(list(whole.history), rel=1e-11)
    after = list(one.history.after_m_step)
    assert after == pytest.approx(list(whole.history.after_m_step), rel=1e-11)
    torch.testing.assert_close(dict(one.params), dict(whole.params), rtol=1e-10, atol=1e-11)


def several_data_of_each_row(x: Tensor, e: Tensor) -> None:
    """Arguments that differ within a row: a known spread, one with parameters, known slopes."""
    a, m = param("a", np.array(2.0), constraints.positive), param("m", np.array(0.3))
    s = param("s", np.array(1.0), constraints.positive)
    with pyro.plate("rows", len(x), dim=-2):
        first = pyro.sample("first", dist.Gamma(a, a))
        second = pyro.sample("second", dist.Gamma(a, 1.0))
        slope = pyro.sample("slope", dist.Normal(0.0, a))
        with pyro.plate("columns", x.shape[1], dim=-1):
            pyro.sample("x", dist.Normal(m, s * first.rsqrt()), obs=x)
            pyro.sample("y", dist.Normal(m, second.rsqrt()), obs=x * e.unsqueeze(-1))
            pyro.sample("w", dist.Normal(slope * x.sin(), s), obs=x + e.unsqueeze(-1))


def test_one_batch_of_rows_of_several_data_is_em_on_all_data() -> None:
    x = torch.tensor(np.nan_to_num(X)[:12])
    e = 1.0 + x[:, 0].abs()
    one = fit(several_data_of_each_row, Chunks(x, e, rows=12), "incremental", 2)
    pyro.clear_param_store()
    em = ExactPosteriorEM(several_data_of_each_row)
    whole = em.fit(x, e, max_steps=2, tol=0, progress=False)
    assert list(one.history) == pytest.approx(list(whole.history), rel=1e-11)
    torch.testing.assert_close(dict(one.params), dict(whole.params), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("rows", [1, 10])
def test_covariates_that_all_rows_of_a_chunk_share(rows: int) -> None:
    """Rows in the order of a covariate, or one at a time: no chunk shows that it differs."""
    c, y = torch.arange(4.0).repeat_interleave(rows).double(), torch.tensor(Y[: 4 * rows])

    def model(c: Tensor, y: Tensor) -> None:
        a, b, s = param("a", np.array(0.0)), param("b", np.array(0.0)), np.array(1.0)
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(a + b * c, torch.tensor(s)), obs=y)

    best = np.polyfit(c.numpy(), y.numpy(), 1)
    params = fit(model, Chunks(c, y, rows=rows), "incremental", 1).params
    assert_agrees(params, best, "b a")


@pytest.mark.parametrize("name", ["lines", "clusters"])
def test_kernels_make_the_sums_of_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = CASES[name][:2]
    own = [torch.as_tensor(a).clone() for a in data]
    if name == "clusters":
        own[0][::2, 1] = torch.nan  # in each chunk, so that all of them have the kernel
    chunks, results = Chunks(*own, rows=10), []
    for keeps in (online_steps.keeps_its_meaning, lambda block: False):
        monkeypatch.setattr(online_steps, "keeps_its_meaning", keeps)
        results.append(fit(model, chunks, StepSize(), 2, missing="nan"))
    assert list(results[0].history) == pytest.approx(list(results[1].history), rel=1e-12)
    torch.testing.assert_close(
        dict(results[0].params), dict(results[1].params), rtol=1e-11, atol=1e-12
    )


def test_what_needs_the_rows_themselves_is_refused() -> None:
    def logistic(c: Tensor, y: Tensor) -> None:
        a = param("a", np.array([0.0, 1.0]))
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("y", dist.Bernoulli(logits=a[z] * c), obs=y)

    c = torch.tensor(X[:, 0])
    with pytest.raises(UsageError, match=r"logits of 'y'.*needs the rows themselves"):
        fit(logistic, Chunks(c, (c > 0).to(c), rows=20), StepSize(), 1)
    x = torch.tensor(np.nan_to_num(X))
    shuffled = Chunks(DataLoader(TensorDataset(x), batch_size=8, shuffle=True))
    with pytest.raises(UsageError, match="a loader that shuffles"):
        fit(clusters, shuffled, "incremental", 1)


# ---------------------------------------------------------------- starts, checkpoints


def test_starts_are_found_on_the_first_chunk() -> None:
    x = torch.tensor(np.nan_to_num(X))

    def equal(x: Tensor) -> None:
        w = param("w", HALVES, constraints.simplex)
        m = pyro.param("m", torch.zeros(2, 3, dtype=torch.float64))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(m[z], 1.0).to_event(1), obs=x)

    chunks = Chunks(x, rows=20)
    with pytest.warns(match="the start is symmetric"):  # the first one
        result = fit(equal, chunks, StepSize(), 5, num_restarts=3, seed=0)
    assert "on the first chunk" in result.start
    alone = fit(equal, chunks, StepSize(), 5, init={"z": (x[:20, 0] > 0).long()})
    assert result.log_evidence == pytest.approx(alone.log_evidence, abs=0.5)
    assert alone.log_evidence > fit(equal, chunks, StepSize(), 1).log_evidence + 10


@pytest.mark.parametrize("kind", ["kernel", "tables"])
def test_a_fit_that_was_killed_goes_on_to_the_same_bits(kind: str, tmp_path: Path) -> None:
    x = torch.tensor(np.nan_to_num(X))
    x = torch.cat([x, x.flip(0) + 0.3])
    online: Any = "incremental" if kind == "kernel" else StepSize()
    adam = {"m": Gradient(lambda p: torch.optim.Adam(p, lr=0.1), steps=2)}

    def again(stop: int | None, **kept: Any) -> Any:
        torch.manual_seed(0 if stop is None else stop)
        chunks = Chunks(x, rows=20)
        if kind == "tables":  # in another order in each pass
            chunks = Chunks(DataLoader(TensorDataset(x), batch_size=20, shuffle=True))

        def kill(step: Any) -> None:
            if step.index == stop:
                raise ZeroDivisionError

        options = {"updates": adam} if kind == "tables" else {}
        how = {"callbacks": [kill], "validation": x[:10], "seed": 1}
        return fit(clusters, chunks, online, 2, **options, **how, **kept)

    whole, kept = again(None), {"checkpoint": tmp_path / "run.pt", "checkpoint_every": 2}
    with pytest.raises(ZeroDivisionError):
        again(5, **kept)
    for resumed in (again(99, **kept), again(98, **kept)):
        assert list(resumed.history) == list(whole.history) and whole.num_steps == 8
        assert list(resumed.history.validation) == list(whole.history.validation)
        for name, value in whole.params.items():
            assert torch.equal(resumed.params[name], value)
    with pytest.raises(UsageError, match="belongs to another fit"):
        fit(clusters, Chunks(x, rows=20), StepSize(0.9), 2, **kept)
