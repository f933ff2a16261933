"""Tensors that require gradients, that a density depends on, and that are no parameters.

A network that is used without ``pyro.module`` keeps its random start for good: nothing trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from pyro_em.errors import message
from pyro_em.graph.failing.blame import given_arguments, variables_of
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.runs import Run
from pyro_em.tracing.sites import tensors_of_each, users

_SHOWN = 4


@dataclass(frozen=True, eq=False)
class Unregistered:
    """A leaf tensor that requires a gradient and is no parameter.

    Attributes:
        tensor: The tensor.
        site: The first site whose density depends on it.
        name: Its name in words; empty where it is not known.
    """

    tensor: Tensor
    site: str
    name: str


def unregistered(
    model: Callable[..., Any],
    args: tuple,
    kwargs: Mapping[str, Any],
    run: Run,
    names: Collection[str],
) -> tuple[Unregistered, ...]:
    """The tensors that require a gradient, that a run's densities use and that it has not read.

    Args:
        model: The model or guide.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        run: A plain run of it.
        names: Its sites with a density.
    """
    known = {id(t) for p in run.parameters.values() for t in (p.leaf, p.unconstrained)}
    found = [(leaf, name) for leaf, name in _leaves(run.sites, names) if id(leaf) not in known]
    if not found:
        return ()
    # Data that are passed with a gradient of their own are no parameters in waiting.
    given = given_arguments(model, args, kwargs).values()
    data = {id(t) for t in given if not isinstance(t, torch.nn.Parameter)}
    found = [(leaf, name) for leaf, name in found if id(leaf) not in data]
    words = _names(model, args, kwargs)
    return tuple(Unregistered(leaf, name, words.get(id(leaf), "")) for leaf, name in found)


def _leaves(
    sites: Mapping[str, Mapping[str, Any]], names: Collection[str]
) -> Iterator[tuple[Tensor, str]]:
    """Each leaf tensor that reaches a density, with the first site that it reaches."""
    seen: set[Node] = set()
    told: set[int] = set()
    tensors = tensors_of_each([sites[name]["fn"] for name in names])
    for name, own in zip(names, tensors, strict=True):
        site = sites[name]
        held = [*own, site["scale"], site["mask"]]
        if site["is_observed"]:
            held.append(site["value"])
        for tensor in held:
            if not isinstance(tensor, Tensor) or not tensor.requires_grad:
                continue
            stack = [tensor.grad_fn] if tensor.grad_fn is not None else []
            leaves = [] if stack else [tensor]
            while stack:
                node = stack.pop()
                if node in seen:
                    continue
                seen.add(node)
                following = node.next_functions
                if not following and node.name().endswith("AccumulateGrad"):
                    leaves.append(node.variable)  # type: ignore[attr-defined]
                for child, _ in following:
                    if child is not None and child not in seen:
                        stack.append(child)
            for leaf in leaves:
                if id(leaf) not in told:
                    told.add(id(leaf))
                    yield leaf, name


def _names(model: Any, args: tuple, kwargs: Mapping[str, Any]) -> dict[int, str]:
    """Names in the user's code of the tensors that a model can reach, by identity."""
    owner = getattr(users(model), "__self__", None)
    reached: list[tuple[str, Any]] = list(variables_of(model))
    reached += [(f"argument {i + 1}", a) for i, a in enumerate(args)]
    reached += list(kwargs.items())
    reached += [(f"self.{n}", v) for n, v in getattr(owner, "__dict__", {}).items()]
    reached += [("self", owner)]
    out: dict[int, str] = {}
    for name, value in reached:
        if isinstance(value, Tensor):
            out.setdefault(id(value), name)
        elif isinstance(value, torch.nn.Module):
            for own, parameter in value.named_parameters():
                out.setdefault(id(parameter), f"{name}.{own}")
    return out


def unregistered_notes(
    found: Sequence[Unregistered], parameters: Mapping[str, TracedParameter], whose: str
) -> tuple[str, ...]:
    """Warnings about such tensors, one per site.

    Args:
        found: The tensors.
        parameters: All parameters of model and guide: what is one of them is no finding.
        whose: ``"model"`` or ``"guide"``.
    """
    known = {id(t) for p in parameters.values() for t in (p.leaf, p.unconstrained)}
    by_site: dict[str, list[Unregistered]] = {}
    for one in found:
        if id(one.tensor) not in known:
            by_site.setdefault(one.site, []).append(one)
    return tuple(
        message(
            f"{'guide ' if whose == 'guide' else ''}site '{site}'",
            f"it depends on {_in_words(tensors)} that "
            + ("requires a gradient and is no parameter." if len(tensors) == 1 else _PLURAL),
            "only what is in Pyro's param store is trained: it keeps the values that it has now",
            [
                f"register the network: pyro.module(name, net) where the {whose} begins, or make "
                "it a PyroModule that holds it",
                "declare a tensor of its own with pyro.param(name, start)",
                "if it is to stay as it is, say so: net.requires_grad_(False)",
            ],
        )
        for site, tensors in by_site.items()
    )


_PLURAL = "require gradients and are no parameters."


def _in_words(tensors: Sequence[Unregistered]) -> str:
    shown = [
        (f"'{t.name}' " if t.name else "") + f"of shape {tuple(t.tensor.shape)}"
        for t in tensors[:_SHOWN]
    ]
    more = ", …" if len(tensors) > _SHOWN else ""
    one = len(tensors) == 1
    return ("a tensor" if one else f"{len(tensors)} tensors") + f" ({', '.join(shown)}{more})"
