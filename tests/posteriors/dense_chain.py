"""The joint normal distribution of a chain's states and data by definition, in sixty decimal digits."""

from __future__ import annotations

import decimal
from dataclasses import dataclass
from decimal import Decimal

import numpy as np
import torch
from torch import Tensor

from pyro_em.posteriors.filters.state_space import StateSpace

Exact = np.ndarray  # of Decimal


def exact(x: Tensor) -> Exact:
    return np.vectorize(Decimal, otypes=[object])(x.detach().numpy())


def to_float(x: Exact) -> Tensor:
    return torch.tensor(np.asarray(x, dtype=np.float64))


def cholesky(x: Exact) -> Exact:
    lower = np.full_like(x, Decimal(0))
    for i in range(len(x)):
        for j in range(i + 1):
            rest = x[i, j] - lower[i, :j] @ lower[j, :j]
            lower[i, j] = rest.sqrt() if i == j else rest / lower[j, j]
    return lower


def forward_solve(lower: Exact, x: Exact) -> Exact:
    out = x.copy()
    for i in range(len(x)):
        out[i] = (x[i] - lower[i, :i] @ out[:i]) / lower[i, i]
    return out


@dataclass
class Dense:
    """Log evidence in nats, mean # (T, n) and covariance # (T, n, T, n) of the states given data."""

    log_evidence: Tensor
    mean: Tensor
    covariance: Tensor


def dense(space: StateSpace, chain: int, until: int | None = None) -> Dense:
    """Of one chain, given the data before a step; all if left out."""
    with decimal.localcontext(prec=60):
        return _dense(space, chain, space.steps if until is None else until)


def _dense(space: StateSpace, chain: int, until: int) -> Dense:
    def of(x: Tensor) -> Exact:
        return exact(x[chain if len(x) > 1 else 0])

    A, a, G = of(space.transition), of(space.drift), of(space.noise)
    H, s = of(space.loading), of(space.deviation)
    T, n, k, D = space.steps, space.size, G.shape[-1], H.shape[-2]
    zero = Decimal(0)
    reach, mean = np.full((T, n, T, k), zero), np.full((T, n), zero)
    for t, u in enumerate(space.dynamics.tolist()):
        mean[t] = a[t]
        if t:
            mean[t] = mean[t] + A[u] @ mean[t - 1]
            reach[t] = (A[u] @ reach[t - 1].reshape(n, -1)).reshape(n, T, k)
        reach[t, :, t] = reach[t, :, t] + G[u]
    reach = reach.reshape(T * n, T * k)
    seen = torch.ones(1, T, D) if space.seen is None else space.seen
    here = seen[chain if len(seen) > 1 else 0].numpy().astype(bool)
    rows, variances, values = [], [], []
    for t, v in enumerate(space.measurement.tolist()[:until]):
        for d in np.flatnonzero(here[t]):
            row = np.full((T, n), zero)
            row[t] = H[v, d]
            rows.append(row.ravel())
            variances.append(s[v, d] ** 2)
            values.append(Decimal(space.value[chain, t, d].item()))
    prior = reach @ reach.T
    if not rows:
        return Dense(
            torch.tensor(0.0).double(), to_float(mean), to_float(prior.reshape(T, n, T, n))
        )
    loading = np.stack(rows)
    cross = loading @ prior
    total = cross @ loading.T
    total[np.diag_indices(len(total))] += np.array(variances)
    lower = cholesky(total)
    both = np.concatenate([cross, (np.array(values) - loading @ mean.ravel())[:, None]], 1)
    white = forward_solve(lower, both)
    gain, e = white[:, :-1], white[:, -1]
    logs = sum(x.ln() for x in np.diag(lower))
    tau = (2 * Decimal("3.14159265358979323846264338327950288419716939937510582097")).ln()
    return Dense(
        to_float(-(e @ e) / 2 - logs - len(e) * tau / 2),
        to_float(mean + (gain.T @ e).reshape(T, n)),
        to_float((prior - gain.T @ gain).reshape(T, n, T, n)),
    )
