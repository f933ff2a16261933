"""Steps on sums against those through tables, one by one, and the kernels against plain numpy."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM, Fixed, UsageError
from pyro_em.densities.linear import linear
from pyro_em.densities.tying import collapsed
from pyro_em.errors import Handover
from pyro_em.families.forms import Kind
from pyro_em.families.registry import REGISTRY
from pyro_em.fitting.results.history import EMStatus, EMStep
from pyro_em.fitting.steps import guarded, verified_steps
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.fitting.steps.em_on_sums import on_sums
from pyro_em.plan import agreement, verification
from pyro_em.plan import program as programs
from pyro_em.plan.eligibility import Kernel
from pyro_em.plan.program import Program
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.messages import forward_backward
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.tracing import parameters
from pyro_em.tracing.parameters import values_of

Model = Callable[..., None]

# ---------------------------------------------------------------- models


def gaussian(x: Tensor, K: int, spread: str) -> None:
    D = x.shape[1]
    w = pyro.param("w", torch.arange(1.0, K + 1).to(x) / sum(range(1, K + 1)), constraint=C.simplex)
    mu = pyro.param("mu", x[:K].clone())
    shapes = {"diagonal": (K, D), "spherical": (K, 1), "tied diagonal": (D,), "one": ()}
    if spread in shapes:
        s = pyro.param("s", x.new_ones(shapes[spread]), constraint=C.positive)
    else:
        S = torch.cov(x.T).reshape(D, D)
        S = S if spread == "tied" else S.repeat(K, 1, 1)
        if spread == "tril":
            S = pyro.param("S", torch.linalg.cholesky(S), constraint=C.lower_cholesky)
        else:
            S = pyro.param("S", S, constraint=C.positive_definite)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        if spread in ("diagonal", "spherical"):
            pyro.sample("x", dist.Normal(mu[z], s[z]).to_event(1), obs=x)
        elif spread in shapes:
            pyro.sample("x", dist.Normal(mu[z], s).to_event(1), obs=x)
        elif spread == "tril":
            pyro.sample("x", dist.MultivariateNormal(mu[z], scale_tril=S[z]), obs=x)
        else:
            pyro.sample("x", dist.MultivariateNormal(mu[z], S if spread == "tied" else S[z]), obs=x)


def numbers(x: Tensor, K: int, family: str) -> None:
    """One number per datum."""
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    a = pyro.param("a", torch.linspace(0.5, 3, K), constraint=C.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        if family == "Normal":
            pyro.sample("x", dist.Normal(a[z] - 1, a[z] / 2), obs=x)
        elif family == "log scale":
            s = pyro.param("log_s", torch.zeros(K))
            pyro.sample("x", dist.Normal(a[z], s[z].exp()), obs=x)
        elif family == "Exponential":
            pyro.sample("x", dist.Exponential(a[z]), obs=x)
        else:
            pyro.sample("x", dist.Poisson(a[z]), obs=x)


def classes(x: Tensor, K: int, sites: bool, mask: Tensor | None = None) -> None:
    """Latent classes: one vector site, or a site per item, with missing answers."""
    J = x.shape[1]
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    start = (torch.arange(J * K).reshape(J, K) * 0.37 + 0.2) % 0.6 + 0.2
    p = pyro.param("p", start, constraint=C.unit_interval)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        if not sites:
            pyro.sample("x", dist.Bernoulli(p.T[z]).to_event(1), obs=x)
            return
        for j in range(J):
            with pyro.poutine.mask(mask=True if mask is None else mask[:, j]):
                pyro.sample(f"x{j}", dist.Bernoulli(p[j][z]), obs=x[:, j])


def mixed(x: Tensor, c: Tensor, K: int) -> None:
    """Two kinds of observation of one latent, one of them shared by no component."""
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    mu = pyro.param("mu", x[:K].clone())
    E = pyro.param("E", torch.rand(K, 4), constraint=C.simplex)
    b = pyro.param("b", torch.ones(4) / 4, constraint=C.simplex)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0).to_event(1), obs=x)
        pyro.sample("c", dist.Categorical(E[z]), obs=c)
        pyro.sample("d", dist.Categorical(b), obs=(c + 1) % 4)


def chain(x: Tensor, K: int, emission: str, mask: Tensor | None = None) -> None:
    """x: (T,), (B, T) or (B, T, D)."""
    pi = pyro.param("pi", torch.arange(1.0, K + 1) / sum(range(1, K + 1)), constraint=C.simplex)
    A = pyro.param("A", 0.5 * torch.eye(K) + torch.rand(K, K), constraint=C.simplex)
    if emission == "Categorical":
        E = pyro.param("E", torch.rand(K, 4), constraint=C.simplex)
    else:
        mu = pyro.param("mu", torch.linspace(-1, 1, K).unsqueeze(-1).repeat(1, x.shape[-1]))
        s = pyro.param("s", torch.ones(K, x.shape[-1]), constraint=C.positive)

    def steps(rows: Tensor, seen: Tensor | None) -> None:
        z = None
        for t in pyro.markov(range(len(rows))):
            with pyro.poutine.mask(mask=True if seen is None else seen[t]):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                if emission == "MultivariateNormal":
                    S = pyro.param(
                        "S", torch.eye(2).repeat(K, 1, 1), constraint=C.positive_definite
                    )
                    pyro.sample(f"x_{t}", dist.MultivariateNormal(mu[z], S[z]), obs=rows[t])
                elif emission == "Categorical":
                    pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=rows[t])
                else:
                    pyro.sample(f"x_{t}", dist.Normal(mu[z], s[z]).to_event(1), obs=rows[t])

    if x.dim() == 1:
        steps(x, None)
        return
    with pyro.plate("sequences", len(x), dim=-1):
        steps(x.transpose(0, 1), None if mask is None else mask.T)


def counts(x: Tensor, n: Tensor, K: int, family: str) -> None:
    """Simplex rows, probabilities and rates in all their forms."""
    w = pyro.param("w", torch.arange(1.0, K + 1) / sum(range(1, K + 1)), constraint=C.simplex)
    p = pyro.param("p", torch.linspace(0.2, 0.7, K), constraint=C.unit_interval)
    rows = torch.rand(K, 4) + 0.1
    E = pyro.param("E", rows / rows.sum(-1, keepdim=True), constraint=C.simplex)
    L = pyro.param("L", torch.randn(K, 4))
    rate = pyro.param("rate", torch.linspace(0.5, 3, K), constraint=C.positive)
    log_rate = pyro.param("log_rate", torch.linspace(-1, 1, K))
    known = torch.tensor(0.5)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        given = {
            "Binomial": lambda: dist.Binomial(n, p[z]),
            "Geometric": lambda: dist.Geometric(p[z]),
            "Geometric, logits": lambda: dist.Geometric(logits=log_rate[z]),
            "Bernoulli, one known": lambda: dist.Bernoulli(torch.cat([known.reshape(1), p[1:]])[z]),
            "Categorical": lambda: dist.Categorical(E[z]),
            "Categorical, logits": lambda: dist.Categorical(logits=L[z]),
            "Categorical, shared": lambda: dist.Categorical(E[(z > 0).long()]),
            "OneHotCategorical": lambda: dist.OneHotCategorical(E[z]),
            "Multinomial": lambda: dist.Multinomial(3, E[z], validate_args=False),
            "Poisson, log": lambda: dist.Poisson(log_rate[z].exp()),
            "Poisson, one known": lambda: dist.Poisson(torch.cat([known.reshape(1), rate[1:]])[z]),
            "Exponential": lambda: dist.Exponential(rate[z]),
        }
        value = {
            "Bernoulli, one known": (x > 1).to(x),
            "Categorical": x.long() % 4,
            "Categorical, logits": x.long() % 4,
            "Categorical, shared": x.long() % 4,
            "OneHotCategorical": torch.nn.functional.one_hot(x.long() % 4, 4).to(x),
            "Multinomial": 3 * torch.nn.functional.one_hot(x.long() % 4, 4).to(x),
            "Exponential": x + 0.5,
        }.get(family, x)
        pyro.sample("x", given[family](), obs=value)


COUNTS = (
    "Binomial", "Geometric", "Geometric, logits", "Bernoulli, one known", "Categorical",
    "Categorical, logits", "Categorical, shared", "OneHotCategorical", "Multinomial",
    "Poisson, log", "Poisson, one known", "Exponential",
)  # fmt: skip


def lines(X: Tensor, y: Tensor, K: int, how: str) -> None:
    """Regressions: own slopes, a shared slope, known or shared noise, an offset per component."""
    D = X.shape[1]
    w = pyro.param("w", torch.ones(K) / K, constraint=C.simplex)
    a = pyro.param("a", torch.linspace(-1, 1, K))
    b = pyro.param("b", torch.linspace(-1, 1, K * D).reshape(K, D))
    c = pyro.param("c", torch.zeros(D)) if how == "shared slope" else None
    shape = () if how == "shared noise" else (K,)
    s = pyro.param("s", torch.ones(shape), constraint=C.positive) if how != "known noise" else 0.7
    with pyro.plate("data", len(X)):
        z = pyro.sample("z", dist.Categorical(w))
        loc = a[z] + (X @ c if c is not None else (b[z] * X).sum(-1))
        if how == "offsets":
            loc = loc + torch.arange(float(K))[z]
        pyro.sample("y", dist.Normal(loc, s if isinstance(s, float) or not shape else s[z]), obs=y)


def switching(x: Tensor, K: int) -> None:
    """An autoregression whose line depends on a hidden regime. # x: (T,)"""
    A = pyro.param("A", 0.5 * torch.eye(K) + torch.rand(K, K), constraint=C.simplex)
    a = pyro.param("a", torch.linspace(-1, 1, K))
    b = pyro.param("b", torch.linspace(-0.5, 0.9, K))
    s = pyro.param("s", torch.ones(K), constraint=C.positive)
    z = None
    for t in pyro.markov(range(len(x) - 1)):
        z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(K) / K if z is None else A[z]))
        pyro.sample(f"x_{t}", dist.Normal(a[z] + b[z] * x[t], s[z]), obs=x[t + 1])


