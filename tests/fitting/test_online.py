"""Online EM against algorithms that are written out here, and against EM on all data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import (
    Chunks,
    DataError,
    DegenerateError,
    ExactPosteriorEM,
    MonteCarlo,
    StepSize,
    UsageError,
)
from tests.data_sets import faithful

_random = np.random.default_rng(5)
X = np.where(_random.random(60) < 0.4, -2.0, 2.0) + _random.normal(size=60)
W, M, S = np.array([0.5, 0.5]), np.array([-1.0, 1.0]), np.array([1.5, 1.0])


def mixture(x: Tensor, shift: float = 0.0) -> None:
    w = pyro.param("w", torch.tensor(W), constraint=constraints.simplex)
    m = pyro.param("m", torch.tensor(M) + shift)
    s = pyro.param("s", torch.tensor(S), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(m[z], s[z]), obs=x)


def sums_of(x: np.ndarray, w: np.ndarray, m: np.ndarray, s: np.ndarray) -> np.ndarray:
    """Σ r, Σ r x, Σ r x² of each component. # (3, K)"""
    log_p = np.log(w) - np.log(s) - 0.5 * ((x[:, None] - m) / s) ** 2
    r = np.exp(log_p - log_p.max(1, keepdims=True))
    r /= r.sum(1, keepdims=True)
    return np.stack([r.sum(0), r.T @ x, r.T @ x**2])


def maximum(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    n, first, second = sums
    mean = first / n
    return n / n.sum(), mean, np.sqrt(second / n - mean**2)


def written_out(x: np.ndarray, rows: int, epochs: int, exponent: float | None) -> list[np.ndarray]:
    """Stepwise EM, or incremental EM where there is no exponent."""
    parts = [x[i : i + rows] for i in range(0, len(x), rows)]
    theta, held, average, t = (W, M + (x.mean() if x.mean() > 50 else 0), S), {}, np.zeros(1), 0
    for _ in range(epochs):
        for i, part in enumerate(parts):
            own = sums_of(part, *theta)
            if exponent is None:
                held[i] = own
                theta = maximum(sum(held.values()))  # type: ignore[arg-type]
                continue
            size = 1.0 if t == 0 else (t + 2) ** -exponent
            average, t = (1 - size) * average + size * own * len(x) / len(part), t + 1
            theta = maximum(average)
    return list(theta)


def fit(x: Any, online: Any, epochs: int, rows: int, **options: Any) -> Any:
    pyro.clear_param_store()
    chunks = Chunks(torch.as_tensor(x), rows=rows)
    return ExactPosteriorEM(mixture).fit(
        chunks, online=online, num_epochs=epochs, progress=False, **options
    )


@pytest.mark.parametrize("exponent", [0.6, 1.0, None])
@pytest.mark.parametrize("epochs", [1, 3])
def test_steps_are_those_of_the_algorithm(exponent: float | None, epochs: int) -> None:
    online = "incremental" if exponent is None else StepSize(exponent)
    result = fit(X, online, epochs, 16)
    expected = written_out(X, 16, epochs, exponent)
    for name, value in zip("wms", expected, strict=True):
        np.testing.assert_allclose(result.params[name].numpy(), value, rtol=1e-9)
    assert result.num_steps == 4 * epochs and not result.plan.exact
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture)
    params = {n: torch.as_tensor(v) for n, v in zip("wms", expected, strict=True)}
    there = em.elbo(torch.tensor(X), params=params).log_evidence
    assert result.log_evidence == pytest.approx(there, rel=1e-10)


def test_one_chunk_is_em_on_all_data() -> None:
    result = fit(X, "incremental", 4, 100)
    pyro.clear_param_store()
    whole = ExactPosteriorEM(mixture).fit(torch.tensor(X), max_steps=4, tol=0, progress=False)
    assert list(result.history) == pytest.approx(list(whole.history), rel=1e-12)
    torch.testing.assert_close(dict(result.params), dict(whole.params), rtol=1e-11, atol=1e-12)
    assert whole.plan.exact


def wide(x: Tensor) -> None:
    """More dimensions than there are products of: moments are taken about the means."""
    D = x.shape[1]
    m = pyro.param("m", torch.stack([torch.zeros(D), torch.ones(D)]))
    L = pyro.param("L", torch.eye(D).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.MultivariateNormal(m[z], scale_tril=L[z]), obs=x)


