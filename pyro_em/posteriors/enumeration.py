"""The E-step as a computation: evidence and posterior of every factor's cells in one pass.

q(z) = p(z | x; θ) = Π_f f(z) / p(x; θ); the gradient of the log evidence with respect to a factor's
log density is the posterior of the factor's cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.errors import (
    DataError,
    DegenerateError,
    Finding,
    ModelError,
    PyroEMError,
    as_error,
    message,
)
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.laid_out import LaidGroups
from pyro_em.posteriors.contraction import Ring, contract, evidence, log_sum_exp, maximum
from pyro_em.posteriors.elimination import ContractionPlan, plan_contraction
from pyro_em.posteriors.messages.steps import step_cells

Tables = Sequence[Tensor]


def contraction_of(graph: FactorGraph, extra: Sequence[tuple[str, ...]] = ()) -> ContractionPlan:
    """The elimination order for a graph's factors, groups unstacked, plus ``extra`` tables."""
    dims: list[tuple[str, ...]] = [d for g in graph.groups for d in g.dims]
    own: list[str | None] = [
        None if g.observed else name for g in graph.groups for name in g.members
    ]
    used = dict.fromkeys(d for ds in (*dims, *extra) for d in ds)
    sizes = graph.dim_sizes(used)
    return plan_contraction(
        [*dims, *extra],
        {name: latent.plates for name, latent in graph.latents.items()},
        sizes,
        own_latent=[*own, *(None for _ in extra)],
    )


def scales_of(graph: FactorGraph) -> list[Tensor | float] | None:
    """Each factor's scale, or None where all are one."""
    if isinstance(graph.groups, LaidGroups):
        scales = graph.groups.scales
        return None if all(s == 1.0 for s in scales) else list(scales)
    for group in graph.groups:
        if not group.is_unscaled:
            return [s for g in graph.groups for s in g.scale]
    return None


def check_scales(graph: FactorGraph, plan: ContractionPlan) -> list[str]:
    """Refuse scales under which no evidence is defined; return warnings about tempering.

    Raises:
        ModelError: If latents that are summed together have different scales, or a latent has a
            sample weight that its data lack.
    """
    scales = scales_of(graph)
    if scales is None:
        return []
    names = [n for g in graph.groups for n in g.members]
    observed = [g.observed for g in graph.groups for _ in g.members]

    def equal(a: Tensor | float, b: Tensor | float) -> bool:
        ta, tb = torch.as_tensor(a).cpu(), torch.as_tensor(b).cpu()
        return ta.numel() == tb.numel() and bool((ta.reshape(-1) == tb.reshape(-1)).all())

    for a, b in plan.same_scale:
        if not equal(scales[a], scales[b]):
            raise ModelError(
                message(
                    f"sites '{names[a]}' and '{names[b]}'",
                    "they are summed together but have different poutine.scale.",
                    "a scale multiplies the logarithm of a sum, so that all sites in the sum share it",
                    ["put both under one poutine.scale"],
                )
            )
    warnings = []
    for s, reference in plan.locals_scaled_by.items():
        if s >= len(names) or not observed[s] or equal(scales[s], scales[reference]):
            continue
        if equal(scales[reference], 1.0):
            warnings.append(
                message(
                    f"site '{names[s]}'",
                    f"it has a poutine.scale that its latent '{names[reference]}' lacks: this tempers "
                    "its likelihood inside the sum, p(x | z)^s.",
                    "a sample weight scales the latent and its data",
                    ["put the latent under the same poutine.scale if you meant weights"],
                )
            )
        else:
            raise ModelError(
                message(
                    f"sites '{names[reference]}' and '{names[s]}'",
                    "the latent has a poutine.scale that its data do not share.",
                    "a sample weight stands for replicated rows, latent and data together",
                    ["put both under one poutine.scale"],
                )
            )
    return warnings


@dataclass(frozen=True, eq=False)
class EStep:
    """The result of one pass over the contraction.

    Attributes:
        log_evidence: In nats, scaled as the sites are.
        terms: Its terms with their plates.
        cells: Per group the gradient of the evidence: scale × posterior. # (members, *sizes)
    """

    log_evidence: Tensor
    terms: list[tuple[tuple[str, ...], Tensor]]
    cells: list[Tensor]


