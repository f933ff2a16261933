"""Gaussian chains whose steps are alike, on sums over steps: EM without a look at single sites.

Parameters are one vector θ; the matrices of the chains, the sums of an E-step and the maximisers of an
M-step are a few operations of numpy each, and none for each step of the series but in the filter and
smoother (`pyro_em.posteriors.kalman`). Whatever is out of the ordinary is handed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pyro_em.errors import Finding, Handover
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.gaussian_chain import GaussianChain
from pyro_em.posteriors.gaussian_steps import for_updates
from pyro_em.posteriors.kalman import smoothed
from pyro_em.posteriors.state_arguments import Numbers, Places, Unlike
from pyro_em.posteriors.state_layout import StateLayout
from pyro_em.posteriors.state_regression import Regression, Spreads
from pyro_em.posteriors.state_sites import Site, site_of
from pyro_em.posteriors.state_space import Smoothed, StateSpace
from pyro_em.posteriors.state_sums import SiteNumbers, States, sums_of
from pyro_em.updates.expansion import centred_latents
from pyro_em.updates.statistics import Expectation
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate

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

    @classmethod
    def of(cls, place: Places) -> Entry:
        """# place: (kinds, numbers)"""
        return cls(place, len(np.unique(place)) < place.size)

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
        space: Their state-space model.
        sites: Of each site.
        constant: What the evidence has besides, in nats.
    """

    space: StateSpace
    sites: tuple[SiteNumbers, ...]
    constant: float


TRANSITION, DRIFT, NOISE, LOADING, DEVIATION, DATA = range(6)


@dataclass(frozen=True, eq=False)
class ChainMatrices:
    """From parameters to the matrices of chains.

    Attributes:
        sites: The sites, in the order of stacks.
        kinds: For each site the kinds of its steps.
        bare: Transition, drift, noise, loading, deviation and data without what sites put there.
        known: Those that no parameter reaches, complete; None in place of the others.
        where: For each site where its coefficients, its spreads, and its offsets or data go.
        dynamics: # (T,)
        measurement: # (T,)
        seen: See `StateSpace`.
    """

    sites: tuple[Site, ...]
    kinds: tuple[Places, ...]
    bare: tuple[Numbers, ...]
    known: tuple[Numbers | None, ...]
    where: tuple[tuple[Entry, Entry, Entry], ...]
    dynamics: Tensor
    measurement: Tensor
    seen: Tensor | None

    @classmethod
    def of(
        cls, layout: StateLayout, sites: tuple[Site, ...], space: StateSpace, theta: Numbers
    ) -> ChainMatrices:
        """Those of some chains.

        Args:
            layout: Where the sites lie.
            sites: The sites.
            space: The chains at some parameters, as an E-step through tables has them.
            theta: These parameters.

        Raises:
            Unlike: If these are not the matrices there.
        """
        form = layout.form
        n, D, T, k = form.size, form.width, form.steps, form.fresh
        alike = (False,) * len(sites)
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
        entries = [(latents if s.is_latent else data).entries[i] for i, s in enumerate(sites)]
        where = [
            _places(site, stack.levels.numpy(), entry, n, k, D)
            for site, stack, entry in zip(sites, layout.stacks, entries, strict=True)
        ]
        found = cls(
            sites,
            tuple(e[0].numpy() for e in entries),
            bare,
            (None,) * 6,
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
        known = [x if stays else None for x, stays in zip(arrays, _staying(sites), strict=True)]
        return replace(found, known=tuple(known))

    def at(self, theta: Numbers) -> ChainNumbers:
        """The chains at parameters.

        Raises:
            LinAlgError: If a covariance is none.
        """
        arrays, own, constant = self.arrays(theta)
        A, drift, G, H, s, value = (torch.from_numpy(x) for x in arrays)
        space = StateSpace(A, drift, G, self.dynamics, H, s, self.measurement, value, self.seen)
        return ChainNumbers(space, tuple(own), constant)

    def arrays(self, theta: Numbers) -> tuple[list[Numbers], list[SiteNumbers], float]:
        """The matrices, the numbers of each site, and what the evidence has besides, in nats."""
        known = self.known
        out = [b.copy() if k is None else k for b, k in zip(self.bare, known, strict=True)]
        own, constant = [], 0.0
        for site, where in zip(self.sites, self.where, strict=True):
            C, spread = site.coefficients.at(theta)[0], site.spread.at(theta)
            of_C, of_spread, of_last = where
            if site.is_latent:
                own.append(SiteNumbers(C, spread, None))
                if known[TRANSITION] is None and C.size:
                    of_C.into(out[TRANSITION], _flat(C))
                if known[NOISE] is None:
                    of_spread.into(out[NOISE], _flat(spread))
                if known[DRIFT] is None:
                    of_last.into(out[DRIFT], _by_step(site.offset.at(theta)))
                continue
            residual = self._residual(site, theta)
            own.append(SiteNumbers(C, spread, residual))
            if site.spread.is_matrix:
                inverse: Numbers = np.linalg.inv(spread).astype(np.float64)
                C, residual = inverse @ C, _by_rows(residual, inverse)
                logs = np.log(spread.diagonal(0, -2, -1)).sum(-1)
                constant -= float((logs * site.count).sum())
            elif known[DEVIATION] is None:
                of_spread.into(out[DEVIATION], _flat(spread))
            if known[LOADING] is None:
                of_C.into(out[LOADING], _flat(C))
            if known[DATA] is None:
                of_last.into(out[DATA], residual.reshape(len(residual), site.steps, -1))
        return out, own, constant

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


def _staying(sites: Sequence[Site]) -> tuple[bool, ...]:
    """Which arrays no parameter reaches."""
    out = [True] * 6
    for site in sites:
        C, b, spread = (x.is_constant for x in (site.coefficients, site.offset, site.spread))
        if site.is_latent:
            found = {TRANSITION: C, DRIFT: b, NOISE: spread}
        elif site.spread.is_matrix:
            found = {LOADING: C and spread, DATA: b and spread}
        else:
            found = {LOADING: C, DEVIATION: spread, DATA: b}
        for i, stays in found.items():
            out[i] = out[i] and stays
    return tuple(out)


def _places(
    site: Site, levels: Places, entry: tuple[Tensor, Tensor, Tensor], n: int, k: int, D: int
) -> tuple[Entry, Entry, Entry]:
    """Where coefficients, spreads, and offsets or data of a site go."""
    kind = entry[0].numpy()[:, None]
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
    return Entry.of(of_C), Entry.of(of_spread), Entry.of(of_last)


def _by_rows(x: Numbers, matrices: Numbers) -> Numbers:
    """Matrices of each chain and rank times the rows of all steps. # (chains, N, K, D)"""
    return (x.swapaxes(1, 2) @ matrices.swapaxes(-1, -2)).swapaxes(1, 2)


