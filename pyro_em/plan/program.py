"""Program: a model with its data, ready for E-steps and M-steps; one subject, since both steps and the
plan are read off the same factors, which follow from bindings or come from another run of the model.

Every model can be evaluated by running it. Where every binding is a selection or affine, and a run with
moved parameters and another random state confirms it, arguments flow from the parameters through the
bindings (`Program.compiled`), and the model is not run again except to verify.

A program is a value: who comes to know more of a model (its data have changed, its bindings are wrong)
makes another one, and `pyro_em.fitting.steps.guarded` is where that of a fit is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import Finding, UsageError, warn
from pyro_em.graph.bindings.signatures import KeptSelections
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.gaussian_lines.read_lines import other_values, parts_at
from pyro_em.graph.many_rows.slices import on_rows_of
from pyro_em.graph.mixtures import has_components
from pyro_em.graph.stretches import LaterTuple
from pyro_em.graph.structure import Structure
from pyro_em.graph.trace import Resized, trace_graph
from pyro_em.plan.conjugates import Conjugates
from pyro_em.plan.eligibility import (
    CONTRACTION,
    Kernel,
    changing_argument,
    gaussian_kernel,
    kernel_of,
)
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.plan import Plan
from pyro_em.plan.routes import Route, observations_of, routes_of
from pyro_em.plan.unrouted import Unrouted
from pyro_em.portable import StaysHere
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.block import components_of
from pyro_em.posteriors.conjugates.shared_conjugates import OutsideRows, naturals, shared_blocks
from pyro_em.posteriors.continuous.gaussian_components import Alike, integrated
from pyro_em.posteriors.continuous.gaussian_steps import (
    expected_densities,
    for_updates,
    in_m_step,
    tables_of,
)
from pyro_em.posteriors.continuous.table_rows import TableSlices
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.exact import exact_posterior, log_evidence_as_laid, log_evidence_of
from pyro_em.posteriors.strategies import (
    Annealed,
    EStepStrategy,
    Hard,
    MonteCarlo,
    e_step_of,
    gives_up,
)
from pyro_em.posteriors.table_evidence import log_evidence_by_rows
from pyro_em.posteriors.table_posterior import posterior_by_rows
from pyro_em.reduction.reduction import Whole
from pyro_em.tracing.dependences import Dependences, changed_since
from pyro_em.tracing.garbage import fewer_collections
from pyro_em.tracing.given import GivenGaussians, without_values
from pyro_em.tracing.parameters import values_of, versions_of
from pyro_em.tracing.runs import Model, Run
from pyro_em.tracing.sites import Role
from pyro_em.updates.m_step import MStepReport, MStepState, m_step_over
from pyro_em.updates.sums.data_sums import DataSums, Evaluate
from pyro_em.updates.update import Gradient, ParameterUpdate, at_other_rows


def later_kernel(
    graph: FactorGraph, updates: Mapping[str, ParameterUpdate]
) -> Callable[[], Kernel]:
    """What iterates a graph on sums, looked for once, when somebody asks."""
    found: list[Kernel] = []

    def kernel() -> Kernel:
        if not found:
            values = {name: p.leaf.detach() for name, p in graph.parameters.items()}
            found.append(kernel_of(graph, updates, values))
        return found[0]

    return kernel


@dataclass(frozen=True, eq=False)
class Program(StaysHere):
    """A model with its data; see the module's text.

    Attributes:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        structure: The skeleton found by looking.
        graph: The latest trace.
        contraction: The elimination order.
        updates: What was decided per parameter.
        compiled: Whether evaluations skip the model.
        notes: Warnings in words.
        traced_at: Versions of the parameters at the trace, so that it can be used again.
        on_sums: Gives what iterates on sums where the bindings are right (`later_kernel`).
        look_only: Whether bindings are left out, because no M-step follows.
        gradient: The update of parameters without a closed form.
        strategy: Another E-step than the exact one.
        routes: Rows of the plan where a guide takes part.
        dependences: What it was read from, beside the parameters.
        operations: What the run did from which the graph is.
        rebuild: Reads the model anew.
        lines: What the means of sites read of Gaussian latents, which are at zero in ``model``.
        bare: The skeleton of the user's model, where continuous latents are integrated.
        conjugates: Latents that are integrated by their conjugate pairs, at their units in ``model``.
        is_known: Whether an earlier reading had the same bindings, and a run at other parameters
            confirmed them.
        selections: How its run showed which elements of parameters arguments are, for later readings.
    """

    model: Model
    args: tuple
    kwargs: dict[str, Any]
    structure: Structure
    graph: FactorGraph
    contraction: ContractionPlan
    updates: Mapping[str, ParameterUpdate]
    compiled: bool
    traced_at: tuple[int, ...]
    on_sums: Callable[[], Kernel]
    notes: tuple[str, ...] = ()
    look_only: bool = False
    gradient: Gradient | None = None
    strategy: EStepStrategy | None = None
    routes: Sequence[Route] = ()
    dependences: Dependences = field(default_factory=Dependences)
    operations: tuple[Any, ...] = ()
    rebuild: Callable[[], Program | Unrouted] | None = None
    lines: Mapping[str, Line] = field(default_factory=dict)
    bare: Structure | None = None
    conjugates: Conjugates | None = None
    is_known: bool = False
    selections: KeptSelections | None = None

    @property
    def kernel(self) -> Kernel:
        """What iterates the program, and why nothing quicker does."""
        finding = self._off_the_sums()
        if finding is not None and (self.lines or self.conjugates):
            return gaussian_kernel(self.graph, finding.what)
        if finding is not None:
            again = "" if self.compiled else ", the model is run again at each"
            parts = components_of(self.graph)
            return Kernel(CONTRACTION, finding.what, None, parts, words=CONTRACTION + again)
        return self.on_sums()

    def _off_the_sums(self) -> Finding | None:
        """Why no step on sums may stand for a step of the model, whatever its latents are."""
        if self.strategy is not None:
            return Finding("strategy", f"{self.strategy!r} works on the cells of the posterior")
        if self.structure.random_plates:
            plates = ", ".join(f"'{p}'" for p in self.structure.random_plates)
            return Finding(f"plate {plates}", f"plate {plates} draws a random subsample")
        if not self.compiled:
            return changing_argument(self.graph)
        if any(g.value.is_inference() for g in self.graph.groups):
            return Finding("data", "the data were made in inference mode")
        return None

    def on(self, graph: FactorGraph) -> Program:
        """The same on another graph of the same run."""
        return replace(self, graph=graph, on_sums=later_kernel(graph, self.updates))

    def is_changed(self) -> bool:
        """Whether something that was read, the parameters excepted, is another by now."""
        return self.dependences.is_changed()

    def reread(self) -> Program:
        """The model read anew, on the data as they are now."""
        assert self.rebuild is not None
        fresh = self.rebuild()
        if isinstance(fresh, Unrouted):
            raise fresh.error
        return replace(
            self,
            structure=fresh.structure,
            graph=fresh.graph,
            contraction=fresh.contraction,
            updates=fresh.updates,
            compiled=fresh.compiled,
            traced_at=fresh.traced_at,
            on_sums=fresh.on_sums,
            dependences=fresh.dependences,
            lines=fresh.lines,
            bare=fresh.bare,
            conjugates=fresh.conjugates,
            is_known=fresh.is_known,
        )

    def noting(self, *notes: str) -> Program:
        """The same with notes that it lacks."""
        new = tuple(n for n in notes if n and n not in self.notes)
        return replace(self, notes=self.notes + new) if new else self

    def require_unchanged(self, what: str) -> None:
        """Refuse to compute late what belongs to the data of a fit, if those are others by now.

        Args:
            what: What somebody asks for.

        Raises:
            UsageError: If anything of it was changed.
        """
        # Bindings hold all that is needed; without them the model is run again.
        read = self.dependences
        if read.is_written() if self.compiled else read.is_changed():
            raise UsageError(changed_since(what))

    def evaluate(
        self, values: Mapping[str, Tensor] | None = None, outside: OutsideRows | None = None
    ) -> Evaluation:
        """The factors at the current parameters, or, through the bindings, at other values.

        Args:
            values: Constrained values of all parameters; the current ones where None.
            outside: What all parts of the data say of latents outside their rows.
        """
        with torch.no_grad():
            graph, arguments, values = self._at(values)
            if outside is not None:
                graph = outside.on(graph)
            if values is not None:
                at = [g.evaluate_value(values) for g in graph.groups]
            else:
                at = [g.value for g in graph.groups]
            tables, solved = tables_of(graph, arguments, at)
        return Evaluation(graph, arguments, [t.detach() for t in tables], solved, values)

    def naturals(self, plate: str, is_first: bool) -> dict[str, Tensor]:
        """What this part of the data adds to latents outside its rows; see `shared_conjugates`.

        Args:
            plate: The plate of the rows.
            is_first: Whether what is outside the rows counts with this part.
        """
        if not shared_blocks(self.graph, plate):
            return {}
        with torch.no_grad():
            graph, arguments, _ = self._at(None)
            return naturals(graph, arguments, plate, is_first)

    def _at(
        self, values: Mapping[str, Tensor] | None
    ) -> tuple[FactorGraph, list[dict[str, Tensor]], Mapping[str, Tensor] | None]:
        """Graph and arguments there, and the values where they follow from bindings."""
        graph = self.graph
        if self.compiled or values is not None:
            values = values or values_of(graph.parameters)
            return graph, [g.evaluate_arguments(values) for g in graph.groups], values
        if versions_of(graph.parameters) != self.traced_at:
            graph = self._trace(with_bindings=not self.look_only)
        return graph, [dict(g.arguments) for g in graph.groups], None

    @property
    def has_many_rows(self) -> bool:
        """Whether tables of all rows are worth parting, and the rows stand by themselves."""
        return TableSlices.of(self.graph) is not None

    def following(self, evaluation: Evaluation) -> Program:
        """The program at the trace of an evaluation.

        A ``PyroModule`` that declares a parameter in each run has put another tensor behind it.
        """
        if evaluation.graph is self.graph:
            return self
        return replace(
            self, graph=evaluation.graph, traced_at=versions_of(evaluation.graph.parameters)
        )

    def posterior(self, evaluation: Evaluation | None = None) -> Posterior:
        """The exact E-step."""
        evaluation = evaluation or self.evaluate()
        q = exact_posterior(evaluation.graph, self.contraction, evaluation.tables)
        return replace(q, solved=evaluation.solved, parameters=evaluation.values)

    def posterior_at(self, values: Mapping[str, Tensor] | None = None) -> Posterior:
        """The exact E-step at some values, of many rows some at a time.

        Args:
            values: Constrained values of all parameters; the current ones where None.
        """
        at = values_of(self.graph.parameters) if values is None and self.compiled else values
        q: Posterior | None = None
        if at is not None or versions_of(self.graph.parameters) == self.traced_at:
            q = posterior_by_rows(self.graph, self.contraction, at)
        return self.posterior(self.evaluate(values)) if q is None else replace(q, parameters=at)

    def log_evidence(self) -> float:
        """log p(x; θ) at the current parameters, in nats."""
        found: float | None = None
        if self.compiled:
            now = values_of(self.graph.parameters)
            found = log_evidence_by_rows(self.graph, self.contraction, now)
        elif versions_of(self.graph.parameters) == self.traced_at:
            found = log_evidence_as_laid(self.graph, self.contraction)
            if found is None:
                found = log_evidence_by_rows(self.graph, self.contraction, None)
        if found is not None:
            return found
        evaluation = self.evaluate()
        return log_evidence_of(evaluation.graph, self.contraction, evaluation.tables)

    def bound(self, index: int = 0) -> float:
        """ELBO(q, θ) of the strategy's E-step at the current parameters, in nats.

        Args:
            index: The number of the step.
        """
        if self.strategy is None and not any(g.role is Role.POINT for g in self.graph.groups):
            return self.log_evidence()
        bound = self.e_step(self.evaluate(), index).bound
        assert bound is not None
        return bound

    def e_step(self, evaluation: Evaluation, index: int = 0) -> Posterior:
        """The E-step of the strategy; ``index`` is the number of the step."""
        q = e_step_of(self.strategy, evaluation.graph, self.contraction, evaluation.tables, index)
        return replace(q, solved=evaluation.solved) if evaluation.solved else q

    @property
    def is_monotone(self) -> bool:
        """Whether the objective can never fall by more than rounding."""
        if isinstance(self.strategy, (MonteCarlo, Annealed)):
            return False
        return not any(
            isinstance(u.update, Gradient) and u.update.optimizer is not None
            for u in self.updates.values()
        )

    @property
    def may_draw(self) -> bool:
        """Whether a step may draw random numbers: the model is run in it, or the E-step draws."""
        return self.strategy is not None or not self.compiled

    @property
    def objective_name(self) -> str:
        """What a fit raises, in words."""
        if isinstance(self.strategy, Hard):
            return "log joint at the most probable assignment"
        if any(g.role is Role.POINT for g in self.graph.groups):
            return "log evidence + log prior"
        return "log evidence"

    def may_stop(self, step: int) -> bool:
        """Whether a stopping rule has a meaning after ``step`` steps."""
        if isinstance(self.strategy, MonteCarlo):
            return False
        return not isinstance(self.strategy, Annealed) or self.strategy.beta(max(step - 6, 0)) == 1

    def m_step(
        self,
        counts: Sequence[Tensor],
        evaluation: Evaluation,
        state: MStepState | None = None,
        *,
        expand: bool = True,
    ) -> MStepReport:
        """The M-step; parameters are written in place.

        Args:
            counts: Expected counts per group.
            evaluation: The factors at the E-step.
            state: What lasts from one M-step to the next.
            expand: Whether parameters may be expanded: q is the posterior at the present ones.
        """
        state = MStepState() if state is None else state
        graph = for_updates(evaluation.graph)
        with self.searching():
            return m_step_over(
                lambda: Whole(self.data_sums(counts, evaluation, state, whole=True)),
                graph,
                self.updates,
                state,
                expand=expand,
            )

    def data_sums(
        self,
        counts: Sequence[Tensor],
        evaluation: Evaluation,
        state: MStepState,
        values: Mapping[str, Tensor] | None = None,
        *,
        whole: bool = False,
    ) -> DataSums:
        """What an M-step asks of the data, as they are after an E-step.

        Args:
            counts: Expected counts per group.
            evaluation: The factors at the E-step.
            state: What lasts from one M-step to the next.
            values: The parameters at the E-step; those in the param store where None.
            whole: Whether the program has all data: what a run of it does is noted for the next.
        """

        def densities(values: Mapping[str, Tensor], groups: Sequence[int]) -> dict[int, Tensor]:
            try:
                if not noted:
                    return self.log_densities_at(values, groups)
                run, places = self.log_densities_at, evaluation.graph.parameters
                return state.replays.densities(values, groups, places, run)
            except Resized as error:  # a trial point: the search goes on without it
                if str(error) not in (*self.notes, *state.told):
                    state.told.append(str(error))
                    warn(str(error))
                raise

        graph, arguments = evaluation.graph, evaluation.arguments
        noted = whole and not self.compiled and not evaluation.solved
        if noted:
            now = values_of(graph.parameters) if values is None else values
            state.replays.begin(self.args, now, evaluation.tables)
        if not evaluation.solved:
            compiled = self.compiled
            return DataSums(graph, self.updates, counts, arguments, densities, values, compiled)
        own, weights, arguments = in_m_step(graph, counts, arguments, evaluation.solved)
        expected = self.expected_on(own, densities)
        # A latent at its mean is a factor, of which the updates were told that there is one.
        updates = at_other_rows(self.updates, own) if self.conjugates else self.updates
        return DataSums(own, updates, weights, arguments, expected, values)

    def expected_on(self, graph: FactorGraph, densities: Evaluate) -> Evaluate:
        """Log densities of groups at parameter values, expected ones where something is believed.

        Args:
            graph: That of an M-step.
            densities: Gives those of groups without a belief.
        """

        def expected(values: Mapping[str, Tensor], groups: Sequence[int]) -> Mapping[int, Tensor]:
            own = len(self.graph.groups)
            return expected_densities(graph, values, groups, densities, self._trace, own)

        return expected

    def searching(self) -> AbstractContextManager[None]:
        """An M-step, which may run the model at many trial points."""
        runs = any(isinstance(u.update, Gradient) for u in self.updates.values())
        return self.dependences.own_names() if runs and not self.compiled else nullcontext()

    def log_densities_at(
        self,
        values: Mapping[str, Tensor],
        groups: Sequence[int],
        outside: OutsideRows | None = None,
    ) -> dict[int, Tensor]:
        """Differentiable log densities of some groups at constrained values.

        Args:
            values: By name.
            groups: Their numbers.
            outside: What all parts of the data say of latents outside their rows.
        """
        if self.compiled:
            known = self.graph if outside is None else outside.on(self.graph)
            return {g: known.groups[g].thin().log_density_at(values) for g in groups}
        wanted = {name for g in groups for name in self.graph.groups[g].members}
        graph = self._trace(values=values, with_bindings=False, only=wanted)
        graph = graph if outside is None else outside.on(graph)
        by_site = {
            name: table
            for group in graph.groups
            if wanted.intersection(group.members)
            for name, table in zip(group.members, group.log_density().unbind(0), strict=True)
        }
        return {
            g: torch.stack([by_site[name] for name in self.graph.groups[g].members]) for g in groups
        }

    @fewer_collections()
    def _trace(
        self,
        values: Mapping[str, Tensor] | None = None,
        with_bindings: bool = True,
        only: Collection[str] | None = None,
    ) -> FactorGraph:
        whole = self.lines or self.conjugates
        graph = self.fresh_trace(values, None, with_bindings, only=None if whole else only)
        if self.lines:
            assert isinstance(self.model, GivenGaussians)
            with self.dependences.own_run():
                run = (self.model, self.args, self.kwargs, self.structure)
                read = parts_at(self.lines, *run, values)
            alike = Alike() if self.conjugates is None else self.conjugates.alike(self.lines)
            graph = integrated(graph, self.lines, read=read, alike=alike)
        return graph if self.conjugates is None else self.conjugates.integrated(graph)

    def fresh_trace(
        self,
        values: Mapping[str, Tensor] | None,
        random_seed: int | None,
        with_bindings: bool,
        detached: bool = False,
        only: Collection[str] | None = None,
        given: tuple[tuple, Structure] | None = None,
        runs: list[Run] | None = None,
    ) -> FactorGraph:
        """A trace of the model, its Gaussian latents at zero; at others where the run is noted.

        Args:
            values: Constrained values to trace at; the current ones where None.
            random_seed: Trace from another random state.
            with_bindings: Whether to read off how parameters reach the arguments.
            detached: Whether only the numbers of arguments and densities are of interest.
            only: Sites whose factors are asked for.
            given: Other arguments, and the skeleton of the model there.
            runs: Where the run itself is noted.
        """
        args, structure = given or (self.args, self.structure)
        model = self.model
        if runs is not None and isinstance(model, GivenGaussians):
            model = on_rows_of(model, structure)
            model = model.at(other_values(model))
        with self.dependences.own_run():
            return trace_graph(
                model,
                args,
                self.kwargs,
                structure,
                values=values,
                random_seed=random_seed,
                with_bindings=with_bindings,
                detached=detached,
                only=only,
                runs=runs,
            )

    def plan(self) -> Plan:
        """The decisions, as a value that prints."""
        structure = self.structure
        users = {f"{name}_unobserved": name for name in structure.masked_pairs}
        routes = self.routes
        if not isinstance(routes, LaterTuple) and not routes:
            own = has_components(without_values(self.model))
            routes = LaterTuple(lambda: routes_of(structure, own))
        kernel = self.kernel
        return Plan(
            routes,
            self.updates,
            self.contraction.cells,
            self.contraction.largest,
            self.compiled,
            LaterTuple(lambda: observations_of(structure)),
            structure.edges,
            self.notes,
            is_monotone=self.is_monotone,
            **kernel.in_plan(users),
            gives_up=gives_up(self.strategy),
            missing=self.graph.missing,
            exact=self.strategy is None,
        )
