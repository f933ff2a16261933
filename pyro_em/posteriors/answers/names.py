"""The latents of a graph by the names that users give them, and by globs of these.

The unobserved part of a site with ``obs_mask`` goes by the site's own name.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_em.arguments import as_tensor
from pyro_em.errors import UsageError, message
from pyro_em.globs import is_glob, listed, matching, refuse_gaps, unknown
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.tracing.sites import INTEGRATED, Role

_DIGITS = "0123456789"


def own_name(graph: FactorGraph, site: str) -> str:
    """The summed site behind a name: that of the unobserved part under ``obs_mask``."""
    hidden = f"{site}_unobserved"
    masked = site in graph.structure.masked_pairs and hidden in graph.latents
    return hidden if masked else site


def names_of(graph: FactorGraph) -> tuple[str, ...]:
    """The latents as users call them, in model order."""
    called = {f"{name}_unobserved": name for name in graph.structure.masked_pairs}
    return tuple(called.get(name, name) for name in graph.latents)


def gaussian_names(graph: FactorGraph) -> tuple[str, ...]:
    """The Gaussian latents that groups integrate, in model order."""
    found = {
        name
        for group in graph.groups
        if group.nested is not None
        for g in group.nested.groups
        if g.role is Role.GAUSSIAN
        for name in g.members
    }
    return tuple(name for name in graph.structure.sites if name in found)


def integrated_names(graph: FactorGraph) -> tuple[str, ...]:
    """All continuous latents that groups integrate, in model order."""
    found = {
        name
        for group in graph.groups
        if group.nested is not None
        for g in group.nested.groups
        if g.role in INTEGRATED
        for name in g.members
    }
    return tuple(name for name in graph.structure.sites if name in found)


def latent_of(graph: FactorGraph, site: str) -> Latent:
    """A latent by its own name.

    Raises:
        UsageError: If there is none of this name.
    """
    if site not in graph.latents:
        raise UsageError(
            message(
                f"site '{site}'",
                f"it is no summed latent of this model; those are: {listed(names_of(graph))}.",
                fixes=["ask for one of them", *_globs_for(site, graph)],
            )
        )
    return graph.latents[site]


def _globs_for(site: str, graph: FactorGraph) -> list[str]:
    """The glob of steps of a series whose name was given without their numbers."""
    steps = [n for n in names_of(graph) if re.fullmatch(re.escape(site) + r"_?\d+", n)]
    if len(steps) < 2:
        return []
    return [f"ask for all steps together: '{steps[0].rstrip(_DIGITS)}*'"]


def by_glob(graph: FactorGraph, pattern: str, *, as_rows: bool = True) -> tuple[str, ...] | None:
    """The latents that a glob matches, in order of time; None for a name.

    Args:
        graph: The factor graph.
        pattern: A name or a glob.
        as_rows: Whether they stand for consecutive rows, so that no step may be missing.

    Raises:
        UsageError: If it matches none, or as rows observed steps as well.
    """
    if not is_glob(pattern) or own_name(graph, pattern) in graph.latents:
        return None
    known = graph.remembered
    if ("glob", pattern) not in known:
        names = names_of(graph)
        hits = matching(pattern, names) or matching(pattern, graph.latents)
        if not hits:
            raise unknown(pattern, names, "summed latents")
        known["glob", pattern] = tuple(hits)
    if as_rows:
        refuse_gaps(pattern, observed_steps(graph))
    matched: tuple[str, ...] = known["glob", pattern]
    return matched


def pairs_by_glob(graph: FactorGraph, a: str, b: str | None) -> tuple[tuple[str, str], ...] | None:
    """The pairs that two names mean; None where neither is a glob.

    Args:
        graph: The factor graph.
        a: A name or a glob.
        b: Another; None for the neighbours among what the first glob matches.

    Raises:
        UsageError: If they make no pairs.
    """
    known = graph.remembered
    if ("pairs", a, b) in known:
        kept: tuple[tuple[str, str], ...] = known["pairs", a, b]
        return kept
    firsts = by_glob(graph, a)
    if b is None:
        pairs = _neighbours(a, firsts)
    else:
        seconds = by_glob(graph, b)
        if firsts is None and seconds is None:
            return None
        pairs = matched_pairs("joint", a, b, firsts, seconds)
    known["pairs", a, b] = pairs
    return pairs


def _neighbours(a: str, names: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    if names is None:
        raise UsageError(
            message(
                f"joint('{a}')",
                "this is one name, and a joint is of two latents.",
                fixes=[
                    f"name the other: joint('{a}', 'y')",
                    "ask for all neighbours of a chain by glob: joint('z_*')",
                ],
            )
        )
    return tuple(itertools.pairwise(names))


def matched_pairs(
    where: str, a: str, b: str, firsts: Sequence[str] | None, seconds: Sequence[str] | None
) -> tuple[tuple[str, str], ...]:
    """The pairs that two names or globs mean, in order of time.

    Args:
        where: The method that was called.
        a: A name or a glob.
        b: Another.
        firsts: What the first matches; None for a name.
        seconds: What the other matches.

    Raises:
        UsageError: If they match different numbers of latents.
    """
    if firsts is None and seconds is None:
        return ((a, b),)
    if firsts is None:
        firsts = (a,) * len(seconds or ())
    if seconds is None:
        seconds = (b,) * len(firsts)
    if len(firsts) != len(seconds):
        raise UsageError(
            message(
                f"{where}('{a}', '{b}')",
                f"the first matches {listed(firsts)}, the second {listed(seconds)}.",
                f"{len(firsts)} and {len(seconds)} latents are no pairs",
                ["use globs that match equally many latents"],
            )
        )
    return tuple(zip(firsts, seconds, strict=True))


def spread(graph: FactorGraph, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Tensors by latent, of which a glob gives those of several, stacked in order of time.

    Args:
        graph: The factor graph.
        given: By name or glob; what is given by name counts before what a glob gives.
        where: The argument that they are.

    Returns:
        By name; what matches no latent is left as it is.

    Raises:
        UsageError: If a glob matches another number of latents than it has rows.
    """
    out: dict[str, Any] = {}
    for pattern, value in sorted(given.items(), key=lambda item: _is_named(graph, item[0])):
        names = None if _is_named(graph, pattern) else matching(pattern, names_of(graph))
        if not names:
            out[pattern] = value
            continue
        refuse_gaps(pattern, observed_steps(graph))
        rows = as_tensor(f"{where}['{pattern}']", value)
        if rows.dim() == 0 or len(rows) != len(names):
            raise UsageError(
                message(
                    f"{where}['{pattern}']",
                    f"its shape is {tuple(rows.shape)}, and it matches {len(names)} latents: "
                    f"{listed(names)}.",
                    "what is given by glob has a row for each, in order of time",
                    ["stack one tensor for each latent", "give each by its name"],
                )
            )
        out.update(zip(names, rows.unbind(0), strict=True))
    return out


def _is_named(graph: FactorGraph, name: str) -> bool:
    return own_name(graph, name) in graph.latents


def observed_steps(graph: FactorGraph) -> tuple[str, ...]:
    """Observed sites that are named as latents are but for a number at the end."""
    if "observed steps" not in graph.remembered:
        latents = (*names_of(graph), *gaussian_names(graph))
        stems = {n.rstrip(_DIGITS) for n in latents if n[-1:].isdigit()}
        graph.remembered["observed steps"] = tuple(
            n
            for outer in graph.groups
            for group in (outer.nested.groups if outer.nested else (outer,))
            if group.observed and group.role is not Role.GAUSSIAN
            for n in group.members
            if n[-1:].isdigit() and n.rstrip(_DIGITS) in stems
        )
    steps: tuple[str, ...] = graph.remembered["observed steps"]
    return steps
