"""The E-step of a mixture: one latent per row of a plate, in chunks of rows.

    log p(x_n) = log Σ_k exp ℓ_nk,   r_nk = exp(ℓ_nk − log p(x_n)),   S = Σ_n Σ_k r_nk T(x_n)

Nothing of size N × K is kept: each chunk adds to the evidence and to the sufficient statistics. Rows
that occur several times are computed once and counted as often as they occur, which is exact. A
sample weight (``poutine.scale``) counts in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from pyro_em.densities.density import NormalRows, checked, scattered
from pyro_em.densities.features import Cells, Counted, Known, cells, counted, known, merged
from pyro_em.densities.gaussian import Gaussian, as_gaussian
from pyro_em.densities.layout import Layout, layout_of
from pyro_em.densities.theta import At, Theta, theta_of
from pyro_em.densities.tying import collapsed_updates
from pyro_em.errors import Finding, sites_in_words
from pyro_em.families.family import Statistics
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.quick import QuickBlock
from pyro_em.tracing.sites import Role
from pyro_em.updates.statistics import NATURAL, Expectation, group_sums

_CHUNK_BYTES = 2**21


_IMPOSSIBLE = -1e29


@dataclass(eq=False)
class Mixture(QuickBlock):
    """A mixture over the rows of one plate.

    Attributes:
        graph: The collapsed graph; values may hold distinct rows only.
        N: Rows that are held.
        K: Components.
        linear: All linear groups that read rows, as one; None where there are none.
        normals: Normal groups that are evaluated by matrix products.
        others: Groups that are evaluated chunk by chunk by their family.
        cells: Linear groups that read the component but no row.
        tables: Other groups that read the component but no row.
        known: Linear groups that read no component.
        free: Other groups that read no component.
        repeats: How often each row occurs, or its weight; None where each counts once. # (N,)
    """

    graph: FactorGraph
    N: int
    K: int
    linear: Counted | None
    normals: Mapping[int, NormalRows]
    others: tuple[int, ...]
    cells: Mapping[int, Cells]
    tables: tuple[int, ...]
    known: Mapping[int, Known]
    free: tuple[int, ...]
    repeats: Tensor | None
    component: Component = field(init=False)
    theta: Theta = field(init=False)
    chunk: int = field(init=False)
    columns: Tensor = field(init=False)
    base: float = field(init=False)
    total: float = field(init=False)

    name: ClassVar[str] = "mixture"
    words: ClassVar[str] = "mixture kernel, in chunks of rows"

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        """The mixture that a component is, or why it is none."""
        graph = component.graph
        shape = shape_of_rows(graph)
        if isinstance(shape, Finding):
            return shape
        weight = row_weights(graph, shape)
        if isinstance(weight, Finding):
            return weight
        graph, repeats = distinct(graph, shape, weight)
        updates = collapsed_updates(component.updates, graph)
        layout = layout_of(graph, updates, component.values, shape.eligible(graph))
        block = cls.of(graph, shape, repeats, layout)
        if isinstance(block, Finding):
            return block
        theta = theta_of(graph, updates, component.values, layout, block.normals)
        if isinstance(theta, Finding):
            return theta
        block.component, block.theta = component, theta
        return block

    @classmethod
    def of(
        cls, graph: FactorGraph, shape: Shape, repeats: Tensor | None, layout: Layout
    ) -> Self | Finding:
        """The kernel of a mixture over rows, still without its parameters, or why there is none.

        Args:
            graph: A collapsed graph, of distinct rows where there are ``repeats``.
            shape: Its shape.
            repeats: How often each row occurs, or its weight.
            layout: How its groups are evaluated.
        """
        K, groups = shape.size, graph.groups
        linears, lines = layout.linears, layout.lines
        N = graph.dim_size(shape.plate) if repeats is None else len(repeats)
        parts: list[Counted] = []
        normals: dict[int, NormalRows] = {}
        others: list[int] = []
        for g in shape.rowwise:
            if g in linears:
                part = counted(groups[g], *linears[g], K, members_are_rows=False)
                if part is None:
                    return _changing(groups[g])
                parts.append(part)
                continue
            single = len(groups[g].members) == 1 and groups[g].mask is None
            if g in lines and single:
                normals[g] = lines[g]
                continue
            if _varies(groups[g]):
                return _changing(groups[g])
            rule = as_gaussian(groups[g], K) if single else None
            if rule is None:
                others.append(g)
            else:
                normals[g] = rule
        return cls(
            graph,
            N,
            K,
            merged(parts) if parts else None,
            normals,
            tuple(others),
            {g: cells(groups[g], *linears[g]) for g in shape.tables if g in linears},
            tuple(g for g in shape.tables if g not in linears),
            {g: known(groups[g], *linears[g]) for g in shape.free if g in linears},
            tuple(g for g in shape.free if g not in linears),
            repeats,
        )

    def __post_init__(self) -> None:
        width = self.K * (2 + sum(len(self.graph.groups[g].members) for g in self.others))
        width += sum(g.width for g in self.normals.values())
        single = self.linear is None and self.normals and self._is_single()
        self.chunk = max(1024, min(16384, _CHUNK_BYTES // ((4 if single else 8) * width)))
        parts = [c.columns for c in self.cells.values()]
        parts += [k.columns for k in self.known.values()]
        self.base = sum(k.base for k in self.known.values())
        self.total = float(self.N)
        if self.linear is not None:
            parts.append(self.linear.columns.reshape(-1))
            rows = self.linear.base if self.repeats is None else self.linear.base * self.repeats
            self.base += float(rows.sum())
        if self.repeats is not None:
            self.total = float(self.repeats.sum())
        device = self.graph.groups[0].value.device
        none = torch.empty(0, dtype=torch.long, device=device)
        self.columns = torch.cat([none, *parts])

    def e_step(self, at: At) -> Expectation:
        """Evidence and sums at some parameters.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        constant = self._constant(at)
        # In float32 the exponential of numbers far below −87 is slow; a weight of e⁻⁸⁰ counts nothing.
        # A weight of exactly zero has to stay.
        may_clamp = self.linear is None and not self.others and self._is_single()
        may_clamp = may_clamp and bool((constant > _IMPOSSIBLE).all())
        theta = None if self.linear is None else at.eta.take(self.linear.columns)
        sums = _Collected()
        for begin in range(0, self.N, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.N))
            joint = constant
            if self.linear is not None:
                assert theta is not None
                joint = torch.addmm(joint, theta, self.linear.phi[:, rows])
            features = {g: rule.features(rows, at.prepared[g]) for g, rule in self.normals.items()}
            for g, rule in self.normals.items():
                joint = rule.log_density(at.prepared[g], features[g], joint)
            parts = {g: _restricted(self.graph.groups[g], rows) for g in self.others}
            for g, part in parts.items():
                table = part.log_density(at.arguments[g])
                joint = joint + table.reshape(len(part.members), -1, self.K).sum(0).T
            top = joint.amax(0)
            weights = joint.sub_(top)
            if may_clamp:
                weights.clamp_(min=-80.0)
            weights.exp_()
            if may_clamp:
                torch.threshold_(weights, 2e-35, 0.0)
            mass = weights.sum(0)
            log_p = (
                mass.log().add_(top) if top.dtype == torch.float64 else top.double() + mass.log()
            )
            if self.repeats is None:
                weights.div_(mass)
                sums.add("evidence", log_p.sum())
            else:
                own = self.repeats[rows]
                weights.mul_(own / mass)
                sums.add("evidence", torch.dot(log_p, own))
            sums.add("mass", weights.sum(1, dtype=torch.float64))
            if self.linear is not None:
                wide = weights if weights.dtype == torch.float64 else weights.double()
                sums.add("linear", wide @ self.linear.phi[:, rows].T)
            for g, rule in self.normals.items():
                sums.add(g, rule.moments(at.prepared[g], weights, features[g]))
            for g, part in parts.items():
                sums.add_statistics(g, self._counted(part, weights, at.arguments[g]))
        return self._summed(at, sums)

    def _is_single(self) -> bool:
        """Whether all Normal groups are Gaussian components in float32."""
        return all(
            isinstance(r, Gaussian) and r.x.dtype == torch.float32 for r in self.normals.values()
        )

    def _constant(self, at: At) -> Tensor:
        """Log densities that no row reaches. # (K, 1)"""
        out: Tensor | None = None
        for table in self.cells.values():
            part = table.table(at.eta)
            out = part if out is None else out + part
        for g in self.tables:
            group = self.graph.groups[g]
            assert group.family is not None
            log_p = group.family.log_prob(group.value, at.arguments[g])
            part = log_p.reshape(self.K).to(torch.float64)
            out = part if out is None else out + part
        if out is None:
            device = self.graph.groups[0].value.device
            out = torch.zeros(self.K, dtype=torch.float64, device=device)
        return out.unsqueeze(-1)

    def _counted(self, part: Group, weights: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        counts = weights.T.reshape(1, *part.sizes).expand(len(part.members), *part.sizes)
        return group_sums(part, counts, arguments)

    def _summed(self, at: At, sums: _Collected) -> Expectation:
        """What was collected over the chunks, and what no row reaches."""
        groups, mass, evidence = self.graph.groups, sums["mass"], sums["evidence"]
        out = dict(sums.statistics)
        for g in self.free:
            table = groups[g].log_density(at.arguments[g]).to(torch.float64)
            evidence = evidence + table.sum()
            out[g] = group_sums(groups[g], torch.ones_like(table), at.arguments[g])
        for g in self.tables:
            counts = mass.reshape(*(1,) * (1 + groups[g].n_plates), self.K)
            out[g] = group_sums(groups[g], counts, at.arguments[g])
        entries = [t.counts(mass) for t in self.cells.values()]
        for k in self.known.values():
            evidence = evidence + torch.dot(k.f, at.eta.take(k.columns))
            entries.append(k.f)
        if self.linear is not None:
            entries.append(sums["linear"].reshape(-1))
        for g, rule in self.normals.items():
            evidence = evidence + rule.correction(at.prepared[g], sums[g], mass)
        log_evidence = checked(evidence, mass, self.total) + self.base
        if entries:
            out[NATURAL] = {"features": scattered(at.eta, self.columns, entries)}
        out |= {g: {"moments": sums[g], "mass": mass} for g in self.normals}
        largest = max((at.prepared[g].size for g in self.normals), default=0.0)
        noise = 2e-16 * self.total / self.N**0.5 * largest
        return Expectation(log_evidence, out, noise=noise)


class _Collected(dict[int | str, Tensor]):
    """Sums over chunks."""

    def __init__(self) -> None:
        super().__init__()
        self.statistics: dict[int | str, Statistics] = {}

    def add(self, key: int | str, part: Tensor) -> None:
        """Add a part."""
        self[key] = self[key] + part if key in self else part

    def add_statistics(self, g: int, part: Statistics) -> None:
        """Add the statistics of a group's rows."""
        part = {name: s.to(torch.float64) for name, s in part.items()}
        before = self.statistics.get(g)
        self.statistics[g] = (
            part if before is None else {name: before[name] + s for name, s in part.items()}
        )


def _restricted(group: Group, rows: slice | Tensor) -> Group:
    """The group at some rows of its only plate."""
    size = rows.stop - rows.start if isinstance(rows, slice) else len(rows)

    def cut(t: Tensor) -> Tensor:
        return t[:, rows] if t.shape[1] > 1 else t

    return replace(
        group,
        sizes=(size, *group.sizes[1:]),
        value=cut(group.value),
        mask=None if group.mask is None else cut(group.mask),
        elements=None if group.elements is None else cut(group.elements),
    )


@dataclass(frozen=True)
class Shape:
    """The groups of a mixture over rows, by what they read."""

    plate: str
    size: int
    rowwise: tuple[int, ...]
    tables: tuple[int, ...]
    free: tuple[int, ...]

    def eligible(self, graph: FactorGraph) -> list[int]:
        """Groups whose linear form the kernel can use: not a latent's own that rows mask."""
        rest = [g for g in self.rowwise if graph.groups[g].value.shape[2] == 1]
        return [*rest, *self.tables, *self.free]


def shape_of_rows(graph: FactorGraph) -> Shape | Finding:
    """The groups of one latent per row of a plate, or why a collapsed graph is none; by looking."""
    if len(graph.latents) != 1:
        return _several(graph)
    ((name, latent),) = graph.latents.items()
    where = f"site '{name}'"
    if len(latent.plates) != 1:
        depth = "in no plate" if not latent.plates else "in nested plates"
        return Finding(where, f"'{name}' is {depth}: no kernel")
    if latent.size < 2:
        return Finding(where, f"'{name}' has one value")
    (plate,) = latent.plates
    rowwise: list[int] = []
    tables: list[int] = []
    free: list[int] = []
    for g, group in enumerate(graph.groups):
        dims = group.dims[0]
        if group.role is Role.POINT:
            continue
        site = group.members[0]
        if group.family is None:
            return Finding(f"site '{site}'", f"'{site}' ({group.distribution}) has no sums")
        if name not in dims:
            free.append(g)
            continue
        if dims != (plate, name):
            return Finding(f"site '{site}'", f"'{site}' has plates of its own under '{name}'")
        fixed = group.value.shape[1] == 1 and len(group.members) == 1 and group.mask is None
        fixed = fixed and not _varies(group)
        (tables if fixed and not group.observed else rowwise).append(g)
    if not rowwise:
        return Finding(where, f"no data read '{name}'")
    return Shape(plate, latent.size, tuple(rowwise), tuple(tables), tuple(free))


def _several(graph: FactorGraph) -> Finding:
    """Why a graph with no latent, or with more than one, is no mixture over rows."""
    names, plates = list(graph.latents), {v.plates for v in graph.latents.values()}
    if not names:
        return Finding("model", "no latent is summed")
    words = {2: "two", 3: "three", 4: "four"}.get(len(names), str(len(names)))
    where = sites_in_words(names)
    if len(plates) == 1 and plates != {()}:
        return Finding(where, f"{words} latents per row: no kernel")
    return Finding(where, f"{words} latents that share factors: no kernel")


def _varies(group: Group) -> bool:
    """Whether an argument differs between rows."""
    return any(a.shape[1] != 1 for a in group.arguments.values())


def _changing(group: Group) -> Finding:
    site = group.members[0]
    return Finding(
        f"site '{site}'", f"the parameters of '{site}' differ from row to row: no kernel"
    )


def row_weights(graph: FactorGraph, shape: Shape) -> Tensor | Finding:
    """What one row counts, by the scale that all its sites share; one where they have none. # (N,)

    Returns:
        A finding where sites of one row differ, or what is outside the rows is scaled.
    """
    groups, N = graph.groups, graph.dim_size(shape.plate)
    device = groups[0].value.device
    one = torch.ones(N, dtype=torch.float64, device=device)

    def per_row(scale: Tensor | float) -> Tensor:
        return torch.as_tensor(scale, dtype=torch.float64, device=device).reshape(-1).expand(N)

    unlike = Finding("poutine.scale", "poutine.scale is not one weight per row: no kernel")
    if not all(groups[g].is_unscaled for g in shape.free):
        return unlike
    own = (*shape.rowwise, *shape.tables)
    if all(groups[g].is_unscaled for g in own):
        return one
    scales = [s for g in own for s in groups[g].scale]
    if any(isinstance(s, Tensor) and s.numel() != s.shape[0] for s in scales):
        return unlike  # a scale that reads the latent tempers
    found = per_row(scales[0])
    if any(not torch.equal(per_row(s), found) for s in scales[1:]) or not bool((found > 0).all()):
        return unlike
    return found.contiguous()


def distinct(graph: FactorGraph, shape: Shape, weight: Tensor) -> tuple[FactorGraph, Tensor | None]:
    """The graph with each distinct row once, and what it counts, where that saves work.

    Args:
        graph: A collapsed graph.
        shape: Its shape.
        weight: What one row counts. # (N,)

    Returns:
        The graph, and what each of its rows counts; None where that is one.
    """
    N = graph.dim_size(shape.plate)
    own = None if bool((weight == 1).all()) else weight
    columns = []
    for g in shape.rowwise:
        group = graph.groups[g]
        if _varies(group):
            return graph, own
        for t in (group.value, group.mask, group.elements):
            if t is not None and t.shape[1] > 1:
                columns.append(t.transpose(0, 1).reshape(N, -1))
    wide = [c for c in columns if c.is_floating_point()]
    # A glance at few rows tells real numbers from counts.
    few = [c[:: max(1, N // 64)] for c in wide]
    if not columns or any(bool((c != c.round()).any()) for c in few):
        return graph, own
    rows = torch.cat([c.to(torch.float64) for c in columns], 1)
    _, inverse, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    if 2 * len(counts) > N:
        return graph, own
    first = torch.full_like(counts, N).scatter_reduce(
        0, inverse, torch.arange(N, device=counts.device), "amin"
    )
    kept = list(graph.groups)
    for g in shape.rowwise:
        kept[g] = _restricted(kept[g], first)
    total = torch.zeros_like(counts, dtype=torch.float64).index_add_(0, inverse, weight)
    return replace(graph, groups=tuple(kept)), total
