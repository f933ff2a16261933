"""What two cheap runs say of a model, before its latents are enumerated.

A run as the model is written and one with tagged latents give its skeleton; all that is wrong with the
model is said here, together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from pyro_em.errors import DataError, Finding, ModelError, as_error, raise_findings
from pyro_em.graph.conjugate_children.conjugate_record import NotConjugate
from pyro_em.graph.findings.folded import Folded
from pyro_em.graph.gaussian_lines.lines import NotLinear
from pyro_em.graph.structure import Structure
from pyro_em.plan.conjugates import at_units
from pyro_em.plan.cost import budget_problems, contraction_from_structure
from pyro_em.plan.gaussians import with_values
from pyro_em.plan.long_tables import in_long_format
from pyro_em.plan.loops import examine_with_loops, examined_in_loops
from pyro_em.plan.task import Task
from pyro_em.plan.unrouted import Unrouted, are_of_routes, without_route
from pyro_em.posteriors.elimination import ContractionPlan


def examined(
    task: Task,
    first_look: bool,
    refused: Mapping[str, str],
    stepwise: bool = False,
    bare: Structure | None = None,
) -> Structure | Unrouted:
    """The skeleton of a model; where all that is wrong with it are latents without a route, those.

    Args:
        task: What is wanted.
        first_look: Whether the plain run may advance the random state.
        refused: Ways of reading the indices of vectorised loops that do not serve, and why.
        stepwise: Whether these loops are run over integers.
        bare: The skeleton of the user's model, where ``task`` is of one with some latents given.

    Raises:
        PyroEMError: If the model or its data cannot be used, with all findings.
    """
    run = task.model, task.args, task.kwargs
    how: dict[str, Any] = {
        "max_plate_nesting": task.max_plate_nesting,
        "first_look": first_look,
        "sparing": True,
        "max_enumeration": task.max_enumeration,
    }
    if bare is not None and bare.series is not None:
        structure, problems = examined_in_loops(*run, bare, **how)
    else:
        structure, problems = examine_with_loops(
            *run, refused=refused, stepwise=stepwise or bare is not None, **how
        )
    n_latent = sum(p.where.startswith("site") and "latent" in p.what for p in problems)
    too_dear: ContractionPlan | None = None
    try:
        sketch = structure.sketch
        cost = contraction_from_structure(sketch)
        found = budget_problems(sketch, cost, task.max_enumeration)
        too_dear = cost if found else None
    except ModelError as error:
        found = [] if problems else list(error.problems)
    problems[n_latent:n_latent] = found
    if are_of_routes(problems):
        if structure.series is None:
            structure = _without_draws(structure)
        return without_route(structure, as_error(problems), routes=task.routes, cost=too_dear)
    if problems:
        raise_findings(_without_integrable(task, structure, problems))
    return structure


def _without_draws(structure: Structure) -> Structure:
    """A structure whose unobserved sites have shapes in place of draws, which take memory."""
    sites = {
        name: {**site, "value": site["value"].new_zeros(()).expand(site["value"].shape)}
        if isinstance(site["value"], torch.Tensor)
        else site
        for name, site in structure.unobserved.items()
    }
    return replace(structure, looked=None, unobserved=sites)


def _without_integrable(
    task: Task, structure: Structure, problems: Sequence[Finding]
) -> Sequence[Finding]:
    """Findings without those on latents that may well be integrated once the others are mended."""
    try:
        both = with_values(task.model, structure), at_units(task.model, structure)
    except (NotLinear, NotConjugate):
        return problems
    gaussian, conjugate = both
    latents = set() if gaussian is None else set(gaussian.values)
    # Neither a conjugate prior nor an index tells that the model has no other fault.
    if all(p.latents or p.kind is DataError for p in problems):
        long = in_long_format(task, structure)
        latents |= set() if conjugate is None else set(conjugate[1])
        latents |= set() if long is None else {z for r in long.reads.values() for z in r.latents}
    return [p for p in problems if not (p.latents and set(p.latents) <= latents)] or problems


def folded(looked: Mapping[str, Mapping[str, Any]] | None) -> Folded | None:
    """The sites of a run with tags in little memory: the next run has sites of its own."""
    return None if looked is None else Folded(looked)


def without_sites(structure: Structure) -> Structure:
    """A structure without what runs traced: of a chain that is as much as the runs themselves."""
    if structure.series is not None:
        return replace(structure, looked=None)
    return replace(structure, looked=None, unobserved={})
