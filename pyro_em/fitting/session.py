"""What `ExactPosteriorEM` keeps between two calls: one reading of the model, and what was fitted."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from pyro_em.errors import UsageError, message, warn
from pyro_em.fitting.forgetting import LastData
from pyro_em.fitting.origins import FirstSeen, Origin
from pyro_em.fitting.preconditions import (
    refuse_a_loader,
    refuse_inside_a_model,
    refuse_unfittable,
    refuse_untrainable,
)
from pyro_em.fitting.results.history import EMStep
from pyro_em.graph.failing.blame import given_arguments
from pyro_em.graph.findings.readable import refuse_without_numbers
from pyro_em.graph.structure import form_of
from pyro_em.plan.planner import Planner
from pyro_em.plan.program import Program
from pyro_em.plan.request import Request
from pyro_em.plan.unrouted import Unrouted
from pyro_em.plan.wishes import check_model_keywords
from pyro_em.tracing import checkpoint
from pyro_em.tracing.missing import WithMissing, has_missing
from pyro_em.tracing.parameters import TracedParameter
from pyro_em.tracing.runs import without_state
from pyro_em.tracing.sites import users
from pyro_em.tracing.stored import is_stored
from pyro_em.updates.m_step import MStepState
from pyro_em.variational.bound import Variational
from pyro_em.variational.trainer import Trainer
from pyro_em.variational.training import Training


class Session:
    """All that the methods of one `ExactPosteriorEM` remember.

    Args:
        request: What the user gave.
        num_particles: Draws from the guide per step.

    Attributes:
        planner: Reads the model.
        program: The last exact reading.
        m_step_state: What lasts from one M-step to the next.
        trainer: Stochastic steps on the last pair; what lasts between them lives on in the next one
            while parameters are the same.
        parameters: All parameters, as the last reading found them.
        total_steps: Steps over all fits.
        pending: What was read from a file before the model had been run.
        first: Parameters as they were first seen.
        last_data: The data that were learnt from last.
        tensors_given: What arrays and tables of the last calls were read as, by argument.
        running: The sums of `pyro_em.fitting.partial`, as a file holds them.
    """

    def __init__(self, request: Request, num_particles: int) -> None:
        self.request = request
        self.planner = Planner(request)
        self.num_particles = num_particles
        self.first = FirstSeen()
        self.tensors_given: dict[str, Tensor] = {}
        self._begin()

    def _begin(self) -> None:
        self.program: Program | None = None
        self.m_step_state = MStepState()
        self.trainer: Trainer | None = None
        self.parameters: dict[str, TracedParameter] = {}
        self.total_steps = 0
        self.pending: dict[str, Any] | None = None
        self.last_data = LastData()
        self.running: dict[str, Any] = {}
        self._training: dict[str, Any] = {}  # of a file, until there are optimisers
        self._form: Any = None

    # ------------------------------------------------------------------ reading

    def look(
        self, args: tuple, kwargs: dict[str, Any], *, look_only: bool = False
    ) -> Program | Variational:
        """Read the model on these data.

        Args:
            args: The model's positional arguments.
            kwargs: Its keyword arguments.
            look_only: Whether only an E-step is wanted.

        Raises:
            PyroEMError: If a latent has no route, or the model or data cannot be used.
        """
        self.check_arguments(args, kwargs)
        return self._noted(self.planner.look(args, kwargs, look_only=look_only))

    def look_at_routes(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> Program | Variational | Unrouted:
        """As ``look``; where a latent has no route it is a finding, not an exception."""
        self.check_arguments(args, kwargs)
        found = self.planner.look_at_routes(args, kwargs)
        return found if isinstance(found, Unrouted) else self._noted(found)

    def look_at_gaps(self, args: tuple, kwargs: dict[str, Any]) -> Program | Variational:
        """As ``look`` for an E-step; NaN in observed values means missing, whatever the user asked for.

        Raises:
            PyroEMError: If a latent has no route, or the model or data cannot be used.
        """
        if has_missing(self.request.model):
            return self.look(args, kwargs, look_only=True)
        self.check_arguments(args, kwargs)
        planner = Planner(replace(self.request, model=WithMissing(self.request.model)))
        planner.known = self.planner.known
        found = planner.look(args, kwargs, look_only=True)
        if not self.parameters:
            parameters = found.graph.parameters if isinstance(found, Program) else found.parameters
            self.parameters = dict(parameters)
            self.first.note(self.parameters)
        self._restore_pending()
        return found

    def ready(self, args: tuple, kwargs: dict[str, Any]) -> Program | Trainer:
        """As ``look``, and refuse what has nothing to fit."""
        refuse_without_numbers(given_arguments(self.request.model, args, kwargs))
        form = _without_rows(form_of(args, kwargs))
        if self.trainer is not None and form == self._form and is_stored(self.parameters):
            return self.trainer  # batches of one form have the same routes
        found = self.look(args, kwargs)
        if isinstance(found, Variational):
            self._form = form
            return self._trainer_of(found)
        refuse_unfittable(found, self.request.guide is not None)
        for note in found.notes:
            warn(note)
        return found

    def check_arguments(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse what no method can use, before the model is run."""
        refuse_a_loader(args, kwargs)
        check_model_keywords(self.request.model, kwargs)
        refuse_inside_a_model()
        self.first.before_a_run()

    def _noted(self, found: Program | Variational) -> Program | Variational:
        """Take note of the parameters that a look found."""
        if isinstance(found, Program):
            self.parameters = dict(found.graph.parameters)
            self.program = found
        else:
            self.parameters = found.parameters
        self.first.note(self.parameters)
        self._restore_pending()
        return found

    def _trainer_of(self, variational: Variational) -> Trainer:
        """Stochastic steps on a pair; optimisers live on while parameters are the same."""
        refuse_untrainable(variational, self.request.updates_for(variational.parameters))
        if self.trainer is None:
            for note in variational.notes:
                warn(note)
            training = Training(self.planner.saved_name)
            training.restore(self._training)
            self._training = {}
        else:
            training = self.trainer.training
        request = self.request
        self.trainer = Trainer(
            variational, request.optim, request.updates_for, training, self.num_particles
        )
        return self.trainer

    # ------------------------------------------------------------------ fitting

    def origin(self, found: Program | Trainer, held: Collection[str]) -> Origin:
        """Where a fit begins; from now on the values are its own.

        Args:
            found: What is fitted.
            held: What the param store held before it was read.
        """
        seen = found.structure if isinstance(found, Program) else found.variational
        given = {n: p.given for n, p in seen.parameters.items()}
        return self.first.origin(self.parameters, given, held)

    def counted(self, steps: Iterator[EMStep]) -> Generator[EMStep, None, None]:
        """The same steps, each counted before it is passed on."""
        for step in steps:
            self.total_steps += 1
            yield step

    # ------------------------------------------------------------------ keeping

    def given(self) -> dict[str, Any]:
        """What the constructor of `ExactPosteriorEM` was given, by name."""
        request = self.request
        return {
            "model": users(request.model),
            "guide": request.guide,
            "optim": without_state(request.optim),
            "strategy": request.strategy,
            "updates": dict(request.updates),
            "num_particles": self.num_particles,
            "max_plate_nesting": request.max_plate_nesting,
            "max_enumeration": request.max_enumeration,
            "missing": "nan" if has_missing(request.model) else None,
        }

    def fitted(self) -> dict[str, Any] | None:
        """What was fitted: parameters, optimisers, buffers; None if there is nothing yet."""
        if not self.parameters:
            return self.pending
        extra: dict[str, Any] = {"total_steps": self.total_steps}
        if self.trainer is not None:
            extra["training"] = self.trainer.training.state()
        elif self._training:  # loaded, and not continued yet
            extra["training"] = self._training
        if self.running:
            extra["running"] = self.running
        extra["buffers"] = checkpoint.copied_buffers(self.roots())
        return checkpoint.pack(self._by_saved_name(), extra)

    def save(self, path: str | Path) -> None:
        """Write what was fitted to a file.

        Raises:
            UsageError: If the model has not been run yet, or a parameter is not finite.
            FileError: If the file cannot be written.
        """
        state = self.fitted() if self.parameters else None
        if state is None:
            raise UsageError(
                message(
                    "save",
                    "the model has not been run yet, so that its parameters are unknown.",
                    fixes=["call fit, step or plan first"],
                )
            )
        checkpoint.write(path, state)

    def load(self, path: str | Path, args: tuple, kwargs: dict[str, Any]) -> None:
        """Read a file; it is checked against the model where that has been run or is run now.

        Raises:
            UsageError: If the file cannot be used, or not for this model.
            FileError: If it cannot be read.
        """
        state = checkpoint.read(path)
        if args or kwargs:
            self.look(args, kwargs, look_only=True)
        self.pending = state
        if self.parameters:
            self._restore_pending()

    def reset(self) -> None:
        """Forget what was fitted, and the guide that was built."""
        built = self.planner.forget()
        self.first.put_back(self.parameters, built)
        self._begin()

    def _restore_pending(self) -> None:
        """Write what ``load`` read before the model had been run."""
        if self.pending is None:
            return
        state, self.pending = self.pending, None
        self.first.loaded(self.parameters)
        checkpoint.restore(state, self._by_saved_name())
        checkpoint.restore_buffers(state, self.roots())
        self.total_steps = int(state["total_steps"])
        self.trainer, self._training = None, dict(state.get("training", {}))
        self.running = dict(state.get("running", {}))

    def roots(self) -> tuple[Any, Any]:
        """The user's model and the guide, whose modules have buffers."""
        return users(self.request.model), self.planner.guide_now

    @contextmanager
    def buffers_kept(self) -> Iterator[None]:
        """A block of runs after which statistics that modules keep of their data are as before."""
        kept = checkpoint.copied_buffers(self.roots())
        try:
            yield
        finally:
            checkpoint.restore_buffers({"buffers": kept}, self.roots())

    def _by_saved_name(self) -> dict[str, TracedParameter]:
        return {self.planner.saved_name(n): p for n, p in self.parameters.items()}


def _without_rows(form: Any) -> Any:
    """What batches of one kind of data share: everything but the number of rows."""
    parts, names = form
    return tuple((*p[:2], p[2][1:]) if isinstance(p, tuple) else p for p in parts), names
