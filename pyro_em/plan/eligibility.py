"""Which block iterates a model: one ordered list, and why each that does not match does not."""

from __future__ import annotations

from collections.abc import Mapping

from pyro_em.densities.priors import is_plain_prior
from pyro_em.families.family import main_rule
from pyro_em.families.forms import Kind
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.sites import Role
from pyro_em.updates.update import ClosedForm, Fixed, LeastSquares, ParameterUpdate


def _can_compile(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> bool:
    """Whether all is closed forms on plain selections; by looking only."""
    exact = {n: u for n, u in updates.items() if isinstance(u.update, ClosedForm | LeastSquares)}
    others = [u for n, u in updates.items() if n not in exact]
    if any(not isinstance(u.update, Fixed) for u in others) or not exact:
        return False
    if any(u.kind is Kind.MEDIAN for u in exact.values()):
        return False
    for g, group in enumerate(graph.groups):
        if group.role is Role.POINT:
            if not group.is_unscaled or not is_plain_prior(group, updates, g):
                return False
            continue
        if group.value_binding is not None:
            return False
        if group.family is None:
            return False
        for argument, binding in group.bindings.items():
            is_line = binding.how == "affine" and argument == "loc"
            if not is_line and binding.how not in ("constant", "selection"):
                return False
        touched = set(exact).intersection(group.params)
        if touched and main_rule(group.family, group.arguments) is None:
            return False
    return True
