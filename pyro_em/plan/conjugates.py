"""Models with conjugate latents: what a look at them needs besides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from pyro_em.distributions import has_finite_support
from pyro_em.families.conjugate_kernels import PriorKernel
from pyro_em.graph.conjugate_children.conjugate_model import ConjugateModel
from pyro_em.graph.conjugate_children.conjugate_reads import (
    differing_reads,
    kernel_of_prior,
    read_conjugates,
)
from pyro_em.graph.conjugate_children.conjugate_record import ConjugateRead, refused
from pyro_em.graph.conjugate_children.conjugates_by_rows import differing_by_rows, read_by_rows
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.gaussian_lines.lines import Line
from pyro_em.graph.many_rows.alike_rows import with_alike_once
from pyro_em.graph.structure import Structure
from pyro_em.plan.routes import Route, routes_of
from pyro_em.posteriors.continuous.conjugate_components import conjugated
from pyro_em.posteriors.continuous.gaussian_components import Alike
from pyro_em.posteriors.scales.scaled_components import pairs_alike
from pyro_em.tracing.given import GivenConjugates
from pyro_em.tracing.runs import Model, Run
from pyro_em.tracing.sites import mask_tensor


@dataclass(frozen=True, eq=False)
class Conjugates:
    """The conjugate latents of a model.

    Attributes:
        model: The model with these latents given.
        kernels: The kernel of each one's prior.
        reads: What sites read of them, by site.
        by_rows: Whether that was read some rows at a time, as each stands by itself.
    """

    model: GivenConjugates
    kernels: Mapping[str, PriorKernel]
    reads: Mapping[str, ConjugateRead]
    by_rows: bool = False

    @classmethod
    def of(
        cls,
        model: GivenConjugates,
        kernels: Mapping[str, PriorKernel],
        args: tuple,
        kwargs: dict[str, Any],
        structure: Structure,
    ) -> Conjugates:
        """Those of a model.

        Args:
            model: The model with these latents given.
            kernels: The kernel of each one's prior.
            args: Its positional arguments.
            kwargs: Its keyword arguments.
            structure: What `examine` found of it.

        Raises:
            NotConjugate: If a latent has a child that is not conjugate to it.
        """
        given = ConjugateModel(model, args, kwargs, structure, kernels)
        reads = read_by_rows(given)
        if reads is not None:
            return cls(model, kernels, reads, by_rows=True)
        return cls(model, kernels, read_conjugates(given))

    def integrated(self, graph: FactorGraph, limit: int | None = None) -> FactorGraph:
        """A graph, traced with the latents at their units, in which they are integrated.

        Raises:
            NotSeparate: If discrete latents connect elements of a latent.
        """
        groups = tuple(self._with_all_elements(with_alike_once(g)) for g in graph.groups)
        return conjugated(replace(graph, groups=groups), self.reads, self.kernels, limit)

    def _with_all_elements(self, group: Group) -> Group:
        """A latent's site with a value for each element: as all are at the unit, one was held."""
        value = self.model.values.get(group.members[0])
        if value is None:
            return group
        own = value.shape[
            value.dim() - group.event_dims - self.kernels[group.members[0]].event_dim :
        ]
        states = (1,) * (len(group.sizes) - group.n_plates)
        plates = group.sizes[: group.n_plates]
        shape = (len(group.members), *plates, *states, *own)
        return replace(group, value=group.value.expand(shape))

    def differing(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        structure: Structure,
        values: Mapping[str, Tensor] | None,
        seen: Run | None = None,
    ) -> list[tuple[str, str]]:
        """Sites that read the latents otherwise at other parameters, each with the argument.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            structure: Its skeleton.
            values: Parameters at which to look; the current ones where None.
            seen: A run there with the latents at their units, where there was one.
        """
        given = ConjugateModel(self.model, args, kwargs, structure, self.kernels)
        found = differing_by_rows(self.reads, given, values) if self.by_rows else None
        return differing_reads(self.reads, given, values, seen) if found is None else found

    def alike(self, lines: Mapping[str, Line]) -> Alike:
        """Normal sites in whose spreads one latent is, where Gaussian ones reach them."""
        dense = {
            n
            for n in lines
            if n in self.reads
            and (
                self.kernels[self.reads[n].latent].support != "positive"
                or self.model.values[self.reads[n].latent].numel() > 1
            )
        }
        return Alike(pairs_alike(lines, self.reads), frozenset(dense))

    def rows(self, bare: Structure) -> dict[str, Route]:
        """The latents' rows of the plan."""
        out = {}
        for name in self.kernels:
            info = bare.sites[name]
            reason = f"conjugate to {self.children(name)}"
            out[name] = Route(name, info.distribution, "conjugate", None, info.plates, reason)
        return out

    def children(self, latent: str) -> str:
        """Who reads a latent, and through what, in words."""
        own = [r for r in self.reads.values() if r.latent == latent]
        shown = ", ".join(f"'{r.site}'" for r in own[:3])
        arguments = dict.fromkeys(r.pair.argument for r in own)
        return f"{' and '.join(arguments)} of {shown}"


def at_units(
    model: Model, structure: Structure
) -> tuple[GivenConjugates, dict[str, PriorKernel]] | None:
    """The model with its conjugate latents at their units; None where it has none.

    Args:
        model: The user's model.
        structure: Its skeleton.

    Raises:
        NotConjugate: If a latent with a conjugate family's prior is masked.
    """
    run = structure.as_run
    values, kernels = {}, {}
    for name in run.latents:
        site = run.unobserved[name]
        kernel = kernel_of_prior(site["fn"])
        if has_finite_support(site["fn"]) or kernel is None:
            continue
        if mask_tensor(site) is not None:
            what = "a mask covers it: put poutine.mask around its observations alone."
            if name.removesuffix("_unobserved") in structure.masked_pairs:
                what = "it is observed in part (obs_mask): give what is known a site of its own."
            raise refused(name, f"site '{name}'", what)
        kernels[name] = kernel
        values[name] = kernel.units(site["value"].shape, run.nothing_like(name))
    return (GivenConjugates(model, values), kernels) if values else None


def conjugate_routes(bare: Structure, inner: Structure, found: Conjugates) -> tuple[Route, ...]:
    """The rows of the plan, conjugate latents in the place that they have in the model."""
    rows = {r.site: r for r in routes_of(inner)} | found.rows(bare)
    return tuple(rows[name] for name in (*bare.latents, *bare.barren))
