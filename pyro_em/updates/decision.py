"""Which update each parameter gets: the strongest that is exact, read off the bindings of the graph."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em.distributions import bounds, is_real
from pyro_em.families.conjugacy import conjugate
from pyro_em.families.family import CHOLESKY, IDENTITY, LOG_SIMPLEX, PRECISION, Rule
from pyro_em.families.form import Form
from pyro_em.families.overdispersed import MANY
from pyro_em.graph.binding import PRODUCT, Binding, Selection
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role
from pyro_em.updates.blocks import size_of
from pyro_em.updates.coordinates import Coordinates
from pyro_em.updates.predictors import predictor_binding, predictors_of
from pyro_em.updates.update import (
    EXACT,
    ClosedForm,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnSums,
    NoUpdate,
    ParameterUpdate,
    Prior,
    Update,
    Use,
)

_FEW = 2**8  # elements whose second derivatives are few in any case


_LARGEST = 2**24  # second derivatives of one block of Newton's method on sums


def forgets(updates: Mapping[str, ParameterUpdate]) -> bool:
    """Whether an M-step goes to a maximum wherever the parameters were, and so forgets other data.

    A single step of an optimiser moves them a little.
    """
    moving = [u.update for u in updates.values() if not isinstance(u.update, (Fixed, NoUpdate))]
    return any(not isinstance(u, Gradient) or u.optimizer is None for u in moving)


def decide_updates(
    graph: FactorGraph, requested: Mapping[str, Update], default: Gradient | None = None
) -> dict[str, ParameterUpdate]:
    """Choose the strongest update that is exact for each parameter; nothing is evaluated.

    Args:
        graph: A traced graph with bindings.
        requested: The user's wishes by exact parameter name.
        default: The gradient update where there is no closed form; L-BFGS if None.
    """
    strongest = {name: _strongest(graph, name) for name in graph.parameters}
    decided = {}
    for name, strongest_update in strongest.items():
        wish = requested.get(name)
        if wish is None and default is not None and isinstance(strongest_update.update, Gradient):
            decided[name] = ParameterUpdate(name, default, strongest_update.reason)
        else:
            decided[name] = strongest_update if wish is None else _granted(strongest_update, wish)
    least_squares = {n for n, u in decided.items() if isinstance(u.update, LeastSquares)}
    # A mean that shares an argument with a regression coefficient is solved for with it.
    changed = True
    while changed:
        changed = False
        for group in graph.groups:
            if not least_squares.intersection(group.mean_params):
                continue
            for p in group.mean_params:
                is_mean = _is_plain_mean(decided[p]) and is_real(graph.parameters[p].constraint)
                if p not in least_squares and is_mean:
                    least_squares.add(p)
                    changed = True
    for block in _blocks(graph, least_squares):
        for p in block:
            reason = (
                decided[p].reason
                if isinstance(decided[p].update, LeastSquares)
                else ("a mean in one argument with regression coefficients")
            )
            decided[p] = ParameterUpdate(p, LeastSquares(), reason, (), block, decided[p].priors)
    curved = {n for n, u in decided.items() if isinstance(u.update, Newton)}
    read = [set(predictor.binding.params) for predictor in predictors_of(graph, [*curved])]
    for together in _joined(read, curved):
        for p in together:
            decided[p] = replace(decided[p], block=_in_order(graph, together))
    return _with_newton(graph, decided, default)


def _with_newton(
    graph: FactorGraph, decided: Mapping[str, ParameterUpdate], default: Gradient | None
) -> dict[str, ParameterUpdate]:
    """Blocks of Newton steps: all parameters of a density, or none where one has another update."""
    out = dict(decided)
    changed = True
    while changed:
        changed = False
        for group in graph.groups:
            own = [n for n in group.params if isinstance(out[n].update, NewtonOnSums)]
            why = _no_joint_steps(group, out) if own else ""
            if not why:
                continue
            for name in own:
                out[name] = ParameterUpdate(name, default or Gradient(), why)
            changed = True
    free = {n for n, u in out.items() if isinstance(u.update, NewtonOnSums)}
    for together in _joined([set(group.params) for group in graph.groups], free):
        block = _in_order(graph, together)
        coordinates = Coordinates.of([graph.parameters[name] for name in block])
        if coordinates.size > _FEW and size_of(coordinates, graph) > _LARGEST:
            why = f"{coordinates.size:,} numbers share cells: too many for second derivatives"
            out |= {name: ParameterUpdate(name, default or Gradient(), why) for name in block}
            continue
        out |= {name: replace(out[name], block=block) for name in block}
    return out


def _no_joint_steps(group: Group, decided: Mapping[str, ParameterUpdate]) -> str:
    """Why the parameters of a density in linear form are not solved for together, or nothing."""
    where = f"{group.distribution} at '{group.members[0]}'"
    assert group.family is not None and group.family.natural is not None
    if group.family.natural.of_counts and bool((group.value > MANY).any()):
        return f"counts above {MANY:,} are no table in {where}"
    for name in group.params:
        if not isinstance(decided[name].update, NewtonOnSums | Fixed):
            return f"'{name}' has another update in {where}"
    for argument, binding in group.bindings.items():
        if not binding.is_static:
            return f"{argument} is opaque in {where}"
        known = [s.factor for s in binding.selections if s.factor is not None]
        if not any(s.is_whole for s in binding.selections):
            known.append(binding.constant)
        if any(_differs_by_row(t, group) for t in known):
            return f"{argument} differs from row to row in {where}"
    return ""


def _reads_a_latent(graph: FactorGraph, group: Group) -> bool:
    """Whether a group is one of the components of a mixture: else one climb finds its maximum."""
    return any(d in graph.latents for dims in group.dims for d in dims)


def _differs_by_row(known: Tensor, group: Group) -> bool:
    """Whether known numbers of an argument differ along a plate."""
    return any(
        known.shape[d] > 1 and not bool((known == known.narrow(d, 0, 1)).all())
        for d in range(1, 1 + group.n_plates)
    )


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
    return binding.how == "affine" or _as_use(graph, g, argument, binding, name)[0] is None


def _has_predictor(graph: FactorGraph, use: Use) -> bool:
    group = graph.groups[use.group]
    return predictor_binding(group, use.argument, graph.parameters) is not None


def _is_regressed(graph: FactorGraph, g: int, argument: str, binding: Binding, name: str) -> bool:
    """Whether a parameter is a coefficient in an argument, for least squares.

    A selection is linear where no map changes its parameters. It is solved for as a coefficient where
    it is one part of a mean among others, or no closed form fits its elements.
    """
    group = graph.groups[g]
    if binding.how == "affine":
        return True
    if any(s.maps for s in binding.selections):
        return False
    rule = None if group.family is None else group.family.rules.get(argument)
    is_vector = rule is not None and rule.kind.event_dim == 1 and rule.kind.form.is_regressed
    return argument in group.lines or (
        is_vector and _as_use(graph, g, argument, binding, name)[0] is None
    )


def _is_plain_mean(update: ParameterUpdate) -> bool:
    """Whether least squares solves for it as for an intercept: a mean as it stands."""
    if update.kind is None or not update.kind.form.is_regressed:
        return False
    if not all(p.is_constant for p in update.priors):
        return False
    return all(u.selection.factor is None and not u.selection.maps for u in update.uses)


def _granted(strongest: ParameterUpdate, wish: Update) -> ParameterUpdate:
    if isinstance(wish, ClosedForm) and isinstance(strongest.update, ClosedForm):
        return replace(strongest, update=wish)
    if isinstance(wish, (LeastSquares, Newton)) and isinstance(strongest.update, type(wish)):
        return strongest
    if isinstance(wish, Newton) and isinstance(strongest.update, NewtonOnSums):
        return strongest
    if isinstance(wish, EXACT):
        return replace(
            strongest, reason=f"{type(wish).__name__} was asked for, but {strongest.reason}"
        )
    return ParameterUpdate(strongest.name, wish, "as the user asked")


def _strongest(graph: FactorGraph, name: str) -> ParameterUpdate:
    uses: list[Use] = []
    priors: list[Prior] = []
    predicted: list[str] = []
    affine = curved = False
    joint: list[str] = []
    weakest = ""
    is_used = False
    constraint = graph.parameters[name].constraint
    if not graph.parameters[name].unconstrained.is_floating_point():
        return ParameterUpdate(name, Fixed(), "it holds integers")
    for g, group in enumerate(graph.groups):
        if name in group.edges and not _is_end(graph, g, name):
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
            prior = _as_prior(graph, g, name)
            if prior is None:
                weakest = weakest or f"the value of '{group.members[0]}' depends on it"
            else:
                priors.append(prior)
            is_used = True
        for argument, binding in group.bindings.items():
            if binding.how == "opaque" and not binding.params:
                continue
            if name not in binding.params:
                continue
            is_used = True
            where = f"{group.distribution}.{argument} at '{group.members[0]}'"
            if group.role is Role.POINT:
                prior = _as_spread_of_prior(graph, g, argument, name)
                if prior is None:
                    weakest = weakest or f"it is a hyperparameter of '{group.members[0]}'"
                else:
                    priors.append(prior)
            elif binding.how == "opaque":
                weakest = weakest or f"{binding.reason} in {where}"
            elif binding.how == "sum":
                weakest = weakest or f"{where} is a sum of it and others"
            elif _is_predicted(graph, g, argument, name):
                curved = True
                predicted.append(f"{group.distribution}.{argument}")
                if not is_real(constraint):
                    weakest = weakest or f"its constraint {constraint} bounds {where}"
            elif group.family.natural is not None:
                joint.append(f"{group.distribution}.{argument}")
                if group.family.natural.is_augmented and not _reads_a_latent(graph, group):
                    weakest = weakest or f"no closed form is known for it in {where}"
                if binding.how != "selection":
                    weakest = weakest or f"{where} is {binding.how} in it"
            elif _is_regressed(graph, g, argument, binding, name):
                affine = True
                if not is_real(constraint):
                    weakest = weakest or f"its constraint {constraint} bounds {where}"
            else:
                use, problem = _as_use(graph, g, argument, binding, name)
                if use is None:
                    weakest = weakest or f"{problem} in {where}"
                else:
                    uses.append(use)
    if not is_used:
        return ParameterUpdate(name, Fixed(), "no factor depends on it")
    if weakest:
        return ParameterUpdate(name, Gradient(), weakest)
    if joint:
        return _jointly(
            name, joint, constraint, has_others=bool(uses or affine or curved or priors)
        )
    if curved:
        if affine or not all(_has_predictor(graph, u) for u in uses):
            reason = "it is a coefficient of a predictor and something else besides"
            return ParameterUpdate(name, Gradient(), reason)
        if not all(_is_normal(graph, p) for p in priors):
            return ParameterUpdate(name, Gradient(), "its prior is not Normal with known numbers")
        what = " and ".join(dict.fromkeys(predicted)) + " is linear in it"
        if not all(p.endswith("logits") for p in predicted):
            what = " and ".join(dict.fromkeys(predicted)) + " has a predictor that is linear in it"
        reason = what + (", with a Normal prior" if priors else "")
        return ParameterUpdate(name, Newton(), reason, priors=tuple(priors))
    if affine:
        plain = all(u.rule.kind.form.is_regressed and not u.selection.maps for u in uses)
        if plain and all(_is_normal(graph, p) for p in priors):
            reason = "loc is affine in it" + (", with a Normal prior" if priors else "")
            return ParameterUpdate(name, LeastSquares(), reason, priors=tuple(priors))
        if plain:
            return ParameterUpdate(name, Gradient(), "its prior is not Normal with known numbers")
        return ParameterUpdate(name, Gradient(), "it is a coefficient and something else besides")
    if not uses:
        of = next((graph.groups[p.group].members[0] for p in priors if p.argument), "")
        reason = f"it is a hyperparameter of '{of}'" if of else "only priors depend on it"
        return ParameterUpdate(name, Gradient(), reason)
    problem = _not_conjugate(graph, uses[0], priors)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    problem = _disagreement(uses)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    problem = _outside(uses[0], constraint)
    if problem:
        return ParameterUpdate(name, Gradient(), problem)
    places = _places(graph, uses)
    kinds = {graph.groups[p.group].distribution for p in priors}
    with_prior = ", with a prior: " + ", ".join(sorted(kinds)) if kinds else ""
    return ParameterUpdate(
        name,
        ClosedForm(),
        f"{places} ({uses[0].rule.kind.value}){with_prior}",
        tuple(uses),
        priors=tuple(priors),
    )


def _is_end(graph: FactorGraph, g: int, name: str) -> bool:
    """Whether a parameter at which a support ends has a closed form: the outermost data."""
    group = graph.groups[g]
    read = [(a, b) for a, b in group.bindings.items() if name in b.params]
    for argument, binding in read:
        if binding.how != "selection":
            return False
        use, _ = _as_use(graph, g, argument, binding, name)
        if use is None or use.rule.kind.form.end == 0:
            return False
    return bool(read)


def _places(graph: FactorGraph, uses: Sequence[Use]) -> str:
    """How a parameter is used, in a plan's words."""
    selected: dict[str, None] = {}
    out: dict[str, None] = {}
    for use in uses:
        group = graph.groups[use.group]
        where = f"{group.distribution}.{use.argument}"
        if use.selection.of_matrices:
            out[f"{where} is its product with its transpose"] = None
        elif group.matrix and use.argument != "loc":
            out[f"{group.distribution}.{group.matrix} has it on its diagonal"] = None
        else:
            selected[where] = None
    first = [", ".join(selected) + " selects it"] if selected else []
    return "; ".join([*first, *out])


