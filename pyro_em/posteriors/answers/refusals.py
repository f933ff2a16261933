"""What is said to who asks of a Gaussian latent what only discrete ones have, or the reverse."""

from __future__ import annotations

from pyro_em.errors import UsageError, message
from pyro_em.globs import listed, matching, meant
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.answers.names import gaussian_names, integrated_names, names_of, own_name


def refuse_gaussian(graph: FactorGraph, where: str, site: str | None) -> None:
    """Refuse to make a table of probabilities of a Gaussian or conjugate latent.

    Args:
        graph: The factor graph.
        where: The method that was called.
        site: What was asked for: a name, or a glob.

    Raises:
        UsageError: If it means such latents.
    """
    names = integrated_names(graph)
    if site is None or not names or own_name(graph, site) in graph.latents:
        return
    found = meant(site, names)
    if not found or matching(site, names_of(graph)):
        return
    kind = "Gaussian" if set(found) <= set(gaussian_names(graph)) else "conjugate"
    what = f"is a {kind} latent" if len(found) == 1 else f"are {kind} latents"
    raise UsageError(
        message(
            f"{where}('{site}')",
            f"{listed(found)} {what}.",
            "the posterior is a density, which no table of probabilities holds",
            [
                f"ask for moments: mean('{site}'), covariance('{site}')",
                f"ask for the distribution: marginal('{found[0]}')",
            ],
        )
    )


def without_rows(plate: str | None) -> str:
    """What somebody is told who asks for the evidence of each row where there is only one of all."""
    why = (
        "the data are in no plate: they are one series, or one row"
        if plate is None
        else f"the rows of plate '{plate}' share a latent, so that no row has an evidence of its own"
    )
    fixes = ["log_evidence is that of all data together"]
    if plate is None:
        fixes.append("the terms of one series: prediction_errors('y_*') for Gaussian chains")
    return message("evidence_per_row", "it is not known of each row.", why, fixes)


def discrete(where: str, site: str) -> str:
    """What somebody is told who asks for the moments of a discrete latent."""
    return message(
        f"{where}('{site}')",
        f"'{site}' is a discrete latent.",
        "its posterior is a table of probabilities, from which the mean of any function follows",
        [f"ask for its probabilities: probs('{site}')"],
    )
