"""Steps through tables of some rows at a time: those of one table of all rows, and what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import DataError, ExactPosteriorEM
from pyro_em.fitting.steps.point import SumsPoint
from pyro_em.plan.kept import forget_readings
from pyro_em.posteriors.continuous import table_rows

K, N = 3, 60


@contextmanager
def parted(cells: int) -> Iterator[None]:
    """Go through tables in parts of so many cells, however few rows there are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "_MANY", 0)
        patch.setattr(table_rows, "_CELLS", cells)
        yield


def _positive(name: str, start: Tensor) -> Tensor:
    return pyro.param(name, start.double(), constraint=C.positive)


def _weights() -> Tensor:
    return pyro.param("p", (torch.ones(K) / K).double(), constraint=C.simplex)


def students(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-4.0, 0.0, 5.0]).double())
    s, nu = _positive("s", torch.ones(K)), _positive("nu", torch.full((K,), 4.0))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(_weights()))
        w = pyro.sample("w", dist.Gamma(nu[z] / 2, nu[z] / 2))
        pyro.sample("x", dist.Normal(mu[z], s[z] * w.rsqrt()), obs=x)


def rates(x: Tensor) -> None:
    a, b = _positive("a", torch.tensor([1.0, 4.0, 9.0])), _positive("b", torch.ones(K))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(_weights()))
        rate = pyro.sample("rate", dist.Gamma(a[z], b[z]))
        pyro.sample("x", dist.Poisson(rate), obs=x.abs().round())


def repeated(x: Tensor) -> None:
    """Several measurements of each row, some of them hidden."""
    mu, s = pyro.param("mu", torch.tensor([-4.0, 0.0, 5.0]).double()), _positive("s", torch.ones(K))
    x = x.reshape(-1, 4)
    with pyro.plate("n", len(x), dim=-2):
        z = pyro.sample("z", dist.Categorical(_weights()))
        with pyro.plate("j", 4, dim=-1), pyro.poutine.mask(mask=x < 6):
            pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, generator=generator).double() * 1.5
    return x + torch.tensor([-4.0, 0.0, 5.0]).double()[torch.arange(N) % K]


def fitted(model: Callable[..., None], x: Tensor) -> Any:
    pyro.clear_param_store()
    forget_readings()
    return ExactPosteriorEM(model).fit(x, max_steps=5, tol=0.0, progress=False)


@pytest.mark.parametrize("model", [students, rates, repeated], ids=lambda m: m.__name__)
def test_parts_say_together_what_one_table_says(
    model: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(model, data())
    handed: list[SumsPoint] = []
    monkeypatch.setattr(SumsPoint, "judged", lambda at: handed.append(at))
    assert "chunks" not in str(whole.plan)
    with parted(K * 7):  # which divides no number of rows here
        some = fitted(model, data())
    assert "in chunks of rows" in str(some.plan) and not handed
    assert list(some.history) == pytest.approx(list(whole.history), rel=1e-12)
    for name, value in whole.params.items():
        torch.testing.assert_close(some.params[name], value, rtol=1e-9, atol=1e-12)


def test_the_evidence_is_that_of_student_distributions() -> None:
    x = data()
    with parted(K * 7):
        result = fitted(students, x)
    p = {n: v.detach().numpy() for n, v in result.params.items()}
    density = sum(
        p["p"][k] * stats.t.pdf(x.numpy(), p["nu"][k], p["mu"][k], p["s"][k]) for k in range(K)
    )
    assert result.log_evidence == pytest.approx(np.log(density).sum(), rel=1e-12)


def test_an_impossible_row_is_named_by_its_number_among_all() -> None:
    x = data()
    x[41] = 1e200
    with parted(K * 7), pytest.raises(DataError, match="n = 41"):
        fitted(students, x)
