"""EM as a map: θ → EM(θ), an M-step and the E-step at what it found.

`ByTracing` steps through tables of all cells, by running the model where that is needed; it serves
every model and judges whatever is out of the ordinary. `pyro_em.fitting.steps.em_on_sums.OnSums` steps
on sums over the data. Both start from a `Point` and lead to one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from pyro_em.errors import message, warn
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.point import PartsPoint, Point, TracedPoint, Values
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.part import Made
from pyro_em.plan.program import Program
from pyro_em.tracing.parameters import restore, snapshot, values_of, write
from pyro_em.tracing.randomness import random_state
from pyro_em.updates.expectations.statistics import dot, expected_log_joint
from pyro_em.updates.m_step import MStepState


class EMMap(Protocol):
    """One way to make an EM step."""

    def e_step(self, values: Values | None = None, index: int = 0) -> Point:
        """The E-step at some values; at those in the param store where None.

        Args:
            values: Constrained parameter values by name.
            index: The number of the step that the E-step begins.
        """
        ...

    def m_step(self, point: Point) -> tuple[Values, float]:
        """The values after the M-step from a point, and the bound ELBO(q, θ_new) there, in nats."""
        ...

    def step(self, point: Point, index: int = 0) -> tuple[Point, float]:
        """The M-step from a point, and the E-step at the new values.

        Args:
            point: The point.
            index: The number of the step.

        Returns:
            The new point, and the bound ELBO(q, θ_new) between the two, in nats.
        """
        ...


class ByTracing:
    """EM steps through tables of all cells; the parameters in the param store are always the point's.

    Args:
        program: The model with its data.
        state: What lasts from one M-step to the next.
        remembers: Whether points say what they were made from.

    Attributes:
        program: The same at its latest trace.
    """

    def __init__(
        self, program: Program, state: MStepState | None = None, remembers: bool = False
    ) -> None:
        self.program, self.state = program, MStepState() if state is None else state
        self.remembers = remembers

    def evaluate(self) -> Evaluation:
        """The factors at the parameters in the param store."""
        evaluation = self.program.evaluate()
        self.program = self.program.following(evaluation)
        return evaluation

    def e_step(self, values: Values | None = None, index: int = 0) -> TracedPoint:
        """See `EMMap.e_step`; the values are written into the param store."""
        if values is not None:
            write(self.program.graph.parameters, values)
        made = self._made_from(index) if self.remembers else None
        evaluation = self.evaluate()
        q = self.program.e_step(evaluation, index)
        point = TracedPoint(values_of(self.program.graph.parameters), evaluation, q)
        point.made = made
        return point

    def _made_from(self, index: int) -> Made:
        random = random_state() if self.program.may_draw else None
        return Made(snapshot(self.program.graph.parameters), index, random)

    def m_step(self, point: Point) -> tuple[Values, float]:
        """See `EMMap.m_step`; the values are in the param store."""
        self.program.m_step(point.q.counts, point.evaluation, self.state)
        bound = after_m_step(point, self.evaluate().tables)
        return values_of(self.program.graph.parameters), bound

    def step(
        self,
        point: Point,
        index: int = 0,
        confirm: Callable[[], None] | None = None,
    ) -> tuple[TracedPoint, float]:
        """See `EMMap.step`; if it breaks, the parameters are as before.

        Args:
            point: The point.
            index: The number of the step.
            confirm: Called after the M-step; raises where what it sees is not what was expected.
        """
        origin = snapshot(self.program.graph.parameters)
        try:
            report = self.program.m_step(point.q.counts, point.evaluation, self.state)
            if confirm is not None:
                confirm()
            reached = self.e_step(index=index + 1)
        except BaseException:
            restore(self.program.graph.parameters, origin)
            raise
        reached.massless = report.massless
        return reached, after_m_step(point, reached.evaluation.tables)

    def judged(self, point: SumsPoint) -> TracedPoint:
        """A point on sums with tables."""
        return point.judged()

    def has_fallen(self, before: Point, after: Point, allowed: float) -> bool:
        """Whether the objective fell by more than rounding; it is reported."""
        return has_fallen(self.program, before, after, allowed)


def after_m_step(before: Point, tables: Sequence[Tensor]) -> float:
    """ELBO(q, θ_new) in nats, from the E-step before and the log densities after the M-step.

    Of the discrete latents: Gaussian ones are integrated in the log densities.
    """
    return expected_log_joint(before.q.counts, tables) + before.q.entropy_value


def has_fallen(program: Program, before: Point, after: Point, allowed: float) -> bool:
    """Whether the objective fell by more than rounding, which EM rules out.

    A fall is reported with the site that did it.
    """
    old, new = before.objective, after.objective
    if new >= old - allowed or not program.is_monotone:
        return False
    losses = {}
    for g in range(len(program.graph.groups)):
        change = float(dot(before.q.counts[g], after.evaluation.tables[g])) - float(
            dot(before.q.counts[g], before.evaluation.tables[g])
        )
        losses[g] = change
    worst = min(losses, key=losses.__getitem__)
    group = program.graph.groups[worst]
    names = ", ".join(f"'{n}'" for n in group.params) or "none"
    warn(
        message(
            f"site '{group.members[0]}', parameters {names}",
            f"the {program.objective_name} fell from {old:.9g} to {new:.9g}; the expected log joint "
            f"of this site changed by {losses[worst]:.3g}. The parameters before the fall were kept.",
            "an exact EM step cannot do that: rounding, or a model that hides a dependence",
            ["use float64", "avoid detach and branches on parameters in the model"],
        ),
    )
    return True


def values_at(point: Point) -> Values:
    """The parameter values of a point that has them."""
    assert isinstance(point, (TracedPoint, SumsPoint, PartsPoint))
    return point.values
