"""A q that the user gives in place of the exact posterior: a posterior, or tables by site."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.arguments import shown
from pyro_em.errors import UsageError, message
from pyro_em.globs import listed
from pyro_em.plan.evaluation import Evaluation
from pyro_em.posteriors.answers.conjugate_faces import block_of, latents_in
from pyro_em.posteriors.answers.gaussian_faces import GaussianFaces
from pyro_em.posteriors.answers.names import integrated_names
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.answers.product import product_posterior
from pyro_em.posteriors.answers.regrouped import regrouped
from pyro_em.posteriors.conjugates.conjugate_given import conjugate_given
from pyro_em.posteriors.conjugates.conjugate_solution import ConjugateSolution
from pyro_em.posteriors.conjugates.stacked_conjugates import StackedConjugates
from pyro_em.posteriors.continuous.gaussian_steps import Solved, conjugates_in, gaussians_in
from pyro_em.posteriors.gaussians.gaussian_product import GaussianProduct, moments_given
from pyro_em.posteriors.gaussians.integrated import Integrated, Solution
from pyro_em.posteriors.scales.scaled import ScaledBlock, ScaledSolution
from pyro_em.posteriors.scales.scaled_gaussian import ScaledGaussian
from pyro_em.variational.drawn import DrawnPosterior


def check_q(q: Any, is_needed: bool = False) -> None:
    """Refuse what can be no posterior.

    Raises:
        UsageError: If it is neither a posterior of summed latents nor a mapping.
    """
    if isinstance(q, (Posterior, Mapping)) or (q is None and not is_needed):
        return
    draws = isinstance(q, DrawnPosterior)
    raise UsageError(
        message(
            "q",
            f"it is {shown(q)}, not a posterior of summed latents.",
            "a guide's draws are no table of probabilities" if draws else "",
            [
                "pass what em.posterior(...) returned on the same data",
                "pass {site: probabilities} for every summed latent: {'z': responsibilities}",
            ],
        )
    )


def given_solutions(evaluation: Evaluation, given: Mapping[str, Any], where: str = "q") -> Solved:
    """What stands for Gaussian latents: distributions of all that a component has, or their posterior.

    Args:
        evaluation: The factors at the parameters of the moment.
        given: Distributions by latent.
        where: The argument that they are.

    Raises:
        UsageError: If some of a component are given only, or a distribution does not fit.
    """
    out: dict[int, Integrated | ConjugateSolution | ScaledSolution] = dict(evaluation.solved)
    for g, known in conjugates_in(evaluation.solved).items():
        group = evaluation.graph.groups[g]
        for name in (n for n in latents_in(group) if n in given):
            block, before = block_of(group, name), out[g]
            if isinstance(group.nested, StackedConjugates):
                assert isinstance(before, ConjugateSolution)
                one = group.nested.solution_of(before, name)
                found = conjugate_given(block, one, given[name], where)
                out[g] = group.nested.with_one(before, name, found)
                continue
            found = conjugate_given(block, known, given[name], where)
            if isinstance(group.nested, ScaledBlock) and isinstance(before, ScaledSolution):
                own = group.nested.given_scale(found, evaluation.arguments[g])
                out[g] = replace(before, conjugate=found, gaussian=own)
            else:
                out[g] = found
    gaussian = gaussians_in(out)
    faces = GaussianFaces(evaluation.graph, gaussian, ())
    for g, solution in gaussian.items():
        names = {n: i for n, (at, i) in faces.places.items() if at == g}
        missing = [n for n in names if n not in given]
        if len(missing) == len(names):
            continue
        if missing:
            raise UsageError(
                message(
                    where,
                    f"distributions are missing for {listed(missing)}.",
                    "given Gaussian latents stand for all that are solved together with them",
                    [f"give distributions for: {listed(names)}", "leave all of them out"],
                )
            )
        at = solution.at if isinstance(solution, ScaledGaussian) else solution
        assert isinstance(at, Solution)
        means: dict[int, list[Tensor]] = {}
        covariances: dict[int, list[Tensor]] = {}
        for n, i in names.items():  # members of one site follow each other
            mean, covariance = moments_given(faces.group(n), faces.batch(n), given[n], where)
            means.setdefault(i, []).append(mean)
            covariances.setdefault(i, []).append(covariance)
        product = GaussianProduct(
            at,
            {i: torch.cat(m) for i, m in means.items()},
            {i: torch.cat(c) for i, c in covariances.items()},
        )
        both = out[g]
        out[g] = replace(both, gaussian=product) if isinstance(both, ScaledSolution) else product
    return out


def as_posterior(q: Posterior | Mapping[str, Any], evaluation: Evaluation) -> Posterior:
    """What the user gave, on the factors of an evaluation.

    Raises:
        UsageError: If it does not fit the model or its data.
    """
    if not isinstance(q, Posterior):
        gaussian = {n: q[n] for n in integrated_names(evaluation.graph) if n in q}
        rest = {n: p for n, p in q.items() if n not in gaussian}
        product = product_posterior(evaluation.graph, rest, evaluation.tables)
        return replace(product, solved=given_solutions(evaluation, gaussian))
    laid_out = regrouped(q, evaluation.graph)
    if laid_out is None:
        raise UsageError(
            message(
                "q",
                "the Posterior belongs to other data or another model.",
                "its factors differ in sites or sizes",
                ["compute it with em.posterior on the same arguments"],
            )
        )
    return laid_out
