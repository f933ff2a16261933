"""What all parts of the data have in common: found once, before the first step.

A pass over all parts finds the number of rows, where the data of each site lie, how large the data of
each spread are and which elements of a parameter are read at all; on the way it is seen that every part
reads as the same model. Then each part is told (`pyro_em.graph.all_data.AllData`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import Finding, ModelError, UsageError, message
from pyro_em.graph.all_data import AllData, Centre, Vectors
from pyro_em.graph.factors import FactorGraph, Group, largest_counts
from pyro_em.plan.part import Part, plate_of_rows
from pyro_em.plan.program import Program
from pyro_em.posteriors.conjugates.shared_conjugates import shared_blocks
from pyro_em.posteriors.continuous.collapsed import form_of_rows, own_vectors
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.reduction.reduction import Reduction
from pyro_em.tracing.checkpoint import checksum
from pyro_em.tracing.sites import INTEGRATED, Role
from pyro_em.updates.expectations.scatter import data_magnitude, used_events
from pyro_em.updates.update import ClosedForm, ParameterUpdate


@dataclass(frozen=True, eq=False)
class _Sums:
    """What adds up over parts.

    Attributes:
        rows: Elements of the outermost plate.
        totals: Sums of the data by site, and how many were seen. # (D,), (D,)
        read: By parameter how many parts read each event. # (events,)
    """

    rows: int
    totals: Mapping[str, tuple[Tensor, Tensor]]
    read: Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class _Bounds:
    """What is largest over parts.

    Attributes:
        high: The largest of each feature, by site. # (D,)
        low: The smallest with the other sign. # (D,)
        magnitudes: By parameter; see `pyro_em.updates.expectations.scatter.data_magnitude`.
        largest: Counts, by site.
    """

    high: Mapping[str, Tensor]
    low: Mapping[str, Tensor]
    magnitudes: Mapping[str, Tensor]
    largest: Mapping[str, int]


def all_data_of(over: Reduction[Part], lead: Program) -> AllData:
    """Go through all parts once.

    Args:
        over: The parts.
        lead: The program of one of them, which the others have to be like.

    Raises:
        ModelError: If a part reads as another model.
        PyroEMError: If a part's data cannot be used.
    """

    def look(part: Part) -> _Sums:
        require_alike(part, lead)
        return _sums(part)

    sums = over.sum(look)
    bounds = over.max(_bounds)
    centres = {}
    for site, (total, seen) in sums.totals.items():
        mean = torch.where(seen > 0, total / seen.clamp(min=1), 0.0)
        centres[site] = Centre(mean, -bounds.low[site], bounds.high[site])
    # A kernel may take the sites of a group one by one: all have the centre of their group.
    for group in for_updates(lead.graph).groups:
        centre = centres.get(group.members[0])
        if centre is not None:
            centres |= dict.fromkeys(group.members, centre)
    read = {name: count > 0 for name, count in sums.read.items()}
    vectors = _vectors(over, lead)
    return AllData(sums.rows, centres, bounds.magnitudes, read, vectors, bounds.largest)


@dataclass(frozen=True, eq=False)
class _Moments:
    """Of rows that are alike; of parts whose rows are not, how many there are.

    Attributes:
        rows: n.
        total: Σ x, or Σ (x − c)(x − c)ᵀ. # (D,) or (D, D)
        others: Parts whose rows are not alike.
    """

    rows: int
    total: Tensor
    others: int = 0


def _vectors(over: Reduction[Part], lead: Program) -> Vectors | None:
    """Number, mean and scatter of all rows; None where they are not alike in all parts."""
    own = own_vectors(lead.graph)
    if not any(over.gathered(lambda: own is not None)):
        return None
    # Rows may be alike in each part, and others in the next: data that are sorted by a covariate.
    form = None if own is None else checksum(form_of_rows(lead.graph))
    if len(set(over.gathered(lambda: form))) > 1:
        return None
    none = torch.zeros(0) if own is None else own.new_zeros(own.shape[-1])

    def summed(part: Part) -> _Moments:
        x = own_vectors(part.program.graph)
        is_other = x is None or checksum(form_of_rows(part.program.graph)) != form
        if x is None or x.shape[1:] != none.shape or is_other:
            return _Moments(0, none, 1)
        return _Moments(len(x), x.sum(0))

    first = over.sum(summed)
    if first.others:
        return None
    mean = first.total / first.rows

    def squared(part: Part) -> _Moments:
        x = own_vectors(part.program.graph)
        assert x is not None
        centred = x - mean
        return _Moments(len(x), centred.mT @ centred)

    scatter = over.sum(squared).total
    return Vectors(first.rows, mean, scatter) if bool(torch.isfinite(scatter).all()) else None


def _sums(part: Part) -> _Sums:
    graph = for_updates(part.program.graph)
    totals = {}
    for site, rows in _data_of(graph):
        seen = ~torch.isnan(rows)
        wide = torch.where(seen, rows, 0.0).to(torch.float64)
        totals[site] = (wide.sum(0), seen.sum(0, dtype=torch.float64))
    read = {}
    for name, update in _closed(part.program.updates).items():
        kind = update.kind
        assert kind is not None
        value = graph.parameters[name].leaf
        events = used_events([u.natural for u in update.uses], value, kind.event_dim)
        read[name] = events.to(torch.long)
    return _Sums(part.rows, totals, read)


def _bounds(part: Part) -> _Bounds:
    graph = for_updates(part.program.graph)
    high, low = {}, {}
    for site, rows in _data_of(graph):
        wide = rows.to(torch.float64)
        low[site] = -wide.nan_to_num(torch.inf).amin(0)
        high[site] = wide.nan_to_num(-torch.inf, torch.inf).amax(0)
    magnitudes = {
        name: data_magnitude(update, graph, graph.parameters[name].value().detach())
        for name, update in _closed(part.program.updates).items()
        if update.kind is not None and update.kind.is_spread
    }
    return _Bounds(high, low, magnitudes, largest_counts(graph))


def _closed(updates: Mapping[str, ParameterUpdate]) -> dict[str, ParameterUpdate]:
    return {
        n: u for n, u in updates.items() if isinstance(u.update, ClosedForm) and not u.needs_data
    }


def _data_of(graph: FactorGraph) -> list[tuple[str, Tensor]]:
    """The data of sites that are evaluated about a centre. # (rows, D)"""
    out = []
    for group in graph.groups:
        name = None if group.family is None else group.family.name
        if group.observed and group.role is Role.DATA and name in _CENTRED:
            out.append((group.members[0], _rows(group)))
    return out


