"""The log evidence of many rows, through tables of some of them at a time.

    log p(x) = Σ_parts log p(x_part)

An evidence decides no update, so that no kernel is made for it, and it is one number: no table of all
rows has to be there at once. Rows are independent given the parameters, whatever their family.
"""

from __future__ import annotations

import math

import torch

from pyro_em.errors import PyroEMError
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.at_values import Values
from pyro_em.posteriors.continuous.gaussian_steps import tables_of
from pyro_em.posteriors.continuous.table_rows import TableSlices
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.exact import log_evidence_of

_FEW = 2**12  # rows whose tables are small, whatever the model

_CELLS = 2**18  # of the largest table of a part


def log_evidence_by_rows(
    graph: FactorGraph, plan: ContractionPlan, values: Values | None
) -> float | None:
    """The log evidence in nats, through tables of some rows at a time.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        values: Parameter values, which reach the factors through bindings; None for the trace's own.

    Returns:
        The log evidence; None where rows are few or do not stand by themselves, and where tables of
        all rows have to say what is wrong.
    """
    plate = graph.structure.data_plate
    if plate is None or graph.structure.plates[plate].size < _FEW:
        return None
    slices = TableSlices.of(graph, as_traced=values is None, cells=_CELLS)
    if slices is None:
        return None
    parts = []
    with torch.no_grad():
        for part in slices.parts():
            arguments = [g.evaluate_arguments(values) for g in part.groups]
            tables, _ = tables_of(part, arguments, [g.value for g in part.groups])
            try:
                parts.append(log_evidence_of(part, plan, tables))
            except PyroEMError:  # whose words are of rows of the part
                return None
    total = math.fsum(parts)
    return total if math.isfinite(total) else None
