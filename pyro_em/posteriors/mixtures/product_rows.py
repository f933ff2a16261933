"""Several latents per row of a plate, summed as one product state in chunks of rows.

    log p(x_n) = log Σ_{z_1 … z_L} exp Σ_f ℓ_f(x_n, z_f)

The table over all cells is made anew for each chunk of rows. The density of a factor that reads some of
a row's latents is computed over their cells alone, and the posterior is summed to these cells before
its sums are taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Self

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.contracted import Contraction
from pyro_em.posteriors.mixtures.mixture import Mixture, outline_of_rows
from pyro_em.posteriors.mixtures.product_states import alike, flattened
from pyro_em.posteriors.mixtures.rows import why_no_product
from pyro_em.posteriors.quick import Outline


class ProductRows(Mixture):
    """A mixture over the rows of one plate whose component is a pair, a triple, … of latents."""

    @classmethod
    def glance(cls, latents: Mapping[str, Latent]) -> Finding | None:
        """See `pyro_em.posteriors.quick.QuickBlock.glance`."""
        return why_no_product(latents)

    @classmethod
    def outline(cls, component: Component) -> Outline[Self] | Finding:
        """See `pyro_em.posteriors.quick.QuickBlock.outline`."""
        finding = why_no_product(component.graph.latents)
        if finding is not None:
            return finding
        each = alike(component.graph)
        found = outline_of_rows(each.graph)
        if isinstance(found, Finding):
            return found
        rows, shape, repeats = found
        graph: FactorGraph = flattened(rows)
        sizes = {g: shape.size_of(g) for g in range(len(graph.groups))}
        make = partial(cls.of, graph, shape, repeats)
        return Outline(graph, shape.eligible(graph), make, each.origin, sizes)

    @property
    def by_cell(self) -> Contraction:
        """By contraction."""
        return self.contraction
