"""A fitted model that can be fitted again: to other data, in a param scope of its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.analysis.generate import Source, points_of
from pyro_em.analysis.rows import rows_of, run
from pyro_em.errors import PyroEMError, PyroEMWarning, UsageError, message
from pyro_em.fitting.fit import fit
from pyro_em.fitting.results.history import EMStatus
from pyro_em.fitting.results.result import EMResult
from pyro_em.fitting.session import Session
from pyro_em.plan.fit_wishes import FitWishes
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.portable import StaysHere
from pyro_em.tracing.leaves import leaves_of, replaced
from pyro_em.tracing.parameters import restore, snapshot, write_unconstrained
from pyro_em.tracing.scopes import Keeper, StoreState, own_store, store_state
from pyro_em.tracing.sites import latents_in, users

EMPTY: Mapping[str, Mapping[str, Any]] = {"params": {}, "constraints": {}}

BROKEN = (EMStatus.DEGENERATE, EMStatus.UNBOUNDED)

Data = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Again(StaysHere):
    """What a fit was: enough to make it again.

    Attributes:
        request: What the user asked for.
        num_particles: Draws from the guide per step.
        args: The model's positional arguments.
        kwargs: Its keyword arguments.
        wishes: The keywords of the fit.
    """

    request: Request
    num_particles: int
    args: tuple
    kwargs: dict[str, Any]
    wishes: FitWishes

    @contextmanager
    def at(self, params: Mapping[str, Tensor], where: str) -> Iterator[Fitted]:
        """A block in which the model has these parameters; afterwards all is as it was.

        Args:
            params: Constrained values by name.
            where: The public method, for messages.

        Raises:
            UsageError: If a guide draws latents, or the data come in parts.
        """
        keeper = Keeper([self.request.model, self.request.guide])
        try:
            with own_store(EMPTY):
                session = Session(self.request, self.num_particles)
                found = session.look(self.args, self.kwargs)
                if not isinstance(found, Program):
                    raise UsageError(_drawn(where))
                for name, parameter in session.parameters.items():
                    write_unconstrained(parameter, params[name])
                found = session.look(self.args, self.kwargs)
                assert isinstance(found, Program)
                yield Fitted(self, session, found, store_state())
        finally:
            keeper.restore()


@dataclass(frozen=True, eq=False)
class Fitted:
    """A model at its fitted parameters, inside the block of `Again.at`.

    Attributes:
        again: What the fit was.
        session: Reads the model.
        program: The model with the data of the fit.
        store: The param store with the fitted values.
    """

    again: Again
    session: Session
    program: Program
    store: StoreState

    def fit(self, data: Data, num_restarts: int, seed: int) -> EMResult:
        """A fit to other data, which begins at the fitted parameters and leaves them as they are.

        Args:
            data: The model's arguments.
            num_restarts: Number of starts, the first at the fitted parameters.
            seed: Seed of the others.

        Raises:
            PyroEMError: If the fit fails, or ends at a degenerate or unbounded point.
        """
        wishes = replace(
            self.again.wishes,
            num_restarts=num_restarts,
            init=None,
            seed=seed,
            progress=False,
            callbacks=(),
            checkpoint=None,
        )
        own = Session(self.again.request, self.again.num_particles)
        own.planner = self._planner()
        before = snapshot(self.session.parameters)
        try:
            with own_store(self.store), warnings.catch_warnings():
                warnings.simplefilter("ignore", PyroEMWarning)  # a failed fit is counted
                result = fit(own, wishes, *data)
        finally:
            restore(self.session.parameters, before)
        if result.status in BROKEN:
            raise PyroEMError(result.message)
        return result

    def _planner(self) -> Planner:
        """A planner that knows what has been found out: the guide that was built, readings."""
        planner = Planner(self.again.request)
        planner.known = self.session.planner.known
        planner.readings = self.session.planner.readings
        return planner

    def parametric(self, seed: int, where: str) -> Data:
        """New data from the model, of the size and with the gaps of those of the fit.

        Args:
            seed: Seed of the draws.
            where: The public method, for messages.

        Raises:
            UsageError: If the model does not say all of its data.
        """
        with own_store(self.store):
            new = self._source.drawn_whole(seed)
        if new.unwritten:
            shown = ", ".join(f"'{n}'" for n in new.unwritten[:3])
            raise UsageError(
                message(
                    where,
                    f"what sites {shown} observe is no part of an argument.",
                    "new data take the place of the arguments that the model observes",
                    [
                        "observe the argument itself, obs=x, or a part of it, obs=x[t]",
                        "pass it as it is observed: x.float() before the call",
                        "ask for parametric=False: rows are drawn from the data",
                    ],
                )
            )
        old = leaves_of(self.again.args, self.again.kwargs)
        gaps = {}
        for path, value in leaves_of(new.args, new.kwargs).items():
            if isinstance(value, Tensor) and value.is_floating_point() and path in old:
                gaps[path] = value.masked_fill(torch.isnan(old[path]), torch.nan)
        return replaced(new.args, new.kwargs, gaps)

    @cached_property
    def points(self) -> dict[str, Tensor]:
        """Values of latents at point estimates."""
        if self.again.request.guide is None:
            return {}
        return points_of(self.program, self.again.args, self.again.kwargs)

    @cached_property
    def _source(self) -> Source:
        model, points = users(self.again.request.model), self.points
        data = (self.again.args, self.again.kwargs)
        return Source.of(model, None, *data, lambda *_: points, "bootstrap")

    def resampling(self, where: str) -> Callable[[int], Data]:
        """Gives, for a seed, rows of the data drawn with replacement.

        Args:
            where: The public method, for messages.

        Raises:
            UsageError: If the rows are no independent parts of the data.
        """
        again, model = self.again, users(self.again.request.model)
        sites = run(model, again.args, again.kwargs)
        rows = rows_of(model, again.args, again.kwargs, where, sites)
        shared = [
            name
            for name, site in latents_in({n: dict(s) for n, s in sites.items()}).items()
            if name not in self.points
            and all(frame.name != rows.plate for frame in site["cond_indep_stack"])
        ]
        if rows.plate is None or shared:
            what = (
                "the data are one series, whose steps follow each other."
                if rows.plate is None
                else f"rows share the latent '{shared[0]}', and are not independent."
            )
            raise UsageError(
                message(
                    where,
                    what,
                    "rows are drawn with replacement as if each were a datum of its own",
                    ["ask for parametric=True: new data are drawn from the model"],
                )
            )

        def drawn(seed: int) -> Data:
            generator = torch.Generator().manual_seed(seed)
            chosen = torch.randint(rows.size, (rows.size,), generator=generator)
            return rows.taken(again.args, again.kwargs, chosen)

        return drawn


def _drawn(where: str) -> str:
    return message(
        where,
        "a guide draws latents of this model.",
        "every data set takes a fit to its end, whose log evidence is known",
        ["see the guide's scales for the spread of latents, em.predictive(x) for that of data"],
    )
