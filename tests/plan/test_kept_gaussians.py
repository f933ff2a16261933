"""Readings of models with Gaussian latents are kept as those of others: nothing stale is answered.

Every number of a later call is held against the dense Gaussian that the model is.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import (
    EMResult,
    ExactPosteriorEM,
    Fixed,
    Hard,
    ModelError,
    PyroEMError,
    UsageError,
    vectorized_markov,
)
from pyro_em.plan import kept
from pyro_em.posteriors.chain_sums import state_steps

N = 12


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often a model was read from the beginning, and from what was kept."""
    seen = {"anew": 0, "again": 0}
    again = kept.Readings.again

    def counted(self: Any, task: Any, first_look: bool) -> Any:
        found = again(self, task, first_look)
        seen["anew" if found is None else "again"] += 1
        return found

    monkeypatch.setattr(kept.Readings, "again", counted)
    return seen


def unread(model: Callable[..., None]) -> Callable[..., None]:
    """The same model as another function, of which no reading is remembered."""
    code = model.__code__, model.__globals__, model.__name__, model.__defaults__, model.__closure__
    return types.FunctionType(*code)  # type: ignore[arg-type]


def numbers(seed: int, *shape: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


X, OTHER, Z = numbers(0, N, 3), numbers(1, N, 3) + 5, numbers(2, N)


def factors(x: Tensor) -> None:
    w = pyro.param("w", lambda: torch.tensor([0.5, -1.0, 2.0]))
    mu = pyro.param("mu", lambda: torch.zeros(3))
    s = pyro.param("s", lambda: torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h[:, None] * w + mu, s).to_event(1), obs=x)


def dense(x: Tensor, values: dict[str, Tensor] | None = None) -> float:
    values = {n: pyro.param(n).detach() for n in ("w", "mu", "s")} if values is None else values
    cov = torch.outer(values["w"], values["w"]) + values["s"] ** 2 * torch.eye(3)
    return float(dist.MultivariateNormal(values["mu"], cov).log_prob(x).sum())


def slopes(y: Tensor, z: Any) -> None:
    """A slope in all rows, drawn."""
    c = pyro.param("c", lambda: torch.tensor(0.3))
    z = z if isinstance(z, Tensor) else torch.as_tensor(z)
    b = pyro.sample("b", dist.Normal(0.0, 2.0))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(b * z + c, 0.5), obs=y)


def dense_slopes(y: Tensor, z: Any) -> float:
    z = torch.as_tensor(z)
    cov = 4 * torch.outer(z, z) + 0.25 * torch.eye(len(y))
    mean = pyro.param("c").detach().expand(len(y))
    return float(dist.MultivariateNormal(mean, cov).log_prob(y))


def test_one_reading_serves_every_method(count: dict[str, int]) -> None:
    model = unread(factors)
    em = ExactPosteriorEM(model)
    first = str(em.plan(X))
    em.fit(X, max_steps=3, tol=0)
    assert em.posterior(X).log_evidence == pytest.approx(dense(X), rel=1e-11)
    assert em.elbo(X).log_evidence == pytest.approx(dense(X), rel=1e-11)
    assert em.score(OTHER) == pytest.approx(dense(OTHER), rel=1e-11)
    em.step(X), em.fit(OTHER, max_steps=2, tol=0), em.predictive(X, num_samples=2)
    assert str(em.plan(X)) == first
    assert count["anew"] == 1 and count["again"] >= 7
    em.score(X[:5])
    assert count["anew"] == 2


def test_a_fit_from_a_kept_reading_is_that_of_a_model_that_nobody_has_read(
    count: dict[str, int],
) -> None:
    model, found = unread(factors), []
    ExactPosteriorEM(model).fit(X, max_steps=2, tol=0)
    for one in (model, unread(factors)):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        result = ExactPosteriorEM(one).fit(OTHER, max_steps=5, tol=0)
        assert result.log_evidence == pytest.approx(dense(OTHER, result.params), rel=1e-11)
        found.append((result, torch.get_rng_state()))
    (again, state), (anew, other) = found
    assert count == {"anew": 2, "again": 1}
    assert list(again.history) == pytest.approx(list(anew.history), rel=1e-12)
    assert torch.equal(state, other) and str(again.plan) == str(anew.plan)


