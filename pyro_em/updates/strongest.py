"""The strongest update that is exact for one parameter, from every place where it stands."""

from __future__ import annotations

from collections.abc import Sequence

from torch.distributions import constraints

from pyro_em.distributions import bounds, is_real, is_simplex
from pyro_em.graph.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.coefficient_priors import is_quadratic, is_smooth
from pyro_em.updates.dispersed import dispersed_at
from pyro_em.updates.met_ends import pair_at
from pyro_em.updates.predictors import predictor_binding
from pyro_em.updates.read_priors import as_prior, as_spread_of_prior, why_not_conjugate
from pyro_em.updates.read_uses import as_use, disagreement, is_end, shown_places, why_outside
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

_NO_PRIOR = "its prior is not Normal with known numbers"


def strongest_update(graph: FactorGraph, name: str, *, together: bool = True) -> ParameterUpdate:
    """The strongest update of a parameter, with the reason; nothing is evaluated.

    Args:
        graph: The factor graph.
        name: The parameter.
        together: Whether arguments in which several parameters meet may be solved for with all others
            of their density.
    """
    uses: list[Use] = []
    priors: list[Prior] = []
    predicted: list[str] = []
    affine = curved = False
    joint: list[str] = []
    degrees: list[str] = []
    meeting: list[str] = []
    weakest = ""
    beside: list[tuple[str, Use]] = []
    is_used = False
    constraint = graph.parameters[name].constraint
    if not graph.parameters[name].unconstrained.is_floating_point():
        return ParameterUpdate(name, Fixed(), "it holds integers")
    pair = pair_at(graph, name) if any(name in group.edges for group in graph.groups) else None
    if pair is not None:
        made = " and ".join(pair.params)
        names = f"Uniform.low and Uniform.high are made of {made} (smallest and largest value)"
        return ParameterUpdate(name, ClosedForm(), names, block=pair.params, is_met_end=True)
    for g, group in enumerate(graph.groups):
        if name in group.edges and not is_end(graph, g, name):
            weakest = weakest or (
                f"the support of {group.distribution} at '{group.members[0]}' ends at it: the maximum "
                "is a jump, which no gradient sees"
            )
        if group.family is None:
            if group.raw_params is None or name in group.raw_params:
                weakest = weakest or f"{group.distribution} at '{group.members[0]}' has no record"
                is_used = True
            continue
        if group.raw_params is None or name in group.raw_params:
            prior = as_prior(graph, g, name)
            if prior is None:
                weakest = weakest or f"the value of '{group.members[0]}' depends on it"
            else:
                priors.append(prior)
            is_used = True
        dispersed = dispersed_at(g, group, graph.parameters)
        if dispersed is not None and name in dispersed.params:
            curved = is_used = True
            predicted += dispersed.places(name)
            continue
        for argument, binding in group.bindings.items():
            if binding.how == "opaque" and not binding.params:
                continue
            if name not in binding.params:
                continue
            is_used = True
            where = f"{group.distribution}.{argument} at '{group.members[0]}'"
            if group.role is Role.POINT:
                prior = as_spread_of_prior(graph, g, argument, name)
                if prior is None:
                    weakest = weakest or f"it is a hyperparameter of '{group.members[0]}'"
                else:
                    priors.append(prior)
            elif binding.how == "opaque":
                weakest = weakest or f"{binding.reason} in {where}"
            elif together and is_joint(group):
                form = group.family.joint_form
                if form is not None and form.is_augmented and not _reads_a_latent(graph, group):
                    weakest = weakest or f"no closed form is known for it in {where}"
                use = None
                if binding.how == "selection" and argument in group.family.rules:
                    use = as_use(graph, g, argument, binding, name)[0]
                if use is None:
                    own = meeting if binding.how == "composite" else joint
                    own.append(f"{group.distribution}.{argument}")
                else:
                    beside.append((f"{group.distribution}.{argument}", use))
            elif binding.how == "composite":
                weakest = weakest or f"a function of it is {where}, whose sums do not tell it"
            elif binding.how == "sum":
                weakest = weakest or f"{where} is a sum of it and others"
            elif _is_predicted(graph, g, argument, name):
                curved = True
                predicted.append(f"{group.distribution}.{argument}")
                if not is_real(constraint):
                    weakest = weakest or f"its constraint {constraint} bounds {where}"
            elif group.family.natural is not None and argument not in group.family.rules:
                joint.append(f"{group.distribution}.{argument}")
                if group.family.natural.is_augmented and not _reads_a_latent(graph, group):
                    weakest = weakest or f"no closed form is known for it in {where}"
                if binding.how != "selection":
                    weakest = weakest or f"{where} is {binding.how} in it"
            elif argument == group.family.degrees:
                degrees.append(f"{group.distribution}.{argument}")
                weakest = weakest or _why_not_plain(binding, name, where)
            elif _is_regressed(graph, g, argument, binding, name):
                affine = True
                if not is_real(constraint):
                    weakest = weakest or f"its constraint {constraint} bounds {where}"
            else:
                use, problem = as_use(graph, g, argument, binding, name)
                if use is None:
                    weakest = weakest or f"{problem} in {where}"
                else:
                    uses.append(use)
    if not is_used:
        return ParameterUpdate(name, Fixed(), "no factor depends on it")
    if weakest:
        return ParameterUpdate(name, Gradient(), weakest)
    others = bool(uses or affine or curved or priors)
    if joint or meeting or (beside and not others):
        selected = [*joint, *(place for place, _ in beside)]
        return _jointly(name, selected, meeting, constraint, has_others=others)
    if degrees:
        if others:
            return ParameterUpdate(name, Gradient(), "it is something else besides, or has a prior")
        if bounds(constraint) is None:
            return ParameterUpdate(name, Gradient(), f"its constraint {constraint} is no interval")
        reason = f"{', '.join(dict.fromkeys(degrees))} selects it; sums over the data suffice"
        return ParameterUpdate(name, NewtonOnProfile(), reason)
    uses += [use for _, use in beside]
    if curved:
        if affine or not all(_has_predictor(graph, u) for u in uses):
            reason = "it is a coefficient of a predictor and something else besides"
            return ParameterUpdate(name, Gradient(), reason, priors=tuple(priors), is_mixed=True)
        fits = is_quadratic if is_real(constraint) else is_smooth
        if not all(fits(graph, p) for p in priors):
            return ParameterUpdate(name, Gradient(), _NO_PRIOR)
        named = tuple(dict.fromkeys(predicted))
        what, has = " and ".join(named), "has" if len(named) == 1 else "have"
        if not is_real(constraint):
            what += f" {has} a predictor with its logarithm"
        elif all(p.endswith("logits") for p in named):
            what += f" {'is' if len(named) == 1 else 'are'} linear in it{_while(graph, name)}"
        else:
            what += f" {has} a predictor that is linear in it"
        reason = what + _with(graph, priors)
        return ParameterUpdate(name, Newton(), reason, priors=tuple(priors))
    if affine:
        plain = all(u.rule.kind.form.is_regressed and not u.selection.maps for u in uses)
        if plain and all(is_quadratic(graph, p) for p in priors):
            reason = f"loc is affine in it{_while(graph, name)}" + _with(graph, priors)
            return ParameterUpdate(name, LeastSquares(), reason, priors=tuple(priors))
        if plain:
            return ParameterUpdate(name, Gradient(), _NO_PRIOR)
        reason = "it is a coefficient and something else besides"
        return ParameterUpdate(name, Gradient(), reason, priors=tuple(priors), is_mixed=True)
    if not uses:
        of = next((graph.groups[p.group].members[0] for p in priors if p.argument), "")
        reason = f"it is a hyperparameter of '{of}'" if of else "only priors depend on it"
        return ParameterUpdate(name, Gradient(), reason)
    problem = why_not_conjugate(graph, uses[0], priors)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    problem = disagreement(uses)
    if problem:
        return ParameterUpdate(name, Gradient(), problem, priors=tuple(priors), is_mixed=True)
    problem = why_outside(uses[0], constraint)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    places = shown_places(graph, uses)
    kinds = {graph.groups[p.group].distribution for p in priors}
    with_prior = ", with a prior: " + ", ".join(sorted(kinds)) if kinds else ""
    return ParameterUpdate(
        name,
        ClosedForm(),
        f"{places} ({uses[0].rule.kind.value}){with_prior}",
        tuple(uses),
        priors=tuple(priors),
    )


