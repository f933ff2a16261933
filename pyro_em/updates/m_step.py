"""The M-step: θ ← argmax E_q[log p(x, z; θ)], block after block, each exact given the others.

Locations come first, then spreads and everything else in closed form, then gradient steps; each
block sees the new values of those before it (Meng and Rubin, 1993), so that the bound never falls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.tracing.parameters import restore, snapshot, values_of, write_unconstrained
from pyro_em.updates.closed_form import Blend, apply_floor, closed_form, floor_of
from pyro_em.updates.decision import groups_reached
from pyro_em.updates.expansion import Expansion, FlatSpread, expansions_of
from pyro_em.updates.gaussian_rows import event_shape
from pyro_em.updates.gradient import Runaway, maximise
from pyro_em.updates.least_squares import least_squares
from pyro_em.updates.shift import shifts_of, taken_in
from pyro_em.updates.statistics import dot, expected_statistics, group_statistics
from pyro_em.updates.update import ClosedForm, Gradient, LeastSquares, ParameterUpdate

Evaluate = Callable[[Mapping[str, Tensor], Sequence[int]], Mapping[int, Tensor]]


@dataclass
class MStepState:
    """The state that lasts from one M-step to the next: the user's optimisers.

    Attributes:
        optimizers: The torch optimisers of gradient updates, by their parameters' names.
        told: Warnings that have been given.
    """

    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class MStepReport:
    """The report of an M-step: the events without mass, which keep their former values.

    Attributes:
        massless: Per parameter the flat indices of these events.
    """

    massless: Mapping[str, tuple[int, ...]]


def m_step(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    counts: Sequence[Tensor],
    arguments: Sequence[Mapping[str, Tensor]],
    evaluate: Evaluate,
    state: MStepState,
    blend: Blend | None = None,
    *,
    expand: bool = True,
) -> MStepReport:
    """Update every parameter in place; nothing is changed if any update is degenerate.

    Args:
        graph: The factor graph with bindings.
        updates: What was decided per parameter.
        counts: Expected counts per group.
        arguments: Arguments per group at the E-step.
        evaluate: From constrained values and group numbers to those groups' log densities.
        state: What lasts between M-steps.
        blend: Running averages of the closed forms' numerators and denominators, for batches.
        expand: Whether parameters of Gaussian latents may be expanded: q is their posterior.

    Raises:
        DegenerateError: Naming parameter and component; all parameters are as before.
    """
    before = snapshot(graph.parameters)
    unexpanded: list[str] = []
    while True:
        try:
            return _m_step(
                graph, updates, counts, arguments, evaluate, state, blend, expand, unexpanded
            )
        except FlatSpread as flat:
            # Steps without the expansion stay inside: they go towards a singular matrix slowly.
            restore(graph.parameters, before)
            unexpanded.append(flat.latent)
        except BaseException:
            restore(graph.parameters, before)
            raise


def _m_step(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    counts: Sequence[Tensor],
    arguments: Sequence[Mapping[str, Tensor]],
    evaluate: Evaluate,
    state: MStepState,
    blend: Blend | None,
    expand: bool,
    unexpanded: Collection[str],
) -> MStepReport:
    values = values_of(graph.parameters)
    exact = [u for u in updates.values() if isinstance(u.update, (ClosedForm, LeastSquares))]
    needed = groups_reached(graph, {u.name for u in exact})
    needed = [g for g in needed if graph.groups[g].family is not None]
    with torch.no_grad():
        # Those of sites that read Gaussian latents change with each update: taken when needed.
        plain = [g for g in needed if graph.groups[g].belief is None]
        stale = set(needed) - set(plain)
        collected = expected_statistics(graph, counts, arguments, plain)
        statistics = {g: collected.of(g) for g in plain}
        current = [dict(a) for a in arguments]
        massless: dict[str, tuple[int, ...]] = {}

        def refresh(names: set[str]) -> None:
            for g in groups_reached(graph, names):
                group = graph.groups[g]
                if group.family is None:
                    continue
                for argument, binding in group.bindings.items():
                    if binding.is_static and names.intersection(binding.params):
                        dtype = group.arguments[argument].dtype
                        current[g][argument] = binding.evaluate(values).to(dtype)
                # Absolute deviations do not shift, nor do squares with the coefficients of latents.
                if g in needed and not (group.family.additive and group.belief is None):
                    stale.add(g)

        def take(groups: Iterable[int]) -> None:
            """Statistics of groups about the current location."""
            for g in stale.intersection(groups):
                statistics[g] = group_statistics(graph.groups[g], counts[g], current[g])
                if graph.groups[g].belief is not None:
                    statistics[g]["reference:loc"] = current[g]["loc"]
                stale.discard(g)

        def regressed(block: Sequence[str], own: Sequence[Expansion]) -> dict[str, Tensor]:
            """Least squares; coefficients of latents stay expanded until spreads are estimated."""
            take(plain)
            new = least_squares(block, graph, statistics, current, values, updates, own)
            for e in own:
                working[e.latent] = new.pop(e.latent)
                for g, argument in e.children:
                    current[g][argument] = e.applied(current[g][argument], working[e.latent])
                    stale.add(g)
            return new

        working: dict[str, Tensor] = {}
        found = expansions_of(graph, updates) if expand else ()
        expansions = [e for e in found if e.latent not in unexpanded]
        with_block: dict[tuple[str, ...], list[Expansion]] = {}
        for e in expansions:
            blocks = dict.fromkeys(u.block for u in exact if u.block)
            met = (b for b in blocks if e.is_read_by(groups_reached(graph, set(b))))
            with_block.setdefault(next(met, ()), []).append(e)
        if () in with_block:
            regressed((), with_block[()])
        gains: list[Mapping[str, Tensor]] = []

        def shifted() -> None:
            """Means of latents go into coefficients at last; spreads are estimated about them."""
            for shift in shifts_of(graph, updates) if expand else ():
                found = taken_in(shift, graph, current, values)
                if found is None:
                    continue
                group = graph.groups[shift.group]
                loc = found[0].reshape((1,) * (1 + len(group.sizes)) + event_shape(group))
                current[shift.group]["loc"] = loc.to(group.arguments["loc"].dtype)
                stale.add(shift.group)
                gains.append(found[1])

        is_shifted = False
        done: set[str] = set()
        for update in sorted(exact, key=_order):
            if update.name in done:
                continue
            if not is_shifted and _order(update) > 0:
                shifted()
                is_shifted = True
            if isinstance(update.update, LeastSquares):
                new = regressed(update.block, with_block.get(update.block, ()))
            else:
                take(u.group for u in update.uses)
                value, empty = closed_form(
                    update, graph, statistics, current, counts, values[update.name], blend
                )
                new = {update.name: value}
                if empty:
                    massless[update.name] = tuple(empty)
            for name, value in new.items():
                write_unconstrained(graph.parameters[name], value)
                # Continue with what the store holds: a transform may round.
                values[name] = graph.parameters[name].value()
                _require_finite(name, values[name])
            done.update(new)
            refresh(set(new))
        for e in expansions:
            spread = e.returned(values[e.parameter], working[e.latent])
            write_unconstrained(graph.parameters[e.parameter], spread)
        if not is_shifted:
            shifted()
        for gain in gains:
            for name, more in gain.items():
                values[name] = values[name] + more.to(values[name])
                write_unconstrained(graph.parameters[name], values[name])
    _gradient_blocks(graph, updates, counts, evaluate, state)
    return MStepReport(massless)


def apply_floors(graph: FactorGraph, updates: Mapping[str, ParameterUpdate]) -> None:
    """Raise spreads that start below the floor that the user asked for."""
    with torch.no_grad():
        for name, update in updates.items():
            if floor_of(update) <= 0:
                continue
            value = graph.parameters[name].value()
            raised = apply_floor(update, value)
            if not torch.equal(raised, value):
                write_unconstrained(graph.parameters[name], raised)


def _order(update: ParameterUpdate) -> int:
    if isinstance(update.update, LeastSquares):
        return 0
    return 0 if update.kind is not None and update.kind.is_location else 1


def _require_finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise DegenerateError(
            message(
                f"parameter '{name}'",
                "its update is not finite; nothing was changed.",
                "the data do not determine it, or a component is empty",
                ["start elsewhere (init='random', num_restarts)"],
            )
        )


def _gradient_blocks(
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    counts: Sequence[Tensor],
    evaluate: Evaluate,
    state: MStepState,
) -> None:
    by_update: list[tuple[Gradient, list[str]]] = []
    for u in updates.values():
        if not isinstance(u.update, Gradient):
            continue
        for known, names in by_update:
            if known == u.update:
                names.append(u.name)
                break
        else:
            by_update.append((u.update, [u.name]))
    weight = max(1.0, max((float(c.sum()) for c in counts), default=1.0))
    for update, names in by_update:
        reached = groups_reached(graph, set(names))
        fixed = {n: p.value() for n, p in graph.parameters.items() if n not in names}

        def objective(
            moved: Mapping[str, Tensor],
            fixed: Mapping[str, Tensor] = fixed,
            reached: Sequence[int] = tuple(reached),
        ) -> Tensor:
            tables = evaluate({**fixed, **moved}, reached)
            return torch.stack([dot(counts[g], tables[g]) for g in reached]).sum()

        if reached:
            runaway = maximise(
                [graph.parameters[n] for n in names],
                objective,
                update,
                state.optimizers,
                weight,
            )
            if runaway is not None:
                raise DegenerateError(_unbounded(graph, runaway))
            for n in names:
                _require_finite(n, graph.parameters[n].value())


def edge_fixes(name: str) -> list[str]:
    """What to try for a parameter at which a support ends."""
    return [
        f"set it to the smallest or largest row, and hold it: updates={{'{name}': Fixed()}}",
        "use a distribution whose support does not depend on it: a Normal, or a Beta on a known "
        "interval",
    ]


def _unbounded(graph: FactorGraph, runaway: Runaway) -> str:
    """The sentence on an objective that has no maximiser."""
    name = runaway.parameter
    parameter = graph.parameters[name]
    value = parameter.value()
    shape = parameter.unconstrained.shape
    index = torch.unravel_index(torch.tensor(runaway.element), shape) if shape else ()
    place = tuple(int(i) for i in index)
    which = f"component {place[0] if len(place) == 1 else place}" if place else "its only component"
    shown = f" (now {float(value[place]):.3g})" if value.shape == shape else ""
    gain = f"{runaway.gain:.3g} nats per unit" if isfinite(runaway.gain) else "with each unit"
    members = [graph.groups[g].members[0] for g in groups_reached(graph, {name})]
    sites = ", ".join(f"site '{n}'" for n in dict.fromkeys(members))
    if any(name in g.edges for g in graph.groups):
        return message(
            f"parameter '{name}', {which}",
            f"the expected log joint rises up to a jump to −inf along it{shown}. The update was rolled "
            "back.",
            f"the support of {sites} ends at it: the maximum is at the outermost row that the "
            "component may have produced, and a gradient does not see it",
            edge_fixes(name),
        )
    return message(
        f"parameter '{name}', {which}",
        f"the expected log joint rises without end along it{shown}: where numbers end it still gains "
        f"{gain} of its unconstrained value. The update was rolled back.",
        "a density without bound: a spread that collapses on equal data or on a single point, or a "
        f"parameter that the data do not hold back; it is read by {sites}",
        [
            "keep it away from its limits: constraint=constraints.interval(low, high), or "
            "greater_than(low)",
            "give it a prior that is zero at the limit (InverseGamma for a scale) and guide='map'",
            "restart elsewhere: fit(..., init='random', num_restarts=10, seed=0)",
        ],
    )
