"""Rows of numbers as tensors, and sequences of rows as padded ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_em.arguments import as_tensor, shown
from pyro_em.errors import DataError, UsageError, message


def as_rows(X: np.ndarray) -> Tensor:
    """The rows as a tensor of their precision; memory is shared where it may be written. # (N, D)"""
    return torch.from_numpy(X if X.flags.writeable and X.flags.aligned else X.copy())


def as_dict(name: str, value: Any, example: str) -> dict[str, Any]:
    """Keywords by name, none where None.

    Raises:
        UsageError: If it is no mapping.
    """
    if value is not None and not isinstance(value, Mapping):
        raise UsageError(
            message(
                "LatentModel",
                f"{name}={shown(value)} is no dict.",
                "they are keyword arguments by name",
                [f"pass {name}=dict({example})"],
            )
        )
    return dict(value or {})


def given(name: str, value: Any, otherwise: Tensor, shape: tuple[int, ...]) -> Tensor:
    """What the user gave for a parameter's start, in the precision of what it replaces.

    Args:
        name: Of the argument.
        value: Numbers, or None.
        otherwise: What to start at where it is None.
        shape: What they have to be.

    Raises:
        UsageError: If their shape is another, or they are not finite.
    """
    if value is None:
        return otherwise
    numbers = as_tensor(name, value).to(otherwise)
    if tuple(numbers.shape) != shape or not bool(numbers.isfinite().all()):
        raise UsageError(
            message(
                name,
                f"numbers of shape {tuple(numbers.shape)} were given.",
                f"finite ones of shape {shape} are needed",
                ["pass what the fitted estimator shows in the attribute of that name"],
            )
        )
    return numbers.clone()


def probabilities(name: str, values: Tensor) -> Tensor:
    """The same numbers, where they are probabilities. # (*, K)

    Raises:
        UsageError: If one is negative, or they do not sum to one.
    """
    sums = values.sum(-1)
    if bool((values < 0).any()) or not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
        raise UsageError(
            message(
                name,
                "these are no probabilities.",
                "they are at least zero and sum to one",
                ["divide them by their sum: w / w.sum(-1, keepdims=True)"],
            )
        )
    return values / sums.unsqueeze(-1)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows that stand one below the other, as sequences of unequal length.

    Attributes:
        lengths: Rows of each. # (B,)
        inside: Which steps of the padded sequences are rows. # (B, T)
    """

    lengths: Tensor
    inside: Tensor

    @classmethod
    def of(cls, num_rows: int, lengths: Any) -> Sequences:
        """Check lengths as hmmlearn takes them.

        Args:
            num_rows: Rows in all.
            lengths: Rows of each sequence, in their order; one sequence where None.

        Raises:
            UsageError: If they are no positive whole numbers.
            DataError: If they do not add up to the number of rows.
        """
        given = np.asarray([num_rows] if lengths is None else lengths)
        if given.ndim != 1 or not np.issubdtype(given.dtype, np.integer) or (given < 1).any():
            raise UsageError(
                message(
                    "lengths",
                    f"{lengths!r} are no lengths of sequences.",
                    "each sequence has a whole number of rows, at least one",
                    ["pass lengths=[60, 40]", "leave it out: all rows are one sequence"],
                )
            )
        if int(given.sum()) != num_rows:
            raise DataError(
                message(
                    "lengths",
                    f"the sequences have {int(given.sum())} rows together, X has {num_rows}.",
                    "the rows of one sequence come after those of the one before",
                    ["pass the number of rows of each sequence, in their order"],
                )
            )
        rows = torch.as_tensor(given.astype(np.int64))
        return cls(rows, torch.arange(int(given.max())) < rows.unsqueeze(-1))

    @property
    def are_equal(self) -> bool:
        """Whether all have the same length, so that there is nothing to mask."""
        return bool(self.inside.all())

    def padded(self, rows: Tensor) -> Tensor:
        """Sequences side by side; steps beyond an end repeat its last row. # (N, D) -> (B, T, D)"""
        B, T = self.inside.shape
        ends = self.lengths.cumsum(0)
        steps = torch.arange(T).expand(B, T).minimum(self.lengths.unsqueeze(-1) - 1)
        return rows[(ends - self.lengths).unsqueeze(-1) + steps]

    def rows(self, steps: Tensor) -> Tensor:
        """One answer per row, in the order of the rows. # (B, T, *rest) -> (N, *rest)"""
        return steps[self.inside]