def _jointly(
    name: str, places: Sequence[str], constraint: constraints.Constraint, *, has_others: bool
) -> ParameterUpdate:
    """The update of a parameter in densities whose sums give the joint maximiser of all arguments."""
    if has_others:
        return ParameterUpdate(name, Gradient(), "it has a prior, or is something else besides")
    if bounds(constraint) is None:
        return ParameterUpdate(name, Gradient(), f"its constraint {constraint} is no interval")
    shown = ", ".join(dict.fromkeys(places))
    return ParameterUpdate(name, NewtonOnSums(), f"{shown} selects it; sums over the data suffice")


def _as_prior(graph: FactorGraph, g: int, name: str) -> Prior | None:
    """The prior of a point-estimated site whose value is one whole parameter."""
    group = graph.groups[g]
    binding = group.value_binding
    if group.role is not Role.POINT or binding is None or binding.how != "selection":
        return None
    selection = next((s for s in binding.selections if s.param == name), None)
    plain = selection is not None and not selection.maps and selection.factor is None
    alone = len(binding.selections) == 1 and not any(
        d in graph.latents for dims in group.dims for d in dims
    )
    if selection is None or not plain or not alone:
        return None
    depends = {argument for argument, b in group.bindings.items() if b.params}
    if not depends:
        return Prior(g, selection)
    spreads = all(_as_spread_of_prior(graph, g, a, n) for a in depends for n in _params(group, a))
    return Prior(g, selection, is_constant=False) if spreads else None


