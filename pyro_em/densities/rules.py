"""Which rule evaluates the rows of a group by products over features, the first that fits."""

from __future__ import annotations

from pyro_em.densities.counts import as_counts
from pyro_em.densities.density import PreparedRows
from pyro_em.densities.exponential import as_exponential
from pyro_em.densities.gaussian import as_gaussian
from pyro_em.densities.student import CauchyRows, HalfCauchyRows, StudentRows
from pyro_em.densities.student_vectors import as_student_vectors
from pyro_em.densities.weibull import WeibullRows
from pyro_em.densities.with_missing import as_incomplete
from pyro_em.graph.all_data import AllData
from pyro_em.graph.factors import Group


def rule_of(group: Group, K: int, all_data: AllData | None = None) -> PreparedRows | None:
    """The rule of a group whose arguments differ between components only, or None.

    Args:
        group: A collapsed group; its members and plates are the rows, members first.
        K: Number of components.
        all_data: What is known of all data, where the group holds a part of them.
    """
    return (
        as_gaussian(group, K, all_data)
        or as_incomplete(group, K, all_data)
        or as_counts(group, K, all_data)
        or StudentRows.of(group, K)
        or CauchyRows.of(group, K)
        or HalfCauchyRows.of(group, K)
        or as_student_vectors(group, K, all_data)
        or WeibullRows.of(group, K)
        or as_exponential(group, K)
    )
