"""The M-step: θ ← argmax E_q[log p(x, z; θ)], block after block, each exact given the others.

Locations come first, then spreads and everything else in closed form, then Newton steps on sums, then
gradient steps; each block sees the new values of those before it (Meng and Rubin, 1993), so that the
bound never falls.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError
from pyro_em.graph.factors import FactorGraph
from pyro_em.reduction.reduction import Reduction, Whole
from pyro_em.tracing.parameters import (
    TracedParameter,
    restore,
    snapshot,
    values_of,
    write_unconstrained,
)
from pyro_em.updates.closed_forms.closed_form import Blend, apply_floor, floor_of
from pyro_em.updates.decisions.decision import groups_reached
from pyro_em.updates.gradients.gradient import maximise
from pyro_em.updates.gradients.replays import Replays
from pyro_em.updates.in_progress import MStepInProgress, require_finite
from pyro_em.updates.regressions.expansion import Expansion, FlatSpread, expansions_of
from pyro_em.updates.sums.data_sums import DataSums, Derivatives, Evaluate
from pyro_em.updates.sums.parted_objective import parted
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
            now = MStepInProgress(at_e_step(), graph, updates, blend)
            return _m_step(now, state, expand, unexpanded)
        except FlatSpread as flat:
            # Steps without the expansion stay inside: they go towards a singular matrix slowly.
            restore(graph.parameters, before)
            unexpanded.append(flat.latent)
        except BaseException:
            restore(graph.parameters, before)
            raise


def _m_step(
    now: MStepInProgress, state: MStepState, expand: bool, unexpanded: Collection[str]
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
            has_floor = isinstance(update.update, ClosedForm) and update.update.floor > 0
            if not has_floor or floor_of(update) <= 0:
                continue
            value = graph.parameters[name].value()
            raised = apply_floor(update, value)
            if not torch.equal(raised, value):
                write_unconstrained(graph.parameters[name], raised)


def _order(update: ParameterUpdate) -> int:
    if isinstance(update.update, (LeastSquares, Newton)):
        return 0
    return 0 if update.kind is not None and update.kind.is_location else 1


def _gradient_blocks(now: MStepInProgress, state: MStepState) -> None:
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
                require_finite(n, graph, values_of(graph.parameters))


def _objective(
    now: MStepInProgress, moved: Sequence[TracedParameter], reached: Sequence[int]
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
