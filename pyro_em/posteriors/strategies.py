"""Other E-steps than the exact one: hard, Monte Carlo, annealed; each a value that users pass.

All of them hand the same M-step a q(z) over the summed latents:

* `Hard`: q puts all mass on ẑ = argmax_z p(x, z; θ); the bound log p(x, ẑ; θ) never falls.
* `MonteCarlo`: q is the empirical distribution of exact posterior draws; no bound is monotone.
* `Annealed`: q(z) ∝ p(x, z; θ)^β with β rising to one; exact EM once β = 1.

Source: Celeux and Govaert (1992) for classification EM; Wei and Tanner (1990) for Monte Carlo EM;
Ueda and Nakano (1998) for deterministic annealing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from pyro_em.arguments import number
from pyro_em.errors import UsageError, message
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import Tables, e_step, largest_cells
from pyro_em.posteriors.exact import exact_posterior, wrapped
from pyro_em.posteriors.sampling import draw_cells
from pyro_em.updates.expectations.statistics import expected_log_joint


@dataclass(frozen=True)
class Hard:
    """Hard EM: each E-step takes the jointly most probable assignment of all summed latents.

    With equal and fixed weights and scale a spherical Gaussian mixture becomes k-means. The bound
    log p(x, ẑ; θ) never falls; the evidence may.

    Example:
        >>> Hard()
        Hard()
    """


@dataclass(frozen=True)
class MonteCarlo:
    """Monte Carlo EM: expectations are averages over draws instead of exact sums.

    Discrete latents are drawn from their exact posterior; continuous ones from the guide, weighted
    by importance.

    Attributes:
        num_samples: Draws per E-step.

    Example:
        >>> MonteCarlo(10).num_samples
        10
    """

    num_samples: int

    def __post_init__(self) -> None:
        n = self.num_samples
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise UsageError(
                message(
                    "MonteCarlo", f"num_samples={n!r} is no number of draws.", fixes=["pass 10"]
                )
            )


@dataclass(frozen=True)
class Annealed:
    """Deterministic annealing: q(z) ∝ p(x, z; θ)^β with β from a schedule, exact EM after it.

    Attributes:
        schedule: β per step, each in (0, 1]; or a function of the step (0 for the first).

    Example:
        >>> Annealed([0.2, 0.5, 0.8]).beta(1), Annealed([0.2, 0.5, 0.8]).beta(3)
        (0.5, 1.0)
    """

    schedule: Sequence[float] | Callable[[int], float]

    def __post_init__(self) -> None:
        words = isinstance(self.schedule, str)
        if not callable(self.schedule) and (words or not isinstance(self.schedule, Sequence)):
            raise UsageError(
                message(
                    "Annealed",
                    f"schedule={self.schedule!r} is neither a sequence nor a function.",
                    fixes=["pass β per step: Annealed([0.2, 0.5, 0.8])"],
                )
            )
        if not callable(self.schedule):
            object.__setattr__(self, "schedule", tuple(map(_beta, self.schedule)))
            for step in range(len(self.schedule)):
                self.beta(step)

    def beta(self, step: int) -> float:
        """The inverse temperature of a step.

        Raises:
            UsageError: If it is outside (0, 1].
        """
        if callable(self.schedule):
            value = _beta(self.schedule(step))
        else:
            value = self.schedule[step] if step < len(self.schedule) else 1.0
        if not 0 < value <= 1:
            raise UsageError(
                message(
                    "Annealed",
                    f"β = {value} at step {step} is outside (0, 1].",
                    "β = 1 is the exact posterior, β → 0 the uniform one",
                )
            )
        return value


def _beta(value: Any) -> float:
    return number("Annealed", "β", value)


EStepStrategy = Hard | MonteCarlo | Annealed


def gives_up(strategy: EStepStrategy | None) -> str:
    """What a strategy does without, in words for the plan."""
    match strategy:
        case Hard():
            return (
                "Hard(): one assignment instead of a posterior; raises log p(x, z) at it, not the "
                "evidence."
            )
        case MonteCarlo(num_samples=n):
            return (
                f"MonteCarlo({n}): averages over {n} draws instead of sums; no step is sure to rise, "
                "a fit ends at max_steps."
            )
        case Annealed():
            return (
                "Annealed(): the posterior to a power below one until the schedule ends; the "
                "evidence may fall meanwhile."
            )
        case _:
            return ""


def e_step_of(
    strategy: EStepStrategy | None,
    graph: FactorGraph,
    plan: ContractionPlan,
    tables: Tables,
    step: int,
) -> Posterior:
    """The q(z) of a strategy; the exact posterior where there is none.

    Args:
        strategy: What the user asked for.
        graph: The factor graph.
        plan: Its elimination order.
        tables: Log densities per group.
        step: Number of the step, for schedules.
    """
    match strategy:
        case Hard():
            return _hard(graph, plan, tables)
        case MonteCarlo(num_samples=n):
            return _monte_carlo(graph, plan, tables, n)
        case Annealed() if strategy.beta(step) < 1:
            return _annealed(graph, plan, tables, strategy.beta(step))
        case _:
            return exact_posterior(graph, plan, tables)


def _hard(graph: FactorGraph, plan: ContractionPlan, tables: Tables) -> Posterior:
    result = largest_cells(graph, plan, tables)
    if not math.isfinite(float(result.log_evidence)):
        exact_posterior(graph, plan, tables)  # says what is impossible
    return wrapped(graph, plan, tables, result.cells, bound=float(result.log_evidence), entropy=0.0)


def _monte_carlo(graph: FactorGraph, plan: ContractionPlan, tables: Tables, n: int) -> Posterior:
    exact = exact_posterior(graph, plan, tables)
    assert exact.bound is not None
    cells = draw_cells(graph, plan, tables, n, None)
    q = wrapped(graph, plan, tables, cells, bound=exact.bound, entropy=0.0)
    # The draws stand for the exact posterior: its entropy completes the bound.
    entropy = exact.bound - expected_log_joint(q.counts, tables)
    return replace(q, entropy_value=entropy, log_evidence=exact.log_evidence)


def _annealed(graph: FactorGraph, plan: ContractionPlan, tables: Tables, beta: float) -> Posterior:
    cooled = []
    for group, table in zip(graph.groups, tables, strict=True):
        # 0 · −inf must stay −inf: structural zeros are impossible at every temperature.
        cool = torch.where(table == -torch.inf, table, beta * table)
        if group.mask is not None and not group.observed:
            # What does not count sums to one, at every temperature.
            cool = torch.where(group.mask.expand(table.shape), cool, table)
        cooled.append(cool)
    result = e_step(graph, plan, cooled)
    q = wrapped(graph, plan, tables, result.cells, bound=0.0, entropy=0.0)
    expected = expected_log_joint(q.counts, tables)
    entropy = float(result.log_evidence) - beta * expected
    return replace(q, bound=expected + entropy, entropy_value=entropy)
