"""The exact posterior of many rows, through tables of some of them at a time.

A posterior holds the probability of each cell and the log densities behind them; a contraction of all
rows at once holds several tables more while it goes forwards and backwards. Rows are independent given
the parameters: what some of them say by themselves is put in its place among that of all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError
from pyro_em.expanded import once_each
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.at_values import Values
from pyro_em.posteriors.continuous.gaussian_steps import tables_of
from pyro_em.posteriors.continuous.table_rows import TableSlices
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.exact import exact_posterior

_CELLS = 2**19  # numbers of a part, those of its data for each cell included


def posterior_by_rows(
    graph: FactorGraph, plan: ContractionPlan, values: Values | None
) -> Posterior | None:
    """The exact posterior, through tables of some rows at a time.

    Args:
        graph: The factor graph.
        plan: Its elimination order.
        values: Parameter values, which reach the factors through bindings; None for the trace's own.

    Returns:
        The posterior; None where rows are few or do not stand by themselves, where each of them has
        continuous latents, and where tables of all rows have to say what is wrong.
    """
    slices = TableSlices.of(graph, as_traced=values is None, cells=_CELLS)
    if slices is None or any(group.nested is not None for group in graph.groups):
        return None
    rows = slices.rows[-1].stop
    joined, pointwise, n = _Joined(rows), torch.empty(0, dtype=torch.float64), len(graph.groups)
    evidence, entropy = [], []
    for own, part in zip(slices.rows, slices.parts(), strict=True):
        with torch.no_grad():
            arguments = [g.evaluate_arguments(values) for g in part.groups]
            tables, _ = tables_of(part, arguments, [g.value for g in part.groups])
        try:
            q = exact_posterior(part, plan, tables)
        except PyroEMError:  # whose words are of rows of the part
            return None
        if q.log_evidence is None or q.pointwise is None:
            return None
        if not joined.take([*q.cells, *q.counts, *q.tables], own):
            return None
        if not len(pointwise):
            pointwise = q.pointwise.new_empty(rows)
        pointwise[own] = q.pointwise
        evidence.append(q.log_evidence)
        entropy.append(q.entropy_value)
    total, found = math.fsum(evidence), joined.tensors()
    return Posterior(
        graph,
        found[:n],
        found[n : 2 * n],
        total,
        True,
        found[2 * n :],
        math.fsum(entropy),
        pointwise,
        bound=total,
    )


class _Joined:
    """Tensors of all rows from those of some: what parts hold once is held once here, too.

    Args:
        rows: How many there are.
    """

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self._first: list[int] = []  # for each tensor the first that is the same memory
        self._wholes: dict[int, Tensor] = {}
        self._shapes: list[torch.Size] = []

    def take(self, tensors: Sequence[Tensor], rows: slice) -> bool:
        """Put those of some rows in their place; whether they are of the form of the first ones.

        Args:
            tensors: # (members, rows, ...)
            rows: Which these are.
        """
        forms = [(t.data_ptr(), t.shape, t.stride()) for t in tensors]
        first = [forms.index(form) for form in forms]
        if not self._first:
            self._first, self._shapes = first, [t.shape for t in tensors]
        if first != self._first or rows.stop - rows.start < 2:
            return False
        return all(self._put(i, tensors[i], rows) for i in sorted(set(first)))

    def _put(self, i: int, t: Tensor, rows: slice) -> bool:
        one = _of_one_member(once_each(t))
        if i not in self._wholes:
            shape = list(one.shape)
            shape[1] = self.rows if shape[1] > 1 else 1
            self._wholes[i] = one.clone() if shape[1] == 1 else one.new_empty(shape)
        whole = self._wholes[i]
        if (len(whole), whole.shape[2:]) != (len(one), one.shape[2:]):
            return False
        if whole.shape[1] == 1:
            return one.shape == whole.shape and torch.equal(one, whole)
        if one.shape[1] == 1:
            return False
        whole[:, rows] = one
        return True

    def tensors(self) -> list[Tensor]:
        """Those of all rows, in the order of the parts'."""
        shapes = [(s[0], self.rows, *s[2:]) for s in self._shapes]
        return [self._wholes[i].expand(s) for i, s in zip(self._first, shapes, strict=True)]


def _of_one_member(t: Tensor) -> Tensor:
    """A tensor with one member where all are the same."""
    return t[:1] if len(t) > 1 and bool((t == t[:1]).all()) else t
