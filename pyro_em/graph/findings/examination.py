"""What two cheap runs of a model say before anything is enumerated: its structure and all findings.

Nothing here allocates more than the model itself does. Every finding that would make an exact
treatment wrong or impossible is collected as a `Finding`; latents come first.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyro_em.distributions import has_finite_support, support_size_of
from pyro_em.errors import Finding, UsageError, message, raise_findings
from pyro_em.graph.clamps import may_be_clamped
from pyro_em.graph.failing.blame import given_arguments, given_tensors, same_tensor
from pyro_em.graph.failing.failures import changing_sites
from pyro_em.graph.findings.first_run import (
    NO_NUMBERS,
    has_bad_parameters,
    name_of_distribution,
    run_plainly,
)
from pyro_em.graph.findings.folded import with_other_shadows, without_graphs
from pyro_em.graph.findings.held_latents import (
    coupled_latents,
    reaching_in_plates,
    with_numbers_read,
)
from pyro_em.graph.findings.initial import forget_bad_starts, start_problems
from pyro_em.graph.findings.marginals import marginals_of
from pyro_em.graph.findings.readable import (
    refuse_inference_mode,
    refuse_sparse_values,
    refuse_without_numbers,
)
from pyro_em.graph.findings.side_effects import Watched, refused_clearing, writing_problems
from pyro_em.graph.findings.site_findings import SiteFindings
from pyro_em.graph.findings.value_checks import (
    given_problems,
    parameter_problems,
)
from pyro_em.graph.structure import Plate, Structure
from pyro_em.graph.unregistered import unregistered
from pyro_em.tracing.allocation import NumbersNeeded, Shadows, is_shadow, judging_shadows
from pyro_em.tracing.feasible import feasible_event
from pyro_em.tracing.loops import current_series
from pyro_em.tracing.missing import has_missing
from pyro_em.tracing.randomness import random_state, set_random_state
from pyro_em.tracing.runs import Model, Run, provenance_run
from pyro_em.tracing.sites import (
    factors_in,
    frames_in,
    frames_of,
    latents_in,
    mask_tensor,
    subsamples_in,
)

logger = logging.getLogger("pyro_em")


def examine(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    *,
    max_plate_nesting: int | None = None,
    first_look: bool = True,
    guide_given: bool = False,
    sparing: bool = False,
    max_enumeration: int = 2**27,
) -> tuple[Structure, list[Finding]]:
    """Run a model plainly and with tagged latents, and say what it is made of.

    Args:
        model: The user's model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        max_plate_nesting: The user's own number of plate dimensions, checked against the shapes.
        first_look: Whether this run may advance the random state, as Pyro's first run does.
        guide_given: Whether latents without an exact posterior may go to a guide.
        sparing: Whether large latents may be looked at without numbers, where the model allows it;
            the skeleton's ``unchecked`` says whether arguments have still to be validated.
        max_enumeration: An unobserved site on which nothing depends integrates to one: it is not
            summed where its table would have more cells.

    Returns:
        The skeleton, and all findings: latents first, then parameters, then the other sites.

    Raises:
        PyroEMError: If the model cannot be run at all.
    """
    refuse_inference_mode(args, kwargs)
    refuse_without_numbers(given_arguments(model, args, kwargs))
    watched = Watched(model, args, kwargs)
    how = (max_plate_nesting, guide_given, watched, max_enumeration)
    begin, tables = random_state(), True
    while sparing:
        shadows: Shadows | None = None
        try:
            plain = run_plainly(model, args, kwargs, first_look, sparing=True, tables=tables)
            shadows = plain.shadows
            with judging_shadows() if shadows else nullcontext():
                plain, foreign = _without_graphs(model, args, kwargs, plain)
                if shadows:
                    shadows.let_go()
                found = _findings(model, args, kwargs, plain, foreign, *how)
            if shadows:
                shadows.let_go()
            return found
        except NumbersNeeded:
            set_random_state(begin)
            tables = False  # what the model makes of its data has numbers in the next run
            sparing = shadows is not None and shadows.has_tables
            logger.debug("the model reads numbers without which it was run: it is run with them")
        if shadows:
            shadows.let_go()
    plain = run_plainly(model, args, kwargs, first_look)
    plain, foreign = _without_graphs(model, args, kwargs, plain)
    return _findings(model, args, kwargs, plain, foreign, *how)


def _without_graphs(
    model: Model, args: tuple, kwargs: dict[str, Any], plain: Run
) -> tuple[Run, bool]:
    """A run without the autograd graphs behind its sites, before the next run has graphs of its own.

    Where a tensor that is no parameter requires a gradient, they stay, which is the second result:
    it is said of which sites that count.
    """
    if unregistered(model, args, kwargs, plain, factors_in(plain.sites)):
        return plain, True
    sites = plain.sites if plain.shadows is None else with_other_shadows(plain.sites)
    return replace(plain, sites=without_graphs(sites)), False


def _findings(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    plain: Run,
    foreign: bool,
    max_plate_nesting: int | None,
    guide_given: bool,
    watched: Watched,
    max_enumeration: int,
) -> tuple[Structure, list[Finding]]:
    """The skeleton and all findings, from a plain run.

    ``foreign`` says whether a tensor that is no parameter requires a gradient in it.
    """
    if plain.cleared:
        raise refused_clearing("model")
    watched.after_one_run(plain.sites)
    factors = factors_in(plain.sites)
    if not factors:
        raise UsageError(
            message(
                "model", "it has no sites.", fixes=["call pyro.sample in it, and pass its data"]
            )
        )
    frames = frames_in(factors)
    plates, random_plates = _plates(plain.sites, frames)
    refuse_sparse_values(factors)
    tagged = provenance_run(model, args, kwargs, plain, drawn=guide_given)
    if tagged.cleared:
        raise refused_clearing("model")
    if set(tagged.scopes) != set(factors):
        raise_findings([changing_sites(sorted(set(tagged.scopes) ^ set(factors)), random_plates)])
    writing = writing_problems(model, args, kwargs, watched, plain, factors)
    if writing:
        raise_findings(writing)
    # Under an obs_mask that is True everywhere nothing of the unobserved part is used.
    unobserved = latents_in(factors)
    unused = {n for n, site in unobserved.items() if _masked_out(site)}
    unused = {n for n in unused if not has_finite_support(factors[n]["fn"])}
    place = {name: i for i, name in enumerate(plain.sites)}
    reached = with_numbers_read(model, args, kwargs, plain, tagged)
    edges = tuple(
        (parent, child)
        for child, scope in reached.items()
        for parent in sorted(scope & place.keys(), key=place.__getitem__)
        if parent != child
    )
    hidden = set(unobserved) - unused
    scopes = {n: scope & hidden for n, scope in reached.items()}
    barren = _barren(factors, unobserved, scopes, max_enumeration)
    masked_pairs = {
        name: _obs_mask(plain.sites[f"{name}_observed"])
        for name, site in plain.sites.items()
        if site["type"] == "sample"
        and f"{name}_observed" in factors
        and f"{name}_unobserved" in factors
    }
    dropped = set(barren)
    latents = {n: None for n in unobserved if n not in dropped}
    counted = {n: scope for n, scope in scopes.items() if n not in dropped}
    site_plates = {n: tuple(own) for n, own in frames.items()}
    suspects = reaching_in_plates(
        tagged.suspects & latents.keys(), tagged.read, site_plates, counted
    )
    coupled = coupled_latents(model, args, kwargs, plain, suspects, counted)
    for name in may_be_clamped(masked_pairs, latents, tagged.sites):
        scopes[f"{name}_observed"] = frozenset({f"{name}_unobserved"})
    children = _children(scopes)
    marginals = marginals_of(model, args, kwargs, plain, scopes, not guide_given)
    said = SiteFindings(
        factors,
        tagged.sites,
        scopes,
        children,
        latents,
        site_plates,
        dict(coupled),
        marginals,
        guide_given,
        has_missing(model),
    )
    said.take([name for name in factors if name not in dropped])
    sites, coupled, of_others = said.sites, said.coupled, said.of_others
    nesting = max((-p.dim for p in plates.values()), default=0)
    nesting = max([nesting, *(len(s["fn"].batch_shape) for s in factors.values())])
    if max_plate_nesting is not None:
        if max_plate_nesting < nesting:
            of_others.append(
                Finding(
                    "max_plate_nesting",
                    f"{max_plate_nesting} was given, but the model uses {nesting} batch dimensions.",
                    "an enumerated dimension would coincide with a plate",
                    (f"pass max_plate_nesting={nesting}, or leave it out",),
                    UsageError,
                )
            )
        nesting = max(nesting, max_plate_nesting)
    structure = Structure(
        plates,
        sites,
        tuple(latents),
        {n: name_of_distribution(factors[n]) for n in barren},
        nesting,
        plain.parameters,
        masked_pairs,
        random_plates,
        _kept_values(factors, barren),
        {n: factors[n] for n in (*latents, *barren)},
        {f.name: f.size for s in factors.values() for f in s["cond_indep_stack"] if f.dim is None},
        (*(_changed_mask(n) for n in plain.changed_masks), *watched.notes()),
        edges,
        plain.shadows is not None,
        {name: first for name, (first, *_) in coupled.items()},
        unregistered(model, args, kwargs, plain, sites) if foreign else (),
        None if plain.shadows is not None else {n: tagged.sites[n] for n in sites},
        bool(
            (tagged.suspects | tagged.read) & hidden
            or unused - {f"{n}_unobserved" for n in masked_pairs}
        ),
        joined=(tagged.joined | tagged.read) & latents.keys(),
        device=None if plain.shadows is None else plain.shadows.device,
    )
    starts = start_problems(plain.parameters)
    of_parameters = parameter_problems(plain, starts)
    if of_parameters and has_bad_parameters(plain):
        given = {
            where: value
            for where, value in given_tensors(model, args, kwargs).items()
            if not any(same_tensor(value, told) for told in said.told_of)
        }
        of_parameters = [*given_problems(given, NO_NUMBERS), *of_parameters]
    forget_bad_starts(plain.parameters, starts)
    return structure, [*said.of_latents, *of_parameters, *of_others]


def _children(scopes: Mapping[str, Iterable[str]]) -> dict[str, list[str]]:
    """Per latent the sites that it reaches, in the order of the model."""
    out: dict[str, list[str]] = {}
    for child, scope in scopes.items():
        for latent in scope:
            if latent != child:
                out.setdefault(latent, []).append(child)
    return out


def _kept_values(factors: Mapping[str, Any], barren: Iterable[str]) -> dict[str, Tensor]:
    """Values for sites that count nowhere: as drawn, or one feasible event where nothing was."""
    kept = {}
    seen = [s["value"] for s in factors.values() if s["is_observed"]]
    device = next((v.device for v in seen if isinstance(v, Tensor) and not v.is_meta), None)
    for name in barren:
        fn, value = factors[name]["fn"], factors[name]["value"].detach()
        if is_shadow(value):
            like = torch.empty(0, dtype=value.dtype, device=device)
            value = feasible_event(fn, like).expand(value.shape)
        kept[name] = value
    return kept


def _changed_mask(name: str) -> str:
    return message(
        f"site '{name}'",
        "its mask is changed in place after the site.",
        "densities are taken after the run, so that the site sees the later mask (as in Pyro)",
        ["make a new tensor: mask = mask | seen instead of mask |= seen"],
    )


def _plates(
    all_sites: Mapping[str, Any], frames: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Plate], tuple[str, ...]]:
    plates: dict[str, Plate] = {}
    for own in frames.values():
        for name, f in own.items():
            plates[name] = Plate(name, f.dim, f.size, f.full_size or f.size)
    random_plates = []
    for name, site in subsamples_in(all_sites).items():
        fn = site.get("fn")
        size, part = getattr(fn, "size", None), getattr(fn, "subsample_size", None)
        if part is not None and size is not None and part < size:
            random_plates.append(name)
    return plates, tuple(random_plates)


def _barren(
    factors: Mapping[str, Any],
    latents: Mapping[str, Any],
    scopes: Mapping[str, frozenset[str]],
    max_enumeration: int,
) -> tuple[str, ...]:
    """Unobserved sites that reach no observation and cannot be enumerated with their parents.

    Over index tensors a latent of all later steps reaches what the step after it reads: that of the
    last step alone integrates to one, and may as well be summed with the others.
    """
    needed: set[str] = set()
    series = current_series.get()
    carried = {} if series is None else series.carried_on(latents)
    more: set[str] = set(factors) - set(latents)
    while more:
        needed |= more
        for name in reversed(list(factors)):  # the model's order is topological
            if name in needed:
                needed |= scopes[name]
        more = {n for n, own in carried.items() if n not in needed and not needed.isdisjoint(own)}

    def is_cheap(name: str) -> bool:
        supports = [support_size_of(factors[z]["fn"]) or 1 for z in {name} | scopes[name]]
        plates = [f.size for f in frames_of(factors[name]).values()]
        return math.prod((*supports, *plates)) <= max_enumeration

    for name, site in factors.items():
        if (
            name in needed
            or not has_finite_support(site["fn"])
            or not scopes[name] - {name} <= needed
        ):
            continue
        if is_cheap(name):
            needed.add(name)
    return tuple(n for n in factors if n not in needed)


def _masked_out(site: Mapping[str, Any]) -> bool:
    mask = mask_tensor(site)
    return mask is False or (isinstance(mask, Tensor) and not bool(mask.any()))


def _obs_mask(site: Mapping[str, Any]) -> Tensor:
    """A copy: a posterior reads it when it is asked, whatever became of the user's mask by then."""
    mask = mask_tensor(site)
    return torch.as_tensor(True if mask is None else mask).clone()
