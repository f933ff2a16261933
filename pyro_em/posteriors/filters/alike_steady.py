"""Chains whose steps are alike as if an endless series of data followed, and that none follows.

See `kalman_alike` for what it is and for the letters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from pyro_em.posteriors.filters.constant_scans import ConstantScans
from pyro_em.posteriors.filters.riccati import endless
from pyro_em.posteriors.filters.state_space import StateSpace

_Floats = NDArray[np.float64]
_Ints = NDArray[np.int64]

_LEAST = 16  # steps for which it is worth its while
_PRECISE = 1e3  # how much data may tell of a state beside what is known without them
_VAGUE = 1e4  # the same of the first state, whose noise is its own
_LOSS = 1e5  # how many times the errors of rounding those of results may be
_SAME = 1e-16  # changes that are none
_STEADY = 1e-12  # how near a fixed point has to be


class Numbers(NamedTuple):
    """The numbers of chains whose steps are alike but for the first state.

    Attributes:
        A: # (n, n)
        G: # (n, k)
        first: G of the first step. # (n, k)
        loading: H. # (D, n)
        H: H/s. # (D, n)
        precise: 1/s. # (D,)
        value: y. # (chains, T, D)
        drift: # (chains|1, T, n)
    """

    A: _Floats
    G: _Floats
    first: _Floats
    loading: _Floats
    H: _Floats
    precise: _Floats
    value: _Floats
    drift: _Floats

    @property
    def steps(self) -> int:
        """T."""
        return self.value.shape[1]

    @classmethod
    def of(cls, space: StateSpace) -> Numbers | None:
        """Those of a state-space model; None if steps differ."""
        shared = (space.transition, space.noise, space.loading, space.deviation)
        if space.seen is not None or space.steps < _LEAST or any(x.shape[0] > 1 for x in shared):
            return None
        u, v = space.dynamics.numpy(), space.measurement.numpy()
        T = len(u)
        if np.count_nonzero(u[1:] == u[1]) < T - 1 or np.count_nonzero(v == v[0]) < T:
            return None
        A, G, H, s, value, drift = (
            (x.detach() if x.requires_grad else x).numpy()
            for x in (*shared, space.value, space.drift)
        )
        A, G, H, s = A[0], G[0], H[0], s[0]
        if not G.shape[-1]:
            return None
        own, w = H[v[0]], 1.0 / s[v[0]]
        return cls(A[u[1]], G[u[1]], G[u[0]], own, own * w[:, None], w, value, drift)


@dataclass(frozen=True, eq=False)
class Steady:
    """All steps as if an endless series of data followed.

    Attributes:
        information: Λ. # (n, n)
        later: N. # (n, n)
        transition: F. # (n, n)
        noise: C. # (n, n)
        covariance: P that P_t converges to. # (n, n)
        left: I − N P. # (n, n)
        end: (N⁻¹ − P)⁻¹. # (n, n)
        gain: (I + G'ΛG)⁻¹ G', from l to ε. # (k, n)
        pull: (I + G'ΛG)⁻¹ G'ΛA, from the state before to ε. # (k, n)
        first: (I + G'ΛG)⁻¹ of the first step. # (k, k)
        sizes: Of the first step log det(I + G'ΛG), and of each other one.
        loss: How many times the errors of rounding those of results are.
        powers: Fᵏ. # (K, n, n)
        next_power: Fᴷ. # (n, n)
        covariances: P_k. # (K, n, n)
        fore: After how many steps the first state makes no difference.
        back: How many steps before the last one it makes none that no data follow.
    """

    information: _Floats
    later: _Floats
    transition: _Floats
    noise: _Floats
    covariance: _Floats
    left: _Floats
    end: _Floats
    gain: _Floats
    pull: _Floats
    first: _Floats
    sizes: tuple[float, float]
    loss: float
    powers: _Floats
    next_power: _Floats
    covariances: _Floats
    fore: int
    back: int

    @classmethod
    def of(cls, numbers: Numbers) -> Steady | None:
        """From the numbers of the chains; None where digits would be lost."""
        A, G = numbers.A, numbers.G
        n, k = G.shape
        J = numbers.H.T.dot(numbers.H)
        found = endless(A, G.dot(G.T), J)
        if found is None:
            return None
        whole, before = found.information, found.covariance
        size = whole.diagonal()
        told = float((size * before.diagonal()).max())
        if not (told <= _PRECISE and float(size.min()) > 0.0):
            return None
        eye = np.eye(n)
        own = eye if k == n else np.eye(k)
        toward = G.T.dot(whole)
        root = np.linalg.inv(np.linalg.cholesky(own + toward.dot(G)))
        half = G.dot(root.T)
        noise, gain = half.dot(half.T), root.T.dot(half.T)
        pull = gain.dot(whole.dot(A))
        F = A - G.dot(pull)
        later = F.T.dot(whole).dot(F) + pull.T.dot(pull)
        later = (later + later.T) / 2
        # One step more shows how near the fixed point is, and is nearer.
        nearer, per = J + later, 1.0 / size
        if not float(np.square(nearer - whole).dot(per).dot(per)) <= _STEADY**2:
            return None
        whole = nearer
        toward = numbers.first.T.dot(whole)
        first = np.linalg.inv(np.linalg.cholesky(own + toward.dot(numbers.first)))
        widest = 1.0 + np.square(np.sqrt(size).dot(np.abs(numbers.first)))
        vague = float((widest * np.square(first).sum(0)).max())
        if not vague <= _VAGUE:
            return None
        start = numbers.first.dot(first.T)
        P = np.linalg.solve(eye + before.dot(whole), before)
        P = (P + P.T) / 2
        sizes = tuple(-2 * float(np.log(x.diagonal()).sum()) for x in (first, root))
        T = numbers.steps
        room = max(min(1 << found.doublings, 1 << T.bit_length()), ConstantScans.least(n))
        powers = _Powers.of(F, noise, start.dot(start.T), room)
        # Rows of Fᵏ in units of what is known of each state, and how small they have to be.
        units = np.outer(size, per).reshape(-1)
        spread, initial = P.diagonal() * size, powers.covariances[0].diagonal() * size
        most = float(spread.max())
        left = eye - later.dot(P)
        end = np.linalg.solve(left, later)
        known = float(end.diagonal().dot(per)) * most
        if not known > 0.0:  # states without noise, or that no later data tell of
            return None
        back = _SAME / known
        least = float(np.maximum(spread, 1e-4 * most).min())
        fore = _SAME * least / float(initial.sum() + spread.sum())
        while True:
            sizes_of = np.square(powers.powers.reshape(room, -1)).dot(units)
            until = [min(T, _after(sizes_of > limit)) for limit in (fore, back)]
            if room >= T or sum(until) < min(T, 2 * room):
                break
            powers, room = powers.doubled(), 2 * room
        if sum(until) >= T:  # no step is like another
            until = [T, T]
        return cls(
            whole,
            later,
            F,
            noise,
            P,
            left,
            end,
            gain,
            pull,
            first.T.dot(first),
            cast(tuple[float, float], sizes),
            max(1.0, told**1.5, vague),
            powers.powers,
            powers.next,
            powers.covariances,
            *until,
        )


class _Powers(NamedTuple):
    """Powers of F, and P_k = F P_{k−1} F' + C.

    Attributes:
        powers: Fᵏ. # (K, n, n)
        next: Fᴷ. # (n, n)
        covariances: # (K, n, n)
        added: C + F C F' + … of K steps. # (n, n)
    """

    powers: _Floats
    next: _Floats
    covariances: _Floats
    added: _Floats

    @classmethod
    def of(cls, F: _Floats, C: _Floats, first: _Floats, count: int) -> _Powers:
        """From the first state's covariance; their number is a power of two."""
        powers, covariances = np.empty((count, *F.shape)), np.empty((count, *F.shape))
        powers[0], covariances[0], many = np.eye(len(F)), first, 1
        while many < count:
            F, C = _twice(powers, covariances, many, F, C)
            many *= 2
        return cls(powers, F, covariances, C)

    def doubled(self) -> _Powers:
        """Twice as many."""
        many = len(self.powers)
        powers, covariances = np.empty((2, 2 * many, *self.next.shape))
        powers[:many], covariances[:many] = self.powers, self.covariances
        F, C = _twice(powers, covariances, many, self.next, self.added)
        return _Powers(powers, F, covariances, C)


def _twice(
    powers: _Floats, covariances: _Floats, many: int, F: _Floats, C: _Floats
) -> tuple[_Floats, _Floats]:
    """Writes as many more as there are, by F and C of so many steps, which it doubles, too."""
    n, more = len(F), covariances[many : 2 * many]
    np.matmul(powers[:many].reshape(-1, n), F, out=powers[many : 2 * many].reshape(-1, n))
    np.matmul(F @ covariances[:many], F.T, out=more)
    more += C
    return F.dot(F), F.dot(C).dot(F.T) + C


def _after(yes: NDArray[np.bool_]) -> int:
    """How many there are up to the last one that is so; one at least."""
    return 1 + int(np.flatnonzero(yes).max(initial=0))


@dataclass(frozen=True, eq=False)
class End:
    """What changes as no data follow the last step.

    Attributes:
        M: # (n, n)
        covariances: Those of the supposed series, of the last steps, from the last one on; or the one
            of all of them. # (back, n, n) or (n, n)
        toward: Fᵏ of the last steps, in their order, side by side. # (n, · n)
        moved: Fᵏ P_t of them. # (n, · n)
        log_determinant: Of all noises.
        loss: As of the steady steps.
    """

    M: _Floats
    covariances: _Floats
    toward: _Floats
    moved: _Floats
    log_determinant: float
    loss: float

    @classmethod
    def of(cls, numbers: Numbers, steady: Steady) -> End | None:
        """From the steps as if data followed; None where much more was supposed than they say."""
        T, N, K = numbers.steps, steady.later, len(steady.powers)
        P = covariances = steady.covariance
        left, M = steady.left, steady.end
        if T - steady.back <= steady.fore:
            covariances = along(steady, np.arange(T - 1, T - 1 - steady.back, -1))
            P = covariances[0]
            left = np.eye(len(N)) - N.dot(P)
            M = np.linalg.solve(left, N)
        M = (M + M.T) / 2
        # Beside one: how much more certain the last state was supposed to be.
        more = max(1.0, float((M.diagonal() * P.diagonal()).max()))
        loss = more**2 * steady.loss
        if not loss <= _LOSS:
            return None
        size = float(np.linalg.det(left))
        if not size > 1e-300:
            return None
        # Powers decay to nothing within twice the steps in which their squares do.
        many, powers = min(T, 2 * K), steady.powers
        if many > K:
            powers = np.concatenate([powers, powers[: many - K] @ steady.next_power])
        toward = powers[many - 1 :: -1] if many < len(powers) else powers[::-1]
        moved = toward @ (P if T - many >= steady.fore else along(steady, np.arange(T - many, T)))
        first, other = steady.sizes
        determinant = first + (T - 1) * other + math.log(size)
        return cls(M, covariances, _beside(toward), _beside(moved), determinant, loss)


def _beside(x: _Floats) -> _Floats:
    """Matrices side by side. # (n, · n)"""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def along(steady: Steady, steps: _Ints) -> _Floats:
    """P_t of some steps. # (steps, n, n)"""
    return steady.covariances[np.minimum(steps, len(steady.covariances) - 1)]
