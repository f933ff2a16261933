"""How the groups of a collapsed graph are evaluated as rows: by natural parameters, or as lines."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_em.densities.dispersed import as_dispersed
from pyro_em.densities.medians import LaplaceRows, as_laplace
from pyro_em.densities.natural import Linears, Naturals, naturals
from pyro_em.densities.predicted import Predicted, as_predicted
from pyro_em.densities.regression import Lines, as_lines
from pyro_em.densities.vector_regression import VectorLines, as_vector_lines
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.update import Newton, ParameterUpdate

Regression = Lines | VectorLines | Predicted | LaplaceRows


@dataclass(frozen=True, eq=False)
class Layout:
    """The ways in which groups are evaluated other than by their family.

    Attributes:
        naturals: Simplex rows, probabilities and rates as one vector; None where there are none.
        linears: Features of the groups that are linear in that vector.
        lines: Groups whose mean or predictor is affine in covariates, or whose location is a median.
    """

    naturals: Naturals | None
    linears: Linears
    lines: Mapping[int, Regression]


def layout_of(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    values: Mapping[str, Tensor],
    eligible: Collection[int],
    sizes: Mapping[int, int] | None = None,
) -> Layout:
    """The layout of a collapsed graph.

    Args:
        graph: A collapsed graph.
        updates: Collapsed updates.
        values: Parameter values, for their shapes.
        eligible: Groups whose linear form the block can use.
        sizes: For each group that may be lines how many values its latent has; where None, all
            latents have as many.
    """
    found = naturals(graph, updates, values, eligible)
    vector, linears = found if found is not None else (None, {})
    if sizes is None:
        sizes = dict.fromkeys(range(len(graph.groups)), next(iter(graph.latents.values())).size)
    lines: dict[int, Regression] = {}
    for g, K in sizes.items():
        where = (g, graph, updates, values, K)
        line: Regression | None = None
        bindings = graph.groups[g].bindings.values()
        is_affine = any(b.how == "affine" for b in bindings)
        is_curved = any(isinstance(updates[p].update, Newton) for b in bindings for p in b.params)
        if is_affine:
            line = as_lines(*where) or as_vector_lines(*where)
        line = line or (as_predicted(*where) if is_curved else None) or as_laplace(*where)
        if is_affine:
            line = line or as_dispersed(*where)
        if line is not None:
            lines[g] = line
    return Layout(vector, linears, lines)
