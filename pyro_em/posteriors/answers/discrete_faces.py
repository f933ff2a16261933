"""The discrete latents of a posterior as users ask for them: marginals, joints, the best assignment.

Their posterior is a table of probabilities of the cells of each factor: a marginal is a sum over a
table, and so is the joint of two neighbours. Of latents that share no factor the joint takes a
contraction of its own. Where a mask of the user's observes a site in part, answers under its name are
one-hot where it was observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_em.globs import stacked_answers
from pyro_em.graph.factors import FactorGraph, Latent
from pyro_em.graph.vectorised_loops.latent_series import kinds_of
from pyro_em.posteriors.answers.chain_paths import paths_of
from pyro_em.posteriors.answers.crossed import across_plates, are_connected
from pyro_em.posteriors.answers.names import by_glob, latent_of, own_name, pairs_by_glob
from pyro_em.posteriors.answers.observed_in_part import with_observed
from pyro_em.posteriors.answers.refusals import refuse_gaussian
from pyro_em.posteriors.answers.row_faces import RowFaces
from pyro_em.posteriors.answers.stacks import (
    are_alike,
    batch_shape,
    factors_of_pairs,
    parts_of,
    parts_of_joints,
    parts_of_marginals,
    places_of,
    plates_of,
    stack_of,
    table_of,
)
from pyro_em.posteriors.elimination import ContractionPlan
from pyro_em.posteriors.enumeration import (
    contraction_of,
    largest_cells,
    run_contraction,
    tables_that_count,
)
from pyro_em.posteriors.messages.steps import best_path
from pyro_em.posteriors.sampling import (
    Conditional,
    Conditionals,
    Draws,
    conditionals,
    cumulative_rows,
)


@dataclass(frozen=True, eq=False)
class DiscreteFaces:
    """All discrete latents of a posterior.

    Attributes:
        graph: The factor graph.
        cells: Per group the probability of every cell. # (members, *sizes)
        tables: The log densities behind it.
        exact: Whether it is p(z | x; θ).
    """

    graph: FactorGraph
    cells: Sequence[Tensor]
    tables: Sequence[Tensor]
    exact: bool

    def probs(self, site: str) -> Tensor:
        """The marginals of a name or a glob; see `Posterior.probs`."""
        refuse_gaussian(self.graph, "probs", site)
        names = by_glob(self.graph, site)
        if names is not None:
            return self.stacked(tuple(names))
        if own_name(self.graph, site) != site:
            return with_observed(self.graph, site, self.probs(own_name(self.graph, site)))
        latent = latent_of(self.graph, site)
        (place,) = places_of(self.graph, [latent])
        cells = self.cells[place.group][place.member]
        dims = self.graph.groups[place.group].dims[place.member]
        keep = [d for d in dims if d in latent.plates] + [site]
        table = marginal(cells, dims, keep)
        return self._shaped(table / table.sum(-1, keepdim=True), latent)

    def stacked(self, names: tuple[str, ...]) -> Tensor:
        """The marginals of several latents; see `Posterior.stacked`."""
        partly = self.graph.structure.masked_pairs
        if partly and any(own_name(self.graph, n) != n for n in names):
            return stacked_answers("probs", names, self.probs)
        table = stack_of(self.cells, parts_of_marginals(self.graph, names))
        table = table / table.sum(-1, keepdim=True)
        first = self.graph.latents[names[0]]
        shape = (len(names), *batch_shape(self.graph, first), first.size)
        return table.reshape(shape).to(self.graph.dtype)

    def assignments(self, site: str) -> Tensor:
        """The most probable values by the marginals; see `Posterior.assignments`."""
        refuse_gaussian(self.graph, "assignments", site)
        names = by_glob(self.graph, site)
        codes = self.probs(site).argmax(-1)
        if names is None:
            return latent_of(self.graph, own_name(self.graph, site)).support[codes]
        supports = [self.graph.latents[own_name(self.graph, n)].support for n in names]
        if all(s is supports[0] or torch.equal(s, supports[0]) for s in supports):
            return supports[0][codes]
        return torch.stack([s[c] for s, c in zip(supports, codes, strict=True)])

    def joint(self, a: str, b: str | None = None) -> Tensor:
        """The joint probabilities of two latents, or of pairs; see `Posterior.joint`."""
        for name in (a, b):
            refuse_gaussian(self.graph, "joint", name)
        pairs = pairs_by_glob(self.graph, a, b)
        if pairs is not None:
            return self._stacked_joints(pairs, a)
        assert b is not None
        if a == b:
            return torch.diag_embed(self.probs(a))
        own_a, own_b = own_name(self.graph, a), own_name(self.graph, b)
        if (own_a, own_b) != (a, b):
            return self._joint_with_observed(a, b, own_a, own_b)
        first, second = latent_of(self.graph, a), latent_of(self.graph, b)
        plates = plates_of(self.graph, first, second)
        wanted = [*plates, a, b]
        place = factors_of_pairs(self.graph).get((a, b))
        if place is not None:
            g, i = place
            dims = self.graph.groups[g].dims[i]
            return self._normalised(marginal(self.cells[g][i], dims, wanted), 2)
        if not self.exact or not are_connected(self.graph, a, b):
            return self._product(first, second, plates)
        if not (set(first.plates) <= set(second.plates) or set(second.plates) <= set(first.plates)):
            return self._normalised(
                across_plates(self.graph, self.tables, first, second, plates), 2
            )
        extra = tuple(wanted)
        plan = contraction_of(self.graph, [extra])
        zeros = torch.zeros(
            [self.graph.dim_size(d) for d in extra],
            dtype=torch.float64,
            device=self.cells[0].device,
        )
        result = run_contraction(self.graph, plan, self.tables, extra=[zeros])
        return self._normalised(result.cells[-1], 2)

    def best(self) -> dict[str, Tensor]:
        """The most probable values of the discrete latents."""
        if not self.exact:
            return {
                name: latent.support[self.probs(name).argmax(-1)]
                for name, latent in self.graph.latents.items()
            }
        path = best_path(self.graph, tables_that_count(self.graph, self.tables))
        if path is not None:
            return self._values_of(list(self.graph.latents), path)
        if not self.graph.latents:
            return {}
        rows = RowFaces.of(self.graph, self.tables)
        if rows is None:
            return self._largest(contraction_of(self.graph))
        parts = (DiscreteFaces(graph, (), tables, True) for _, graph, tables in rows.parts())
        each = [part._largest(rows.plan) for part in parts]
        return {
            name: torch.cat([part[name] for part in each], latent.batch_dims.index(rows.plate))
            for name, latent in self.graph.latents.items()
        }

    def _largest(self, plan: ContractionPlan) -> dict[str, Tensor]:
        return self._assignment(largest_cells(self.graph, plan, self.tables).cells)

    def draws(self) -> Draws:
        """What joint draws of the discrete latents are made of."""
        if not self.exact:
            each = [
                Conditional(
                    name, z.plates, (), cumulative_rows(self.probs(name).reshape(-1, z.size))
                )
                for name, z in self.graph.latents.items()
            ]
            return Conditionals(self.graph, each)
        paths = paths_of(self.graph, self.tables)
        if paths is not None:
            return paths
        rows = RowFaces.of(self.graph, self.tables)
        if rows is not None:
            return rows
        plan = contraction_of(self.graph)
        return Conditionals(self.graph, conditionals(self.graph, plan, self.tables))

    def _assignment(self, marked: Sequence[Tensor]) -> dict[str, Tensor]:
        names = list(self.graph.latents)
        out: dict[str, Tensor] = dict.fromkeys(names, marked[0])
        for part in parts_of(places_of(self.graph, self.graph.latents.values())):
            own = (
                names[part.rows] if isinstance(part.rows, slice) else [names[r] for r in part.rows]
            )
            out.update(self._values_of(own, table_of(marked, part).argmax(-1)))
        return out

    def _values_of(self, names: Sequence[str], codes: Tensor) -> dict[str, Tensor]:
        """Values at positions in the latents' supports. # (latents, *plates)"""
        support = self._one_support()
        if support is None:
            latents = [self.graph.latents[name] for name in names]
            shapes = [(*batch_shape(self.graph, z), *z.support.shape[1:]) for z in latents]
            each = [z.support[c] for z, c in zip(latents, codes, strict=True)]
            return {n: v.reshape(s) for n, v, s in zip(names, each, shapes, strict=True)}
        shape = (*batch_shape(self.graph, self.graph.latents[names[0]]), *support.shape[1:])
        values = support[codes].reshape(len(names), *shape).unbind(0)
        # Memory of its own for each: a view would be pickled with all the others.
        return {n: v.clone() for n, v in zip(names, values, strict=True)}

    def _one_support(self) -> Tensor | None:
        """The support of all latents, if it is one and they have one batch shape."""
        if not are_alike(self.graph):
            return None
        first, *others = (z.support for z in kinds_of(self.graph.latents))
        return first if all(s is first or torch.equal(s, first) for s in others) else None

    def _joint_with_observed(self, a: str, b: str, own_a: str, own_b: str) -> Tensor:
        """Where one of the two was observed the joint is a product of the marginals."""
        joint = self.joint(own_a, own_b)
        first, second = latent_of(self.graph, own_a), latent_of(self.graph, own_b)
        plates = plates_of(self.graph, first, second)
        product = self._over(a, first, plates).unsqueeze(-1) * self._over(
            b, second, plates
        ).unsqueeze(-2)
        observed = torch.zeros(product.shape[:-2], dtype=torch.bool, device=product.device)
        for name, latent in ((a, first), (b, second)):
            mask = self.graph.structure.masked_pairs.get(name)
            if mask is not None and latent.name != name:
                flat = mask.expand(batch_shape(self.graph, latent))
                observed = observed | self._lay_out(flat, latent, plates)
        return torch.where(observed[..., None, None], product, joint)

    def _over(self, site: str, latent: Latent, plates: Sequence[str]) -> Tensor:
        return self._lay_out(self.probs(site), latent, plates)

    def _stacked_joints(self, pairs: tuple[tuple[str, str], ...], site: str) -> Tensor:
        """# (pairs, *plates of both, K_a, K_b)"""
        if not pairs:  # the neighbours of a chain of one step
            name = own_name(self.graph, next(iter(by_glob(self.graph, site) or ())))
            latent = self.graph.latents[name]
            sizes = [self.graph.dim_size(p) for p in plates_of(self.graph, latent)]
            shape = (0, *sizes, latent.size, latent.size)
            return self.cells[0].new_empty(shape, dtype=self.graph.dtype)
        parts = parts_of_joints(self.graph, pairs)
        if parts is not None:
            return self._normalised(stack_of(self.cells, parts), 2)
        each = {", ".join(pair): pair for pair in pairs}
        return stacked_answers("joint", list(each), lambda words: self.joint(*each[words]))

    def _product(self, first: Latent, second: Latent, plates: list[str]) -> Tensor:
        a, b = (self._over(latent.name, latent, plates) for latent in (first, second))
        sizes = [self.graph.dim_size(p) for p in plates]
        return (a.unsqueeze(-1) * b.unsqueeze(-2)).expand(*sizes, first.size, second.size)

    def _shaped(self, table: Tensor, latent: Latent) -> Tensor:
        """From (plates, K) to the site's own batch dimensions, size-one ones kept."""
        sizes = dict(zip(latent.plates, table.shape, strict=False))
        shape = [sizes[d] if d is not None else 1 for d in latent.batch_dims]
        return table.reshape([*shape, latent.size]).to(self.graph.dtype)

    def _lay_out(self, table: Tensor, latent: Latent, plates: Sequence[str]) -> Tensor:
        """A table over a latent's own batch dimensions, and more, over some plates."""
        beyond = table.shape[len(latent.batch_dims) :]
        shape = [self.graph.dim_size(d) if d in latent.plates else 1 for d in plates]
        return table.reshape([*shape, *beyond])

    def _normalised(self, table: Tensor, event: int) -> Tensor:
        table = table / table.sum(tuple(range(-event, 0)), keepdim=True)
        return table.to(self.graph.dtype)


def marginal(cells: Tensor, dims: Sequence[str], keep: Sequence[str]) -> Tensor:
    """A table summed over the dimensions that are not kept; tables are normalised afterwards."""
    dims = list(dims)
    plates_beyond = [i for i, d in enumerate(dims) if d not in keep]
    table = cells
    for i in reversed(plates_beyond):
        table = table.sum(i)
    names = [d for d in dims if d in keep]
    return table.permute([names.index(d) for d in keep])
