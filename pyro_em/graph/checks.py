"""Findings about the layout of a model: its latents, shapes, scopes; each a `Finding` in four parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pyro_em.distributions import (
    broadcast_shape,
    has_finite_support,
    has_many_counts,
    is_discrete,
    unwrap,
)
from pyro_em.errors import DataError, Finding, ModelError


def latent_problems(
    name: str,
    site: Mapping[str, Any],
    children: Sequence[str],
    marginals: Callable[[str], tuple[str, ...]],
) -> list[Finding]:
    """A latent without an exact posterior.

    Args:
        name: The latent.
        site: The site as traced.
        children: The sites that it reaches.
        marginals: How to do without a latent, in sentences.
    """
    fn = site["fn"]
    if has_many_counts(fn):
        return [
            Finding(
                f"site '{name}'",
                "a latent Binomial whose total_count varies cannot be enumerated.",
                "its support differs from element to element",
                ("use one total_count", "use a Categorical over the values that matter"),
                latents=(name,),
            )
        ]
    if has_finite_support(fn):
        return []
    because = "other sites depend on it: " + ", ".join(repr(c) for c in children[:5])
    base, joined, _ = unwrap(fn)
    kind = type(base).__name__
    if joined and has_finite_support(base):
        return [
            Finding(
                f"site '{name}'",
                f"a latent vector of {kind} values (.to_event) cannot be enumerated.",
                "its values would be all combinations of its elements",
                (
                    "put its dimension into a pyro.plate instead of .to_event, if the elements are "
                    "independent given their parents",
                    "use one Categorical over the combinations that matter",
                ),
                latents=(name,),
            )
        ]
    if is_discrete(fn):
        return [
            Finding(
                f"site '{name}'",
                f"a latent {kind} has infinite support and cannot be enumerated.",
                because,
                (
                    *marginals(name),
                    "truncate it: a Categorical over the values 0 … K−1 that matter",
                    "give a guide that samples it: ExactPosteriorEM(model, guide)",
                    "observe it",
                ),
                latents=(name,),
            )
        ]
    return [
        Finding(
            f"site '{name}'",
            f"a continuous latent ({kind}) has no exact posterior here and no guide was given.",
            because,
            (
                *marginals(name),
                "give a guide: ExactPosteriorEM(model, guide), or a class: AutoNormal",
                "take a point estimate under its prior: ExactPosteriorEM(model, guide='map')",
                "let a network be the guide: ExactPosteriorEM(model, AutoAmortizedNormal)",
                "make it a parameter: pyro.param instead of pyro.sample",
            ),
            latents=(name,),
        )
    ]


def _laid_along(frames: Mapping[int, Any], value_shape: Sequence[int], dim: int) -> tuple[str, ...]:
    """The remedy for data that lie along another dimension than the plate of their size."""
    for own, frame in frames.items():
        there = value_shape[own] if len(value_shape) >= -own else 1
        if frame.size == value_shape[dim] and there == 1:
            shape = ", ".join(str(frame.size) if d == own else "1" for d in range(min(own, dim), 0))
            return (f"lay the data along plate '{frame.name}' (dim={own}): obs=x.reshape({shape})",)
    return ()


def _another_plate(batch: Sequence[int], value_shape: Sequence[int]) -> tuple[str, ...]:
    """The remedy for data with a dimension more than the plates have."""
    n = len(batch)
    if n != 1 or len(value_shape) != 2 or value_shape[0] != batch[0]:
        return ()
    return (
        f"add a plate of size {value_shape[-1]} with dim=-1, and give that of size {batch[0]} dim=-2",
        "if the last dimension holds the features of one observation: .expand(...).to_event(1)",
    )


def shape_problems(name: str, site: Mapping[str, Any]) -> list[Finding]:
    """A batch dimension outside every plate would silently meet an enumerated one."""
    fn = site["fn"]
    if not isinstance(site["value"], Tensor):
        return []
    frames = {f.dim: f for f in site["cond_indep_stack"] if f.dim is not None}
    batch, event_dim = fn.batch_shape, fn.event_dim
    value_shape = site["value"].shape
    where = f"site '{name}'"
    if site["is_observed"] and event_dim:
        if value_shape[-event_dim:] != fn.event_shape:
            return [
                Finding(
                    where,
                    f"the observed value has shape {tuple(value_shape)}, whose last "
                    f"{event_dim} dimension(s) should be {tuple(fn.event_shape)}.",
                    f"the distribution's event shape is {tuple(fn.event_shape)}",
                    ("pass data with that many features", "change the parameters' last dimension"),
                    DataError,
                )
            ]
        value_shape = value_shape[:-event_dim]
    try:
        shape = broadcast_shape(batch, value_shape) if site["is_observed"] else batch
    except ValueError:
        return [
            Finding(
                where,
                f"the observed value has batch shape {tuple(value_shape)}, the distribution "
                f"{tuple(batch)}; they do not broadcast.",
                "each element of a plate needs its own observation",
                (*_another_plate(batch, value_shape), "make the plate's size that of the data"),
                DataError,
            )
        ]
    problems = []
    for dim in range(-len(shape), 0):
        if shape[dim] == 1:
            continue
        own = batch[dim] if len(batch) >= -dim else 1
        if dim not in frames and own == 1:
            problems.append(
                Finding(
                    where,
                    f"the observed value has batch shape {tuple(value_shape)}, the distribution "
                    f"{tuple(batch)}: dimension {dim} of size {shape[dim]} is outside every plate.",
                    "it would be taken as repeated observations, or meet an enumerated dimension",
                    (
                        *_laid_along(frames, value_shape, dim),
                        f"wrap the site in pyro.plate(..., {shape[dim]}, dim={dim})",
                        ".to_event(1) if the last dimension holds the features of one observation",
                        *(
                            ("drop a dimension of size one from the data: x.squeeze(-1)",)
                            if value_shape[-1] == 1
                            else ()
                        ),
                    ),
                    DataError if frames else ModelError,
                )
            )
        elif dim not in frames:
            problems.append(
                Finding(
                    where,
                    f"batch dimension {dim} of size {shape[dim]} is outside every plate.",
                    "it would coincide with the dimension of an enumerated latent, and the evidence "
                    "would be wrong in silence",
                    (
                        f"wrap the site in pyro.plate(..., {shape[dim]}, dim={dim})",
                        ".to_event(n) if the dimension belongs to one observation",
                    ),
                )
            )
        elif frames[dim].size != shape[dim]:
            problems.append(
                Finding(
                    where,
                    f"plate '{frames[dim].name}' has size {frames[dim].size}, the site "
                    f"{shape[dim]} in dimension {dim}.",
                    "",
                    (
                        "make the plate's size that of the data's dimension",
                        ".to_event(1) if the last dimension holds the features of one observation",
                    ),
                    DataError,
                )
            )
    return problems


def read_from_outside(name: str, latent: str, plate: str) -> Finding:
    """A site outside a plate that reads a latent of the plate."""
    return Finding(
        f"site '{name}'",
        f"it reads latent '{latent}' of plate '{plate}' from outside that plate.",
        "all elements of the plate would be coupled: an enumeration of K to the power of the plate's "
        "size",
        (
            f"put '{name}' inside plate '{plate}'",
            f"write plate '{plate}' as a loop: for i in pyro.plate(name, size), with one site per "
            "element; the exact sum is then small where the plate is, or where each element reads "
            "only the one before",
            f"give a guide that draws '{latent}': ExactPosteriorEM(model, guide)",
        ),
        latents=(latent,),
    )


def scope_problems(
    name: str, scope: Sequence[str], plates: Mapping[str, Sequence[str]]
) -> list[Finding]:
    """A latent of a plate that is read from outside the plate."""
    problems = []
    for latent in scope:
        if latent == name or latent not in plates:
            continue
        outside = [p for p in plates[latent] if p not in plates[name]]
        if outside:
            problems.append(read_from_outside(name, latent, outside[0]))
    return problems