def _with(graph: FactorGraph, priors: Sequence[Prior]) -> str:
    """What the plan says of priors of coefficients."""
    names = dict.fromkeys(graph.groups[p.group].distribution for p in priors)
    named = ["multivariate Normal" if n == "MultivariateNormal" else n for n in names]
    return f", with a {' and a '.join(named)} prior" if named else ""


def _jointly(
    name: str,
    selected: Sequence[str],
    meeting: Sequence[str],
    constraint: constraints.Constraint,
    *,
    has_others: bool,
) -> ParameterUpdate:
    """The update of a parameter in densities whose sums give the joint maximiser of all arguments."""
    if has_others:
        return ParameterUpdate(name, Gradient(), "it has a prior, or is something else besides")
    if bounds(constraint) is None and (selected or not is_simplex(constraint)):
        return ParameterUpdate(name, Gradient(), f"its constraint {constraint} is no interval")
    shown = list(dict.fromkeys(meeting or selected))
    how = "selects it"
    if meeting:
        how = "is a function of it" if len(shown) == 1 else "are functions of it"
    reason = f"{', '.join(shown)} {how}; sums over the data suffice"
    return ParameterUpdate(name, NewtonOnSums(), reason)


def is_joint(group: Group) -> bool:
    """Whether parameters meet in an argument of a density whose sums tell all arguments together."""
    if group.family is None or group.family.joint_form is None or group.lines:
        return False
    hows = {b.how for b in group.bindings.values()}
    return "composite" in hows and hows <= {"constant", "selection", "composite"}


