"""What the param store holds before and after a run of a model, and what such a run leaves there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import pyro
import torch

from pyro_em.tracing.allocation import is_shadow
from pyro_em.tracing.memory import settle
from pyro_em.tracing.parameters import TracedParameter


def is_stored(parameters: Mapping[str, TracedParameter]) -> bool:
    """Whether the param store still holds what a look found; modules keep their own."""
    store = pyro.get_param_store()
    return all(
        isinstance(p.unconstrained, torch.nn.Parameter)
        or store._params.get(name) is p.unconstrained
        for name, p in parameters.items()
    )


def forget_all_but(known: Collection[str]) -> None:
    """Delete the parameters that a run which is not used has initialised."""
    store = pyro.get_param_store()
    for name in [n for n in store._params if n not in known]:
        del store[name]


def store_as_it_is() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The param store's own dictionary, and a copy of it."""
    held = pyro.get_param_store()._params
    return held, dict(held)


def was_cleared(begun: tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]) -> bool:
    """Whether the param store has been cleared since, and not been restored (as a scope does)."""
    held, before = begun
    now = pyro.get_param_store()._params
    return now is not held and any(now.get(name) is not p for name, p in before.items())


def holds_shadows() -> bool:
    """Whether a parameter's initial value is a shadow."""
    return any(is_shadow(p) for p in pyro.get_param_store()._params.values())


def in_own_memory(
    parameters: Mapping[str, TracedParameter], given: Mapping[str, Any]
) -> dict[str, TracedParameter]:
    """Parameters in memory of their own.

    Where Pyro has run the model before, a parameter may be the very tensor that the model passes as
    its initial value: that one goes back to whom it belongs.
    """
    store = pyro.get_param_store()
    out = dict(parameters)
    for name, p in parameters.items():
        old = p.unconstrained
        if given.get(name) is not old or isinstance(old, torch.nn.Parameter):
            continue
        if store._params.get(name) is not old:
            continue
        new = old.detach().clone().requires_grad_(old.requires_grad)
        store._params[name] = new
        store._param_to_name.pop(old, None)
        store._param_to_name[new] = name
        out[name] = replace(p, unconstrained=new)
    settle([p.unconstrained for p in out.values()])
    return out
