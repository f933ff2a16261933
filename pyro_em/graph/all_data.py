"""What is known of all of the data where a graph holds a part of them.

Some numbers belong to all rows together: about which point squares are taken so that they do not
cancel, how large the data of a spread are, which elements of a parameter any row reads. A graph of all
data finds them by itself; a graph of a part is told.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Centre:
    """Where the data of a site lie.

    Attributes:
        mean: Their mean. # (D,)
        low: The smallest of each feature. # (D,)
        high: The largest. # (D,)
    """

    mean: Tensor
    low: Tensor
    high: Tensor

    @property
    def reach2(self) -> Tensor:
        """The largest square of each feature about the mean. # (D,)"""
        return torch.maximum(self.high - self.mean, self.mean - self.low).square()


@dataclass(frozen=True, eq=False)
class Vectors:
    """What rows that are all alike say of a multivariate normal: their number, mean and scatter.

    Attributes:
        rows: n.
        mean: x̄ of all observed entries of a row. # (D,)
        scatter: Σ (x − x̄)(x − x̄)ᵀ. # (D, D)
    """

    rows: int
    mean: Tensor
    scatter: Tensor


@dataclass(frozen=True, eq=False)
class AllData:
    """Numbers of all data; see the module's text.

    Attributes:
        rows: Elements of the outermost plate.
        centres: By the first site of a group.
        magnitudes: By parameter; see `pyro_em.updates.expectations.scatter.data_magnitude`.
        read: By parameter which of its events any factor reads. # (events,)
        largest: The largest count of a site, by the first of a group.
        vectors: Of all rows, where they are alike and Gaussian latents are integrated; else None.
    """

    rows: int
    centres: Mapping[str, Centre] = field(default_factory=dict)
    magnitudes: Mapping[str, Tensor] = field(default_factory=dict)
    read: Mapping[str, Tensor] = field(default_factory=dict)
    vectors: Vectors | None = None
    largest: Mapping[str, int] = field(default_factory=dict)
