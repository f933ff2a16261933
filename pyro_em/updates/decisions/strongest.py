"""The strongest update that is exact for one parameter, from every place where it stands."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch.distributions import constraints

from pyro_em.distributions import bounds, is_real, is_simplex
from pyro_em.families.family import CHOLESKY, IDENTITY
from pyro_em.graph.factors import FactorGraph
from pyro_em.updates.closed_forms.met_ends import pair_at
from pyro_em.updates.decisions.appearances import Appearances
from pyro_em.updates.decisions.read_priors import why_not_conjugate
from pyro_em.updates.regressions.coefficient_priors import is_quadratic, is_smooth
from pyro_em.updates.regressions.predictors import predictor_binding
from pyro_em.updates.update import (
    ClosedForm,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnProfile,
    NewtonOnSums,
    ParameterUpdate,
    Prior,
    Use,
)

_PLAIN = ClosedForm()

_NO_PRIOR = "its prior is not Normal with known numbers"


def strongest_updates(
    graph: FactorGraph, names: Collection[str], *, together: bool = True
) -> dict[str, ParameterUpdate]:
    """The strongest update of each parameter, with the reason; nothing is evaluated.

    Args:
        graph: The factor graph.
        names: The parameters.
        together: Whether arguments in which several parameters meet may be solved for with all others
            of their density.
    """
    found = {name: _without_a_look(graph, name) for name in names}
    looked = Appearances.of(graph, [n for n, u in found.items() if u is None], together)
    return {name: update or _strongest(looked[name]) for name, update in found.items()}


def _without_a_look(graph: FactorGraph, name: str) -> ParameterUpdate | None:
    """The update of a parameter that does not depend on what else reads it; None where it does."""
    if not graph.parameters[name].unconstrained.is_floating_point():
        return ParameterUpdate(name, Fixed(), "it holds integers")
    pair = pair_at(graph, name) if any(name in group.edges for group in graph.groups) else None
    if pair is None:
        return None
    made = " and ".join(pair.params)
    reason = f"Uniform.low and Uniform.high are made of {made} (smallest and largest value)"
    return ParameterUpdate(name, _PLAIN, reason, block=pair.params, is_met_end=True)


def _strongest(found: Appearances) -> ParameterUpdate:
    """The strongest update of a parameter by where it stands."""
    name = found.name
    if not found.is_used:
        return ParameterUpdate(name, Fixed(), "no factor depends on it")
    if found.weakest:
        return ParameterUpdate(name, Gradient(), found.weakest)
    if found.joint or found.meeting or (found.beside and not found.has_others):
        return _jointly(found)
    if found.degrees:
        return _of_degrees(found)
    uses = (*found.uses, *(use for _, use in found.beside))
    if found.is_curved:
        return _of_predictors(found, uses)
    if found.is_affine:
        return _of_lines(found, uses)
    return _in_closed_form(found, uses)


def _jointly(found: Appearances) -> ParameterUpdate:
    """The update of a parameter in densities whose sums give the joint maximiser of all arguments."""
    name, constraint = found.name, found.graph.parameters[found.name].constraint
    selected = [*found.joint, *(place for place, _ in found.beside)]
    if found.has_others:
        return ParameterUpdate(name, Gradient(), "it has a prior, or is something else besides")
    if bounds(constraint) is None and (selected or not is_simplex(constraint)):
        return ParameterUpdate(name, Gradient(), f"its constraint {constraint} is no interval")
    shown = list(dict.fromkeys(found.meeting or selected))
    how = "selects it"
    if found.meeting:
        how = "is a function of it" if len(shown) == 1 else "are functions of it"
    reason = f"{', '.join(shown)} {how}; sums over the data suffice"
    return ParameterUpdate(name, NewtonOnSums(), reason)


def _of_degrees(found: Appearances) -> ParameterUpdate:
    """The update of degrees of freedom."""
    name, constraint = found.name, found.graph.parameters[found.name].constraint
    if found.has_others:
        return ParameterUpdate(name, Gradient(), "it is something else besides, or has a prior")
    if bounds(constraint) is None:
        return ParameterUpdate(name, Gradient(), f"its constraint {constraint} is no interval")
    reason = f"{', '.join(dict.fromkeys(found.degrees))} selects it; sums over the data suffice"
    return ParameterUpdate(name, NewtonOnProfile(), reason)


def _of_predictors(found: Appearances, uses: Sequence[Use]) -> ParameterUpdate:
    """The update of a coefficient of predictors, beside which it may be selected as it stands."""
    graph, name, priors = found.graph, found.name, tuple(found.priors)
    real = is_real(graph.parameters[name].constraint)
    if found.is_affine or not all(_has_predictor(graph, u) for u in uses):
        reason = "it is a coefficient of a predictor and something else besides"
        return ParameterUpdate(name, Gradient(), reason, priors=priors, is_mixed=True)
    fits = is_quadratic if real else is_smooth
    if not all(fits(graph, p) for p in priors):
        return ParameterUpdate(name, Gradient(), _NO_PRIOR)
    named = tuple(dict.fromkeys(found.predicted))
    what, has = " and ".join(named), "has" if len(named) == 1 else "have"
    if not real:
        what += f" {has} a predictor with its logarithm"
    elif all(p.endswith("logits") for p in named):
        what += f" {'is' if len(named) == 1 else 'are'} linear in it{_while(graph, name)}"
    else:
        what += f" {has} a predictor that is linear in it"
    return ParameterUpdate(name, Newton(), what + _with(graph, priors), priors=priors)


def _of_lines(found: Appearances, uses: Sequence[Use]) -> ParameterUpdate:
    """The update of a coefficient of means, beside which it may be a mean as it stands."""
    graph, name, priors = found.graph, found.name, tuple(found.priors)
    if not all(u.rule.kind.form.is_regressed and not u.selection.maps for u in uses):
        reason = "it is a coefficient and something else besides"
        return ParameterUpdate(name, Gradient(), reason, priors=priors, is_mixed=True)
    if not all(is_quadratic(graph, p) for p in priors):
        return ParameterUpdate(name, Gradient(), _NO_PRIOR)
    reason = f"loc is affine in it{_while(graph, name)}" + _with(graph, priors)
    return ParameterUpdate(name, LeastSquares(), reason, priors=priors)


def _in_closed_form(found: Appearances, uses: Sequence[Use]) -> ParameterUpdate:
    """The update of a parameter that is selected wherever it stands, if one rule fits all places."""
    graph, name, priors = found.graph, found.name, tuple(found.priors)
    if not uses:
        of = next((graph.groups[p.group].members[0] for p in priors if p.argument), "")
        reason = f"it is a hyperparameter of '{of}'" if of else "only priors depend on it"
        return ParameterUpdate(name, Gradient(), reason)
    problem = why_not_conjugate(graph, uses[0], priors) if priors else ""
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    problem = _disagreement(uses) if len(uses) > 1 else ""
    if problem:
        return ParameterUpdate(name, Gradient(), problem, priors=priors, is_mixed=True)
    problem = _why_outside(uses[0], graph.parameters[name].constraint)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    kinds = {graph.groups[p.group].distribution for p in priors}
    with_prior = ", with a prior: " + ", ".join(sorted(kinds)) if kinds else ""
    reason = f"{_shown_places(graph, uses)} ({uses[0].rule.kind.value}){with_prior}"
    return ParameterUpdate(name, _PLAIN, reason, tuple(uses), priors=priors)


def _with(graph: FactorGraph, priors: Sequence[Prior]) -> str:
    """What the plan says of priors of coefficients."""
    names = dict.fromkeys(graph.groups[p.group].distribution for p in priors)
    named = ["multivariate Normal" if n == "MultivariateNormal" else n for n in names]
    return f", with a {' and a '.join(named)} prior" if named else ""


def _has_predictor(graph: FactorGraph, use: Use) -> bool:
    group = graph.groups[use.group]
    return predictor_binding(group, use.argument, graph.parameters) is not None


def _while(graph: FactorGraph, name: str) -> str:
    """Which parameters multiply a coefficient, and so keep their values while it is solved for."""
    bindings = [b for g in graph.groups for b in g.bindings.values() if b.pairs]
    products = [pair for b in bindings for pair in b.pairs or () if name in pair]
    others = dict.fromkeys(f"'{n}'" for pair in products for n in pair if n != name)
    if not others:
        return ""
    return f" while {' and '.join(others)} {'has its value' if len(others) == 1 else 'have theirs'}"


def _disagreement(uses: Sequence[Use]) -> str:
    """Why no closed form serves all uses of a parameter at once, or nothing."""
    first = uses[0]
    for u in uses[1:]:
        if u.rule.kind is not first.rule.kind:
            return f"it is a {first.rule.kind.value} here and a {u.rule.kind.value} there"
        if u.rule.link.name != first.rule.link.name:
            return f"it is a {first.argument} here and a {u.argument} there"
        if [m.name for m in u.selection.maps] != [m.name for m in first.selection.maps]:
            return "different maps of it are used"
    return ""


def _why_outside(use: Use, constraint: constraints.Constraint) -> str:
    """Why a solution may leave the parameter's constraint, or nothing."""
    if is_real(constraint):
        return ""
    if use.rule.kind.event_dim == 0:
        return "" if bounds(constraint) else f"its constraint {constraint} is no interval"
    if use.rule.kind.form.stays_in(constraint, _link(use)):
        return ""
    return f"its constraint {constraint} may exclude the solution"


def _link(use: Use) -> str:
    """The link from the natural value of rows or matrices to the parameter, by name."""
    if use.selection.of_matrices:
        return CHOLESKY.name
    return IDENTITY.name if use.selection.maps else use.rule.link.name


def _shown_places(graph: FactorGraph, uses: Sequence[Use]) -> str:
    """How a parameter is used, in a plan's words."""
    selected: dict[str, None] = {}
    out: dict[str, None] = {}
    for use in uses:
        group = graph.groups[use.group]
        where = f"{group.distribution}.{use.argument}"
        if use.is_multiple:
            out[f"{where} is a known matrix times it"] = None
        elif use.selection.of_matrices:
            out[f"{where} is its product with its transpose"] = None
        elif group.matrix and use.argument != "loc":
            out[f"{group.distribution}.{group.matrix} has it on its diagonal"] = None
        else:
            selected[where] = None
    first = [", ".join(selected) + " selects it"] if selected else []
    return "; ".join([*first, *out])
