"""Densities at the trial points of a climb, without a run of the model for each.

A climb asks for densities at one point after another. The first run of the model is noted
(`pyro_em.tracing.tape`), and what the parameters reach is computed anew at the others: the sites,
plates and densities that they do not reach are left out. That it is what the model does is seen twice:
by a second run at another point, and at the beginning of each M-step by the run that its E-step has
made. Where the two differ, or the notes are not enough, the model is run at each point.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.tape import Recorder, Tape

Values = Mapping[str, Tensor]
Tables = dict[int, Tensor]
Run = Callable[[Values, Sequence[int]], Tables]


@dataclass(eq=False)
class _Noted:
    """What is known of the densities of some groups.

    Attributes:
        tape: The notes; None where the model has to run.
        at: The parameters of the run that was noted, until another run has confirmed the notes.
    """

    tape: Tape | None
    at: dict[str, Tensor] | None


@dataclass(eq=False)
class Replays:
    """The notes of one model on one set of data, from one M-step to the next.

    Attributes:
        owner: The model's arguments.
        noted: By groups.
    """

    owner: tuple | None = None
    noted: dict[tuple[int, ...], _Noted] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Replays, ()

    def begin(self, owner: tuple, values: Values, tables: Sequence[Tensor]) -> None:
        """Hold the notes against the densities of an E-step.

        Args:
            owner: The model's arguments.
            values: The parameters of the E-step.
            tables: Log densities of all groups there.
        """
        if self.owner is not owner:
            self.owner = owner
            self.noted.clear()
        for groups, noted in list(self.noted.items()):
            if noted.tape is None or noted.at is not None:
                continue
            with torch.no_grad():
                found = _replayed(noted.tape, values)
            if found is None or not all(_is_same(found[g], tables[g]) for g in groups):
                del self.noted[groups]

    def densities(
        self,
        values: Values,
        groups: Sequence[int],
        parameters: Mapping[str, TracedParameter],
        run: Run,
    ) -> Tables:
        """Log densities of some groups at constrained values, differentiable.

        Args:
            values: The parameters.
            groups: Which groups.
            parameters: All parameters, for those that modules hold themselves.
            run: Runs the model.
        """
        key = tuple(groups)
        held = tuple(p.unconstrained for p in parameters.values() if p.leaf is p.unconstrained)
        noted = self.noted.get(key)
        if noted is None:
            return self._first(key, values, held, run)
        tape = noted.tape
        if tape is None or tape.names != tuple(values) or not _are(tape.held, held):
            return run(values, groups)
        if noted.at is None:
            again = _replayed(tape, values)
            return run(values, groups) if again is None else again
        found = run(values, groups)
        if any(not torch.equal(noted.at[n], v) for n, v in _numbers(values, held).items()):
            with torch.no_grad():
                again = _replayed(tape, values)
            same = again is not None and all(_is_same(again[g], found[g]) for g in groups)
            self.noted[key] = _Noted(tape if same else None, None)
        return found

    def _first(
        self, key: tuple[int, ...], values: Values, held: tuple[Tensor, ...], run: Run
    ) -> Tables:
        if not torch.is_grad_enabled():
            return run(values, key)
        recorder = Recorder(values, held)
        with recorder:
            found = run(values, key)
        tape = recorder.tape(found)
        at = {n: v.detach().clone() for n, v in _numbers(values, held).items()}
        self.noted[key] = _Noted(tape, at)
        return found


def _replayed(tape: Tape, values: Values) -> Tables | None:
    """The densities by the notes; None where they fail, which a run of the model says in words."""
    try:
        found = tape(values)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return found if all(t.shape == tape.shapes[g] for g, t in found.items()) else None


def _numbers(values: Values, held: Sequence[Tensor]) -> dict[str, Tensor]:
    """All tensors that densities are a function of."""
    return {**values, **{f"held {i}": t for i, t in enumerate(held)}}


def _are(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(some) == len(others) and all(a is b for a, b in zip(some, others, strict=True))


def _is_same(found: Tensor, table: Tensor) -> bool:
    """Whether densities are the same up to rounding, where the order of sums may differ."""
    table = table.detach()
    try:
        found = found.expand(table.shape).to(table.dtype)
    except RuntimeError:
        return False
    eps = torch.finfo(table.dtype).eps
    return torch.allclose(found, table, rtol=1e3 * eps, atol=1e3 * eps, equal_nan=True)
