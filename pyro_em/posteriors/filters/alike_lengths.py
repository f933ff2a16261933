"""Chains whose steps are alike, of different lengths: states after a chain's last data are predicted.

    x_t = A x_{t−1} + a_t,     P_t = A P_{t−1} A' + G G',

with the transition and the noise of the model itself. Chains of one length are solved together.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pyro_em.posteriors.filters.alike_arrays import arrays_of
from pyro_em.posteriors.filters.alike_steady import Numbers, Steady
from pyro_em.posteriors.filters.state_space import SmoothedArrays


def arrays_of_lengths(numbers: Numbers, steady: Steady) -> SmoothedArrays | None:
    """What `Smoothed` holds; None where digits would be lost.

    Args:
        numbers: The chains, of any lengths.
        steady: Their steps as if data followed, for all steps.
    """
    lengths = numbers.lengths
    if lengths is None:
        return arrays_of(numbers, steady)
    different, of = np.unique(lengths, return_inverse=True)
    if len(different) == 1:
        return _of_length(numbers, steady, int(different[0]))
    groups = [np.flatnonzero(of == i) for i in range(len(different))]
    found = list[SmoothedArrays]()
    for chains, length in zip(groups, different.tolist(), strict=True):
        drift = numbers.drift if len(numbers.drift) == 1 else numbers.drift[chains]
        own = numbers._replace(value=numbers.value[chains], drift=drift)
        part = _of_length(own, steady, length)
        if part is None:
            return None
        found.append(part)
    arrays = list[Any]()
    for parts in zip(*found, strict=True):
        shape = np.max([x.shape[1:] for x in parts], 0) if parts[0].ndim > 1 else ()
        whole = np.zeros((len(lengths), *shape), parts[0].dtype)
        for chains, x in zip(groups, parts, strict=True):
            whole[(chains, slice(x.shape[1])) if x.ndim > 1 else chains] = x
        arrays.append(whole)
    return SmoothedArrays(*arrays)


def _of_length(numbers: Numbers, steady: Steady, length: int) -> SmoothedArrays | None:
    """The same of chains that have data up to one step."""
    T = numbers.steps
    value, drift = numbers.value[:, :length], numbers.drift[:, :length]
    seen = numbers._replace(value=value, drift=drift, lengths=None)
    found = arrays_of(seen, steady if length == T else steady.until(length))
    return found if found is None or length == T else _predicted(found, numbers)


def _predicted(found: SmoothedArrays, numbers: Numbers) -> SmoothedArrays:
    """The same with the steps after the last data."""
    A, G = numbers.A, numbers.G[0]
    chains, length, n = found.mean.shape
    more = numbers.steps - length
    mean, disturbance = np.zeros((2, chains, numbers.steps, n))
    mean[:, :length], disturbance[:, :length] = found.mean, found.disturbance
    of, kinds = found.which_covariance[0], found.which_transition[0]
    covariances, Q = np.empty((more, n, n)), G.dot(G.T)
    x, P, drift = mean[:, length - 1], found.covariances[0, of[-1]], numbers.drift[:, length:]
    for t in range(more):
        x = mean[:, length + t] = x.dot(A.T) + drift[:, t]
        P = covariances[t] = A.dot(P).dot(A.T) + Q
    last, kind = found.covariances.shape[1], found.transitions.shape[1]
    which = np.arange(last, last + more, dtype=of.dtype)
    return SmoothedArrays(
        found.log_evidence,
        found.log_determinant,
        mean,
        disturbance,
        np.concatenate((found.covariances, covariances[None]), 1),
        np.concatenate((of, which))[None],
        np.concatenate((found.transitions, A[None, None]), 1),
        np.concatenate((found.noises, Q[None, None]), 1),
        np.concatenate((kinds, np.full(more, kind, kinds.dtype)))[None],
    )
