"""Regressions with Normal priors on the kernels: every step is that through tables."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, vectorized_markov
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel

N = 36
I = np.arange(N)
X = torch.tensor(np.stack([np.ones(N), np.sin(1.7 * I), np.cos(0.9 * I + 1)], 1))
LINE = np.where(I % 2, 1.2, -1.0) * np.sin(1.7 * I) + 0.3
REAL = torch.tensor(LINE + 0.6 * np.sin(5.3 * I))
BITS = (REAL > 0.2).double()
EVENTS = torch.tensor(np.floor(np.exp(LINE) * np.array([0.1, 4.9, 0.3, 2.6, 0.0])[I % 5]))
COVARIANCE = torch.tensor(np.eye(3) * 0.8 + 0.3)


def normal(*shape: int) -> Tensor:
    return pyro.sample("w", dist.Normal(torch.full(shape, 0.1).double(), 0.8).to_event(len(shape)))


def vectors() -> Tensor:
    with pyro.plate("k", 2):
        return pyro.sample("w", dist.MultivariateNormal(torch.zeros(3).double(), COVARIANCE))


def positive(name: str, value: list[float]) -> Tensor:
    return pyro.param(name, torch.tensor(value).double(), constraint=C.positive)


def line(w: Tensor, x: Tensor) -> Tensor:
    return (x * w).sum(-1)


def both(w: Any, z: Any, x: Tensor) -> Any:
    S = pyro.param("S", 0.5 * torch.eye(2).double(), constraint=C.positive_definite)
    return dist.MultivariateNormal((x.unsqueeze(-1) * w[z]).sum(-2), S)


def counted(w: Any, z: Any, x: Tensor) -> Any:
    a = positive("a", [1.0, 2.0])
    return dist.NegativeBinomial(a[z], logits=line(w[z], x) - a[z].log())


Emission = Callable[[Any, Any, Tensor], Any]
CASES: dict[str, tuple[Callable[[], Tensor], Emission, Tensor]] = {
    "lines": (
        vectors,
        lambda w, z, x: dist.Normal(line(w[z], x), positive("s", [0.5, 0.8])[z]),
        REAL,
    ),
    "vectors": (partial(normal, 2, 3, 2), both, torch.stack([REAL, REAL.flip(0)], -1)),
    "logits": (vectors, lambda w, z, x: dist.Bernoulli(logits=line(w[z], x)), BITS),
    "counted": (partial(normal, 2, 3), counted, EVENTS),
}


def rows(name: str, x: Tensor = X, y: Tensor | None = None) -> None:
    weights, emission, own = CASES[name]
    y = own if y is None else y
    w = weights()
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6]).double()))
        pyro.sample("y", emission(w, z, x), obs=y)


def chain() -> None:
    A = pyro.param("A", torch.tensor([[0.6, 0.4], [0.3, 0.7]]).double(), constraint=C.simplex)
    w = vectors()
    z: Any = None
    for t in vectorized_markov("t", N, dim=-1):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        pyro.sample(f"y_{t}", dist.Poisson(line(w[z], X[t]).exp()), obs=EVENTS[t])


def start(site: Any) -> Tensor:
    shape = site["fn"].shape()
    return 0.3 * torch.arange(1.0, shape.numel() + 1).double().sin().reshape(shape)


def fit(model: Any, *arguments: Any) -> Any:
    with pyro.get_param_store().scope():
        em = ExactPosteriorEM(
            model,
            pyro.infer.autoguide.AutoDelta(
                pyro.poutine.block(model, expose=["w"]), init_loc_fn=start
            ),
        )
        return em.fit(*arguments, max_steps=2, tol=0, progress=False)


@pytest.mark.parametrize("name", [*CASES, "chain"])
def test_every_step_is_that_through_tables(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = chain if name == "chain" else partial(rows, name)
    quick = fit(model)
    assert quick.plan.kernel == ("chain" if name == "chain" else "mixture")
    with monkeypatch.context() as patch:
        patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        slow = fit(model)
    for a, b in (
        (quick.history, slow.history),
        (quick.history.after_m_step, slow.history.after_m_step),
    ):
        assert list(a) == pytest.approx(list(b), rel=1e-10)
    assert float(quick.elbo) == pytest.approx(float(slow.elbo), rel=1e-10)
    for n, value in slow.params.items():
        torch.testing.assert_close(quick.params[n], value, rtol=1e-7, atol=1e-8)


def test_a_prior_counts_once_however_many_chunks() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        rows("lines", x, y)

    whole, parts = fit(model, X, REAL), fit(model, Chunks(X, REAL, rows=10))
    assert list(parts.history) == pytest.approx(list(whole.history), rel=1e-10)
