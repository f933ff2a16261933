"""Arguments that are computed of parameters alone, found by noting what a run of the model does.

Where no derivative says how parameters reach an argument and the argument is the same for all rows,
it is still a function of parameters alone: means in an order that a cumulative sum makes, sticks that
are broken, a network of embeddings. The model is run once more and the operations between parameters
and such arguments are noted. Steps then do these again, and run the model no more.

Whether the notes are what the model does is seen as it is of all bindings: by another run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.computed import Computed
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.tracing.parameters import TracedParameter, moved
from pyro_em.tracing.sites import Role
from pyro_em.tracing.tape import Recorder, Tape

Again = Callable[[Mapping[str, Tensor]], FactorGraph]

_FEW = 2**16  # numbers of an argument, and of what it is made of beside parameters

_SEED = 23


def with_computed(graph: FactorGraph, again: Again) -> FactorGraph:
    """The graph with bindings of arguments that are computed of parameters alone.

    Args:
        graph: A graph whose other bindings were read.
        again: Runs the model at constrained values of its parameters, those of modules apart, which
            read their own; on few rows, if it likes.
    """
    places = [(g, name) for g, group in enumerate(graph.groups) for name in _opaque(group)]
    if not places:
        return graph
    with torch.inference_mode(False), torch.enable_grad():
        values = {n: _leaf(p.leaf) for n, p in graph.parameters.items() if not _is_direct(p)}
        own = {n: p.leaf for n, p in graph.parameters.items() if _is_direct(p)}
        recorder = Recorder({**values, **own}, ())
        with recorder:
            fresh = again(values)
            found = {place: _by_site(graph, fresh, *place) for place in places}
        groups = list(graph.groups)
        for g, name in places:
            made = found[g, name]
            tape = None if made is None else recorder.tape(made)
            binding = None if tape is None else _bound(groups[g], name, tape, graph.parameters)
            if binding is not None:
                groups[g] = replace(groups[g], bindings={**groups[g].bindings, name: binding})
    return replace(graph, groups=tuple(groups))


def _opaque(group: Group) -> Iterator[str]:
    """Arguments of a group that no binding says, and that are the same for all rows."""
    if group.family is None or group.nested is not None or group.belief is not None:
        return
    if group.role not in (Role.DATA, Role.LATENT):
        return
    for name, binding in group.bindings.items():
        shape = group.outlines[name].shape
        if binding.how != "opaque" or not binding.params or name in group.lines:
            continue
        of_rows = any(n > 1 for n in shape[1 : 1 + group.n_plates])
        numbers = math.prod(shape[1:]) * len(_apart(group, name))
        if not of_rows and numbers <= _FEW:
            yield name


def _apart(group: Group, name: str) -> Sequence[str]:
    """The members of which an argument is held; one where it is held once for all."""
    return group.members[:1] if _is_one(group.arguments[name]) else group.members


def _is_one(argument: Tensor) -> bool:
    return len(argument) > 1 and argument.stride(0) == 0


def _is_direct(parameter: TracedParameter) -> bool:
    """Whether a module reads the leaf by itself, so that no other value can be handed to it."""
    return parameter.leaf is parameter.unconstrained


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.is_floating_point())


def _by_site(graph: FactorGraph, fresh: FactorGraph, g: int, name: str) -> dict[str, Tensor] | None:
    """An argument of each member of a group in another run; None where it is of another form there."""
    group, out = graph.groups[g], {}
    for site in _apart(group, name):
        other, i = fresh.group_of(site)
        argument = other.arguments.get(name)
        if argument is None or argument.shape[1:] != group.outlines[name].shape[1:]:
            return None
        out[site] = argument[i]
    return out


def _bound(
    group: Group, name: str, tape: Tape, parameters: Mapping[str, TracedParameter]
) -> Binding | None:
    """The binding of an argument by what was noted of it; None where the notes hold more than that.

    Members that read the same, here and at other parameters, are computed once.
    """
    kept = _with_own_constants(tape.through_stacks())
    if kept is None:
        return None
    here = {n: p.leaf.detach() for n, p in parameters.items()}
    there = {
        n: transform_to(parameters[n].constraint)(u) for n, u in moved(parameters, _SEED).items()
    }
    with torch.no_grad():
        now, elsewhere = kept(here), kept({**here, **there})
    traced = group.arguments[name].detach()
    firsts: list[str] = []
    which: list[int] = []
    for i, site in enumerate(_apart(group, name)):
        if not torch.equal(now[site].to(traced.dtype), traced[i]):
            return None
        same = (
            k
            for k, first in enumerate(firsts)
            if torch.equal(now[first], now[site]) and torch.equal(elsewhere[first], elsewhere[site])
        )
        k = next(same, len(firsts))
        if k == len(firsts):
            firsts.append(site)
        which.append(k)
    cells = torch.arange(traced[0].numel(), device=traced.device).reshape(traced.shape[1:])
    index, binding = torch.stack([cells + k * cells.numel() for k in which]), group.bindings[name]
    constant = binding.constant
    if len(firsts) == 1:  # one for all members
        index, constant = (t[:1].expand(traced.shape) for t in (index, constant))
    made = Computed(kept.only(firsts), index)
    return Binding("computed", binding.params, constant, reason=binding.reason, computed=made)


def _with_own_constants(tape: Tape) -> Tape | None:
    """The tape with copies of what it read beside parameters; None where that is much, or trained."""
    operations = []
    for op in tape.operations:
        given: list[Any] = []
        for value in op.given:
            if isinstance(value, Tensor):
                if value.requires_grad or value.numel() > _FEW:
                    return None
                value = value.detach().clone()
            given.append(value)
        operations.append(replace(op, given=tuple(given)))
    return replace(tape, operations=tuple(operations))
