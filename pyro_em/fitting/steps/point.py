"""Points: parameter values with the E-step there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pyro_em.errors import UsageError, message
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.part import Made, Summary
from pyro_em.posteriors.answers.posterior import Posterior

Values = Mapping[str, Tensor]


class Point:
    """Where EM stands: some parameter values, and the E-step at them.

    Attributes:
        evaluation: The factors at the values.
        q: The E-step there.
        massless: Per parameter the components that had no mass in the M-step before.
        objective: What EM raises: ELBO(q, θ), the evidence plus the log prior where q is exact.
        log_evidence: log p(x; θ) in nats, where the E-step computed it.
        noise: How far rounding may carry the objective, in nats, beyond that of a sum.
    """

    evaluation: Evaluation
    q: Posterior
    massless: Mapping[str, tuple[int, ...]]
    objective: float
    log_evidence: float | None
    noise: float = 0.0


class TracedPoint(Point):
    """A point whose E-step kept tables of all cells.

    Args:
        values: Constrained parameter values by name.
        evaluation: The factors there.
        q: The E-step.
        massless: Components without mass in the M-step before.

    Attributes:
        made: What it was made from, where somebody wants to know.
    """

    made: Made | None = None

    def __init__(
        self,
        values: Values,
        evaluation: Evaluation,
        q: Posterior,
        massless: Mapping[str, tuple[int, ...]] | None = None,
    ) -> None:
        self.values, self.evaluation, self.q = values, evaluation, q
        assert q.bound is not None
        self.objective, self.log_evidence = q.bound, q.log_evidence
        self.massless = massless or {}


class PartsPoint(Point):
    """A point whose data come in parts: what all of them say is known, and no tables.

    Args:
        values: Constrained parameter values by name.
        made: What the E-step was made from, for another look at a part.
        summary: What the E-step says.
        how: How the data are parted, in words.
    """

    def __init__(self, values: Values, made: Made, summary: Summary, how: str) -> None:
        self.values, self.made, self.how = values, made, how
        self.objective, self.log_evidence = summary.bound, summary.log_evidence
        self.log_prior = summary.bound - summary.log_evidence
        self.massless = {}

    @property
    def q(self) -> Posterior:  # type: ignore[override]
        """There is none of all data at once.

        Raises:
            UsageError: Always.
        """
        raise UsageError(no_posterior(self.how))


def no_posterior(how: str) -> str:
    """The sentence on a posterior of data in parts.

    Args:
        how: How the data are parted, in words.
    """
    return message(
        "posterior",
        f"the data of this fit were given {how}.",
        "the posterior of all rows would be as large as all of the data",
        ["ask for that of some rows: em.posterior(rows)"],
    )


class LeftPoint(Point):
    """What is remembered of a point whose tables are not needed any more.

    Args:
        massless: Components without mass in the M-step before.
        objective: What EM raises there, in nats.
        log_evidence: log p(x; θ) in nats, where it was computed.
    """

    def __init__(
        self,
        massless: Mapping[str, tuple[int, ...]],
        objective: float,
        log_evidence: float | None,
    ) -> None:
        self.massless = massless
        self.objective, self.log_evidence = objective, log_evidence

    @classmethod
    def of(cls, at: Point) -> LeftPoint:
        """What is remembered of a point."""
        return cls(at.massless, at.objective, at.log_evidence)
