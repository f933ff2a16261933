"""The M-step of Gaussian chains from sums by compiled loops: arrays are laid out once.

The same as `state_sums`, `state_regression` and `state_spreads` in order: a few calls for each site
instead of many of numpy, which take longer than the sums themselves. Whatever is not clearly determined
is left to these.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Places
from pyro_em.posteriors.chain_sums.state_matrices import (
    TRANSITION,
    ChainMatrices,
    ChainNumbers,
)
from pyro_em.posteriors.chain_sums.state_regression import Line, Regression
from pyro_em.posteriors.chain_sums.state_sites import Site, indices
from pyro_em.posteriors.chain_sums.state_spreads import LOST, Spreads
from pyro_em.posteriors.chain_sums.state_sums import SiteNumbers, SiteSums
from pyro_em.posteriors.filters.state_space import Smoothed, SmoothedArrays

_LARGEST = 64  # unknowns of a system that loops solve as quickly as LAPACK
_CLEAR = 1e8  # the condition of systems beyond which numpy's way looks at eigenvalues

_NONE: Numbers = np.empty((0, 0, 0, 0))
_NO_PRECISION: Numbers = np.empty((0, 0, 0))


@dataclass(frozen=True, eq=False)
class _Laid:
    """A site as compiled loops read it.

    Attributes:
        site: The site.
        chain: The number of its component.
        kinds: The kinds of its steps.
        levels: The steps of its members. # (N,)
        before: The steps of the states that they read. # (N,)
        there: Whether rows read what they could. # (K, Q)
        weight: What counts; empty if all does. # (chains, N, K, D|1)
        line: Its normal equations.
        design: Those of the line; empty where there is none. # (lead, K, D, q, w)
        column: # (lead, K, D, w)
        place: Where products of columns go. # (lead, K, D, w · w)
        row: Numbers of r rᵀ that are summed for spreads, as one. # (entries,)
        to: The element of θ that each is summed for. # (entries,)
        factor: What it is multiplied by. # (entries,)
    """

    site: Site
    chain: int
    kinds: Places
    levels: Places
    before: Places
    own: Places
    reads: Places
    there: NDArray[np.bool_]
    features: Numbers
    weight: Numbers
    line: Line | None
    design: Numbers
    column: Places
    place: Places
    row: Places
    to: Places
    factor: Numbers

    @cached_property
    def is_known(self) -> bool:
        """Whether no parameter is learned from it."""
        return self.line is None and not len(self.row)

    @cached_property
    def by_numpy(self) -> bool:
        """Whether noises tie the equations of the entries of a row to each other."""
        return self.line is not None and self.site.spread.is_matrix and not self.line.cancels


@dataclass(frozen=True, eq=False)
class CompiledMStep:
    """The M-step of some chains.

    Attributes:
        chains: The matrices of each component.
        regression: Least squares of coefficients.
        spreads: Closed forms of spreads.
        laid: Of each site.
        sizes: Of all systems. # (systems,)
        least: What rounding may be of each deviation. # (p,)
    """

    chains: tuple[ChainMatrices, ...]
    regression: Regression
    spreads: Spreads
    laid: tuple[_Laid, ...]
    sizes: Places
    least: Numbers

    @classmethod
    def of(
        cls, chains: tuple[ChainMatrices, ...], regression: Regression, spreads: Spreads
    ) -> CompiledMStep | None:
        """That of some chains; None where a system is large, or vectors count in part."""
        sizes = np.array([n for count, n in regression.systems for _ in range(count)], np.int64)
        if sizes.max(initial=1) > _LARGEST:
            return None
        if any(s.by_entry and s.spread.is_matrix for m in chains for s in m.sites):
            return None
        laid, lines = list[_Laid](), iter(regression.lines)
        for c, matrices in enumerate(chains):
            for site, kinds in zip(matrices.sites, matrices.kinds, strict=True):
                laid.append(_laid(site, c, kinds, next(lines), spreads.entries_of(len(laid))))
        return cls(chains, regression, spreads, tuple(laid), sizes, spreads.rounding)

    def on(self, chains: tuple[ChainMatrices, ...], spreads: Spreads) -> CompiledMStep:
        """The same on other data."""
        return replace(self, chains=chains, spreads=spreads, least=spreads.rounding)

    def maximiser(
        self, theta: Numbers, found: Sequence[tuple[ChainNumbers, Smoothed | SmoothedArrays]]
    ) -> Numbers | None:
        """θ after the M-step; None where numpy's way has to look.

        Args:
            theta: The parameters of the E-step.
            found: Of each component, numbers and the smoother's results.
        """
        compiled = _loops()
        numbers = [n for own, _ in found for n in own.sites]
        states = [
            _States.of(own, s, m.dynamics.numpy())
            for m, (own, s) in zip(self.chains, found, strict=True)
        ]
        p = len(self.regression.unknowns)
        gram, right, step = np.zeros(self.regression.room + 1), np.zeros(p + 1), np.zeros(p + 1)
        sums = list[SiteSums | None]()
        for i, (laid, own) in enumerate(zip(self.laid, numbers, strict=True)):
            if laid.is_known:
                sums.append(None)
                continue
            s = _sums_of(laid, own, states[laid.chain])
            sums.append(s)
            if laid.by_numpy:
                self.regression.add(i, own, s, gram, right)
            elif laid.line is not None:
                is_matrix = laid.site.spread.is_matrix
                compiled.equations(
                    laid.design,
                    laid.column,
                    laid.place,
                    _NO_PRECISION if is_matrix else own.spread**-2,
                    s.phi_phi,
                    s.r_phi,
                    gram,
                    right,
                    np.empty(laid.design.shape[3:]),
                )
        if len(self.sizes):
            largest = int(self.sizes.max())
            work = np.zeros((3, largest, largest))
            if not compiled.solved(gram, right, self.sizes, step, work, _CLEAR):
                return None
        total = np.zeros(len(theta))
        for laid, told in zip(self.laid, sums, strict=True):
            if told is None:
                continue
            compiled.spreads(
                laid.design,
                laid.column,
                step,
                told.phi_phi,
                told.r_phi,
                told.r_r,
                laid.site.spread.is_matrix,
                laid.row,
                laid.to,
                laid.factor,
                total,
                np.empty((2, *told.r_phi.shape[2:])),
            )
        out = theta.copy()
        out[self.regression.unknowns] += step[:-1]
        return out if self._spreads(theta, total, out) else None

    def _spreads(self, theta: Numbers, total: Numbers, out: Numbers) -> bool:
        """Put spreads into the new parameters; whether each is clear of a collapse."""
        own, compiled = self.spreads, _loops()
        if len(own.chosen):
            natural = np.empty(len(own.chosen))
            if not compiled.deviations(
                total, own.chosen, own.count, self.least, own.before(theta), LOST, natural
            ):
                return False
            out[own.chosen] = own.limited(natural)
        for m in own.matrices:
            if not compiled.matrices(
                total,
                m.begin,
                m.count,
                m.magnitude,
                m.is_factor,
                theta,
                LOST,
                out,
                np.zeros((2, m.size, m.size)),
            ):
                return False
        return True


@dataclass(frozen=True, eq=False)
class _States:
    """What a smoother says of some chains: see `state_sums.States`.

    Attributes:
        mean: # (chains, T, n)
        noise: E[G ε]. # (chains, T, n)
        covariance: The different ones. # (chains|1, P, n, n)
        of_covariance: Which of them each step has. # (chains|1, T)
        sums: Σ Cov(G ε), Σ Cov(G ε, x before), Σ P before, by kind. # (3, chains|1, U, n, n)
    """

    mean: Numbers
    noise: Numbers
    covariance: Numbers
    of_covariance: NDArray[np.int32]
    sums: Numbers

    @classmethod
    def of(cls, own: ChainNumbers, found: Smoothed | SmoothedArrays, dynamics: Places) -> _States:
        if isinstance(found, Smoothed):
            found = SmoothedArrays(*(_ready(x, x.dtype) for x in SmoothedArrays.of(found)))
        _, _, mean, noise, P, of_P, F, C, of_F = found
        A = _ready(own.arrays[TRANSITION], np.float64)
        U, n = A.shape[1:3]
        sums = np.zeros((3, len(P), U, n, n))
        _loops().disturbances(P, of_P, F, C, of_F, A, dynamics, sums, np.empty((2, n, n)))
        return cls(mean, noise, P, of_P, sums)


class _Loops(NamedTuple):
    """Compiled loops: see `numba_sums` and `numba_m_step`."""

    disturbances: Any
    means: Any
    covariances_of_data: Any
    covariances_of_latents: Any
    equations: Any
    solved: Any
    spreads: Any
    deviations: Any
    matrices: Any
    width: int


@cache
def _loops() -> _Loops:
    """Those of the M-step; to import them takes time, and Numba."""
    from pyro_em.posteriors.chain_sums import numba_m_step, numba_sums

    modules = {**vars(numba_sums), **vars(numba_m_step), "width": numba_sums.WIDTH}
    return _Loops(*(modules[name] for name in _Loops._fields))


def _sums_of(laid: _Laid, own: SiteNumbers, states: _States) -> SiteSums:
    """What the M-step needs of a site; squares as a column where entries are independent."""
    compiled = _loops()
    site, is_matrix = laid.site, laid.site.spread.is_matrix
    lead, (K, Q), D = site.lead, laid.reads.shape, site.width
    q, E = Q + len(laid.features), D if site.by_entry else 1
    phi_phi, r_phi = np.zeros((lead, K, E, q, q)), np.zeros((lead, K, D, q))
    r_r = np.zeros((lead, K, D, D if is_matrix else 1))
    C = own.coefficients
    rows = np.empty((D + q, min(compiled.width, len(laid.levels))))
    compiled.means(
        states.mean,
        states.noise,
        _NONE if own.residual is None else own.residual,
        laid.levels,
        laid.before,
        laid.own,
        laid.reads,
        laid.there,
        laid.features,
        C,
        laid.weight,
        is_matrix,
        phi_phi,
        r_phi,
        r_r,
        rows,
        np.empty((E, rows.shape[1])),
    )
    chains = len(states.mean)
    if site.is_latent:
        compiled.covariances_of_latents(
            states.sums,
            chains,
            laid.kinds,
            laid.own,
            laid.reads,
            laid.there,
            is_matrix,
            phi_phi,
            r_phi,
            r_r,
        )
    elif Q:
        compiled.covariances_of_data(
            states.covariance,
            states.of_covariance,
            laid.levels,
            chains,
            laid.reads,
            laid.there,
            C,
            laid.weight,
            is_matrix,
            phi_phi,
            r_phi,
            r_r,
            np.zeros(states.covariance.shape[1]),
            np.empty((Q, Q)),
        )
    return SiteSums(phi_phi, r_phi, r_r)


def _laid(
    site: Site,
    chain: int,
    kinds: Places,
    line: Line | None,
    spreads: tuple[Places, Places, Numbers],
) -> _Laid:
    weight = _NONE
    if site.weight is not None:
        weight = site.weight if site.by_entry else site.weight[..., None]
    there = np.ones(site.reads.shape, np.bool_) if site.there is None else site.there
    design: Numbers = np.empty((0,) * 5)
    column = place = np.empty((0,) * 4, dtype=np.int64)
    if line is not None:
        design, column = line.design, line.column
        place = line.gram_place
        if place.ndim == 5:
            place = place.reshape(*place.shape[:3], -1)
    ints: list[Any] = [indices(site.levels), indices(site.before), site.own, site.reads]
    levels, before, own, reads = (_ready(x, np.int64) for x in ints)
    row, to, factor = spreads
    return _Laid(
        site,
        chain,
        _ready(kinds, np.int64),
        levels,
        before,
        own,
        reads,
        _ready(there, np.bool_),
        _ready(site.features, np.float64),
        _ready(weight, np.float64),
        line,
        _ready(design, np.float64),
        _ready(column, np.int64),
        _ready(place, np.int64),
        _ready(row, np.int64),
        _ready(to, np.int64),
        _ready(factor, np.float64),
    )


def _ready(x: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """One type of array for each argument, so that loops are compiled once."""
    if x.dtype == dtype and x.flags.carray:
        return x
    return np.require(x, dtype, ["C", "W"])
