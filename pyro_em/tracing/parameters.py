"""Parameters as a run reads them: captured, read, written in place, restored.

One subject, since what a run captured is what is written and restored afterwards: the record of a
parameter, the handlers that fill it, and the few functions on many of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import Transform, constraints, transform_to

from pyro_em.arguments import as_tensor
from pyro_em.distributions import bounds
from pyro_em.errors import UsageError, message
from pyro_em.tracing.allocation import Unwatched
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.constrained import constrained
from pyro_em.tracing.memory import own_start, settle
from pyro_em.tracing.operations import OperationLog

_FOUND = ("transform", "inverse")  # what a parameter finds by itself


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


class NoTensor(Exception):
    """The initial value of a parameter is no tensor, or none of real numbers in dense form.

    Attributes:
        name: The parameter's.
        value: What was given.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(f"parameter '{name}'")
        self.name, self.value = name, value


class ParameterCapture(Messenger):
    """Record every parameter that a model reads, and hand out one detached leaf per name.

    Args:
        values: Constrained values to hand out instead, possibly attached to an autograd graph.
        look_at_initial_shape: Whether to evaluate lazy initial values for their shape.
        hand_out: Whether leaves are handed out at all; parameters are only recorded otherwise.
        log: Where the run is noted. What becomes of a parameter before the model has it is not.
        begins: Whether parameters get their first values on the side: the model does the same as in
            later runs.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor] | None = None,
        look_at_initial_shape: bool = False,
        hand_out: bool = True,
        log: OperationLog | None = None,
        begins: bool = False,
    ) -> None:
        super().__init__()
        self.values = values
        self.hand_out = hand_out
        self.log, self.begins = log, begins
        self.look_at_initial_shape = look_at_initial_shape
        self.given: dict[str, Any] = {}
        self.parameters: dict[str, TracedParameter] = {}
        self._starts: dict[str, torch.Tensor] = {}
        self._read_here: dict[str, torch.Tensor] = {}
        self._constraints: dict[str, constraints.Constraint] = {}

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "param":  # not looked up for each of many sites
            self.before(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param":
            self.after(msg)

    def before(self, msg: Any) -> None:
        """Give the message of a parameter its value, where it is one of the param store."""
        store = pyro.get_param_store()
        with self.quietly():
            if msg["name"] not in store:
                self._note_start(msg)
                _start_apart(msg)
            if self.hand_out and not msg["done"] and msg["value"] is None:
                if self.begins and msg["name"] not in store:
                    self._begin(msg)
                self._read(msg)

    def _begin(self, msg: dict[str, Any]) -> None:
        """Give a parameter its first value."""
        name, store = msg["name"], pyro.get_param_store()
        if len(msg["args"]) < 2:
            msg["fn"](*msg["args"], **msg["kwargs"])  # there is none: Pyro says so
        initial = msg["args"][1]
        # As Pyro does it, but for the constrained value, which is computed when it is read.
        store._constraints[name] = msg["kwargs"].get("constraint") or constraints.real
        store[name] = initial() if callable(initial) else initial
        own = store._params[name]
        settle([own])  # what is noted of it is noted by its memory
        if self.log is not None:
            self.log.give(own, name)

    def quietly(self) -> AbstractContextManager[None]:
        """A block whose operations are none of the model's."""
        if isinstance(self.log, CallLog):
            return self.log.aside()
        return nullcontext() if self.log is None else Unwatched(self.log)

    def _read(self, msg: dict[str, Any]) -> None:
        """Give a message the value of a parameter that the param store holds under a constraint.

        Pyro would transform it anew, with a graph that nobody follows.
        """
        name = msg["name"]
        store = pyro.get_param_store()
        own, constraint = store._params.get(name), store._constraints.get(name)
        if own is None or constraint is None or isinstance(own, torch.nn.Parameter):
            return
        known = self.parameters.get(name)
        if known is not None:
            value = known.leaf
        elif self.values is not None and name in self.values:
            value = self.values[name]
        else:
            value = constrained(own, constraint).requires_grad_(own.is_floating_point())
            if self.log is not None:
                self.log.know(value, name)
        value.unconstrained = ref(own)  # type: ignore[attr-defined]
        self._read_here[name] = value
        msg["value"], msg["done"] = value, True

    def _note_start(self, msg: dict[str, Any]) -> None:
        """Note the initial value of a parameter that this run initialises."""
        name, args = msg["name"], msg["args"]
        if not self.look_at_initial_shape or len(args) < 2:
            return
        given = args[1]
        self._constraints[name] = msg["kwargs"].get("constraint") or constraints.real
        if isinstance(given, torch.Tensor) or not callable(given):
            self._noted(name, given)
        else:
            msg["args"] = (name, lambda: self._noted(name, given()), *args[2:])

    def _noted(self, name: str, value: Any) -> Any:
        odd = isinstance(value, torch.Tensor) and (
            value.layout != torch.strided or value.is_quantized or value.is_complex()
        )
        if odd or not isinstance(value, torch.Tensor):
            raise NoTensor(name, value)
        self._starts[name] = value.detach()
        return value

    def unfinished(self) -> TracedParameter | None:
        """The parameter whose initial value Pyro could not bring into its constraint, if any."""
        for name, given in self._starts.items():
            if name not in self.parameters:
                nowhere = torch.full_like(given, torch.nan) if given.is_floating_point() else given
                own = self._constraints[name]
                return TracedParameter(name, nowhere, own, given, initial=given)
        return None

    def after(self, msg: Any) -> None:
        """Note the parameter of a message that the model is about to get."""
        name, value = msg["name"], msg["value"]
        given = msg["kwargs"].get("constraint")
        store = pyro.get_param_store()
        constraint = store._constraints.get(name, given) if name in store else given
        constraint = constraints.real if constraint is None else constraint
        known = self.parameters.get(name)
        # pyro.param("p") without an initial value reads and declares nothing.
        declares = len(msg["args"]) > 1 and given is not None
        declared = known.declared if known else ()
        if declares:
            declared = (*declared, repr(given))
            if constraint is not given and repr(constraint) != declared[-1]:
                declared = (*declared, repr(constraint))
        if known is None:
            unconstrained = value.unconstrained() if hasattr(value, "unconstrained") else value
            if isinstance(value, torch.nn.Parameter):
                # A plain nn.Parameter is read directly by its module, not through this message.
                leaf = value
            elif self.values is not None and name in self.values:
                leaf = self.values[name]
            elif value is self._read_here.get(name):
                leaf = value
            else:
                leaf = value.detach().clone().requires_grad_(value.is_floating_point())
            start = self._given(msg)
            own = msg["args"][1] if len(msg["args"]) > 1 else None
            shaped = start if isinstance(start, torch.Tensor) else own
            shape = shape_of(shaped) if isinstance(shaped, torch.Tensor) else None
            self.given[name] = start
            foreign = isinstance(own, torch.nn.Parameter) and own is not value and "$$$" not in name
        else:
            unconstrained, leaf, shape = known.unconstrained, known.leaf, known.initial_shape
            foreign = known.is_foreign
        initial = known.initial if known else self._starts.get(name)
        declarations = tuple(dict.fromkeys(declared))
        start = self.given[name]
        if not isinstance(start, torch.Tensor) or isinstance(start, torch.nn.Parameter):
            start = None  # a module's parameter is its own value
        self.parameters[name] = TracedParameter(
            name, unconstrained, constraint, leaf, declarations, shape, foreign, initial, start
        )
        if self.hand_out:
            if leaf is not value and hasattr(value, "unconstrained"):
                # A PyroModule that declares its parameter in this run asks for the leaf below.
                leaf.unconstrained = value.unconstrained  # type: ignore[attr-defined]
            msg["value"] = leaf

    def _given(self, msg: dict[str, Any]) -> Any:
        """The initial value that the model gives, made if it is lazy."""
        if not self.look_at_initial_shape or len(msg["args"]) < 2:
            return None
        initial = self._starts.get(msg["name"], msg["args"][1])
        if callable(initial) and not isinstance(initial, torch.Tensor):
            with torch.random.fork_rng(devices=[]):
                initial = initial()
        return initial


