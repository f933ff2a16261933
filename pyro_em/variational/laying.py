"""Guide and model for arguments of one form: their skeleton, and values for what is integrated."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from pyro_em.errors import Finding, raise_findings
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.structure import Structure
from pyro_em.tracing.given import AtReferences
from pyro_em.tracing.runs import Model
from pyro_em.variational.broken_bounds import in_users_names
from pyro_em.variational.pair import Laid, Pair, Routing


def laid_out(
    pair: Pair, routing: Routing, args: tuple, kwargs: dict[str, Any], nesting: int | None
) -> Laid:
    """Look at a pair with these arguments.

    Args:
        pair: Guide and model.
        routing: The routes.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        nesting: Number of plate dimensions, as the user gave it.

    Raises:
        PyroEMError: If the pair cannot be used.
    """
    at = at_references(pair, routing)
    structure, problems = look_at_given(at, args, kwargs, nesting)
    if problems:
        raise_findings([in_users_names(p) for p in problems])
    return Laid(structure, pair, at.references if routing.gaussian else None, routing.kernels)


def at_references(model: Model, routing: Routing) -> AtReferences:
    """A model whose latents that are integrated have values."""
    units = {n: routing.kernels[n].unit for n in routing.gaussian if n in routing.kernels}
    return AtReferences(model, frozenset(n for n in routing.gaussian if n not in units), units)


def look_at_given(
    at: AtReferences,
    args: tuple,
    kwargs: dict[str, Any],
    nesting: int | None,
    max_enumeration: int = 2**27,
    *,
    sparing: bool = False,
) -> tuple[Structure, list[Finding]]:
    """The skeleton of a pair with values for some continuous latents, and all findings.

    Args:
        at: The pair; its values are noted in it.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        nesting: Number of plate dimensions, as the user gave it.
        max_enumeration: The budget in cells.
        sparing: Whether large latents may be looked at without numbers; their arguments are then not
            validated.
    """
    structure, problems = examine(
        at if at.gaussian or at.units else at.model,
        args,
        kwargs,
        max_plate_nesting=nesting,
        first_look=False,
        guide_given=True,
        sparing=sparing,
        max_enumeration=max_enumeration,
    )
    reading = {child for parent, child in structure.edges if parent in at.gaussian}
    return replace(structure, lines=at.gaussian | reading), problems
