"""Generalised linear models on the kernels: every step is that through tables, and that of numpy."""

from __future__ import annotations

import gc
import weakref
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

from pyro_em import ExactPosteriorEM, PyroEMWarning, vectorized_markov
from pyro_em.densities import affine_rows, dispersed, predicted
from pyro_em.densities.affine_rows import by_row, of_rows
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from pyro_em.updates.regressions.designs import designs_of

N = 36
RNG = np.random.default_rng(4)
X = torch.tensor(np.column_stack([np.ones(N), RNG.normal(size=(N, 2))]))
SIGN = np.where(np.arange(N) % 2, 1.2, -1.0)
BITS = torch.tensor((RNG.random(N) < 1 / (1 + np.exp(-SIGN * X[:, 1].numpy()))).astype(float))
TRIALS = torch.tensor(RNG.integers(3, 9, N).astype(float))
WINS = torch.tensor(RNG.binomial(TRIALS.numpy().astype(int), 0.4).astype(float))
EVENTS = torch.tensor(RNG.poisson(np.exp(0.3 + 0.5 * SIGN * X[:, 1].numpy())).astype(float))
WAITS = torch.tensor(RNG.exponential(size=N))
WORDS = torch.tensor(RNG.integers(0, 3, N))
REAL = torch.tensor(SIGN + 0.6 * RNG.normal(size=N))
W = torch.tensor(RNG.normal(size=(2, 3)) * 0.3)
V = torch.tensor(RNG.normal(size=(2, 3, 3)) * 0.3)
MASK = torch.arange(N) % 5 != 0
SPREAD = torch.tensor(RNG.poisson(RNG.gamma(0.8, np.exp(1 + 0.5 * SIGN))).astype(float))


def line(w: Tensor, x: Tensor) -> Tensor:
    return (x * w).sum(-1)


Emission = Callable[[Any, Tensor, slice], Any]


def bernoulli(z: Any, x: Tensor, own: Any) -> Any:
    return dist.Bernoulli(logits=line(pyro.param("w", W)[z], x))


def tied(z: Any, x: Tensor, own: Any) -> Any:
    """One slope for all components, an offset, and a number of trials for each row."""
    b, w = pyro.param("b", W[:, 0]), pyro.param("w", W[0, :2])
    probs = torch.sigmoid(b[z] + line(w, x[..., 1:]) + 0.3 * x[..., 2])
    return dist.Binomial(TRIALS[own], probs=probs)


def poisson(z: Any, x: Tensor, own: Any) -> Any:
    return dist.Poisson(TRIALS[own] * line(pyro.param("w", W)[z], x).exp())


def waits(z: Any, x: Tensor, own: Any) -> Any:
    return dist.Exponential(line(pyro.param("w", W)[z], x).exp())


def words(z: Any, x: Tensor, own: Any) -> Any:
    V0 = pyro.param("V", V)[z]
    return dist.Categorical(logits=(V0 * x.unsqueeze(-2)).sum(-1))


def reference(z: Any, x: Tensor, own: Any) -> Any:
    eta = x @ pyro.param("V", V[0, :, :2])
    return dist.Categorical(logits=torch.cat([eta, torch.zeros_like(eta[..., :1])], -1))


def shapes() -> Tensor:
    return pyro.param("a", torch.tensor([2.0, 1.0]).double(), constraint=C.positive)


def gamma(z: Any, x: Tensor, own: Any) -> Any:
    a = shapes()[z]
    return dist.Gamma(a, a * (-line(pyro.param("w", W)[z], x)).exp())


def counted(z: Any, x: Tensor, own: Any) -> Any:
    a = shapes()
    eta = line(pyro.param("w", W)[z], x) + 0.1 * TRIALS[own]
    return dist.NegativeBinomial(a[z], logits=eta - a.log()[z])


def mixed_rates(z: Any, x: Tensor, own: Any) -> Any:
    a = pyro.param("a", torch.tensor(1.5).double(), constraint=C.positive)  # one for all
    return dist.GammaPoisson(a, a / line(pyro.param("w", W)[z], x).exp())


