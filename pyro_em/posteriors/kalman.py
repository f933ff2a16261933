"""Kalman filter, smoother and draws of linear-Gaussian chains.

The covariances do not depend on the data, so they go first, and once for all chains that share them.
Each number y = h'x + s e of a step updates the state by itself,

    f = h'Ph + s²,   k = Ph / f,   m ← m + k (y − h'm),   P ← P − f k k',

which needs no matrix inverse, and what is missing is left out. Back in time go adjoints of the
predicted states: with L = Π (I − k h') over a step's numbers,

    r_t = Σ_d L_d' h_d e_d / f_d + L' A' r_{t+1},
    N_t = Σ_d L_d' h_d h_d' L_d / f_d + L' A' N_{t+1} A L,

where e_d = y_d − h_d'm, and L_d is the product before d. A covariance may be singular or zero.

Source: Durbin and Koopman (2012), "Time series analysis by state space methods", sections 4.4
(adjoints), 4.9 (draws) and 6.4 (one number at a time); de Jong (1989), "Smoothing and interpolation
with the state-space model".
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pyro_em.posteriors.state_space import Filtered, Smoothed, StateSpace

_CHUNK = 256  # steps whose gains are held at once: memory is for the results


def filtered(space: StateSpace) -> Filtered:
    """The states given the data up to their own step, and the evidence of each step.

    Args:
        space: The chains. Twice differentiable in all its numbers.

    Returns:
        Means of each chain, covariances once where all chains share them.

    Example:
        >>> one, x = torch.ones(1, 1, 1, 1).double(), torch.ones(1, 2, 1).double()
        >>> which = torch.zeros(2, dtype=torch.long)
        >>> space = StateSpace(
        ...     one, 0 * x, one, which, one, one[..., 0], which, x
        ... )
        >>> filtered(space).mean.flatten()
        tensor([0.5000, 0.8000], dtype=torch.float64)
    """
    predicted, covariance = _covariances(space)
    columns = _Columns.of(space, len(predicted))
    mean, log_evidence, log_variance = _forward(space, columns, predicted)
    noise = (math.sqrt(2 * math.pi) * space.deviation[:, space.measurement]).log()
    if space.seen is not None:
        noise = torch.where(space.seen, noise, noise.new_zeros(()))
    return Filtered(
        columns.chains(log_evidence.unsqueeze(-2)).squeeze(-1),
        columns.chains(mean[0]),
        predicted,
        columns.chains(mean[1]),
        covariance,
        log_variance - 2 * noise.sum(-1),
    )


def smoothed(space: StateSpace) -> Smoothed:
    """The E-step: the states given all data.

    Args:
        space: The chains.

    Returns:
        Means and covariances of each step, and the adjoints that give covariances between steps.

    Example:
        >>> one, x = torch.ones(1, 1, 1, 1).double(), torch.ones(1, 2, 1).double()
        >>> which = torch.zeros(2, dtype=torch.long)
        >>> space = StateSpace(
        ...     one, 0 * x, one, which, one, one[..., 0], which, x
        ... )
        >>> smoothed(space).mean.flatten()
        tensor([0.6000, 0.8000], dtype=torch.float64)
    """
    found = filtered(space)
    columns = _Columns.of(space, len(found.covariance))
    adjoint, information = _backward(
        space, columns, found.predicted_covariance, columns.columns(found.predicted_mean)
    )
    mean = found.mean + _moved(space, columns, found.covariance, adjoint)
    return Smoothed(
        found,
        columns.chains(adjoint),
        information,
        mean,
        _smoothed_covariances(space, found.covariance, information),
    )


def sampled(space: StateSpace, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Draws of the states given all data.

    A draw x⁺, y⁺ of the model is as far from its own smoothed mean as x is from that of the data.

    Args:
        space: The chains.
        n: How many draws.
        generator: Where random numbers come from; torch's own if left out.

    Returns:
        Independent draws, also where covariances are singular. # (n, chains, T, n_state)

    Example:
        >>> one, x = torch.ones(1, 1, 1, 1).double(), torch.ones(1, 2, 1).double()
        >>> which = torch.zeros(2, dtype=torch.long)
        >>> space = StateSpace(
        ...     one, 0 * x, one, which, one, one[..., 0], which, x
        ... )
        >>> sampled(space, 3).shape
        torch.Size([3, 1, 2, 1])
    """
    predicted, covariance = _covariances(space)
    columns = _Columns.of(space, len(predicted), n)
    states, values = _drawn(space, columns, generator)
    centred = replace(columns, value=columns.value - values, drift=torch.zeros_like(columns.drift))
    mean, _, _ = _forward(space, centred, predicted)
    adjoint, _ = _backward(space, centred, predicted, mean[0])
    return (
        columns.chains(states + mean[1]) + _moved(space, columns, covariance, adjoint)
    ).unflatten(0, (n, space.chains))


