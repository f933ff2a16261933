"""Sums of second moments over the steps of Gaussian chains, for M-steps: see `linear_moments`.

With φ = (u, f) of what a row reads and of known features, and r = y − b − C u at the E-step, an M-step
needs Σ E[φ φᵀ], Σ E[r φᵀ] and Σ E[r rᵀ]. Means enter by one product of matrices; covariances, which do
not depend on the data, by sums over steps. Where matrices of steps repeat, so does what is computed of
them: with A − Φ the same from s to t,

    Σ Cov(G ε, x before) = −(A − Φ) Σ P before,
    Σ Cov(G ε)           = Σ C + (A − Φ) (Σ P before) (A − Φ)ᵀ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Places
from pyro_em.posteriors.chain_sums.state_sites import Site
from pyro_em.posteriors.filters.state_space import Smoothed


@dataclass(frozen=True, eq=False)
class SiteNumbers:
    """The arguments of a site at some parameters.

    Attributes:
        coefficients: C. # (lead|1, K, D, Q)
        spread: Deviations, or factors of covariances. # (lead|1, K, D, …)
        residual: The data less what is known of their means; None for latents. # (chains, N, K, D)
    """

    coefficients: Numbers
    spread: Numbers
    residual: Numbers | None


@dataclass(frozen=True, eq=False)
class SiteSums:
    """Sums over the steps of a site, and over the chains that share its arguments.

    Attributes:
        phi_phi: Σ E[φ φᵀ], of each entry where their weights differ. # (lead, K, D|1, q, q)
        r_phi: Σ E[r φᵀ]. # (lead, K, D, q)
        r_r: Σ E[r rᵀ] or its diagonal. # (lead, K, D, D) or (lead, K, D)
    """

    phi_phi: Numbers
    r_phi: Numbers
    r_r: Numbers


@dataclass(frozen=True, eq=False)
class States:
    """What a smoother says of some chains, as arrays.

    Attributes:
        found: The smoother's results.
        mean: # (chains, T, n)
        disturbance: E[G ε]. # (chains, T, n)
        noises: Σ Cov(G ε) by kind of step. # (chains|1, U, n, n)
        shared: Σ Cov(G ε, x before). # (chains|1, U, n, n)
        before: Σ P before. # (chains|1, U, n, n)
    """

    found: Smoothed
    mean: Numbers
    disturbance: Numbers
    noises: Numbers
    shared: Numbers
    before: Numbers

    @classmethod
    def of(cls, found: Smoothed, transition: Numbers, dynamics: Places) -> States:
        """From a smoother's results.

        Args:
            found: The results.
            transition: A. # (chains|1, U, n, n)
            dynamics: Which of the U each step has. # (T,)
        """
        P, moved, noise = (x.numpy() for x in (found.covariances, found.transitions, found.noises))
        of_P, of_move = found.which_covariance.numpy(), found.which_transition.numpy()
        L, T = of_P.shape
        n, U = P.shape[-1], transition.shape[1]
        # Runs of steps with the same matrices, and of states before them with the same covariance.
        new = np.ones((L, T), np.bool_)
        np.not_equal(of_move[:, 1:], of_move[:, :-1], out=new[:, 1:])
        new[:, 1:] |= dynamics[1:] != dynamics[:-1]
        new[:, 2:] |= of_P[:, 1:-1] != of_P[:, :-2]
        starts = np.flatnonzero(new.reshape(-1))
        length = np.append(starts[1:], L * T) - starts
        chain, t = np.divmod(starts, T)
        kind = dynamics.take(t)
        move = of_move.reshape(-1).take(starts) + chain * moved.shape[1]
        prior = of_P.reshape(-1).take(starts - (t > 0)) + chain * P.shape[1]
        own = kind + chain * U if len(transition) > 1 else kind
        less = transition.reshape(-1, n, n).take(own, 0) - moved.reshape(-1, n, n).take(move, 0)
        before = P.reshape(-1, n, n).take(prior, 0) * (length * (t > 0))[:, None, None]
        away = less @ before
        every = np.empty((len(starts), n, 3 * n))
        every[..., :n] = noise.reshape(-1, n, n).take(move, 0) * length[:, None, None]
        every[..., :n] += away @ less.swapaxes(-1, -2)
        np.negative(away, out=every[..., n : 2 * n])
        every[..., 2 * n :] = before
        where = chain * U + kind
        if bool((where[1:] < where[:-1]).any()):
            order = where.argsort(kind="stable")
            where, every = where.take(order), every.take(order, 0)
        first = np.flatnonzero(np.append(True, where[1:] != where[:-1]))
        sums = np.zeros((L * U, n, 3 * n))
        sums[where.take(first)] = np.add.reduceat(every, first, 0)
        parts = sums.reshape(L, U, n, 3, n).transpose(3, 0, 1, 2, 4)
        return cls(found, found.mean.numpy(), found.disturbance.numpy(), *parts)


def sums_of(site: Site, numbers: SiteNumbers, states: States, kinds: Places) -> SiteSums:
    """What an M-step needs of a site.

    Args:
        site: The site.
        numbers: Its arguments at the E-step.
        states: The E-step.
        kinds: The kinds of its steps, if it is one of latents.
    """
    chains = len(states.mean)
    N, K, D, Q = site.steps, site.ranks, site.width, site.reads.shape[1]
    F, lead = len(site.features), site.lead
    q = Q + F
    rows = np.empty((K, chains, N, D + q))
    read = states.mean[:, site.before][:, :, site.reads.reshape(-1)]
    read = read.reshape(chains, N, K, Q).transpose(2, 0, 1, 3)
    if site.there is not None:
        read = read * site.there[:, None, None]
    rows[..., D : D + Q] = read
    if F:
        rows[..., D + Q :] = site.features.transpose(2, 1, 0)
    if site.is_latent:
        own = states.disturbance[:, site.levels][:, :, site.own.reshape(-1)]
        rows[..., :D] = own.reshape(chains, N, K, D).transpose(2, 0, 1, 3)
    else:
        assert numbers.residual is not None
        C = numbers.coefficients.swapaxes(0, 1)  # (K, lead|1, D, Q)
        np.subtract(
            numbers.residual.transpose(2, 0, 1, 3), read @ C.swapaxes(-1, -2), out=rows[..., :D]
        )
    entries = None
    if site.weight is not None:
        if site.by_entry:
            entries = site.weight.transpose(2, 0, 1, 3)  # (K, chains, N, D)
            rows[..., :D] *= entries
        else:
            rows *= site.weight.transpose(2, 0, 1)[..., None]
    if lead == 1:
        rows = rows.reshape(K, 1, chains * N, D + q)
        entries = None if entries is None else entries.reshape(K, 1, chains * N, D)
    second = (rows.swapaxes(-1, -2) @ rows).swapaxes(0, 1)  # (lead, K, D + q, D + q)
    phi_phi = second[:, :, None, D:, D:]
    if entries is not None:
        phi = rows[..., None, :, D:]
        weighed = phi * entries.swapaxes(-1, -2)[..., None]
        phi_phi = (weighed.swapaxes(-1, -2) @ phi).swapaxes(0, 1)
    r_phi, r_r = second[:, :, :D, D:], second[:, :, :D, :D]
    if Q:
        read_sum, own_read, own_own = _covariances(site, numbers, states, kinds)
        phi_phi[..., :Q, :Q] += read_sum
        r_phi[..., :Q] += own_read
    else:
        own_own = _latent_noise(site, states, kinds)
    r_r = r_r + own_own if site.spread.is_matrix else r_r.diagonal(0, -2, -1) + own_own
    return SiteSums(phi_phi, r_phi, r_r)


def _latent_noise(site: Site, states: States, kinds: Places) -> Numbers:
    """Σ Cov(r) of a site; zero of data that read nothing. # (lead, K, D, D) or (lead, K, D)"""
    if not site.is_latent:
        return np.zeros(())
    noises = _for_lead(states.noises[:, kinds].sum(1), site, len(states.mean))
    if site.spread.is_matrix:
        return noises[:, site.own[:, :, None], site.own[:, None]]
    return noises[:, site.own, site.own]


