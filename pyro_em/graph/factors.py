"""FactorGraph: what one enumerated run of a model says, in a compact layout.

A factor keeps only the dimensions that it really has: its plates, left to right, then the latents
in its scope. Expanded dimensions are of size one. Factors of equal form (the time steps of a
chain) are stacked into one `Group` with a leading dimension of members, so that each is evaluated
and updated by one call.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_em.families.chunks import log_density
from pyro_em.families.family import Family
from pyro_em.graph.all_data import AllData
from pyro_em.graph.bindings.binding import Binding, evaluated
from pyro_em.graph.later_arguments import LaterArguments
from pyro_em.graph.stretches import Members, Repeated
from pyro_em.graph.structure import Structure
from pyro_em.incomplete import IncompleteMultivariateNormal
from pyro_em.tracing.missing import Missing
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.sites import Role


@dataclass(frozen=True, eq=False)
class Latent:
    """A latent that is summed: its support and where it lives.

    Attributes:
        name: The site's name.
        plates: Its plates, left to right.
        support: All its values. # (K, *event)
        batch_dims: For each batch dimension of the site, the plate's name or None.
    """

    name: str
    plates: tuple[str, ...]
    support: Tensor
    batch_dims: tuple[str | None, ...]

    @cached_property
    def size(self) -> int:
        """Number of values."""
        return self.support.shape[0]


class Nested(Protocol):
    """Latents that are integrated inside a group; the group's log density is what is left of them."""

    @property
    def groups(self) -> tuple[Group, ...]:
        """The groups of its sites, one each."""
        ...

    @property
    def words(self) -> str:
        """What its E-step is, in a plan's words."""
        ...

    def log_evidence(self, arguments: Mapping[str, Tensor]) -> Tensor:
        """In nats, from the arguments of all its sites. # (1, *sizes)"""
        ...