def forward(
    graph: FactorGraph, plan: ContractionPlan, tables: Tables, ring: Ring, extra: Tables = ()
) -> tuple[list[Tensor], list[tuple[tuple[str, ...], Tensor]], Tensor]:
    """Leaves per group, terms and their sum, in float64.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        tables: Log densities per group. # (members, *sizes)
        ring: How variables are eliminated.
        extra: Further tables of the plan.
    """
    leaves = [t.detach().to(torch.float64) for t in (*tables, *extra)]
    if torch.is_grad_enabled():
        leaves = [leaf.requires_grad_() for leaf in leaves]
    n = len(tables)
    # The gradient of a view needs no memory of its own, where all cells count alike.
    flat = [
        part
        for leaf in leaves[:n]
        for part in (leaf.unbind(0) if len(leaf) != 1 else (leaf.reshape(leaf.shape[1:]),))
    ] + leaves[n:]
    scales = scales_of(graph)
    if scales is not None:
        scales = [*scales, *(1.0 for _ in extra)]
    terms = contract(plan, flat, scales=scales, ring=ring)
    return leaves, terms, evidence(terms)


@torch.enable_grad()
def run_contraction(
    graph: FactorGraph,
    plan: ContractionPlan,
    log_densities: Tables,
    ring: Ring = log_sum_exp,
    extra: Tables = (),
) -> EStep:
    """One forward and one backward pass, in float64.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        log_densities: Per group. # (members, *sizes)
        ring: How variables are eliminated.
        extra: Tables of zeros whose gradients are wanted too; they come last in ``cells``.
    """
    leaves, terms, total = forward(graph, plan, log_densities, ring, extra)
    usable = bool(leaves) and bool(torch.isfinite(total))
    cells = torch.autograd.grad(total, leaves) if usable else leaves
    return EStep(total.detach(), [(d, t.detach()) for d, t in terms], list(cells))


def largest_cells(graph: FactorGraph, plan: ContractionPlan, log_densities: Tables) -> EStep:
    """A jointly most probable assignment of the latents that count: max instead of a sum.

    Args:
        graph: The factors.
        plan: From `contraction_of`.
        log_densities: Per group. # (members, *sizes)
    """
    tables = tables_that_count(graph, log_densities)
    return run_contraction(graph, plan, tables, ring=maximum)


def tables_that_count(graph: FactorGraph, log_densities: Tables) -> list[Tensor]:
    """Tables of which the largest assignment is one of the latents that count.

    A latent that does not count (a padded step of a chain, the unobserved part of a site where it
    is observed) sums to one and leaves the evidence as it is. Its largest probability is below one
    and would take part in the maximum: it is divided by it, so that such a latent takes its most
    probable value given the others, and these are as if it were not there.

    Args:
        graph: The factors.
        log_densities: Per group. # (members, *sizes)
    """
    tables = []
    for group, table in zip(graph.groups, log_densities, strict=True):
        if group.mask is not None and not group.observed:
            own = [dims.index(name) for dims, name in zip(group.dims, group.members, strict=True)]
            top = torch.stack(
                [
                    part.amax(i, keepdim=True).expand(part.shape)
                    for part, i in zip(table, own, strict=True)
                ]
            )
            table = torch.where(group.mask | (top == -torch.inf), table, table - top)
        tables.append(table)
    return tables


def e_step(graph: FactorGraph, plan: ContractionPlan, log_densities: Tables) -> EStep:
    """The exact E-step, with its promises checked.

    Raises:
        DataError: If the data are impossible under the model, or a density is not a number.
    """
    for group, table in zip(graph.groups, log_densities, strict=True):
        largest = float(table.amax()) if table.numel() else 0.0
        if largest != largest or largest == math.inf:
            bad = torch.isnan(table) | (table == torch.inf)
            index = tuple(int(i) for i in bad.nonzero()[0])
            site = group.members[index[0]]
            value = "NaN" if bool(torch.isnan(table[index])) else "+inf"
            found = Finding(
                f"site '{site}'",
                f"its log density is {value} {_where(graph, group, index)}.",
                "an evidence that is no number cannot be raised",
                ("check the parameters' values and constraints", "check the data at this place"),
                DataError,
                row=_row_of(graph, site, group.dims[index[0]], index[1:]),
            )
            raise as_error([found])
        if largest > 1e9:  # no normalised density on float data comes near it
            _refuse_unbounded(graph, log_densities)
    together = step_cells(graph, log_densities)
    if together is None:
        result = run_contraction(graph, plan, log_densities)
    else:
        result = EStep(together.log_evidence, together.terms, together.cells)
    if not bool(torch.isfinite(result.log_evidence)):
        _refuse_impossible(graph, plan, log_densities)
    _check_sums(graph, result, log_densities)
    return result


