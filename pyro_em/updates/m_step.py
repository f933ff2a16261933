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
from pyro_em.families.family import Statistics
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


@dataclass(eq=False)
class _Progress:
    """Where an M-step stands: values, arguments and statistics as its blocks change them.

    Attributes:
        graph: The factor graph.
        updates: What was decided per parameter.
        counts: Expected counts per group.
        values: Parameter values as they are now.
        arguments: Per group as they are now.
        needed: Groups whose statistics some closed form needs.
        statistics: Of these groups, about the locations at which they were taken.
        stale: Those that have to be taken again: deviations do not shift to another location, nor do
            squares with the coefficients of latents.
        working: Working coefficients of expanded latents.
    """

    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]
    counts: Sequence[Tensor]
    values: dict[str, Tensor]
    arguments: list[dict[str, Tensor]]
    needed: list[int]
    statistics: dict[int, Statistics]
    stale: set[int]
    working: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        counts: Sequence[Tensor],
        arguments: Sequence[Mapping[str, Tensor]],
        exact: Sequence[ParameterUpdate],
    ) -> _Progress:
        """At the E-step."""
        needed = groups_reached(graph, {u.name for u in exact})
        needed = [g for g in needed if graph.groups[g].family is not None]
        # Those of sites that read Gaussian latents change with each update: taken when needed.
        plain = [g for g in needed if graph.groups[g].belief is None]
        collected = expected_statistics(graph, counts, arguments, plain)
        return cls(
            graph,
            updates,
            counts,
            values_of(graph.parameters),
            [dict(a) for a in arguments],
            needed,
            {g: collected.of(g) for g in plain},
            set(needed) - set(plain),
        )

    def take(self, groups: Iterable[int]) -> None:
        """Take stale statistics of groups about the current locations."""
        for g in self.stale.intersection(groups):
            group = self.graph.groups[g]
            self.statistics[g] = group_statistics(group, self.counts[g], self.arguments[g])
            if group.belief is not None:
                self.statistics[g]["reference:loc"] = self.arguments[g]["loc"]
            self.stale.discard(g)

    def write(self, new: Mapping[str, Tensor]) -> None:
        """Put new values into the param store, and into the arguments that they reach."""
        for name, value in new.items():
            write_unconstrained(self.graph.parameters[name], value)
            # Continue with what the store holds: a transform may round.
            self.values[name] = self.graph.parameters[name].value()
            _require_finite(name, self.values[name])
        names = set(new)
        for g in groups_reached(self.graph, names):
            group = self.graph.groups[g]
            if group.family is None:
                continue
            for argument, binding in group.bindings.items():
                if binding.is_static and names.intersection(binding.params):
                    dtype = group.arguments[argument].dtype
                    self.arguments[g][argument] = binding.evaluate(self.values).to(dtype)
            if g in self.needed and not (group.family.additive and group.belief is None):
                self.stale.add(g)

    def regress(self, block: Sequence[str], expansions: Sequence[Expansion]) -> dict[str, Tensor]:
        """Least squares; coefficients of expanded latents stay so until spreads are estimated."""
        self.take(g for g in self.needed if self.graph.groups[g].belief is None)
        new = least_squares(
            block,
            self.graph,
            self.statistics,
            self.arguments,
            self.values,
            self.updates,
            expansions,
        )
        for e in expansions:
            self.working[e.latent] = new.pop(e.latent)
            for g, argument in e.children:
                before = self.arguments[g][argument]
                self.arguments[g][argument] = e.applied(before, self.working[e.latent])
                self.stale.add(g)
        return new

    def shift(self) -> list[Mapping[str, Tensor]]:
        """Working means of latents: spreads are estimated about them, coefficients take them in."""
        gains: list[Mapping[str, Tensor]] = []
        for shift in shifts_of(self.graph, self.updates):
            found = taken_in(shift, self.graph, self.arguments, self.values)
            if found is None:
                continue
            group = self.graph.groups[shift.group]
            loc = found[0].reshape((1,) * (1 + len(group.sizes)) + event_shape(group))
            self.arguments[shift.group]["loc"] = loc.to(group.arguments["loc"].dtype)
            self.stale.add(shift.group)
            gains.append(found[1])
        return gains

    def return_to_model(
        self, expansions: Sequence[Expansion], gains: Sequence[Mapping[str, Tensor]]
    ) -> None:
        """Let spreads and coefficients take in what was expanded."""
        for e in expansions:
            spread = e.returned(self.values[e.parameter], self.working[e.latent])
            write_unconstrained(self.graph.parameters[e.parameter], spread)
        for gain in gains:
            for name, more in gain.items():
                self.values[name] = self.values[name] + more.to(self.values[name])
                write_unconstrained(self.graph.parameters[name], self.values[name])


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
    exact = [u for u in updates.values() if isinstance(u.update, (ClosedForm, LeastSquares))]
    exact = sorted(exact, key=_order)
    massless: dict[str, tuple[int, ...]] = {}
    with torch.no_grad():
        now = _Progress.of(graph, updates, counts, arguments, exact)
        found = expansions_of(graph, updates) if expand else ()
        expansions = [e for e in found if e.latent not in unexpanded]
        with_block = _with_blocks(graph, exact, expansions)
        if () in with_block:
            now.regress((), with_block[()])
        done: set[str] = set()
        for update in exact:  # locations
            if _order(update) == 0 and update.name not in done:
                new = _updated(now, update, with_block.get(update.block, ()), blend, massless)
                now.write(new)
                done.update(new)
        gains = now.shift() if expand else []
        for update in exact:
            if update.name not in done:
                now.write(_updated(now, update, (), blend, massless))
        now.return_to_model(expansions, gains)
    _gradient_blocks(graph, updates, counts, evaluate, state)
    return MStepReport(massless)


def _with_blocks(
    graph: FactorGraph, exact: Sequence[ParameterUpdate], expansions: Sequence[Expansion]
) -> dict[tuple[str, ...], list[Expansion]]:
    """The expansions that are solved with each block of coefficients, () for those alone."""
    blocks = dict.fromkeys(u.block for u in exact if u.block)
    out: dict[tuple[str, ...], list[Expansion]] = {}
    for e in expansions:
        met = (b for b in blocks if e.is_read_by(groups_reached(graph, set(b))))
        out.setdefault(next(met, ()), []).append(e)
    return out


def _updated(
    now: _Progress,
    update: ParameterUpdate,
    expansions: Sequence[Expansion],
    blend: Blend | None,
    massless: dict[str, tuple[int, ...]],
) -> dict[str, Tensor]:
    """The new values of a parameter, or of its block; events without mass are noted."""
    if isinstance(update.update, LeastSquares):
        return now.regress(update.block, expansions)
    now.take(u.group for u in update.uses)
    value, empty = closed_form(
        update,
        now.graph,
        now.statistics,
        now.arguments,
        now.counts,
        now.values[update.name],
        blend,
    )
    if empty:
        massless[update.name] = tuple(empty)
    return {update.name: value}


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
