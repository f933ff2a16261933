"""Vectors seen in part, below Gaussian latents of their rows, that are read some rows at a time."""

from __future__ import annotations

from collections.abc import Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.graph.many_rows import slices
from pyro_em.plan.kept import forget_readings

N = 180
GENERATOR = torch.Generator().manual_seed(5)
W = torch.randn(4, 2, generator=GENERATOR, dtype=torch.float64)
X = torch.randn(N, 2, generator=GENERATOR, dtype=torch.float64) @ W.T + 3
X += torch.randn(N, 4, generator=GENERATOR, dtype=torch.float64)
HOLES = torch.rand(N, 4, generator=GENERATOR) < 0.2


def factors(x: Tensor) -> None:
    m, start = pyro.param("m", torch.zeros(4).double()), W + 0.3
    w, s = pyro.param("w", start), pyro.param("s", torch.ones(4).double(), C.positive)
    with pyro.plate("n", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, torch.ones(2).double()).to_event(1))
        pyro.sample("x", dist.Normal(h @ w.T + m, s).to_event(1), obs=x)


@pytest.fixture
def by_rows(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Sixty rows at a time, however few there are."""
    with monkeypatch.context() as patch:
        patch.setattr(slices, "GAUSSIAN_ROWS", 2)
        patch.setattr(slices, "_CELLS", 60)
        yield patch


def some(which: slice) -> Tensor:
    holes = torch.zeros_like(HOLES)
    holes[which] = HOLES[which]
    return X.masked_fill(holes, torch.nan)


@pytest.mark.parametrize(
    ("x", "parted"),
    [
        (some(slice(0, N)), True),
        (some(slice(0, 60)), False),  # other slices are of another form
        (X.masked_fill((torch.arange(N) == 100).unsqueeze(-1), torch.nan), False),
    ],
    ids=["everywhere", "one slice", "one row"],
)
def test_rows_with_gaps_are_read_some_at_a_time(
    x: Tensor, parted: bool, by_rows: pytest.MonkeyPatch
) -> None:
    found = []
    for is_cut in (True, False):
        if not is_cut:
            by_rows.undo()
        pyro.clear_param_store()
        forget_readings()
        em = ExactPosteriorEM(factors, missing="nan")
        result = em.fit(x, max_steps=3, tol=0.0, progress=False)
        program = em._session.program
        found.append((result, program.graph.parted, program.graph.missing))
    (cut, place, gaps), (whole, none, all_gaps) = found
    assert (place == "n") is parted and not none
    assert gaps == all_gaps and gaps[0].entries == int(x.isnan().sum())
    assert list(cut.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(cut.params[name], value, rtol=1e-10, atol=1e-12)
