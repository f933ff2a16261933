"""The skeleton of a model: its sites, plates and scopes, and what reads what."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.graph.coupling import Coupling
from pyro_em.graph.unregistered import Unregistered
from pyro_em.portable import Portable
from pyro_em.tracing.allocation import is_shadow
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.sites import Role


@dataclass(frozen=True)
class Plate:
    """A vectorised plate: its name, its dimension from the right, its size."""

    name: str
    dim: int
    size: int
    full_size: int


@dataclass(frozen=True, slots=True)
class SiteInfo:
    """One sample site that contributes a density.

    Attributes:
        name: The site's name.
        distribution: The name of its distribution.
        observed: Whether it has a value: observed, estimated or drawn by a guide.
        plates: Names of its plates, left to right.
        scope: Latents on which its density depends, itself included if latent, in model order.
        support_size: Number of values of an enumerable latent, else None.
        batch_dim: Number of its batch dimensions.
        role: What it stands for.
        is_discrete: Whether its support is discrete.
        nested: Names of all its plates, sequential ones too, outermost first.
        turns: For each of its plates that are loops the turn in which it was.
    """

    name: str
    distribution: str
    observed: bool
    plates: tuple[str, ...]
    scope: tuple[str, ...]
    support_size: int | None
    batch_dim: int
    role: Role = Role.DATA
    is_discrete: bool = False
    nested: tuple[str, ...] = ()
    turns: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Structure(Portable):
    """The skeleton of a model: everything but numbers.

    Attributes:
        plates: All vectorised plates by name.
        sites: All sites with a density, in model order, barren ones excluded.
        latents: Names of the latents to be summed exactly.
        barren: Unobserved sites without observed descendants, which integrate to one, and their
            distributions.
        max_plate_nesting: Number of dimensions that belong to plates.
        parameters: The parameters that the model read.
        masked_pairs: For each ``obs_mask`` site the user's name -> its mask.
        random_plates: Plates with random subsampling.
        kept_values: Values of the barren sites, which nothing that counts depends on.
        sequential: Sizes of the plates that are loops.
        notes: Warnings in words.
        unobserved: The unobserved sites as the plain run traced them.
        edges: Pairs (parent, child): the child's distribution uses the value of the parent.
        unchecked: Whether the run had no numbers, so that no distribution checked its arguments.
        device: Where tensors are in whose place it had none; None where it had numbers.
        coupled: Per latent whose elements in a plate are read by other elements, where.
        unregistered: Tensors that require gradients, reach a density and are no parameters.
        looked: The sites of the provenance run, which an enumerated run has to agree with; None
            where it has no numbers, or once they have been compared.
        by_numbers: Whether something of it was found out by looking at numbers: whether elements
            that an operation could mix are coupled, what a latent does that was read as a number of
            Python, that a latent is masked everywhere. Where an ``obs_mask`` is False is in
            ``masked_pairs``.
        passing: Sites that only carry values from step to step, and do not count.
        series: How its loops are read over index tensors, where they are
            (`pyro_em.graph.vectorised_loops.series.Unrolling`).
        lines: Sites whose mean is bound apart, as it reads Gaussian latents.
        lines_of_rows: Whether bindings give all of these means, and each row reads latents of its own,
            as the first one does.
        joined: Latents outside plates whose values the model may take together once they are
            enumerated: that run has to agree with plain ones at several of them.
    """

    plates: Mapping[str, Plate]
    sites: Mapping[str, SiteInfo]
    latents: Sequence[str]
    barren: Mapping[str, str]
    max_plate_nesting: int
    parameters: Mapping[str, TracedParameter]
    masked_pairs: Mapping[str, Tensor] = field(default_factory=dict)
    random_plates: tuple[str, ...] = ()
    kept_values: Mapping[str, Tensor] = field(default_factory=dict)
    unobserved: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sequential: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    edges: Sequence[tuple[str, str]] = ()
    unchecked: bool = False
    coupled: Mapping[str, Coupling] = field(default_factory=dict)
    unregistered: tuple[Unregistered, ...] = ()
    looked: Mapping[str, Mapping[str, Any]] | None = None
    by_numbers: bool = False
    passing: frozenset[str] = frozenset()
    series: Any = None
    lines: frozenset[str] = frozenset()
    lines_of_rows: bool = False
    joined: frozenset[str] = frozenset()
    device: torch.device | None = None

    def _travelling(self) -> dict[str, Any]:
        # What only runs of the model need: traced sites, values of barren latents.
        return {**vars(self), "unobserved": {}, "kept_values": {}, "series": None}

    def _staying(self) -> dict[str, Any]:
        return self._travelling()

    def nothing_like(self, name: str) -> Tensor:
        """No numbers, of the type and on the device of an unobserved site's values. # (0,)"""
        value = self.unobserved[name]["value"].detach()
        device = self.device if is_shadow(value) else value.device
        return torch.empty(0, dtype=value.dtype, device=device)

    @property
    def as_run(self) -> Structure:
        """The structure that a run shows: that of the template where loops run over indices."""
        return self if self.series is None else self.series.template

    @property
    def sketch(self) -> Structure:
        """The same with a few steps of each loop that runs over indices: they are all alike."""
        return self if self.series is None else self.series.sketch

    @cached_property
    def clamped(self) -> tuple[str, ...]:
        """The ``obs_mask`` sites whose labels are factors of a latent that all rows have."""
        return tuple(
            name
            for name in self.masked_pairs
            if f"{name}_observed" in self.sites
            and f"{name}_unobserved" in self.sites[f"{name}_observed"].scope
        )

    @cached_property
    def data_plates(self) -> tuple[str, ...]:
        """The plates that all observations share, outermost first; loops included."""
        data = [i for i in self.sketch.sites.values() if i.role is Role.DATA]
        if not data:
            return ()
        shared = set.intersection(*(set(i.nested) for i in data))
        return tuple(p for p in data[0].nested if p in shared)

    @cached_property
    def data_plate(self) -> str | None:
        """The outermost of ``data_plates``; None where it is a loop, or there is none."""
        outermost = next(iter(self.data_plates), None)
        return outermost if outermost in self.plates else None

    def are_local(self, latents: Iterable[str]) -> bool:
        """Whether every latent is drawn anew for each element of the data plate."""
        plate = self.data_plate
        names = [n for n in latents if n in self.sites]
        return plate is not None and all(
            plate in self.sites[n].plates and n not in self.coupled for n in names
        )


def form_of(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """What calls of one structure share: shapes, dtypes and devices; other values by identity."""
    out: list[Any] = []
    for a in (*args, *(kwargs[k] for k in sorted(kwargs))):
        if isinstance(a, Tensor):
            out.append((a.dtype, a.device, tuple(a.shape)))
        else:
            out.append(a if isinstance(a, (int, float, str, bool, type(None))) else id(a))
    return (tuple(out), tuple(sorted(kwargs)))
