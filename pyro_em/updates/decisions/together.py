"""Which parameters are solved for together: by least squares, by Newton's method on data or sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from pyro_em.distributions import is_real
from pyro_em.families.overdispersed import MANY
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.decisions.appearances import is_joint
from pyro_em.updates.decisions.strongest import strongest_updates
from pyro_em.updates.linear_cells.coordinates import Coordinates
from pyro_em.updates.linear_cells.placed import cells_of, size_of
from pyro_em.updates.regressions.mixed import with_mixed
from pyro_em.updates.regressions.predictors import predictors_of
from pyro_em.updates.update import (
    ClosedForm,
    Fixed,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnSums,
    ParameterUpdate,
)

_FEW = 2**8  # elements whose second derivatives are few in any case

_WIDEST = 2**20  # second derivatives of all cells in which rows of simplexes meet others

_LARGEST = 2**24  # second derivatives of one block of Newton's method on sums


def solved_together(
    graph: FactorGraph, decided: Mapping[str, ParameterUpdate], default: Gradient | None
) -> dict[str, ParameterUpdate]:
    """What was decided for each parameter by itself, with what is solved for together.

    Args:
        graph: The factor graph.
        decided: What was decided for each parameter.
        default: The gradient update where there is no closed form; L-BFGS if None.
    """
    out = with_mixed(graph, _with_met_ends(graph, decided, default))
    return _with_newton_on_sums(
        graph, _with_newton(graph, _with_least_squares(graph, out)), default
    )


def _with_least_squares(
    graph: FactorGraph, before: Mapping[str, ParameterUpdate]
) -> dict[str, ParameterUpdate]:
    """Blocks of least squares: coefficients that share a mean, and the means that stand beside them."""
    decided = dict(before)
    least_squares = {n for n, u in decided.items() if isinstance(u.update, LeastSquares)}
    if not least_squares:
        return decided
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
    return decided


def _with_newton(
    graph: FactorGraph, before: Mapping[str, ParameterUpdate]
) -> dict[str, ParameterUpdate]:
    """Blocks of Newton's method on data: coefficients that share a linear predictor."""
    decided = dict(before)
    curved = {n for n, u in decided.items() if isinstance(u.update, Newton) and not u.is_mixed}
    if not curved:
        return decided
    read = [set(predictor.params) for predictor in predictors_of(graph, [*curved])]
    for together in _joined(read, curved):
        for p in together:
            decided[p] = replace(decided[p], block=_in_order(graph, together))
    return decided


def _with_met_ends(
    graph: FactorGraph, before: Mapping[str, ParameterUpdate], default: Gradient | None
) -> dict[str, ParameterUpdate]:
    """Pairs of parameters that both ends of a support are made of: both of them, or none."""
    out = dict(before)
    for name, update in before.items():
        if update.is_met_end and not all(before[n].is_met_end for n in update.block):
            other = next(n for n in update.block if n != name)
            why = f"a support ends at it and at '{other}', which has another update"
            out[name] = ParameterUpdate(name, default or Gradient(), why)
    return out


def _with_newton_on_sums(
    graph: FactorGraph, decided: Mapping[str, ParameterUpdate], default: Gradient | None
) -> dict[str, ParameterUpdate]:
    """Blocks of Newton's method on sums: all parameters of a density.

    None of them where one has another update.
    """
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
                alone = strongest_updates(graph, [name], together=False)[name]
                if is_joint(group) and isinstance(alone.update, ClosedForm):
                    out[name] = alone
            changed = True
    free = {n for n, u in out.items() if isinstance(u.update, NewtonOnSums)}
    for together in _joined([set(group.params) for group in graph.groups], free):
        block = _in_order(graph, together)
        coordinates = Coordinates.of([graph.parameters[name] for name in block])
        too_many = coordinates.size > _FEW and size_of(coordinates, graph) > _LARGEST
        if too_many or cells_of(coordinates, graph) > _WIDEST:
            why = f"{coordinates.size:,} numbers share cells: too many for second derivatives"
            out |= {name: ParameterUpdate(name, default or Gradient(), why) for name in block}
            continue
        out |= {name: replace(out[name], block=block) for name in block}
    return out


def _no_joint_steps(group: Group, decided: Mapping[str, ParameterUpdate]) -> str:
    """Why the parameters of a density in linear form are not solved for together, or nothing."""
    where = f"{group.distribution} at '{group.members[0]}'"
    assert group.family is not None and group.family.joint_form is not None
    form = group.family.joint_form
    if form.of_counts and form.largest(group.value, group.arguments) > MANY:
        return f"counts above {MANY:,} are no table in {where}"
    apart = {n for a, b in group.bindings.items() if a not in form.arguments for n in b.params}
    apart -= {n for a in form.arguments if a in group.bindings for n in group.bindings[a].params}
    for name in group.params:
        if name not in apart and not isinstance(decided[name].update, NewtonOnSums | Fixed):
            return f"'{name}' has another update in {where}"
    for argument, binding in group.bindings.items():
        if not binding.is_static:
            return f"{argument} is opaque in {where}"
        if argument not in form.arguments:  # the form has a term of its own for it
            continue
        known = [s.factor for s in binding.selections if s.factor is not None]
        known += binding.known
        if is_joint(group) and not all(s.is_whole for s in binding.selections):
            return f"some numbers of {argument} are known in {where}"
        if not any(s.is_whole for s in binding.selections):
            known.append(binding.constant)
        if any(_differs_by_row(t, group) for t in known):
            return f"{argument} differs from row to row in {where}"
    return ""


def _differs_by_row(known: Tensor, group: Group) -> bool:
    """Whether known numbers of an argument differ along a plate."""
    return any(
        known.shape[d] > 1 and not bool((known == known.narrow(d, 0, 1)).all())
        for d in range(1, 1 + group.n_plates)
    )


def _is_plain_mean(update: ParameterUpdate) -> bool:
    """Whether least squares solves for it as for an intercept: a mean as it stands."""
    if update.kind is None or not update.kind.form.is_regressed:
        return False
    if not all(p.is_constant for p in update.priors):
        return False
    return all(u.selection.factor is None and not u.selection.maps for u in update.uses)


def _blocks(graph: FactorGraph, names: set[str]) -> list[tuple[str, ...]]:
    """Sets of parameters that share an affine mean, directly or through others."""
    blocks = _joined([set(group.mean_params) for group in graph.groups], names)
    return [part for block in blocks for part in _linear_parts(graph, _in_order(graph, block))]


def _linear_parts(graph: FactorGraph, block: tuple[str, ...]) -> list[tuple[str, ...]]:
    """A block in parts of which no two parameters are multiplied; each is solved given the others."""
    bindings = [b for group in graph.groups for b in group.bindings.values()]
    products = {frozenset(pair) for b in bindings for pair in b.pairs or ()}
    parts: list[list[str]] = []
    for name in block:
        free = (p for p in parts if not any(frozenset((name, other)) in products for other in p))
        part = next(free, None)
        if part is None:
            parts.append([name])
        else:
            part.append(name)
    return [tuple(part) for part in parts]


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
