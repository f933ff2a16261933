"""Mixtures of Gammas, negative binomials and Student distributions in numpy.

All rows and all components at once. Tables are components before rows, so that sums over components
run along rows of memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.special import digamma, gammaln, polygamma
from torch import Tensor
from torch.distributions import constraints as C

from tests.benchmarks.models import iterations
from tests.benchmarks.timing import Steps

Array = NDArray[np.float64]


def responsibilities(log_joint: Array) -> float:
    """Normalise a table of log joint densities in place; the log evidence. # (K, N)"""
    top = log_joint.max(0)
    log_joint -= top
    np.exp(log_joint, out=log_joint)
    mass = log_joint.sum(0)
    log_joint /= mass
    return float(np.log(mass).sum() + top.sum())


def gamma_shape(off: Array) -> Array:
    """The root of log α − ψ(α) = off, by Minka's generalised Newton steps. # (K,)"""
    shape = (3 - off + np.sqrt((off - 3) ** 2 + 24 * off)) / (12 * off)
    for _ in range(50):
        slope = np.log(shape) - digamma(shape) - off
        new = 1 / (1 / shape + slope / (shape**2 * (1 / shape - polygamma(1, shape))))
        done = bool(np.all(np.abs(new - shape) <= 1e-12 * shape))
        shape = new
        if done:
            break
    return shape


def gamma_steps(
    x: Array, start: Mapping[str, Array], steps: int
) -> tuple[list[float], dict[str, Array]]:
    """EM of a mixture of Gammas: the evidence entering each step, and the values after the last."""
    features = np.stack([np.log(x), x])
    w, a, b = start["w"], start["a"], start["b"]
    evidence = []
    for _ in range(steps):
        table = np.stack([a - 1, -b], 1) @ features
        table += (np.log(w) + a * np.log(b) - gammaln(a))[:, None]
        evidence.append(responsibilities(table))
        mass, sums = table.sum(1), table @ features.T
        mean_log, mean = sums.T / mass
        w, a = mass / len(x), gamma_shape(np.log(mean) - mean_log)
        b = a / mean
    return evidence, {"w": w, "a": a, "b": b}


def negative_binomial_shape(x: Array, weight: Array, shape: Array) -> Array:
    """The root of Σ w (ψ(x + r) − ψ(r)) + Σ w log(r / (r + x̄)) = 0, by Newton steps in log r. # (K,)

    Args:
        x: # (N,)
        weight: # (K, N)
        shape: Where to begin. # (K,)
    """
    mass = weight.sum(1)
    mean = weight @ x / mass
    for _ in range(100):
        r = shape[:, None]
        slope = (weight * digamma(x + r)).sum(1) / mass - digamma(shape)
        slope += np.log(shape / (shape + mean))
        curved = (weight * polygamma(1, x + r)).sum(1) / mass - polygamma(1, shape)
        curved += mean / (shape * (shape + mean))
        second = shape * slope + shape**2 * curved
        step = np.where(second < 0, -shape * slope / np.where(second < 0, second, -1.0), 1.0)
        step = np.clip(step, -1, 1)
        shape = shape * np.exp(step)
        if bool(np.all(np.abs(step) <= 1e-10)):
            break
    return shape


def negative_binomial_steps(
    x: Array, start: Mapping[str, Array], steps: int
) -> tuple[list[float], dict[str, Array]]:
    """EM of a mixture of negative binomials; see `gamma_steps`."""
    base = -gammaln(x + 1)
    w, r, p = start["w"], start["r"], start["p"]
    evidence = []
    for _ in range(steps):
        table = gammaln(x + r[:, None])
        table += np.log(p)[:, None] * x
        table += base
        table += (np.log(w) - gammaln(r) + r * np.log1p(-p))[:, None]
        evidence.append(responsibilities(table))
        mass = table.sum(1)
        w, r = mass / len(x), negative_binomial_shape(x, table, r)
        mean = table @ x / mass
        p = mean / (r + mean)
    return evidence, {"w": w, "r": r, "p": p}