def _why_not_plain(binding: Binding, name: str, where: str) -> str:
    """Why an argument is no selection of a parameter as it stands, or nothing."""
    if binding.how != "selection":
        return f"{where} is {binding.how} in it"
    selection = next(s for s in binding.selections if s.param == name)
    return f"{where} is a function of it" if selection.maps or selection.factor is not None else ""


def _reads_a_latent(graph: FactorGraph, group: Group) -> bool:
    """Whether a group is one of the components of a mixture: else one climb finds its maximum."""
    return any(d in graph.latents for dims in group.dims for d in dims)


def _is_predicted(graph: FactorGraph, g: int, argument: str, name: str) -> bool:
    """Whether a parameter is a coefficient of a linear predictor that Newton's method solves for.

    A selection has a closed form, unless a factor multiplies what stands in the predictor.
    """
    group = graph.groups[g]
    if predictor_binding(group, argument, graph.parameters) is None:
        return False
    binding = group.bindings[argument]
    assert group.family is not None
    if group.family.natural is not None:
        return binding.how == "affine"
    is_line = binding.how in ("affine", "bilinear")
    return is_line or as_use(graph, g, argument, binding, name)[0] is None


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


def _is_regressed(graph: FactorGraph, g: int, argument: str, binding: Binding, name: str) -> bool:
    """Whether a parameter is a coefficient in an argument, for least squares.

    A selection is linear where no map changes its parameters. It is solved for as a coefficient where
    it is one part of a mean among others, or no closed form fits its elements.
    """
    group = graph.groups[g]
    if binding.how in ("affine", "bilinear"):
        return True
    if any(s.maps for s in binding.selections):
        return False
    rule = None if group.family is None else group.family.rules.get(argument)
    is_vector = rule is not None and rule.kind.event_dim == 1 and rule.kind.form.is_regressed
    return argument in group.lines or (
        is_vector and as_use(graph, g, argument, binding, name)[0] is None
    )