def points(N: int = 200, D: int = 2, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    noise = torch.randn(N, D, generator=g, dtype=torch.float64)
    return noise + 3 * torch.randint(0, 2, (N, 1), generator=g)


def symbols(*shape: int) -> Tensor:
    return torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))


LENGTHS = torch.tensor([9, 12, 5, 12])
CASES: dict[str, tuple[type, Model, tuple[Any, ...]]] = {
    **{
        f"Gaussian, {spread}": (Mixture, gaussian, (points(), 3, spread))
        for spread in (
            "full", "tied", "tril", "diagonal", "spherical", "tied diagonal", "one",
        )
    },
    "Gaussian, far from zero": (Mixture, gaussian, (points() + 1e4, 2, "full")),
    "Gaussian, narrow": (
        Mixture,
        gaussian,
        (torch.cat([points(50) * 1e-4, points(50) + 9]), 2, "full"),
    ),
    "Gaussian, 30 dimensions": (Mixture, gaussian, (points(300, 30), 2, "full")),
    "numbers, Normal": (Mixture, numbers, (points(60, 1)[:, 0].abs(), 2, "log scale")),
    "numbers, Exponential": (Mixture, numbers, (points(60, 1)[:, 0].abs(), 2, "Exponential")),
    "numbers, Poisson": (Mixture, numbers, (points(90, 1)[:, 0].abs().round(), 2, "Poisson")),
    "classes, one site": (Mixture, classes, ((points(300, 4) > 1).to(torch.float64), 2, False)),
    "classes, many sites": (Mixture, classes, ((points(300, 4) > 1).to(torch.float64), 2, True)),
    "classes, missing": (
        Mixture, classes, ((points(300, 4) > 1).to(torch.float64), 2, True, points(300, 4, 5) > 0.5),
    ),
    **{
        f"counts, {family}": (Mixture, counts, (symbols(80).double(), symbols(80) + 3.0, 3, family))
        for family in COUNTS
    },
    **{
        f"lines, {how}": (Mixture, lines, (points(90, 2, 3), points(90, 1, 4)[:, 0], 3, how))
        for how in ("own slopes", "shared slope", "shared noise", "known noise", "offsets")
    },
    "switching autoregression": (Chain, switching, (points(16, 1)[:, 0], 2)),
    "mixed": (Mixture, mixed, (points(), symbols(200), 3)),
    "chain, one": (Chain, chain, (symbols(20), 3, "Categorical")),
    "chain, short": (Chain, chain, (symbols(3), 2, "Categorical")),
    "chains": (Chain, chain, (symbols(4, 12), 3, "Categorical")),
    "chains, padded": (
        Chain, chain, (symbols(4, 12), 3, "Categorical", torch.arange(12) < LENGTHS[:, None]),
    ),
    "chains, Gaussian, padded": (
        Chain,
        chain,
        (points(48).reshape(4, 12, 2), 2, "Normal", torch.arange(12) < LENGTHS[:, None]),
    ),
    "chains, full covariances": (
        Chain, chain, (points(72).reshape(6, 12, 2), 2, "MultivariateNormal"),
    ),
    "chains, Gaussian": (Chain, chain, (points(48).reshape(4, 12, 2), 2, "Normal")),
}  # fmt: skip


