"""Mixtures of Gamma and negative binomial regressions beside numpy.

``python -m tests.benchmarks.dispersed``. Coefficients and dispersion are found by Newton's method. In
numpy tables are components before rows, densities are written by their means, so that coefficients and
dispersion are nearly orthogonal, and gamma functions are taken once for each count that occurs.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from numpy.typing import NDArray
from scipy.special import digamma, gammaln, polygamma
from torch import Tensor
from torch.distributions import constraints as C

from tests.benchmarks.models import iterations
from tests.benchmarks.regressions import table
from tests.benchmarks.timing import Steps

Array = NDArray[np.float64]


class Gammas:
    """Sums of Gamma densities with means m and shapes a.

    Args:
        y: Data. # (N,)
    """

    def __init__(self, y: Array) -> None:
        self.y, self.log_y = y, np.log(y)

    def log_density(self, eta: Array, a: Array) -> Array:
        """Of all rows. # (K, N)"""
        level = self.log_y - eta
        out = a[:, None] * (level - np.exp(-eta) * self.y)
        return out - self.log_y + (a * np.log(a) - gammaln(a))[:, None]

    def sums(self, r: Array) -> Array:
        """What an M-step needs of responsibilities once. # (K,)"""
        return r.sum(1)

    def derivatives(
        self, r: Array, mass: Array, eta: Array, a: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Slope and curvature in η, the mixed curvature, slope and curvature in log a."""
        ratio = self.y * np.exp(-eta)
        level = (r * (self.log_y - eta - ratio)).sum(1)
        weighed = r * ratio
        slope = a[:, None] * (weighed - r)
        lead = a * (level + mass * (1 + np.log(a) - digamma(a)))
        curve = -lead - a * mass * (1 - a * polygamma(1, a))
        return slope, a[:, None] * weighed, -slope, lead, curve


class Counts:
    """Sums of negative binomial densities with means m and shapes a.

    Args:
        y: Counts. # (N,)
    """

    def __init__(self, y: Array) -> None:
        self.y = y
        self.levels, self.which = np.unique(y, return_inverse=True)

    def log_density(self, eta: Array, a: Array) -> Array:
        """Of all rows. # (K, N)"""
        wide = a[:, None]
        known = gammaln(self.levels + wide) - gammaln(wide) - gammaln(self.levels + 1)
        share = np.log1p(np.exp(eta) / wide)
        return known[:, self.which] + self.y * (eta - np.log(wide)) - (self.y + wide) * share

    def sums(self, r: Array) -> Array:
        """How often each count occurs. # (K, levels)"""
        size = len(self.levels)
        return np.stack([np.bincount(self.which, own, size) for own in r])

    def derivatives(
        self, r: Array, often: Array, eta: Array, a: Array
    ) -> tuple[Array, Array, Array, Array, Array]:
        """Slope and curvature in η, the mixed curvature, slope and curvature in log a."""
        wide, mean = a[:, None], np.exp(eta)
        total = wide + mean
        share, rest = mean / total, (self.y - mean) / total
        slope = r * wide * rest
        curve = r * (self.y + wide) * share * (1 - share)
        mixed = -slope * share
        rising = digamma(self.levels + wide) - digamma(wide)
        bent = polygamma(1, self.levels + wide) - polygamma(1, wide)
        lead = a * ((often * rising).sum(1) - (r * (np.log(total / wide) + rest)).sum(1))
        own = (r * (share / wide + rest / total)).sum(1)
        return slope, curve, mixed, lead, -lead - a * a * ((often * bent).sum(1) + own)


def steps_of(
    x: Array, density: Gammas | Counts, p: Array, w: Array, a: Array, steps: int
) -> list[float]:
    """EM: the evidence entering each step."""
    XT, evidence = np.ascontiguousarray(x.T), []
    K, d = w.shape
    for _ in range(steps):
        joint = np.log(p)[:, None] + density.log_density(w @ XT, a)
        top = joint.max(0)
        joint -= top
        np.exp(joint, out=joint)
        mass = joint.sum(0)
        joint /= mass
        evidence.append(float(np.log(mass).sum() + top.sum()))
        p = joint.mean(1)
        sums = density.sums(joint)
        while True:
            slope, curve, mixed, lead, own = density.derivatives(joint, sums, w @ XT, a)
            H = np.zeros((K, d + 1, d + 1))
            H[:, :d, :d] = np.stack([(XT * c) @ x for c in curve])
            H[:, d, :d] = H[:, :d, d] = mixed @ x
            H[:, d, d] = np.maximum(own, np.abs(lead) / 3)  # where it is not concave, go up
            g = np.column_stack([slope @ x, lead])
            step = np.linalg.solve(H, g[..., None])[..., 0]
            step /= np.maximum(np.abs(step).max(1, keepdims=True), 1)  # at most one at a time
            w, a = w + step[:, :d], a * np.exp(step[:, d])
            if not (g * step).sum() > 1e-10:
                break
    return evidence


def regressions(x: Tensor, y: Tensor, start: Tensor) -> None:
    """A mixture of Gamma regressions, or of negative binomial ones where data are counts."""
    K = len(start)
    p = pyro.param("p", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    w = pyro.param("w", start.clone())
    a = pyro.param("a", torch.full((K,), 2.0, dtype=torch.float64), constraint=C.positive)
    counts = bool((y == y.round()).all())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        eta, shape = (x * w[z]).sum(-1), a[z]
        if counts:
            pyro.sample("y", dist.NegativeBinomial(shape, logits=eta - shape.log()), obs=y)
        else:
            pyro.sample("y", dist.Gamma(shape, shape * (-eta).exp()), obs=y)


def dispersed_data(N: int, d: int, K: int, *, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Covariates with a constant, data, and coefficients to begin with."""
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(N), rng.normal(size=(N, d))])
    true = 0.4 * rng.normal(size=(K, d + 1))
    z = rng.integers(0, K, N)
    shape = np.linspace(1.0, 8.0, K)[z]
    rate = rng.gamma(shape, np.exp((X * true[z]).sum(1)) / shape) + 1e-6
    y = rng.poisson(rate).astype(float) if counts else rate
    return torch.tensor(X), torch.tensor(y), torch.tensor(true + 0.2 * rng.normal(size=true.shape))


def dispersed_mixture(N: int, d: int, K: int, *, counts: bool) -> Callable[[], tuple[Steps, Steps]]:
    """Against numpy."""

    def make() -> tuple[Steps, Steps]:
        x, y, start = dispersed_data(N, d, K, counts=counts)
        density = Counts(y.numpy()) if counts else Gammas(y.numpy())
        even, shapes = np.full(K, 1 / K), np.full(K, 2.0)

        def theirs(steps: int) -> None:
            steps_of(x.numpy(), density, even, start.numpy(), shapes, steps)

        return iterations(regressions, x, y, start), theirs

    return make


def main() -> None:
    """Print what a step takes beside numpy's."""
    torch.set_num_threads(1)
    for counts, name in ((False, "Gamma"), (True, "negative binomial")):
        shown = f"mixture of {name} regressions, N=100k, 4 covariates, K=3, against numpy"
        table(shown, dispersed_mixture(100_000, 4, 3, counts=counts)(), 2, 8)


if __name__ == "__main__":
    main()
