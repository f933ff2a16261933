r"""The E-step of a mixture: one latent per row of a plate, in chunks of rows.

    log p(x_n) = log Σ_k exp ℓ_nk,   r_nk = exp(ℓ_nk − log p(x_n)),   S = Σ_n Σ_k r_nk T(x_n)

Nothing of size N × K is kept: each chunk adds to the evidence and to the sufficient statistics. Rows
that occur several times are computed once and counted as often as they occur, which is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.compiled.features import Gaussian, as_gaussian
from pyro_em.compiled.step import Sums, checked, counted
from pyro_em.families.record import Statistics
from pyro_em.graph import FactorGraph, Group

_CHUNK_CELLS = 2**18


@dataclass(eq=False)
class Rows:
    """A mixture over the rows of one plate.

    Attributes:
        graph: The collapsed graph; values may hold distinct rows only.
        N: Rows that are held.
        K: Components.
        rowwise: Groups that are evaluated chunk by chunk.
        gaussians: Groups that are evaluated by matrix products over features.
        tables: Groups that read the component but no row.
        free: Groups that read no component.
        repeats: How often each row occurs; None where each occurs once. # (N,)
    """

    graph: FactorGraph
    N: int
    K: int
    rowwise: tuple[int, ...]
    gaussians: Mapping[int, Gaussian]
    tables: tuple[int, ...]
    free: tuple[int, ...]
    repeats: Tensor | None
    chunk: int = field(init=False)
    is_counting: dict[int, bool] = field(init=False)

    def __post_init__(self) -> None:
        self.is_counting = {g: _is_counting(self.graph.groups[g], self.K) for g in self.tables}
        width = self.K * (2 + sum(len(self.graph.groups[g].members) for g in self.rowwise))
        width += sum(g.width for g in self.gaussians.values())
        self.chunk = max(1024, min(16384, _CHUNK_CELLS // width))

    def e_step(self, arguments: Sequence[Mapping[str, Tensor]]) -> Sums:
        """Evidence and sums at some arguments.

        Raises:
            Handover: If a row is impossible, a density is not a number, or mass was lost.
        """
        groups = self.graph.groups
        device = groups[0].value.device
        constant = torch.zeros(self.K, 1, dtype=torch.float64, device=device)
        for g in self.tables:
            constant = constant + self._table(g, arguments[g])
        # In float32 the exponential of numbers far below −87 is slow; a weight of e⁻⁸⁰ counts nothing.
        # A weight of exactly zero has to stay.
        may_clamp = not self.rowwise and bool(torch.isfinite(constant).all())
        may_clamp = may_clamp and all(r.x.dtype == torch.float32 for r in self.gaussians.values())
        prepared = {g: rule.prepare(arguments[g]) for g, rule in self.gaussians.items()}
        evidence = torch.zeros((), dtype=torch.float64, device=device)
        mass = torch.zeros(self.K, dtype=torch.float64, device=device)
        collected: dict[int, Statistics] = {}
        moments: dict[int, Tensor] = {}
        for begin in range(0, self.N, self.chunk):
            rows = slice(begin, min(begin + self.chunk, self.N))
            size = rows.stop - rows.start
            parts = {g: _restricted(groups[g], rows, size) for g in self.rowwise}
            joint: Tensor | None = None
            features = {g: rule.features(rows) for g, rule in self.gaussians.items()}
            for g, rule in self.gaussians.items():
                table = rule.log_density(prepared[g], features[g])
                joint = table if joint is None else joint + table
            for g, part in parts.items():
                table = part.log_density(arguments[g])
                table = table.reshape(len(part.members), -1, self.K).sum(0).T
                joint = table if joint is None else joint + table
            assert joint is not None
            joint = joint + constant.to(joint.dtype)
            top = joint.amax(0)
            weights = joint.sub_(top)
            if may_clamp:
                weights.clamp_(min=-80.0)
            weights.exp_()
            if may_clamp:
                weights.masked_fill_(weights < 2e-35, 0.0)
            total = weights.sum(0)
            log_p = top.to(torch.float64) + total.log()
            if self.repeats is None:
                evidence = evidence + log_p.sum()
                weights.div_(total)
            else:
                own = self.repeats[rows]
                evidence = evidence + (log_p * own).sum()
                weights.mul_(own.to(weights.dtype) / total)
            mass = mass + weights.sum(1, dtype=torch.float64)
            for g, rule in self.gaussians.items():
                m = rule.moments(prepared[g], weights, features[g])
                moments[g] = m if g not in moments else moments[g] + m
            for g, part in parts.items():
                _add(collected, g, self._rowwise_counts(part, weights, arguments[g]))
        for g in self.free:
            table = groups[g].log_density(arguments[g]).to(torch.float64)
            evidence = evidence + table.sum()
            collected[g] = counted(groups[g], torch.ones_like(table), arguments[g])
        all_rows = self.N if self.repeats is None else float(self.repeats.sum())
        log_evidence = checked(evidence, mass, all_rows)
        for g, rule in self.gaussians.items():
            collected[g] = rule.statistics(prepared[g], moments[g], mass, arguments[g])
        for g in self.tables:
            collected[g] = self._table_sums(g, mass, arguments[g])
        largest = max((p.size for p in prepared.values()), default=0.0)
        return Sums(log_evidence, collected, 2e-16 * self.N**0.5 * largest)

    def _table(self, g: int, arguments: Mapping[str, Tensor]) -> Tensor:
        """Log densities of a group that no row reaches. # (K, 1)"""
        group = self.graph.groups[g]
        assert group.family is not None
        log_p = group.family.log_prob(group.value, arguments)
        return log_p.reshape(self.K, 1).to(torch.float64)

    def _table_sums(self, g: int, mass: Tensor, arguments: Mapping[str, Tensor]) -> Statistics:
        """Expected statistics of a group that no row reaches; those of categories are known."""
        group = self.graph.groups[g]
        counts = mass.reshape(*(1,) * (1 + group.n_plates), self.K)
        if self.is_counting[g]:
            total = mass.sum().reshape((1,) * counts.dim())
            return {"count": mass.reshape(*total.shape, self.K), "weight": total}
        return counted(group, counts, arguments)

    def _rowwise_counts(
        self, part: Group, weights: Tensor, arguments: Mapping[str, Tensor]
    ) -> Statistics:
        counts = weights.T.reshape(1, *part.sizes).expand(len(part.members), *part.sizes)
        return counted(part, counts, arguments)


