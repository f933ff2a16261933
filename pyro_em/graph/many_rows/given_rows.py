"""The graph of large data whose rows are those of the model's arguments.

Most models read the columns of their arguments as they stand: what multiplies the coefficients of a
row are its covariates. A few rows by themselves show which columns these are. Then the graph of all
rows is that of the few with the columns in place of theirs, and one run of the model, at other
parameters and in slices of its data, says whether that is so of each row: an argument that is affine in
parameters and agrees with another one where parameters are in general position is the same everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.expanded import once_each
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.graph.later_arguments import LaterArguments
from pyro_em.graph.many_rows.slices import Slices
from pyro_em.graph.prediction import disagreements
from pyro_em.graph.structure import Structure
from pyro_em.tracing.parameters import moved, parameters_at, values_of

Numbers = Callable[[tuple, Structure, Mapping[str, Tensor]], FactorGraph]

_MANY = 4096  # columns of one tensor that are looked for

_SEED = 19


class NotGiven(Exception):
    """Numbers of rows are none of those that the model was given."""


class Given:
    """The columns of a model's arguments, found by what stands in a few rows of them.

    Args:
        slices: How the arguments are cut.
        rows: A few rows.
    """

    def __init__(self, slices: Slices, rows: Tensor) -> None:
        self.rows = rows
        whole = (a.detach() for a in slices.args[: slices.parted])
        self.whole = [a.reshape(len(a), -1) for a in whole]
        self.few = [a[rows.to(a.device)] for a in self.whole]
        self._places: dict[tuple[torch.dtype, bytes], tuple[int, int]] | None = None

    @property
    def places(self) -> dict[tuple[torch.dtype, bytes], tuple[int, int]]:
        """Which argument, and which of its columns, has some numbers in the few rows."""
        if self._places is None:
            self._places = {}
            for i, few in enumerate(self.few):
                for c in range(min(few.shape[1], _MANY)):
                    self._places.setdefault((few.dtype, _as_bytes(few[:, c])), (i, c))
        return self._places

    def find(self, few: Tensor) -> Tensor:
        """The numbers of all rows, from those of the few ones. # (few, *rest) to (N, *rest)

        Raises:
            NotGiven: If some are none of those that the model was given.
        """
        rest, flat = few.shape[1:], few.reshape(len(few), -1)
        for own, whole in zip(self.few, self.whole, strict=True):
            if own.shape == flat.shape and own.dtype == flat.dtype and _is_same(own, flat):
                return whole.reshape(len(whole), *rest)
        if flat.shape[1] > _MANY:
            raise NotGiven
        if flat.shape[1] == 1 and flat.dtype == torch.int64:
            chosen = self._chosen(flat[:, 0])
            if chosen is not None:
                return chosen.reshape(-1, *rest)
        found = [self._place(c) for c in flat.unbind(1)]
        if any(f is None and bool((c != c[0]).any()) for f, c in zip(found, flat.T, strict=True)):
            raise NotGiven
        if not any(found):
            return few[:1].expand(len(self.whole[0]), *rest)
        first, begin, sign = found[0] or (0, 0, 1)
        if found == [(first, begin + i, sign) for i in range(len(found))]:
            out = self.whole[first][:, begin : begin + len(found)]
            out = out if sign > 0 else -out
        else:
            columns = [
                c[:1].expand(len(self.whole[0])) if f is None else f[2] * self.whole[f[0]][:, f[1]]
                for f, c in zip(found, flat.T, strict=True)
            ]
            out = torch.stack(columns, 1)
        return out.reshape(len(out), *rest)

    def _place(self, column: Tensor) -> tuple[int, int, int] | None:
        """Which argument, which of its columns and with which sign a column of the few rows is."""
        for sign in (1, -1) if column.is_floating_point() else (1,):
            found = self.places.get((column.dtype, _as_bytes(column if sign > 0 else -column)))
            if found is not None:
                return (*found, sign)
        return None

    def _chosen(self, few: Tensor) -> Tensor | None:
        """Numbers of elements that a known group of each row chooses, a + b g_n; None for others.

        Args:
            few: Those of the few rows. # (few,)
        """
        if bool((few == few[0]).all()):
            return None
        for own, whole in zip(self.few, self.whole, strict=True):
            if own.dtype != torch.int64:
                continue
            for c, column in enumerate(own.unbind(1)):
                other = int((column != column[0]).to(torch.int8).argmax())
                step, rest = int(column[other] - column[0]), int(few[other] - few[0])
                if not step or rest % step:
                    continue
                slope = rest // step
                first = int(few[0]) - slope * int(column[0])
                if torch.equal(slope * column + first, few):
                    return slope * whole[:, c] + first
        return None


def of_given_rows(alone: FactorGraph, rows: Tensor, slices: Slices) -> FactorGraph | None:
    """The graph of all rows, if they are those of the model's arguments; None where they are not.

    Args:
        alone: The graph of a few rows by themselves.
        rows: Which these are.
        slices: How the model's arguments are cut into rows.
    """
    given = Given(slices, rows)
    values = values_of(alone.parameters)
    try:
        groups = tuple(_of_all(group, given, slices, values) for group in alone.groups)
    except NotGiven:
        return None
    return replace(alone, structure=slices.structure, groups=groups, parted=slices.plate)


def _of_all(group: Group, given: Given, slices: Slices, values: Mapping[str, Tensor]) -> Group:
    """A group of all rows."""
    if slices.plate not in group.dims[0]:
        return group
    at = 1 + group.dims[0].index(slices.plate)
    lead = 1 + group.n_plates
    group = replace(group, bindings={n: without_zeros(b, lead) for n, b in group.bindings.items()})
    if group.members[0] in slices.structure.lines:
        group = _without_mean(group)
    whole = in_all_rows(given, slices.rows, at)
    sizes = tuple(slices.rows if at == 1 + d else n for d, n in enumerate(group.sizes))
    return replace(mapped_group(group, whole, later=(at, values)), sizes=sizes)


def _without_mean(group: Group) -> Group:
    """A site without the mean at Gaussian latents of zero, in whose place its line's offset comes."""
    loc = group.arguments["loc"]
    nothing = loc.new_full((), torch.nan).expand(loc.shape)
    binding = replace(group.bindings["loc"], constant=nothing)
    return replace(
        group,
        arguments={**group.arguments, "loc": nothing},
        bindings={**group.bindings, "loc": binding},
    )


