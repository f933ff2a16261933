"""Kalman's filter and smoother by covariances and precisions: differentiable, whatever their rank.

The factors of `pyro_em.posteriors.filters.kalman_steps` keep more digits, but have no derivative where
a covariance is singular. Forward, each number y = h'x + s e of a step updates the state by itself,

    f = h'Ph + s²,   k = Ph / f,   m ← m + k (y − h'm),   P ← P − f k k',

and what is missing is left out. Backward go Λ and ρ, so that −½δ'Λδ + ρ'δ is what all later data say of
δ_t = x_t − E[x_t | y_{≤t}]. With Λ̃ = H'H/s² + Λ of the step and what is later, of
d_t = x_t − E[x_t | y_{<t}] = A δ_{t−1} + G ε, the noise given x_{t−1} and all data has the precision
I + G'Λ̃G, which alone is inverted.

Source: Durbin and Koopman (2012), "Time series analysis by state space methods", section 6.4, for the
numbers of a step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.posteriors.filters.state_space import Filtered, Smoothed, StateSpace


def filtered_by_moments(space: StateSpace) -> Filtered:
    """See `pyro_em.posteriors.filters.kalman.filtered`.

    Args:
        space: The chains. Twice differentiable in all their numbers.
    """
    found = _forward(space)
    return Filtered(
        _chains(found.log_evidence),
        _chains(found.predicted),
        found.predicted_covariance,
        _chains(found.mean),
        found.covariance,
        found.log_determinant,
    )


def smoothed_by_moments(space: StateSpace) -> Smoothed:
    """See `pyro_em.posteriors.filters.kalman.smoothed`.

    Args:
        space: The chains. Twice differentiable in all their numbers.
    """
    found = _forward(space)
    told = _backward(space, found)
    A, G = space.transition.unbind(1), space.noise.unbind(1)
    delta, P = torch.zeros_like(found.mean[:, 0]), torch.zeros_like(found.covariance[:, 0])
    out = []
    for t, u in enumerate(space.dynamics.tolist()):
        E, g, precision = told[t]
        move = A[u] - G[u] @ E if t else torch.zeros_like(P)
        noise = G[u] @ torch.linalg.solve(precision, G[u].mT.expand(len(P), -1, -1))
        P = _symmetric(move @ P @ move.mT + noise)
        disturbance = G[u] @ (g - E @ delta)
        distance = A[u] @ delta + disturbance
        delta = distance - (found.mean[:, t] - found.predicted[:, t])
        out.append((found.predicted[:, t] + distance, disturbance, P, move, noise))
    mean, disturbance, covariance, transition, noise = (
        torch.stack(x, 1) for x in zip(*out, strict=True)
    )
    every = torch.arange(space.steps, device=mean.device).expand(len(covariance), -1)
    return Smoothed(
        _chains(found.log_evidence).sum(-1),
        found.log_determinant.sum(-1),
        _chains(mean),
        _chains(disturbance),
        covariance,
        every,
        transition,
        noise,
        every,
    )


@dataclass(frozen=True, eq=False)
class _Forward:
    """The filter's results for B batches with covariances of their own, of M chains each.

    Attributes:
        value: The data, zero where not seen. # (B, T, D, M)
        log_evidence: # (B, T, M)
        log_determinant: # (B, T)
        predicted: # (B, T, n, M)
        predicted_covariance: # (B, T, n, n)
        mean: # (B, T, n, M)
        covariance: # (B, T, n, n)
    """

    value: Tensor
    log_evidence: Tensor
    log_determinant: Tensor
    predicted: Tensor
    predicted_covariance: Tensor
    mean: Tensor
    covariance: Tensor


def _forward(space: StateSpace) -> _Forward:
    """The filter."""
    own = (space.transition, space.noise, space.loading, space.deviation)
    seen = () if space.seen is None else (space.seen,)
    batches = max(len(x) for x in (*own, *seen))
    value = space.value if space.seen is None else torch.where(space.seen, space.value, 0.0)
    values, drifts = _columns(value, batches), _columns(space.drift, batches)
    A, H, drift = space.transition.unbind(1), space.loading.unbind(1), drifts.unbind(1)
    Q = (space.noise @ space.noise.mT).unbind(1)
    variance = space.deviation.square().unbind(1)
    numbers = values.unbind(1)
    there = None if space.seen is None else space.seen.unbind(1)
    B, _, D, M = values.shape
    P, m = Q[0].new_zeros(B, space.size, space.size), Q[0].new_zeros(B, space.size, M)
    found: list[tuple[Tensor, ...]] = []
    steps = zip(space.dynamics.tolist(), space.measurement.tolist(), strict=True)
    for t, (u, v) in enumerate(steps):
        P = _symmetric(A[u] @ P @ A[u].mT) + Q[u] if t else Q[u].expand_as(P)
        m = A[u] @ m + drift[t] if t else drift[t].expand_as(m)
        before = m, P
        evidence, determinant = m.new_zeros(B, M), m.new_zeros(B)
        for d in range(D):
            h, s2 = H[v][:, d, :, None], variance[v][:, d, None, None]
            moved = P @ h
            f = h.mT @ moved + s2
            gain, e = moved / f, numbers[t][:, d : d + 1] - h.mT @ m
            nats = -0.5 * (e.square() / f + (2 * math.pi * f).log()).squeeze(-2)
            ratio = (f / s2).log().flatten()
            if there is not None:
                here = there[t][:, d, None, None]
                gain = torch.where(here, gain, 0.0)
                nats = torch.where(here[..., 0], nats, 0.0)
                ratio = torch.where(here[..., 0, 0], ratio, 0.0)
            P, m = P - gain * moved.mT, m + gain * e
            evidence, determinant = evidence + nats, determinant + ratio
        found.append((evidence, determinant, *before, m, P))
    return _Forward(values, *(torch.stack(x, 1) for x in zip(*found, strict=True)))


def _backward(space: StateSpace, found: _Forward) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each step E # (B, k, n), g # (B, k, M) and the precision of ε = g − E δ_{t−1} + …."""
    A, G, H = space.transition.unbind(1), space.noise.unbind(1), space.loading.unbind(1)
    s = space.deviation.unsqueeze(-1).unbind(1)
    precision, pull = torch.zeros_like(found.covariance[:, 0]), torch.zeros_like(found.mean[:, 0])
    eye = torch.eye(space.noise.shape[-1], dtype=pull.dtype, device=pull.device)
    out = []
    dynamics, measurement = space.dynamics.tolist(), space.measurement.tolist()
    for t in reversed(range(space.steps)):
        a, g, h = A[dynamics[t]], G[dynamics[t]], H[measurement[t]]
        m, scale = found.predicted[:, t], s[measurement[t]]
        rows, errors = h / scale, (found.value[:, t] - h @ m) / scale
        if space.seen is not None:
            here = space.seen[:, t].unsqueeze(-1)
            rows, errors = rows * here, errors * here
        pull = rows.mT @ errors + pull + precision @ (found.mean[:, t] - m)
        precision = _symmetric(rows.mT @ rows + precision)
        toward = g.mT @ precision
        own = eye + _symmetric(toward @ g)
        E = torch.linalg.solve(own, toward @ a)
        shift = torch.linalg.solve(own, (g.mT @ pull).expand(len(own), -1, -1))
        out.append((E, shift, own))
        pull = a.mT @ (pull - toward.mT @ shift)
        precision = _symmetric(a.mT @ precision @ (a - g @ E))
    return out[::-1]


def _symmetric(P: Tensor) -> Tensor:
    """Half of P + P'."""
    return (P + P.mT) / 2


def _columns(x: Tensor, batches: int) -> Tensor:
    """(chains|1, T, n) as (B|1, T, n, M|1): chains that share their covariances are columns."""
    return x.movedim(0, -1).unsqueeze(0) if batches == 1 else x.unsqueeze(-1)


def _chains(x: Tensor) -> Tensor:
    """(B, T, …, M) as (chains, T, …)."""
    return x.movedim(-1, 0).flatten(0, 1)