def lagged_covariance(space: StateSpace, smoothed: Smoothed, s: Tensor, t: Tensor) -> Tensor:
    """Cov(x_s, x_t | y) of pairs of steps.

    Args:
        space: The chains.
        smoothed: Their E-step.
        s: Earlier steps. # (pairs,)
        t: Later steps, or the same. # (pairs,)

    Returns:
        Once where all chains share it. # (chains|1, pairs, n, n)

    Example:
        >>> one, x = torch.ones(1, 1, 1, 1).double(), torch.ones(1, 2, 1).double()
        >>> which = torch.zeros(2, dtype=torch.long)
        >>> space = StateSpace(
        ...     one, 0 * x, one, which, one, one[..., 0], which, x
        ... )
        >>> first, second = torch.tensor([0]), torch.tensor([1])
        >>> lagged_covariance(space, smoothed(space), first, second).round(decimals=4).item()
        0.2
    """
    found = smoothed.filtered
    order = (t - s).argsort(descending=True, stable=True)
    first, lag = s[order], (t - s)[order]
    product = found.covariance[:, first]
    furthest = int(lag[0]) if len(lag) else 0
    if furthest > 1:
        keep = _Gains.of(space, found.predicted_covariance, slice(0, space.steps)).kept
    for k in range(1, furthest + 1):
        here = first[lag >= k] + k
        active = product[:, : len(here)]
        if k > 1:
            active = active @ keep[:, here - 1].mT
        active = active @ space.transition[:, space.dynamics[here]].mT
        product = torch.cat([active, product[:, len(here) :]], 1)
    here = t[order]
    later = product - product @ (
        smoothed.information[:, here] @ found.predicted_covariance[:, here]
    )
    same = (lag == 0).reshape(-1, 1, 1)
    return torch.where(same, smoothed.covariance[:, here], later)[:, order.argsort()]


@dataclass(frozen=True, eq=False)
class _Columns:
    """Chains that share covariances are columns of one matrix.

    Attributes:
        value: y, zero where not seen. # (B, T, D, M)
        drift: # (B|1, T, n, M|1)
        draws: How many draws of each chain there are, the first of the dimensions in M.
    """

    value: Tensor
    drift: Tensor
    draws: int

    @staticmethod
    def of(space: StateSpace, B: int, draws: int = 1) -> _Columns:
        """The chains as columns of B batches, several times if there are draws."""
        value = space.value
        if space.seen is not None:
            value = torch.where(space.seen, value, value.new_zeros(()))
        columns = _Columns(value, space.drift, draws)
        drift = space.drift.unsqueeze(-1)
        if B == 1 and len(space.drift) > 1:
            drift = columns._as_columns(space.drift, B)
        return _Columns(columns._as_columns(value, B), drift, draws)

    def _as_columns(self, x: Tensor, B: int) -> Tensor:
        """(chains, T, n) as (B, T, n, M)."""
        if B == 1:
            return x.movedim(0, -1).unsqueeze(0).repeat(1, 1, 1, self.draws)
        return x.unsqueeze(-1).expand(*x.shape, self.draws)

    def columns(self, x: Tensor) -> Tensor:
        """(chains, T, n) as (B, T, n, M)."""
        return self._as_columns(x, len(self.value))

    def chains(self, x: Tensor) -> Tensor:
        """(B, T, n, M) as (draws * chains, T, n)."""
        return x.movedim(-1, 0).flatten(0, 1)


def _covariances(space: StateSpace) -> tuple[Tensor, Tensor]:
    """Predicted and filtered covariances. # (B, T, n, n) each"""
    A, H = space.transition.unbind(1), space.loading.unbind(1)
    Q = (space.noise @ space.noise.mT).unbind(1)
    variance = space.deviation.square().unbind(1)
    seen = None if space.seen is None else space.seen.unbind(1)
    B = max(len(x) for x in (A[0], Q[0], H[0], variance[0], *(seen or ())[:1]))
    steps = zip(space.dynamics.tolist(), space.measurement.tolist(), strict=True)
    predicted, covariance = [], []
    P = Q[0].new_zeros(B, space.size, space.size)
    for t, (u, v) in enumerate(steps):
        P = _symmetric(A[u] @ P @ A[u].mT) + Q[u] if t else Q[u].expand_as(P)
        predicted.append(P)
        for h, s2, here in _numbers(H[v], variance[v], None if seen is None else seen[t]):
            P = _updated(P, h, s2, here)[0]
        covariance.append(P)
    return torch.stack(predicted, 1), torch.stack(covariance, 1)


