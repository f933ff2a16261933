"""The warning of ``step`` where its data differ from those of the step before."""

from __future__ import annotations

from typing import Any

from pyro_em.errors import message, warn
from pyro_em.plan.program import Program
from pyro_em.tracing.dependences import contents_of
from pyro_em.updates.decisions.decision import forgets
from pyro_em.variational.bound import Variational


class LastData:
    """The data of the last step, for one warning where a step on other data forgets them.

    Example:
        >>> last = LastData()
        >>> last.note((1,), {})
    """

    def __init__(self) -> None:
        self._contents: tuple[Any, ...] | None = None
        self._has_told = False

    def note(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the data of the coming step."""
        self._contents = contents_of((args, kwargs))

    def warn_of_others(self, program: Program, args: tuple, kwargs: dict[str, Any]) -> None:
        """Record the data, and warn where a step of an exact model forgets those before."""
        before = self._contents
        self.note(args, kwargs)
        if before in (None, self._contents) or self._has_told or not forgets(program.updates):
            return
        self._has_told = True
        warn(
            message(
                "step",
                "these data are others than before, and what was learnt of those is forgotten.",
                "every M-step of an exact model is the maximum for the data of its own step: going "
                "through batches fits the last one",
                ["em.fit(all data): it finds the best parameters for all of them by itself"],
            )
        )

    def warn_of_batches(
        self, variational: Variational, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        """Record the data, and warn where integrated latents would connect these with those before."""
        bare, routing = variational.bare, variational.routing
        shared = [n for n in routing.gaussian if not bare.are_local((n,))]
        if self._has_told or not shared:
            return
        before = self._contents
        self.note(args, kwargs)
        if before in (None, self._contents):
            return
        self._has_told = True
        names = ", ".join(f"'{n}': 'guide'" for n in shared)
        warn(
            message(
                "step",
                f"these data are others than before, and '{shared[0]}' is integrated over those of "
                "this step alone.",
                "it has an exact posterior given all data; the rows of one batch do not show it",
                [
                    f"let the guide learn it from all batches: strategy={{{names}}}",
                    "em.fit(all data), or em.step(all data)",
                ],
            )
        )
