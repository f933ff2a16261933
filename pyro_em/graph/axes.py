"""What the axes of a parameter run over: the values of a latent, a plate, the features of a site.

A parameter is a tensor without names, and how it reaches its sites says what its axes are. Where the
elements that are read at place i of a dimension of an argument are those with index i on an axis, the
axis runs along that dimension:

    mu[z] in Normal(mu[z], s).to_event(1)      (component, feature)
    A[z] in Categorical(A[z]), of z_t           (from, to)
    W @ h in Normal(W @ h, psi).to_event(1)    (feature, factor)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from pyro_em.graph.bindings.binding import Binding, Selection
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.sites import Role

_NUMBER = "0123456789_"
_MOST = 1000  # places along a dimension that are looked at one by one


class Over(Enum):
    """What a dimension of an argument stands for."""

    VALUES = "values"  # of a latent that the argument reads
    OWN = "own"  # of the latent whose probabilities the argument is
    PLATE = "plate"
    EVENT = "event"


@dataclass(frozen=True)
class Along:
    """An axis of a parameter, and a dimension that it runs along.

    Attributes:
        param: The parameter.
        axis: From the left.
        over: What the dimension stands for.
        name: Of the latent or the plate; of a dimension of an event what it holds.
    """

    param: str
    axis: int
    over: Over
    name: str


def axes_along(graph: FactorGraph, most: int | None = None) -> Iterator[Along]:
    """All axes that run along a dimension of an argument.

    Args:
        graph: A factor graph with bindings.
        most: Members of a group that are looked at; all where None. The steps of a chain are alike.
    """
    for outer in graph.groups:
        for group in outer.nested.groups if outer.nested is not None else (outer,):
            for argument in group.bindings:
                yield from _along_of(graph, group, argument, most)


def _along_of(graph: FactorGraph, group: Group, argument: str, most: int | None) -> Iterator[Along]:
    binding, known = group.bindings[argument], dict[tuple[str, int, int], list[int]]()
    for i, own in zip(range(len(group.members)), group.members, strict=False):
        if most is not None and i >= most:
            return
        names = _dimensions(graph, group, argument, i)
        place = 0 if binding.is_one_for_all else i
        for param in binding.params:
            shape = tuple(graph.parameters[param].leaf.shape)
            for d, (over, name) in enumerate(names):
                if (param, place, d) not in known:
                    known[param, place, d] = list(_axes_at(binding, param, place, d, shape))
                for axis in known[param, place, d]:
                    yield Along(param, axis, over, own if over is Over.OWN else name)


def _dimensions(
    graph: FactorGraph, group: Group, argument: str, member: int
) -> list[tuple[Over, str]]:
    """What each dimension of a member's argument stands for."""
    dims = group.dims[member]
    found = [(Over.VALUES if d in graph.latents else Over.PLATE, d) for d in dims]
    return found + _events(graph, group, argument, member, 1 + len(dims))


def _events(
    graph: FactorGraph, group: Group, argument: str, member: int, leading: int
) -> list[tuple[Over, str]]:
    """What the dimensions of an event hold: features, factors, categories."""
    number = group.bindings[argument].constant.dim() - leading
    if number <= 0:
        return []
    is_latent = group.role is Role.GAUSSIAN
    if argument in group.lines[1:]:  # a coefficient of a Gaussian latent
        site = group.bindings["loc"].constant.dim() - leading
        rows, columns = ("to", "from") if is_latent else ("feature", "factor")
        return [(Over.EVENT, rows)] * site + [(Over.EVENT, columns)] * (number - site)
    events = [(Over.EVENT, "factor" if is_latent else "feature")] * number
    rule = None if group.family is None else group.family.rules.get(argument)
    if rule is not None and rule.kind.form.is_row:
        is_own = group.members[member] in graph.latents
        events[-1] = (Over.OWN, "") if is_own else (Over.EVENT, "category")
    return events


