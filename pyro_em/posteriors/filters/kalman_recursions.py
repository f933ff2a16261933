"""Recursions along the steps of a chain: by reflections step after step until they repeat, and as sums.

A sum x_t = F x_{t−1} + b_t along steps with the same matrix takes as many numpy calls as the logarithm
of their number, x ← x + F x one step before, F ← F²; so do covariances, P ← P + F P Fᵀ.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import cast

import numpy as np
import torch

from pyro_em.posteriors.filters.kalman_arrays import Floats, Ints, Places

SAME = 1e-14  # how far a matrix may be from what it converges to, for it to repeat

_ROOM = 32  # steps for which there is memory at a time
_CHUNK = 64  # different matrices whose products are formed together
_MANY = 256  # chains side by side for which a product each step is the quickest


class Reflections:
    """Reflections of what steps and all later ones say, from the last step on.

    Args:
        B: How many chains there are with matrices of their own.
        n: Numbers of a state.
        k: Noises of a step.
        D: Data of a step.
    """

    def __init__(self, B: int, n: int, k: int, D: int) -> None:
        self._k, self._wide, told = k, k + n, D + n
        # Columns are rows here. The last of them are turned by the reflections of the first.
        array = np.zeros((B, self._wide + told, told + k))
        array[:, :k, told:] = np.eye(k)
        array[:, self._wide :, :told] = np.eye(told)
        self._turned, self._lower = torch.from_numpy(array).mT, np.tri(n)
        self._of_data, self._of_later = array[:, : self._wide, :D], array[:, : self._wide, D:told]
        self._tau = torch.empty(B, min(array.shape[1:]), dtype=torch.float64)
        self._room: Iterator[tuple[Floats, torch.Tensor]] = iter(())

    def of_run(
        self, both: Floats, H: Floats, R: Floats, steps: int
    ) -> tuple[list[Floats], list[Floats], Floats]:
        """What later data say of the states of like steps, from the last one on, until it repeats.

        Args:
            both: G beside A. # (B|1, n, k + n)
            H: Loadings over deviations. # (B|1, D, n)
            R: What data after the last of the steps say of its state. # (B, n, n)
            steps: How many steps there are.

        Returns:
            R of each different step # (B, n, n); its reflections, columns of [[H; R] [G A]; I 0] and
            of [I; 0] one after the other # (B, k + n + D + n, D + n + k); and R of the step before the
            first.
        """
        k, wide = self._k, self._wide
        if len(R) == k == wide - k == 1 and steps > 8:
            return _rows_of_numbers(both[0, 0], H[0, :, 0], float(R[0, 0, 0]), steps)
        self._of_data[:] = _t(H @ both)
        to, later, last, look = _t(both), _t(R), R, 8
        before, out = list[Floats](), list[Floats]()
        while len(out) < steps:
            found, slot = self._next()
            np.matmul(to, later, out=self._of_later)
            torch.geqrf(self._turned, out=(slot, self._tau))  # with less around it than numpy's
            before.append(_t(later))
            out.append(found)
            later = found[:, k:wide, k:wide]
            later = later * np.copysign(self._lower, later.diagonal(0, 1, 2)[:, None])
            if len(out) == look:
                if is_same(_t(later), last):
                    break
                last, look = _t(later), next_look(look)
        return before, out, _t(later)

    def _next(self) -> tuple[Floats, torch.Tensor]:
        """Memory for the results of a step, twice the same."""
        found = next(self._room, None)
        if found is None:
            B, rows, columns = self._turned.shape
            room = np.empty((_ROOM, B, columns, rows))
            self._room = zip(room, torch.from_numpy(room).mT.unbind(0), strict=True)
            found = next(self._room)
        return found


def _rows_of_numbers(
    both: Floats, h: Floats, r: float, steps: int
) -> tuple[list[Floats], list[Floats], Floats]:
    """The same of states that are one number each, in closed form.

    With ρ² = |h|² + r² and u² = 1 + g²ρ², the row of the step before is |a| ρ / u.
    """
    (g, a), size = both.tolist(), float(np.sqrt(h @ h))
    every, last, look = [r], r, 8
    for count in range(1, steps + 1):
        rho = math.hypot(size, r)
        r = abs(a) * rho / math.hypot(1.0, g * rho)
        if count == look:
            if abs(r - last) <= SAME * r:
                steps = count
                break
            last, look = r, next_look(look)
        every.append(r)
    rows = np.asarray(every[:steps])
    of_data, D = np.empty((steps, len(h) + 1)), len(h)
    of_data[:, :D], of_data[:, D] = h, rows
    rho = np.hypot(size, rows)
    u = np.hypot(1.0, g * rho)
    found = np.zeros((steps, 1, D + 3, D + 2))
    found[:, 0, 0, 0] = u
    found[:, 0, 1, 0] = (g * rho) * (a * rho) / u
    found[:, 0, 1, 1] = abs(a) * rho / u
    found[:, 0, 2:, 0] = of_data * (g / u)[:, None]
    share = np.divide(np.sign(a), rho * u, out=np.zeros(steps), where=rho > 0)
    found[:, 0, 2:, 1] = of_data * share[:, None]
    return list(rows[:, None, None, None]), list(found), np.full((1, 1, 1), r)


def scanned(matrices: Floats, places: Places, x: Floats) -> Floats:
    """x_t = F_t x_{t−1} + b_t, from nothing. # (B, n, T, M)

    Args:
        matrices: F. # (B, P, n, n)
        places: Which of them each step has.
        x: b; it is overwritten. # (B, n, T, M)
    """
    M, place = x.shape[-1], places.of
    for start, end, same in places.runs:
        if M >= _MANY:
            for t in range(max(start, 1), end):
                x[:, :, t] += matrices[:, place[t]] @ x[:, :, t - 1]
        elif same:
            _scan_same(matrices[:, place[start]], x, start, end)
        else:
            for at in range(start, end, _CHUNK):
                to = min(at + _CHUNK, end)
                _scan_different(matrices[:, place[at:to]], x, at, to)
    return x


def _scan_same(F: Floats, x: Floats, start: int, end: int) -> None:
    """Steps with the same matrix: x ← x + F x one step before, F ← F²."""
    M = x.shape[-1]
    if start:
        x[:, :, start] += F @ x[:, :, start - 1]
    flat = x[:, :, start:end].reshape(*x.shape[:2], -1)
    apart = 1
    while apart < end - start:
        flat[..., apart * M :] += F @ flat[..., : -apart * M]
        F, apart = F @ F, 2 * apart
        size = float(np.vdot(F, F))
        if size < 1e-40:
            break
        if size > 1e200:  # known states that grow: its square may be infinite, and they zero
            for at in range(apart * M, flat.shape[-1], apart * M):
                piece = flat[..., at : at + apart * M]
                piece += F @ flat[..., at - apart * M : at][..., : piece.shape[-1]]
            break
    x[:, :, start:end] = flat.reshape(*x.shape[:2], -1, M)


def _scan_different(F: Floats, x: Floats, start: int, end: int) -> None:
    """Steps with matrices of their own: the same with products of matrices that follow each other.

    Args:
        F: # (B, end − start, n, n)
        x: # (B, n, T, M)
        start: The first step.
        end: The step after the last.
    """
    own = np.ascontiguousarray(x[:, :, start:end].transpose(0, 2, 1, 3))
    if start:
        own[:, 0] += F[:, 0] @ x[:, :, start - 1]
    apart = 1
    while apart < end - start:
        own[:, apart:] += F[:, apart:] @ own[:, :-apart]
        apart *= 2
        if apart < end - start:
            F = np.concatenate([F[:, : apart // 2], F[:, apart // 2 :] @ F[:, : -apart // 2]], 1)
    x[:, :, start:end] = own.transpose(0, 2, 1, 3)


def covariances(transition: Floats, noise: Floats, places: Places) -> tuple[Floats, Ints]:
    """The different ones of P_t = Φ_t P_{t−1} Φ_tᵀ + C_t, and which each step has.

    Args:
        transition: Φ; zero at the first step. # (B, P, n, n)
        noise: C. # (B, P, n, n)
        places: Which of both each step has.

    Returns:
        # (B, different, n, n), (T,)
    """
    place = places.of
    last = np.zeros_like(noise[:, 0])
    out, count, which = list[Floats](), 0, np.empty(len(place), np.int64)
    for start, end, same in places.runs:
        if same:
            F, C = transition[:, place[start]], noise[:, place[start]]
            found = [_same_covariances(F, C, last, end - start)]
        else:
            found = []
            for at in range(start, end, _CHUNK):
                here = place[at : min(at + _CHUNK, end)]
                found.append(_covariances(transition[:, here], noise[:, here], last))
                last = found[-1][:, -1]
        for new in found:
            out.append(new)
            last = new[:, -1]
        many = sum(x.shape[1] for x in found)
        which[start : start + many] = np.arange(count, count + many)
        count += many
        which[start + many : end] = count - 1
    every = np.concatenate(out, 1)
    return (every + _t(every)) / 2, which


def _same_covariances(F: Floats, C: Floats, before: Floats, steps: int) -> Floats:
    """Those of like steps, until they repeat. # (B, 1 to steps, n, n)"""
    out, apart = (F @ before @ _t(F) + C)[:, None], 1
    while out.shape[1] < steps:
        first = out.shape[1] - apart
        more = out[:, first : first + steps - out.shape[1]]
        more = F[:, None] @ more @ _t(F)[:, None] + C[:, None]
        out = np.concatenate([out, more], 1)
        count = _settled(out)
        if count:
            return out[:, :count]
        if float(np.vdot(F, F)) < 1e200:  # as for `_scan_same`
            C, F, apart = F @ C @ _t(F) + C, F @ F, 2 * apart
    return out