def shape_of(tensor: Tensor) -> torch.Size:
    """The shape of a tensor, which no mode of torch is asked for."""
    with torch._C.DisableTorchFunction():
        return tensor.shape


def _start_apart(msg: dict[str, Any]) -> None:
    """Let a parameter that this message declares for the first time begin in memory of its own."""
    name, *rest = msg["args"]
    if rest:
        msg["args"] = (name, own_start(rest[0]), *rest[1:])


def rename(module: Any, name: str) -> None:
    """Give a ``PyroModule`` and all below it another name in the param store, before its first use."""
    module._pyro_set_supermodule(name, module._pyro_context)


_STORE = pyro.get_param_store()


def _nothing() -> None:
    """What a parameter that was never handed out refers to."""


class ParameterRecord(Messenger):
    """A block that collects the unconstrained tensor of every parameter that is read inside.

    Guide and model of a network read each of its parameters, at every step: messages are taken as
    they come, without a look-up of methods by name, and a parameter without a constraint is handed
    out as the store holds it, where no handler of the user's waits for the message.

    Attributes:
        found: The tensors by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, torch.Tensor] = {}

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "param":
            return
        name = msg["name"]
        held = _STORE._params.get(name)
        if held is None:
            if name not in self.found:
                _start_apart(msg)
        elif (
            _STORE._constraints.get(name) is constraints.real
            and msg["value"] is None
            and _PYRO_STACK[0] is self
            and held.__dict__.get("unconstrained", _nothing)() is held
        ):
            msg["value"] = held

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] != "param":
            return
        value = msg["value"]
        if value is not None:
            own = value.unconstrained() if hasattr(value, "unconstrained") else value
            self.found[msg["name"]] = own


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