def in_all_rows(given: Given, rows: int, at: int) -> Callable[[Tensor], Tensor]:
    """What makes of a tensor of the few rows that of all rows.

    Args:
        given: The columns of a model's arguments.
        rows: How many rows there are.
        at: The dimension of the rows.

    Returns:
        A function, which raises `NotGiven` where numbers are none of those columns.
    """

    def whole(t: Tensor) -> Tensor:
        one, shape = once_each(t.detach()), list(t.shape)
        if shape[at] > 1:
            shape[at] = rows
        if one.shape[at] == 1:
            return one.expand(shape)
        return given.find(one.movedim(at, 0)).movedim(0, at).expand(shape)

    return whole


def without_zeros(binding: Binding, lead: int) -> Binding:
    """A binding whose Jacobians do not hold what a cell never reads, as those of many rows do not."""
    if binding.jacobians is None:
        return binding
    jacobians = {n: j.without_zeros(lead) for n, j in binding.jacobians.items()}
    return replace(binding, jacobians=jacobians)


def is_of_all(graph: FactorGraph, slices: Slices, numbers: Numbers) -> bool:
    """Whether a graph says of all rows, at other parameters, what the model does.

    Args:
        graph: The graph of all rows.
        slices: How the model's arguments are cut into rows.
        numbers: The graph of a model with some rows at given parameters, without bindings.
    """
    places = graph.parameters
    unconstrained = moved(places, seed=_SEED)
    direct = {n: u for n, u in unconstrained.items() if places[n].leaf is places[n].unconstrained}
    with torch.no_grad():
        values = {n: transform_to(places[n].constraint)(u) for n, u in unconstrained.items()}
    predicted = {**values_of(places), **values}
    with parameters_at({n: places[n] for n in direct}, direct, unconstrained=True):
        return says_of_all(graph, slices, lambda own, part: numbers(own, part, values), predicted)