def weighted(weight: Tensor | float, model: Model, *args: Any) -> None:
    with pyro.poutine.scale(scale=weight):
        model(*args)


def some_weights(N: int) -> Tensor:
    return torch.distributions.Exponential(1.0).sample((N,)) + 0.01


WEIGHTED: dict[str, tuple[Model, tuple[Any, ...], Any]] = {
    **{
        f"{case}, {kind}": (CASES[case][1], CASES[case][2], weight)
        for case in CASES
        if CASES[case][0] is Mixture and case != "mixed"
        for kind, weight in (("one number", 0.7), ("numbers", None))
    },
    "counts, repeated": (
        classes,
        ((points(300, 4) > 1).double(), 2, False),
        torch.arange(300) % 4 + 1.0,
    ),
}


@pytest.mark.parametrize("case", WEIGHTED)
def test_weights_count_like_repeated_rows(case: str) -> None:
    model, args, weight = WEIGHTED[case]
    given = some_weights(len(args[0])) if weight is None else weight
    steps_of(weighted, (given, model, *args), Mixture, steps=3)


@pytest.mark.parametrize("rows", [40, 3])
def test_a_scale_that_reads_the_latent_keeps_the_full_step(rows: int) -> None:
    """It tempers each component in its own way, also where there are as many rows as components."""

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 0.0, 1.0]).to(x))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            with pyro.poutine.scale(scale=torch.tensor([0.5, 1.0, 2.0])[z]):
                pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    with pytest.warns(match="tempers"):
        steps_of(model, (points(rows, 1)[:, 0],), None)


def test_weights_are_repeated_rows_in_a_compiled_fit() -> None:
    x, times = points(60), torch.arange(60) % 3 + 1
    found = []
    start = x.repeat_interleave(times, 0)
    for data in ((x, times.double()), (start, 1.0)):
        pyro.clear_param_store()

        def model(x: Tensor, weight: Tensor | float) -> None:
            mu = pyro.param("mu", start[:3].clone())
            S = pyro.param("S", torch.cov(start.T).repeat(3, 1, 1), constraint=C.positive_definite)
            with pyro.plate("data", len(x)), pyro.poutine.scale(scale=weight):
                z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
                pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)

        found.append(ExactPosteriorEM(model).fit(*data, max_steps=30, tol=0.0, progress=False))
    np.testing.assert_allclose(found[0].history, found[1].history, rtol=1e-10)


