"""The order of a contraction, decided from names and sizes alone.

Variables of an innermost plate are eliminated first, the one with the smallest resulting table before
the others; then the plate is reduced by a product, and so on outwards.

Source: Obermeyer et al. (2019), "Tensor variable elimination for plated factor graphs".
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from pyro_em.errors import Finding, raise_findings


@dataclass(frozen=True)
class Align:
    """How one table is brought to the dimensions of a product."""

    permutation: tuple[int, ...]
    shape: tuple[int | None, ...]  # None keeps the next permuted dimension, 1 inserts one

    @cached_property
    def leaves_all(self) -> bool:
        """Whether the table has these dimensions as it is."""
        is_ordered = self.permutation == tuple(range(len(self.permutation)))
        return is_ordered and all(size is None for size in self.shape)


@dataclass(frozen=True)
class Eliminate:
    """One step of a contraction: multiply tables, and sum a latent out of their product.

    Attributes:
        inputs: The numbers of the tables.
        alignments: How each is brought to the product's dimensions.
        exponents: What a table's logarithms are multiplied by: ("divide", f) one over the scale of f,
            ("ratio", f) the scale of the table's factor over that of f; None where nothing is.
        output: The number of the result.
        dims: The product's dimensions: plates, other latents, the eliminated one.
    """

    inputs: tuple[int, ...]
    alignments: tuple[Align, ...]
    exponents: tuple[tuple[str, int] | None, ...]
    output: int
    dims: tuple[str, ...]


@dataclass(frozen=True)
class Reduce:
    """One step of a contraction: scale a table's logarithms, and sum them over plates.

    Attributes:
        input: The number of the table.
        output: The number of the result.
        axes: The plates' positions.
        scale: The factor whose scale multiplies the table before it is summed, or None.
        table_dims: The table's dimensions.
        is_final: Whether the table is a term of the log evidence, which is left unsummed.
    """

    input: int
    output: int
    axes: tuple[int, ...]
    scale: int | None
    table_dims: tuple[str, ...]
    is_final: bool


@dataclass(frozen=True)
class ContractionPlan:
    """The order of a contraction, decided from names and sizes alone.

    Attributes:
        cells: Cells of the largest table, plates included.
        largest: Names of that table's dimensions.
    """

    steps: tuple[Eliminate | Reduce, ...]
    factor_dims: tuple[tuple[str, ...], ...]
    plates: frozenset[str]
    cells: int
    largest: tuple[str, ...]
    same_scale: tuple[tuple[int, int], ...]
    locals_scaled_by: Mapping[int, int]

    @property
    def eliminations(self) -> list[tuple[str, ...]]:
        """The dimensions of each table from which a latent is eliminated, that latent last."""
        return [step.dims for step in self.steps if isinstance(step, Eliminate)]


class LaterContraction(ContractionPlan):
    """The order of a contraction whose cost is known, decided when somebody asks for more.

    Args:
        make: Decides it.
        cells: Cells of the largest table, plates included.
        largest: Names of that table's dimensions.
    """

    def __init__(
        self, make: Callable[[], ContractionPlan], cells: int, largest: tuple[str, ...]
    ) -> None:
        vars(self).update(make=make, cells=cells, largest=largest)

    def __getattr__(self, name: str) -> Any:
        make = vars(self).pop("make", None)
        if make is None:
            raise AttributeError(name)
        vars(self).update({**vars(make()), **vars(self)})
        return getattr(self, name)

    def __reduce__(self) -> tuple[Any, ...]:
        names = [f.name for f in fields(ContractionPlan)]
        return ContractionPlan, tuple(getattr(self, name) for name in names)


def plan_contraction(
    factor_dims: Sequence[Sequence[str]],
    latent_plates: Mapping[str, Iterable[str]],
    sizes: Mapping[str, int],
    *,
    own_latent: Sequence[str | None] | None = None,
) -> ContractionPlan:
    """Choose an elimination order by smallest resulting table, innermost plates first.

    Args:
        factor_dims: For each factor the names of its plates and latents.
        latent_plates: The plates of each latent.
        sizes: The size of each dimension.
        own_latent: For each factor the latent whose prior it is, if any; its scale is then that of
            everything summed with the latent.

    Raises:
        ModelError: If two plates' elements are coupled, so that no product over plates exists.

    Example:
        >>> plan = plan_contraction(
        ...     [("n", "z"), ("n", "z")], {"z": ["n"]}, {"n": 10, "z": 3})
        >>> plan.cells
        30
    """
    plates_of = {v: frozenset(p) for v, p in latent_plates.items()}
    plates = frozenset(p for ps in plates_of.values() for p in ps) | frozenset(
        d for dims in factor_dims for d in dims if d not in plates_of
    )
    own_latent = list(own_latent or [None] * len(factor_dims))
    return _Planner(factor_dims, plates_of, plates, sizes, own_latent).run()


def alignment(source: Sequence[str], target: Sequence[str]) -> Align:
    """How a table over some dimensions is laid out over others.

    Args:
        source: The table's dimensions.
        target: The wanted dimensions; those that the table lacks have size one.
    """
    present = [d for d in target if d in source]
    permutation = tuple(list(source).index(d) for d in present)
    return Align(permutation, tuple(None if d in present else 1 for d in target))


class _Planner:
    def __init__(
        self,
        factor_dims: Sequence[Sequence[str]],
        plates_of: Mapping[str, frozenset[str]],
        plates: frozenset[str],
        sizes: Mapping[str, int],
        own_latent: Sequence[str | None],
    ) -> None:
        self.dims: dict[int, tuple[str, ...]] = {i: tuple(d) for i, d in enumerate(factor_dims)}
        self.factor_dims = tuple(tuple(d) for d in factor_dims)
        self.n_factors = len(self.dims)
        self.next = self.n_factors
        self.plates_of, self.plates, self.sizes = plates_of, plates, sizes
        self.own_latent = own_latent
        self.steps: list[Eliminate | Reduce] = []
        self.cells = 1
        self.largest: tuple[str, ...] = ()
        self.same_scale: list[tuple[int, int]] = []
        self.scale_of: dict[int, int | None] = {i: i for i in range(self.n_factors)}
        self.locals_scaled_by: dict[int, int] = {}
        for dims in self.factor_dims:
            self._count(dims)

    def _count(self, dims: Sequence[str]) -> None:
        cells = math.prod(self.sizes[d] for d in dims)
        if cells > self.cells:
            self.cells, self.largest = cells, tuple(dims)

    def _variables(self, slot: int) -> list[str]:
        return [d for d in self.dims[slot] if d in self.plates_of]

    def run(self) -> ContractionPlan:
        waiting: dict[frozenset[str], list[int]] = {}
        for slot, dims in self.dims.items():
            waiting.setdefault(frozenset(d for d in dims if d in self.plates), []).append(slot)
        while waiting:
            leaf = max(waiting, key=lambda ps: (len(ps), sorted(ps)))
            for component in self._components(waiting.pop(leaf), leaf):
                for slot in self._eliminate_all(component, leaf):
                    outer = self._variables(slot)
                    target = frozenset().union(*(self.plates_of[v] for v in outer))
                    if outer and target >= leaf:
                        self._refuse(outer, leaf)
                    out = self._reduce(slot, leaf - target, final=not outer)
                    if outer:
                        waiting.setdefault(target, []).append(out)
        return ContractionPlan(
            tuple(self.steps),
            self.factor_dims,
            self.plates,
            self.cells,
            self.largest,
            tuple(self.same_scale),
            dict(self.locals_scaled_by),
        )

    def _refuse(self, outer: Sequence[str], leaf: frozenset[str]) -> None:
        names = " and ".join(f"'{v}'" for v in outer)
        raise_findings(
            [
                Finding(
                    f"latents {names}",
                    "they are coupled across the plates " + ", ".join(sorted(leaf)) + ".",
                    "each element of one plate meets each of the other, so the exact sum is "
                    "exponential in a plate's size",
                    (
                        "put the latents into a common plate",
                        "write a small plate as a loop: for i in pyro.plate(name, size) (the exact "
                        "sum is then over all combinations of its elements)",
                        f"give a guide that draws one of {names}: ExactPosteriorEM(model, guide)",
                    ),
                    latents=tuple(outer),
                )
            ]
        )

    def _components(self, slots: Sequence[int], leaf: frozenset[str]) -> list[list[int]]:
        """Connected by variables that live exactly in ``leaf``."""
        by_variable: dict[str, list[int]] = {}
        for slot in slots:
            for v in self._variables(slot):
                if self.plates_of[v] == leaf:
                    by_variable.setdefault(v, []).append(slot)
        neighbours: dict[int, list[str]] = {}
        for v, members in by_variable.items():
            for slot in members:
                neighbours.setdefault(slot, []).append(v)
        seen: set[int] = set()
        components = []
        for slot in slots:
            if slot in seen:
                continue
            component, stack = [], [slot]
            seen.add(slot)
            done: set[str] = set()
            while stack:
                s = stack.pop()
                component.append(s)
                for v in neighbours.get(s, ()):
                    if v in done:
                        continue
                    done.add(v)
                    for other in by_variable[v]:
                        if other not in seen:
                            seen.add(other)
                            stack.append(other)
            components.append(sorted(component))
        return components

    def _eliminate_all(self, component: list[int], leaf: frozenset[str]) -> list[int]:
        holders: dict[str, set[int]] = {}
        for slot in component:
            for v in self._variables(slot):
                if self.plates_of[v] == leaf:
                    holders.setdefault(v, set()).add(slot)
        if not holders:
            return component
        self._agree_on_scale(component, holders)
        alive = set(component)
        heap: list[tuple[int, int, str]] = []
        order = {v: i for i, v in enumerate(self.plates_of)}
        cost_of: dict[str, int] = {}

        def push(v: str) -> None:
            union = {d for s in holders[v] for d in self.dims[s]}
            cost = math.prod(self.sizes[d] for d in union)
            if cost_of.get(v) != cost:
                cost_of[v] = cost
                heapq.heappush(heap, (cost, order[v], v))

        for v in holders:
            push(v)
        while heap:
            cost, _, v = heapq.heappop(heap)
            if v not in holders or cost_of[v] != cost:
                continue
            inputs = sorted(holders.pop(v))
            out = self._eliminate(inputs, v, leaf)
            alive.difference_update(inputs)
            alive.add(out)
            touched = {w for s in inputs for w in self._variables(s) if w in holders}
            for w in touched:
                holders[w].difference_update(inputs)
                holders[w].add(out)
            for w in touched:
                push(w)
        return sorted(alive)

    def _agree_on_scale(self, component: Sequence[int], holders: Mapping[str, set[int]]) -> None:
        """Everything summed with a latent is scaled as the latent's own site is."""
        owners = [s for s in component if s < self.n_factors and self.own_latent[s] in holders]
        if not owners:
            return
        reference, others = owners[0], set(owners[1:])
        for s in component:
            if s in others:
                self.same_scale.append((reference, s))
            self.locals_scaled_by[s] = reference

    def _eliminate(self, inputs: Sequence[int], variable: str, leaf: frozenset[str]) -> int:
        union = list(dict.fromkeys(d for s in inputs for d in self.dims[s]))
        kept_plates = [d for d in union if d in self.plates]
        kept = [d for d in union if d not in self.plates and d != variable]
        dims = (*kept_plates, *kept, variable)
        self._count(dims)
        out = self.next
        self.next += 1
        exponents: list[tuple[str, int] | None] = []
        for s in inputs:
            reference = self.locals_scaled_by.get(s)
            if reference is None or reference == s:
                exponents.append(None)
            elif self.scale_of[s] is None:  # already multiplied by its own scale
                exponents.append(("divide", reference))
            elif s < self.n_factors:
                exponents.append(("ratio", reference))
            else:
                exponents.append(None)
        self.steps.append(
            Eliminate(
                tuple(inputs),
                tuple(alignment(self.dims[s], dims) for s in inputs),
                tuple(exponents),
                out,
                dims,
            )
        )
        self.dims[out] = dims[:-1]
        references = [r for s in inputs if (r := self.locals_scaled_by.get(s)) is not None]
        self.scale_of[out] = references[0] if references else None
        if references:  # what is summed on with other latents keeps the component's scale
            self.locals_scaled_by[out] = references[0]
        return out

    def _reduce(self, slot: int, plates: frozenset[str], *, final: bool) -> int:
        out = self.next
        self.next += 1
        dims = self.dims[slot]
        axes = tuple(i for i, d in enumerate(dims) if d in plates)
        self.steps.append(Reduce(slot, out, axes, self.scale_of[slot], dims, final))
        self.dims[out] = tuple(d for d in dims if d not in plates)
        self.scale_of[out] = None
        return out
