"""EM steps on sums over the data.

The parameters are plain values here; nothing is written until somebody can look. Whatever is out of
the ordinary raises `Handover`: `pyro_em.fitting.steps.guarded` then takes a step through tables.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_em.densities.theta import Theta
from pyro_em.errors import Handover, UsageError
from pyro_em.fitting.steps.parted import Parted
from pyro_em.fitting.steps.point import Point, TracedPoint, Values, no_posterior
from pyro_em.plan.evaluation import Evaluation
from pyro_em.plan.program import Program
from pyro_em.posteriors.answers.posterior import Posterior
from pyro_em.posteriors.quick import EMSteps, SumsBlock
from pyro_em.tracing.freed import keep_freed_memory, return_freed_memory
from pyro_em.tracing.parameters import values_of
from pyro_em.tracing.turns import Alone
from pyro_em.updates.expectations.statistics import Expectation


class SumsPoint(Point):
    """A point whose E-step kept sums alone: tables are made when somebody asks for them.

    Args:
        program: The model with its data.
        block: What made the E-step.
        at: The parameters, in the form of the E-step.
        expectation: The E-step.
        log_prior: Of point estimates, in nats.
        values: All parameters by name, where they are known, and nobody writes them.
        how: How the data are parted, in words; None where all are at hand.
    """

    def __init__(
        self,
        program: Program,
        block: EMSteps,
        at: Any,
        expectation: Expectation,
        log_prior: float,
        values: Values | None = None,
        how: str | None = None,
    ) -> None:
        self.program, self.block, self.at, self.how = program, block, at, how
        self.expectation = expectation
        self.log_prior = log_prior
        self.log_evidence = expectation.log_evidence  # E-steps on sums are exact
        self.objective = expectation.log_evidence + log_prior
        self.massless = {}
        self.noise = expectation.noise
        if values is not None:
            self.values = dict(values)

    @cached_property
    def expectation(self) -> Expectation:
        """The E-step; it is made again where it has been let go."""
        with torch.inference_mode():
            return self.block.e_step(self.at)

    def forget_rows(self) -> None:
        """Let go of an E-step that holds numbers of each row, once an M-step has read them.

        The next E-step has as many, and nobody is likely to ask for these again.
        """
        vars(self).pop("expectation", None)

    @cached_property
    def values(self) -> dict[str, Tensor]:
        """All parameters by name."""
        return self.block.theta.values(self.at)

    def judged(self) -> TracedPoint:
        """The same with tables, whose objective differs by rounding, on the data as they are."""
        evaluation = self.program.evaluate(self.values)
        q = self.program.posterior(evaluation)
        return TracedPoint(self.values, evaluation, q, self.massless)

    @cached_property
    def evaluation(self) -> Evaluation:  # type: ignore[override]
        """The factors at the values."""
        self.program.require_unchanged("posterior")
        with Alone("posterior"):
            return self.program.evaluate(self.values)

    @cached_property
    def q(self) -> Posterior:  # type: ignore[override]
        """The E-step there.

        Raises:
            UsageError: If the data come in parts.
        """
        if self.how is not None:
            raise UsageError(no_posterior(self.how))
        if "evaluation" in vars(self):
            return self.program.posterior(self.evaluation)
        self.program.require_unchanged("posterior")
        with Alone("posterior"):
            return self.program.posterior_at(self.values)


class OnSums:
    """EM steps of a block of latents that needs sums alone.

    Args:
        program: The model with its data.
        block: The latents, with their E-step and the parameters' M-step.
        data: The parts of the data; None where all are at hand.
    """

    _holds_many: bool  # whether its E-steps hold numbers of each of many rows
    _has_prior: bool  # whether a parameter may have one

    def __init__(self, program: Program, block: EMSteps, data: Parted | None = None) -> None:
        self.program, self.block, self.data = program, block, data
        self._holds_many = False
        theta = block.theta
        self._has_prior = not isinstance(theta, Theta) or theta.has_prior

    @torch.inference_mode()
    def e_step(self, values: Values | None = None, index: int = 0) -> SumsPoint:
        """See `pyro_em.fitting.steps.em_map.EMMap.e_step`; nothing is written.

        Raises:
            Handover: If an E-step through tables has to look.
        """
        theta = self.block.theta
        if values is None:
            with torch.inference_mode(False):
                values = values_of(self.program.graph.parameters)
        try:
            at = theta.enter(values)
            expectation = self.expectation(at)
            self._holds_many = expectation.holds_many
        except torch.linalg.LinAlgError as error:
            raise Handover from error
        log_prior = theta.log_prior(at) if self._has_prior else 0.0
        return self.point(at, expectation, log_prior, values)

    def _alike(self, at: Any) -> Any:
        """The same parameters in all processes, where there are several."""
        if self.data is None or not self.data.has_others:
            return at
        if not self.data.is_known:
            return self.data.over.alike(at)
        # What the kernel holds beside parameters follows from them.
        theta = self.block.theta
        return theta.enter(self.data.over.alike(theta.values(at)))

    def expectation(self, at: Any) -> Expectation:
        """Sums over all data."""
        if self.data is None or self.data.is_known:
            return self.block.e_step(at)
        values = self.block.theta.values(at)
        return self.data.over.sum(lambda part: part.expectation(values))

    def point(
        self, at: Any, expectation: Expectation, log_prior: float, values: Values | None = None
    ) -> SumsPoint:
        """A point with its E-step."""
        how = None if self.data is None else self.data.how
        return SumsPoint(self.program, self.block, at, expectation, log_prior, values, how)

    def m_step(self, at: Point) -> tuple[Values, float]:
        """See `pyro_em.fitting.steps.em_map.EMMap.m_step`; nothing is written.

        Raises:
            Handover: If an M-step through tables has to look.
        """
        assert isinstance(at, SumsPoint)
        try:
            with torch.inference_mode():
                after, gain = self.block.theta.m_step(at.at, at.expectation)
                if self._holds_many:
                    at.forget_rows()
        except torch.linalg.LinAlgError as error:
            raise Handover from error
        # Outside, since tensors that are made in inference mode must not reach anybody.
        values = self.block.theta.values(after)
        return values if self.data is None else self.data.over.alike(values), at.objective + gain

    @torch.inference_mode()
    def step(self, at: Point, index: int = 0) -> tuple[SumsPoint, float]:
        """See `pyro_em.fitting.steps.em_map.EMMap.step`; nothing is written.

        Raises:
            Handover: If a step through tables has to look.
        """
        assert isinstance(at, SumsPoint)
        theta = self.block.theta
        try:
            after, gain = theta.m_step(at.at, at.expectation)
            if self._holds_many:
                at.forget_rows()
            after = self._alike(after)
            expectation = self.expectation(after)
        except torch.linalg.LinAlgError as error:
            raise Handover from error
        log_prior = theta.log_prior(after) if self._has_prior else 0.0
        return self.point(after, expectation, log_prior), at.objective + gain


def on_sums(program: Program, data: Parted | None = None) -> OnSums | None:
    """The quick map of a program, or None where it has none; the plan says why.

    Args:
        program: The model with its data.
        data: The parts of the data; None where all are at hand.
    """
    data_of_groups = [group.value for group in program.graph.groups]
    return_freed_memory(data_of_groups)
    block = program.kernel.block
    if block is None or (data is not None and not data.is_quick):
        return None
    return_freed_memory(data_of_groups)  # left by its making
    keep_freed_memory()
    return OnSums(
        program, block.steps(block.theta) if isinstance(block, SumsBlock) else block, data
    )