def steps_of(
    model: Model, args: tuple[Any, ...], kernel: type | None, steps: int = 4, guide: Any = None
) -> Any:
    """Both ways side by side from one start."""
    program = ExactPosteriorEM(model, guide)._ready(args, {})
    sound, em = ByTracing(program), on_sums(program)
    if kernel is None:
        assert em is None
        return None
    assert em is not None and isinstance(program.kernel.block, kernel)
    full, quick = sound.e_step(), em.e_step()
    for index in range(steps):
        full, bound = sound.step(full, index)
        quick, own = em.step(quick)
        assert own == pytest.approx(bound, rel=1e-10, abs=1e-10)
        assert quick.objective == pytest.approx(full.objective, rel=1e-9)
        for name, value in values_of(program.graph.parameters).items():
            torch.testing.assert_close(quick.values[name], value, rtol=1e-7, atol=1e-9)
    return em


@pytest.mark.parametrize("case", CASES)
def test_every_step_is_the_full_step(case: str) -> None:
    kernel, model, args = CASES[case]
    steps_of(model, args, kernel)


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    N=st.integers(20, 80),
    D=st.integers(1, 4),
    K=st.integers(2, 4),
    spread=st.sampled_from(["full", "tied", "diagonal", "spherical", "one"]),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 100.0]),
)
def test_random_mixtures(
    seed: int, N: int, D: int, K: int, spread: str, scale: float, shift: float
) -> None:
    pyro.clear_param_store()
    x = (points(N, D, seed) + shift) * scale
    with contextlib.suppress(Handover):  # near a collapse the full step decides
        steps_of(gaussian, (x, K, spread), Mixture, steps=2)


@settings(max_examples=20)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 4), T=st.integers(3, 12), K=st.integers(2, 4))
def test_random_chains(seed: int, B: int, T: int, K: int) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    x = torch.randint(0, 4, (B, T))
    mask = torch.arange(T) < torch.randint(2, T + 1, (B, 1))
    steps_of(chain, (x, K, "Categorical", mask), Chain, steps=2)


# ---------------------------------------------------------------- messages


def test_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_backward, "_HAS_NUMBA", False)
    for x in (symbols(20), symbols(30, 12)):
        pyro.clear_param_store()
        steps_of(chain, (x, 3, "Categorical"), Chain, steps=2)


# ---------------------------------------------------------------- fits


def both_fits(
    monkeypatch: pytest.MonkeyPatch, model: Model, *args: Any, guide: Any = None, **how: Any
) -> list[Any]:
    """The same fit by steps on sums and through tables."""
    out = []
    for compiled in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        if not compiled:
            monkeypatch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        out.append(ExactPosteriorEM(model, guide).fit(*args, progress=False, **how))
    return out


@pytest.mark.parametrize("case", ["Gaussian, full", "classes, missing", "chains, padded"])
def test_fits_are_the_same(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, args = CASES[case]
    quick, full = both_fits(monkeypatch, model, *args)
    assert quick.num_steps == full.num_steps and quick.status is full.status
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-10)
    np.testing.assert_allclose(quick.history.after_m_step, full.history.after_m_step, rtol=1e-10)
    assert quick.log_evidence == pytest.approx(full.log_evidence, rel=1e-12)
    assert quick.icl == pytest.approx(full.icl, rel=1e-9)
    assert quick.rate == pytest.approx(full.rate, rel=1e-3)
    for name in full.params:
        torch.testing.assert_close(quick.params[name], full.params[name], rtol=1e-7, atol=1e-9)
    site = next(iter(full.posterior.graph.latents))
    torch.testing.assert_close(quick.posterior.probs(site), full.posterior.probs(site))


def test_store_holds_the_result() -> None:
    x = points()
    result = ExactPosteriorEM(gaussian).fit(x, 2, "full", progress=False)
    for name, value in result.params.items():
        assert torch.equal(pyro.param(name), value)


def test_chunks_do_not_matter() -> None:
    x = points(500, 3)
    program = ExactPosteriorEM(gaussian)._ready((x, 3, "full"), {})
    block = program.kernel.block
    assert isinstance(block, Mixture)
    at = block.theta.enter(values_of(program.graph.parameters))
    whole = block.e_step(at)
    block.chunk = 37
    parts = block.e_step(at)
    assert parts.log_evidence == pytest.approx(whole.log_evidence, rel=1e-13)
    assert set(parts.sums) == set(whole.sums) and len(whole.sums) > 1
    for key, named in whole.sums.items():
        for name, total in named.items():
            torch.testing.assert_close(parts.sums[key][name], total, rtol=1e-9, atol=1e-9)


