"""What an enumeration would cost, from names and sizes alone, before it is paid."""

from __future__ import annotations

from pyro_em.errors import Finding, OverBudget, sites_in_words
from pyro_em.graph.structure import Structure
from pyro_em.posteriors.elimination import ContractionPlan, plan_contraction


def contraction_from_structure(structure: Structure) -> ContractionPlan:
    """The elimination order and its cost, before anything is enumerated.

    Latents without a table (continuous ones) take no part: a site may read thousands of them.
    """
    infos = list(structure.sites.values())
    latents = {name: structure.sites[name] for name in structure.latents}
    latents = {name: info for name, info in latents.items() if info.support_size is not None}
    sizes = {p: plate.size for p, plate in structure.plates.items()}
    sizes.update({name: info.support_size or 1 for name, info in latents.items()})
    return plan_contraction(
        [info.plates + tuple(z for z in info.scope if z in latents) for info in infos],
        {name: info.plates for name, info in latents.items()},
        sizes,
        own_latent=[i.name if i.name in latents and not i.observed else None for i in infos],
    )


def budget_problems(structure: Structure, plan: ContractionPlan, limit: int) -> list[Finding]:
    """An enumeration past the budget, with the size of its largest table."""
    if plan.cells <= limit:
        return []
    latents = [d for d in plan.largest if d in structure.latents]
    size = f"{plan.cells:,}" if plan.cells < 10**15 else f"{plan.cells:.3g}"
    coupling = [i.name for i in structure.sites.values() if len(set(i.scope) & set(latents)) > 2]
    why = f"{len(latents)} latents meet in one table"
    if coupling:
        why += f", coupled by site '{coupling[0]}'"
    return [
        OverBudget(
            sites_in_words(latents),
            f"enumerating them needs a table of {size} cells; the budget is "
            f"max_enumeration={limit:,}.",
            why,
            (
                "let each observation depend on fewer latents",
                "give a guide that takes them over: ExactPosteriorEM(model, guide)",
                "pass a larger max_enumeration if memory allows (8 bytes a cell, a few copies)",
                "fit a subset of the data",
            ),
            latents=tuple(latents),
            cells=plan.cells,
            limit=limit,
        )
    ]
