"""The log evidence of many rows: as written out, without a table of all rows; errors name the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from scipy.special import logsumexp
from torch import Tensor
from torch.distributions import constraints as C
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_em import DataError, ExactPosteriorEM
from pyro_em.plan.kept import forget_readings
from pyro_em.posteriors import table_evidence
from pyro_em.posteriors.continuous import table_rows

K, N = 32, 2**16


class Largest(TorchDispatchMode):
    """How many numbers the largest tensor has that something computes; views are no numbers."""

    cells = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor):
            self.cells = max(self.cells, out.untyped_storage().nbytes() // out.element_size())
        return out


def normals(x: Tensor) -> None:
    p = pyro.param("p", (torch.ones(K) / K).double(), constraint=C.simplex)
    mu = pyro.param("mu", torch.linspace(-8, 8, K).double())
    s = pyro.param("s", torch.ones(K).double(), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def _written_out(x: Tensor) -> float:
    p, mu, s = (pyro.param(n).detach().numpy() for n in ("p", "mu", "s"))
    joint = np.log(p) + stats.norm(mu, s).logpdf(x.numpy()[:, None])
    return float(logsumexp(joint, 1).sum())


@pytest.mark.parametrize("fitted", [False, True])
def test_no_table_of_all_rows_is_made_for_one_number(fitted: bool) -> None:
    x = 4 * torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    em = ExactPosteriorEM(normals)
    if fitted:
        em.fit(x, max_steps=1, tol=0, progress=False)
    with Largest() as found:
        score = em.score(x)
    assert found.cells < N * K // 4
    assert score == pytest.approx(_written_out(x), rel=1e-12)


def weighted(x: Tensor, w: Tensor, seen: Tensor) -> None:
    with pyro.poutine.scale(scale=w), pyro.poutine.mask(mask=seen):
        normals(x)


def two_latents(x: Tensor, *_: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([[-3.0, 0.0], [1.0, 4.0]]).double())
    with pyro.plate("n", len(x)):
        a = pyro.sample("a", dist.Bernoulli(0.3)).long()
        b = pyro.sample("b", dist.Categorical(torch.tensor([0.6, 0.4]).double()[a[..., None] * 0]))
        pyro.sample("x", dist.Laplace(mu[a, b], 1.0), obs=x)


@pytest.mark.parametrize("model", [weighted, two_latents])
@pytest.mark.parametrize("fitted", [False, True])
def test_parts_add_up_to_the_table_of_all_rows(
    model: Callable[..., None], fitted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = torch.Generator().manual_seed(2)
    x = 2 * torch.randn(50, generator=rng, dtype=torch.float64)
    w, seen = 1 + torch.rand(50, generator=rng).double(), torch.rand(50, generator=rng) < 0.7
    em = ExactPosteriorEM(model)
    if fitted:
        em.fit(x, w, seen, max_steps=1, tol=0, progress=False)
    whole = em.score(x, w, seen)
    parts: list[float] = []
    own = table_evidence.log_evidence_of
    monkeypatch.setattr(table_evidence, "_FEW", 0)
    monkeypatch.setattr(table_evidence, "_CELLS", 40)
    monkeypatch.setattr(table_rows, "_MANY", 0)

    def noted(*args: Any) -> float:
        parts.append(own(*args))
        return parts[-1]

    monkeypatch.setattr(table_evidence, "log_evidence_of", noted)
    forget_readings()  # a run that was laid out before is asked as a whole
    again = em.score(x.clone(), w.clone(), seen.clone())
    assert len(parts) > 1
    assert again == pytest.approx(whole, rel=1e-12)


def test_an_impossible_row_has_its_number_among_all() -> None:
    def uniforms(x: Tensor) -> None:
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K).double()))
            low = torch.linspace(0, 1, K).double()
            pyro.sample("x", dist.Uniform(low[z], 3.0, validate_args=False), obs=x)

    x = torch.full((N,), 2.0).double()
    x[N - 5] = 4.0
    with pytest.raises(DataError, match=str(N - 5)):
        ExactPosteriorEM(uniforms).score(x)