def _for_lead(x: Numbers, site: Site, chains: int) -> Numbers:
    """Sums of each chain, or of one that stands for all, as sums of those that share arguments."""
    if site.lead > 1:
        return x
    return chains * x if len(x) == 1 else x.sum(0, keepdims=True)


def _covariances(
    site: Site, numbers: SiteNumbers, states: States, kinds: Places
) -> tuple[Numbers, Numbers, Numbers]:
    """Σ Cov(u), # (lead|1, K, D|1, Q, Q), Σ Cov(r, u) # (…, K, D, Q), and Σ Cov(r) or its diagonal."""
    chains = len(states.mean)
    a, b = site.reads[:, :, None], site.reads[:, None]
    there = site.there
    if site.is_latent:
        whole = _for_lead(states.before[:, kinds].sum(1), site, chains)
        read = whole[:, a, b]
        shared = _for_lead(states.shared[:, kinds].sum(1), site, chains)
        cross = shared[:, site.own[:, :, None], b]
        if there is not None:
            read = read * (there[:, :, None] & there[:, None])
            cross = cross * there[:, None]
        return read[:, :, None], cross, _latent_noise(site, states, kinds)
    C = numbers.coefficients
    if site.weight is None:
        whole = _for_lead(_over_steps(site, states.found), site, chains)
        read = whole[:, a, b][:, :, None]
    else:
        read = _weighed(site, states.found.covariance.numpy()[:, site.levels])
    if there is not None:
        read = read * (there[:, :, None] & there[:, None])[:, None]
    cross = -np.matmul(C[..., None, :], read).squeeze(-2)
    if site.spread.is_matrix:
        return read, cross, -(cross @ C.swapaxes(-1, -2))
    return read, cross, -(cross * C).sum(-1)


