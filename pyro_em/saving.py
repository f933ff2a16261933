"""Saving and loading fitted parameters, readable under ``torch.load(weights_only=True)``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from pyro_em._errors import UsageError, message
from pyro_em._pyro import TracedParameter, snapshot
from pyro_em._pyro import restore as write_back

FORMAT = "pyro_em 1"


def pack(parameters: Mapping[str, TracedParameter], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters as plain tensors and strings."""
    return {
        "format": FORMAT,
        "names": list(parameters),
        "unconstrained": {n: t.cpu() for n, t in snapshot(parameters).items()},
        "constraints": {n: repr(p.constraint) for n, p in parameters.items()},
        **extra,
    }


def modules_of(one: Any) -> list[torch.nn.Module]:
    """Modules that a model or guide holds: itself, its arguments, its closure, what it names.

    Their buffers (statistics of a BatchNorm, the standardisation of an amortised guide) are no
    parameters, but a fitted model is another one without them.
    """
    if isinstance(one, torch.nn.Module):
        return [one]
    if isinstance(one, functools.partial):
        inside = [one.func, *one.args, *one.keywords.values()]
        return [m for part in inside for m in modules_of(part)]
    if inspect.ismethod(one):
        owner = one.__self__
        if isinstance(owner, torch.nn.Module):
            return [owner]
        return [v for v in vars(owner).values() if isinstance(v, torch.nn.Module)]
    if inspect.isfunction(one):
        held = inspect.getclosurevars(one)
        named = [*held.nonlocals.values(), *held.globals.values()]
        return [v for v in named if isinstance(v, torch.nn.Module)]
    return []


def buffers_of(roots: Sequence[Any]) -> dict[str, torch.Tensor]:
    """All buffers of some models and guides, by position and name."""
    return {
        f"{r}.{m}.{name}": buffer
        for r, root in enumerate(roots)
        for m, module in enumerate(modules_of(root))
        for name, buffer in module.named_buffers()
    }


def restore_buffers(state: Mapping[str, Any], roots: Sequence[Any]) -> None:
    """Write saved buffers in place, where there are buffers of the same name and shape."""
    saved = state.get("buffers", {})
    for name, buffer in buffers_of(roots).items():
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])


def read(path: str | Path) -> dict[str, Any]:
    """Read a file that ``save`` wrote.

    Raises:
        UsageError: If it is no such file.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise UsageError(_not_ours(path)) from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UsageError(_not_ours(path))
    return state


def _not_ours(path: str | Path) -> str:
    return message(
        f"file '{path}'",
        "it was not written by ExactPosteriorEM.save.",
        f"its format is not '{FORMAT}'",
        ["load a param store with pyro.get_param_store().load(path)"],
    )


def restore(state: Mapping[str, Any], parameters: Mapping[str, TracedParameter]) -> None:
    """Write saved parameters in place.

    Raises:
        UsageError: If the file belongs to another model; names the first difference.
    """
    difference = first_difference(state, parameters)
    if difference:
        raise UsageError(
            message(
                "load",
                f"the file belongs to another model: {difference}.",
                "nothing was loaded",
                ["build the model as it was when the file was saved"],
            )
        )
    write_back(parameters, state["unconstrained"])


def first_difference(state: Mapping[str, Any], parameters: Mapping[str, TracedParameter]) -> str:
    """What first distinguishes a file's model from this one; empty if nothing does."""
    for name in state["names"]:
        if name not in parameters:
            return f"it has parameter '{name}', which this model lacks"
    for name, p in parameters.items():
        if name not in state["names"]:
            return f"it lacks parameter '{name}'"
        saved = tuple(state["unconstrained"][name].shape)
        if saved != tuple(p.unconstrained.shape):
            return (
                f"parameter '{name}' has shape {saved} there and "
                f"{tuple(p.unconstrained.shape)} here"
            )
        if state["constraints"][name] != repr(p.constraint):
            return (
                f"parameter '{name}' is constrained to {state['constraints'][name]} there and to "
                f"{p.constraint!r} here"
            )
    return ""
