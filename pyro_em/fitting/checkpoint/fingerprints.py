"""What a checkpoint belongs to: the call that made it, as texts and numbers that can be compared.

Whatever determines the path of a fit is in it: model, data, and every setting but those that say
how far to go. Data are known by form and a checksum of all their bytes; what a model fixes itself,
by sums of the arguments of its distributions, which rounding may change a little.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.sources.chunks import Chunks
from pyro_em.tracing.checkpoint import buffers_of
from pyro_em.tracing.dependences import flat_bytes
from pyro_em.tracing.names import names_of, numbers_in, tensors_in
from pyro_em.tracing.parameters import TracedParameter, values_of
from pyro_em.tracing.sites import users
from pyro_em.variational.batches import is_loader
from pyro_em.variational.bound import Variational

Fingerprint = dict[str, Any]

_BLOCK = 2**24  # bytes of which a checksum is taken at once

_NEAR = 1e-6  # relative, within which two sums of arguments are equal

_NUMBERS = (bool, int, float, str)


# Of the keywords of a fit those that say how its path goes on, not how far.
_SETTINGS = ("num_restarts", "init", "seed", "acceleration", "batch_size", "num_data", "schedule")


def of_parameters(parameters: Mapping[str, TracedParameter]) -> Fingerprint:
    """The parameters: their forms and where they live."""
    return {
        f"parameter '{n}'": f"of shape {tuple(p.unconstrained.shape)}, {p.unconstrained.dtype}, "
        f"{p.constraint!r}"
        for n, p in parameters.items()
    }


def of_program(program: Program) -> Fingerprint:
    """An exact model: its sites, what it fixes itself, its updates, and what iterates it."""
    values = values_of(program.graph.parameters)
    out: Fingerprint = {"the kind of fit": "exact steps"}
    out |= of_parameters(program.graph.parameters)
    for group in _groups(program.graph):
        name = f"site '{group.members[0]}'"
        kind = "observed" if group.observed else group.role.name.lower()
        out[name] = f"{group.distribution}, {kind}, {len(group.members)} of shape {group.sizes}"
        for part in (group.mask, group.elements):
            if part is not None:
                out[f"mask of {name}"] = _sums(part)
        scale = [float(torch.as_tensor(s).sum()) for s in group.scale]
        out[f"scale of {name}"] = (math.fsum(scale), math.fsum(s * s for s in scale))
        for argument, binding in group.bindings.items():
            if binding.is_static:
                at = f"argument '{argument}' of {name} at the initial parameters"
                out[at] = _sums(binding.evaluate(values))
    for name, update in program.updates.items():
        out[f"update of '{name}'"] = described(update.update)
    out["strategy"] = described(program.strategy)
    out["what iterates"] = str(program.kernel.names)
    return out


def of_data_seen(graph: FactorGraph) -> Fingerprint:
    """The observed values of an exact model, wherever it has them from."""
    return {
        f"values of site '{group.members[0]}'": _sums(group.value)
        for group in _groups(graph)
        if group.observed and group.value_binding is None
    }


def of_pair(variational: Variational, saved_name: Callable[[str], str]) -> Fingerprint:
    """A model with a guide: its sites and routes.

    Args:
        variational: The pair.
        saved_name: From a parameter's name here to its name in a file.
    """
    out: Fingerprint = {"the kind of fit": "stochastic steps"}
    out |= of_parameters({saved_name(n): p for n, p in variational.parameters.items()})
    for name, site in variational.bare.sites.items():
        out[f"site '{name}'"] = f"{site.distribution}, plates {site.plates}"
    routing = variational.routing
    for name in variational.bare.latents:
        routes = (("summed", routing.exact), ("integrated", routing.gaussian))
        found = [word for word, names in routes if name in names]
        out[f"route of '{name}'"] = ", ".join(found) or "from the guide"
    return out


def of_request(request: Request, num_particles: int) -> Fingerprint:
    """What the user gave `ExactPosteriorEM`."""
    out = {f"updates['{n}']": described(u) for n, u in request.updates.items()}
    return {
        **out,
        "strategy": described(request.strategy),
        "num_particles": num_particles,
        "optim": described(request.optim),
    }


def of_wishes(wishes: FitWishes) -> Fingerprint:
    """The keywords of a fit that determine its path."""
    out: Fingerprint = {name: described(getattr(wishes, name)) for name in _SETTINGS}
    if wishes.online is not None:
        out["online"] = described(wishes.online)
    return out | dict(_of_data("validation", wishes.validation))


def of_arguments(args: tuple, kwargs: Mapping[str, Any]) -> Fingerprint:
    """The data of a call."""
    out: Fingerprint = {}
    for i, value in enumerate(args):
        out |= dict(_of_data(f"argument {i}", value))
    for name, value in kwargs.items():
        out |= dict(_of_data(f"argument '{name}'", value))
    return out


def of_numbers(request: Request, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> Fingerprint:
    """The numbers and texts that names in model and guide stand for."""
    return {
        f"'{name}' in the {who}": repr(value)
        for who, names in _names(request, guide, args, kwargs)
        for name, (_, value) in numbers_in(names).items()
    }


def of_tensors(request: Request, guide: Any, args: tuple, kwargs: Mapping[str, Any]) -> Fingerprint:
    """The data that names in model and guide stand for; parameters and buffers are none."""
    out: Fingerprint = {}
    buffers = {id(b) for b in buffers_of((users(request.model), guide)).values()}
    for who, names in _names(request, guide, args, kwargs):
        for name, tensor in tensors_in(names):
            if not tensor.requires_grad and id(tensor) not in buffers:
                out |= dict(_of_data(f"'{name}' in the {who}", tensor))
    return out


def _names(
    request: Request, guide: Any, args: tuple, kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What names in model and guide stand for, the arguments of the call excepted."""
    for who, one in (("model", users(request.model)), ("guide", guide)):
        if one is None or isinstance(one, torch.nn.Module):
            continue  # what a module holds, it may change itself
        names = names_of(one, args, kwargs)
        yield (
            who,
            {n: v for n, v in names.items() if not n.startswith("argument") and n[-1:] != ":"},
        )


