"""How a run was laid out as a graph, for later runs that are shown to do the same.

The layout of a site follows from all of it but its numbers: shapes, strides and dtypes of its tensors,
its plates, its mask and scale. Where the notes of two runs are equal, so are all of these, and the
tensors of the later one take the views that those of the earlier one took.

Kept is the layout of models without ``pyro.markov``, whose sites are each a group of a known family,
for who wants an E-step only: how parameters reach arguments depends on numbers, and is read anew.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em.distributions import unwrap
from pyro_em.families.chunks import log_density
from pyro_em.families.family import Family
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.compact import Recipe, compacted, recipe_for
from pyro_em.graph.factors import FactorGraph, Group, Latent
from pyro_em.graph.layout import FactorLayout
from pyro_em.graph.stretches import LaterDict, LaterTuple
from pyro_em.graph.structure import Structure
from pyro_em.tracing.missing import missing_of
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import Role

_MOST = 2**16  # numbers of a tensor; larger ones are worth a layout of their own

_PLAIN = (Role.LATENT, Role.DATA)


@dataclass(frozen=True)
class View:
    """How one tensor of a site becomes one of its group.

    Attributes:
        recipe: Its place in the compact layout.
        dtype: The dtype there.
        placed: Its shape and strides there, where it is in the memory of the site's; else None.
    """

    recipe: Recipe
    dtype: torch.dtype
    placed: tuple[torch.Size, tuple[int, ...]] | None = None

    @classmethod
    def found(cls, tensor: Tensor, recipe: Recipe, dtype: torch.dtype) -> View:
        """The view that takes a tensor to its group."""
        view = cls(recipe, dtype)
        there = view.of(tensor)
        if there.data_ptr() != tensor.data_ptr() or there.dtype != tensor.dtype:
            return view
        return cls(recipe, dtype, (there.shape, there.stride()))

    def numbers(self, tensor: Tensor) -> Tensor:
        """The same without its way there, which gradients would take."""
        return self.of(tensor) if self.placed is None else tensor.as_strided(*self.placed)

    def of(self, tensor: Tensor) -> Tensor:
        """The tensor as that of the only member of a group. # (1, *dims or 1s, *event)"""
        laid = compacted(tensor, self.recipe).unsqueeze(0)
        return laid if laid.dtype == self.dtype else laid.to(self.dtype)


@dataclass(frozen=True)
class SiteAsGroup:
    """How one site became a group.

    Attributes:
        name: The site.
        dims: Its plates, then its latents.
        n_plates: How many plates there are.
        sizes: Their sizes, and those of the latents.
        family: The record of its distribution.
        event_dims: Reinterpreted batch dimensions.
        value: Of its value.
        arguments: Of its arguments, which the distribution holds under these names.
        scale: What multiplies its log density.
        observed: Whether it has a value.
        distribution: Its name.
        role: What it stands for.
    """

    name: str
    dims: tuple[str, ...]
    n_plates: int
    sizes: tuple[int, ...]
    family: Family
    event_dims: int
    value: View
    arguments: Mapping[str, View]
    scale: float
    observed: bool
    distribution: str
    role: Role

    @classmethod
    def found(
        cls, group: Group, site: Mapping[str, Any], layout: FactorLayout
    ) -> SiteAsGroup | None:
        """How a site became its group; None where that is out of the ordinary."""
        base, reinterpreted, wrapping = unwrap(site["fn"])
        family, scale, given = group.family, group.scale[0], dict(group.arguments)
        held = vars(base)
        plain = (
            family is not None
            and group.role in _PLAIN
            and not (wrapping or group.raw_params or group.edges or group.hyperparameters)
            and not (group.lines or group.reads or group.nested or group.belief or group.matrix)
            and all(t is None for t in (group.mask, group.elements, group.value_binding, group.raw))
            and not isinstance(scale, Tensor)
            and not any(b.params for b in group.bindings.values())
            and all(isinstance(held.get(a), Tensor) for a in given)
            and not isinstance(
                base, dist.MultivariateStudentT
            )  # holds its matrix once it was asked
            and all(t.numel() <= _MOST for t in (site["value"], *(held[a] for a in given)))
            and "_markov_scope" not in site["infer"]
        )
        if not plain or family is None or isinstance(scale, Tensor):
            return None
        dims = layout.place(group.members[0])[1]
        return cls(
            group.members[0],
            tuple(group.dims[0]),
            group.n_plates,
            group.sizes,
            family,
            reinterpreted,
            View.found(
                site["value"],
                recipe_for(site["value"], site["fn"].event_dim, dims),
                group.value.dtype,
            ),
            {
                a: View.found(
                    held[a],
                    recipe_for(
                        held[a],
                        reinterpreted + family.argument_dims.get(a, 0),
                        dims,
                        reinterpreted,
                    ),
                    given[a].dtype,
                )
                for a in given
            },
            scale,
            group.observed,
            group.distribution,
            group.role,
        )

    @property
    def shares_memory(self) -> bool:
        """Whether the group has the memory of the site."""
        return all(v.placed is not None for v in (self.value, *self.arguments.values()))

    def log_density(self, site: Mapping[str, Any]) -> Tensor:
        """That of the group, without the group. # (1, *sizes)"""
        held = vars(unwrap(site["fn"])[0])
        value = self.value.numbers(site["value"])
        arguments = {a: view.numbers(held[a]) for a, view in self.arguments.items()}
        lead = 1 + len(self.sizes)
        log_p = log_density(self.family, value, arguments, lead, self.event_dims)
        return log_p.expand(1, *self.sizes)

    def group(self, site: Mapping[str, Any]) -> Group:
        """The group of the same site in another run."""
        held = vars(unwrap(site["fn"])[0])
        arguments = {a: view.of(held[a]) for a, view in self.arguments.items()}
        return Group(
            (self.name,),
            (self.dims,),
            self.n_plates,
            self.sizes,
            self.family,
            self.event_dims,
            arguments,
            {a: Binding("opaque", (), t.detach()) for a, t in arguments.items()},
            self.value.of(site["value"]),
            None,
            (self.scale,),
            None,
            (),
            self.observed,
            self.distribution,
            self.role,
        )