def _params(group: Group, argument: str) -> tuple[str, ...]:
    return group.bindings[argument].params


_LOCATED = ("Normal", "MultivariateNormal")


def _as_spread_of_prior(graph: FactorGraph, g: int, argument: str, name: str) -> Prior | None:
    """What the prior of a point estimate says of a parameter that is its spread; None for no such.

    The other arguments are known numbers, and the point estimate is another parameter as it stands.
    """
    group = graph.groups[g]
    binding, value = group.bindings[argument], group.value_binding
    rule = None if group.family is None else group.family.rules.get(argument)
    if rule is None or not rule.kind.is_spread or group.distribution not in _LOCATED:
        return None
    if binding.how != "selection" or value is None:
        return None
    if value.how != "selection" or len(value.selections) != 1 or len(binding.selections) != 1:
        return None
    (own,), (selection,) = value.selections, binding.selections
    others = [b for a, b in group.bindings.items() if a != argument]
    if own.maps or own.factor is not None or own.param == name or any(b.params for b in others):
        return None
    is_plain = group.elements is None and binding.normalise == ""
    if not is_plain or any(d in graph.latents for dims in group.dims for d in dims):
        return None
    if selection.factor is not None:
        factor = _natural_factor(selection.factor, rule)
        if factor is None:
            return None
        selection = replace(selection, factor=factor)
    if rule.kind.event_dim:
        leaf = graph.parameters[name].leaf
        if _map_of_events(selection, rule) or _whole_events(selection, leaf, rule.kind.form):
            return None
    return Prior(g, selection, argument, is_constant=False)