def of_ranks(all_of_them: Sequence[Fingerprint]) -> Fingerprint:
    """Fingerprints of several processes as one: that of rank 0, and what is other elsewhere.

    Example:
        >>> of_ranks([{"a": "1", "b": "2"}, {"a": "1", "b": "3"}])
        {'a': '1', 'b': '2', 'b on rank 1': '3'}
    """
    out = dict(all_of_them[0])
    for rank, one in enumerate(all_of_them[1:], start=1):
        other = {n: v for n, v in one.items() if n not in all_of_them[0] or v != out[n]}
        out |= {f"{name} on rank {rank}": value for name, value in other.items()}
    return out


def first_difference(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What first distinguishes two fingerprints, in words; empty if nothing does.

    Example:
        >>> first_difference({"seed": "1", "batch_size": "8"}, {"seed": "2", "batch_size": "8"})
        'seed is 1 there and 2 here'
    """
    for name, there in saved.items():
        if name not in now:
            return f"{name} is there, and not here"
        here = now[name]
        if _differ(there, here):
            if name.startswith("values of "):
                return f"{name} are others here"
            if not isinstance(there, str):
                return f"{name} has other values here"
            return f"{name} is {there} there and {here} here"
    new = next((name for name in now if name not in saved), "")
    return f"{new} is here, and not there" if new else ""


def described(value: Any) -> str:
    """A setting as a text that is the same for equal settings, in every process.

    Example:
        >>> described({"lr": 0.1, "betas": (0.9, 0.99)})
        "{'lr': 0.1, 'betas': (0.9, 0.99)}"
        >>> described(lambda p: torch.optim.Adam(p, lr=0.01))
        'a function of [0.01] and Adam, lr, optim, torch'
    """
    if isinstance(value, (Tensor, np.ndarray)):
        (_, form), *rest = _of_data("", value)
        return f"{form}" + "".join(f", checksum {crc}" for _, crc in rest)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k!r}: {described(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        inside = ", ".join(map(described, value))
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = ", ".join(
            f"{f.name}={described(getattr(value, f.name))}" for f in dataclasses.fields(value)
        )
        return f"{type(value).__name__}({inside})"
    if isinstance(value, pyro.optim.PyroOptim):
        made = described(value.pt_optim_constructor)
        return f"{type(value).__name__}({made}, {described(value.pt_optim_args)})"
    if isinstance(value, functools.partial):
        return f"partial({described(value.func)}, {described(value.args)}, " + (
            f"{described(value.keywords)})"
        )
    if isinstance(value, types.FunctionType):
        return _function(value)
    if isinstance(value, (bool, int, float, str, bytes, type(None), np.generic)):
        return repr(value)
    return getattr(value, "__qualname__", None) or f"a {type(value).__name__}"


def _function(f: types.FunctionType) -> str:
    """The numbers and names in a function: not its bytes, which a version of Python may change."""
    code = f.__code__
    numbers = [c for c in code.co_consts if isinstance(c, (bool, int, float)) and c is not True]
    held = dict(zip(code.co_freevars, f.__closure__ or (), strict=True))
    plain = {}
    for name, cell in held.items():
        try:
            plain[name] = repr(cell.cell_contents)
        except ValueError:  # empty
            continue
        if not isinstance(cell.cell_contents, (bool, int, float, str)):
            del plain[name]
    names = ", ".join(sorted({*code.co_names, *_keywords(code)}))
    inside = f" with {plain}" if plain else ""
    return f"a function of {numbers} and {names}{inside}"


def _keywords(code: types.CodeType) -> set[str]:
    """Names of keywords that the code passes."""
    named = [c for c in code.co_consts if isinstance(c, tuple)]
    return {n for c in named for n in c if isinstance(n, str)}


def _groups(graph: FactorGraph) -> Iterator[Group]:
    for group in graph.groups:
        yield from (group,) if group.nested is None else group.nested.groups


def _sums(t: Tensor) -> tuple[float, float]:
    """Sum and sum of squares of what is finite."""
    t = torch.nan_to_num(t.detach().to(torch.float64), 0.0, 0.0, 0.0)
    return float(t.sum()), float((t * t).sum())


def _differ(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 2:
        size = max(abs(a[1]), abs(b[1]))
        allowed = (_NEAR * math.sqrt(size) + 1e-300, _NEAR * size)
        # A sum of n terms cancels by up to the root of n times its squares: these tell more.
        return abs(a[1] - b[1]) > allowed[1] or abs(a[0] - b[0]) > max(
            allowed[0], _NEAR * abs(a[0])
        )
    return bool(a != b)


def _of_data(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The form of a value and of what is in it, and checksums of their bytes."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OUSV":
        yield name, f"an array of {value.dtype} and shape {value.shape}"
        yield f"values of {name}", zlib.crc32(repr(value.tolist()).encode())
    elif isinstance(value, np.ndarray):
        yield name, f"an array of {value.dtype} and shape {value.shape}"
        yield f"values of {name}", _crc_of_array(value)
    elif isinstance(value, Tensor):
        yield name, f"a tensor of {value.dtype} and shape {tuple(value.shape)}"
        if value.layout is torch.strided and not value.is_quantized and not value.is_meta:
            yield f"values of {name}", _crc(value.detach())
    elif isinstance(value, Mapping):
        yield name, f"a {type(value).__name__} of {len(value)}"
        for key, part in value.items():
            yield from _of_data(f"{name}[{key!r}]", part)
    elif isinstance(value, (list, tuple)) and all(type(v) in _NUMBERS for v in value):
        yield name, f"a {type(value).__name__} of {len(value)}"
        yield f"values of {name}", zlib.crc32(repr(value).encode())
    elif isinstance(value, (list, tuple)):
        yield name, f"a {type(value).__name__} of {len(value)}"
        for i, part in enumerate(value):
            yield from _of_data(f"{name}[{i}]", part)
    elif callable(getattr(value, "to_numpy", None)):  # tables and columns of pandas
        columns = [str(c) for c in getattr(value, "columns", ())]
        yield name, f"a {type(value).__name__} of {columns}" if columns else type(value).__name__
        yield from _of_data(f"content of {name}", value.to_numpy())
    elif is_loader(value):
        yield name, f"a DataLoader, batch_size={value.batch_size}, drop_last={value.drop_last}"
        yield f"sampler of {name}", type(value.sampler).__name__
        dataset = value.dataset
        held = getattr(dataset, "tensors", None) or type(dataset).__name__
        yield from _of_data(f"dataset of {name}", held)
    elif isinstance(value, Chunks):
        form = value.form()
        each = ", ".join(form.arguments)
        yield name, f"chunks of {each}: {form.rows} rows in {form.chunks} chunks"
        yield f"rows of each chunk of {name}", form.splits
        yield f"values of {name}", form.checksum
    else:
        yield name, described(value)


def _crc(t: Tensor) -> int:
    """A checksum of all bytes, block by block, in the order of its elements."""
    found = 0
    if t.numel() * t.element_size() <= _BLOCK or t.dim() == 0:
        return zlib.crc32(flat_bytes(t.cpu()).numpy())
    rows = max(1, _BLOCK * len(t) // (t.numel() * t.element_size()))
    for part in t.split(rows):
        found = zlib.crc32(flat_bytes(part.cpu()).numpy(), found)
    return found


def _crc_of_array(a: np.ndarray[Any, Any]) -> int:
    found = 0
    rows = max(1, _BLOCK * len(a) // max(a.nbytes, 1)) if a.ndim else 1
    for begin in range(0, len(a) if a.ndim else 1, rows):
        part = a[begin : begin + rows] if a.ndim else a
        found = zlib.crc32(np.ascontiguousarray(part).tobytes(), found)
    return found
