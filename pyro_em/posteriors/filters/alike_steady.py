"""Chains whose steps are alike as if an endless series of data followed, and that none follows.

See `kalman_alike` for what it is and for the letters.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

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
_NOTHING = 1e-36  # squares of a matrix that adds nothing to what it is added to
_STEADY = 1e-12  # how near a fixed point has to be found
_FIXED = 1e-14  # how near is as near as rounding allows
_AGAIN = 3  # steps of the recursion that may bring it so near


class Numbers(NamedTuple):
    """The numbers of chains whose steps are alike but for the first state.

    Attributes:
        A: # (n, n)
        G: That of all steps but the first, and that of the first. # (2, n, k)
        loading: H. # (D, n)
        H: H/s. # (D, n)
        precise: 1/s. # (D,)
        value: y. # (chains, T, D)
        drift: # (chains|1, T, n)
        lengths: How many steps have data; None if all. # (chains|1,)
    """

    A: _Floats
    G: _Floats
    loading: _Floats
    H: _Floats
    precise: _Floats
    value: _Floats
    drift: _Floats
    lengths: _Ints | None = None

    @property
    def steps(self) -> int:
        """T."""
        return self.value.shape[1]

    @classmethod
    def of(cls, space: StateSpace) -> Numbers | None:
        """Those of a state-space model; None if steps differ, or have gaps between data."""
        lengths = None if space.seen is None else _lengths(space.seen.numpy())
        if lengths is not None and not lengths.all():
            return None
        A, drift, G, u, H, s, v, value = _arrays(space)
        if len(u) < _LEAST or not (_is_one(u[1:]) and _is_one(v[1:])):
            return None
        if len(A) > 1 or len(G) > 1 or len(H) > 1 or len(s) > 1 or not G.shape[-1]:
            return None
        other, own = int(u[1]), int(v[1])
        loading, w = H[0, own], 1.0 / s[0, own]
        if v[0] != own and not ((H[0, v[0]] == loading).all() and (s[0, v[0]] == s[0, own]).all()):
            return None
        first = int(u[0])  # a slice of both is quicker than a list of them
        G = G[0, other :: first - other][:2] if first != other else G[0, [other, other]]
        return cls(A[0, other], G, loading, loading * w[:, None], w, value, drift, lengths)


def _lengths(seen: NDArray[np.bool_]) -> _Ints:
    """Up to which step all is seen, and nothing after it; zero if it is otherwise. # (chains|1,)"""
    whole = seen.all(-1)
    count = whole.sum(-1)
    steps = np.arange(seen.shape[1])
    same = (seen.any(-1) == whole).all(-1) & (whole == (steps < count[:, None])).all(-1)
    found: _Ints = np.where(same, count, 0)
    return found


def _arrays(space: StateSpace) -> list[NDArray[Any]]:
    """Its tensors in their order, but for the last one."""
    tensors = list(vars(space).values())[:-1]
    try:
        return [x.numpy() for x in tensors]
    except RuntimeError:  # outside of `torch.no_grad` nobody asks for derivatives here
        return [x.detach().numpy() for x in tensors]


def _is_one(x: _Ints) -> bool:
    """Whether all numbers are the same."""
    return x[1:].tobytes() == x[:-1].tobytes()