def _natural_factor(factor: Tensor, rule: Rule) -> Tensor | None:
    """By what a spread is multiplied where its argument is multiplied by a known factor.

    None where a matrix is not multiplied as a whole.
    """
    if rule.kind.event_dim:
        first = factor[..., :1, :1].expand(factor.shape)
        if not torch.allclose(factor, first, rtol=1e-9, atol=0.0):
            return None
        factor = first
    powers = {IDENTITY.name: 1, CHOLESKY.name: 2, PRECISION.name: -1}
    power = powers.get(rule.link.name)
    return None if power is None else factor**power


def _is_normal(graph: FactorGraph, prior: Prior) -> bool:
    family = graph.groups[prior.group].family
    return family is not None and family.name == "Normal" and prior.is_constant


def _not_conjugate(graph: FactorGraph, use: Use, priors: Sequence[Prior]) -> str:
    """Why a prior does not keep the form of a closed update, or nothing."""
    maps = tuple(m.name for m in use.selection.maps)
    for prior in priors:
        group = graph.groups[prior.group]
        assert group.family is not None
        if prior.argument:
            rule = group.family.rules[prior.argument]
            own = tuple(m.name for m in prior.selection.maps)
            if (rule.kind, rule.link.name, own) != (use.rule.kind, use.rule.link.name, maps):
                return f"it is the spread of '{group.members[0]}' in another form"
            continue
        known = conjugate(group.family.distribution, use.rule.kind, maps, use.rule.link.name)
        if known is None:
            return f"its {group.distribution} prior is not conjugate to a {use.rule.kind.value}"
        event = use.rule.kind.event_dim
        parameter = graph.parameters[prior.selection.param].leaf
        if event and _whole_events(prior.selection, parameter, use.rule.kind.form):
            return f"its {group.distribution} prior is on other rows"
    return ""