def test_repeated_rows_are_computed_once() -> None:
    x = (points(4000, 5) > 1).to(torch.float64)
    program = ExactPosteriorEM(classes)._ready((x, 2, False), {})
    em = on_sums(program)
    assert em is not None and isinstance(em.block, Mixture)
    assert len(x.unique(dim=0)) == em.block.N
    assert float(em.block.repeats.sum()) == 4000  # type: ignore[union-attr]


def test_a_collapse_is_named_as_by_the_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.cat([torch.zeros(1, 2), torch.randn(60, 2) + 8])
    with pytest.warns(Warning, match="collapses"):
        quick, full = both_fits(monkeypatch, gaussian, x, 2, "full", max_steps=200)
    assert quick.status is full.status is EMStatus.DEGENERATE
    assert quick.message.split(":")[0] == full.message.split(":")[0]
    assert "parameter 'S', component 0" in quick.message


def test_an_underflow_goes_to_the_full_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two emissions in a row that the only likely transition forbids by 800 nats."""

    def model(x: Tensor) -> None:
        stay = pyro.param("stay", torch.tensor([[1.0, 0.0], [0.0, 1.0]]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 60.0]))
        z = None
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2) / 2 if z is None else stay[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    x = torch.tensor([0.0, 0.0, 60.0, 60.0, 0.0])
    quick, full = both_fits(monkeypatch, model, x, max_steps=5, tol=0)
    np.testing.assert_allclose(quick.history, full.history, rtol=1e-12)


def test_data_changed_after_the_fit() -> None:
    x = points()
    result = ExactPosteriorEM(gaussian).fit(x, 2, "full", progress=False)
    x += 1
    with pytest.raises(UsageError, match="changed in place after the fit") as raised:
        _ = result.posterior
    assert "call em.posterior(data)" in str(raised.value)


def test_callbacks_see_every_step() -> None:
    """Whoever watches gets the same numbers."""
    x, seen = points(), []
    quiet = ExactPosteriorEM(gaussian).fit(x, 2, "full", progress=False)
    pyro.clear_param_store()
    watched = ExactPosteriorEM(gaussian).fit(x, 2, "full", progress=False, callbacks=seen.append)
    assert [s.elbo for s in seen] == pytest.approx(list(quiet.history), rel=1e-10)
    assert watched.num_steps == quiet.num_steps


@pytest.mark.parametrize("how", ["callbacks", "steps"])
@pytest.mark.parametrize("case", ["Gaussian, full", "chains, padded", "lines, own slopes"])
def test_who_watches_sees_compiled_steps(
    case: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters are in the store, the bounds and the posterior are those of the full path."""
    _, model, args = CASES[case]
    seen: list[tuple[EMStep, dict[str, Tensor], Tensor]] = []

    def look(step: EMStep) -> None:
        store = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
        assert step.posterior is not None
        seen.append((step, store, torch.as_tensor(step.posterior.entropy())))

    for full in (True, False):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = ExactPosteriorEM(model)
        if full:
            monkeypatch.setattr(programs, "kernel_of", lambda *a: Kernel("contraction"))
        else:
            monkeypatch.undo()
            monkeypatch.setattr(ByTracing, "step", None)  # no step through tables is made
        if how == "callbacks":
            em.fit(*args, max_steps=4, tol=0, progress=False, callbacks=[look])
        else:
            for step in itertools.islice(em.steps(*args), 4):
                look(step)
    for (a, ours, p), (b, theirs, q) in zip(seen[4:], seen[:4], strict=True):
        assert (a.index, a.elbo) == (b.index, pytest.approx(b.elbo, rel=1e-9))
        assert a.after_m_step == pytest.approx(b.after_m_step, rel=1e-9)
        assert a.log_evidence == a.elbo
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(a.params[name], ours[name])
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("how", ["callbacks", "steps"])
def test_a_parameter_that_a_watcher_changes_counts(how: str) -> None:
    """A known scale that is lowered between steps, as in annealing by hand."""

    def model(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(8.0), constraint=C.positive)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], s), obs=x)

    def lower(step: EMStep) -> None:
        with torch.no_grad():
            pyro.get_param_store()._params["s"].fill_(np.log(8.0 / (step.index + 2)))

    x = points(60, 1)[:, 0]
    em = ExactPosteriorEM(model, updates={"s": Fixed()})
    if how == "callbacks":
        em.fit(x, max_steps=3, tol=0, progress=False, callbacks=[lower])
    else:
        for step in itertools.islice(em.steps(x), 3):
            lower(step)
    mu = np.array([-1.0, 1.0])
    for s in (8.0, 8.0, 4.0):  # the next E-step is made before anyone can look
        r = np.exp(-0.5 * ((x.numpy()[:, None] - mu) / s) ** 2)
        r /= r.sum(1, keepdims=True)
        mu = (r * x.numpy()[:, None]).sum(0) / r.sum(0)
    np.testing.assert_allclose(pyro.param("mu").detach(), mu, rtol=1e-8)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda x: _own_covariates(x), id="own covariates"),
        pytest.param(lambda x: _tempered(x), id="a weight of the data alone"),
        pytest.param(lambda x: _tempered_chain(x), id="a weight of a chain's data alone"),
        pytest.param(
            lambda x: weighted(2.0, mixed, points(), symbols(200), 3), id="scaled sites of no component"
        ),
    ],
)  # fmt: skip
def test_what_has_no_kernel_keeps_the_full_step(model: Model) -> None:
    steps_of(model, (points(30, 1)[:, 0],), None)