def _axes_at(
    binding: Binding, param: str, member: int, dim: int, shape: Sequence[int]
) -> Iterator[int]:
    """The axes of a parameter that run along a dimension of a member's argument."""
    for selection in binding.selections:
        if selection.param == param:
            yield from (a for a in range(len(shape)) if _is_along(selection, member, dim, a, shape))
    jacobian = (binding.jacobians or {}).get(param)
    if jacobian is not None:
        yield from _axes_of_jacobian(jacobian, member, dim, shape)


def _is_along(selection: Selection, member: int, dim: int, axis: int, shape: Sequence[int]) -> bool:
    """Whether the element at place i of a dimension has index i on an axis, wherever it is read."""
    index = selection.index[min(member, len(selection.index) - 1)]
    size = index.shape[dim]
    if size < 2 or shape[axis] != size:
        return False
    stride = 1
    for s in shape[axis + 1 :]:
        stride *= s
    place = torch.arange(size, device=index.device)
    place = place.reshape(-1, *(1,) * (index.dim() - dim - 1))
    used = index >= 0
    same = (index // stride % size == place) | ~used
    return bool(same.all()) and bool(used.any())


def _axes_of_jacobian(
    jacobian: Jacobian, member: int, dim: int, shape: Sequence[int]
) -> Iterator[int]:
    """The axes whose elements each reach one place along a dimension, in order."""
    cells = jacobian.value.shape[1:-1]
    size = cells[dim]
    if size < 2 or size > _MOST or size not in shape:
        return
    own = jacobian.mapped(lambda t: t[member : member + 1])
    places = torch.arange(size, device=own.value.device).reshape(-1, *(1,) * (len(cells) - dim - 1))
    reached = torch.stack([own.reached((places == i).expand(1, *cells)) for i in range(size)])
    reached = reached.reshape(size, *shape)
    same = torch.eye(size, dtype=torch.bool, device=reached.device)
    for axis in range(len(shape)):
        if shape[axis] == size:
            along = reached.movedim(axis + 1, 1).reshape(size, size, -1).any(-1)
            if torch.equal(along, same):
                yield axis


# ------------------------------------------------------------------ names


def axis_names(graph: FactorGraph) -> dict[str, tuple[str, ...]]:
    """A name for each axis of each parameter.

    ``component`` is the axis of a latent's values (of several latents that share no components each
    has the latent's own name), ``from`` and ``to`` are those of a table of transitions, ``category``
    that of the values of an observed site, ``feature`` an event's, ``factor`` a Gaussian latent's,
    ``covariate`` what coefficients multiply. A plate's axis has the plate's name, any other is an
    ``index``. Of several axes with one name the second ends in ``_2``.

    Args:
        graph: A factor graph with bindings.

    Returns:
        For each parameter one name per axis, all different.
    """
    found = list(axes_along(graph, most=2))
    classes = _classes(found)
    affine = _affine_params(graph)
    singles = _of_size_one(graph)
    names: dict[str, tuple[str, ...]] = {}
    for param, p in graph.parameters.items():
        own = [f for f in found if f.param == param]
        axes = [_name_of(own, axis, classes) for axis in range(p.leaf.dim())]
        if any(f.over is Over.OWN for f in own):
            axes = _transitions(axes, own, classes)
        left = list(singles.get(param, ()))
        for axis, size in enumerate(p.leaf.shape):
            if axes[axis] is None and size == 1 and left:
                axes[axis] = left.pop(0)
            elif axes[axis] is None:
                axes[axis] = "covariate" if param in affine and size > 1 else "index"
        names[param] = _all_different([a for a in axes if a is not None])
    return names


def _name_of(own: Sequence[Along], axis: int, classes: Mapping[tuple[str, int], str]) -> str | None:
    """Of an axis the latent whose values it runs over; else the first plate or event it runs along."""
    here = [f for f in own if f.axis == axis]
    for over in ((Over.VALUES, Over.OWN), (Over.PLATE,), (Over.EVENT,)):
        for f in here:
            if f.over in over:
                return classes[f.param, axis] if f.over in (Over.VALUES, Over.OWN) else f.name
    return None


def _transitions(
    axes: Sequence[str | None], own: Sequence[Along], classes: Mapping[tuple[str, int], str]
) -> list[str | None]:
    """``from`` and ``to`` where a latent's probabilities are read at a latent of its own kind."""
    to = next(f.axis for f in own if f.over is Over.OWN)
    kind = classes[own[0].param, to]
    before = [a for a, name in enumerate(axes) if name == kind and a != to]
    if not before:
        return list(axes)
    return ["from" if a in before else "to" if a == to else name for a, name in enumerate(axes)]


def _classes(found: Sequence[Along]) -> dict[tuple[str, int], str]:
    """For each axis over the values of latents the name of all latents that share them."""
    of_latents = [f for f in found if f.over in (Over.VALUES, Over.OWN)]
    number: dict[object, int] = {}
    for i, f in enumerate(of_latents):
        a, b = number.get(f.name, i), number.get((f.param, f.axis), i)
        first, other = min(a, b), max(a, b)
        number = {key: first if n == other else n for key, n in number.items()}
        number[f.name] = number[f.param, f.axis] = first
    kinds = {number[f.name]: "" for f in of_latents}
    if len(kinds) == 1:
        stems = dict.fromkeys(kinds, "component")
    else:
        firsts = {n: next(f.name for f in of_latents if number[f.name] == n) for n in kinds}
        stems = {n: name.rstrip(_NUMBER) or name for n, name in firsts.items()}
        if len(set(stems.values())) < len(stems):
            stems = firsts
    return {(f.param, f.axis): stems[number[f.name]] for f in of_latents}


def _of_size_one(graph: FactorGraph) -> dict[str, list[str]]:
    """For each parameter the latents and events of one value that an argument of it has, in order.

    No element tells whether an axis of size one runs along a dimension of size one.
    """
    out: dict[str, list[str]] = {}
    several = sum(z.size > 1 for z in graph.latents.values())
    for outer in graph.groups:
        for group in outer.nested.groups if outer.nested is not None else (outer,):
            for argument, binding in group.bindings.items():
                sizes = (*group.sizes, *binding.constant.shape[1 + len(group.sizes) :])
                names = []
                for (over, name), size in zip(
                    _dimensions(graph, group, argument, 0), sizes, strict=False
                ):
                    if size == 1 and over in (Over.VALUES, Over.OWN):
                        own = group.members[0] if over is Over.OWN else name
                        names.append(own if several else "component")
                    elif size == 1 and over is Over.EVENT:
                        names.append(name)
                for param in binding.params:
                    out.setdefault(param, names)
    return out


def _affine_params(graph: FactorGraph) -> set[str]:
    """Parameters that multiply something that is known, other than an indicator."""
    out: set[str] = set()
    for outer in graph.groups:
        for group in outer.nested.groups if outer.nested is not None else (outer,):
            for binding in group.bindings.values():
                jacobians = binding.jacobians or {}
                out.update(n for n, j in jacobians.items() if not _is_indicator(j))
                out.update(n for pair in binding.pairs or () for n in pair)
    return out


def _is_indicator(jacobian: Jacobian) -> bool:
    """Whether each element of the argument is one element of the parameter, or none."""
    value = jacobian.value
    for d in range(value.dim() - 1):
        value = value.narrow(d, 0, 1) if value.stride(d) == 0 and value.shape[d] > 1 else value
    read = value != 0
    return bool((read.sum(-1) <= 1).all()) and bool((value[read] == 1).all())


def _all_different(names: Sequence[str]) -> tuple[str, ...]:
    """Names of axes, the second of one name with a number.

    Example:
        >>> _all_different(["component", "feature", "feature"])
        ('component', 'feature', 'feature_2')
    """
    out: list[str] = []
    for i, name in enumerate(names):
        before = list(names[:i]).count(name)
        out.append(f"{name}_{before + 1}" if before else name)
    return tuple(out)