def diagonal(x: Tensor) -> None:
    """Clusters far apart, and narrow."""
    m = pyro.param("m", torch.tensor([[-3e5, 0.0], [3e5, 1.0]]))
    s = pyro.param("s", torch.ones(2, 2), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
        pyro.sample("x", dist.Normal(m[z], s[z]).to_event(1), obs=x)


@pytest.mark.parametrize("model", [wide, diagonal])
def test_moments_about_other_means_are_moved(model: Callable[..., Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    if model is wide:
        x = torch.randn(400, 26, generator=generator)
        x[::2] += 1.0
    else:
        x = torch.randn(40, 2, generator=generator) * 0.5
        x[:, 0] += torch.tensor([-3e5, 3e5]).repeat(20) + 0.7
    # Two equal chunks: the second pass of incremental EM is that on half the data, twice.
    half = x[: len(x) // 2]
    pyro.clear_param_store()
    chunks = Chunks(torch.cat([half, half]), rows=len(half))
    twice = ExactPosteriorEM(model).fit(chunks, online="incremental", num_epochs=1, progress=False)
    # After both: sums of the first chunk at θ_0, of the second at θ_1, where θ_1 = EM(θ_0).
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    stats = []
    for _ in range(2):
        q = em.posterior(half).probs("z")
        stats.append((q.sum(0), q.T @ half, torch.einsum("nk,ni,nj->kij", q, half, half)))
        em.fit(half, max_steps=1, tol=0, progress=False)
    n, first, second = (a + b for a, b in zip(*stats, strict=True))
    mean = first / n.unsqueeze(-1)
    torch.testing.assert_close(twice.params["m"], mean, rtol=1e-9, atol=1e-9)
    if model is wide:
        L = twice.params["L"]
        covariance = second / n[:, None, None] - mean.unsqueeze(-1) * mean.unsqueeze(-2)
        torch.testing.assert_close(L @ L.mT, covariance, rtol=1e-8, atol=1e-9)
    else:
        centred = half - mean[(half[:, 0] > 0).long()]
        each = torch.stack(
            [
                centred[half[:, 0] < 0].std(0, correction=0),
                centred[half[:, 0] > 0].std(0, correction=0),
            ]
        )
        torch.testing.assert_close(twice.params["s"], each, rtol=1e-6, atol=0.0)


def test_priors_count_once() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([3.0, 2.0])))
        m = pyro.param("m", torch.tensor(M))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(m[z], 1.0), obs=x)

    x = torch.tensor(X)
    results = []
    for data, options in (
        (Chunks(x, rows=100), {"online": "incremental", "num_epochs": 3}),
        (x, {"max_steps": 3, "tol": 0}),
    ):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        em = ExactPosteriorEM(model, guide="map")
        results.append(em.fit(data, progress=False, **options))
    torch.testing.assert_close(results[0].params["w"], results[1].params["w"], rtol=1e-9, atol=0)


def test_held_out_evidence_decides() -> None:
    train, other = X[:40], torch.tensor(X[40:])
    result = fit(train, StepSize(0.6), 5, 10, validation=other)
    steps = [n for n, _ in result.history.validation]
    values = [v for _, v in result.history.validation]
    assert steps == [4, 8, 12, 16, 20]
    assert ExactPosteriorEM(mixture).score(other) == pytest.approx(max(values), rel=1e-10)
    # About as good as EM on all data, which has seen each row as often.
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture)
    em.fit(torch.tensor(train), max_steps=20, tol=0, progress=False)
    assert max(values) > em.score(other) - 1.0


def test_a_callback_stops() -> None:
    seen: list[float] = []

    def stop(step: Any) -> bool:
        seen.append(float(step.params["w"][0]))
        return len(seen) == 3

    result = fit(X, StepSize(), 5, 10, callbacks=[stop])
    assert result.num_steps == 3 and result.status.name == "STOPPED"
    assert float(result.params["w"][0]) == pytest.approx(seen[-1])


def test_what_cannot_be_online_is_refused() -> None:
    x = torch.tensor(X)
    chunks = Chunks(x, rows=20)
    em = ExactPosteriorEM(mixture)
    for data, options, says in (
        (x, {}, "the data are no Chunks"),
        (chunks, {"acceleration": "squarem"}, "acceleration was given together"),
        (chunks, {"online": 0.6}, "online=0.6 is not understood"),
        (chunks, {"batch_size": 3}, "batch_size"),
    ):
        pyro.clear_param_store()
        with pytest.raises(UsageError, match=says):
            em.fit(data, **{"online": StepSize(), "progress": False, **options})
    for exponent in (0.5, 1.1, "a"):
        with pytest.raises(UsageError, match="exponent"):
            StepSize(exponent)  # type: ignore[arg-type]


def test_a_step_without_a_solution_is_said() -> None:
    def far_away(x: Tensor) -> None:
        m = pyro.param("m", torch.tensor([0.0, 1e4]))
        s = pyro.param("s", torch.ones(2), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5)).long()
            pyro.sample("x", dist.Normal(m[z], s[z]), obs=x)

    pyro.clear_param_store()
    chunks = Chunks(torch.tensor(X), rows=20)
    with pytest.raises(DegenerateError, match="has no solution"):
        ExactPosteriorEM(far_away).fit(chunks, online=StepSize(), progress=False)
    assert pyro.param("m").tolist() == [0.0, 1e4]


