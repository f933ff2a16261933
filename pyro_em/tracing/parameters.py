"""Parameters as a run has read them: their values, written in place, kept and restored.

Constrained values are computed once for each unconstrained value. A fit asks for the same one many
times: each run of the model reads it, and each look at what the run said compares with it. A transform
takes longer than all else that reading a small one costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import ReferenceType, ref

import pyro
import torch
from torch import Tensor
from torch.distributions import Transform, constraints, transform_to

from pyro_em.arguments import as_tensor
from pyro_em.distributions import bounds
from pyro_em.errors import UsageError, message

_FOUND = ("transform", "inverse")  # what a parameter finds by itself

_FEW = 2**16  # elements of a parameter whose latest value is kept

# By a parameter's identity: the parameter, its constraint, its numbers, and what they became.
_latest: dict[int, tuple[ReferenceType[Tensor], constraints.Constraint, Tensor, Tensor]] = {}


@dataclass(frozen=True, eq=False)
class TracedParameter:
    """A parameter as one run of a model read it.

    Attributes:
        name: Its name in Pyro's param store.
        unconstrained: The leaf tensor that an optimiser would step.
        constraint: Where the constrained value lives.
        leaf: The tensor to which autograd leads from every use of the parameter in this run.
        declared: Texts of all constraints under which this run declared the parameter.
        initial_shape: The shape that the model asked for, where it said one.
        is_foreign: Whether the store holds another tensor than the ``nn.Parameter`` that the
            module reads.
        initial: The initial value that the model gave, where this run initialised the parameter.
        given: The initial value that the model gives, used or not, from a plain run.
    """

    name: str
    unconstrained: torch.Tensor
    constraint: constraints.Constraint
    leaf: torch.Tensor
    declared: tuple[str, ...] = ()
    initial_shape: torch.Size | None = None
    is_foreign: bool = False
    initial: torch.Tensor | None = None
    given: torch.Tensor | None = None

    def value(self, unconstrained: torch.Tensor | None = None) -> torch.Tensor:
        """The current constrained value: a tensor of its own, which no later step changes.

        Args:
            unconstrained: Another unconstrained value than the current one.
        """
        return constrained(self.unconstrained, self.constraint, unconstrained)

    @cached_property
    def transform(self) -> Transform:
        """From unconstrained values to constrained ones."""
        return transform_to(self.constraint)

    @cached_property
    def inverse(self) -> Transform:
        """From constrained values to unconstrained ones; making it takes longer than using it."""
        return self.transform.inv

    def __getstate__(self) -> dict[str, Any]:
        """The attributes of a copy: what it needs to be quick it finds by itself."""
        return {name: v for name, v in vars(self).items() if name not in _FOUND}


def constrained(
    parameter: Tensor, constraint: constraints.Constraint, unconstrained: Tensor | None = None
) -> Tensor:
    """The constrained value of a parameter: a detached tensor of its own, which no step changes.

    Args:
        parameter: The unconstrained leaf.
        constraint: Where the constrained value lives.
        unconstrained: Another unconstrained value than the current one.

    Example:
        >>> u = torch.zeros(2)
        >>> constrained(u, constraints.positive), constrained(u, constraints.real)
        (tensor([1., 1.]), tensor([0., 0.]))
    """
    u = parameter if unconstrained is None else unconstrained
    if constraint is constraints.real:
        return u.detach().clone()
    own = id(parameter)
    known = _latest.get(own)
    if known is not None and known[0]() is parameter and known[1] is constraint:
        before, value = known[2:]
        # Numbers are compared, not counts of writes, which ``.data`` and numpy go past.
        if before.dtype == u.dtype and before.device == u.device and torch.equal(before, u):
            return value.clone()
    with torch.no_grad():
        out = transform_to(constraint)(u).detach()
        if out.data_ptr() == u.data_ptr():
            return out.clone()
        if u.numel() <= _FEW and out.numel() <= _FEW:
            kept = u.detach().clone(), out.clone()
            _latest[own] = ref(parameter, lambda gone: _forget(own, gone)), constraint, *kept
        return out


def _forget(own: int, gone: ReferenceType[Tensor]) -> None:
    if own in _latest and _latest[own][0] is gone:
        del _latest[own]


def rename(module: Any, name: str) -> None:
    """Give a ``PyroModule`` and all below it another name in the param store, before its first use."""
    module._pyro_set_supermodule(name, module._pyro_context)


def alive(parameters: Mapping[str, TracedParameter]) -> dict[str, TracedParameter]:
    """Parameters with the leaves that the store holds now.

    A ``PyroModule`` that declares a parameter during a run puts another leaf into the store.
    """
    store = pyro.get_param_store()
    out = {}
    for name, p in parameters.items():
        now = store._params.get(name)
        stays = now is None or isinstance(p.leaf, torch.nn.Parameter) or p.is_foreign
        out[name] = p if stays else replace(p, unconstrained=now)
    return out


def write_unconstrained(parameter: TracedParameter, value: torch.Tensor) -> None:
    """Write a constrained value in place into the parameter's unconstrained leaf."""
    with torch.no_grad():
        parameter.unconstrained.copy_(parameter.inverse(value))


