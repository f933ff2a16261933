"""All parameters as one vector of real numbers, in which EM steps are extrapolated."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em.fitting.steps.point import Values
from pyro_em.plan.program import Program


class Unconstrained:
    """All parameters as one vector of real numbers, in the memory of the processor.

    Args:
        program: The model with its data.
        like: Values, for their shapes, dtypes and devices; a parameter that has not moved from them
            keeps its digits.
    """

    def __init__(self, program: Program, like: Values) -> None:
        self.program, self.like = program, like
        self._vector_of_like = self.vector(like)

    def vector(self, values: Values) -> Tensor:
        """From constrained values."""
        parts = []
        for name, value in values.items():
            constraint = self.program.graph.parameters[name].constraint
            inverse = transform_to(constraint).inv(value.to(torch.float64))
            parts.append(inverse.reshape(-1).cpu())
        return torch.cat(parts)

    def values(self, vector: Tensor) -> dict[str, Tensor]:
        """Back from a vector."""
        out, begin = {}, 0
        for name, value in self.like.items():
            transform = transform_to(self.program.graph.parameters[name].constraint)
            shape = transform.inverse_shape(value.shape)
            end = begin + math.prod(shape)
            part = vector[begin:end]
            if torch.equal(part, self._vector_of_like[begin:end]):
                out[name] = value
            else:
                out[name] = transform(part.reshape(shape).to(value.device)).to(value.dtype)
            begin = end
        return out
