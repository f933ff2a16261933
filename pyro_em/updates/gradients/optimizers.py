"""Optimisers of stochastic steps: built once, stepped, saved by parameter name."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_em.errors import UsageError, message


class StepsPyroOptim(torch.optim.Optimizer):
    """A ``pyro.optim`` object with the interface of a torch optimiser."""

    def __init__(self, parameters: list[torch.Tensor], optim: pyro.optim.PyroOptim) -> None:
        super().__init__(parameters, {})
        self.optim = optim

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step every parameter that has a gradient."""
        self.optim([p for p in self.param_groups[0]["params"] if p.grad is not None])


Optimizer = Callable[[list[Tensor]], torch.optim.Optimizer]


def adam(parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The optimiser where the user gave none."""
    return torch.optim.Adam(parameters, lr=0.005, fused=_fused(parameters))


def _fused(parameters: Sequence[Tensor]) -> bool | None:
    """Whether Adam is fused; torch decides (None) where there are gaps in a parameter's memory."""
    able = all(p.device.type in ("cpu", "cuda") and p.is_contiguous() for p in parameters)
    return able or None


class Stepper:
    """One optimiser over named parameters, which may grow in number."""

    def __init__(
        self, optim: Optimizer | pyro.optim.PyroOptim, saved_name: Callable[[str], str] = str
    ) -> None:
        self.optim, self.saved_name = optim, saved_name
        self.torch_optimizer: torch.optim.Optimizer | None = None
        self.known: dict[str, Tensor] = {}
        self.pending: Any = None

    def step(self, parameters: Mapping[str, Tensor]) -> None:
        """Move parameters along their ``grad``, which is kept."""
        known = self.known
        if (
            self.torch_optimizer is not None
            and self.pending is None
            and parameters.keys() == known.keys()
            and all(map(operator.is_, map(known.get, parameters), parameters.values()))
        ):  # as at the step before
            self.torch_optimizer.step()
            return
        moved = {n: p for n, p in parameters.items() if p.grad is not None}
        if isinstance(self.optim, pyro.optim.PyroOptim):
            if self.pending is not None:
                self.optim.optim_objs.clear()  # states are taken in by new ones only
                self.optim.set_state(self.pending)
                self.pending = None
            self.optim(list(moved.values()))
            return
        stale = any(n in self.known and self.known[n] is not p for n, p in moved.items())
        before = self.torch_optimizer
        if self.torch_optimizer is None or stale:
            self.torch_optimizer, self.known = _built(self.optim, list(moved.values())), moved
        new = {n: p for n, p in moved.items() if n not in self.known}
        if new:
            group: dict[str, Any] = {"params": list(new.values())}
            if self.optim is adam:
                group["fused"] = _fused(group["params"])
            self.torch_optimizer.add_param_group(group)
            self.known.update(new)
        if self.pending is not None and (new or self.torch_optimizer is not before):
            self._resume(self.torch_optimizer)
        idle = [p for n, p in self.known.items() if n not in moved]
        for p in idle:
            p.grad = None
        self.torch_optimizer.step()

    @property
    def is_one_kernel(self) -> bool:
        """Whether all parameters move at once, so that no interrupt can leave half a step."""
        groups = [] if self.torch_optimizer is None else self.torch_optimizer.param_groups
        return len(groups) == 1 and bool(groups[0].get("fused"))

    def state(self) -> Any:
        """What a saved fit needs to continue."""
        if isinstance(self.optim, pyro.optim.PyroOptim):
            return self.optim.get_state()
        if self.torch_optimizer is None:
            return self.pending
        state = self.torch_optimizer.state_dict()
        names = [self.saved_name(n) for n in self.known]
        if self.pending is not None:  # of parameters that were not read yet
            for i, name in enumerate(self.pending["names"]):
                if i in self.pending["state"]:
                    state["state"][len(names)] = self.pending["state"][i]
                    names.append(name)
        return {**state, "names": names}

    def _resume(self, optimizer: torch.optim.Optimizer) -> None:
        """Take over what was saved of the parameters known so far, by name.

        Parameters may be read in another order than before, and some of them later.
        """
        saved, state = self.pending, optimizer.state_dict()
        if "names" not in saved:  # a file of an earlier version
            optimizer.load_state_dict(saved)
            self.pending = None
            return
        by_name = {
            n: saved["state"][i] for i, n in enumerate(saved["names"]) if i in saved["state"]
        }
        known = [self.saved_name(n) for n in self.known]
        for i, name in enumerate(known):
            if name in by_name and i not in state["state"]:
                state["state"][i] = by_name[name]
        options = {
            k: v for k, v in saved["param_groups"][0].items() if k not in ("params", "fused")
        }
        for group in state["param_groups"]:
            group.update(options)
        optimizer.load_state_dict(state)
        rest = [name for name in by_name if name not in known]
        states = {i: by_name[name] for i, name in enumerate(rest)}
        self.pending = {**saved, "names": rest, "state": states} if rest else None


class Steppers:
    """Optimisers by a key of their own, and loaded states of those that were not built yet."""

    def __init__(self, saved_name: Callable[[str], str] = str) -> None:
        self.saved_name = saved_name
        self._built: dict[str, Stepper] = {}
        self._pending: dict[str, Any] = {}

    def of(self, key: str, optim: Optimizer | pyro.optim.PyroOptim) -> Stepper:
        """The optimiser of a key, built anew where it is asked for with another ``optim``."""
        stepper = self._built.get(key)
        if stepper is None or stepper.optim is not optim:
            stepper = self._built[key] = Stepper(optim, self.saved_name)
            stepper.pending = self._pending.pop(key, None)
        return stepper

    def is_one_kernel(self, key: str) -> bool:
        """Whether the key has an optimiser that moves all its parameters at once."""
        return key in self._built and self._built[key].is_one_kernel

    def state(self) -> dict[str, Any]:
        """What a saved fit needs to continue, by key."""
        return {**self._pending, **{key: s.state() for key, s in self._built.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """States of a saved fit, for the optimisers that are built from now on."""
        self._pending = dict(state)


def state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What an optimiser of an M-step needs to continue; its tensors are those that it steps with."""
    if isinstance(optimizer, StepsPyroOptim):
        return {"pyro": optimizer.optim.get_state()}
    return optimizer.state_dict()


def with_state(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> torch.optim.Optimizer:
    """A new optimiser that continues from a state of `state_of`."""
    if isinstance(optimizer, StepsPyroOptim):
        optimizer.optim.optim_objs.clear()  # states are taken in by new ones only
        optimizer.optim.set_state(state["pyro"])
    else:
        optimizer.load_state_dict(dict(state))
    return optimizer


def of_update(
    optim: Optimizer | pyro.optim.PyroOptim, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    """The optimiser of an M-step by gradient, of torch or of Pyro.

    Raises:
        UsageError: If it is no optimiser, or one that needs more than a gradient.
    """
    if isinstance(optim, pyro.optim.PyroOptim):
        return StepsPyroOptim(parameters, optim)
    built = _torch_optimizer("Gradient", optim, parameters)
    if _needs_closure(built):
        raise UsageError(
            message(
                "Gradient",
                f"{type(built).__name__} evaluates the loss several times per step.",
                "an optimiser steps along one gradient here",
                ["leave it out: L-BFGS with a line search is the default", "use Adam or SGD"],
            )
        )
    return built


def _torch_optimizer(
    where: str, optim: Optimizer, parameters: list[Tensor]
) -> torch.optim.Optimizer:
    built = optim(parameters)
    if not isinstance(built, torch.optim.Optimizer):
        raise UsageError(
            message(
                where,
                f"it returned a {type(built).__name__}, not a torch optimiser.",
                fixes=["pass lambda params: torch.optim.Adam(params, lr=0.01)"],
            )
        )
    return built


def _needs_closure(built: torch.optim.Optimizer) -> bool:
    closure = inspect.signature(type(built).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def _built(optim: Optimizer, parameters: list[Tensor]) -> torch.optim.Optimizer:
    """The user's torch optimiser, which has to step along one gradient."""
    built = _torch_optimizer("optim", optim, parameters)
    if _needs_closure(built):
        raise UsageError(
            message(
                "optim",
                f"{type(built).__name__} evaluates the loss several times per step.",
                "a drawn bound is another function at every draw",
                ["use Adam or SGD", "without a guide that draws, L-BFGS is the default"],
            )
        )
    return built
