"""Which Gaussian latents keep a model from being linear in all of them, and which only keep each other.

In loc = u·v + exp(w), the model is not linear in w, whatever the others are. It is linear in u where v
has a value, and in v where u has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.bindings.linearity import breaks_of
from pyro_em.graph.bindings.named_leaves import NamedLeaves
from pyro_em.graph.gaussian_lines.jacobians import SitePlace, refusal
from pyro_em.graph.gaussian_lines.lines import is_gaussian
from pyro_em.graph.gaussian_lines.means import reaching, refusals
from pyro_em.tracing.runs import Run


@dataclass(frozen=True)
class Culprits:
    """Latents in which a model is not linear.

    Attributes:
        alone: Per latent why, whatever the other latents are; ``latents`` of the finding are it and
            others to which that applies.
        products: Factors of which one at most can be integrated, each with the finding.
    """

    alone: Mapping[str, Finding]
    products: tuple[tuple[tuple[frozenset[str], ...], Finding], ...]


def culprits(run: Run, values: Mapping[str, Tensor]) -> Culprits:
    """What in a run keeps a model from being linear in its latents.

    Args:
        run: With the latents at values that are leaves of autograd.
        values: These.
    """
    values = NamedLeaves.of(values)
    alone: dict[str, Finding] = {}
    products = []
    for name, site in run.sites.items():
        if site["type"] != "sample":
            continue
        latents = reaching(name, site, values)
        if not latents:
            continue
        for finding in refusals(name, site, values, latents):
            for latent in finding.latents:
                alone.setdefault(latent, finding)
        if not is_gaussian(site["fn"]):
            continue
        for found in breaks_of(SitePlace.loc(site), values):
            every = sorted(found.alone.union(*found.factors))
            finding = refusal(every, f"site '{name}'", f"its loc: {found.words}.")
            for latent in found.alone:
                alone.setdefault(latent, finding)
            if len(found.factors) > 1:
                products.append((found.factors, finding))
    return Culprits(alone, tuple(products))