def _own_covariates(x: Tensor) -> None:
    b = pyro.param("b", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample(
            "x", dist.Normal(b[z] * torch.stack([x, x**2])[z, torch.arange(len(x))], 1.0), obs=x
        )


def _tempered(x: Tensor) -> None:
    mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        with pyro.poutine.scale(scale=0.5):
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def _tempered_chain(x: Tensor) -> None:
    A = pyro.param("A", torch.full((2, 2), 0.5), constraint=C.simplex)
    z = 0
    for t in pyro.markov(range(5)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        with pyro.poutine.scale(scale=2.0):
            pyro.sample(f"x_{t}", dist.Normal(torch.tensor([-1.0, 1.0])[z], 1.0), obs=x[t])


# ---------------------------------------------------------------- where kernels could go wrong


def test_replicates_at_some_steps_are_not_one_per_step() -> None:
    """As many observations as steps, two at each second one."""

    def model(x: Tensor) -> None:
        r = pyro.param("r", torch.tensor([1.0, 3.0]), constraint=C.positive)
        A, z = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), None
        for t in pyro.markov(range(4)):
            p = torch.tensor([0.3, 0.7]) if z is None else A[z]
            z = pyro.sample(f"z{t}", dist.Categorical(p))
            if t % 2 == 0:
                for j in range(2):
                    pyro.sample(f"x{t}_{j}", dist.Poisson(r[z]), obs=x[t // 2, j])

    steps_of(model, (torch.tensor([[1.0, 4.0], [0.0, 3.0]]),), Chain, steps=3)


def test_the_posterior_knows_data_that_the_model_closes_over() -> None:
    x = torch.randn(30)

    def model() -> None:
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("data", 30):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    result = ExactPosteriorEM(model).fit(max_steps=3, progress=False)
    x.mul_(0.1)
    with pytest.raises(UsageError, match="changed in place"):
        _ = result.posterior


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("offset", [30.0, 1e3, 1e5])
@pytest.mark.parametrize("D", [1, 2])
def test_clusters_far_apart_do_not_cancel(dtype: torch.dtype, offset: float, D: int) -> None:
    """Spreads and evidence against numpy on the two clusters by themselves."""
    if dtype is torch.float32 and offset > 1e4:
        pytest.skip("the data themselves have no digits left")
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(200, D, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.cat([a, b + offset]).to(dtype)

    def model(x: Tensor) -> None:
        w = pyro.param("w", x.new_ones(2) / 2, constraint=C.simplex)
        mu = pyro.param("mu", x[[0, 250]].clone())
        S = pyro.param("S", torch.eye(D).to(x).repeat(2, 1, 1) * 2, constraint=C.positive_definite)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)

    result = ExactPosteriorEM(model).fit(x, max_steps=6, tol=0, progress=False)
    evidence = 0.0
    for k, part in enumerate((x[:200].double().numpy(), x[200:].double().numpy())):
        cov = np.atleast_2d(np.cov(part.T, bias=True))
        # In float32 a datum near the far cluster is known to eps · offset only.
        rtol = 1e-9 if dtype is torch.float64 else 1e-4 + 1e-7 * offset
        np.testing.assert_allclose(result.params["S"][k].double(), cov, rtol=rtol, atol=rtol)
        d = part - part.mean(0)
        square = (d @ np.linalg.inv(cov) * d).sum()
        log_det = np.linalg.slogdet(2 * np.pi * cov)[1]
        evidence += -0.5 * (square + 200 * log_det) + 200 * np.log(0.5)
    rel = 1e-10 if dtype is torch.float64 else 2e-6 + 1e-8 * offset
    assert result.log_evidence == pytest.approx(evidence, rel=rel)
    # In float32 the sums of squares about the centre of all are rounded as well.
    rel = max(rel, 1e-6 if dtype is torch.float64 else 4e-6)
    assert result.history.after_m_step[0] == pytest.approx(evidence, rel=rel)


@pytest.mark.parametrize("far", [16.0, 30.0])
def test_float32_components_that_hold_next_to_nothing(
    far: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(500, generator=g), torch.tensor([3.0])]).float()

    def model(x: Tensor) -> None:
        w = pyro.param("w", x.new_tensor([0.5, 0.5]), constraint=C.simplex)
        mu = pyro.param("mu", x.new_tensor([0.0, far]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], x.new_tensor(1.0)), obs=x)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        quick, full = both_fits(monkeypatch, model, x, max_steps=1)
    torch.testing.assert_close(quick.params["mu"], full.params["mu"], rtol=1e-4, atol=1e-4)
    empty = [w for w in caught if "no observation had any weight" in str(w.message)]
    assert len(empty) == (2 if far == 30.0 else 0)


@pytest.mark.parametrize("numba", [True, False])
def test_a_likely_path_that_underflows_is_not_lost(
    numba: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path that wins is 800 nats behind at first and far ahead later."""
    monkeypatch.setattr(forward_backward, "_HAS_NUMBA", numba and forward_backward._HAS_NUMBA)
    monkeypatch.setattr(forward_backward, "_FEW", 0)
    e = 1e-195
    A = torch.tensor([[1 - e, 0.0, e], [0.0, 1.0, 0.0], [0.0, e, 1 - e]])
    rates = -torch.tensor([[0.0, -800, -2000], [-2000, 0.0, 0.0], [-3000, 0.0, -3000]])

    def model(x: Tensor) -> None:
        p = pyro.param("p", torch.tensor([0.3, 0.4, 0.3]), constraint=C.simplex)
        z = None
        for t in pyro.markov(range(3)):
            z = pyro.sample(f"z{t}", dist.Categorical(p if z is None else A[z]))
            pyro.sample(f"c{t}", dist.Poisson(rates[t][z]), obs=x[t])

    result = ExactPosteriorEM(model).fit(torch.zeros(3), max_steps=3, tol=0, progress=False)
    assert result.history[0] == pytest.approx(np.log(0.4) - 800, rel=1e-9)


def test_masked_differences_do_not_hide_a_symmetric_start() -> None:
    def model(x: Tensor) -> None:
        mu, nu = pyro.param("mu", torch.zeros(2)), pyro.param("nu", torch.tensor([0.0, 2.0]))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
            with pyro.poutine.mask(mask=torch.zeros(len(x), dtype=torch.bool)):
                pyro.sample("y", dist.Normal(nu[z], 1.0), obs=x)

    with pytest.warns(Warning, match="the start is symmetric"):
        ExactPosteriorEM(model).fit(torch.randn(20), max_steps=2, progress=False)


@pytest.mark.parametrize("how", [{}, {"acceleration": "squarem"}])
@pytest.mark.parametrize("at", range(1, 16))
def test_an_interrupt_at_any_write_leaves_one_whole_step(
    at: int, how: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in the store, in the result and in the history belong together."""
    x = points(120)
    original, calls = parameters.write_unconstrained, 0

    def write(*args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise KeyboardInterrupt
        original(*args)

    monkeypatch.setattr(parameters, "write_unconstrained", write)
    result = ExactPosteriorEM(gaussian).fit(
        x, 2, "full", max_steps=25, tol=0, progress=False, **how
    )
    monkeypatch.setattr(parameters, "write_unconstrained", original)
    evidence = ExactPosteriorEM(gaussian).posterior(x, 2, "full").log_evidence
    assert result.log_evidence == pytest.approx(evidence, rel=1e-10)
    for name, value in result.params.items():
        torch.testing.assert_close(pyro.param(name).detach(), value)
    if calls >= at:
        assert result.status is EMStatus.INTERRUPTED
    assert result.log_evidence >= max(result.history, default=-np.inf) - 1e-6


def test_an_interrupt_in_the_last_verification(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0

    def disagreements(program: Program, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:  # while planning, after the first step, at the end
            raise KeyboardInterrupt
        return agreement.disagreements_of(program, *args, **kwargs)

    for module in (guarded, verification):
        monkeypatch.setattr(module, "disagreements_of", disagreements)
    result = ExactPosteriorEM(gaussian).fit(points(), 2, "full", max_steps=5, progress=False)
    assert calls == 3 and result.status is EMStatus.INTERRUPTED and result.num_steps == 5


@pytest.mark.parametrize("how", ["alone", "callbacks", "steps"])
def test_the_first_step_is_verified_at_once(how: str) -> None:
    """A branch far from the start: the first M-step crosses it, and the fit goes on without kernels."""

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        loc = mu if float(mu.detach()[1]) < 5 else mu.flip(0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    x = torch.cat([torch.randn(30), torch.randn(30) + 20])
    em = ExactPosteriorEM(model)
    with pytest.warns(Warning, match=r"argument 'loc': it is not what the mixture kernel computed"):
        if how == "steps":
            found = list(itertools.islice(em.steps(x), 5))[-1].log_evidence
        else:
            callbacks = [lambda step: None] if how == "callbacks" else []
            result = em.fit(x, max_steps=4, progress=False, callbacks=callbacks)
            found = result.log_evidence
    again = ExactPosteriorEM(model).elbo(x).log_evidence
    assert found == pytest.approx(again, rel=1e-10)


def test_a_form_that_was_seen_is_looked_at_once_by_a_short_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The look after the first M-step waits for 32 steps, or for the end, where nobody watches."""
    calls = 0

    def disagreements(program: Program, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return agreement.disagreements_of(program, *args, **kwargs)

    def count(**how: Any) -> int:
        nonlocal calls
        calls = 0
        pyro.clear_param_store()
        ExactPosteriorEM(gaussian).fit(points(150), 2, "full", tol=0, progress=False, **how)
        return calls

    for module in (guarded, verification):
        monkeypatch.setattr(module, "disagreements_of", disagreements)
    assert count(max_steps=5) == 3  # while planning, after the first step, at the end
    assert count(max_steps=5) == 1 and count(max_steps=32) == 1 and count(max_steps=33) == 2
    assert count(max_steps=5, callbacks=[lambda step: None]) == 2


@pytest.mark.parametrize("steps", [5, 40])
def test_a_form_that_was_seen_is_fitted_to_the_same_bits(steps: int) -> None:
    """A later look interrupts nothing: steps go on from where they were, not from what it stored."""
    ends = []
    for _ in range(3):
        pyro.clear_param_store()
        em = ExactPosteriorEM(gaussian)
        ends.append(em.fit(points(150), 3, "full", max_steps=steps, tol=0, progress=False))
    for other in ends[1:]:
        assert other.history == ends[0].history
        assert all(torch.equal(v, ends[0].params[name]) for name, v in other.params.items())


@pytest.mark.parametrize("waits", [1, 8])
def test_a_later_look_finds_what_the_first_step_crossed(
    waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The branch is met in the second fit of a form: its steps on sums are taken back, all of them."""
    monkeypatch.setattr(verified_steps, "LATER", waits)

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.0]))
        loc = mu if float(mu.detach()[1]) < 5 else mu.flip(0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.4, 0.6])))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    def fit(x: Tensor, **how: Any) -> Any:
        pyro.clear_param_store()
        return ExactPosteriorEM(model).fit(x, max_steps=2, tol=0, progress=False, **how)

    near = torch.cat([torch.randn(8), torch.randn(8) + 2])
    far = torch.cat([near[:8], near[8:] + 18])
    fit(near)
    with pytest.warns(Warning, match=r"argument 'loc': (it is not|at the end of the fit)"):
        later = fit(far)
    evidence = ExactPosteriorEM(model).elbo(far).log_evidence
    with pytest.warns(Warning, match="argument 'loc': it is not"):
        at_once = fit(far, callbacks=[lambda step: None])
    assert later.log_evidence == pytest.approx(evidence, rel=1e-6)
    assert later.history == pytest.approx(at_once.history, rel=1e-6)