class Steady(NamedTuple):
    """All steps as if an endless series of data followed.

    Attributes:
        information: Λ. # (n, n)
        later: N. # (n, n)
        transition: F. # (n, n)
        noise: C. # (n, n)
        covariance: P that P_t converges to. # (n, n)
        end: (N⁻¹ − P)⁻¹. # (n, n)
        gain: G (I + G'ΛG)⁻¹, by which ε, a row, follows from l. # (n, k)
        pull: A'ΛG (I + G'ΛG)⁻¹, the same from the state before. # (n, k)
        first: (I + G'ΛG)⁻¹ of the first step. # (k, k)
        sizes: log det(I + G'ΛG), that of each step but the first, and of the first one.
        left: log det(I − N P).
        loss: How many times the errors of rounding those of results are.
        units: Those of numbers of Fᵏ, as `_powers` takes them, and the next two. # (n · n,)
        limits: How small squares of Fᵏ have to be.
        doublings: 2 to the power of it is about how many are needed.
        start: P of the first state. # (n, n)
        powers: Fᵏ. # (K, n, n)
        covariances: P_t up to the step from which they are alike. # (fore + 1|T, n, n)
        fore: After how many steps the first state makes no difference.
        back: How many steps before the last one it makes none that no data follow; there are twice as
            many powers.
        reach: After how many steps a sum of all steps before loses nothing without them; T if none.
    """

    information: _Floats
    later: _Floats
    transition: _Floats
    noise: _Floats
    covariance: _Floats
    end: _Floats
    gain: _Floats
    pull: _Floats
    first: _Floats
    sizes: list[float]
    left: float
    loss: float
    units: _Floats
    limits: tuple[float, float, float]
    doublings: int
    start: _Floats
    powers: _Floats
    covariances: _Floats
    fore: int
    back: int
    reach: int

    @classmethod
    def of(cls, numbers: Numbers) -> Steady | None:
        """From the numbers of the chains; None where digits would be lost."""
        A, G = numbers.A, numbers.G
        n, J = len(A), numbers.H.T.dot(numbers.H)
        eye = np.eye(n)
        found = endless(A, G[0].dot(G[0].T), J, eye)
        if found is None:
            return None
        size = found.information.diagonal()
        told = max((size * found.covariance.diagonal()).tolist())
        if not (told <= _PRECISE and min(size.tolist()) > 0.0):
            return None
        fixed = _Fixed.of(A, G, J, found.information, eye)
        if fixed is None:
            return None
        F, N, C, start = fixed.transition, fixed.later, fixed.noise, fixed.start
        widest = np.sqrt(size).dot(np.abs(G[1]))
        vague = max(((1.0 + widest * widest) * fixed.first.diagonal()).tolist())
        if not vague <= _VAGUE:
            return None
        # Given all earlier data, what is told by all later ones, and by a state's own alone.
        Y, both = found.covariance, np.empty((2, n, n))
        Y.dot(fixed.information, both[0])
        Y.dot(J, both[1])
        both += eye
        P, filtered = np.linalg.solve(both, Y)
        later, own = np.linalg.slogdet(both)[1].tolist()
        P = F.dot(P).dot(F.T) + C
        end = N + N.dot(filtered).dot(N)
        # Rows of Fᵏ in units of what is known of each state, and how small they have to be.
        per = 1.0 / size
        spread, initial = (P.diagonal() * size).tolist(), (start.diagonal() * size).tolist()
        most = max(spread)
        known = float(end.diagonal().dot(per)) * most
        if not known > 0.0:  # states without noise, or that no later data tell of
            return None
        least = max(min(spread), 1e-4 * most)
        limits = _SAME * least / (sum(initial) + sum(spread)), _SAME / known, _NOTHING
        units = (size[:, None] * per).reshape(-1)
        return cls(
            fixed.information,
            N,
            F,
            C,
            P,
            (end + end.T) / 2,
            fixed.gain,
            fixed.pull,
            fixed.first,
            fixed.sizes,
            own - later,
            max(1.0, told**1.5, vague),
            units,
            limits,
            found.doublings,
            start,
            *_until(F, C, start, units, limits, found.doublings, numbers.steps),
        )

    def until(self, T: int) -> Steady:
        """The same of series of so many steps."""
        own = self.transition, self.noise, self.start, self.units, self.limits, self.doublings
        powers, covariances, fore, back, reach = _until(*own, T)
        return self._replace(
            powers=powers, covariances=covariances, fore=fore, back=back, reach=reach
        )


class _Fixed(NamedTuple):
    """What follows of Λ, with the next step of the recursion that it is fixed by.

    Attributes:
        information: Λ. # (n, n)
        later: N. # (n, n)
        transition: F. # (n, n)
        noise: C. # (n, n)
        start: P of the first state. # (n, n)
        gain: # (n, k)
        pull: # (n, k)
        first: (I + G'ΛG)⁻¹ of the first step. # (k, k)
        sizes: log det(I + G'ΛG), that of each step but the first, and of the first one.
    """

    information: _Floats
    later: _Floats
    transition: _Floats
    noise: _Floats
    start: _Floats
    gain: _Floats
    pull: _Floats
    first: _Floats
    sizes: list[float]

    @classmethod
    def of(cls, A: _Floats, G: _Floats, J: _Floats, near: _Floats, eye: _Floats) -> _Fixed | None:
        """From a Λ that is near; None if it is not.

        A step of the recursion shows how near it is, and is nearer: it is done again where it is more
        so than by rounding.
        """
        per, Gt, k = 1.0 / near.diagonal(), G.swapaxes(-1, -2), G.shape[-1]
        eye = eye if k == len(eye) else np.eye(k)
        for _ in range(_AGAIN):
            matrix = Gt @ near @ G
            matrix += eye
            inverse = np.linalg.solve(matrix, eye)
            gains = G @ inverse
            gain = gains[0]
            pull = A.T.dot(near.dot(gain))
            F = A - G[0].dot(pull.T)
            later = F.T.dot(near).dot(F) + pull.dot(pull.T)
            later = (later + later.T) / 2
            more = J + later
            change = float(np.square(more - near).dot(per).dot(per))
            near = more
            if change <= _FIXED**2:
                break
        if not change <= _STEADY**2:
            return None
        sizes = np.linalg.slogdet(matrix)[1].tolist()
        C, start = gains @ Gt
        return cls(near, later, F, C, start, gain, pull, inverse[1], sizes)