def known_shape(z: Any, x: Tensor, own: Any) -> Any:
    return dist.NegativeBinomial(2.5, logits=line(pyro.param("w", W)[z], x))


CASES: dict[str, tuple[Emission, Tensor]] = {
    "bernoulli": (bernoulli, BITS),
    "tied": (tied, WINS),
    "poisson": (poisson, EVENTS),
    "waits": (waits, WAITS),
    "words": (words, WORDS),
    "reference": (reference, WORDS),
    "gamma": (gamma, WAITS),
    "counted": (counted, SPREAD),
    "mixed rates": (mixed_rates, SPREAD),
    "known shape": (known_shape, EVENTS),
}


def rows(name: str, n: int = N, dtype: torch.dtype = torch.float64) -> None:
    emission, y = CASES[name]
    own = slice(0, n)
    p = pyro.param("p", torch.tensor([0.4, 0.6], dtype=dtype), constraint=C.simplex)
    with pyro.plate("n", n):
        z = pyro.sample("z", dist.Categorical(p))
        pyro.sample(
            "r", dist.Normal(pyro.param("m", torch.tensor([-1.0, 1.0]))[z], 0.8), obs=REAL[own]
        )
        pyro.sample("y", emission(z, X[own], own), obs=y[own])


def chain(name: str) -> None:
    """Emissions of a hidden Markov model, some of them masked."""
    emission, y = CASES[name]
    A = pyro.param("A", torch.tensor([[0.6, 0.4], [0.3, 0.7]]).double(), constraint=C.simplex)
    z: Any = None
    for t in vectorized_markov("t", N, dim=-1):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        with pyro.poutine.mask(mask=MASK[t]):
            pyro.sample(f"y_{t}", emission(z, X[t], t), obs=y[t])


def experts() -> None:
    """A gate that reads covariates, beside regressions; sample weights."""
    V0, w = pyro.param("V", V[0, :, :2]), pyro.param("w", W)
    s = pyro.param("s", torch.tensor([0.8, 1.1]).double(), constraint=C.positive)
    with pyro.plate("n", N), pyro.poutine.scale(scale=TRIALS):
        z = pyro.sample("z", dist.Categorical(logits=X @ V0))
        pyro.sample("y", dist.Normal(line(w[z], X), s[z]), obs=REAL)


def fit(model: Callable[[], None], monkeypatch: pytest.MonkeyPatch, quick: bool) -> Any:
    with monkeypatch.context() as patch, pyro.get_param_store().scope():
        if not quick:
            patch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        return ExactPosteriorEM(model).fit(max_steps=4, tol=0, progress=False)


@pytest.mark.parametrize(
    ("model", "kernel"),
    [
        *((partial(rows, name), "mixture") for name in CASES),
        *((partial(chain, name), "chain") for name in ("bernoulli", "poisson", "words", "gamma")),
        (experts, "mixture"),
    ],
)
def test_every_step_is_that_through_tables(
    model: Any, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (predicted, dispersed):
        monkeypatch.setattr(module, "CELLS", 2**8)  # several chunks of rows
    a, b = fit(model, monkeypatch, True), fit(model, monkeypatch, False)
    assert a.plan.kernel == kernel
    assert list(a.history) == pytest.approx(list(b.history), rel=1e-10)
    assert list(a.history.after_m_step) == pytest.approx(list(b.history.after_m_step), rel=1e-10)
    for name, value in b.params.items():
        torch.testing.assert_close(a.params[name], value, rtol=1e-7, atol=1e-8)


def test_data_that_separate_are_said_by_the_kernel_too() -> None:
    def model() -> None:
        w = pyro.param("w", 0.1 * W[:, :2])
        with pyro.plate("n", N):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5]).double()))
            pyro.sample(
                "y", dist.Bernoulli(logits=line(w[z], X[:, :2])), obs=(X[:, 1] > 0.1).double()
            )

    with pytest.warns(PyroEMWarning, match="parameter 'w'.*runs off") as told:
        result = ExactPosteriorEM(model).fit(max_steps=4, tol=0)
    assert len(told) == 1 and float(result.log_evidence) > -1e-6