@pytest.mark.parametrize("case", ["Gaussian, full", "chains, Gaussian"])
def test_lost_posterior_mass_is_handed_over(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels keep the promise that every posterior sums to one."""
    _, model, args = CASES[case]
    program = ExactPosteriorEM(model)._ready(args, {})
    em = on_sums(program)
    assert em is not None
    em.e_step()
    smooth, plain, softmax = forward_backward.smooth, Tensor.div_, Tensor.softmax
    monkeypatch.setattr(
        "pyro_em.posteriors.chains.chain.smooth",
        lambda *a: tuple(t * (0.999 if i == 0 else 1) for i, t in enumerate(smooth(*a))),
    )
    monkeypatch.setattr(Tensor, "div_", lambda self, other: plain(self, other).mul_(0.999))
    monkeypatch.setattr(Tensor, "softmax", lambda self, dim: softmax(self, dim).mul_(0.999))
    with pytest.raises(Handover):
        em.e_step()


def test_impossible_data_are_said_by_the_full_step() -> None:
    """A logarithm of zero is a finite number in products, and no evidence."""

    def model(x: Tensor) -> None:
        E = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0]])
        w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Categorical(E[z]), obs=x)

    program = ExactPosteriorEM(model)._ready((torch.tensor([0, 1, 0, 1, 1, 0]),), {})
    em = on_sums(program)
    assert em is not None
    em.e_step()
    em.block.factors[0].linear.phi[:, 0] = torch.tensor([0.0, 0.0, 1.0])  # type: ignore[union-attr]
    with pytest.raises(Handover):
        em.e_step()


@pytest.mark.parametrize("family", [f for f in COUNTS if "logits" not in f])
def test_linear_forms_are_the_densities(family: str) -> None:
    """Features times logarithms against the log density of Pyro's own distribution."""
    args = (symbols(80).double(), symbols(80) + 3.0, 3, family)
    program = ExactPosteriorEM(counts)._ready(args, {})
    group = collapsed(program.graph).groups[1]
    form = linear(group)
    assert form is not None
    arguments = {n: a.detach() for n, a in group.arguments.items()}
    a = form.rule.link.inverse(arguments[form.argument])
    if form.rule.kind is Kind.SIMPLEX:
        a = a / a.sum(-1, keepdim=True)
        density = (form.n * a.log()).sum(-1)
    elif form.rule.kind is Kind.PROBABILITY:
        density = form.n * a.log() + (form.d - form.n) * (1 - a).log()
    else:
        density = form.n * a.log() - form.d * a
    distribution = getattr(dist, group.distribution)
    if group.distribution == "Multinomial":
        arguments["total_count"] = 3  # type: ignore[assignment]
    expected = distribution(**arguments, validate_args=False).log_prob(group.value)
    torch.testing.assert_close((density + form.base).expand(expected.shape), expected)


def test_a_family_of_the_users_own_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rule says of one argument is enough: nothing else has to be registered."""

    class Halved(dist.Poisson):
        pass

    monkeypatch.setitem(REGISTRY, Halved, replace(REGISTRY[dist.Poisson], distribution=Halved))

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
        rate = pyro.param("rate", torch.tensor([0.5, 3.0]), constraint=C.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", Halved(rate[z]), obs=x)

    em = steps_of(model, (symbols(50).double(),), Mixture)
    assert em.block.factors[0].linear is not None
