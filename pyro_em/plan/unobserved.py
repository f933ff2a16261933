"""Gaussian latents that no observation depends on: read from the model when moments are wanted."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from pyro_em.distributions import has_finite_support
from pyro_em.errors import Finding, UsageError, message
from pyro_em.globs import listed
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.gaussian_lines.lines import GAUSSIAN, NotLinear, is_gaussian
from pyro_em.graph.structure import Structure
from pyro_em.plan.continuous import integrating
from pyro_em.plan.gaussians import is_integrable
from pyro_em.plan.program import Program
from pyro_em.plan.task import Task
from pyro_em.portable import StaysHere
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.later_faces import LaterFaces
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.continuous.gaussian_components import NotSeparate
from pyro_em.posteriors.continuous.gaussian_steps import gaussians_in
from pyro_em.tracing.dependences import Dependences, Reading, changed_since
from pyro_em.tracing.given import GivenGaussians, without_values
from pyro_em.tracing.parameters import parameters_at, snapshot
from pyro_em.tracing.turns import Alone


def unobserved(program: Program, max_enumeration: int) -> LaterFaces | None:
    """Moments of Gaussian latents without observations, at the current parameters; None without such.

    Args:
        program: The program.
        max_enumeration: How many numbers the matrices of an E-step may have.
    """
    structure = program.structure
    hidden = {f"{n}_unobserved" for n in structure.masked_pairs}
    names = [n for n, k in structure.barren.items() if k in GAUSSIAN and n not in hidden]
    if not names or structure.random_plates:
        return None
    model = without_values(program.model)
    read = Reading(model, program.args, program.kwargs)
    leaves = [p.unconstrained for p in program.graph.parameters.values()]
    at = snapshot(program.graph.parameters)
    return LaterFaces(names, _Unobserved(program, at, read.finished(leaves), max_enumeration))


def with_unobserved(q: Posterior, later: LaterFaces | None) -> Posterior:
    """A posterior that answers for Gaussian latents without observations as well.

    Args:
        q: The E-step of a program.
        later: Their moments.
    """
    return q if later is None else replace(q, later=later)


@dataclass(frozen=True, eq=False)
class _Unobserved(StaysHere):
    """Works out the moments.

    Attributes:
        program: The model with its data.
        at: Its unconstrained parameters at the E-step.
        dependences: What the model reads.
        limit: How many numbers the matrices of an E-step may have.
    """

    program: Program
    at: Mapping[str, Tensor]
    dependences: Dependences
    limit: int

    def __call__(self, sites: Collection[str]) -> GaussianFaces:
        """See `pyro_em.posteriors.answers.later_faces.LaterFaces`."""
        if self.dependences.is_changed():
            raise UsageError(changed_since("posterior"))
        program, model = self.program, without_values(self.program.model)
        with Alone("posterior"):
            bare, _ = examine(
                model,
                program.args,
                program.kwargs,
                max_plate_nesting=program.structure.max_plate_nesting,
                first_look=False,
                max_enumeration=self.limit,
            )
            # Those that the store holds now, which may be others than at the E-step.
            at = {n: v for n, v in self.at.items() if n in bare.parameters}
            with parameters_at(bare.parameters, at, unconstrained=True):
                try:
                    q = self._with_values(bare, sites).posterior()
                except (NotLinear, NotSeparate) as error:
                    raise UsageError(_unknown(error.finding, sites)) from error
        return GaussianFaces(q.graph, gaussians_in(q.solved), q.cells)

    def _with_values(self, bare: Structure, sites: Collection[str]) -> Program:
        program, model = self.program, without_values(self.program.model)
        task = Task(
            model,
            program.args,
            program.kwargs,
            requested={},
            gradient=None,
            max_plate_nesting=program.structure.max_plate_nesting,
            max_enumeration=self.limit,
            look_only=True,
        )
        own = [n for n in bare.latents if is_gaussian(bare.unobserved[n]["fn"])]
        names = own if isinstance(program.model, GivenGaussians) else []
        names += _with_ancestors(bare, sites)  # of each step: this run is one over integers
        values = {
            n: bare.nothing_like(n).new_zeros(bare.unobserved[n]["value"].shape) for n in names
        }
        found = integrating(task, GivenGaussians(model, values), bare)
        if found is None:
            what = "the model has other sites when its latents have values."
            raise NotLinear(Finding("model", what, latents=tuple(sites)))
        return found


def _with_ancestors(bare: Structure, sites: Collection[str]) -> list[str]:
    """Latents without observations on which some depend, themselves included, in model order.

    Raises:
        NotLinear: If one of them is not Gaussian.
    """
    wanted = set(sites)
    for parent, child in reversed(bare.edges):
        if child in wanted and parent in bare.barren:
            wanted.add(parent)
    for name in wanted:
        if not is_integrable(bare.unobserved[name]):
            kind = bare.barren[name]
            finite = has_finite_support(bare.unobserved[name]["fn"])
            what = f"it is {'too large to enumerate' if finite else f'a {kind}'}."
            if name in sites:
                what = "it is masked, scaled, or not one Gaussian for each element of its plates."
            raise NotLinear(Finding(f"site '{name}'", what, latents=tuple(sites)))
    return [n for n in bare.barren if n in wanted]


def _unknown(finding: Finding, sites: Collection[str]) -> str:
    return message(
        f"the moments of {listed(sorted(sites))}",
        f"they have no closed form: {finding.where}: {finding.what}",
        "no observation depends on them, and their distribution is not Gaussian",
        ["take the moments of draws: em.predictive(..., num_samples=1000)"],
    )
