"""EM steps through tables where the data come in parts: each part is visited, and says what adds up.

An M-step asks the parts for sums, as often as its updates need them; a part makes its E-step again each
time, so that no part outlives its turn.
"""

from __future__ import annotations

from collections.abc import Callable

from pyro_em.errors import message, warn
from pyro_em.fitting.steps.em_on_sums import SumsPoint
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.point import PartsPoint, Point, Values
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.part import Made, Summary, Totals
from pyro_em.plan.program import Program
from pyro_em.posteriors.continuous.gaussian_steps import for_updates
from pyro_em.reduction.seen_as import SeenAs
from pyro_em.tracing.parameters import restore, snapshot, values_of, write
from pyro_em.updates.m_step import MStepReport, MStepState, m_step_over


class ByParts:
    """EM steps over parts of the data; the parameters in the param store are always the point's.

    Args:
        data: The parts.
        state: What lasts from one M-step to the next.

    Attributes:
        program: The part at hand.
    """

    def __init__(self, data: Parted, state: MStepState) -> None:
        self.data, self.state = data, state
        self.program: Program = data.lead

    def evaluate(self) -> Evaluation:
        """The factors of the part at hand, for starts."""
        return self.program.evaluate()

    def e_step(self, values: Values | None = None, index: int = 0) -> PartsPoint:
        """See `EMMap.e_step` in `em_map`; the values are written into the param store."""
        if values is not None:
            write(self.program.graph.parameters, values)
        totals = self._totals()
        found = self.data.over.sum(lambda part: part.summary(index, None, totals))
        return self._point(found, index, totals)

    def m_step(self, point: Point) -> tuple[Values, float]:
        """See `pyro_em.fitting.steps.em_map.EMMap.m_step`; the values are in the param store."""
        assert isinstance(point, PartsPoint)
        self._updated(point)
        made, totals = point.made, self._totals()
        found = self.data.over.sum(lambda part: part.summary(made.index, made, totals))
        return values_of(self.program.graph.parameters), found.after_m_step

    def step(
        self, point: Point, index: int = 0, confirm: Callable[[], None] | None = None
    ) -> tuple[PartsPoint, float]:
        """See `pyro_em.fitting.steps.em_map.ByTracing.step`."""
        assert isinstance(point, PartsPoint)
        parameters = self.program.graph.parameters
        origin = snapshot(parameters)
        try:
            report = self._updated(point)
            if confirm is not None:
                confirm()
            totals = self._totals()
            found = self.data.over.sum(lambda part: part.summary(index + 1, point.made, totals))
        except BaseException:
            restore(parameters, origin)
            raise
        reached = self._point(found, index + 1, totals)
        reached.massless = report.massless
        return reached, found.after_m_step

    def judged(self, point: SumsPoint) -> PartsPoint:
        """A point on sums as one of this map."""
        reached = self.e_step(point.values)
        reached.massless = point.massless
        return reached

    def has_fallen(self, before: Point, after: Point, allowed: float) -> bool:
        """Whether the objective fell by more than rounding, which EM rules out; it is reported."""
        if after.objective >= before.objective - allowed or not self.program.is_monotone:
            return False
        warn(
            message(
                "fit",
                f"the {self.program.objective_name} fell from {before.objective:.9g} to "
                f"{after.objective:.9g}. The parameters before the fall were kept.",
                "an exact EM step cannot do that: rounding, a model that hides a dependence, or data "
                "that are not the same in each pass",
                ["use float64", "let every pass over the data give the same rows"],
            ),
        )
        return True

    def _totals(self) -> Totals:
        """What the parts say together of latents outside their rows, at the parameters."""
        if not self.data.has_shared:
            return {}
        return self.data.over.sum(lambda part: part.naturals())

    def _point(self, found: Summary, index: int, totals: Totals) -> PartsPoint:
        parameters = self.program.graph.parameters
        made = Made(snapshot(parameters), index, totals=totals)
        return PartsPoint(values_of(parameters), made, found, self.data.how)

    def _updated(self, point: PartsPoint) -> MStepReport:
        parts = SeenAs(self.data.over, lambda part: part.data_sums(point.made, self.state))
        graph = for_updates(self.program.graph)
        with self.program.searching():
            report = m_step_over(lambda: parts, graph, self.program.updates, self.state)
        parameters = self.program.graph.parameters
        restore(parameters, self.data.over.alike(snapshot(parameters)))
        return report