_CENTRED = (
    "Normal",
    "MultivariateNormal",
    "IncompleteMultivariateNormal",
    "MultivariateStudentT",
)


def _rows(group: Group) -> Tensor:
    """# (rows, D), D of one where each datum is a number"""
    lead = 1 + len(group.sizes)
    event = group.value.shape[lead:]
    rows = group.value.detach().reshape(-1, max(1, event.numel()))
    if group.mask is None and group.elements is None:
        return rows
    seen = group.elements if group.elements is not None else group.mask
    assert seen is not None
    seen = seen.reshape(seen.shape + (1,) * (group.value.dim() - seen.dim()))
    return torch.where(seen, group.value.detach(), torch.nan).reshape(rows.shape)


def require_alike(part: Part, lead: Program) -> None:
    """Refuse a part that reads as another model than the first.

    Raises:
        ModelError: With what differs.
    """
    program = part.program
    found = _difference(program, lead)
    if found is not None:
        fixes = ["let the model depend on the parameters and on each row's data alone"]
        if part.rows == 1:  # what differs between rows looks shared where there is one
            fixes.insert(
                0, "choose parts in which no row is alone: another number of rows per part"
            )
        raise ModelError(
            message(
                f"{found.where}, rows from {part.begin}",
                found.what,
                "every part of the data has to read as the same model, so that sums over parts are "
                "sums over all data",
                fixes,
            )
        )


def _difference(program: Program, lead: Program) -> Finding | None:
    groups, known = program.graph.groups, lead.graph.groups
    members = [g.members for g in groups]
    if [list(m) for m in members] != [list(g.members) for g in known]:
        return Finding("model", "its sites are not those of the first part.")
    if dict(program.graph.latents).keys() != dict(lead.graph.latents).keys():
        return Finding("model", "its latents are not those of the first part.")
    for name, latent in lead.graph.latents.items():
        if program.graph.latents[name].size != latent.size:
            return Finding(f"site '{name}'", "it has another number of values than before.")
    for name, update in lead.updates.items():
        other = program.updates.get(name)
        same = other is not None and (type(other.update), other.kind, other.block) == (
            type(update.update),
            update.kind,
            update.block,
        )
        if not same:
            return Finding(f"parameter '{name}'", "it has another update than before.")
        if program.graph.parameters[name].leaf.shape != lead.graph.parameters[name].leaf.shape:
            return Finding(f"parameter '{name}'", "it has another shape than before.")
    return None


def require_partable(lead: Program, what: str, *, adds: bool = False) -> None:
    """Refuse a model whose rows are not independent, or whose updates need all data at once.

    Args:
        lead: The program of one part.
        what: How the data are parted, in words.
        adds: Whether what parts say of conjugate latents outside the rows is added up.

    Raises:
        UsageError: With what stands in the way.
    """
    found = _obstacle(lead, adds)
    if found is not None:
        raise UsageError(
            message(
                found.where,
                f"{found.what}, and the data are given {what}.",
                found.why,
                [*found.fixes, "pass all data at once: em.fit(data)"],
            )
        )


def _obstacle(lead: Program, adds: bool) -> Finding | None:
    structure, graph = lead.structure, lead.graph
    plate = plate_of_rows(structure)
    if plate is None:
        return Finding(
            "model",
            "its observations share no plate",
            "the rows of the data are the elements of the outermost plate around every observation",
            ("put the rows into pyro.plate(name, len(x))",),
        )
    straddling = "what one row says of it depends on rows of other parts"
    latents = {name: latent.plates for name, latent in graph.latents.items()}
    shared = shared_blocks(graph, plate) if adds else {}
    for g, group in enumerate(graph.groups):
        if g in shared:
            continue
        for site in group.nested.groups if group.nested is not None else ():
            if site.role in INTEGRATED:
                latents |= dict(zip(site.members, site.dims, strict=True))
    for name, plates in latents.items():
        if plate not in plates:
            where = f"site '{name}'"
            return Finding(where, f"it is outside plate '{plate}'", straddling)
    for name, coupling in structure.coupled.items():
        if coupling.plate == plate:
            return Finding(
                f"site '{name}'", f"its elements in plate '{plate}' read each other", straddling
            )
    for name, update in lead.updates.items():
        if update.kind is not None and update.needs_data and not update.is_end:
            return Finding(
                f"parameter '{name}'",
                f"its update is a {update.kind.value}",
                "it is no sum over rows: it needs all data at once",
            )
    if lead.strategy is not None:
        return Finding("strategy", f"{lead.strategy!r} was asked for", "only exact E-steps add up")
    if structure.plates[plate].full_size != structure.plates[plate].size:
        return Finding(
            f"plate '{plate}'",
            "it stands for more rows than it has",
            "parts of the data would count as all of them, each",
        )
    return None
