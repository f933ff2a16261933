"""What kernels of chains share: groups that read a step's state, and the sequences each by itself."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property

from torch import Tensor

from pyro_em.densities.density import NormalRows
from pyro_em.posteriors.block import Values
from pyro_em.posteriors.chains.per_sequence import PerSequence
from pyro_em.posteriors.chains.step_groups import StepGroups
from pyro_em.posteriors.quick import QuickBlock
from pyro_em.updates.expectations.statistics import Expectation


class SequenceBlock(QuickBlock):
    """A kernel of a chain's sequences.

    Attributes:
        of_steps: Groups that read the state of one step or none.
        B: Sequences.
    """

    of_steps: StepGroups
    B: int

    @property
    def normals(self) -> Mapping[int, NormalRows]:  # type: ignore[override]
        """Normal groups that are evaluated by matrix products."""
        return self.of_steps.normals

    @cached_property
    def per_sequence(self) -> PerSequence | None:
        """The same sequence by sequence; None where the contraction has to serve."""
        return PerSequence.of(self.component.graph)

    @property
    def dims(self) -> tuple[str, ...]:
        """The plates of the sequences in which everything lies."""
        return super().dims if self.per_sequence is None else self.per_sequence.dims

    def table(self, values: Values) -> Tensor:
        """The log evidence per sequence, in nats. # (*plates,)"""
        found = None if self.per_sequence is None else self.per_sequence.table(values)
        return super().table(values) if found is None else found

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        """Evidence and sums at parameter values; see `pyro_em.posteriors.block.Block`."""
        found = None
        if weights is not None and self.per_sequence is not None:
            found = self.per_sequence.expect(values, weights)
        return super().expect(values, weights) if found is None else found
