"""Where an M-step stands: the values that it has found, and what it asks of the data for the next ones.

The data may come in parts: each follows the moves that have been made, and what they say is summed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from typing import TypeVar

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message, warn
from pyro_em.graph.factors import FactorGraph
from pyro_em.reduction.reduction import Reduction
from pyro_em.tracing.parameters import values_of, write_unconstrained
from pyro_em.updates.closed_forms.closed_form import Blend, solver_of
from pyro_em.updates.closed_forms.degrees import DegreesSolver
from pyro_em.updates.closed_forms.ends import end_at
from pyro_em.updates.closed_forms.met_ends import ends_at, pair_at
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.expectations.noiseless import noiseless_in_words
from pyro_em.updates.linear_cells.blocks import Problem
from pyro_em.updates.regressions.coefficients import coefficients, separated
from pyro_em.updates.regressions.curved import Curved
from pyro_em.updates.regressions.expansion import Expansion
from pyro_em.updates.regressions.idle import Moves
from pyro_em.updates.regressions.least_squares import solved
from pyro_em.updates.regressions.shift import Shift, gain_of, shifts_of, split
from pyro_em.updates.sums.data_sums import DataSums, Expanded, Move, Shifted, Written
from pyro_em.updates.sums.newton_on_sums import AtEdge, Further, NewtonSolver
from pyro_em.updates.sums.parted_problem import PartedProblem, marks_of_cells, problem_of
from pyro_em.updates.update import ParameterUpdate

T = TypeVar("T")

_PASSES = 100  # over the data, where sums tell what is near only


class MStepInProgress:
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
            require_finite(name, self.graph, self.values)
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

        def moves(step: Tensor) -> Moves:
            return self.over.max(lambda part: part.moves(block, step))

        found = coefficients(ask, block, self.graph, self.values, self.updates, moves=moves)
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
        parted = self._parted(solver)
        for _ in range(_PASSES):
            try:
                if parted is not None:
                    new, empty = solver.solve_problem(parted, self.values)
                    break
                statistics = self.sum(lambda part: part.feature_sums(solver.groups))
                arguments = {
                    g: self.graph.groups[g].evaluate_arguments(self.values) for g in solver.groups
                }
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

    def _parted(self, solver: NewtonSolver) -> PartedProblem | None:
        """The problem that the parts pose together where their cells are not the same, else None."""
        if self.over.is_whole:
            return None
        most = self.over.max(lambda part: marks_of_cells(part.graph, solver.groups))
        high, low = most.chunk(2)
        if bool((high + low <= 1e-9 * (1 + high.abs())).all()):
            return None
        coordinates = solver.coordinates

        def ask(of: Callable[[Problem], list[Tensor]]) -> list[Tensor]:
            return self.sum(lambda part: of(problem_of(part, coordinates)))

        return PartedProblem(coordinates.size, ask)

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


def require_finite(name: str, graph: FactorGraph, values: Mapping[str, Tensor]) -> None:
    """Raise `DegenerateError` where an update has no finite value."""
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