def _is_counting(group: Group, K: int) -> bool:
    """Whether a group is p(z) = Categorical with one row for all: its statistics are the counts."""
    assert group.family is not None
    if group.family.distribution is not dist.Categorical or group.value.numel() != K:
        return False
    one_row = all(a.numel() == K for a in group.arguments.values())
    in_order = torch.equal(group.value.reshape(-1).long().cpu(), torch.arange(K))
    return one_row and in_order


def _add(collected: dict[int, Statistics], g: int, more: Statistics) -> None:
    more = {name: s.to(torch.float64) for name, s in more.items()}
    known = collected.get(g)
    collected[g] = more if known is None else {n: known[n] + s for n, s in more.items()}


def _restricted(group: Group, rows: slice | Tensor, size: int) -> Group:
    """The group at ``size`` of the rows of its only plate."""

    def cut(t: Tensor) -> Tensor:
        return t[:, rows] if t.shape[1] > 1 else t

    return replace(
        group,
        sizes=(size, *group.sizes[1:]),
        value=cut(group.value),
        mask=None if group.mask is None else cut(group.mask),
    )


def as_rows(graph: FactorGraph) -> Rows | None:
    """The mixture that a collapsed graph is, or None.

    Args:
        graph: A collapsed graph.
    """
    if len(graph.latents) != 1:
        return None
    ((name, latent),) = graph.latents.items()
    if len(latent.plates) != 1 or latent.size < 2:
        return None
    (plate,) = latent.plates
    rowwise: list[int] = []
    tables: list[int] = []
    free: list[int] = []
    for g, group in enumerate(graph.groups):
        dims = group.dims[0]
        if group.family is None or (group.event_dims and group.mask is not None):
            return None
        if name not in dims:
            free.append(g)
            continue
        if dims != (plate, name):
            return None
        if any(a.shape[1] != 1 for a in group.arguments.values()):
            return None
        fixed = group.value.shape[1] == 1 and len(group.members) == 1 and group.mask is None
        (tables if fixed and not group.observed else rowwise).append(g)
    if not rowwise:
        return None
    N, K = graph.dim_size(plate), latent.size
    graph, repeats = _distinct(graph, rowwise, N)
    N = N if repeats is None else len(repeats)
    gaussians = {}
    for g in rowwise:
        single = len(graph.groups[g].members) == 1 and graph.groups[g].mask is None
        rule = as_gaussian(graph.groups[g], K) if single and repeats is None else None
        if rule is not None:
            gaussians[g] = rule
    rest = tuple(g for g in rowwise if g not in gaussians)
    return Rows(graph, N, K, rest, gaussians, tuple(tables), tuple(free), repeats)


def _distinct(
    graph: FactorGraph, rowwise: Sequence[int], N: int
) -> tuple[FactorGraph, Tensor | None]:
    """The graph with each distinct row once, and how often it occurs, where that saves work."""
    columns = []
    for g in rowwise:
        group = graph.groups[g]
        for t in (group.value, group.mask):
            if t is not None and t.shape[1] > 1:
                columns.append(t.transpose(0, 1).reshape(N, -1))
    wide = [c for c in columns if c.is_floating_point()]
    # A glance at few rows tells real numbers from counts.
    few = [c[:: max(1, N // 64)] for c in wide]
    if not columns or any(bool((c != c.round()).any()) for c in few):
        return graph, None
    rows = torch.cat([c.to(torch.float64) for c in columns], 1)
    _, inverse, counts = rows.unique(dim=0, return_inverse=True, return_counts=True)
    if 2 * len(counts) > N:
        return graph, None
    first = torch.full_like(counts, N).scatter_reduce(
        0, inverse, torch.arange(N, device=counts.device), "amin"
    )
    kept = list(graph.groups)
    for g in rowwise:
        kept[g] = _restricted(kept[g], first, len(counts))
    return replace(graph, groups=tuple(kept)), counts.to(torch.float64)
