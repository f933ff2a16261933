"""The first parameters of a start: assignments of the latents by a rule, then an M-step.

The rules draw responsibilities at random, or by clusters of the observed vectors around rows that are
drawn far apart (`pyro_em.posteriors.starts.clusters` names the sources).
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.arguments import as_tensor
from pyro_em.errors import DegenerateError, UsageError, message, sites_in_words
from pyro_em.fitting.steps.guarded import Guarded
from pyro_em.graph.factors import FactorGraph
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.given_q import given_solutions
from pyro_em.plan.program import Program
from pyro_em.posteriors.answers.names import integrated_names
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.continuous.gaussian_steps import gaussians_in
from pyro_em.posteriors.gaussians.gaussian_product import drawn_from_prior
from pyro_em.posteriors.gaussians.integrated import Integrated, Solution
from pyro_em.posteriors.scales.scaled import ScaledSolution
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian
from pyro_em.posteriors.starts import clusters
from pyro_em.posteriors.starts.assignments import (
    Cluster,
    clustered_counts,
    given_counts,
    random_counts,
)
from pyro_em.posteriors.starts.vectors import Rows, rows_of

# Shares of every row that all clusters get: none; against exact zeros of the model that clusters
# contradict; against clusters too small for the parameters of a component.
_SHARES = (0.0, 1e-3, 0.1)


def _random_points(
    x: Tensor, weights: Tensor, size: int, generator: torch.Generator, labels: Tensor | None
) -> Tensor:
    """Responsibilities by distance to rows drawn far apart."""
    centres = clusters.spread_centres(x, weights, size, generator, labels)
    return clusters.with_labels(clusters.soft(x, weights, centres), labels)


def _nearest_points(
    x: Tensor, weights: Tensor, size: int, generator: torch.Generator, labels: Tensor | None
) -> Tensor:
    """Each row goes to the nearest of rows drawn far apart."""
    centres = clusters.spread_centres(x, weights, size, generator, labels)
    return clusters.with_labels(clusters.hard(x, centres), labels)


def _random_kmeans(
    x: Tensor, weights: Tensor, size: int, generator: torch.Generator, labels: Tensor | None
) -> Tensor:
    """One run of Lloyd's steps from rows drawn far apart."""
    centres = clusters.spread_centres(x, weights, size, generator, labels)
    return clusters.lloyd(x, weights, centres, labels)[0]


RULES: Mapping[str, Cluster] = {
    "kmeans": clusters.kmeans,
    "random points": _random_points,
    "nearest points": _nearest_points,
    "random k-means": _random_kmeans,
}