def degrees_of_freedom(off: Array, df: Array) -> Array:
    """The root of log(ν/2) − ψ(ν/2) + 1 + off = 0, by Newton steps in log ν. # (K,)

    Args:
        off: The mean of E[log u] − E[u]. # (K,)
        df: Where to begin. # (K,)
    """
    for _ in range(100):
        half = df / 2
        slope = np.log(half) - digamma(half) + 1 + off
        step = slope / (half * polygamma(1, half) - 1)
        df = df * np.exp(np.clip(step, -2, 2))
        if bool(np.all(np.abs(step) <= 1e-10)):
            break
    return df


def student_steps(
    x: Array, start: Mapping[str, Array], steps: int
) -> tuple[list[float], dict[str, Array]]:
    """EM of a mixture of Student distributions whose precisions are latents; see `gamma_steps`."""
    w, df, mu, s = (start[n] for n in ("w", "df", "mu", "s"))
    evidence = []
    for _ in range(steps):
        wide = s * np.sqrt(df)
        z = (x - mu[:, None]) / wide[:, None]
        t = z * z
        log = np.log1p(t)
        constant = gammaln((df + 1) / 2) - gammaln(df / 2) - 0.5 * np.log(np.pi) - np.log(wide)
        table = (-0.5 * (df + 1))[:, None] * log
        table += (np.log(w) + constant)[:, None]
        evidence.append(responsibilities(table))
        mass, most = table.sum(1), 1 + 1 / df
        mean_log = np.einsum("kn,kn->k", table, log) / mass
        t += 1
        table /= t
        first, second = (np.einsum("kn,kn->k", table, part) for part in (z, z * z))
        zeroth = table.sum(1)
        shift = first / zeroth
        w, mu = mass / len(x), mu + wide * shift
        half = (df + 1) / 2
        off = np.log(most) - mean_log + digamma(half) - np.log(half) - most * zeroth / mass
        s = wide * np.sqrt(most * (second - first * shift) / mass)
        df = degrees_of_freedom(off, df)
    return evidence, {"w": w, "df": df, "mu": mu, "s": s}


def weibull_steps(
    x: Array, start: Mapping[str, Array], steps: int
) -> tuple[list[float], dict[str, Array]]:
    """EM of a mixture of Weibulls, shapes by Newton's method on all rows; see `gamma_steps`."""
    y = np.log(x)
    square = y * y
    w, scale, k = start["w"], start["l"], start["k"]
    evidence = []
    for _ in range(steps):
        t = k[:, None] * (y - np.log(scale)[:, None])
        table = t - np.exp(t) - y
        table += (np.log(w) + np.log(k))[:, None]
        evidence.append(responsibilities(table))
        mass, logs = table.sum(1), table @ y
        while True:
            power = table * np.exp(k[:, None] * y)
            zeroth, first, second = power.sum(1), power @ y, power @ square
            slope = mass / k + logs - mass * first / zeroth
            step = slope / (mass / k**2 + mass * (second / zeroth - (first / zeroth) ** 2))
            if np.all(np.abs(step) <= 1e-12 * k):
                break
            k = np.maximum(k + step, k / 4)
        scale, w = (zeroth / mass) ** (1 / k), mass / len(x)
    return evidence, {"w": w, "l": scale, "k": k}


def beside(
    model: Callable[..., None],
    steps: Callable[[Array, Mapping[str, Array], int], object],
    x: Tensor,
    start: Mapping[str, Tensor],
) -> tuple[Steps, Steps]:
    """Steps of ours and of numpy's, on the same data from the same start."""
    arrays = {n: t.numpy() for n, t in start.items()}

    def theirs(n: int) -> None:
        steps(x.numpy(), arrays, n)

    return iterations(model, x, start), theirs


