"""The steps of online EM: sums of the rows of a batch, and an M-step on sums that stand for all rows.

A kernel makes sums from its own form of the parameters where they mean something at the parameters of
another E-step; elsewhere they are made through tables, for every model whose M-step needs no more than
sums of one size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_em.densities.density import KeepsRows
from pyro_em.densities.theta import At
from pyro_em.errors import Finding, Handover, UsageError, message
from pyro_em.plan.part import Part
from pyro_em.plan.program import Program
from pyro_em.plan.summed import (
    Beside,
    RowSums,
    differing_in,
    marks,
    rows_summed,
    summable,
)
from pyro_em.reduction.reduction import Reduction
from pyro_em.reduction.trees import SAME, larger, mapped
from pyro_em.tracing.encoding import decoded, encoded
from pyro_em.tracing.parameters import restore, snapshot, values_of, write
from pyro_em.tracing.sites import Role
from pyro_em.updates.expectations.statistics import Expectation
from pyro_em.updates.m_step import MStepState
from pyro_em.updates.sums.model_sums import ModelSums
from pyro_em.updates.sums.summable import Summable


class Steps(Protocol):
    """One way to make the steps of online EM; it knows where the parameters stand."""

    def e_step(self, batch: Reduction[Part]) -> tuple[int, float, Any]:
        """The number of a batch's rows, their log evidence in nats, and their sums.

        Raises:
            Handover: If an E-step through tables has to look.
        """
        ...

    def begin(self) -> None:
        """Take the parameters that are in the param store."""
        ...

    def beside(self) -> float:
        """The log density of what is outside the rows, priors among it, at that E-step, in nats."""
        ...

    def here(self, sums: Any) -> Any:
        """Sums of another E-step, taken about the points of the present one."""
        ...

    def m_step(self, sums: Any) -> float:
        """Go to the maximiser, and return by how much the expected log joint rises, in nats.

        Raises:
            Handover: If the step has no solution.
            DegenerateError: Likewise, with what is wrong.
        """
        ...

    def agree(self, over: Reduction[Part]) -> None:
        """Take the parameters of the first process, where there are several."""
        ...

    def values(self) -> dict[str, Tensor]:
        """The parameters."""
        ...

    def publish(self) -> None:
        """Put the parameters into the param store."""
        ...

    def state(self) -> Any:
        """Where the parameters stand, as plain values."""
        ...

    def go_to(self, state: Any) -> None:
        """Stand where another process stood."""
        ...


@dataclass(frozen=True, eq=False)
class KernelSums:
    """Sums of a kernel's E-step with the parameters at which it was made.

    Attributes:
        rows: How many rows they are of.
        expectation: The sums.
        at: The parameters, in the form of the E-step.
    """

    rows: int
    expectation: Expectation
    at: At = field(metadata=SAME)

    def __add__(self, other: KernelSums) -> KernelSums:
        both = self.expectation + other.expectation
        return KernelSums(self.rows + other.rows, both, self.at)

    def __mul__(self, factor: float) -> KernelSums:
        return KernelSums(self.rows, factor * self.expectation, self.at)

    __rmul__ = __mul__


class OnKernel:
    """Steps on the sums of a kernel; nothing is written until somebody looks.

    Args:
        program: The model with some rows.
        block: The kernel.
    """

    def __init__(self, program: Program, block: Any) -> None:
        self.program, self.block = program, block
        self.theta = block.theta
        self.at: Any = None
        self.begin()

    def begin(self) -> None:
        """See `Steps.begin`."""
        self.at = self.theta.enter(values_of(self.program.graph.parameters))

    def e_step(self, batch: Reduction[Part]) -> tuple[int, float, KernelSums]:
        """See `Steps.e_step`."""
        values = self.theta.values(self.at)
        self.at = self.theta.enter(values)  # as the part does

        def of(part: Part) -> KernelSums:
            return KernelSums(part.rows, part.expectation(values), self.at)

        with torch.inference_mode():
            found = batch.sum(of)
        return found.rows, found.expectation.log_evidence, found

    def beside(self) -> float:
        """See `Steps.beside`."""
        with torch.inference_mode():
            return float(self.theta.log_prior(self.at))

    def here(self, sums: KernelSums) -> KernelSums:
        """See `Steps.here`."""
        with torch.inference_mode():
            moved_sums = moved(self.block, sums.expectation, sums.at, self.at)
        return KernelSums(sums.rows, moved_sums, self.at)

    def m_step(self, sums: KernelSums) -> float:
        """See `Steps.m_step`."""
        try:
            with torch.inference_mode():
                self.at, gain = self.theta.m_step(self.at, sums.expectation)
        except torch.linalg.LinAlgError as error:
            raise Handover from error
        return float(gain)

    def agree(self, over: Reduction[Part]) -> None:
        """See `Steps.agree`."""
        self.at = over.alike(self.at)

    def values(self) -> dict[str, Tensor]:
        """See `Steps.values`."""
        found: dict[str, Tensor] = self.theta.values(self.at)
        return found

    def publish(self) -> None:
        """See `Steps.publish`."""
        write(self.program.graph.parameters, self.values())

    def state(self) -> Any:
        """See `Steps.state`."""
        return encoded(self.at)

    def go_to(self, state: Any) -> None:
        """See `Steps.go_to`."""
        self.at = decoded(state)
        self.publish()


class OnTables:
    """Steps on sums that are made through tables; the parameters are those in the param store.

    Args:
        part: Some rows, for what is the same for all.
        like: How rows are added up.
        state: What lasts from one M-step to the next.
        marks: What is known of the arguments that rows share.
    """

    def __init__(self, part: Part, like: Summable, state: MStepState, marks: Marks) -> None:
        self.part, self.like, self.state_of_steps, self.marks = part, like, state, marks
        self.parameters = part.program.graph.parameters
        self._beside: Beside | None = None
        self._sums: ModelSums | None = None
        self._index = 0

    def begin(self) -> None:
        """See `Steps.begin`: they are where they belong."""

    def e_step(self, batch: Reduction[Part]) -> tuple[int, float, ModelSums]:
        """See `Steps.e_step`."""
        self._beside = None

        def of(part: Part) -> RowSums:
            found, self._beside = self._summed(part)
            return found

        found = batch.sum(of)
        if self._beside is None:  # this process has no rows in the batch
            self._beside = self._summed(self.part)[1]
        self._index, self._sums = self._index + 1, found.sums
        return found.rows, found.log_evidence, found.sums

    def _summed(self, part: Part) -> tuple[RowSums, Beside]:
        return rows_summed(part, self._index, self.state_of_steps, self.like)

    def beside(self) -> float:
        """See `Steps.beside`."""
        assert self._beside is not None
        return self._beside.log_density

    def here(self, sums: ModelSums) -> ModelSums:
        """See `Steps.here`."""
        assert self._sums is not None
        return sums.about_those_of(self._sums)

    def m_step(self, sums: ModelSums) -> float:
        """See `Steps.m_step`."""
        assert self._beside is not None
        return self._beside.m_step(sums, self.state_of_steps)

    def agree(self, over: Reduction[Part]) -> None:
        """See `Steps.agree`."""
        restore(self.parameters, over.alike(snapshot(self.parameters)))

    def values(self) -> dict[str, Tensor]:
        """See `Steps.values`."""
        return values_of(self.parameters)

    def publish(self) -> None:
        """See `Steps.publish`: they are there."""

    def state(self) -> Any:
        """See `Steps.state`."""
        return {"index": self._index, "parameters": encoded(snapshot(self.parameters))}

    def go_to(self, state: Any) -> None:
        """See `Steps.go_to`."""
        self._index = state["index"]
        restore(self.parameters, decoded(state["parameters"]))


def steps_of(
    part: Part,
    block: Any,
    state: MStepState,
    over: Reduction[Part],
    rows: int,
    known: Marks | None = None,
) -> Steps:
    """How the steps of a model are made.

    Args:
        part: Some rows, which know what is known of all.
        block: The kernel that serves all of them; None where none does.
        state: What lasts from one M-step to the next.
        over: All rows that are known.
        rows: Their number.
        known: What was known of rows before them.

    Raises:
        UsageError: If no sums of one size hold what the rows say.
    """
    if block is not None and not part.has_data_outside and keeps_its_meaning(block):
        return OnKernel(part.program, block)
    high, low = over.max(marks), mapped(over.max(lambda p: mapped(marks(p), _negative)), _negative)
    if known is not None:
        high, low = (
            larger(high, known.high),
            mapped(larger(mapped(low, _negative), mapped(known.low, _negative)), _negative),
        )
    differing = differing_in(high, low, part, rows)
    found = summable(part, differing)
    if isinstance(found, Finding):
        raise UsageError(refusal(found))
    return OnTables(
        part, found, state, Marks(high, low, {g: sorted(d) for g, d in differing.items()})
    )


def _negative(t: Any) -> Any:
    return -t


@dataclass(frozen=True, eq=False)
class Marks:
    """What is known of the arguments that rows share.

    Attributes:
        high: The largest of what `pyro_em.plan.summed.marks` says.
        low: The smallest.
        differing: The arguments that differ between rows, by group.
    """

    high: Any
    low: Any
    differing: dict[int, list[str]]


def refusal(found: Finding) -> str:
    """The sentence on a model that has no sums which could be kept."""
    return message(
        f"online, {found.where}",
        f"{found.what}.",
        "steps after each batch keep sums of the rows before it, whose number does not grow",
        [
            "use steps on all data: em.fit(data)",
            "let a guide draw latents, and take stochastic steps",
        ],
    )


def keeps_its_meaning(block: Any) -> bool:
    """Whether the sums of a kernel can be used at the parameters of another E-step."""
    normals: Mapping[int, Any] | None = getattr(block, "normals", None)
    rules = () if normals is None else normals.values()
    if normals is None or any(isinstance(r, KeepsRows) or getattr(r, "is_local", 0) for r in rules):
        return False
    for g, group in enumerate(block.theta.graph.groups):
        family = group.family
        is_own = g in normals or group.role is Role.POINT
        if not is_own and family is not None and family.has_reference and group.observed:
            return False
    return True


def moved(block: Any, sums: Expectation, before: At, now: At) -> Expectation:
    """Sums with moments about the points of another E-step.

    Args:
        block: The kernel.
        sums: The sums.
        before: The parameters of their E-step.
        now: Those of the other one.
    """
    out = dict(sums.sums)
    for g, rule in block.normals.items():
        own, both = out[g], (before.prepared[g], now.prepared[g])
        out[g] = {**own, "moments": rule.about(*both, own["moments"], own["mass"])}
    return replace(sums, sums=out)
