"""A model that is another one when its latents are enumerated: it is refused.

An enumerated run is compared with a plain one (`pyro_em.graph.findings.agreement`), and where the model
reduces whole latents with plain runs at both ends of their supports.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_em.errors import raise_findings
from pyro_em.graph.clamps import with_labels
from pyro_em.graph.findings.agreement import differing, disagreements, other_model
from pyro_em.graph.structure import Structure
from pyro_em.tracing.randomness import seeded
from pyro_em.tracing.runs import Model, held_run
from pyro_em.tracing.sites import Role, role_of


def require_same(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    sites: Mapping[str, dict[str, Any]],
    structure: Structure,
    looked: Mapping[str, Mapping[str, Any]],
    forms: Mapping[str, Hashable | None],
    parts: Mapping[int, tuple[int, Tensor]] | None,
) -> None:
    """Refuse a model that is another one when its latents are enumerated.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sites: The sites of an enumerated run.
        structure: The skeleton.
        looked: The sites of a plain run.
        forms: Of the enumerated sites.
        parts: For each dimension of which the plain run has a part: its size, and which elements.

    Raises:
        ModelError: If a site is not what the model computes for the same values.
    """
    with torch.no_grad():
        nesting = structure.max_plate_nesting
        if structure.clamped:
            looked = with_labels(looked, structure.clamped)
        off = disagreements(sites, looked, structure.latents, nesting, forms, parts)
        if not off and structure.joined and not parts:
            off = _off_elsewhere(model, args, kwargs, sites, structure, looked, forms)
        if not off:
            return
        # What the model draws at random, or keeps from run to run, differs by itself.
        held = _held(structure, looked)
        runs = []
        for seed in (23, 24):
            with seeded(seed):
                runs.append(held_run(model, args, kwargs, held))
        by_itself = {name for name, _ in differing(runs[0], runs[1], [name for name, _ in off])}
    problems = [
        other_model(name, what, [z for z in structure.sites[name].scope if z != name])
        for name, what in off
        if name not in by_itself
    ]
    if problems:
        raise_findings(problems)


def _off_elsewhere(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    sites: Mapping[str, dict[str, Any]],
    structure: Structure,
    looked: Mapping[str, Mapping[str, Any]],
    forms: Mapping[str, Hashable | None],
) -> list[tuple[str, str]]:
    """Sites that differ where latents are at the ends of their supports, or beside them.

    A largest value, a sum, whether any is true: of all values of an enumerated latent together it may
    be by chance what it is of the one value of a plain run.
    """
    held, supports = _held(structure, looked), dict[str, Tensor]()
    for name in structure.joined & held.keys() & set(structure.latents):
        fn = sites[name]["fn"]
        support = fn.enumerate_support(expand=False).detach()
        supports[name] = support.reshape(len(support), *fn.event_shape)
    most = max((len(s) for s in supports.values()), default=0)
    for k in (0, -1, 1, 2)[:most]:
        at = {n: s[min(k, len(s) - 1)].expand(held[n].shape) for n, s in supports.items()}
        try:
            run = held_run(model, args, kwargs, {**held, **at})
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError):
            continue  # these values lead elsewhere
        plain = with_labels(run, structure.clamped)
        off = disagreements(
            sites, plain, structure.latents, structure.max_plate_nesting, forms, None
        )
        if off:
            return off
    return []


def _held(structure: Structure, looked: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """The values of all latents in a plain run, without tags."""
    drawn = (Role.LATENT, Role.GUIDE)
    held = {n: s["value"] for n, s in looked.items() if role_of(s) in drawn}
    return {**structure.kept_values, **{n: getattr(v, "_t", v) for n, v in held.items()}}
