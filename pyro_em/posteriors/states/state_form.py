"""Gaussian latents that follow each other: which state each belongs to, and where its numbers lie.

Every latent has a *level*, later than those that its mean reads. The state x_t of a chain holds the
latents of level t, and those of earlier levels that a later site still reads: a step of history 2, or
an observation of what was before. Elements of plates that nothing connects are chains side by side.
Whether the model wrote a loop, and what its steps are called, does not matter.

    x_t = A_t x_{t−1} + a_t + G_t ε_t,     y_t = H_t x_t + d_t + e_t
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pyro_em.posteriors.gaussians.block_search import columns_of, components
from pyro_em.posteriors.gaussians.site_forms import SiteForm

SHORTEST = 8  # levels of a chain; what is shorter is one block
_LASTING = 2  # levels after its own at which a single latent is still read: it stays where it is

_Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placed:
    """Where the numbers of one site lie in the chains.

    Attributes:
        level: The step.
        start: The first place of its numbers: in the newest part of the state, or in the data of the
            step.
        chain: The chain of each row. # (rows,)
        rank: The number of each row among the site's rows of its chain. # (rows,)
        reads: Places of what each row reads: in x_{t−1} for a latent, in x_t for an observed site;
            one array per term. # (rows, q) each
        present: Whether each row reads the term. # (rows,) each
    """

    level: int
    start: int
    chain: _Ints
    rank: _Ints
    reads: tuple[_Ints, ...]
    present: tuple[NDArray[np.bool_], ...]

    @property
    def key(self) -> tuple[object, ...]:
        """The same for sites of different steps that lie alike; observed ones may start elsewhere."""
        arrays = (self.chain, self.rank, *self.reads, *self.present)
        return tuple(a.tobytes() for a in arrays)


@dataclass(frozen=True, eq=False)
class StateForm:
    """Chains without their numbers.

    Attributes:
        steps: T.
        chains: How many there are side by side.
        fresh: How many numbers of a state are new at its step; they come first.
        size: n, the numbers of a state.
        width: D, the most numbers that are observed at one step.
        carried: Pairs of places: where a state holds what the one before held elsewhere; at the same
            place what of a latent that many steps read. # (c, 2)
        sites: For each site its place.
    """

    steps: int
    chains: int
    fresh: int
    size: int
    width: int
    carried: Tensor
    sites: tuple[Placed, ...]


def state_form(sites: Sequence[SiteForm]) -> StateForm | None:
    """The chains that some connected sites make up; None where one dense block does as well.

    Args:
        sites: In topological order.

    Example:
        >>> from pyro_em.posteriors.gaussians.site_forms import Term
        >>> one = torch.zeros(1, dtype=torch.long)
        >>> sites = []
        >>> for t in range(10):
        ...     before = () if t == 0 else (Term(2 * t - 2, one),)
        ...     sites.append(SiteForm(f"h_{t}", 1, 1, True, before))
        ...     sites.append(SiteForm(f"y_{t}", 1, 1, False, (Term(2 * t, one),)))
        >>> form = state_form(sites)
        >>> form.steps, form.chains, form.size, form.width
        (10, 1, 1, 1)
    """
    levels = _levels(sites)
    steps = max((level for level in levels), default=-1) + 1
    if steps < SHORTEST:
        return None
    first = np.concatenate([[0], np.cumsum([s.rows if s.is_latent else 0 for s in sites])])
    columns = [columns_of(i, sites, first.astype(np.int64)) for i in range(len(sites))]
    label = components(columns, int(first[-1]))
    chains = int(label.max()) + 1
    label = _in_order(label)

    rows = [_rows(site, c, label, chains) for site, c in zip(sites, columns, strict=True)]
    if any(r is None for r in rows):
        return None
    placed = [r for r in rows if r is not None]
    slots = _slots(sites, levels, placed)
    depths = _depths(sites, levels, slots)
    lasting = [d >= _LASTING and n == 1 for d, n in zip(depths, slots.counts, strict=True)]
    depths = [0 if lasts else d for d, lasts in zip(depths, lasting, strict=True)]
    widths = slots.widths
    fresh, unknowns = (
        sum(widths),
        sum(s.rows * s.width for s in sites if s.is_latent) // max(chains, 1),
    )
    size = sum(w * (d + 1) for w, d in zip(widths, depths, strict=True))
    if 4 * steps * size**3 > unknowns**3:
        return None

    starts, carried = _state_places(widths, depths, lasting)
    filled = [0] * steps
    out = []
    for i, site in enumerate(sites):
        own = placed[i]
        back = 1 if site.is_latent else 0
        reads, present = [], []
        for term, column in zip(site.terms, columns[i], strict=False):
            parent = sites[term.latent]
            slot = slots.of[term.latent]
            lag = 0 if lasting[slot] else levels[i] - levels[term.latent] - back
            begin = starts[slot][lag]
            element = np.maximum(column - first[term.latent], 0)
            at = begin + placed[term.latent].rank[element] * parent.width
            present.append(column >= 0)
            reads.append(np.where(present[-1], at, begin)[:, None] + np.arange(parent.width))
        if site.is_latent:
            start = starts[slots.of[i]][0]
        else:
            start = filled[levels[i]]
            filled[levels[i]] += own.count * site.width
        out.append(Placed(levels[i], start, own.chain, own.rank, tuple(reads), tuple(present)))
    return StateForm(steps, chains, fresh, size, max(filled), torch.as_tensor(carried), tuple(out))


def _levels(sites: Sequence[SiteForm]) -> list[int]:
    """The level of each site: latents after all that they read, observations where they can be made.

    Latents that the program samples after an observation are no earlier than it: two series of one
    loop keep step.
    """
    out: list[int] = []
    clock = 0
    seen: set[str] = set()  # series of which data at the level of the clock have come
    for site in sites:
        read = [out[t.latent] for t in site.terms]
        if site.is_latent:
            begin = clock + (not read and _series(site) in seen)
            out.append(max([begin, *(level + 1 for level in read)]))
            continue
        out.append(max(read, default=clock))
        if out[-1] > clock:
            clock, seen = out[-1], set()
        seen |= {_series(sites[t.latent]) for t in site.terms if out[t.latent] == clock}
    readers: dict[int, list[int]] = {}
    for i, site in enumerate(sites):
        for term in site.terms:
            readers.setdefault(term.latent, []).append(i)
    after: dict[str, int] = {}  # the level of the next latent of a series
    for i in reversed(range(len(sites))):
        if not sites[i].is_latent:
            continue
        name = _series(sites[i])
        if not sites[i].terms:
            # It waits for the first who reads it, but not for the next of its own.
            late = _needed(sites, out, i, readers.get(i, ()))
            out[i] = max(out[i], min(late, after.get(name, late + 1) - 1))
        after[name] = out[i]
    out = _spread_at_first(sites, out)
    for i, site in enumerate(sites):
        if not site.is_latent and site.terms:
            out[i] = max(out[t.latent] for t in site.terms)
    return out


def _spread_at_first(sites: Sequence[SiteForm], levels: Sequence[int]) -> list[int]:
    """Latents that a series begins with, one after the other as the later ones are.

    An autoregression of order p may begin with p latents that read nothing, a season with as many as it
    has: at one level each of them would be a part of the state of its own.
    """
    series: dict[str, list[int]] = {}
    for i, site in enumerate(sites):
        if site.is_latent:
            series.setdefault(_series(site), []).append(i)
    out = list(levels)
    for own in series.values():
        begin = min(levels[i] for i in own)
        first = [i for i in own if levels[i] == begin]
        later: dict[int, int] = {}
        for i in own:
            if levels[i] > begin:
                later[levels[i]] = later.get(levels[i], 0) + 1
        each = max(later.values(), default=len(first))
        if len(first) > each and not any(sites[i].terms for i in first):
            for k, i in enumerate(reversed(first)):
                out[i] = begin - k // each
    earliest = min(out, default=0)
    return [level - earliest for level in out] if earliest < 0 else out


def _series(site: SiteForm) -> str:
    """The name of a site but for numbers."""
    return re.sub(r"\d+", "#", site.name)


def _needed(
    sites: Sequence[SiteForm], levels: Sequence[int], latent: int, readers: Sequence[int]
) -> int:
    """The last level at which a latent that reads nothing is early enough for all its readers."""
    found = []
    for i in readers:
        others = [t.latent for t in sites[i].terms if t.latent != latent]
        if sites[i].is_latent:
            found.append(levels[i] - 1)
        elif others:
            found.append(max(levels[t] for t in others))
    return min(found, default=0)


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a site by chains: `count` for each, at most."""

    chain: _Ints
    rank: _Ints
    count: int