@dataclass(frozen=True)
class LatentAsRead:
    """Where a latent's values are in that of its site.

    Attributes:
        name: The latent.
        plates: Its plates.
        batch_dims: For each batch dimension of the site the plate's name, or None.
        repeated: Dimensions of the value that only repeat them, from the right.
    """

    name: str
    plates: tuple[str, ...]
    batch_dims: tuple[str | None, ...]
    repeated: tuple[int, ...]

    def latent(self, value: Tensor) -> Latent:
        """The latent at the value of its site in another run."""
        for dim in self.repeated:
            value = value.select(dim, 0)
        return Latent(self.name, self.plates, value.detach(), self.batch_dims)


class LaidGroups(LaterTuple[Group]):
    """The groups of a run that is known to do the same, made when somebody asks for more than numbers.

    Args:
        laid: How each site becomes a group.
        sites: Those of the run.
    """

    def __init__(
        self, laid: tuple[SiteAsGroup, ...], sites: Mapping[str, Mapping[str, Any]]
    ) -> None:
        super().__init__(partial(_groups, laid, sites))
        self._laid, self._sites = laid, sites

    @property
    def scales(self) -> list[float]:
        """What multiplies each log density."""
        return [g.scale for g in self._laid]

    def log_densities(self) -> list[Tensor]:
        """Those of all groups. # (1, *sizes)"""
        return [g.log_density(self._sites[g.name]) for g in self._laid]


@torch.enable_grad()
def _groups(
    laid: tuple[SiteAsGroup, ...], sites: Mapping[str, Mapping[str, Any]]
) -> tuple[Group, ...]:
    return tuple([g.group(sites[g.name]) for g in laid])


@dataclass(frozen=True)
class LaidOut:
    """How a run was laid out as a graph.

    Attributes:
        latents: Its latents.
        groups: Its groups, each of one site.
        shares_memory: Whether a graph has the memory of the run's tensors, whenever it is made.
    """

    latents: tuple[LatentAsRead, ...]
    groups: tuple[SiteAsGroup, ...]
    shares_memory: bool = False

    @classmethod
    def found(cls, graph: FactorGraph, run: Run) -> LaidOut | None:
        """How a run became its graph; None where a later one has to be laid out by itself.

        Args:
            graph: The graph of the run, for an E-step only.
            run: The run.
        """
        structure = graph.structure
        odd = graph.missing or graph.all_data or graph.parted or structure.series is not None
        if odd or any(len(g.members) != 1 or g.family is None for g in graph.groups):
            return None
        sites = {n: s for n, s in run.sites.items() if n in structure.sites}
        layout = FactorLayout(sites, structure)
        groups = [SiteAsGroup.found(g, sites[g.members[0]], layout) for g in graph.groups]
        known = tuple(g for g in groups if g is not None)
        if len(known) < len(groups):
            return None
        latents = []
        for name, latent in graph.latents.items():
            batch = sites[name]["value"].dim() - sites[name]["fn"].event_dim
            own = batch + layout.dim_of[name]
            repeated = tuple(d for d in reversed(range(batch)) if d != own)
            latents.append(LatentAsRead(name, latent.plates, latent.batch_dims, repeated))
        out = cls(tuple(latents), known, all(g.shares_memory for g in known))
        return out if _are_alike(graph, out.graph(structure, run)) else None

    def graph(self, structure: Structure, run: Run) -> FactorGraph:
        """The graph of another run that does the same.

        Args:
            structure: The skeleton of the model.
            run: The run.
        """
        sites, later = run.sites, LaidGroups(self.groups, run.sites)
        return FactorGraph(
            structure,
            LaterDict(partial(_latents, self.latents, sites)),
            later if self.shares_memory else tuple(later),
            run.parameters,
            missing_of(sites),
        )


def _latents(
    laid: tuple[LatentAsRead, ...], sites: Mapping[str, Mapping[str, Any]]
) -> dict[str, Latent]:
    return {z.name: z.latent(sites[z.name]["value"]) for z in laid}


@torch.no_grad()
def _are_alike(graph: FactorGraph, other: FactorGraph) -> bool:
    """Whether two graphs of one run hold the same views of the same memory."""
    pairs: list[tuple[Tensor, Tensor]] = []
    if isinstance(other.groups, LaidGroups):
        own = other.groups.log_densities()
        pairs += [(g.log_density(), t) for g, t in zip(graph.groups, own, strict=True)]
    for a, b in zip(graph.groups, other.groups, strict=True):
        pairs += [(a.value, b.value), *((t, b.arguments[n]) for n, t in a.arguments.items())]
    pairs += [(z.support, other.latents[n].support) for n, z in graph.latents.items()]
    return all(_is_same(a, b) for a, b in pairs)


def _is_same(a: Tensor, b: Tensor) -> bool:
    form = (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
    return form and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))
