"""The matrices of Gaussian chains whose steps are alike, from one vector of parameters.

Each entry of a matrix of `pyro_em.posteriors.filters.state_space.StateSpace` is an element of the
vector, a map of one or a constant, so that all are made by a few operations of numpy. They are held
once against those of the ordinary way through all sites (`pyro_em.posteriors.states.state_numbers`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.chain_sums.state_arguments import Numbers, Places, Unlike
from pyro_em.posteriors.chain_sums.state_flat import Scatter, Vector
from pyro_em.posteriors.chain_sums.state_sites import Site, indices
from pyro_em.posteriors.chain_sums.state_sums import SiteNumbers
from pyro_em.posteriors.filters.condensed import stays_wide
from pyro_em.posteriors.filters.kalman import compiles, smoothed
from pyro_em.posteriors.filters.kalman_groups import Group
from pyro_em.posteriors.filters.state_space import Smoothed, SmoothedArrays, StateSpace
from pyro_em.posteriors.states.state_layout import StateLayout

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Entry:
    """Where numbers of one site go in an array, for each kind of step or each step.

    Attributes:
        place: In the array of one chain, flat. # (kinds, numbers)
        is_twice: Whether numbers meet at a place.
    """

    place: Places
    is_twice: bool

    def is_all_of(self, array: Numbers) -> bool:
        """Whether numbers take all places of an array, in their order."""
        every = np.arange(array[0].size)
        return np.array_equal(self.place.reshape(-1), every)

    def into(self, array: Numbers, numbers: Numbers) -> None:
        """Put numbers into an array that is zero there.

        Args:
            array: # (lead, …)
            numbers: # (lead|1, kinds|1, numbers)
        """
        flat = array.reshape(len(array), -1)
        if self.is_twice:
            at = np.broadcast_to(
                np.arange(len(flat))[:, None, None], (len(flat), *self.place.shape)
            )
            np.add.at(flat, (at, self.place[None]), numbers)
        else:
            flat[:, self.place] = numbers


@dataclass(frozen=True, eq=False)
class ChainNumbers:
    """The arguments of some chains at parameters.

    Attributes:
        arrays: Transition, drift, noise, loading, deviation and data.
        sites: Of each site.
        constant: What the evidence has besides, in nats.
        of: The chains.
    """

    arrays: Sequence[Numbers]
    sites: tuple[SiteNumbers, ...]
    constant: float
    of: ChainMatrices

    @cached_property
    def space(self) -> StateSpace:
        """Their state-space model."""
        A, drift, G, H, s, value = (torch.from_numpy(x) for x in self.arrays)
        own = self.of
        return StateSpace(A, drift, G, own.dynamics, H, s, own.measurement, value, own.seen)

    @property
    def is_compiled(self) -> bool:
        """Whether loops over their steps are compiled."""
        chains, steps = self.arrays[DATA].shape[:2]
        return compiles(chains * steps)

    def smoothed(self) -> Smoothed | SmoothedArrays:
        """Their E-step."""
        if self.of.steps is None or not self.is_compiled:
            return smoothed(self.space)
        from pyro_em.posteriors.filters.kalman_compiled import smoothed_group

        A, drift, G, H, s, value = (np.ascontiguousarray(x) for x in self.arrays)
        s = s[0]
        return smoothed_group(Group(s, A[0], G[0], H[0], 1.0 / s, *self.of.steps, value, drift))


TRANSITION, DRIFT, NOISE, LOADING, DEVIATION, DATA = range(6)
_SMALL = (TRANSITION, NOISE, LOADING, DEVIATION)  # no larger with more steps


@dataclass(frozen=True, eq=False)
class ChainMatrices:
    """From parameters to the matrices of chains.

    Attributes:
        sites: The sites.
        kinds: For each site the kinds of its steps.
        bare: Transition, drift, noise, loading, deviation and data without what sites put there.
        where: For each site where its coefficients, its spreads, and its offsets or data go.
        dynamics: # (T,)
        measurement: # (T,)
        seen: See `StateSpace`.
    """

    sites: tuple[Site, ...]
    kinds: tuple[Places, ...]
    bare: tuple[Numbers, ...]
    where: tuple[tuple[Entry, Entry, Entry], ...]
    dynamics: Tensor
    measurement: Tensor
    seen: Tensor | None

    @classmethod
    def of(
        cls,
        layout: StateLayout,
        joined: Sequence[tuple[Site, tuple[int, ...]]],
        space: StateSpace,
        theta: Numbers,
    ) -> ChainMatrices:
        """Those of some chains.

        Args:
            layout: Where the sites lie.
            joined: The sites, each with the stacks that it stands for.
            space: The chains at some parameters, as an E-step through tables has them.
            theta: These parameters.

        Raises:
            Unlike: If these are not the matrices there.
        """
        form = layout.form
        n, D, T, k = form.size, form.width, form.steps, form.fresh
        sites = tuple(site for site, _ in joined)
        alike = (False,) * len(layout.stacks)
        latents, data = layout.kinds(alike, True), layout.kinds(alike, False)
        own, its = (max(s.lead for s in sites if s.is_latent == x) for x in (True, False))
        moved = max(s.offset.constant.shape[1] for s in sites if s.is_latent)
        transition = np.zeros((own, latents.count, n, n))
        here, before = form.carried.numpy().T
        transition[:, :, here, before] = 1
        bare = (
            transition,
            np.zeros((moved, T, n)),
            np.zeros((own, latents.count, n, k)),
            np.zeros((its, data.count, D, n)),
            np.ones((its, data.count, D)),
            np.zeros((form.chains, T, D)),
        )
        kinds = [
            np.concatenate([(latents if s.is_latent else data).entries[i][0] for i in stacks])
            for s, stacks in joined
        ]
        where = [_places(s, own_kinds, n, k, D) for s, own_kinds in zip(sites, kinds, strict=True)]
        found = cls(
            sites,
            tuple(kinds),
            bare,
            tuple(where),
            latents.of_level,
            data.of_level,
            space.seen,
        )
        arrays, _, _ = found.arrays(theta)
        theirs = (
            space.transition,
            space.drift,
            space.noise,
            space.loading,
            space.deviation,
            space.value,
        )
        if not all(_is_same(x, y.numpy()) for x, y in zip(arrays, theirs, strict=True)):
            raise Unlike("its matrices are others than those of its sites")
        return found

    def on(self, values: Iterable[Numbers | None]) -> ChainMatrices:
        """The same with other data of each site, or none."""
        pairs = zip(self.sites, values, strict=True)
        out = replace(
            self, sites=tuple(s if s.value is v else replace(s, value=v) for s, v in pairs)
        )
        own = {n: x for n, x in vars(self).items() if n in ("vector", "_small")}
        vars(out).update(own)  # no datum is in these
        return out

    def at(self, theta: Numbers) -> ChainNumbers:
        """The chains at parameters.

        Raises:
            LinAlgError: If a covariance is none.
        """
        arrays, own, constant = self.arrays(theta)
        return ChainNumbers(arrays, tuple(own), constant, self)

    def arrays(self, theta: Numbers) -> tuple[list[Numbers], list[SiteNumbers], float]:
        """The matrices, the numbers of each site, and what the evidence has besides, in nats."""
        vector = self.vector.at(theta)
        (drift, drifts), (data, moves) = self._stays
        drift = drift.copy() if drifts else drift
        data = data.copy() if moves and not self._is_all_data else data
        own, constant = [], 0.0
        for site, piece, where in zip(self.sites, self.vector.pieces, self.where, strict=True):
            C, spread = piece.coefficients.of(vector), piece.spread.of(vector)
            if site.is_latent:
                own.append(SiteNumbers(C, spread, None))
                if not site.offset.is_constant:
                    where[2].into(drift, _by_step(site.offset.at(theta)))
                continue
            residual = self._residual(site, theta)
            own.append(SiteNumbers(C, spread, residual))
            if piece.whitened is not None:
                residual = _whitened(spread, C, residual, piece.whitened.of(vector))
                logs = np.log(spread.diagonal(0, -2, -1)).sum(-1)
                constant -= float((logs * site.count).sum())
            if piece.whitened is None and site.offset.is_constant:
                continue
            if self._is_all_data:
                data = residual.reshape(self.bare[DATA].shape)
            else:
                where[2].into(data, residual.reshape(len(residual), site.steps, -1))
        A, G, H, s = self._small.at(vector)
        return [A, drift, G, H, s, data], own, constant

    @cached_property
    def steps(self) -> tuple[Places, Places, NDArray[np.bool_]] | None:
        """Which matrices each step has, and what is seen; None where chains differ, or data are many.

        See `pyro_em.posteriors.filters.kalman_groups.Group`.
        """
        D, n = self.bare[LOADING].shape[-2:]
        seen = np.ones((1, 1, D), np.bool_) if self.seen is None else self.seen.numpy()
        leads = (len(self.bare[i]) for i in _SMALL)
        if max(*leads, len(seen)) > 1 or not stays_wide(n, D):
            return None
        dynamics, measurement = _whole(self.dynamics), _whole(self.measurement)
        return dynamics, measurement, np.ascontiguousarray(seen[0])

    @cached_property
    def vector(self) -> Vector:
        """From parameters to the numbers of all sites."""
        return Vector.of(self.sites)

    @cached_property
    def _small(self) -> Scatter:
        """Where they go in all matrices but drift and data."""
        entries = []
        for site, own, where in zip(self.sites, self.vector.pieces, self.where, strict=True):
            of_C, of_spread, _ = where
            C, spread = (0, 1) if site.is_latent else (2, 3)
            entries.append((C, of_C.place, own.whitened or own.coefficients))
            if own.whitened is None:
                entries.append((spread, of_spread.place, own.spread))
        return Scatter.of([self.bare[i] for i in _SMALL], entries)

    @cached_property
    def _is_all_data(self) -> bool:
        """Whether one site has all data, in the order of the array."""
        own = [w for s, w in zip(self.sites, self.where, strict=True) if not s.is_latent]
        return len(own) == 1 and own[0][2].is_all_of(self.bare[DATA])

    @cached_property
    def _stays(self) -> tuple[tuple[Numbers, bool], tuple[Numbers, bool]]:
        """Drift and data with what no parameter reaches, and whether one reaches any of them."""
        drift, data = self.bare[DRIFT].copy(), self.bare[DATA].copy()
        drifts = moves = False
        for site, (_, _, of_last) in zip(self.sites, self.where, strict=True):
            stays = site.offset.is_constant
            if site.is_latent and stays:
                of_last.into(drift, _by_step(site.offset.constant))
            elif site.is_latent:
                drifts = True
            elif stays and not site.spread.is_matrix:
                own = self._known_residuals[site.name]
                of_last.into(data, own.reshape(len(own), site.steps, -1))
            else:
                moves = True
        return (drift, drifts), (data, moves)

    def _residual(self, site: Site, theta: Numbers) -> Numbers:
        """The data less offsets, zero where missing. # (chains, N, K, D)"""
        if site.offset.is_constant:
            return self._known_residuals[site.name]
        return _less(site, site.offset.at(theta))

    @cached_property
    def _known_residuals(self) -> dict[str, Numbers]:
        """Those of sites whose offsets no parameter reaches."""
        return {
            s.name: _less(s, s.offset.constant)
            for s in self.sites
            if s.value is not None and s.offset.is_constant
        }


