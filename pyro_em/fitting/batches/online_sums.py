"""Sums that stand for all rows, once a batch has come: averaged, or replaced."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from pyro_em.arguments import number, shown
from pyro_em.errors import UsageError, message
from pyro_em.fitting.batches.online_steps import Steps
from pyro_em.plan.fit_wishes import FitWishes


@dataclass(frozen=True)
class StepSize:
    """The step sizes of stepwise EM, γ_t = (t + 2)^−κ after a first one of one.

    Args:
        exponent: κ, above one half and at most one: above, so that noise averages out; at most, so that
            the beginning is forgotten.

    Raises:
        UsageError: If it is another number.

    Example:
        >>> sizes = StepSize(0.6)
        >>> [round(sizes.at(t), 3) for t in range(4)]
        [1.0, 0.517, 0.435, 0.381]

    Source: Cappé and Moulines (2009).
    """

    exponent: float = 0.6

    def __post_init__(self) -> None:
        exponent = number("StepSize", "exponent", self.exponent)
        if not 0.5 < exponent <= 1:
            raise UsageError(
                message(
                    "StepSize",
                    f"exponent={exponent:g} is not above 0.5 and at most 1.",
                    "steps have to become small, and not too fast: Σ γ is infinite, Σ γ² is not",
                    ["pass StepSize(0.6)"],
                )
            )

    def at(self, t: int) -> float:
        """The size of a step, from zero."""
        return 1.0 if t == 0 else (t + 2) ** -float(self.exponent)


class Sums(Protocol):
    """Sums that stand for all rows."""

    def with_batch(self, steps: Steps, own: Any, number: int, rows: int) -> Any:
        """The sums once a batch has come.

        Args:
            steps: Made them, and knows the parameters of their E-step.
            own: The sums of the batch.
            number: Which batch of a pass it is.
            rows: How many rows it has.
        """
        ...


@dataclass(eq=False)
class Averaged:
    """The sums of stepwise EM, S ← (1 − γ_t) S + γ_t (N / n) S_batch.

    Attributes:
        sizes: The sizes of steps.
        total: N, the number of all rows.
        sums: S; None before the first step.
        steps: t.
    """

    sizes: StepSize
    total: int
    sums: Any = None
    steps: int = 0

    def with_batch(self, steps: Steps, own: Any, number: int, rows: int) -> Any:
        """See `Sums.with_batch`."""
        new = (self.total / rows) * own
        if self.sums is not None:
            size = self.sizes.at(self.steps)
            new = (1 - size) * steps.here(self.sums) + size * new
        self.sums, self.steps = new, self.steps + 1
        return new


@dataclass(eq=False)
class Replaced:
    """The sums of incremental EM, S ← S − S_batch(before) + S_batch.

    Attributes:
        total: The number of all rows.
        batches: The sums of each batch.
        sums: S; None before the first step.
        seen: The number of rows in it.
    """

    total: int
    batches: list[Any] = field(default_factory=list)
    sums: Any = None
    seen: int = 0

    def with_batch(self, steps: Steps, own: Any, number: int, rows: int) -> Any:
        """See `Sums.with_batch`."""
        new = own if self.sums is None else steps.here(self.sums) + own
        if number < len(self.batches):
            new = new + (-1.0) * steps.here(self.batches[number])
            self.batches[number] = own
        else:
            self.batches.append(own)
            self.seen += rows
        self.sums = new
        return new if self.seen == self.total else (self.total / self.seen) * new


def sums_of(online: StepSize | str, total: int) -> Averaged | Replaced:
    """The sums that a user asked for.

    Args:
        online: The step sizes, or ``"incremental"``.
        total: The number of all rows.
    """
    return Averaged(online, total) if isinstance(online, StepSize) else Replaced(total)


def checked_online(online: Any) -> StepSize | str:
    """What a user passed as ``online``.

    Raises:
        UsageError: If it is neither a `StepSize` nor ``"incremental"``.
    """
    if isinstance(online, StepSize) or (isinstance(online, str) and online == "incremental"):
        return online
    raise UsageError(
        message(
            "fit",
            f"online={shown(online)} is not understood.",
            "it says how sums of chunks are put together",
            ["online=StepSize(0.6): stepwise EM", "online='incremental'"],
        )
    )


def refuse_with_online(wishes: FitWishes, has_chunks: bool) -> None:
    """Refuse what steps after each chunk cannot do.

    Args:
        wishes: The keywords of ``fit``.
        has_chunks: Whether the data are chunks.

    Raises:
        UsageError: With the keyword.
    """
    checked_online(wishes.online)
    if has_chunks and wishes.acceleration is None:
        return
    given = wishes.acceleration is not None
    raise UsageError(
        message(
            "online",
            "acceleration was given together with online." if given else "the data are no Chunks.",
            "an M-step follows each chunk of the data",
            ["leave acceleration out"] if given else ["em.fit(Chunks(x, rows=1000), online=...)"],
        )
    )
