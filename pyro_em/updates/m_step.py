"""The M-step: θ ← argmax E_q[log p(x, z; θ)], block after block, each exact given the others.

Locations come first, then spreads and everything else in closed form, then Newton steps on sums, then
gradient steps; each block sees the new values of those before it (Meng and Rubin, 1993), so that the
bound never falls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message, warn
from pyro_em.graph.factors import FactorGraph
from pyro_em.reduction.reduction import Reduction, Whole
from pyro_em.tracing.parameters import (
    TracedParameter,
    restore,
    snapshot,
    values_of,
    write_unconstrained,
)
from pyro_em.updates.closed_form import Blend, apply_floor, floor_of, solver_of
from pyro_em.updates.coefficients import coefficients, separated
from pyro_em.updates.curved import Curved
from pyro_em.updates.data_sums import (
    DataSums,
    Derivatives,
    Evaluate,
    Expanded,
    Move,
    Shifted,
    Written,
)
from pyro_em.updates.decision import groups_reached
from pyro_em.updates.degrees import DegreesSolver
from pyro_em.updates.ends import end_at
from pyro_em.updates.expansion import Expansion, FlatSpread, expansions_of
from pyro_em.updates.gradient import maximise
from pyro_em.updates.least_squares import solved
from pyro_em.updates.met_ends import ends_at, pair_at
from pyro_em.updates.newton_on_sums import AtEdge, Further, NewtonSolver
from pyro_em.updates.noiseless import noiseless_in_words
from pyro_em.updates.parted_objective import parted
from pyro_em.updates.replays import Replays
from pyro_em.updates.shift import Shift, gain_of, shifts_of, split
from pyro_em.updates.unbounded import unbounded_in_words
from pyro_em.updates.update import (
    EXACT,
    ClosedForm,
    Gradient,
    LeastSquares,
    Newton,
    NewtonOnProfile,
    NewtonOnSums,
    ParameterUpdate,
)

T = TypeVar("T")

_PASSES = 100  # over the data, where sums tell what is near only


@dataclass
class MStepState:
    """The state that lasts from one M-step to the next: the user's optimisers.

    Attributes:
        optimizers: The torch optimisers of gradient updates, by their parameters' names.
        told: Warnings that have been given.
        replays: What is known of how parameters reach densities, where the model has to be run.
    """

    optimizers: dict[str, torch.optim.Optimizer] = field(default_factory=dict)
    told: list[str] = field(default_factory=list)
    replays: Replays = field(default_factory=Replays)


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

    def at_e_step() -> Reduction[DataSums]:
        return Whole(DataSums(graph, updates, counts, arguments, evaluate))

    return m_step_over(at_e_step, graph, updates, state, blend, expand=expand)


def m_step_over(
    at_e_step: Callable[[], Reduction[DataSums]],
    graph: FactorGraph,
    updates: Mapping[str, ParameterUpdate],
    state: MStepState,
    blend: Blend | None = None,
    *,
    expand: bool = True,
) -> MStepReport:
    """Update every parameter in place from what parts of the data say; see `m_step`.

    Args:
        at_e_step: Gives the parts, each as it is after the E-step.
        graph: That of any one part: what all parts have in common is read from it.
        updates: What was decided per parameter, of the same part.
        state: What lasts between M-steps.
        blend: Running averages of sums, where there is one part.
        expand: Whether parameters of Gaussian latents may be expanded: q is their posterior.

    Raises:
        DegenerateError: Naming parameter and component; all parameters are as before.
    """
    before = snapshot(graph.parameters)
    unexpanded: list[str] = []
    while True:
        try:
            now = _MStep(at_e_step(), graph, updates, blend)
            return _m_step(now, state, expand, unexpanded)
        except FlatSpread as flat:
            # Steps without the expansion stay inside: they go towards a singular matrix slowly.
            restore(graph.parameters, before)
            unexpanded.append(flat.latent)
        except BaseException:
            restore(graph.parameters, before)
            raise


class _MStep:
    """Where an M-step stands: the values that it has found, and what it asks of the data.

    Args:
        over: The parts of the data.
        graph: That of one part.
        updates: What was decided per parameter.
        blend: Running averages of sums, where there is one part.

    Attributes:
        values: Parameter values as they are now.
        working: Working coefficients of expanded latents.
        moves: What the parts have to follow.
        massless: Events without mass, by parameter.
    """

    def __init__(
        self,
        over: Reduction[DataSums],
        graph: FactorGraph,
        updates: Mapping[str, ParameterUpdate],
        blend: Blend | None,
    ) -> None:
        self.over, self.graph, self.updates, self.blend = over, graph, updates, blend
        self.values = values_of(graph.parameters)
        self.working: dict[str, Tensor] = {}
        self.moves: list[Move] = []
        self.massless: dict[str, tuple[int, ...]] = {}
        self._pending: list[ParameterUpdate] = []
        self._known: dict[str, tuple[Tensor, Tensor]] = {}

    def sum(self, of: Callable[[DataSums], T]) -> T:
        """The sum over parts of what each says after all moves."""
        return self.over.sum(lambda part: of(part.following(self.moves)))

    def write(self, new: Mapping[str, Tensor]) -> None:
        """Put new values into the param store."""
        written = {}
        for name, value in new.items():
            write_unconstrained(self.graph.parameters[name], value)
            # Continue with what the store holds: a transform may round.
            written[name] = self.values[name] = self.graph.parameters[name].value()
            _require_finite(name, self.graph, self.values)
        self.moves.append(Written(written))
        reached = set(groups_reached(self.graph, set(new)))
        for update in self._pending:
            if update.name in new or any(u.group in reached for u in update.uses):
                self._known.pop(update.name, None)

    def closed_forms(self, updates: Sequence[ParameterUpdate]) -> None:
        """Say which closed forms are due: parts that are dear to visit answer all at once."""
        self._pending = [u for u in updates if not u.is_end]

    def updated(self, update: ParameterUpdate) -> Tensor:
        """The maximiser in a parameter in closed form; events without mass are noted."""
        name, blend = update.name, self.blend
        if update.is_end:
            found = self.over.max(lambda part: part.following(self.moves).outermost(name))
            value, empty = end_at(update, self.graph, found, self.values)
        elif self.over.is_whole:
            value, empty = self.sum(lambda part: part.solved(name, blend))
        else:
            if name not in self._known:
                names = [u.name for u in self._pending if u.name not in self._known]
                self._known |= self.sum(lambda part: {n: part.closed(n) for n in names})
            solver = solver_of(update, self.graph, self.values[name], self.values)
            value, empty = solver.maximiser(*self._known.pop(name), self.values[name])
            self._pending = [u for u in self._pending if u.name != name]
        if empty:
            self.massless[name] = tuple(empty)
        return value

    def ends(self, name: str) -> dict[str, Tensor]:
        """Two parameters that both ends of a support are made of."""
        pair = pair_at(self.graph, name)
        assert pair is not None
        found = self.over.max(lambda part: part.following(self.moves).outermost_of_pair(name))
        new, empty = ends_at(pair, self.graph, found, self.values)
        self.massless |= {n: tuple(events) for n, events in empty.items() if events}
        return new

    def regress(self, block: Sequence[str], expansions: Sequence[Expansion]) -> dict[str, Tensor]:
        """Least squares; coefficients of expanded latents stay so until spreads are estimated."""
        if self.over.is_whole:
            new = self.sum(lambda part: part.regressed(block, expansions))
        else:
            equations = self.sum(lambda part: part.equations(block, expansions))
            new = solved(equations, block, self.graph, self.values, self.updates, expansions)
        for e in expansions:
            self.working[e.latent] = new.pop(e.latent)
            self.moves.append(Expanded(e, self.working[e.latent]))
        return new

    def climb(self, block: Sequence[str], told: list[str]) -> dict[str, Tensor]:
        """Newton's method for the coefficients of linear predictors; separated data are said once."""

        def ask(values: Mapping[str, Tensor]) -> Curved:
            at = {**self.values, **values}
            return self.sum(lambda part: part.curved(block, at))

        found = coefficients(ask, block, self.graph, self.values, self.updates)
        if not found.is_settled:
            far = self.over.max(lambda part: part.following(self.moves).furthest(block, found.last))
            said = separated(block, self.graph, self.values, found.last, far)
            key = f"{', '.join(block)} runs off"
            if said and key not in told:
                told.append(key)
                warn(said)
        return found.values

    def newton(self, block: tuple[str, ...]) -> dict[str, Tensor]:
        """The joint maximiser of the parameters of densities in linear form; see `NewtonSolver`."""
        solver = NewtonSolver(block, self.graph)
        for _ in range(_PASSES):
            statistics = self.sum(lambda part: part.feature_sums(solver.groups))
            arguments = {
                g: self.graph.groups[g].evaluate_arguments(self.values) for g in solver.groups
            }
            try:
                new, empty = solver.solve(statistics, arguments, self.values)
                break
            except Further as further:
                new, empty = further.values, further.empty
                self.write(new)  # sums are taken anew there
            except AtEdge:
                self.over.any(lambda part: part.refuse_edges(solver.groups))
                raise
        self.massless |= {name: tuple(events) for name, events in empty.items() if events}
        return new

    def degrees(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Degrees of freedom, with scale matrices where they will be; see `DegreesSolver`."""
        solver = DegreesSolver(tuple(names), self.graph, self.updates)
        statistics = self.sum(lambda part: part.sums_of(solver.groups))
        arguments = {g: self.graph.groups[g].evaluate_arguments(self.values) for g in solver.groups}
        return solver.solve(statistics, arguments, self.values)

    def shift(self) -> list[Mapping[str, Tensor]]:
        """Working means of latents: spreads are estimated about them, coefficients take them in."""
        gains: list[Mapping[str, Tensor]] = []
        for shift in shifts_of(self.graph, self.updates):
            total, weight = self.sum(lambda part, shift=shift: part.mean_sums(shift))  # type: ignore[misc]
            gain = self._taken_in(shift, total / weight)
            if gain is not None:
                self.moves.append(Shifted(shift.group, total / weight))
                gains.append(gain)
        return gains

    def _taken_in(self, shift: Shift, mean: Tensor) -> dict[str, Tensor] | None:
        """What the coefficients gain for the mean of a latent; None where they cannot."""
        sums = self.sum(lambda part: part.image_sums(shift, mean))
        size = self.over.max(lambda part: part.following(self.moves).image_size(shift, mean))
        if sums.left_out or not isfinite(size):
            return None
        gain = gain_of(sums)
        if self.over.any(lambda part: part.following(self.moves).is_off(shift, mean, gain, size)):
            return None
        return split(shift, gain, self.values)

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
    now: _MStep, state: MStepState, expand: bool, unexpanded: Collection[str]
) -> MStepReport:
    graph, updates = now.graph, now.updates
    on_sums = [u for u in updates.values() if isinstance(u.update, NewtonOnSums)]
    degrees = [n for n, u in updates.items() if isinstance(u.update, NewtonOnProfile)]
    apart = NewtonOnSums | NewtonOnProfile
    exact = [
        u
        for u in updates.values()
        if isinstance(u.update, EXACT) and not isinstance(u.update, apart)
    ]
    exact = sorted(exact, key=_order)
    with torch.no_grad():
        found = expansions_of(graph, updates) if expand else ()
        expansions = [e for e in found if e.latent not in unexpanded]
        with_block = _with_blocks(graph, exact, expansions)
        if degrees:
            now.write(now.degrees(degrees))
        if () in with_block:
            now.regress((), with_block[()])
        now.closed_forms([u for u in exact if isinstance(u.update, ClosedForm)])
        done: set[str] = set()
        for update in exact:  # locations
            if _order(update) == 0 and update.name not in done:
                if isinstance(update.update, LeastSquares):
                    new = now.regress(update.block, with_block.get(update.block, ()))
                elif isinstance(update.update, Newton):
                    new = now.climb(update.block, state.told)
                else:
                    new = {update.name: now.updated(update)}
                now.write(new)
                done.update(new)
        gains = now.shift() if expand else []
        for update in exact:
            if update.name not in done:
                is_pair = update.is_met_end
                new = now.ends(update.name) if is_pair else {update.name: now.updated(update)}
                now.write(new)
                done.update(new)
        for block in dict.fromkeys(u.block for u in on_sums):
            now.write(now.newton(block))
        now.return_to_model(expansions, gains)
    _gradient_blocks(now, state)
    return MStepReport(now.massless)


def _with_blocks(
    graph: FactorGraph, exact: Sequence[ParameterUpdate], expansions: Sequence[Expansion]
) -> dict[tuple[str, ...], list[Expansion]]:
    """The expansions that are solved with each block of coefficients, () for those alone."""
    blocks = dict.fromkeys(u.block for u in exact if isinstance(u.update, LeastSquares))
    out: dict[tuple[str, ...], list[Expansion]] = {}
    for e in expansions:
        met = (b for b in blocks if e.is_read_by(groups_reached(graph, set(b))))
        out.setdefault(next(met, ()), []).append(e)
    return out


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
    if isinstance(update.update, (LeastSquares, Newton)):
        return 0
    return 0 if update.kind is not None and update.kind.is_location else 1


def _require_finite(name: str, graph: FactorGraph, values: Mapping[str, Tensor]) -> None:
    if not bool(torch.isfinite(values[name]).all()):
        raise DegenerateError(
            noiseless_in_words(graph, name, values)
            or message(
                f"parameter '{name}'",
                "its update is not finite; nothing was changed.",
                "the data do not determine it, or a component is empty",
                ["start elsewhere (init='random', num_restarts)"],
            )
        )


def _gradient_blocks(now: _MStep, state: MStepState) -> None:
    graph = now.graph
    by_update: list[tuple[Gradient, list[str]]] = []
    for u in now.updates.values():
        if not isinstance(u.update, Gradient):
            continue
        for known, names in by_update:
            if known == u.update:
                names.append(u.name)
                break
        else:
            by_update.append((u.update, [u.name]))
    if not by_update:
        return
    weight = max([1.0, *now.sum(lambda part: part.masses())])
    for update, names in by_update:
        reached = groups_reached(graph, set(names))
        if reached:
            moved = [graph.parameters[n] for n in names]
            objective = _objective(now, moved, reached)
            runaway = maximise(moved, objective, update, state.optimizers, weight)
            if runaway is not None:
                raise DegenerateError(unbounded_in_words(graph, runaway))
            for n in names:
                _require_finite(n, graph, values_of(graph.parameters))


def _objective(
    now: _MStep, moved: Sequence[TracedParameter], reached: Sequence[int]
) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """From values of some parameters to the expected log joint of the groups that they reach."""
    names = [p.name for p in moved]
    fixed = {n: p.value() for n, p in now.graph.parameters.items() if n not in names}
    if now.over.is_whole:
        return lambda values: now.sum(
            lambda part: part.expected_log_joint({**fixed, **values}, reached)
        )
    shapes = {p.name: p.value().shape for p in moved}

    def ask(flat: Tensor, order: int) -> Derivatives:
        sizes = [shape.numel() for shape in shapes.values()]
        each = zip(shapes.items(), flat.split(sizes), strict=True)
        values = {**fixed, **{name: part.reshape(shape) for (name, shape), part in each}}
        return now.sum(lambda part: part.derivatives(values, moved, reached, order))

    return lambda values: parted(ask, values, names)
