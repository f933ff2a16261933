"""The loss of a climb, computed once at each point.

A climb asks several times for the loss where it is: as a value to compare with, for its slope, for its
curvature. Each time the user's model would run. What was found is kept until a variable is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyro_em.errors import PyroEMError


class KeptLoss:
    """A loss at the present values of its variables.

    Args:
        variables: What the loss is a function of; a write that torch counts makes it another.
        function: The loss there, differentiable.
        curved: Whether second derivatives will be asked for, so that the graph outlives a gradient.

    Example:
        >>> x, runs = torch.tensor(3.0, requires_grad=True), []
        >>> loss = KeptLoss([x], lambda: (runs.append(1), x * x)[1], curved=False)
        >>> loss.value_with_graph(), float(loss.gradients()[0]), len(runs)
        (9.0, 6.0, 1)
        >>> with torch.no_grad():
        ...     _ = x.add_(1.0)
        >>> loss.value(), len(runs)
        (16.0, 2)
    """

    def __init__(
        self, variables: Sequence[Tensor], function: Callable[[], Tensor], curved: bool
    ) -> None:
        self._variables, self._function, self._curved = variables, function, curved
        self._at: tuple[int, ...] | None = None
        self._value = math.nan
        self._tensor: Tensor | None = None
        self._gradients: tuple[Tensor | None, ...] | None = None

    def _is_here(self) -> bool:
        return self._at == tuple(v._version for v in self._variables)

    def _keep(self, value: Tensor, with_graph: bool) -> None:
        self._value, self._tensor = float(value.detach()), value if with_graph else None
        self._gradients = None
        self._at = tuple(v._version for v in self._variables)

    def forget(self) -> None:
        """Hold nothing: the memory of one graph is free before another one is made."""
        self._at = self._tensor = self._gradients = None

    def tensor(self) -> Tensor:
        """The loss with its graph.

        Raises:
            PyroEMError: If the model cannot run here.
        """
        if not self._is_here() or self._tensor is None:
            self.forget()
            with torch.enable_grad():
                self._keep(self._function(), with_graph=True)
        assert self._tensor is not None
        return self._tensor

    def gradients(self) -> tuple[Tensor | None, ...]:
        """The slope in each variable; None where the loss does not depend on it.

        Raises:
            PyroEMError: If the model cannot run here.
        """
        if not self._is_here() or self._gradients is None:
            self._gradients = torch.autograd.grad(
                self.tensor(), self._variables, allow_unused=True, retain_graph=self._curved
            )
            if not self._curved:
                self._tensor = None
        return self._gradients

    def value(self) -> float:
        """The loss, or infinity where the model cannot run; without a graph."""
        if not self._is_here():
            self.forget()
            try:
                with torch.no_grad():
                    self._keep(self._function(), with_graph=False)
            except PyroEMError:
                return math.inf
        return self._value

    def value_with_graph(self) -> float:
        """The same, where derivatives will be asked for too."""
        if not self._is_here():
            try:
                self.tensor()
            except PyroEMError:
                return math.inf
        return self._value
