"""Means of coordinates without noise: what EM cannot move, in words.

Given a coordinate h = A(θ) x without noise, the posterior holds h = A(θ) x at the present θ with
certainty, so that any other θ has a density of zero: EM stays where it is, however wrong that is.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_em.errors import DegenerateError, message
from pyro_em.graph.factors import FactorGraph, Group
from pyro_em.updates.expectations.gaussian_rows import is_matrix, tril_rows

_FIXES = (
    "write the state so that it stands where there is noise: of an autoregression [[φ₁, φ₂], [1, 0]] "
    "with φ in the first row",
    "give that coordinate a noise of its own",
    "hold the parameter: updates={'name': Fixed()}",
)


def noiseless_in_words(graph: FactorGraph, name: str, values: Mapping[str, Tensor]) -> str | None:
    """The sentence on a parameter in the mean of a coordinate without noise; None where it is in none.

    Args:
        graph: The factor graph.
        name: The parameter.
        values: Constrained values by name.
    """
    sites = (s for g in graph.groups for s in (g.nested.groups if g.nested is not None else (g,)))
    for group in sites:
        if name not in group.mean_params or "scale" not in group.arguments:
            continue
        scale = group.evaluate_arguments(values)["scale"]
        if bool((scale == 0).any()):
            return message(
                f"parameter '{name}'",
                f"it enters the mean of '{group.members[0]}', which has coordinates without noise; "
                "nothing was changed.",
                "given the data such a coordinate is what the present value says, so that EM cannot "
                "move it",
                _FIXES,
            )
    return None


def precision_of(group: Group, arguments: Mapping[str, Tensor]) -> Tensor:
    """The inverse of the covariance of a multivariate Normal. # (cells or 1, rows or 1, D, D)

    Raises:
        DegenerateError: If it has none.
    """
    assert is_matrix(group)
    tril = tril_rows(group, arguments)
    if bool((tril.diagonal(dim1=-2, dim2=-1) == 0).any()):
        raise DegenerateError(
            message(
                f"site '{group.members[0]}'",
                "its covariance is singular, and parameters are to be found in it.",
                "a multivariate Normal without noise in some direction has no density",
                [
                    "where noises are independent, write so: dist.Normal(loc, scale).to_event(1), "
                    "or scale_tril=torch.diag(scale), whose scale may be zero somewhere",
                    "write the noise that several coordinates share as a latent of its own",
                    "give all directions a small noise",
                ],
            )
        )
    return torch.cholesky_inverse(tril)