def _over_steps(site: Site, found: Smoothed) -> Numbers:
    """Σ P over the steps of a site. # (chains|1, n, n)"""
    P, which = found.covariances.numpy(), found.which_covariance.numpy()[:, site.levels]
    out = []
    for own, of in zip(P, which, strict=True):
        count = np.bincount(of).astype(np.float64)
        out.append(count @ own[: len(count)].reshape(len(count), -1))
    sums: Numbers = np.stack(out).reshape(len(P), *P.shape[2:])
    return sums


def _weighed(site: Site, P: Numbers) -> Numbers:
    """Σ w Cov(u) of what rows read, where some are missing. # (lead, K, D|1, Q, Q)"""
    assert site.weight is not None
    n, N = P.shape[-1], site.steps
    weight = site.weight  # (chains, N, K) or (chains, N, K, D)
    chains, entries = len(weight), weight.shape[3] if site.by_entry else 1
    flat = weight.reshape(chains, N, -1).swapaxes(-1, -2)  # (chains, K · entries, N)
    if len(P) == 1 and site.lead == 1:
        flat = flat.sum(0, keepdims=True)
    found = flat @ P.reshape(len(P), N, n * n)
    if site.lead == 1 and len(found) > 1:
        found = found.sum(0, keepdims=True)
    found = found.reshape(len(found), site.ranks, entries, n, n)
    k = np.arange(site.ranks)[:, None, None]
    # Indices apart from each other come first: (K, Q, Q, lead, entries)
    read = found[:, k, :, site.reads[:, :, None], site.reads[:, None]]
    return read.transpose(3, 0, 4, 1, 2)
