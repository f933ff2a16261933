"""Parameter scopes: a start that many runs share, and everything as it was after them.

Parameters live in Pyro's param store and in modules. The store has scopes of its own; modules are
found behind models and guides, and are put back by a `Keeper`.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import pyro
import torch
from torch import Tensor, nn

from pyro_em.errors import UsageError, message
from pyro_em.tracing.capture import ParameterRecord
from pyro_em.tracing.memory import settle

StoreState: TypeAlias = Mapping[str, Mapping[str, Any]]

_DEPTH = 6  # objects inside each other that are followed


def store_state() -> StoreState:
    """What the param store holds now: leaves and their constraints, not copied."""
    store = pyro.get_param_store()
    return {"params": dict(store._params), "constraints": dict(store._constraints)}


def _copied(state: StoreState) -> dict[str, dict[str, Any]]:
    """The same store with leaves of its own; a module keeps its ``nn.Parameter``s."""
    params = {
        name: leaf
        if isinstance(leaf, nn.Parameter)
        else leaf.detach().clone().requires_grad_(leaf.requires_grad)
        for name, leaf in state["params"].items()
    }
    return {"params": params, "constraints": dict(state["constraints"])}


@contextmanager
def own_store(state: StoreState) -> Iterator[None]:
    """A param store that holds a copy of ``state``; afterwards the one before."""
    with pyro.get_param_store().scope(_copied(state)):  # type: ignore[arg-type]
        yield


def common_start(
    models: Mapping[str, Callable[..., Any]],
    args: tuple,
    kwargs: dict[str, Any],
    origin: StoreState,
) -> tuple[StoreState, list[tuple[Tensor, Tensor]]]:
    """The model's parameters as a fit would begin with them, found by running every model once.

    Args:
        models: By the labels of their contenders.
        args: Of the models.
        kwargs: Of the models.
        origin: The param store in which they run; it stays as it is.

    Returns:
        A state of the param store, and module parameters with their values.

    Raises:
        UsageError: If the models read different parameters.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    first, names = "", None
    with own_store(origin):
        for label, model in models.items():
            with ParameterRecord() as record, torch.no_grad():
                model(*args, **kwargs)
            found = record.found
            settle(found.values())
            if names is None:
                first, names = label, list(found)
            if odd := sorted(set(found) ^ set(names)):
                raise UsageError(
                    message(
                        f"contender '{label}'",
                        f"its model and that of '{first}' differ: one has no parameter '{odd[0]}'.",
                        "methods are compared on one model",
                        ["give all contenders the same model"],
                    )
                )
            leaves = [leaf for leaf in found.values() if isinstance(leaf, nn.Parameter)]
            kept += [(leaf, leaf.detach().clone()) for leaf in leaves]
        state = store_state()
        read = {
            kind: {name: held[name] for name in names or () if name in held}
            for kind, held in state.items()
        }
        return _copied(read), kept


class Keeper:
    """Modules as they were: their attributes, which guides set up lazily, and their tensors.

    Args:
        roots: Functions, modules and what holds them; modules are looked for behind these.
    """

    def __init__(self, roots: Collection[Any]) -> None:
        modules, parameters = _reachable(roots)
        self.attributes = [
            (m, dict(vars(m)), {k: v.copy() for k, v in vars(m).items() if isinstance(v, dict)})
            for m in modules
        ]
        buffers = [b for m in modules for b in m._buffers.values() if b is not None]
        self.tensors = [(t, t.detach().clone()) for t in (*parameters, *buffers)]
        self.gradients = [(p, None if p.grad is None else p.grad.clone()) for p in parameters]

    def add(self, tensors: Collection[tuple[Tensor, Tensor]]) -> None:
        """Keep more tensors, each with its value; of one that was kept already the older counts."""
        self.tensors = [*tensors, *self.tensors]

    def restore(self) -> None:
        """Put everything back in place."""
        for module, attributes, copies in self.attributes:
            vars(module).clear()
            vars(module).update(attributes)
            for name, saved in copies.items():
                attributes[name].clear()
                attributes[name].update(saved)
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.copy_(value)
        for parameter, gradient in self.gradients:
            parameter.grad = None if gradient is None else gradient.clone()


def _reachable(roots: Collection[Any]) -> tuple[list[nn.Module], list[Tensor]]:
    """Modules and module parameters that functions hold: bound, enclosed, global, as attributes."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}
    seen: set[int] = set()
    layer: list[Any] = list(roots)
    for _ in range(_DEPTH):
        following: list[Any] = []
        for one in layer:
            if id(one) in seen or isinstance(one, (type, types.ModuleType, str, int, float)):
                continue
            seen.add(id(one))
            if isinstance(one, Tensor):
                if isinstance(one, nn.Parameter):
                    tensors[id(one)] = one
                continue
            if isinstance(one, nn.Module):
                for module in one.modules():
                    modules[id(module)] = module
                    tensors.update((id(p), p) for p in module._parameters.values() if p is not None)
            following += _parts(one)
        layer = following
    return list(modules.values()), list(tensors.values())


def _parts(one: Any) -> list[Any]:
    """What an object holds; of the functions that a function calls those of its own module."""
    if isinstance(one, Mapping):
        return list(one.values())
    if isinstance(one, (list, tuple, set)):
        return list(one)
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.FunctionType):
        held = [c.cell_contents for c in one.__closure__ or () if _is_filled(c)]
        named = [one.__globals__.get(n) for n in one.__code__.co_names]
        near = [
            n
            for n in named
            if not isinstance(n, types.FunctionType) or n.__module__ == one.__module__
        ]
        return [*held, *near, *(one.__defaults__ or ())]
    return list(vars(one).values()) if hasattr(one, "__dict__") else []


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
