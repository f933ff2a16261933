"""What captures the parameters of a run: what it read, and what it was handed out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import ref

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import constraints

from pyro_em.tracing.memory import own_start, settle
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.parameters import TracedParameter, constrained


class NoTensor(Exception):
    """The initial value of a parameter is no tensor, or none of real numbers in dense form.

    Attributes:
        name: The parameter's.
        value: What was given.
    """

    def __init__(self, name: str, value: Any) -> None:
        super().__init__(f"parameter '{name}'")
        self.name, self.value = name, value


class ParameterCapture:
    """Record every parameter that a model reads, and hand out one detached leaf per name.

    The trace of a run tells it of the messages of parameters, before and after Pyro has seen them.

    Args:
        values: Constrained values to hand out instead, possibly attached to an autograd graph.
        look_at_initial_shape: Whether to evaluate lazy initial values for their shape.
        hand_out: Whether leaves are handed out at all; parameters are only recorded otherwise.
        log: Where the run is noted. What becomes of a parameter before the model has it is not.
        begins: Whether parameters get their first values on the side: the model does the same as in
            later runs.

    Attributes:
        aside: A block whose operations are none of the model's.
        handed_out: Values that were handed out before Pyro looked for any.
        noted: Those of them that were noted at once.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor] | None = None,
        look_at_initial_shape: bool = False,
        hand_out: bool = True,
        log: OperationLog | None = None,
        begins: bool = False,
    ) -> None:
        self.values = values
        self.hand_out = hand_out
        self.log, self.begins = log, begins
        self.aside: AbstractContextManager[None] = nullcontext() if log is None else log.aside()
        self.look_at_initial_shape = look_at_initial_shape
        self.given: dict[str, Any] = {}
        self.parameters: dict[str, TracedParameter] = {}
        self._starts: dict[str, torch.Tensor] = {}
        self.handed_out: dict[str, torch.Tensor] = {}
        self.noted: dict[str, torch.Tensor] = {}
        self._constraints: dict[str, constraints.Constraint] = {}

    def before(self, msg: Any) -> None:
        """Give the message of a parameter its value, where it is one of the param store."""
        store = pyro.get_param_store()
        with self.aside:
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
        self.handed_out[name] = value
        msg["value"], msg["done"] = value, True
        if not self.look_at_initial_shape:  # which handlers around the run may still change
            self.noted[name] = value
            self.after(msg)

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
            elif value is self.handed_out.get(name):
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