def _as_use(
    graph: FactorGraph, g: int, argument: str, binding: Binding, name: str
) -> tuple[Use | None, str]:
    group = graph.groups[g]
    assert group.family is not None
    rule = group.family.rules.get(argument)
    if rule is None:
        return None, "no closed form is known for this argument"
    selection = next(s for s in binding.selections if s.param == name)
    if selection.factor is not None:
        scalable = rule.kind.form.scales and rule.link.name == "identity"
        if not scalable:
            return None, "a factor multiplies it"
    if rule.kind.is_location and any(m.has_pole for m in selection.maps):
        return None, "its map has a pole, and a location may lie beyond it"
    event = rule.kind.event_dim
    if event:
        problem = _map_of_events(selection, rule)
        if problem:
            return None, problem
        problem = _whole_events(selection, graph.parameters[name].leaf, rule.kind.form)
        if problem:
            return None, problem
    return Use(g, argument, selection, rule), ""


def _map_of_events(selection: Selection, rule: Rule) -> str:
    """Why the maps between rows or matrices and the argument have no closed form, or nothing."""
    maps = [m.name for m in selection.maps]
    if not maps or (maps == ["log"] and rule.link is LOG_SIMPLEX):
        return ""
    if maps == [PRODUCT.name] and rule.takes_products:
        return ""
    if selection.of_matrices:
        return "a product of mapped matrices"
    return "an elementwise map of whole rows"