def _until(
    F: _Floats,
    C: _Floats,
    start: _Floats,
    units: _Floats,
    limits: tuple[float, float, float],
    doublings: int,
    T: int,
) -> tuple[_Floats, _Floats, int, int, int]:
    """What depends on the number of steps: the last five attributes of `Steady`, from others."""
    powers, (fore, back, reach) = _powers(F, units, limits, T, doublings)
    if fore + back >= T:  # no step is like another
        fore = back = T
    return powers, _covariances(powers[: min(fore + 1, T)], C, start), fore, back, reach


def _powers(
    F: _Floats, units: _Floats, limits: tuple[float, float, float], T: int, doublings: int
) -> tuple[_Floats, list[int]]:
    """Powers of F, and after how many their squares in these units are below each limit.

    Args:
        F: # (n, n)
        units: # (n · n,)
        limits: Of differences that the first state makes, that the last one makes, and of sums.
        T: Steps.
        doublings: 2 to the power of it, and one more, are about as many as are needed.

    Returns:
        More powers than the first number, and than twice the second one, unless there are T. No number
        is larger than T.
    """
    n = len(F)
    room = max(min(2 << doublings, 1 << T.bit_length()), ConstantScans.least(n))
    powers, many, far = np.empty((room, n, n)), 2, F.dot(F)
    powers[0], powers[1] = np.eye(n), F
    while True:
        while many < room:
            now = powers[:many].reshape(-1, n)
            np.matmul(now, far, out=powers[many : 2 * many].reshape(-1, n))
            many, far = 2 * many, far.dot(far)
        sizes = np.square(powers.reshape(room, -1)).dot(units)[::-1]
        # One is not below them; what the last one exceeds is not known.
        last = [room - int((sizes > limit).argmax()) for limit in limits]
        if room >= T or max(last[0], 2 * last[1]) < room:
            return powers, [T if x == room else min(T, x) for x in last]
        powers, room = np.concatenate((powers, np.empty_like(powers))), 2 * room


def _covariances(powers: _Floats, C: _Floats, first: _Floats) -> _Floats:
    """P_k = Fᵏ P₀ F'ᵏ + C + F C F' + … from the first state's on. # (K, n, n)"""
    n = len(C)
    moved = powers.reshape(-1, n).dot(np.concatenate((C, first), 1))
    sides = moved.reshape(-1, n, 2, n).transpose(2, 0, 1, 3)
    sums, own = sides @ np.ascontiguousarray(powers.swapaxes(-1, -2))
    own[1:] += np.add.accumulate(sums[:-1])
    return own


class End(NamedTuple):
    """What changes as no data follow the last step.

    Attributes:
        M: # (n, n)
        covariances: Those of the supposed series, of the last steps, from the last one on; or the one
            of all of them. # (back, n, n) or (n, n)
        toward: Fᵏ of the last steps, in their order, side by side. # (n, · n)
        log_determinant: Of all noises.
        loss: As of the steady steps.
    """

    M: _Floats
    covariances: _Floats
    toward: _Floats
    log_determinant: float
    loss: float

    @classmethod
    def of(cls, numbers: Numbers, steady: Steady) -> End | None:
        """From the steps as if data followed; None where much more was supposed than they say."""
        T, N, n = numbers.steps, steady.later, len(steady.later)
        P = covariances = steady.covariance
        M, size = steady.end, steady.left
        if T - steady.back <= steady.fore:
            covariances = along(steady, np.arange(T - 1, T - 1 - steady.back, -1))
            P = covariances[0]
            left = np.eye(n) - N.dot(P)
            sign, size = np.linalg.slogdet(left)
            if not sign > 0.0:
                return None
            M = np.linalg.solve(left, N)
            M = (M + M.T) / 2
        # Beside one: how much more certain the last state was supposed to be.
        more = max(1.0, *(M.diagonal() * P.diagonal()).tolist())
        loss = more**2 * steady.loss
        if not (loss <= _LOSS and math.isfinite(size)):
            return None
        # Powers decay to nothing within twice the steps in which their squares do.
        toward = steady.powers[: min(T, 2 * steady.back)][::-1]
        other, first = steady.sizes
        determinant = first + (T - 1) * other + size
        return cls(M, covariances, _beside(toward), determinant, loss)


def _beside(x: _Floats) -> _Floats:
    """Matrices side by side. # (n, · n)"""
    return x.transpose(1, 0, 2).reshape(x.shape[1], -1)


def along(steady: Steady, steps: _Ints) -> _Floats:
    """P_t of some steps. # (steps, n, n)"""
    return steady.covariances[np.minimum(steps, len(steady.covariances) - 1)]