def _places(site: Site, kinds: Places, n: int, k: int, D: int) -> tuple[Entry, Entry, Entry]:
    """Where coefficients, spreads, and offsets or data of a site go."""
    kind, levels = kinds[:, None], indices(site.levels)
    own, reads = site.own, site.reads
    rows, columns = (n, k) if site.is_latent else (D, 1)
    of_C = (own[:, :, None] * n + reads[:, None]).reshape(1, -1) + kind * (rows * n)
    if site.is_latent and site.spread.is_matrix:
        of_spread = own[:, :, None] * columns + own[:, None]
    elif site.is_latent:
        of_spread = own * (columns + 1)
    else:
        of_spread = own
    of_spread = of_spread.reshape(1, -1) + kind * (rows * columns)
    of_last = levels[:, None] * rows + own.reshape(1, -1)
    # Only what a row reads twice can meet: steps, kinds and a row's own numbers lie apart.
    one = np.sort(of_C[0])
    is_twice = bool((one[1:] == one[:-1]).any())
    return Entry(of_C, is_twice), Entry(of_spread, False), Entry(of_last, False)


def _whole(x: Tensor) -> Places:
    """Whole numbers of steps, one after the other in memory."""
    return np.ascontiguousarray(x.numpy())


def _whitened(spread: Numbers, C: Numbers, residual: Numbers, white: Numbers) -> Numbers:
    """L⁻¹ r of all steps # (chains, N, K, D); L⁻¹ C goes to `white`.

    Raises:
        LinAlgError: If L is singular.
    """
    chains, N = residual.shape[:2]
    if compiles(chains * N):
        out = np.empty_like(residual)
        _loop()(spread, C, residual, white, out)
        return out
    inverse: Numbers = np.linalg.inv(spread).astype(np.float64, copy=False)
    np.matmul(inverse, C, out=white)
    return _by_rows(residual, inverse)


