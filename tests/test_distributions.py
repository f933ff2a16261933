"""What arguments have to satisfy, seen in a few operations: as torch's own checks judge."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import constraints

from pyro_em.distributions import satisfies


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_matrices_are_positive_definite_where_torch_says_so(size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(size)
    found = []
    for k in range(120):
        root = torch.randn(size, size, generator=generator, dtype=torch.float64)
        matrix = root @ root.mT + 0.3 * (k % 4 - 1) * torch.eye(size, dtype=torch.float64)
        if k % 7 == 0:
            matrix[0, -1] += 1e-3
        if k % 11 == 0:
            matrix[0, 0] = torch.nan
        if k % 13 == 0:
            matrix[-1, -1] = torch.inf
        if k % 17 == 0:
            matrix = root[:, :1] @ root[:, :1].mT
        matrices = matrix.to(dtype).repeat(1 + k % 2, 1, 1)
        right = bool(constraints.positive_definite.check(matrices).all())
        assert satisfies(constraints.positive_definite, matrices) == right
        found.append(right)
    assert 20 < sum(found) < 110