def test_against_the_joint_table() -> None:
    check_block(Mixture, partial(rows, "poisson", n=6))
    check_block(Mixture, partial(rows, "gamma", n=8))


@pytest.mark.parametrize("known", [False, True])
def test_a_gate_of_two_values_is_that_of_two_logits(known: bool) -> None:
    """A Bernoulli latent has one predictor where a Categorical one has a row, with one that is zero."""

    def model(x: Tensor, how: str) -> None:
        w = pyro.param("w", W[0])
        m = pyro.param("m", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", N):
            eta = x @ w + (x[:, 0] if known else 0.0)
            if how == "two":
                z = pyro.sample("z", dist.Categorical(logits=torch.stack([0 * x[:, 0], eta], -1)))
            elif how == "probs":
                z = pyro.sample("z", dist.Bernoulli(probs=eta.sigmoid())).long()
            else:
                z = pyro.sample("z", dist.Bernoulli(logits=eta)).long()
            pyro.sample("y", dist.Normal(m[z], 1.0), obs=REAL)

    paths = []
    for how in ("tables", "one", "two", "probs"):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        if how == "tables":
            history = [-em.step(X, "one") for _ in range(4)]
            paths.append((history, pyro.param("w").detach().clone()))
            continue
        result = em.fit(X, how, max_steps=4, tol=0, progress=False)
        assert result.plan.kernel == "mixture"
        paths.append((list(result.history)[:4], result.params["w"]))
    for history, w in paths[1:]:
        np.testing.assert_allclose(history, paths[0][0], rtol=1e-10)
        torch.testing.assert_close(w, paths[0][1], rtol=1e-6, atol=1e-7)


def test_covariates_beside_a_dispersion_are_no_copy():
    """A block of coefficients and a dispersion has a design for each, of which one is all zeros."""
    x = torch.randn(6, 1, 3, dtype=torch.float64).expand(6, 2, 3)
    own = torch.arange(6).reshape(1, 2, 3).expand(6, 2, 3)
    binding = Binding(
        "affine",
        constant=torch.zeros(6, 2, dtype=torch.float64),
        jacobians={"w": Jacobian(x, own, 6), "a": Jacobian.of(x.new_zeros(6, 2, 2))},
        params=("w", "a"),
    )
    found = designs_of(binding, ("w", "a"), {"w": x.new_zeros(6), "a": x.new_zeros(2)}, 1)
    assert [columns.tolist() for columns, _ in found] == [[0, 1, 2], [3, 4, 5]]
    assert all(torch.equal(part, x[:, 0]) for _, part in found)
    assert all(part.data_ptr() == x.data_ptr() for _, part in found)


def test_statistics_of_rows_are_put_in_their_place_part_by_part(monkeypatch):
    """No two parts of the rows are held beside the whole."""
    made, make = [], predicted._of_some_rows

    def watched(*args):
        gc.collect()
        assert not any(ref() is not None for refs in made[:-1] for ref in refs)
        found = make(*args)
        made.append([weakref.ref(t) for t in found])
        return found

    x = torch.randn(40, 3, dtype=torch.float64)
    y = torch.poisson(x.exp().mean(-1))

    def model():
        w = pyro.param("w", W)
        with pyro.plate("rows", len(y)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=torch.float64) / 2))
            pyro.sample("y", dist.Poisson(line(w[z], x).exp()), obs=y)

    def evidence():
        pyro.clear_param_store()
        return ExactPosteriorEM(model).fit(max_steps=2, tol=0, progress=False).log_evidence

    before = evidence()
    monkeypatch.setattr(predicted, "_ROWS", 16)
    monkeypatch.setattr(predicted, "_of_some_rows", watched)
    assert evidence() == before
    assert len(made) >= 3


def test_many_covariates_of_single_precision_stay_where_they_lie(monkeypatch):
    x = torch.randn(9, 2)
    monkeypatch.setattr(affine_rows, "_MANY", 4)
    laid = by_row(x, torch.Size([9]), (9,), as_given=True)
    assert laid.data_ptr() == x.data_ptr()
    some = of_rows(laid, slice(2, 5))
    assert some.dtype == torch.float64 and torch.equal(some, x[2:5].T.double())
    assert some.is_contiguous()
