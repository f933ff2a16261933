"""Of data in parts: what they read of parameters, and how the evidence curves, for a result."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.fitting.results.criteria import elements_read
from pyro_em.fitting.results.information import loadings_of
from pyro_em.fitting.results.standard_errors import (
    Curved,
    Evidence,
    StandardErrors,
    standard_errors_over,
)
from pyro_em.fitting.steps.parted import Parted
from pyro_em.plan.part import Part, Totals
from pyro_em.plan.program import Program
from pyro_em.posteriors.conjugates.shared_conjugates import shared_blocks
from pyro_em.posteriors.contraction import contract, evidence
from pyro_em.posteriors.enumeration import scales_of
from pyro_em.reduction.seen_as import SeenAs
from pyro_em.tracing.parameters import TracedParameter, parameters_at
from pyro_em.updates.update import Fixed


def read_anywhere(data: Parted, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which elements of each parameter any factor of any part reads.

    Args:
        data: The parts.
        initial: The parameters where the fit began.
    """

    def count(part: Part) -> dict[str, Tensor]:
        return {n: r.to(torch.long) for n, r in elements_read(part.program, initial).items()}

    return {name: number > 0 for name, number in data.over.sum(count).items()}


def evidence_of(part: Part, totals: Totals | None = None) -> Evidence:
    """From constrained values to log densities and log evidence of a part, differentiable.

    Args:
        part: The part.
        totals: What all parts say of latents outside their rows, wherever parameters are.
    """
    program = part.program
    parameters = program.graph.parameters
    order = list(range(len(program.graph.groups)))

    def of(moved: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
        fixed = {n: p.value() for n, p in parameters.items() if n not in moved}
        tables = program.log_densities_at({**fixed, **moved}, order, part.outside(totals or {}))
        counted = part.counted_tables([tables[g].to(torch.float64) for g in order])
        flat = [one for table in counted for one in table.unbind(0)]
        return flat, evidence(contract(program.contraction, flat, scales=scales_of(program.graph)))

    return of


def free_parameters_of(program: Program) -> list[TracedParameter]:
    """The parameters that a fit moves, and that information tells something of.

    An end of a support is no stationary point: its error falls like 1/N and is not Normal, and all
    others have the errors that they have where it is known.
    """
    without = without_information(program)
    return [p for n, p in program.graph.parameters.items() if n not in without]


def without_information(program: Program) -> frozenset[str]:
    """Names of parameters that are fixed, or an end of a support."""
    return frozenset(
        n for n, u in program.updates.items() if isinstance(u.update, Fixed) or u.is_end
    )


def _totals_at(data: Parted, unconstrained: Mapping[str, Tensor]) -> Totals:
    """What the parts say of latents outside their rows, which parameters may not reach.

    Raises:
        UsageError: If they do: how the sums of all parts curve is no sum over parts.
    """
    if not data.has_shared:
        return {}
    for block in shared_blocks(data.lead.graph, data.part.plate).values():
        for group in block.groups[1:]:
            if group.params or not group.is_static:
                raise UsageError(
                    message(
                        "standard_errors",
                        f"'{group.members[0]}' reads '{block.groups[0].members[0]}', and its density "
                        f"depends on parameters; the data are given {data.how}.",
                        "the second derivatives of a latent outside the rows join all parts",
                        ["fit all data at once: em.fit(data)", "em.bootstrap(data)"],
                    )
                )
    with parameters_at(data.lead.graph.parameters, unconstrained, unconstrained=True):
        return data.over.sum(lambda part: part.naturals())


def standard_errors_of_parts(data: Parted, unconstrained: Mapping[str, Tensor]) -> StandardErrors:
    """Standard errors at the parameters of a finished fit; several processes make this call together.

    Args:
        data: The parts.
        unconstrained: The parameters.
    """
    lead = data.lead
    totals = _totals_at(data, unconstrained)

    def curved(part: Part) -> Curved:
        part.program.require_unchanged("standard_errors")
        return Curved(free_parameters_of(part.program), evidence_of(part, totals), part.begin)

    at = parameters_at(lead.graph.parameters, unconstrained, unconstrained=True)
    with data.over.together(), at:
        over = SeenAs(data.over, curved)
        return standard_errors_over(free_parameters_of(lead), over, loadings_of(lead.graph))
