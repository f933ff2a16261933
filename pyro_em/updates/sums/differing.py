"""Which arguments of a model's groups differ between rows, found from a number of each part's own.

Parts of the data never meet: each says of an argument one number, a function of all that the argument
is made of, and where the largest and the smallest of all parts are the same, their rows share it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph

Differing = Mapping[int, frozenset[str]]


def marks_of(
    graph: FactorGraph, plate: str, outside: Collection[int]
) -> dict[int, dict[str, Tensor]]:
    """What tells whether rows share an argument: larger in another part, smaller, or the same there.

    Args:
        graph: That of an M-step.
        plate: The plate of rows.
        outside: Numbers of groups outside it.

    Returns:
        By group and argument whether it differs between the rows at hand, and a number that is the
        same for equal arguments. # (2,)
    """
    out: dict[int, dict[str, Tensor]] = {}
    for g, group in enumerate(graph.groups):
        if g in outside or group.family is None or plate not in group.dims[0]:
            continue
        outer = 1 + group.dims[0].index(plate)
        out[g] = {
            name: torch.tensor(
                [float(argument.shape[outer] > 1), number_of(group.bindings[name], argument)],
                dtype=torch.float64,
            )
            for name, argument in group.arguments.items()
        }
    return out


def number_of(binding: Binding, argument: Tensor) -> float:
    """A number of all that an argument is made of, which is another one for another argument.

    Args:
        binding: How parameters reach the argument.
        argument: The argument, for what no binding says.
    """
    constant = binding.constant
    for s in binding.selections:  # what is selected may stand in it, as it was when it was read
        constant = torch.where(s.index >= 0, torch.zeros_like(constant), constant)
    tensors = [constant, *(s.index for s in binding.selections)]
    tensors += [s.factor for s in binding.selections if s.factor is not None]
    tensors += [j.dense for j in binding.slopes]
    tensors += binding.known
    if not binding.is_static:
        tensors = [argument]
    total = 0.0
    for i, t in enumerate(tensors, start=1):
        flat = t.detach().reshape(-1).to("cpu", torch.float64)
        total += float(torch.dot(flat, torch.cos(i + torch.arange(len(flat)).double())))
    return total


def differing_arguments(
    high: Mapping[int, Mapping[str, Tensor]],
    low: Mapping[int, Mapping[str, Tensor]],
    graph: FactorGraph,
    rows: int,
) -> Differing:
    """The arguments that differ between rows.

    Args:
        high: The largest of what `marks_of` says of each part.
        low: The smallest.
        graph: That of one part.
        rows: Of how many rows the marks are; a single one may be another than all that follow.
    """
    out = {}
    for g, own in high.items():
        bindings = graph.groups[g].bindings
        names = set()
        for name, mark in own.items():
            first, last = float(mark[1]), float(low[g][name][1])
            other = abs(first - last) > 1e-9 * max(1.0, abs(first), abs(last))
            single = rows == 1 and bindings[name].how in ("affine", "bilinear", "opaque")
            if float(mark[0]) > 0 or other or single:
                names.add(name)
        if names.intersection(graph.groups[g].lines):  # a mean differs as a whole
            names.update(graph.groups[g].lines)
        out[g] = frozenset(names)
    return out