def gamma_data(N: int, K: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Draws of overlapping components, and where to start."""
    torch.manual_seed(0)
    z = torch.randint(K, (N,))
    shape, rate = torch.linspace(2, 20, K).double(), torch.linspace(3, 1, K).double()
    start = {
        "w": torch.full((K,), 1 / K, dtype=torch.float64),
        "a": torch.linspace(1, 9, K).double(),
        "b": torch.linspace(2, 1, K).double(),
    }
    return dist.Gamma(shape[z], rate[z]).sample(), start


def gammas(x: Tensor, start: Mapping[str, Tensor]) -> None:
    """A mixture of Gammas."""
    w = pyro.param("w", start["w"].clone(), constraint=C.simplex)
    a = pyro.param("a", start["a"].clone(), constraint=C.positive)
    b = pyro.param("b", start["b"].clone(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Gamma(a[z], b[z]), obs=x)


def gamma_mixture(N: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy, which keeps all rows."""

    def make() -> tuple[Steps, Steps]:
        x, start = gamma_data(N, K)
        return beside(gammas, gamma_steps, x, start)

    return make


def gammas_by_mean(x: Tensor, start: Mapping[str, Tensor]) -> None:
    """A mixture of Gammas by shape and mean."""
    w = pyro.param("w", start["w"].clone(), constraint=C.simplex)
    a = pyro.param("a", start["a"].clone(), constraint=C.positive)
    m = pyro.param("m", start["a"] / start["b"], constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Gamma(a[z], a[z] / m[z]), obs=x)


def gamma_mixture_by_mean(N: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy, which keeps all rows and has rates."""

    def make() -> tuple[Steps, Steps]:
        x, start = gamma_data(N, K)
        return beside(gammas_by_mean, gamma_steps, x, start)

    return make


def weibulls(x: Tensor, start: Mapping[str, Tensor]) -> None:
    """A mixture of Weibull distributions."""
    w = pyro.param("w", start["w"].clone(), constraint=C.simplex)
    scale = pyro.param("l", start["l"].clone(), constraint=C.positive)
    k = pyro.param("k", start["k"].clone(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Weibull(scale[z], k[z]), obs=x)


def weibull_mixture(N: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy, which keeps all rows and goes through them for each Newton step."""

    def make() -> tuple[Steps, Steps]:
        torch.manual_seed(0)
        z = torch.randint(K, (N,))
        scale, shape = 3.0 ** torch.arange(K).double(), torch.linspace(1.5, 8, K).double()
        start = {
            "w": torch.full((K,), 1 / K, dtype=torch.float64),
            "l": 0.8 * scale,
            "k": 0.75 * shape,
        }
        return beside(weibulls, weibull_steps, dist.Weibull(scale[z], shape[z]).sample(), start)

    return make


def negative_binomials(x: Tensor, start: Mapping[str, Tensor]) -> None:
    """A mixture of negative binomials."""
    w = pyro.param("w", start["w"].clone(), constraint=C.simplex)
    r = pyro.param("r", start["r"].clone(), constraint=C.positive)
    p = pyro.param("p", start["p"].clone(), constraint=C.unit_interval)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.NegativeBinomial(r[z], p[z]), obs=x)


def negative_binomial_mixture(N: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy, which keeps all rows."""

    def make() -> tuple[Steps, Steps]:
        torch.manual_seed(0)
        z = torch.randint(K, (N,))
        shape, p = torch.linspace(2, 20, K).double(), torch.linspace(0.5, 0.8, K).double()
        x = dist.NegativeBinomial(shape[z], p[z]).sample()
        start = {
            "w": torch.full((K,), 1 / K, dtype=torch.float64),
            "r": torch.linspace(1, 9, K).double(),
            "p": torch.linspace(0.4, 0.8, K).double(),
        }
        return beside(negative_binomials, negative_binomial_steps, x, start)

    return make


def students(x: Tensor, start: Mapping[str, Tensor]) -> None:
    """A mixture of Student distributions."""
    w = pyro.param("w", start["w"].clone(), constraint=C.simplex)
    mu = pyro.param("mu", start["mu"].clone())
    df = pyro.param("df", start["df"].clone(), constraint=C.positive)
    s = pyro.param("s", start["s"].clone(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.StudentT(df[z], mu[z], s[z]), obs=x)


def student_mixture(N: int, K: int) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy, which keeps all rows."""

    def make() -> tuple[Steps, Steps]:
        torch.manual_seed(0)
        z = torch.randint(K, (N,))
        places = torch.linspace(-6, 6, K).double()
        x = dist.StudentT(torch.linspace(3, 8, K).double()[z], places[z], 1.5).sample()
        start = {
            "w": torch.full((K,), 1 / K, dtype=torch.float64),
            "mu": places / 2,
            "df": torch.full((K,), 10.0).double(),
            "s": torch.ones(K).double(),
        }
        return beside(students, student_steps, x, start)

    return make