def _flat(x: Numbers) -> Numbers:
    """Numbers of each chain, for every kind of step. # (lead|1, 1, numbers)"""
    return x.reshape(len(x), 1, -1)


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


@dataclass(frozen=True, eq=False)
class Solved(Expectation):
    """The evidence with the states behind it.

    Attributes:
        found: Of each component, numbers and the smoother's results.
    """

    found: tuple[tuple[ChainNumbers, Smoothed], ...] = ()


@dataclass(frozen=True, eq=False)
class AtTheta:
    """Parameters as a vector, and the E-step there once it has been made.

    Attributes:
        theta: # (parameters,)
        others: Parameters that no chain reads, by name.
        expectation: The E-step.
    """

    theta: Numbers
    others: Values
    expectation: list[Solved] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class ChainTheta:
    """The parameters of chains and their M-step.

    Attributes:
        start: All parameters when the kernel was made, for shapes and types.
        begins: Where each that a chain reads begins in θ.
        size: Numbers in θ.
        chains: The matrices of each component.
        regression: Least squares of coefficients.
        spreads: Closed forms of spreads.
    """

    start: Values
    begins: Mapping[str, int]
    size: int
    chains: tuple[ChainMatrices, ...]
    regression: Regression
    spreads: Spreads

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Those of all components."""
        return tuple(s for c in self.chains for s in c.sites)

    def enter(self, values: Values) -> AtTheta:
        """Parameter values in the form of the E-step."""
        others = {n: v for n, v in values.items() if n not in self.begins}
        return AtTheta(_vector(values, self.begins, self.size), others)

    def values(self, at: AtTheta) -> dict[str, Tensor]:
        """The parameters by name, in memory of their own."""
        out = {}
        for name, like in self.start.items():
            if name in self.begins:
                begin = self.begins[name]
                own = torch.from_numpy(at.theta[begin : begin + like.numel()].copy())
                out[name] = own.reshape(like.shape).to(like)
            else:
                out[name] = at.others[name].clone()
        return out

    def log_prior(self, at: AtTheta) -> float:
        """No parameter has a prior."""
        return 0.0

    def e_step(self, at: AtTheta) -> Solved:
        """The evidence, and the states of all chains.

        Raises:
            Handover: If the step through tables has to look.
        """
        if not at.expectation:
            at.expectation.append(self._e_step(at.theta))
        return at.expectation[0]

    def _e_step(self, theta: Numbers) -> Solved:
        total, found = 0.0, []
        try:
            with np.errstate(all="ignore"):
                for matrices in self.chains:
                    own = matrices.at(theta)
                    if not bool((own.space.deviation.numpy() > 0).all()):
                        raise Handover
                    states = smoothed(own.space)
                    total += float(states.log_evidence.sum()) + own.constant
                    found.append((own, states))
        except np.linalg.LinAlgError as error:
            raise Handover from error
        if not abs(total) < math.inf:
            raise Handover
        return Solved(total, {}, found=tuple(found))

    def m_step(self, at: AtTheta, expectation: Solved) -> tuple[AtTheta, float]:
        """The maximiser, and the gain in nats.

        Raises:
            Handover: If the step through tables has to look.
        """
        try:
            with np.errstate(all="ignore"):
                theta = self._maximiser(at.theta, expectation)
        except np.linalg.LinAlgError as error:
            raise Handover from error
        if not bool(np.isfinite(theta).all()):
            raise Handover
        after = AtTheta(theta, at.others)
        return after, self.e_step(after).log_evidence - expectation.log_evidence

    def _maximiser(self, theta: Numbers, e: Solved) -> Numbers:
        numbers, sums = [], []
        for matrices, (own, found) in zip(self.chains, e.found, strict=True):
            dynamics = matrices.dynamics.numpy()
            states = States.of(found, own.space.transition.numpy(), dynamics)
            for site, n, kinds in zip(matrices.sites, own.sites, matrices.kinds, strict=True):
                numbers.append(n)
                sums.append(sums_of(site, n, states, kinds))
        step = self.regression.step(numbers, sums)
        second = [self.regression.moved(i, s, step) for i, s in enumerate(sums)]
        out = theta.copy()
        out[self.regression.unknowns] += step[:-1]
        where, new = self.spreads.solve(theta, self.sites, second)
        out[where] = new
        return out


def _vector(values: Values, begins: Mapping[str, int], size: int) -> Numbers:
    """Parameters as one vector of double precision."""
    out = np.empty(size)
    for name, begin in begins.items():
        value = values[name].detach()
        out[begin : begin + value.numel()] = value.reshape(-1).to("cpu", torch.float64).numpy()
    return out


@dataclass(frozen=True, eq=False)
class ChainSums:
    """Gaussian chains whose steps are alike.

    Attributes:
        theta: Parameters, sums and their steps.
    """

    theta: ChainTheta
    name: str = "Kalman"
    words: str = "Kalman filter and smoother, on sums over steps"

    def e_step(self, at: AtTheta) -> Solved:
        """The E-step at some parameters."""
        return self.theta.e_step(at)


def chain_sums(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate], values: Values
) -> ChainSums | Finding | None:
    """The kernel of a model whose Gaussian latents are chains with alike steps.

    Args:
        graph: Of the E-step.
        updates: What was decided per parameter.
        values: Parameter values.

    Returns:
        The kernel, or why there is none; None where no latents are chains.
    """
    blocks = [g.nested for g in graph.groups if isinstance(g.nested, GaussianChain)]
    if not blocks:
        return None
    try:
        return _chain_sums(graph, blocks, updates, values)
    except Unlike as found:
        return Finding("model", str(found))


def _chain_sums(
    graph: FactorGraph,
    blocks: Sequence[GaussianChain],
    updates: Mapping[str, ParameterUpdate],
    values: Values,
) -> ChainSums:
    beside = [g for g in graph.groups if not isinstance(g.nested, GaussianChain)]
    if beside:
        raise Unlike(f"'{beside[0].members[0]}' is no part of a chain")
    for name, u in updates.items():
        if not isinstance(u.update, ClosedForm | LeastSquares | Fixed):
            raise Unlike(f"the update of '{name}' is a gradient")
        if u.priors or (isinstance(u.update, ClosedForm) and u.update.floor > 0):
            raise Unlike(f"'{name}' has a prior or a floor")
    if all(isinstance(u.update, Fixed) for u in updates.values()):
        raise Unlike("no parameter is updated")
    if any(b.scope for b in blocks):
        raise Unlike("discrete latents decide about Gaussian ones")
    if centred_latents(for_updates(graph), updates):
        raise Unlike("a latent's spread may be learned as a coefficient, too")
    read = dict.fromkeys(p for b in blocks for g in b.groups for p in g.params)
    sizes = [values[name].numel() for name in read]
    begins = dict(zip(read, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True)) if read else {}
    size = sum(sizes)
    theta = _vector(values, begins, size)
    chains, sites = [], list[Site]()
    for group, block in zip(graph.groups, blocks, strict=True):
        layout = block.chains
        own = tuple(
            site_of(g, stack, layout.form.chains, begins)
            for g, stack in zip(block.groups, layout.stacks, strict=True)
        )
        numbers = block.numbers(group.evaluate_arguments(values))
        chains.append(ChainMatrices.of(layout, own, numbers.space, theta))
        sites += own
    free = [
        begins[n] + np.arange(values[n].numel())
        for n, u in updates.items()
        if isinstance(u.update, LeastSquares)
    ]
    none = np.empty(0, dtype=np.int64)
    regression = Regression.of(sites, np.concatenate([none, *free]), size)
    spreads = Spreads.of(sites, graph, updates, begins, size)
    start = {n: v.clone() for n, v in values.items()}
    kernel = ChainTheta(start, begins, size, tuple(chains), regression, spreads)
    return ChainSums(kernel)