def test_data_that_are_changed_in_place_are_read_again(count: dict[str, int]) -> None:
    x, z = X.clone(), Z.clone()
    em, of_slopes = ExactPosteriorEM(unread(factors)), ExactPosteriorEM(unread(slopes))
    em.fit(x, max_steps=1, tol=0), of_slopes.fit(x[:, 0], z, max_steps=1, tol=0)
    x += 1
    z *= 1 + 1e-7
    assert em.score(x) == pytest.approx(dense(x), rel=1e-11)
    assert of_slopes.score(x[:, 0], z) == pytest.approx(dense_slopes(x[:, 0], z), rel=1e-11)
    x[0, 0] = math.nan
    with pytest.raises(PyroEMError, match="NaN"):
        em.score(x)


@pytest.mark.parametrize("size", [1e-7, 1.0])
def test_covariates_of_any_origin_that_change_are_seen(size: float, tmp_path: Path) -> None:
    """In arrays, in a closure, in a file, written by numpy into a tensor that the model makes."""
    array, held = Z.numpy().copy(), {"z": Z.clone()}

    def closed(y: Tensor) -> None:
        slopes(y, held["z"])

    def made(y: Tensor) -> None:
        z = torch.zeros(N)
        z.numpy()[:] = array
        slopes(y, z)

    def read(y: Tensor) -> None:
        z = torch.zeros(N)
        z.numpy()[:] = np.fromfile(tmp_path / "z")
        slopes(y, z)

    y = X[:, 0]
    array.tofile(tmp_path / "z")
    calls = (
        (ExactPosteriorEM(unread(slopes)), (y, array)),
        (ExactPosteriorEM(closed), (y,)),
        (ExactPosteriorEM(made), (y,)),
        (ExactPosteriorEM(read), (y,)),
    )
    for em, args in calls:
        em.fit(*args, max_steps=1, tol=0)
        assert em.score(*args) == pytest.approx(dense_slopes(y, Z), rel=1e-12)
    array *= 1 + size
    array.tofile(tmp_path / "z")
    held["z"] = held["z"] * (1 + size)
    now = dense_slopes(y, array)
    assert now != pytest.approx(dense_slopes(y, Z), rel=1e-10)
    for em, args in calls:
        assert em.score(*args) == pytest.approx(now, rel=1e-12)
        assert em.posterior(*args).log_evidence == pytest.approx(now, rel=1e-12)


def test_a_mean_without_an_offset_is_the_same_on_the_same_data(count: dict[str, int]) -> None:
    """Held once for all rows, it is compared with a zero in each."""

    def model(y: Tensor, z: Tensor) -> None:
        b = pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("rows", len(y)):
            pyro.sample("y", dist.Normal(z @ b, 0.5), obs=y)

    em = ExactPosteriorEM(model)
    y, z = X[:, 0].clone(), OTHER[:, :2].clone()
    for _ in range(3):
        cov = z @ z.T + 0.25 * torch.eye(N)
        expected = dist.MultivariateNormal(torch.zeros(N), cov).log_prob(y)
        assert em.score(y, z) == pytest.approx(float(expected), rel=1e-11)
    em.plan(y, z), em.elbo(y, z), em.plan(y, z)
    assert count["anew"] == 1


def test_an_e_step_of_sums_is_refused_whatever_is_known() -> None:
    model = unread(factors)
    ExactPosteriorEM(model).fit(X, max_steps=1, tol=0)
    for x in (X, OTHER):
        with pytest.raises(UsageError, match="'h' is a Gaussian latent"):
            ExactPosteriorEM(model, strategy=Hard()).score(x)


def test_wishes_of_another_object_are_heard() -> None:
    model = unread(factors)
    ExactPosteriorEM(model).fit(X, max_steps=1, tol=0)
    pyro.clear_param_store()
    result = ExactPosteriorEM(model, updates={"w": Fixed()}).fit(OTHER, max_steps=3, tol=0)
    torch.testing.assert_close(result.params["w"], torch.tensor([0.5, -1.0, 2.0]))
    assert result.log_evidence == pytest.approx(dense(OTHER, result.params), rel=1e-11)


def _from_the_start(model: Callable[..., None], *args: Tensor) -> EMResult:
    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(*args, max_steps=3, tol=0)
    assert isinstance(result, EMResult)
    return result


CHANGED = {
    "a factor of the loadings": (2.0, 0.0, 0.0),
    "other loadings, at zero now": (1.0, 1.0, 0.0),
    "an offset": (1.0, 0.0, 1.0),
    "a small offset": (1.0, 0.0, 1e-7),
    "a small factor": (1 + 1e-7, 0.0, 0.0),
    "small other loadings": (1.0, 1e-7, 0.0),
    "nothing": (1.0, 0.0, 0.0),
}


