"""Schemes of extrapolation: from two EM maps in a row, where EM is going to.

With u0, u1 = EM(u0) and u2 = EM(u1) in unconstrained coordinates, a scheme proposes points beyond u2,
the farthest first; the cycle that tries them (`pyro_em.fitting.steps.cycles`) keeps the first whose
evidence will do, or takes u2. `Squarem` needs these three points; `QuasiNewton` also remembers secants
of the cycles before. Coordinates that are not finite (a probability of zero) are left to EM.

Sources: Varadhan and Roland (2008), "Simple and globally convergent methods for accelerating the
convergence of any EM algorithm", Scandinavian Journal of Statistics 35(2). Zhou, Alexander and Lange
(2011), "A quasi-Newton acceleration for high-dimensional optimization algorithms", Statistics and
Computing 21(2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_FARTHER, _NEARER = 4.0, 0.5  # how the limit changes after a proposal that was kept, or was not

_SECANTS = 5

# Directions count as different where the condition number of their Gram matrix is below this.
_CONDITION = 1e6


@dataclass(frozen=True, eq=False)
class Secant:
    """What the EM map made of a difference: v = EM(u + d) − EM(u).

    Attributes:
        d: The difference, in unconstrained coordinates.
        v: What became of it.
    """

    d: Tensor
    v: Tensor


@dataclass(frozen=True, eq=False)
class Triple:
    """Two EM maps in a row, u0 → u1 → u2, in unconstrained coordinates."""

    u0: Tensor
    u1: Tensor
    u2: Tensor

    def secant(self) -> Secant:
        """The two steps, zero where a coordinate is not finite."""
        finite = torch.isfinite(torch.stack([self.u0, self.u1, self.u2])).all(0)
        zero = torch.zeros_like(self.u0)
        d = torch.where(finite, self.u1 - self.u0, zero)
        return Secant(d, torch.where(finite, self.u2 - self.u1, zero))


@dataclass(frozen=True, eq=False)
class Proposals:
    """Where the next cycle might begin.

    Attributes:
        points: In the order in which they are tried.
        kept: How far the next cycle may go if the first of them was kept.
        rejected: And if it was not.
    """

    points: tuple[Tensor, ...]
    kept: float
    rejected: float


class Scheme(Protocol):
    """A way to extrapolate.

    Attributes:
        slack: By how many nats a proposal may be below the best evidence seen.
        tries: Proposals of one cycle at most.
        secants: How many secants it looks at.
    """

    slack: float
    tries: int
    secants: int

    def proposals(self, at: Triple, secants: Sequence[Secant], limit: float) -> Proposals:
        """Proposals beyond u2.

        Args:
            at: The last two EM maps.
            secants: Theirs and those of the cycles before, the newest first.
            limit: How far to go at most, in steps of EM.
        """
        ...


class Squarem:
    """Extrapolation along two steps, with r = u1 − u0, v = (u2 − u1) − r:

        u' = u0 − 2 α r + α² v,     α = −‖r‖ / ‖v‖     (scheme S3; α = −1 is u2)

    The first proposal goes as far as α says, the second half as far. A strict guard costs several times
    the steps, so that the evidence may fall for a while.
    """

    slack, tries, secants = 0.5, 2, 1

    def proposals(self, at: Triple, secants: Sequence[Secant], limit: float) -> Proposals:
        """See `Scheme.proposals`."""
        r, step = secants[0].d, secants[0].v
        v = step - r
        size, bend = float(r.norm()), float(v.norm())
        alpha = -min(max(size / bend, 1.0), limit) if bend > 0 else -1.0
        farther = _FARTHER * limit if -alpha >= limit else limit
        finite = torch.isfinite(torch.stack([at.u0, at.u1, at.u2])).all(0)
        points = []
        for _ in range(self.tries):
            if alpha >= -1:
                break
            points.append(torch.where(finite, at.u0 - 2 * alpha * r + alpha**2 * v, at.u2))
            alpha = (alpha - 1) / 2
        return Proposals(tuple(points), farther, farther)


class QuasiNewton:
    """Newton's step for u = EM(u), with the derivative of the map from secants.

    With differences D, what EM made of them V, and A = (DᵀD)⁻¹ DᵀV, the derivative of the map on the
    span of D, the fixed point of the linear map that agrees with the secants is

        u' = u2 + V A (I − A)⁻¹ e₁,     e₁ the newest secant,

    which is Zhou, Alexander and Lange's update. Their q secants (two in most of their examples) are the
    last five here; the oldest are left out where they say nothing new. Near a maximum the eigenvalues
    λ of A are rates of convergence, between 0 and 1, and each direction goes λ / (1 − λ) of its last
    step farther. Far from it the map bends: a rate near or above 1 would send the step anywhere, so
    that no direction goes farther than a limit, which grows while proposals at the limit are kept, and
    shrinks where one is not.
    """

    slack, tries, secants = 0.0, 1, _SECANTS

    def proposals(self, at: Triple, secants: Sequence[Secant], limit: float) -> Proposals:
        """See `Scheme.proposals`."""
        nearer = max(1.0, _NEARER * limit)
        for count in range(len(secants), 0, -1):
            found = _newton_step(secants[:count], limit)
            if found is not None:
                step, is_limited = found
                kept = _FARTHER * limit if is_limited else limit
                return Proposals((at.u2 + step,), kept, nearer)
        return Proposals((), limit, nearer)


def _newton_step(secants: Sequence[Secant], limit: float) -> tuple[Tensor, bool] | None:
    """V A (I − A)⁻¹ e₁, no direction farther than the limit; None where the secants do not say it.

    Returns:
        The step, and whether the limit has shortened it.
    """
    d, v = torch.stack([s.d for s in secants], 1), torch.stack([s.v for s in secants], 1)
    sizes = d.norm(dim=0)
    if not bool((sizes > 0).all()):
        return None
    d, v = d / sizes, v / sizes
    gram = d.mT @ d
    if not bool(torch.linalg.cond(gram) < _CONDITION):
        return None
    try:
        rates, directions = torch.linalg.eig(torch.linalg.solve(gram, d.mT @ v))
        if bool((rates.imag != 0).any()):  # a rotation: there is no maximum in its plane
            return None
        rates, directions = rates.real, directions.real
        is_far = rates >= limit / (1 + limit)
        farther = rates / (1 - torch.where(is_far, torch.zeros_like(rates), rates))
        farther = torch.where(is_far, torch.full_like(rates, limit), farther)
        first = torch.zeros_like(rates)
        first[0] = sizes[0]
        step = v @ (directions @ (farther * torch.linalg.solve(directions, first)))
    except torch.linalg.LinAlgError:
        return None
    return step, bool(is_far.any())


SCHEMES: dict[str, Scheme] = {"squarem": Squarem(), "quasi-newton": QuasiNewton()}


# What "auto" takes where plain steps are slow.
AUTO = "quasi-newton"