class Belief(Protocol):
    """Posterior moments of the latents that a site reads, in place of values."""

    def expected_log_density(self, group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
        """E_q[log p] of each cell at given arguments, in nats. # (1, *sizes)"""
        ...

    def statistics(self, group: Group, arguments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """E_q[T] of each cell, residuals taken about ``arguments["loc"]``. # (1, *sizes, *event)"""
        ...


@dataclass(frozen=True, eq=False)
class Group:
    """Factors of equal form, stacked along a leading dimension of members.

    Attributes:
        members: The sites, in model order.
        dims: For each member the names of its dimensions: plates, then latents.
        n_plates: How many of the dimensions are plates.
        sizes: Their sizes.
        family: The record that evaluates and updates them, or None.
        event_dims: Reinterpreted batch dimensions (``to_event``) of each argument.
        arguments: The traced arguments. # (members, *dims or 1s, *event)
        bindings: How parameters reach each argument, with stacked index maps.
        value: Observed or enumerated values. # (members, *dims or 1s, *event)
        mask: Where the factor counts, or None. # (members, *dims or 1s)
        scale: Per member, what multiplies it outside the logarithm.
        raw: The traced log density where no record evaluates it. # (members, *dims)
        raw_params: Parameters that reach ``raw``, or the value of a family's site; None where an
            unknown tensor does.
        observed: Whether the members have a value.
        distribution: Its name.
        role: What the members stand for.
        value_binding: How parameters reach the value, where they do.
        elements: Which elements of an event count (a mask below ``to_event``), or None where all
            do; ``mask`` says where any does. # (members, *dims or 1s, *to_event dims or 1s)
        hyperparameters: Of a point estimate's prior, pairs of an argument that sets how concentrated
            it is and a parameter in it.
        edges: Parameters at which the support of an observed site ends.
        lines: Of a site whose mean reads Gaussian latents the arguments that its mean is made of: the
            offset ``loc``, and the coefficients of each latent.
        reads: The latent of each of these coefficients, in their order.
        belief: What is known of these latents, in an M-step.
        nested: The latents that the group integrates, where it stands for all their sites.
        matrix: Of a multivariate Normal that is read as independent ones the argument that it was
            given; else empty.
        by_steps: Whether the elements of its first plate are the steps of a chain, which reads them one
            by one as it does the members of other groups.
    """

    members: Sequence[str]
    dims: Sequence[tuple[str, ...]]
    n_plates: int
    sizes: tuple[int, ...]
    family: Family | None
    event_dims: int
    arguments: Mapping[str, Tensor]
    bindings: Mapping[str, Binding]
    value: Tensor
    mask: Tensor | None
    scale: Sequence[Tensor | float]
    raw: Tensor | None
    raw_params: tuple[str, ...] | None
    observed: bool
    distribution: str
    role: Role = Role.DATA
    value_binding: Binding | None = None
    elements: Tensor | None = None
    hyperparameters: tuple[tuple[str, str], ...] = ()
    edges: tuple[str, ...] = ()
    lines: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    belief: Belief | None = None
    nested: Nested | None = None
    matrix: str = ""
    by_steps: bool = False

    @cached_property
    def is_static(self) -> bool:
        """Whether its density can be recomputed from parameters without the model."""
        if self.nested is not None:
            return all(g.is_static for g in self.nested.groups)
        if self.family is None:
            assert self.raw is not None
            return not self.raw.requires_grad
        if self.value_binding is None:
            fixed = [self.value]
        else:
            fixed = []
            if not self.value_binding.is_static:
                return False
        fixed += [m for m in (self.mask, self.elements) if m is not None]
        scales = [s for s in self.scales if isinstance(s, Tensor)]
        return all(b.is_static for b in self.bindings.values()) and not any(
            t.requires_grad for t in fixed + scales
        )

    @cached_property
    def scales(self) -> Sequence[Tensor | float]:
        """The scales of all members, or the one that they share."""
        return (self.scale.value,) if isinstance(self.scale, Repeated) else self.scale

    @cached_property
    def is_unscaled(self) -> bool:
        """Whether every member counts once."""
        return all(not isinstance(s, Tensor) and s == 1.0 for s in self.scales)

    @cached_property
    def outlines(self) -> Mapping[str, Tensor]:
        """Tensors of the shapes and dtypes of the arguments, where nobody asks for their numbers."""
        own = self.arguments
        return own.outlines if isinstance(own, LaterArguments) else own

    def thin(self) -> Group:
        """The same group; what was expanded over its members is held once. # (members or 1, …)"""
        if len(self.members) == 1 or self.family is None:
            return self
        return self._thin

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_thin", "outlines")}

    @cached_property
    def _thin(self) -> Group:
        bindings = {n: b.thin() for n, b in self.bindings.items()}
        return replace(
            self,
            arguments={
                n: a[:1] if bindings[n].constant.shape[0] == 1 else a
                for n, a in self.arguments.items()
            },
            bindings=bindings,
            value=_once(self.value),
            mask=None if self.mask is None else _once(self.mask),
            value_binding=None if self.value_binding is None else self.value_binding.thin(),
            elements=None if self.elements is None else _once(self.elements),
        )

    @cached_property
    def params(self) -> tuple[str, ...]:
        """All parameters that reach the group."""
        if self.family is None:
            return self.raw_params or ()
        names = [p for b in self.bindings.values() for p in b.params]
        names.extend(self.raw_params or ())
        return tuple(dict.fromkeys(names))

    @cached_property
    def mean_params(self) -> tuple[str, ...]:
        """Parameters that reach the mean of a Normal, through coefficients of latents too."""
        parts = [self.bindings[a] for a in self.lines or ("loc",) if a in self.bindings]
        return tuple(dict.fromkeys(p for b in parts for p in b.params))

    def linear_in(self, block: Sequence[str], values: Mapping[str, Tensor]) -> Group:
        """The group as parameters that are not multiplied with each other see it.

        Args:
            block: These parameters.
            values: The others keep theirs.
        """
        if not any(b.pairs for b in self.bindings.values()):
            return self
        own = {name: b.linear_in(block, values) for name, b in self.bindings.items()}
        return replace(self, bindings=own)

    def evaluate_arguments(self, values: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The arguments at parameter values, or as traced where ``values`` is None."""
        if values is None:
            return dict(self.arguments)
        found = evaluated(self.bindings, values, self.outlines)
        return {n: found[n] if n in found else self.arguments[n] for n in self.bindings}

    def weights(self) -> Tensor:
        """What multiplies each member's log density: scale, and zero where it is masked.

        Returns:
            # (members, *sizes or 1s), and *to_event dims or 1s where elements are masked
        """
        ones = (1,) * len(self.sizes)
        parts = [
            s if isinstance(s, Tensor) else self.value.new_full(ones, s, dtype=torch.float64)
            for s in self.scales
        ]
        out = torch.stack(torch.broadcast_tensors(*parts)).expand(
            len(self.scale), *torch.broadcast_shapes(*(p.shape for p in parts))
        )
        if self.elements is not None:
            return out.reshape(out.shape + (1,) * self.event_dims) * self.elements
        return out if self.mask is None else out * self.mask

    def evaluate_value(self, values: Mapping[str, Tensor] | None) -> Tensor:
        """The members' values at parameter values, or as traced where ``values`` is None."""
        if values is None or self.value_binding is None or not self.value_binding.is_static:
            return self.value
        return self.value_binding.evaluate(values)

    def evaluated(self, values: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """The arguments and the members' values at parameter values."""
        return self.evaluate_arguments(values), self.evaluate_value(values)

    def thin_at(self, values: Mapping[str, Tensor]) -> tuple[Group, dict[str, Tensor], Tensor]:
        """The `thin` group, with its arguments and values at parameter values."""
        thin = self.thin()
        return thin, *thin.evaluated(values)

    def log_density_at(self, values: Mapping[str, Tensor]) -> Tensor:
        """log p of every cell at parameter values, through the bindings. # (members, *sizes)"""
        return self.log_density(*self.evaluated(values))

    def log_density(
        self, arguments: Mapping[str, Tensor] | None = None, value: Tensor | None = None
    ) -> Tensor:
        """log p of every cell, zero where an observation is masked. # (members, *sizes)"""
        full = (len(self.members), *self.sizes)
        if self.nested is not None:
            return self.nested.log_evidence(self.arguments if arguments is None else arguments)
        if self.belief is not None:
            return self.belief.expected_log_density(
                self, self.arguments if arguments is None else arguments
            )
        if self.family is None:
            assert self.raw is not None
            return self.raw.expand(full)
        log_p = log_density(
            self.family,
            self.value if value is None else value,
            self.arguments if arguments is None else arguments,
            len(full),
            self.event_dims,
            self.elements,
        ).expand(full)
        if self.mask is not None and self.observed:
            log_p = torch.where(self.mask, log_p, 0.0)
        return log_p


def seen_entries(group: Group) -> Tensor | None:
    """Which entries of the value are observed, whatever hides the others; None where all are.

    There are three ways: whole events are masked (``group.mask``), elements under ``to_event``
    (``group.elements``), or coordinates of a vector that are integrated out (NaN in the value).

    Args:
        group: The stacked factors.

    Returns:
        # (members, *dims or 1s, *to_event dims or 1s, *event or 1s), as the value
    """
    if not group.observed:
        return None
    lead, seen = 1 + len(group.sizes), list[Tensor]()
    event = group.value.dim() - lead
    if group.mask is not None:
        seen.append(group.mask.reshape(group.mask.shape + (1,) * event))
    if group.elements is not None:
        rest = group.value.dim() - group.elements.dim()
        seen.append(group.elements.reshape(group.elements.shape + (1,) * rest))
    if is_incomplete(group):
        out = torch.isnan(group.value).logical_not_()
        for other in seen:
            fits = torch.broadcast_shapes(out.shape, other.shape) == out.shape
            out = out.logical_and_(other) if fits else out & other
        return out
    return reduce(torch.logical_and, seen) if seen else None


def largest_counts(graph: FactorGraph) -> dict[str, int]:
    """The largest count of sites whose sums go by counts, by the first site of a group."""
    return {
        group.members[0]: group.family.natural.largest(group.value, group.arguments)
        for group in graph.groups
        if group.family is not None
        and group.family.natural is not None
        and group.family.natural.of_counts
    }


def is_incomplete(group: Group) -> bool:
    """Whether NaN in the value of a group stands for coordinates that are integrated out."""
    family = group.family
    return family is not None and family.distribution is IncompleteMultivariateNormal


def _once(t: Tensor) -> Tensor:
    return t[:1] if t.stride(0) == 0 else t


@dataclass(frozen=True, eq=False)
class FactorGraph:
    """A traced model.

    Attributes:
        structure: Its plates and sites.
        latents: The latents that are summed.
        groups: Stacked factors with bindings.
        parameters: All parameters.
        missing: What is missing.
        all_data: What is known of all data, where the graph holds a part of them.
        parted: The plate whose rows were read some at a time, as each stands by itself; else empty.
    """

    structure: Structure
    latents: Mapping[str, Latent]
    groups: Sequence[Group]
    parameters: Mapping[str, TracedParameter]
    missing: tuple[Missing, ...] = ()
    all_data: AllData | None = None
    parted: str = ""

    @property
    def is_static(self) -> bool:
        """Whether every density can be recomputed from the parameters without the model."""
        return all(g.is_static for g in self.groups)

    @property
    def dtype(self) -> torch.dtype:
        """The widest floating dtype among the densities."""
        dtypes = [
            t.dtype
            for g in self.groups
            for t in (*g.outlines.values(), g.value, *((g.raw,) if g.raw is not None else ()))
            if t.is_floating_point()
        ]
        return max(dtypes, key=lambda d: torch.finfo(d).bits, default=torch.get_default_dtype())

    @cached_property
    def eps(self) -> float:
        """The rounding of the coarsest floating tensor: densities, data or parameters."""
        parameters = [p.unconstrained for p in self.parameters.values()]
        tensors = [t for g in self.groups for t in (*g.outlines.values(), g.value)]
        floating = [t.dtype for t in (*parameters, *tensors) if t.is_floating_point()]
        return max((torch.finfo(d).eps for d in floating), default=torch.finfo(self.dtype).eps)

    def group_of(self, site: str) -> tuple[Group, int]:
        """The group that holds a site, and the site's place in it."""
        for group in self._whole:
            if isinstance(group.members, Members) and site in group.members:
                return group, group.members.index(site)
        return self._places[site]

    def thin_groups_of(self, sites: Iterable[str]) -> list[tuple[Group, int]]:
        """For each of some sites the `thin` group that holds it, and the site's place in it."""
        return [(group.thin(), place) for group, place in map(self.group_of, sites)]

    @property
    def _whole(self) -> list[Group]:
        """The groups of single sites, those that blocks integrate among them."""
        return [n for g in self.groups for n in (g.nested.groups if g.nested else (g,))]

    @cached_property
    def remembered(self) -> dict[Any, Any]:
        """What names were found to mean, for the next who asks; copies begin without."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("remembered", "_places")}

    @cached_property
    def _places(self) -> dict[str, tuple[Group, int]]:
        return {
            name: (g, i)
            for g in self._whole
            if not isinstance(g.members, Members)
            for i, name in enumerate(g.members)
        }

    def dim_sizes(self, dims: Collection[str]) -> dict[str, int]:
        """The sizes of some plates and of some latents' supports."""
        return {dim: self.dim_size(dim) for dim in dims}

    def dim_size(self, dim: str) -> int:
        """The size of a plate or of a latent's support."""
        if dim in self.latents:
            return self.latents[dim].size
        return self.structure.plates[dim].size


FIXED_SIZE = (
    "take the size from the data or from a number: len(x), not int(10 * p.item())",
    "fit the model once for each size that is of interest, and compare with BIC",
)