def write(
    parameters: Mapping[str, TracedParameter],
    values: Mapping[str, Tensor],
    held: Mapping[str, Tensor] | None = None,
) -> None:
    """Write constrained values into the param store, where it holds others.

    Args:
        parameters: The parameters.
        values: What to write.
        held: The values that were written last, where the store holds them still.
    """
    with torch.no_grad():
        for name, value in values.items():
            p = parameters[name]
            if not torch.equal(p.value() if held is None else held[name], value):
                write_unconstrained(p, value)


def values_of(parameters: Mapping[str, TracedParameter]) -> dict[str, torch.Tensor]:
    """The current constrained values by name, tensors of their own."""
    return {name: p.value() for name, p in parameters.items()}


def versions_of(parameters: Mapping[str, TracedParameter]) -> tuple[int, ...]:
    """Counts of in-place writes: equal as long as no parameter has been written."""
    return tuple(p.unconstrained._version for p in parameters.values())


def snapshot(parameters: Mapping[str, TracedParameter]) -> dict[str, torch.Tensor]:
    """Copies of all unconstrained parameters."""
    return {name: p.unconstrained.data.clone() for name, p in parameters.items()}


def restore(
    parameters: Mapping[str, TracedParameter], unconstrained: Mapping[str, torch.Tensor]
) -> None:
    """Write unconstrained values back in place."""
    with torch.no_grad():
        for name, value in unconstrained.items():
            parameters[name].unconstrained.copy_(value)


@contextmanager
def parameters_at(
    parameters: Mapping[str, TracedParameter],
    values: Mapping[str, Tensor],
    *,
    unconstrained: bool = False,
) -> Iterator[None]:
    """Hold parameters at other values inside a ``with`` block; they are restored afterwards.

    Raises:
        UsageError: If a name is unknown or a value has another shape.
    """
    for name, value in values.items():
        if name not in parameters:
            known = ", ".join(f"'{n}'" for n in parameters) or "none"
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"the model has no such parameter; it has: {known}.",
                    fixes=["use the parameter's name in Pyro's param store"],
                )
            )
        shape = parameters[name].leaf.shape
        value = as_tensor(f"params['{name}']", value)
        if not unconstrained and value.shape != shape:
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"its shape is {tuple(value.shape)}, not {tuple(shape)}.",
                    "a value replaces the whole parameter",
                )
            )
        constraint = parameters[name].constraint
        if not unconstrained and not _allowed(value, constraint):
            raise UsageError(
                message(
                    f"params['{name}']",
                    f"its value is outside the constraint {constraint}.",
                    "values are constrained ones, as pyro.param returns them",
                )
            )
    before = snapshot({n: parameters[n] for n in values})
    try:
        with torch.no_grad():
            for name, value in values.items():
                if unconstrained:
                    parameters[name].unconstrained.copy_(value)
                else:
                    leaf = parameters[name].leaf
                    write_unconstrained(parameters[name], torch.as_tensor(value).detach().to(leaf))
        yield
    finally:
        restore(parameters, before)


def moved(parameters: Mapping[str, TracedParameter], seed: int) -> dict[str, Tensor]:
    """Unconstrained values near those of floating parameters, moved at random."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for name, p in parameters.items():
        if p.unconstrained.is_floating_point():
            u = p.unconstrained.detach()
            noise = torch.randn(u.shape, generator=generator, dtype=torch.float64, device="cpu")
            out[name] = u + 0.1 * noise.to(u)
    return out


@contextmanager
def at_moved(parameters: Mapping[str, TracedParameter], seed: int) -> Iterator[None]:
    """Hold all floating parameters at values moved at random inside a ``with`` block."""
    values = moved(parameters, seed)
    with parameters_at({n: parameters[n] for n in values}, values, unconstrained=True):
        yield


def _allowed(value: Tensor, constraint: constraints.Constraint) -> bool:
    """Whether a value satisfies a constraint or lies on the boundary that estimates may reach."""
    interval = bounds(constraint)
    if interval is not None:
        return bool(((value >= interval[0]) & (value <= interval[1])).all())
    return bool(torch.as_tensor(constraint.check(value)).all())