def _where(graph: FactorGraph, group: Group, index: tuple[int, ...]) -> str:
    names = group.dims[index[0]]
    shown = [f"{name} = {i}" for name, i in zip(names, index[1:], strict=False)]
    return "at " + ", ".join(shown) if shown else ""


def _refuse_impossible(graph: FactorGraph, plan: ContractionPlan, tables: Tables) -> None:
    """Name the first observed site, in model order, that no assignment can explain, and its row."""
    observed = [
        (g, i, name)
        for g, group in enumerate(graph.groups)
        if group.observed
        for i, name in enumerate(group.members)
    ]
    order = {name: k for k, name in enumerate(graph.structure.sites)}
    observed.sort(key=lambda item: order[item[2]])

    def terms_of_first(n: int) -> list[tuple[tuple[str, ...], Tensor]]:
        """The evidence of the first n observed sites alone."""
        kept = [t.clone() for t in tables]
        for g, i, _ in observed[n:]:
            kept[g][i] = 0.0
        return run_contraction(graph, plan, kept).terms

    def impossible(n: int) -> bool:
        return any(bool((t == -torch.inf).any()) for _, t in terms_of_first(n))

    low, high = 0, len(observed)  # possible with `low` sites, impossible with `high`
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if impossible(middle) else (middle, high)
    site, place, row = (observed[high - 1][2] if observed else ""), "", None
    for dims, term in terms_of_first(high):
        if bool((term == -torch.inf).any()):
            index = (term == -torch.inf).nonzero()[0]
            place = ", ".join(f"{d} = {int(i)}" for d, i in zip(dims, index, strict=True))
            row = _row_of(graph, site, dims, index.tolist())
            break
    found = Finding(
        f"site '{site}'" if site else "model",
        "the data are impossible under the model (log evidence −inf)"
        + (f", first at {place}." if place else "."),
        "every assignment of the latents has a probability of exactly zero",
        (
            "check for exact zeros in probabilities (structural zeros stay zero)",
            "check this observation",
        ),
        DataError,
        row=row,
    )
    raise as_error([found])


def _row_of(graph: FactorGraph, site: str, dims: Sequence[str], index: Sequence[int]) -> int | None:
    """The element of the outermost plate around a site, where an index goes along it."""
    known = graph.structure.sites.get(site)
    outermost = known.nested[0] if known is not None and known.nested else None
    return next((i for d, i in zip(dims, index, strict=False) if d == outermost), None)


def _refuse_unbounded(graph: FactorGraph, tables: Tables) -> None:
    """A log density beyond float64's resolution is the sign of an objective without a maximum."""
    for group, table in zip(graph.groups, tables, strict=True):
        size = table[torch.isfinite(table)].abs()
        if size.numel() and float(size.max()) > 1e9:
            names = ", ".join(f"'{n}'" for n in group.params) or "none"
            raise DegenerateError(
                message(
                    f"site '{group.members[0]}', parameters {names}",
                    f"its log density reaches {float(size.max()):.3g} nats. The update was rolled "
                    "back.",
                    "the objective seems to grow without bound"
                    + (" (pyro.factor is unnormalised)" if group.distribution == "Unit" else ""),
                    ["constrain or fix the parameter", "check the data's units"],
                )
            )


def _check_sums(graph: FactorGraph, result: EStep, tables: Tables) -> None:
    """Promise: every posterior sums to one (times its scale)."""
    for group, cells in zip(graph.groups, result.cells, strict=True):
        if group.observed:
            continue
        axes = tuple(range(1 + group.n_plates, cells.dim()))
        total = cells.sum(axes)
        # All members at once where they count once; one by one to say which of them is wrong.
        if group.is_unscaled and bool(((total - 1).abs() <= 1e-6).all()):
            continue
        for i, scale in enumerate(group.scale):
            expected: Tensor | float = scale
            if isinstance(scale, Tensor):
                expected = scale.reshape(scale.shape[: group.n_plates])
            off = (total[i] - expected).abs().max() if total[i].numel() else total.new_zeros(())
            if not float(off) <= 1e-6 * float(torch.as_tensor(expected).abs().max()):
                _refuse_unbounded(graph, tables)
                raise PyroEMError(
                    message(
                        f"site '{group.members[i]}'",
                        f"its posterior sums to {float(total[i].reshape(-1)[0]):.6g}.",
                        "posterior mass was lost; this is a defect of the library",
                        ["please report it with the model"],
                    )
                )
