"""What all runs of a process share in Pyro and torch stays whole when one of them breaks off.

Handlers leave the process as they found it when a model raises. An interrupt can come while one of
them is entered or left: then a plate keeps its dimension ("duplicate plate" in every later run), a
handler or a mode of torch its place, validation its state. Whoever runs a model puts back what was
there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.distributions.distribution import COERCIONS
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.runtime import _DIM_ALLOCATOR, _PYRO_STACK
from torch import Tensor

_VALIDATING = (pyro.distributions, pyro.infer, pyro.poutine)


@dataclass(eq=False)
class LeftWhole:
    """A block after which handlers, plates, modes and validation are as before, if it breaks off.

    Args:
        random_state: Whether random states are as before too, however it ends.
    """

    random_state: bool = False

    def __enter__(self) -> LeftWhole:
        self._random = _random_states() if self.random_state else ()
        forget_lost_plates()
        self._handlers, self._plates = list(_PYRO_STACK), list(_DIM_ALLOCATOR._stack)
        self._modes, self._grad = torch._C._len_torch_dispatch_stack(), torch.is_grad_enabled()
        self._functions = torch._C._len_torch_function_stack()
        self._coercions = list(COERCIONS)
        self._validation = [part.is_validation_enabled() for part in _VALIDATING]
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: Any) -> None:
        for set_state, state in self._random:
            set_state(state)
        if kind is None:
            return
        if self._handlers != _PYRO_STACK:
            _PYRO_STACK[:] = self._handlers
        if _DIM_ALLOCATOR._stack != self._plates:
            _DIM_ALLOCATOR._stack[:] = self._plates
        if self._coercions != COERCIONS:
            COERCIONS[:] = self._coercions
        while torch._C._len_torch_dispatch_stack() > self._modes:
            torch._C._pop_torch_dispatch_stack(None)
        while torch._C._len_torch_function_stack() > self._functions:
            torch._C._pop_torch_function_stack()
        if torch.is_grad_enabled() != self._grad:
            torch.set_grad_enabled(self._grad)
        for part, was in zip(_VALIDATING, self._validation, strict=True):
            if part.is_validation_enabled() != was:
                part.enable_validation(was)


class Unvalidated:
    """A block in which nothing is validated: ``pyro.validation_enabled(False)`` at less cost.

    Example:
        >>> with pyro.validation_enabled(True), Unvalidated():
        ...     pyro.distributions.is_validation_enabled()
        False
    """

    def __enter__(self) -> None:
        self._before = [part.is_validation_enabled() for part in _VALIDATING]
        self._of_torch = torch.distributions.Distribution._validate_args
        if any(self._before) or self._of_torch:
            pyro.enable_validation(False)

    def __exit__(self, *exception: Any) -> None:
        for part, was in zip(_VALIDATING, self._before, strict=True):
            if part.is_validation_enabled() != was:
                part.enable_validation(was)
        if torch.distributions.Distribution._validate_args != self._of_torch:
            torch.distributions.Distribution.set_default_validate_args(self._of_torch)


def _random_states() -> Sequence[tuple[Callable[[Tensor], None], Tensor]]:
    """The random states that `pyro_em.tracing.randomness.same_random_state` restores, and how."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_initialized():
        states.append((torch.cuda.set_rng_state, torch.cuda.get_rng_state()))
    return states


def forget_lost_plates() -> None:
    """Free the dimensions of plates that nobody is in: an interrupt elsewhere left them."""
    if _DIM_ALLOCATOR._stack and not any(isinstance(h, IndepMessenger) for h in _PYRO_STACK):
        _DIM_ALLOCATOR._stack.clear()