def test_a_symbol_that_earlier_chunks_lack_is_named_with_its_row() -> None:
    def symbols(x: Tensor) -> None:
        p = pyro.param("p", torch.ones(2, 3) / 3, constraint=constraints.simplex)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.4)).long()
            pyro.sample("x", dist.Categorical(p[z]), obs=x)

    pyro.clear_param_store()
    chunks = Chunks(torch.tensor([0, 1, 1, 0, 1, 0, 0, 2, 1]), rows=3)
    with (
        pytest.warns(match="has no solution"),
        pytest.raises(DataError, match=r"impossible.*row 7 of all data"),
    ):
        ExactPosteriorEM(symbols).fit(chunks, online=StepSize(), progress=False)


def test_chains_are_rows_too() -> None:
    def chains(x: Tensor) -> None:
        rows = pyro.param(
            "A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex
        )
        m = pyro.param("m", torch.tensor(M))
        with pyro.plate("sequences", len(x)):
            z: Any = 0
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(rows[z]))
                pyro.sample(f"x_{t}", dist.Normal(m[z], 1.0), obs=x[:, t])

    x, results = torch.tensor(X).reshape(12, 5), []
    # Chunks that are all alike: averages of their sums are those of any.
    alike = x[:4].repeat(3, 1)
    for data, options in (
        (Chunks(alike, rows=4), {"online": StepSize(), "num_epochs": 1}),
        (alike, {"max_steps": 1, "tol": 0}),
    ):
        pyro.clear_param_store()
        stop = [lambda step: step.index == 0]
        em = ExactPosteriorEM(chains)
        results.append(em.fit(data, progress=False, callbacks=stop, **options))
    assert results[0].num_steps == 1 and results[0].plan.kernel == "chain"
    torch.testing.assert_close(dict(results[0].params), dict(results[1].params), rtol=1e-11, atol=0)


def test_real_data_are_predicted_as_well_as_after_em_on_all_of_them() -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=constraints.simplex)
        m = pyro.param("m", torch.tensor([[-1.0, -1.0], [1.0, 1.0]]))
        L = pyro.param("L", torch.eye(2).repeat(2, 1, 1), constraint=constraints.lower_cholesky)
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(m[z], scale_tril=L[z]), obs=x)

    x = faithful()
    x = (x - x.mean(0)) / x.std(0)
    train, other = x[::2], x[1::2]
    found = {}
    for online in (None, StepSize(0.6), "incremental"):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        options = {"max_steps": 20, "tol": 0} if online is None else {"num_epochs": 20}
        em.fit(Chunks(train, rows=34), online=online, progress=False, **options)
        found[online] = em.score(other)
    assert found["incremental"] == pytest.approx(found[None], abs=0.01)
    assert found[StepSize(0.6)] > found[None] - 2.0


def test_a_plan_says_whether_its_steps_are_exact() -> None:
    x = torch.tensor(X)

    def drawn(x: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.LogNormal(0.0, 1.0))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    assert ExactPosteriorEM(mixture).plan(x).exact
    assert not ExactPosteriorEM(mixture, strategy=MonteCarlo(2)).plan(x).exact
    assert not ExactPosteriorEM(drawn, AutoNormal).plan(x).exact
    assert not ExactPosteriorEM(drawn).plan(x).exact  # there is no route


@pytest.mark.parametrize("exponent", [0.6, 1.0])
def test_batches_one_after_the_other(exponent: float, tmp_path: Path) -> None:
    expected = written_out(np.concatenate([X, X]), 16, 1, exponent)
    batches = torch.tensor(np.concatenate([X, X])).split(16)
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture)
    for i, batch in enumerate(batches):
        if i == 4:  # in another process
            em.save(tmp_path / "half.pt")
            pyro.clear_param_store()
            em = ExactPosteriorEM(mixture)
            em.load(tmp_path / "half.pt")
        before = em.score(batch)
        assert em.partial_fit(batch, online=StepSize(exponent)) == pytest.approx(before, rel=1e-12)
    for name, value in zip("wms", expected, strict=True):
        np.testing.assert_allclose(pyro.param(name).detach().numpy(), value, rtol=1e-9)
    em.reset()
    em.partial_fit(batches[0], online=StepSize(exponent))
    first = maximum(sums_of(batches[0].numpy(), W, M, S))
    np.testing.assert_allclose(pyro.param("m").detach().numpy(), first[1], rtol=1e-9)


def test_a_batch_that_cannot_be_learnt_from_changes_nothing() -> None:
    x = torch.tensor(X)
    em = ExactPosteriorEM(mixture)
    with pytest.raises(UsageError, match="online is no StepSize"):
        em.partial_fit(x)
    em.score(x)
    pyro.param("m").data[1] = 1e5
    with pytest.raises(DegenerateError, match="has no solution"):
        em.partial_fit(x, online=StepSize())
    assert pyro.param("m").tolist() == [M[0], 1e5] and pyro.param("w").tolist() == [0.5, 0.5]
    pyro.param("m").data[1] = M[1]
    em.partial_fit(x, online=StepSize())
    first = maximum(sums_of(X, W, M, S))
    np.testing.assert_allclose(pyro.param("m").detach().numpy(), first[1], rtol=1e-9)

    with pytest.raises(UsageError, match="Chunks were given"):
        ExactPosteriorEM(mixture).partial_fit(Chunks(x), online=StepSize())
