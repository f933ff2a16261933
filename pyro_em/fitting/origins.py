"""Where the values come from at which a fit begins: from the model, or from the param store."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import pyro
import torch
from torch import Tensor

from pyro_em.errors import message
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.steps.beginnings import name_of_start
from pyro_em.tracing.parameters import TracedParameter

_STORED = "values in the param store"


@dataclass(frozen=True)
class Origin:
    """Which parameters begin at other values than those that the model gives them.

    Attributes:
        stored: Those whose value was in the param store.
        foreign: Those of them that somebody else has written there.
    """

    stored: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()


def origin_of(
    parameters: Mapping[str, TracedParameter],
    given: Mapping[str, Tensor | None],
    *,
    held: Collection[str],
    first: Mapping[str, Tensor],
    foreign: Collection[str],
) -> Origin:
    """Compare the present values with those that the model gives.

    Args:
        parameters: All parameters.
        given: The initial values in the model by name, where it has any.
        held: The names in the param store before the fit.
        first: Unconstrained values at which parameters were first seen.
        foreign: What the store held before the model was seen first.
    """
    stored = []
    for name, p in parameters.items():
        if name not in held:
            continue  # made by the model just now
        if name not in foreign and torch.equal(p.unconstrained, first[name]):
            continue
        initial = given.get(name)
        if initial is None or not _is_near(p.value(), initial):
            stored.append(name)
    # Of the parameters of a module nobody can say where they would have begun elsewhere.
    other = tuple(n for n in stored if n in foreign and given.get(n) is not None)
    return Origin(tuple(stored), other)


def _is_near(value: Tensor, initial: Tensor) -> bool:
    """Whether they are equal but for the rounding of the constraint's transform."""
    if value.shape != initial.shape or initial.is_meta:
        return False
    close = torch.isclose(value, initial.to(value), rtol=1e-4, atol=1e-6, equal_nan=True)
    return bool(close.all())


class FirstSeen:
    """Parameters as they were when a model was first run, and who had made them.

    Attributes:
        values: The unconstrained values at which they were first seen.
        foreign: Those that the param store held before that, which somebody else has written.
        has_loaded: Whether a file gave the present values.
    """

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.foreign: set[str] = set()
        self.has_loaded = False
        self._held: frozenset[str] = frozenset()
        self._put_back: set[str] = set()

    def before_a_run(self) -> None:
        """Record what the param store holds before the model is run."""
        self._held = frozenset(pyro.get_param_store())

    def note(self, parameters: Mapping[str, TracedParameter]) -> None:
        """Record the parameters that a run has found."""
        for name, p in parameters.items():
            if name in self.values:
                continue
            self.values[name] = p.unconstrained.detach().clone()
            if name in self._held and name not in self._put_back:
                self.foreign.add(name)

    def loaded(self, parameters: Mapping[str, TracedParameter]) -> None:
        """A file gives all values from now on."""
        self.foreign, self.has_loaded = set(parameters), True

    def origin(
        self,
        parameters: Mapping[str, TracedParameter],
        given: Mapping[str, Tensor | None],
        held: Collection[str],
    ) -> Origin:
        """Where a fit begins; from now on the values are its own. The arguments: `origin_of`'s."""
        origin = origin_of(parameters, given, held=held, first=self.values, foreign=self.foreign)
        if self.has_loaded:
            origin = replace(origin, foreign=())
        self.foreign -= set(origin.foreign)
        return origin

    def put_back(self, parameters: Mapping[str, TracedParameter], built: Collection[str]) -> None:
        """Return module parameters to the values first seen, let the store forget the others.

        Args:
            parameters: All parameters.
            built: Names of those of a guide that was built here, which is forgotten.
        """
        store = pyro.get_param_store()
        self._put_back = set(parameters) - self.foreign
        for name, p in parameters.items():
            if isinstance(p.unconstrained, torch.nn.Parameter) and name not in built:
                with torch.no_grad():
                    p.unconstrained.copy_(self.values[name])
            elif name in store:
                del store[name]
        self.values, self.foreign, self.has_loaded = {}, set(), False


def with_origin(result: EMResult, origin: Origin) -> EMResult:
    """A result whose plan notes where its fit began."""
    if not origin.stored:
        return result
    usual = name_of_start(None)
    if usual not in result.start:
        return result
    start = result.start.replace(usual, _STORED)
    if not origin.foreign:
        return replace(result, start=start)
    names = ", ".join(f"'{n}'" for n in origin.foreign[:4])
    names += ", …" if len(origin.foreign) > 4 else ""
    note = message(
        "start",
        f"the fit began at values of {names} that were in the param store before; the model itself "
        "begins at others.",
        "parameters are known by their names, whoever has written them",
        ["pyro.clear_param_store(), or reset() of what wrote them, then fit"],
    )
    plan = replace(result.plan, notes=(*result.plan.notes, note))
    return replace(result, start=start, plan=plan)
