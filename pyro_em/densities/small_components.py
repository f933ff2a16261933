"""Few Gaussian components of few features in Python's own numbers: coefficients and M-step.

An operation on tensors takes longer than all arithmetic of two components in the plane. So what
`pyro_em.densities.components` does with tensors is done here number by number, for each component k

    μ = m / w,   Σ = M / w − μ μᵀ = L Lᵀ,   Λ = Σ⁻¹ = L⁻ᵀ L⁻¹,
    coefficients (Λ μ, −½ Λ_ii, −Λ_ij),   h = −½ μᵀ Λ μ − Σ_i log L_ii − ½ D log 2π

with the moments m, M and the mass w of its rows, about the centre of all data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.densities.gaussian import Gaussian
from pyro_em.errors import Handover

_FEW = 64  # K D³ up to which numbers are quicker than tensors

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True, eq=False)
class _Component:
    """One component: mean, factor, covariance, coefficients, h, and its largest term."""

    mu: list[float]
    root: list[list[float]]
    cov: list[list[float]]
    linear: list[float]
    h: float
    size: float


@dataclass(frozen=True, eq=False)
class Solved:
    """Components as tensors.

    Attributes:
        mu: Means, less the centre. # (K, D)
        root: Cholesky factors. # (K, D, D)
        spread: Covariances. # (K, D, D)
        linear: Coefficients of the features. # (K, P)
        constant: h. # (K, 1)
        size: The largest term of the expanded square, times √D.
        gain: By how much an M-step raises the expected log joint with them, in nats.
    """

    mu: Tensor
    root: Tensor
    spread: Tensor
    linear: Tensor
    constant: Tensor
    size: float
    gain: float


@dataclass(frozen=True, eq=False)
class SmallComponents:
    """What is fixed about few components of few features, each with a covariance of its own.

    Attributes:
        D: Features.
        pairs: The pairs of features, as moments and coefficients hold them.
        reach2: The largest square of each centred feature.
        least: The smallest clear variance of each feature.
        limit: How large a term of the expanded square may be.
    """

    D: int
    pairs: Sequence[tuple[int, int]]
    reach2: Sequence[float]
    least: Rows
    limit: float

    @classmethod
    def of(cls, rule: Gaussian, least: Tensor) -> SmallComponents | None:
        """The same of the rows of a group; None where tensors are quicker.

        Args:
            rule: The rows, in float64 as their parameters are.
            least: The smallest clear variances. # (K, D) or (D,)
        """
        D = rule.x.shape[0]
        if rule.K * D**3 > _FEW or rule.x.device.type != "cpu":
            return None
        pairs = list(zip(*(t.tolist() for t in rule.upper), strict=True))
        return cls(D, pairs, rule.reach2.tolist(), least.expand(rule.K, D).tolist(), rule.limit)

    def at(self, mu: Tensor, spread: Tensor) -> Solved | None:
        """The components of some means and covariances; None where their squares would cancel.

        Args:
            mu: Means, less the centre. # (K, D)
            spread: Covariances. # (K, D, D)

        Raises:
            Handover: If a covariance is not positive definite.
        """
        pairs = zip(mu.tolist(), spread.tolist(), strict=True)
        return self._solved([self._component(*pair) for pair in pairs], 0.0)

    def m_step(
        self, moments: Tensor, mass: Tensor, linear: Tensor, constant: Tensor
    ) -> Solved | None:
        """The maximisers; None where their squares would cancel, which tensors see to.

        Args:
            moments: Σ r x' and Σ r x' x'ᵀ. # (K, P)
            mass: Σ r. # (K,)
            linear: Coefficients at the E-step. # (K, P)
            constant: h there. # (K, 1)

        Raises:
            Handover: If a component is empty or near a collapse.
        """
        found, gain = [], 0.0
        before = zip(linear.tolist(), constant.tolist(), strict=True)
        given = zip(moments.tolist(), mass.tolist(), self.least, before, strict=True)
        for own, w, least, (old, (h,)) in given:
            if not w > self.D + 1.1:
                raise Handover
            component = self._component(*self._mean_and_covariance(own, w))
            for i, variance in enumerate(least):
                # A squared pivot over its variance is 1 − R² of a feature on those before it.
                pivot, total = component.root[i][i], component.cov[i][i]
                if not pivot * pivot - variance - 1e-7 * total > 0:
                    raise Handover
            gain += w * (component.h - h)
            for m, new, a in zip(own, component.linear, old, strict=True):
                gain += m * (new - a)
            found.append(component)
        return self._solved(found, gain)

    def _mean_and_covariance(
        self, moments: Sequence[float], w: float
    ) -> tuple[list[float], list[list[float]]]:
        D = self.D
        mu = [m / w for m in moments[:D]]
        cov = [[0.0] * D for _ in range(D)]
        for (i, j), m in zip(self.pairs, moments[D:], strict=True):
            cov[i][j] = cov[j][i] = m / w - mu[i] * mu[j]
        return mu, cov

    def _component(self, mu: list[float], cov: list[list[float]]) -> _Component:
        """The coefficients of one component."""
        root = _cholesky(cov)
        precision = _inverse(root)
        linear, size = [], 0.0
        h = -0.5 * self.D * math.log(2 * math.pi)
        for i, row in enumerate(precision):
            along = 0.0
            for a, b in zip(row, mu, strict=True):
                along += a * b
            linear.append(along)
            h -= 0.5 * along * mu[i] + math.log(root[i][i])
            size = max(size, row[i] * self.reach2[i])
        for i, j in self.pairs:
            linear.append(-0.5 * precision[i][i] if i == j else -precision[i][j])
        return _Component(mu, root, cov, linear, h, size)

    def _solved(self, found: Sequence[_Component], gain: float) -> Solved | None:
        """The same as tensors: the columns of a table."""
        size = max([c.size for c in found]) * self.D**0.5
        if not size <= self.limit:
            return None
        rows = [[*c.mu, *_flat(c.root), *_flat(c.cov), *c.linear, c.h] for c in found]
        D, P = self.D, self.D + len(self.pairs)
        table = torch.tensor(rows, dtype=torch.float64)
        mu, root, cov, linear, h = table.split([D, D * D, D * D, P, 1], 1)
        shape = (len(rows), D, D)
        return Solved(mu, root.view(shape), cov.view(shape), linear, h, size, gain)


def _flat(matrix: Rows) -> list[float]:
    return [a for row in matrix for a in row]


def _cholesky(a: Rows) -> list[list[float]]:
    """L with L Lᵀ = A.

    Raises:
        Handover: If A is not positive definite.
    """
    D = len(a)
    out = [[0.0] * D for _ in a]
    for j in range(D):
        for i in range(j, D):
            rest = a[i][j]
            for k in range(j):
                rest -= out[i][k] * out[j][k]
            if i > j:
                out[i][j] = rest / out[j][j]
            elif rest > 0:
                out[j][j] = math.sqrt(rest)
            else:
                raise Handover
    return out


def _inverse(root: Rows) -> list[list[float]]:
    """(L Lᵀ)⁻¹ = Wᵀ W, with W = L⁻¹."""
    D = len(root)
    own = [[0.0] * D for _ in root]
    out = [[0.0] * D for _ in root]
    for i, row in enumerate(root):
        own[i][i] = 1 / row[i]
        for j in range(i):
            rest = 0.0
            for k in range(j, i):
                rest -= row[k] * own[k][j]
            own[i][j] = rest / row[i]
    for row in own:
        for i in range(D):
            for j in range(D):
                out[i][j] += row[i] * row[j]
    return out