def _rows(site: SiteForm, columns: list[_Ints], label: _Ints, chains: int) -> _Rows | None:
    """The chain of each row of a site; None where some belong to none, or chains differ in latents."""
    anchor = np.full(site.rows, -1, dtype=np.int64)
    for column in columns:
        anchor = np.where(anchor < 0, column, anchor)
    if (anchor < 0).any():
        return None
    chain = label[anchor]
    counts = np.bincount(chain, minlength=chains)
    if site.is_latent and (counts != counts[0]).any():
        return None
    order = np.argsort(chain, kind="stable")
    rank = np.empty_like(chain)
    rank[order] = np.arange(site.rows) - np.repeat(np.cumsum(counts) - counts, counts)
    return _Rows(chain, rank, int(counts.max()))


def _in_order(label: _Ints) -> _Ints:
    """Components numbered in the order in which elements meet them."""
    _, first, inverse = np.unique(label, return_index=True, return_inverse=True)
    number = np.empty_like(first)
    number[np.argsort(first, kind="stable")] = np.arange(len(first))
    return number[inverse].astype(np.int64)


@dataclass(frozen=True, eq=False)
class _Slots:
    """The parts of a state, each of which holds one latent at each level at most.

    Attributes:
        widths: How many numbers each has.
        of: The part of each latent.
    """

    widths: tuple[int, ...]
    of: dict[int, int]

    @property
    def counts(self) -> list[int]:
        """How many latents each part holds in turn."""
        out = [0] * len(self.widths)
        for slot in self.of.values():
            out[slot] += 1
        return out