def says_of_all(
    graph: FactorGraph,
    slices: Slices,
    fresh: Callable[[tuple, Structure], FactorGraph],
    values: Mapping[str, Tensor],
    *,
    exactly: bool = False,
) -> bool:
    """Whether a graph says of all rows what the model does, some of them at a time.

    Args:
        graph: The graph of all rows.
        slices: How the model's arguments are cut into rows.
        fresh: The graph of a model with some rows, without bindings.
        values: The parameters at which it is made.
        exactly: Whether what no parameter reaches has to be the same number; else up to rounding.
    """
    return not any(
        disagreements(
            some_rows(graph, slices.plate, rows), fresh(*slices.at(rows)), values, exactly=exactly
        )
        for rows in slices
    )


def some_rows(graph: FactorGraph, plate: str, rows: Tensor | slice) -> FactorGraph:
    """A graph with some of its rows."""
    count = rows.stop - rows.start if isinstance(rows, slice) else len(rows)
    groups = []
    for group in graph.groups:
        if plate not in group.dims[0]:
            groups.append(group)
            continue
        at = 1 + group.dims[0].index(plate)

        def cut(t: Tensor, at: int = at) -> Tensor:
            one, shape = once_each(t), list(t.shape)
            if one.shape[at] > 1 and isinstance(rows, slice):
                one = one.narrow(at, rows.start, count)
            elif one.shape[at] > 1 and isinstance(rows, Tensor):
                one = one.index_select(at, rows.to(t.device))
            if shape[at] > 1:
                shape[at] = count
            return one.expand(shape)

        sizes = (*group.sizes[: at - 1], count, *group.sizes[at:])
        groups.append(replace(mapped_group(group, cut), sizes=sizes))
    return replace(graph, groups=tuple(groups))


def slice_of(group: Group, rows: slice) -> Group:
    """A group with some elements of its first plate, in memory that it shares."""

    def cut(t: Tensor) -> Tensor:
        return t[:, rows] if t.shape[1] > 1 else t

    size = rows.stop - rows.start
    return replace(mapped_group(group, cut), sizes=(size, *group.sizes[1:]))


Later = tuple[int, Mapping[str, Tensor]]


def tensors_of(group: Group, later: Later | None = None) -> Iterator[Tensor]:
    """All tensors of a group, in the order in which `mapped_group` changes them."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped_group(group, note, later)
    return iter(found)


def mapped_group(
    group: Group, change: Callable[[Tensor], Tensor], later: Later | None = None
) -> Group:
    """A group with other tensors; what no binding says is not held twice.

    Args:
        group: The group.
        change: What each tensor becomes.
        later: The dimension of the rows, and the parameters at the trace: what differs from row to
            row and follows from these is computed when somebody asks. What is so already stays so.
    """

    def maybe(t: Tensor | None) -> Tensor | None:
        return None if t is None else change(t)

    computed = _computed(group, None if later is None else later[0])
    held = {name: change(t) for name, t in group.outlines.items() if name not in computed}
    bindings: dict[str, Binding] = {}
    for name, b in group.bindings.items():
        bindings[name] = b.mapped(change) if b.is_static else replace(b, constant=held[name])
    arguments: Mapping[str, Tensor] = held
    if isinstance(group.arguments, LaterArguments):
        arguments = group.arguments.rebound(held, bindings)
    elif computed and later is not None:
        dtypes = {name: group.arguments[name].dtype for name in computed}
        own = {name: held.get(name) for name in group.arguments}
        arguments = LaterArguments(own, bindings, later[1], dtypes)
    return replace(
        group,
        arguments=arguments,
        bindings=bindings,
        value=change(group.value),
        mask=maybe(group.mask),
        scale=tuple(
            change(s.unsqueeze(0)).squeeze(0) if isinstance(s, Tensor) else s for s in group.scale
        ),
        elements=maybe(group.elements),
    )


def _computed(group: Group, at: int | None) -> frozenset[str]:
    """The arguments that are computed when somebody asks."""
    if isinstance(group.arguments, LaterArguments):
        return frozenset(n for n, own in group.arguments.held.items() if own is None)
    if at is None:
        return frozenset()
    return frozenset(
        name
        for name, b in group.bindings.items()
        if b.is_static and b.params and once_each(group.arguments[name]).shape[at] > 1
    )


def _as_bytes(column: Tensor) -> bytes:
    return column.contiguous().cpu().numpy().tobytes()


def _is_same(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are the same to the bit, NaN too."""
    return torch.equal(a, b) or _as_bytes(a) == _as_bytes(b)