@cache
def _loop() -> Callable[..., None]:
    """Of whitening; to import it takes time, and Numba."""
    from pyro_em.posteriors.chain_sums.numba_whitening import whiten

    return cast(Callable[..., None], whiten)


def _by_rows(x: Numbers, matrices: Numbers) -> Numbers:
    """Matrices of each chain and rank times the rows of all steps. # (chains, N, K, D)"""
    return (x.swapaxes(1, 2) @ matrices.swapaxes(-1, -2)).swapaxes(1, 2)


def _by_step(x: Numbers) -> Numbers:
    """Offsets by chain and step. # (chains|1, N|1, numbers)"""
    return x.swapaxes(0, 1).reshape(x.shape[1], x.shape[0], -1)


def _less(site: Site, offset: Numbers) -> Numbers:
    """The data less an offset, zero where missing."""
    assert site.value is not None
    out = site.value - offset.swapaxes(0, 1)
    if site.weight is not None:
        out = out * (site.weight if site.by_entry else site.weight[..., None])
    return np.ascontiguousarray(out)


def _is_same(x: Numbers, y: Numbers) -> bool:
    """Whether arrays hold the same numbers but for rounding, whatever of them is held once."""
    try:
        size = float(np.abs(y).max(initial=0.0))
        return bool((np.abs(x - y) <= 1e-12 * max(size, 1.0)).all())
    except ValueError:
        return False