def _link(use: Use) -> str:
    """The link from the natural value of rows or matrices to the parameter, by name."""
    if use.selection.of_matrices:
        return CHOLESKY.name
    return IDENTITY.name if use.selection.maps else use.rule.link.name


def _whole_events(selection: Selection, parameter: Tensor, form: Form) -> str:
    """Why a closed form cannot maximise over whole rows or matrices, or nothing: a selection may be one
    that earlier runs have shown.
    """
    asked = (_whole_events, parameter.shape, form.event_dim, form.is_row)
    if asked not in selection.remembered:
        selection.remembered[asked] = _not_one_to_one(selection.index, parameter, form)
    return str(selection.remembered[asked])


def _not_one_to_one(index: Tensor, parameter: Tensor, form: Form) -> str:
    """Why the rows or matrices that are selected are not those of the parameter, or nothing."""
    event = form.event_dim
    if parameter.dim() < event or parameter.shape[-event:] != index.shape[-event:]:
        return "only part of a row of the parameter is used"
    size = math.prod(parameter.shape[-event:])
    rows = (index[:1] if index.stride(0) == 0 else index).reshape(-1, size)
    rows = rows[(rows >= 0).any(-1)]
    if bool((rows < 0).any()):
        return "a row is partly constant"
    first = rows.min(-1).values
    if bool((first % size != 0).any()):
        return "its rows are not rows of the parameter"
    offsets = rows - first.unsqueeze(-1)
    if form.is_row:
        offsets = offsets.sort(-1).values
    expected = torch.arange(size, device=index.device)
    if not bool((offsets == expected).all()):
        return "its rows are not rows of the parameter"
    return ""


def _disagreement(uses: Sequence[Use]) -> str:
    first = uses[0]
    for u in uses[1:]:
        if u.rule.kind is not first.rule.kind:
            return f"it is a {first.rule.kind.value} here and a {u.rule.kind.value} there"
        if u.rule.link.name != first.rule.link.name:
            return f"it is a {first.argument} here and a {u.argument} there"
        if [m.name for m in u.selection.maps] != [m.name for m in first.selection.maps]:
            return "different maps of it are used"
    return ""


def _outside(use: Use, constraint: constraints.Constraint) -> str:
    """Why a solution may leave the parameter's constraint, or nothing."""
    if is_real(constraint):
        return ""
    if use.rule.kind.event_dim == 0:
        return "" if bounds(constraint) else f"its constraint {constraint} is no interval"
    if use.rule.kind.form.stays_in(constraint, _link(use)):
        return ""
    return f"its constraint {constraint} may exclude the solution"


def _blocks(graph: FactorGraph, names: set[str]) -> list[tuple[str, ...]]:
    """Sets of parameters that share an affine mean, directly or through others."""
    blocks = _joined([set(group.mean_params) for group in graph.groups], names)
    return [_in_order(graph, block) for block in blocks]


def _joined(together: Sequence[set[str]], names: set[str]) -> list[set[str]]:
    """Sets of names that are together in one of some sets, directly or through others."""
    blocks: list[set[str]] = []
    for own in together:
        here = names & own
        if not here:
            continue
        touching = [b for b in blocks if b & here]
        merged = here.union(*touching)
        blocks = [b for b in blocks if not b & here] + [merged]
    return blocks


def _in_order(graph: FactorGraph, names: set[str]) -> tuple[str, ...]:
    return tuple(name for name in graph.parameters if name in names)


def groups_reached(graph: FactorGraph, names: set[str]) -> list[int]:
    """Indices of the groups whose density depends on any of the parameters."""

    def reaches(group: Group) -> bool:
        if group.family is None and group.raw_params is None:
            return True
        return bool(names.intersection(group.params))

    return [i for i, g in enumerate(graph.groups) if reaches(g)]