def _covariances(F: Floats, C: Floats, before: Floats) -> Floats:
    """Those of steps with matrices of their own. # (B, steps, n, n)"""
    first = F[:, :1] @ before[:, None] @ _t(F[:, :1])
    out = np.concatenate([C[:, :1] + first, C[:, 1:]], 1)
    apart, steps = 1, out.shape[1]
    while apart < steps:
        here = F[:, apart:]
        more = out[:, apart:] + here @ out[:, :-apart] @ _t(here)
        out = np.concatenate([out[:, :apart], more], 1)
        F = np.concatenate([F[:, :apart], here @ F[:, :-apart]], 1)
        apart *= 2
    return out


def _settled(x: Floats) -> int:
    """How many matrices there are until they repeat; zero if they do not. # x: (B, steps, n, n)

    They are what they converge to if an eighth of all steps makes no difference.
    """
    steps = x.shape[1]
    if steps < 8 or not is_same(x[:, 7 * steps // 8 - 1], x[:, -1]):
        return 0
    last = x[:, -1:]
    near = (np.abs(x - last) <= _limit(last, SAME)).all((0, 2, 3))
    return int(near.argmax()) + 1


def next_look(count: int) -> int:
    """After how many like steps to compare again, with what was found at the last look.

    What converges slowly changes little from a step to the next, and is far from its end.
    """
    return count + 4 + count // 16


def is_same(new: Floats, old: Floats, within: float = SAME) -> bool:
    """Whether matrices are the same, row by row."""
    return bool((np.abs(new - old) <= _limit(new, within)).all())


def _limit(x: Floats, within: float) -> Floats:
    """How far each row may be from another."""
    row = np.abs(x).max(-1, keepdims=True)
    return cast(Floats, within * (row + 1e-2 * row.max(-2, keepdims=True)))


def _t(x: Floats) -> Floats:
    """The transpose."""
    return x.swapaxes(-1, -2)
