"""A param store, a random state and a precision of an estimator's own, for as long as it is at work."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger

from pyro_em.fitting.results.result import EMResult
from pyro_em.portable import Refused
from pyro_em.tracing.randomness import same_random_state, seed_generators

# Pyro's param store belongs to the process: estimators in several threads take turns.
_turns = threading.RLock()


_LAZY = ("_standard_errors", "_posterior", "_forms", "_bootstrap")


def in_store(result: EMResult, store: dict[str, Any], seed: int, dtype: torch.dtype) -> EMResult:
    """A result whose late answers run the model where its parameters are, if they run it.

    Args:
        result: Of a fit in that store.
        store: As in `kept_store`.
        seed: As there.
        dtype: As there.
    """

    def inside(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            with kept_store(store, seed, dtype):
                return function(*args, **kwargs)

        return run

    lazy = {name: getattr(result, name) for name in _LAZY}
    own: dict[str, Any] = {
        name: inside(function)
        for name, function in lazy.items()
        if function is not None and not isinstance(function, Refused)
    }
    return replace(result, **own)


class AsFitted(Messenger):
    """Parameters that the store has need no initial values: these may depend on how many rows come.

    ``pyro.param("mu", x[:K])`` is one of K rows at least; a question may be about fewer.
    """

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        name, args = msg["name"], msg["args"]
        if len(args) > 1 and name in pyro.get_param_store():
            msg["args"] = (args[0], pyro.get_param_store()[name].detach(), *args[2:])


@contextmanager
def kept_store(store: dict[str, Any], seed: int, dtype: torch.dtype) -> Iterator[None]:
    """Work on an estimator's own parameters; the user's store and all global states are as before.

    Args:
        store: The parameters, as ``ParamStoreDict.get_state`` gives them; new ones are added to it.
        seed: Of whatever is random inside.
        dtype: Torch's default inside, so that ``torch.ones(3)`` in a model is of the data's precision.
    """
    before = torch.get_default_dtype()
    with _turns, same_random_state(), pyro.get_param_store().scope(store):
        seed_generators(seed)
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
