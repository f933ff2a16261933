"""Findings about a guide beside its model, each as a `Finding` in four parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro.distributions as dist
import torch

from pyro_em.distributions import (
    depends_on_tensors,
    has_finite_support,
    is_discrete,
    is_outside,
    support_size_of,
    unwrap,
)
from pyro_em.errors import Finding
from pyro_em.graph.structure import Structure
from pyro_em.tracing.sites import Role, frames_of, is_auxiliary
from pyro_em.variational.guide import GuideLook, is_plain_delta


def no_route(structure: Structure, name: str, not_exact: Finding | None = None) -> Finding:
    """The finding about a latent that needs a guide and that the guide lacks.

    Args:
        structure: The model's.
        name: The latent.
        not_exact: Why it is not integrated, if it is Gaussian.
    """
    info = structure.sites[name]
    if info.is_discrete:
        return Finding(
            f"site '{name}'",
            f"the guide lacks it, and a discrete latent of infinite support ({info.distribution}) "
            "has no exact posterior here.",
            "point estimates and Pyro's autoguides are for continuous latents",
            (
                f"write a guide that draws it: pyro.sample('{name}', dist.Poisson(...))",
                "truncate it: a Categorical over the values 0 … K−1 that matter",
            ),
            latents=(name,),
        )
    return Finding(
        f"site '{name}'",
        f"the guide lacks it, and a continuous latent ({info.distribution}) has no exact posterior "
        "here.",
        "every latent needs a route: an exact sum, a point estimate or a guide"
        + ("" if not_exact is None else f"; {not_exact.where}: {not_exact.what.rstrip('.')}"),
        (
            f"add pyro.sample('{name}', ...) to the guide",
            "pass guide='map' for point estimates, or a class for all: AutoNormal",
            *(
                ("let a network do it: ExactPosteriorEM(model, AutoAmortizedNormal)",)
                if set(info.plates) & set(structure.data_plates)
                else ()
            ),
        ),
        latents=(name,),
    )


def pair_problems(structure: Structure, guide: GuideLook) -> list[Finding]:
    """Findings about guide sites that are no draws of the model's latents."""
    problems = []
    for name, site in guide.sites.items():
        if name in structure.barren or is_auxiliary(site):
            continue
        if name not in structure.sites:
            known = ", ".join(f"'{n}'" for n in (*structure.latents, *structure.barren)) or "none"
            problems.append(
                Finding(
                    f"guide site '{name}'",
                    f"the model has no such site; its latents are: {known}.",
                    "a guide is a distribution over the model's latents",
                    (
                        "give it the name of the model's site",
                        "mark it as auxiliary: infer={'is_auxiliary': True}",
                    ),
                )
            )
            continue
        if structure.sites[name].role is Role.DATA:
            problems.append(
                Finding(
                    f"guide site '{name}'",
                    "the model observes this site.",
                    "a guide is a distribution over what is not observed",
                    ("leave it out of the guide when it is observed: `if y is None: ...`",),
                )
            )
            continue
        of_plates = _plate_problems(structure, name, site)
        problems.extend(of_plates or _kind_problems(structure, name, site))
    return problems


def _kind_problems(structure: Structure, name: str, site: Mapping[str, Any]) -> list[Finding]:
    """A draw of another kind than the model's latent, or with values that the latent lacks."""
    fn, prior = site["fn"], structure.unobserved[name]["fn"]
    drawn = structure.unobserved[name]["value"]
    latent = type(unwrap(prior)[0]).__name__
    fixes: tuple[str, ...] = (f"draw it from a distribution of the kind of {latent}",)
    what = ""
    if is_plain_delta(site):
        if site["mask"] is None and _is_outside(prior, site["value"]):
            what = f"its point estimate is outside the support of {latent}: {prior.support}."
            fixes = (
                "give the parameter the constraint of the support: pyro.param(..., constraint=...)",
                "pass guide='map'",
            )
    elif type(unwrap(fn)[0]) is not dist.Delta:
        family, size = type(unwrap(fn)[0]).__name__, structure.sites[name].support_size
        finite = size is not None and has_finite_support(fn)
        if is_discrete(fn) is not is_discrete(prior):
            kinds = "continuous", "discrete"
            what = (
                f"{family} is {kinds[is_discrete(fn)]}, the model's {latent} "
                f"{kinds[is_discrete(prior)]}."
            )
        elif tuple(fn.event_shape) != tuple(prior.event_shape):
            what = f"its event shape is {tuple(fn.event_shape)}, the model's "
            what += f"{tuple(prior.event_shape)}."
        elif finite and site["value"].is_floating_point() is not drawn.is_floating_point():
            what = f"{family} and the model's {latent} have values of different types."
        elif finite and (many := support_size_of(fn)) is not None and many > (size or 0):
            what = f"it has {many} values, the model's {latent} {size}."
            fixes = (f"leave out what the model lacks: {size} values",)
    if not what:
        return []
    why = "the guide's draw could not be the model's latent"
    return [Finding(f"guide site '{name}'", what, why, fixes)]


def _plate_problems(structure: Structure, name: str, site: Mapping[str, Any]) -> list[Finding]:
    info = structure.sites[name]
    frames = frames_of(site)
    for plate, frame in frames.items():
        known = structure.plates.get(plate)
        if known is not None and (known.size != frame.size or known.dim != frame.dim):
            return [
                Finding(
                    f"guide site '{name}', plate '{plate}'",
                    f"its size is {frame.size} (dim {frame.dim}) in the guide and {known.size} "
                    f"(dim {known.dim}) in the model.",
                    "the guide's draw could not be the model's latent",
                    (
                        "use the same pyro.plate in both",
                        "build an autoguide with create_plates= where the data change in size",
                    ),
                )
            ]
    fn, prior = site["fn"], structure.unobserved[name]["fn"]
    if is_plain_delta(site):
        have, want = tuple(site["value"].shape), tuple(prior.shape())
        outside: list[str] = []
    else:
        have, want = tuple(fn.batch_shape), tuple(prior.batch_shape)
        outside = [p for p in info.plates if p not in frames and structure.plates[p].size > 1]
    if _without_leading_ones(have) != _without_leading_ones(want) or outside:
        where = f" outside plate '{outside[0]}'" if outside else ""
        return [
            Finding(
                f"guide site '{name}'",
                f"its shape is {have}{where}, the model's {want} in plates "
                f"({', '.join(info.plates)}).",
                "the guide's draw could not be the model's latent",
                ("sample it inside the same plates as in the model", "use .to_event as the model"),
            )
        ]
    return []


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    while shape and shape[0] == 1:
        shape = shape[1:]
    return shape


def _is_outside(prior: Any, value: torch.Tensor) -> bool:
    """Whether a value is outside the support, where no other draw decides about the support."""
    try:
        support = prior.support
    except (NotImplementedError, AttributeError):
        return False
    return not depends_on_tensors(support) and is_outside(prior, value)
