"""What runs with latents held at other values say: who reads whom, beyond what tags show.

A latent whose value became a number of Python carries no tag any more, and elements of a plate that
read each other share one. Where a run with tags leaves either open, latents are moved, and what moves
with them reads them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from pyro_em.errors import raise_findings
from pyro_em.graph.coupling import Coupling, couplings, moved_by
from pyro_em.graph.failing.failures import changing_sites
from pyro_em.tracing.allocation import NumbersNeeded
from pyro_em.tracing.runs import Model, Run, held_run
from pyro_em.tracing.sites import latents_in


def with_numbers_read(
    model: Model, args: tuple, kwargs: dict[str, Any], plain: Run, tagged: Run
) -> dict[str, frozenset[str]]:
    """Which sites reach each site, those included whose values went through Python's numbers.

    Raises:
        NumbersNeeded: If a run without numbers cannot tell.
        ModelError: If a site is there for some values of a latent only.
    """
    scopes = {n: frozenset(scope) for n, scope in tagged.scopes.items()}
    if not tagged.read:
        return scopes
    latents = latents_in(plain.sites)
    for latent in sorted(tagged.read & latents.keys()):
        if plain.shadows is not None:
            raise NumbersNeeded
        try:
            moved, passing = moved_by(
                lambda values: held_run(model, args, kwargs, values), latents, latent, scopes
            )
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError):
            continue  # other values lead elsewhere; what is refused of it is refused below
        if passing:
            raise_findings([changing_sites(sorted(passing), ())])
        for name in moved:
            scopes[name] |= {latent}
    return scopes


def reaching_in_plates(
    suspects: frozenset[str],
    read: frozenset[str],
    plates: Mapping[str, Collection[str]],
    scopes: Mapping[str, frozenset[str]],
) -> frozenset[str]:
    """Suspects whose elements another element may read: where no site of their plates does, none can.

    The means of components, in a plate of their own, are chosen from by each row, `mu[z]`, and all
    that reads them is outside that plate.

    Args:
        suspects: Latents whose elements a provenance run may have mixed.
        read: Those that were read as numbers: nobody knows what these reach.
        plates: Of each site, by name.
        scopes: For each site that counts, the latents that reach it.
    """
    reaching = {z for name, scope in scopes.items() for z in scope if _meet(plates, name, z)}
    return suspects & (reaching | read)


def _meet(plates: Mapping[str, Collection[str]], name: str, latent: str) -> bool:
    return not frozenset(plates[name]).isdisjoint(plates.get(latent, ()))


def coupled_latents(
    model: Model,
    args: tuple,
    kwargs: dict[str, Any],
    plain: Run,
    suspects: frozenset[str],
    scopes: Mapping[str, frozenset[str]],
) -> dict[str, list[Coupling]]:
    """Latents whose elements in a plate are read by other elements.

    Args:
        model: The model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plain: A plain run of it.
        suspects: Latents whose elements a provenance run may have mixed.
        scopes: For each site that counts, the latents that reach it.

    Raises:
        NumbersNeeded: If a run without numbers cannot tell.
    """
    if not suspects:
        return {}
    if plain.shadows is not None:
        raise NumbersNeeded
    found = couplings(
        lambda values: held_run(model, args, kwargs, values),
        latents_in(plain.sites),
        suspects,
        scopes,
    )
    out: dict[str, list[Coupling]] = {}
    for one in found:
        out.setdefault(one.latent, []).append(one)
    return out