def _slots(sites: Sequence[SiteForm], levels: Sequence[int], rows: Sequence[_Rows]) -> _Slots:
    """Latents of one name but for numbers share a part of the state; one of another name joins them."""
    kinds: dict[tuple[str, int, int], list[int]] = {}
    met: dict[tuple[str, int, int], int] = {}
    for i, site in enumerate(sites):
        if site.is_latent:
            kind = _series(site), rows[i].count * site.width
            here = (*kind, levels[i])
            met[here] = met.get(here, -1) + 1
            kinds.setdefault((*kind, met[here]), []).append(i)
    reach = _reach(sites, levels)
    widths: list[int] = []
    held: list[set[int]] = []
    of: dict[int, int] = {}
    for (_, width, _), own in sorted(kinds.items(), key=lambda k: -len(k[1])):
        at = {levels[i] for i in own}
        # A first latent goes where later ones of its series are, unless it is read for long.
        alone = len(own) == 1 and reach[own[0]] >= _LASTING
        joins = [s for s, w in enumerate(widths) if w == width and not at & held[s] and not alone]
        if len(own) > 1 or not joins:
            joins = [len(widths)]
            widths.append(width)
            held.append(set())
        held[joins[0]] |= at
        of.update(dict.fromkeys(own, joins[0]))
    return _Slots(tuple(widths), of)


def _reach(sites: Sequence[SiteForm], levels: Sequence[int]) -> list[int]:
    """For each latent for how many levels after its own it is read from the state."""
    out = [0] * len(sites)
    for i, site in enumerate(sites):
        for term in site.terms:
            lag = levels[i] - levels[term.latent] - (1 if site.is_latent else 0)
            out[term.latent] = max(out[term.latent], lag)
    return out


def _depths(sites: Sequence[SiteForm], levels: Sequence[int], slots: _Slots) -> list[int]:
    """For each part of a state how many levels it is kept after its own."""
    out = [0] * len(slots.widths)
    for i, lag in enumerate(_reach(sites, levels)):
        if sites[i].is_latent:
            out[slots.of[i]] = max(out[slots.of[i]], lag)
    return out


def _state_places(
    widths: Sequence[int], depths: Sequence[int], lasting: Sequence[bool]
) -> tuple[list[list[int]], _Ints]:
    """Where each part begins, lag by lag, and which places are copies of the state before.

    A coefficient with a distribution, or an unknown drift, is one latent that all steps read: its place
    is a copy of itself.
    """
    starts: list[list[int]] = [[] for _ in widths]
    carried = []
    at = 0
    for lag in range(max(depths, default=0) + 1):
        for slot, width in enumerate(widths):
            if lag > depths[slot]:
                continue
            if lag:
                before = starts[slot][lag - 1]
                carried += [(at + k, before + k) for k in range(width)]
            elif lasting[slot]:
                carried += [(at + k, at + k) for k in range(width)]
            starts[slot].append(at)
            at += width
    return starts, np.asarray(carried, dtype=np.int64).reshape(-1, 2)