@pytest.mark.parametrize("how", list(CHANGED))
def test_zeros_and_ones_of_the_data_may_be_other_numbers(how: str) -> None:
    """Where lines held no number of the data: no factor, no second loadings, no known offset."""

    def model(x: Tensor, k: Tensor) -> None:
        w = pyro.param("w", lambda: torch.tensor([0.5, -1.0, 2.0]))
        v = pyro.param("v", lambda: torch.zeros(3))
        mu = pyro.param("mu", lambda: torch.zeros(3))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            mean = h[:, None] * (k[0] * w + k[1] * v) + mu + k[2]
            pyro.sample("x", dist.Normal(mean, 0.7).to_event(1), obs=x)

    def expected(values: dict[str, Tensor], k: Tensor) -> float:
        w = k[0] * values["w"] + k[1] * values["v"]
        return dense(OTHER, {"w": w, "mu": values["mu"] + k[2], "s": torch.tensor(0.7)})

    before, now = torch.tensor([1.0, 0.0, 0.0]), torch.tensor(CHANGED[how])
    ExactPosteriorEM(model).fit(X, before, max_steps=1, tol=0)
    (known,) = kept._by_model[model].values()
    assert known.lines
    again, anew = (_from_the_start(m, OTHER, now) for m in (model, unread(model)))
    assert again.log_evidence == pytest.approx(expected(again.params, now), rel=1e-11)
    assert list(again.history) == pytest.approx(list(anew.history), rel=1e-12)
    assert str(again.plan) == str(anew.plan)
    for name, value in anew.params.items():
        torch.testing.assert_close(again.params[name], value, rtol=1e-9, atol=1e-9)


OF_STEPS = {
    "a small factor": (1 + 1e-9, 0.0, (0, 1, 2)),
    "a small offset": (1.0, 1e-9, (0, 1, 2)),
    "other elements": (1.0, 0.0, (1, 2, 0)),
}


@pytest.mark.parametrize("how", list(OF_STEPS))
def test_what_a_chain_without_a_loop_reads_may_be_otherwise_in_other_data(how: str) -> None:
    """Its coefficients are ones, and where its numbers lie is remembered."""

    def model(y: Tensor, k: Tensor, order: Tensor) -> None:
        q = pyro.param("q", lambda: torch.tensor(0.8), constraint=constraints.positive)
        h = None
        with pyro.plate("series", 3):
            for t in vectorized_markov("time", 10):
                mean = 0.0 if h is None else k[0] * h + k[1]
                h = pyro.sample(f"h_{t}", dist.Normal(mean, q))
                pyro.sample(f"y_{t}", dist.Normal(h[..., order], 1.0), obs=y[t])

    factor, offset, order = OF_STEPS[how]
    before = torch.tensor([1.0, 0.0]), torch.arange(3)
    now = torch.tensor([factor, offset]), torch.tensor(order)
    ExactPosteriorEM(model).fit(numbers(5, 10, 3), *before, max_steps=1, tol=0)
    (known,) = kept._by_model[model].values()
    assert known.lines
    y = numbers(6, 10, 3)
    again = _from_the_start(model, y, *now)
    kept.forget_readings()
    anew = _from_the_start(unread(model), y, *now)
    assert list(again.history) == list(anew.history)
    assert torch.equal(again.posterior.mean("h_*"), anew.posterior.mean("h_*"))


KERNELS = {  # whether kept, steps, what is added to inputs, missing steps
    "other data": (True, 12, 0.0, ()),
    "data of a long series": (True, 300, 0.0, ()),
    "other inputs": (False, 12, 0.5, ()),
    "other steps are missing": (False, 12, 0.0, (3, 7)),
}