def _symmetric(P: Tensor) -> Tensor:
    """Half of P + P'."""
    return (P + P.mT) / 2


def _numbers(
    H: Tensor, variance: Tensor, seen: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """h # (..., n, 1), s² # (..., 1, 1) and what is seen # (..., 1, 1) of each of a step's numbers."""
    for d in range(H.shape[-2]):
        here = None if seen is None else seen[..., d, None, None]
        yield H[..., d, :, None], variance[..., d, None, None], here


def _updated(
    P: Tensor, h: Tensor, s2: Tensor, seen: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The covariance after one number, its gain k # (..., n, 1) and variance f # (..., 1, 1)."""
    moved = P @ h
    f = h.mT @ moved + s2
    gain = moved / f
    if seen is not None:
        gain = torch.where(seen, gain, gain.new_zeros(()))
    return P - gain * moved.mT, gain, f


@dataclass(frozen=True, eq=False)
class _Gains:
    """What some steps' numbers do to their predicted states.

    Attributes:
        loading: h. # (B|1, T, n, 1) each of D
        gain: k, zero where not seen. # (B, T, n, 1) each of D
        precision: 1/f, zero where not seen. # (B, T, 1, 1) each of D
        log_variance: log 2πf, zero where not seen. # (B, T, 1)
        kept: L = Π (I − k h'). # (B, T, n, n)
        reached: h_d' L_d, a number's loading on the predicted state. # (B, T, D, n)
    """

    loading: list[Tensor]
    gain: list[Tensor]
    precision: list[Tensor]
    log_variance: Tensor
    kept: Tensor
    reached: Tensor

    @staticmethod
    def of(space: StateSpace, predicted: Tensor, steps: slice) -> _Gains:
        """Those of some steps."""
        P = predicted[:, steps]
        which = space.measurement[steps]
        seen = None if space.seen is None else space.seen[:, steps]
        eye = torch.eye(space.size, dtype=P.dtype, device=P.device)
        L = eye.expand_as(P)
        loading, gains, precision, logs, reached = [], [], [], P.new_zeros(()), []
        variance = space.deviation[:, which].square()
        for h, s2, here in _numbers(space.loading[:, which], variance, seen):
            P, gain, f = _updated(P, h, s2, here)
            log_f = (2 * math.pi * f[..., 0]).log()
            one = f.reciprocal()
            if here is not None:
                log_f, one = (
                    torch.where(x, y, 0.0) for x, y in ((here[..., 0], log_f), (here, one))
                )
            reached.append(h.mT @ L)
            L = L - gain @ reached[-1]
            loading.append(h)
            gains.append(gain)
            precision.append(one)
            logs = logs + log_f
        return _Gains(loading, gains, precision, logs, L, torch.cat(reached, -2))

    def joint(self) -> Tensor:
        """K, a step's gains for the distance of its numbers from their prediction. # (B, T, n, D)"""
        K = torch.zeros_like(self.reached.mT)
        eye = torch.eye(len(self.gain), dtype=K.dtype, device=K.device)
        for e, h, k in zip(eye, self.loading, self.gain, strict=True):
            K = K + k @ (e - h.mT @ K)
        return K

    def errors(self, value: Tensor, mean: Tensor) -> list[Tensor]:
        """e, each number's distance from what is expected before it. # (B, T, 1, M) each of D"""
        errors = []
        for d, (h, k) in enumerate(zip(self.loading, self.gain, strict=True)):
            errors.append(value[..., d : d + 1, :] - h.mT @ mean)
            mean = mean + k @ errors[-1]
        return errors


def _chunks(T: int) -> list[slice]:
    """Pieces of all steps."""
    return [slice(t, min(t + _CHUNK, T)) for t in range(0, T, _CHUNK)]


def _forward(
    space: StateSpace, columns: _Columns, predicted: Tensor
) -> tuple[tuple[Tensor, Tensor], Tensor, Tensor]:
    """Predicted and filtered means # (B, T, n, M), log evidence of each step # (B, T, M), Σ log 2πf."""
    A, H = space.transition.unbind(1), space.loading.unbind(1)
    drift = columns.drift.unbind(1)
    dynamics, measurement = space.dynamics.tolist(), space.measurement.tolist()
    before: list[Tensor] = []
    after: list[Tensor] = []
    evidence, variances = [], []
    B, _, _, M = columns.value.shape
    m = columns.value.new_zeros(B, space.size, M)
    for steps in _chunks(space.steps):
        gains = _Gains.of(space, predicted, steps)
        value = columns.value[:, steps]
        start = len(before)
        numbers = zip(gains.joint().unbind(1), value.unbind(1), strict=True)
        for t, (K, y) in enumerate(numbers, start):
            u = dynamics[t]
            m = A[u] @ m + drift[t] if t else drift[t].expand_as(m)
            before.append(m)
            m = m + K @ (y - H[measurement[t]] @ m)
            after.append(m)
        errors = gains.errors(value, torch.stack(before[start:], 1))
        squares = (e.square() * p for e, p in zip(errors, gains.precision, strict=True))
        evidence.append(-0.5 * (sum(squares).squeeze(-2) + gains.log_variance))
        variances.append(gains.log_variance.squeeze(-1))
    means = torch.stack(before, 1), torch.stack(after, 1)
    return means, torch.cat(evidence, 1), torch.cat(variances, 1)


def _backward(
    space: StateSpace, columns: _Columns, predicted: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """Adjoints r # (B, T, n, M) and N # (B, T, n, n) of the predicted states.

    Args:
        space: The chains.
        columns: Their values.
        predicted: Predicted covariances. # (B, T, n, n)
        mean: Predicted means. # (B, T, n, M)
    """
    A, dynamics = space.transition.mT.unbind(1), space.dynamics.tolist()
    r, N = torch.zeros_like(mean[:, 0]), torch.zeros_like(predicted[:, 0])
    adjoint, information = [], []
    for steps in reversed(_chunks(space.steps)):
        gains = _Gains.of(space, predicted, steps)
        scaled = gains.reached.mT * torch.cat(gains.precision, -1)
        own = scaled @ torch.cat(gains.errors(columns.value[:, steps], mean[:, steps]), -2)
        known = _symmetric(scaled @ gains.reached)
        for i in reversed(range(steps.stop - steps.start)):
            t, L = steps.start + i, gains.kept[:, i]
            if t + 1 < space.steps:
                At = A[dynamics[t + 1]]
                r, N = At @ r, At @ N @ At.mT
            r = own[:, i] + L.mT @ r
            N = known[:, i] + _symmetric(L.mT @ N @ L)
            adjoint.append(r)
            information.append(N)
    return torch.stack(adjoint[::-1], 1), torch.stack(information[::-1], 1)


def _moved(space: StateSpace, columns: _Columns, covariance: Tensor, adjoint: Tensor) -> Tensor:
    """P A' r of the next step, by which later data move a filtered mean. # (draws * chains, T, n)"""
    pulled = space.transition[:, space.dynamics[1:]].mT @ adjoint[:, 1:]
    moved = covariance[:, :-1] @ pulled
    return columns.chains(torch.cat([moved, torch.zeros_like(adjoint[:, :1])], 1))


def _smoothed_covariances(space: StateSpace, covariance: Tensor, information: Tensor) -> Tensor:
    """P − P A' N A P with N of the next step. # (B, T, n, n)"""
    reach = space.transition[:, space.dynamics[1:]] @ covariance[:, :-1]
    less = _symmetric(reach.mT @ information[:, 1:] @ reach)
    return torch.cat([covariance[:, :-1] - less, covariance[:, -1:]], 1)


def _drawn(
    space: StateSpace, columns: _Columns, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """States # (B, T, n, M) and values # (B, T, D, M) of the model, zero where not seen."""
    A, G = space.transition.unbind(1), space.noise.unbind(1)
    drift = columns.drift.unbind(1)
    B, T, D, M = columns.value.shape

    def normal(size: int) -> Tensor:
        like = columns.value
        shape = (B, T, size, M)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)

    states = []
    x = columns.value.new_zeros(B, space.size, M)
    for t, (u, e) in enumerate(
        zip(space.dynamics.tolist(), normal(space.noise.shape[-1]).unbind(1), strict=True)
    ):
        x = G[u] @ e + drift[t] + (A[u] @ x if t else 0.0)
        states.append(x)
    stacked = torch.stack(states, 1)
    which = space.measurement
    values = space.loading[:, which] @ stacked + space.deviation[:, which].unsqueeze(-1) * normal(D)
    if space.seen is not None:
        values = values * columns.columns(space.seen.expand(space.chains, -1, -1))
    return stacked, values
