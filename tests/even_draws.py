"""Normal draws that are spread evenly: averages of few come as near as those of many at random."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.quasirandom import SobolEngine


@contextmanager
def even_draws(scalars: int) -> Iterator[None]:
    """Standard normals of torch's distributions come of a scrambled Sobol sequence.

    Each run of a guide takes the next point of the sequence, whatever is drawn in it: draws are
    identically distributed, and so are errors of the thing under test, which no average hides.

    Not for models of which something is summed: these run twice with one state of torch's generator,
    and expect the same draws.

    Args:
        scalars: How many standard normals each run draws: the dimension of the points.
    """
    engine = SobolEngine(scalars, scramble=True, seed=0)
    waiting: list[Tensor] = []

    def draw(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        n = shape.numel()
        while sum(map(len, waiting)) < n:
            points = engine.draw(64, dtype=torch.float64).clamp(1e-9, 1 - 1e-9)
            waiting.append(torch.special.ndtri(points).reshape(-1))
        flat = torch.cat(waiting)
        waiting[:] = [flat[n:]]
        return flat[:n].reshape(shape).to(dtype=dtype, device=device)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.distributions.normal._standard_normal", draw)
        yield
