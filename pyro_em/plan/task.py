"""What is wanted of a model, and how its enumerated run is noted and held to the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import pyro

from pyro_em.graph.bindings.signatures import KeptSelections
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.structure import Structure
from pyro_em.graph.trace import noted_run, trace_graph
from pyro_em.plan.routes import Route
from pyro_em.portable import StaysHere
from pyro_em.posteriors.strategies import EStepStrategy
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.dependences import Reading
from pyro_em.tracing.names import tensors_in
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.runs import Begin, Model, Run
from pyro_em.updates.update import Gradient, Update


class Noting(Enum):
    """What is noted of an enumerated run."""

    OPERATIONS = "what torch does"
    CALLS = "what the model asks of torch"
    BOTH = "both"


@dataclass(frozen=True, eq=False)
class Task(StaysHere):
    """A model, its data, and what is wanted of them.

    Attributes:
        model: The user's model, or the pair of it and a guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        requested: The user's updates, by parameter name or glob.
        gradient: The update of parameters without a closed form; L-BFGS if None.
        max_plate_nesting: As the user gave it.
        max_enumeration: The budget in cells.
        look_only: Whether only an E-step is wanted, so that bindings need not be read.
        strategy: Another E-step than the exact one.
        routes: Rows of the plan where a guide takes part.
    """

    model: Model
    args: tuple
    kwargs: dict[str, Any]
    requested: Mapping[str, Update]
    gradient: Gradient | None
    max_plate_nesting: int | None
    max_enumeration: int
    look_only: bool = False
    strategy: EStepStrategy | None = None
    routes: tuple[Route, ...] = ()

    @property
    def limit(self) -> int:
        """Cells that one operation of an enumerated run may make."""
        return max(self.max_enumeration, 2**20)

    def log(
        self, names: Mapping[str, Any], own: bool = False, noting: Noting = Noting.OPERATIONS
    ) -> OperationLog:
        """Notes for an enumerated run.

        Args:
            names: What the model's names stand for.
            own: Whether these are all names of the model that is run, which then need no other look.
            noting: What is noted.
        """
        # Who wants an E-step only does not need a list of what was read.
        reading = None
        if not self.look_only:
            reading = Reading(self.model, self.args, self.kwargs, names if own else None)
        store = pyro.get_param_store()._params
        given = [*store.items(), *tensors_in(names)]
        if noting is Noting.OPERATIONS:
            return OperationLog(given, reading)
        if noting is Noting.CALLS:
            return CallLog(given, reading)
        return CallLog(given, reading, OperationLog(given))


def run_of(task: Task, structure: Structure, log: OperationLog) -> Run:
    """An enumerated run, whose operations are noted and held to the budget.

    Args:
        task: The model with its data.
        structure: Its skeleton.
        log: Where the run is noted.
    """
    return noted_run(task.model, task.args, task.kwargs, structure, log, limit=task.limit)


def traced(
    task: Task,
    structure: Structure,
    log: OperationLog | None,
    looked: Mapping[str, Mapping[str, Any]] | None = None,
    kept: KeptSelections | None = None,
    begin: Begin | None = None,
    runs: list[Run] | None = None,
    detached: bool = False,
    may_part: bool = True,
) -> FactorGraph:
    """The graph of an enumerated run, whose operations are noted and held to the budget.

    Args:
        task: The model with its data.
        structure: Its skeleton.
        log: Where the run is noted, if anywhere.
        looked: The sites of a plain run, which this one has to agree with.
        kept: How earlier runs read off which elements of parameters arguments are.
        begin: How parameters get their first values in the run; None where they have values.
        runs: Where the run itself is noted.
        detached: Whether only the numbers of arguments and densities are of interest.
        may_part: Whether large data may be read some rows at a time.
    """
    return trace_graph(
        task.model,
        task.args,
        task.kwargs,
        structure,
        limit=task.limit,
        with_bindings=not task.look_only,
        looked=looked,
        log=log,
        kept=kept,
        begin=begin,
        runs=runs,
        detached=detached,
        may_part=may_part,
    )
