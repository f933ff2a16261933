"""Means and covariances of what the first steps of chains show, with their derivatives.

With x_t = F_t ε and the noises of all steps in one vector ε, F_t = A F_{t−1} + (G at the place of its
own noises), so that Cov(y_s, y_t) = H F_s F_tᵀ Hᵀ, and R at s = t; derivatives go along.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Places
from pyro_em.posteriors.chain_sums.state_matrices import ChainMatrices, Entry
from pyro_em.posteriors.chain_sums.state_sites import Site

_MANY = 2**22  # numbers of all derivatives together
_STEP = 1e-5  # of differences of matrices, most of which are linear


@dataclass(frozen=True, eq=False)
class _Observed:
    """The matrices of what is seen, as the model has them.

    Attributes:
        move: A. # (chains|1, U, n, n)
        drift: a. # (chains|1, L, n)
        noise: G. # (chains|1, U, n, k)
        loading: H. # (chains|1, V, D, n)
        root: L with R = L Lᵀ. # (chains|1, V, D, D)
        offset: # (chains|1, L, D)
    """

    move: Numbers
    drift: Numbers
    noise: Numbers
    loading: Numbers
    root: Numbers
    offset: Numbers


def moments_of_first(
    matrices: ChainMatrices, theta: Numbers, columns: Places, levels: int
) -> Numbers | None:
    """Derivatives of all means and covariances of the first steps, whatever of them is missing.

    Args:
        matrices: The chains.
        theta: The parameters.
        columns: Elements of θ.
        levels: How many steps are looked at.

    Returns:
        None where they are too many. # (moments, columns)

    Raises:
        LinAlgError: If a covariance is none.
    """
    transition, _, noise, loading, _, value = matrices.bare
    chains = len(value)
    L, D, n, p = min(levels, value.shape[1]), value.shape[2], loading.shape[-1], len(columns)
    k, lead = noise.shape[-1], max(len(transition), len(loading))
    if (
        lead * p * (L * D) ** 2 > _MANY
        or chains * p * L * D > _MANY
        or lead * p * n * L * k > _MANY
    ):
        return None
    at = _matrices(matrices, theta, L)
    slope = _slopes(matrices, theta, columns, L)
    # A dimension for columns in front: (columns, chains, …).
    half, moved = np.zeros((lead, n, L * k)), np.zeros((p, lead, n, L * k))
    mean, drifted = np.zeros((chains, n, 1)), np.zeros((p, chains, n, 1))
    seen, slopes, means, own = [], [], [], []
    dynamics, measurement = matrices.dynamics.tolist(), matrices.measurement.tolist()
    for t, (u, v) in enumerate(zip(dynamics[:L], measurement[:L], strict=True)):
        A, dA = at.move[:, u], slope.move[:, :, u]
        if t:
            moved = A @ moved + dA @ half
            drifted = A @ drifted + dA @ mean
            half, mean = A @ half, A @ mean
        here = slice(t * k, t * k + k)
        half[..., here] += at.noise[:, u]
        moved[..., here] += slope.noise[:, :, u]
        mean = mean + at.drift[:, t, :, None]
        drifted = drifted + slope.drift[:, :, t, :, None]
        H, dH = at.loading[:, v], slope.loading[:, :, v]
        seen.append(H @ half)
        slopes.append(H @ moved + dH @ half)
        means.append((H @ drifted + dH @ mean)[..., 0] + slope.offset[:, :, t])
        R, dR = at.root[:, v], slope.root[:, :, v]
        both = dR @ R.swapaxes(-1, -2)
        own.append(both + both.swapaxes(-1, -2))
    F, dF = np.concatenate(seen, -2), np.concatenate(slopes, -2)
    both = dF @ F.swapaxes(-1, -2)
    covariance = both + both.swapaxes(-1, -2)
    for t, noises in enumerate(own):
        here = slice(t * D, t * D + D)
        covariance[..., here, here] += noises
    low = np.tril_indices(L * D)
    parts = (
        np.concatenate(means, -1).reshape(p, -1),
        covariance[..., low[0], low[1]].reshape(p, -1),
    )
    out: Numbers = np.concatenate(parts, -1).T
    return out


def _matrices(matrices: ChainMatrices, theta: Numbers, levels: int) -> _Observed:
    """The matrices at parameters."""
    transition, drift, noise, loading, _, value = matrices.bare
    D = value.shape[2]
    out = [transition.copy(), drift[:, :levels].copy(), noise.copy(), loading.copy()]
    root = np.zeros((*loading.shape[:2], D, D))
    held = [s.offset.constant.shape[1] for s in matrices.sites if not s.is_latent]
    offset = np.zeros((max(held), levels, D))
    for site, where, kinds in zip(matrices.sites, matrices.where, matrices.kinds, strict=True):
        of_C, of_spread, of_last = where
        C, spread = site.coefficients.at(theta)[0], site.spread.at(theta)
        b = site.offset.at(theta)
        b = b.swapaxes(0, 1).reshape(b.shape[1], b.shape[0], -1)
        if C.size:
            of_C.into(out[0 if site.is_latent else 3], C.reshape(len(C), 1, -1))
        last = out[1] if site.is_latent else offset
        few = int((of_last.place[:, 0] < last[0].size).sum())
        Entry(of_last.place[:few], of_last.is_twice).into(last, b[:, :few])
        flat = spread.reshape(len(spread), 1, -1)
        if site.is_latent:
            of_spread.into(out[2], flat)
        else:
            _of_root(site, kinds, D).into(root, flat)
    A, a, G, H = out
    return _Observed(A, a, G, H, root, offset)


def _of_root(site: Site, kinds: Places, D: int) -> Entry:
    """Where deviations, or factors of covariances, go among those of all that is seen at a step."""
    own = site.own
    place = own * (D + 1)
    if site.spread.is_matrix:
        place = own[:, :, None] * D + own[:, None]
    return Entry(place.reshape(1, -1) + kinds[:, None] * D * D, False)


def _slopes(matrices: ChainMatrices, theta: Numbers, columns: Places, levels: int) -> _Observed:
    """Derivatives of the matrices; columns come first."""
    found = []
    for c in columns.tolist():
        ends = []
        step = _STEP * (1 + abs(theta[c]))
        for sign in (1, -1):
            moved = theta.copy()
            moved[c] += sign * step
            ends.append((moved[c], _matrices(matrices, moved, levels)))
        (high, above), (low, below) = ends
        pairs = zip(vars(above).values(), vars(below).values(), strict=True)
        found.append([(x - y) / (high - low) for x, y in pairs])
    return _Observed(*(np.stack(x) for x in zip(*found, strict=True)))