@dataclass(eq=False)
class Beginning:
    """Makes the first parameters of each start of a fit.

    Attributes:
        em: The map, which knows the model with its data as they are now.
        generator: Source of all random choices.
    """

    em: Guarded
    generator: torch.Generator

    _rows: tuple[FactorGraph, list[Rows]] | None = None

    @property
    def rows(self) -> list[Rows]:
        """The observed vectors of the latents; from start to start they change with the data only."""
        graph = self.em.program.graph
        if self._rows is None or self._rows[0] is not graph:
            self._rows = graph, rows_of(graph)
        return self._rows[1]

    def write(self, init: Any) -> None:
        """Write the first parameters of a start.

        Args:
            init: None leaves what is in the store; ``"random"``, ``"random hard"``, a clustering, or
                {site: assignments}.

        Raises:
            UsageError: If the start is not understood, or makes no sense for this model.
            DegenerateError: If the assignments determine no parameters.
        """
        if init is None:
            return
        program = self.em.program
        evaluation = self.em.sound.evaluate()
        if isinstance(init, str) and init in RULES:
            self._cluster(init)
            return
        if isinstance(init, str) and init in ("random", "random hard"):
            if not program.graph.latents and not gaussians_in(evaluation.solved):
                return
            counts = random_counts(
                evaluation.graph,
                program.contraction,
                evaluation.tables,
                generator=self.generator,
                hard=init == "random hard",
            )
            evaluation = _with_prior_draws(evaluation, self.generator)
        elif isinstance(init, Mapping):
            names = integrated_names(evaluation.graph)
            rest = {n: v for n, v in init.items() if n not in names}
            counts = given_counts(evaluation.graph, program.contraction, evaluation.tables, rest)
            evaluation = _with_values(evaluation, {n: init[n] for n in names if n in init})
        else:
            near = difflib.get_close_matches(str(init), [*RULES, "random", "random hard"], n=1)
            raise UsageError(
                message(
                    "init",
                    f"{init!r} is not understood"
                    + (f"; did you mean '{near[0]}'?" if near else "."),
                    fixes=[
                        "use None, 'random', 'random points', 'kmeans', or {site: labels or "
                        "probabilities}"
                    ],
                )
            )
        data = self.em.data
        if isinstance(init, Mapping) and data is not None and data.is_at_hand:
            data.m_step(counts, evaluation, self.em.state)
        else:
            program.m_step(counts, evaluation, self.em.state, expand=False)

    def write_for_all(self, init: Any) -> None:
        """Write the first parameters of a start where the data come in parts.

        One process makes them and all have them; assignments that the user gave are known of the
        rows of all processes.
        """
        data = self.em.data
        if data is None or (isinstance(init, Mapping) and data.is_at_hand):
            self.write(init)
        else:
            data.begin(lambda: self.write(init), self.generator)

    def _cluster(self, rule: str) -> None:
        program = self.em.program
        if not program.graph.latents and rule == "random k-means":
            return
        if not self.rows:
            raise UsageError(_no_rows(program, rule))
        state = self.generator.get_state()
        for share in _SHARES:
            self.generator.set_state(state)
            evaluation = self.em.sound.evaluate()
            try:
                counts = clustered_counts(
                    evaluation.graph,
                    program.contraction,
                    evaluation.tables,
                    self.rows,
                    RULES[rule],
                    generator=self.generator,
                    shared=share,
                )
                program.m_step(counts, evaluation, self.em.state, expand=False)
                return
            except (UsageError, DegenerateError):
                if share == _SHARES[-1]:
                    raise


def _with_prior_draws(evaluation: Evaluation, generator: torch.Generator) -> Evaluation:
    """The factors with Gaussian latents at draws from their prior."""
    drawn: dict[int, Integrated | ConjugateSolution | ScaledSolution] = dict(evaluation.solved)
    for g, solution in evaluation.solved.items():
        if isinstance(solution, ScaledSolution):
            assert isinstance(solution.gaussian, ScaledGaussian)
            values = drawn_from_prior(solution.gaussian.at, generator)
            drawn[g] = replace(solution, gaussian=values)
        elif not isinstance(solution, ConjugateSolution):
            assert isinstance(solution, Solution)
            drawn[g] = drawn_from_prior(solution, generator)
    return replace(evaluation, solved=drawn)


def _with_values(evaluation: Evaluation, given: Mapping[str, Any]) -> Evaluation:
    """The factors with Gaussian latents at values, or with distributions, that the user gave."""
    if not given:
        return evaluation
    as_given = {
        n: v
        if isinstance(v, torch.distributions.Distribution)
        else pyro.distributions.Delta(as_tensor(f"init['{n}']", v))
        for n, v in given.items()
    }
    return replace(evaluation, solved=given_solutions(evaluation, as_given, "init"))


def name_of_start(init: Any) -> str:
    """A start in words."""
    if init is None:
        return "values in the model"
    return init if isinstance(init, str) else "given: " + ", ".join(init)


def _no_rows(program: Program, rule: str) -> str:
    latents = list(program.graph.latents)
    if not latents:
        what, why = "the model has no latent that is summed.", "there is nothing to assign"
    else:
        what = f"no observed vector belongs to each row of {sites_in_words(latents)}."
        why = "clusters need at least two rows (elements of a latent's plates, or steps of a chain)"
    return message(
        f"init='{rule}'",
        what,
        why,
        ["use init='random'", "pass assignments: init={site: labels or probabilities}"],
    )
