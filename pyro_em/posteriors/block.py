"""Blocks: latents that are solved together, and what every way of solving them has to offer.

A component is a set of latents that share factors. A block solves one component exactly: its log
evidence, the posterior of its latents, and its sums over the data. Blocks can nest: where a
component reads discrete latents outside it (its *scope*), its log evidence per cell of the scope,

    table(cell) = log Σ_z Π_f f(z, cell),

takes the place of its factors in the contraction of those latents, and the posterior of the cells
weighs its sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self, cast

from torch import Tensor

from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.vectorised_loops.latent_series import chain_form
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.update import ParameterUpdate

Values = Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class Component:
    """Latents that share factors, with all that a block may ask of them.

    Attributes:
        graph: The factor graph; its bindings are static.
        updates: What was decided for its parameters.
        values: Parameter values, for their shapes.
        latents: The component's latents, in model order.
        scope: Discrete latents outside it that its factors read.
    """

    graph: FactorGraph
    updates: Mapping[str, ParameterUpdate]
    values: Values
    latents: tuple[str, ...]
    scope: tuple[str, ...] = ()


class Block(Protocol):
    """Latents that are solved together."""

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        """The block of a component, or why it does not serve: the plan's reason."""
        ...

    @property
    def name(self) -> str:
        """What the plan calls it."""
        ...

    @property
    def latents(self) -> tuple[str, ...]:
        """The latents that it sums."""
        ...

    @property
    def scope(self) -> tuple[str, ...]:
        """Discrete latents outside it that it reads."""
        ...

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the dimensions of ``table``: plates, then the scope."""
        ...

    def table(self, values: Values) -> Tensor:
        """The log evidence per cell, in nats. # (*plates, *scope)"""
        ...

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums over the data, each cell of ``table`` counted as often as it weighs.

        Args:
            values: Constrained parameter values by name.
            weights: One number per cell of ``table``; one each where None. # (*plates, *scope)
        """
        ...


def components_of(graph: FactorGraph) -> tuple[tuple[str, ...], ...]:
    """The latents that share factors, directly or through others, each set in model order."""
    form = chain_form(graph)
    if form is not None:
        return (cast(tuple[str, ...], form.names),)  # any number of names
    root = {name: name for name in graph.latents}

    def find(name: str) -> str:
        while root[name] != name:
            root[name] = root[root[name]]
            name = root[name]
        return name

    for group in graph.groups:
        for dims in group.dims:
            read = [d for d in dims if d in root]
            for other in read[1:]:
                root[find(other)] = find(read[0])
    found: dict[str, list[str]] = {}
    for name in graph.latents:
        found.setdefault(find(name), []).append(name)
    return tuple(tuple(names) for names in found.values())