@pytest.mark.parametrize("how", list(KERNELS))
def test_steps_on_sums_are_decided_once_for_what_differs_in_its_data_alone(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_kept, T, shift, missing = KERNELS[how]

    def model(y: Tensor, u: Tensor, ok: Tensor) -> None:
        phi, b = (pyro.param(n, lambda: torch.tensor(0.4)) for n in ("phi", "b"))
        q = pyro.param("q", lambda: torch.tensor(0.8), constraint=constraints.positive)
        r = pyro.param("r", lambda: torch.eye(2), constraint=constraints.lower_cholesky)
        h = None
        for t in vectorized_markov("time", T):
            h = pyro.sample(f"h_{t}", dist.Normal(0.0 if h is None else phi * h, q))
            mean = torch.stack([h, h + b * u[t]], -1)
            seen = dist.MultivariateNormal(mean, scale_tril=r).mask(ok[t])
            pyro.sample(f"y_{t}", seen, obs=y[t])

    decided = []
    decide = state_steps._decided
    monkeypatch.setattr(
        state_steps, "_decided", lambda *given: decided.append(given) or decide(*given)
    )
    u, ok = numbers(8, T), torch.ones(T, dtype=torch.bool)
    ok[1] = False
    _from_the_start(model, numbers(9, T, 2), u, ok)
    ok = ok.clone()
    ok[list(missing)] = False
    now = numbers(10, T, 2), u + shift, ok
    again = _from_the_start(model, *now)
    assert len(decided) == 2 - is_kept
    kept.forget_readings()
    anew = _from_the_start(unread(model), *now)
    assert len(decided) == 3 - is_kept
    assert list(again.history) == list(anew.history) and again.bic == anew.bic
    assert str(again.plan) == str(anew.plan)
    assert all(torch.equal(again.params[n], v) for n, v in anew.params.items())


def test_parameters_of_another_form_are_read_anew(count: dict[str, int]) -> None:
    size = {"w": 1}

    def model(x: Tensor) -> None:
        w = pyro.param("w", lambda: torch.full((size["w"],), 0.5))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            mean = h[:, None] * w.expand(3)
            pyro.sample("x", dist.Normal(mean, 1.0).to_event(1), obs=x)

    em = ExactPosteriorEM(model)
    em.fit(X, max_steps=2, tol=0)
    pyro.clear_param_store()
    size["w"] = 3
    result = em.fit(X, max_steps=2, tol=0)
    values = {"w": result.params["w"], "mu": torch.zeros(3), "s": torch.tensor(1.0)}
    assert result.params["w"].shape == (3,) and count["anew"] == 2
    assert result.log_evidence == pytest.approx(dense(X, values), rel=1e-11)


def test_a_model_that_is_not_linear_any_more_is_refused(count: dict[str, int]) -> None:
    how: dict[str, Callable[[Tensor], Tensor]] = {"f": lambda h: h}

    def model(y: Tensor) -> None:
        c = pyro.param("c", lambda: torch.tensor(0.3))
        with pyro.plate("rows", len(y)):
            h = pyro.sample("h", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(how["f"](h) + c, 1.0), obs=y)

    y = X[:, 0]
    em = ExactPosteriorEM(model)
    em.fit(y, max_steps=1, tol=0)
    em.score(y)
    for f in (lambda h: h.clamp(min=-1e3), lambda h: h * h, lambda h: h.detach()):
        how["f"] = f
        for data in (y, y + 1):
            with pytest.raises(ModelError):
                em.score(data)


def test_missing_entries_may_be_others_in_data_of_one_form(count: dict[str, int]) -> None:
    x, there = X.clone(), OTHER.clone()
    x[0, 0] = there[3, 1] = there[4] = math.nan
    model = unread(factors)
    ExactPosteriorEM(model, missing="nan").fit(x, max_steps=2, tol=0)
    em = ExactPosteriorEM(model, missing="nan")
    seen = ~there.isnan()
    cov = torch.outer(pyro.param("w"), pyro.param("w")) + pyro.param("s") ** 2 * torch.eye(3)
    expected = 0.0
    for row, own in zip(there, seen, strict=True):
        if bool(own.any()):
            part = dist.MultivariateNormal(pyro.param("mu")[own], cov[own][:, own])
            expected += part.log_prob(row[own]).item()
    assert em.score(there) == pytest.approx(expected, rel=1e-11)


def test_float32_and_arrays_of_latents_keep_their_form() -> None:
    model = unread(factors)
    for x in (X.float(), OTHER.float()):
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()
        found = ExactPosteriorEM(model).fit(x, max_steps=2, tol=0)
        assert found.params["w"].dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        values = {n: v.double() for n, v in found.params.items()}
        assert found.log_evidence == pytest.approx(dense(x.double(), values), rel=1e-5)


def test_readings_keep_no_data_alive() -> None:
    import gc
    import weakref

    model, x = unread(factors), X.clone()
    alive = weakref.ref(x)
    ExactPosteriorEM(model).fit(x, max_steps=1, tol=0)
    del x
    gc.collect()
    assert alive() is None and np.isfinite(ExactPosteriorEM(model).score(OTHER))
