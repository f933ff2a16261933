"""Which values of the latents no structural zero of a prior excludes, and no label that is seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from pyro_em.clamped import Clamped
from pyro_em.distributions import unexpanded
from pyro_em.errors import PyroEMError
from pyro_em.graph.factors import Group
from pyro_em.graph.later_arguments import LaterArguments
from pyro_em.graph.many_rows.given_rows import slice_of
from pyro_em.plan.program import Program
from pyro_em.posteriors.conjugates.conjugate_slices import even_slices
from pyro_em.posteriors.enumeration import run_contraction
from pyro_em.tracing.sites import Role

Alive = list[Tensor | None]

_CELLS = 2**18  # of a part of a table that is looked at

_LABELS = 2**20  # cells of labels, of all rows, that are looked at


def possible_cells(program: Program, initial: Mapping[str, Tensor]) -> Alive:
    """Per group which cells no structural zero excludes; None where nothing is excluded.

    Args:
        program: The model with its data.
        initial: The parameters where the fit began.
    """
    graph = program.graph
    none: Alive = [None] * len(graph.groups)
    latents = [g for g, group in enumerate(graph.groups) if _may_exclude(group)]
    values = {n: initial[n] if n in initial else p.value() for n, p in graph.parameters.items()}
    try:
        if _all_are_possible(program, latents, values):
            return none
        tables = program.log_densities_at(values, latents) if latents else {}
    except PyroEMError:
        return none
    if not any(_has_zeros(t) for t in tables.values()):
        return none
    every = []
    for g, group in enumerate(graph.groups):
        full = (len(group.members), *group.sizes)
        allowed = torch.zeros(full, dtype=torch.float64, device=group.value.device)
        if g in tables:
            allowed = torch.where(torch.isneginf(tables[g]), -torch.inf, allowed)
        every.append(allowed)
    with torch.enable_grad():
        result = run_contraction(graph, program.contraction, every)
    if not bool(torch.isfinite(result.log_evidence)):
        return none
    return [cells > 0 for cells in result.cells]


def _may_exclude(group: Group) -> bool:
    """Whether a factor may be zero whatever the data are.

    Labels of very many rows exclude next to nothing that others do not allow: they are not looked at.
    """
    if group.role is Role.LATENT:
        return True
    is_label = group.family is not None and group.family.distribution is Clamped
    return is_label and len(group.members) * math.prod(group.sizes) <= _LABELS


def _has_zeros(table: Tensor) -> bool:
    return bool(torch.isneginf(unexpanded(table)).any())


def _all_are_possible(
    program: Program, latents: Sequence[int], values: Mapping[str, Tensor]
) -> bool:
    """Whether no prior is zero, where that is seen without a table of all rows.

    Priors that covariates shift, `Categorical(logits=x @ v.T)`, have a number for each row and value.
    """
    groups = [program.graph.groups[g] for g in latents]
    if not program.compiled or not any(_is_of_many_rows(group) for group in groups):
        return False
    return not any(_has_zeros(t) for group in groups for t in _tables(group, values))


def _is_of_many_rows(group: Group) -> bool:
    """Whether its arguments are not held, since they differ from row to row."""
    later = isinstance(group.arguments, LaterArguments) and group.nested is None
    return later and bool(group.n_plates) and group.value_binding is None


def _tables(group: Group, values: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Its log densities at parameter values, of many rows in parts."""
    if not _is_of_many_rows(group):
        yield group.thin().log_density_at(values)
        return
    width = math.prod(group.sizes[1:])
    for rows in even_slices(group.sizes[0], max(2, _CELLS // width)):
        yield slice_of(group, rows).log_density_at(values)
