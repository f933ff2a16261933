"""Tensors without numbers, in sparse form or in half precision: they work, or a sentence says why."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, ModelError

X = torch.cat([torch.linspace(-1, 1, 9), torch.linspace(3, 5, 9)])


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def mixture(x: Tensor, dtype: torch.dtype | None = None, how: str = "") -> None:
    def start() -> Tensor:
        mu = tensor([0.0, 3.0], dtype=dtype)
        if how == "meta":
            return mu.to("meta")
        return mu.to_sparse() if how == "sparse" else mu

    mu = pyro.param("mu", start)
    s = pyro.param("s", lambda: torch.ones(2, dtype=dtype), constraint=constraints.positive)
    w = pyro.param("w", lambda: torch.ones(2, dtype=dtype) / 2, constraint=constraints.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s[z]), obs=x)


def curved(x: Tensor, dtype: torch.dtype) -> None:
    a = pyro.param("a", lambda: tensor([0.1, 0.5], dtype=dtype))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2, dtype=dtype) / 2))
        pyro.sample("x", dist.Normal(torch.tanh(a[z] * 3) * 2, 1.0), obs=x)


def full(x: Tensor, dtype: torch.dtype) -> None:
    s = pyro.param("S", lambda: torch.eye(2, dtype=dtype), constraint=constraints.positive_definite)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2, dtype=dtype), s), obs=x)


def drawn(x: Tensor) -> None:
    h = pyro.sample("h", dist.Normal(pyro.param("m", tensor(0.0)), 1.0))
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(h, 1.0), obs=x)


@pytest.mark.filterwarnings("ignore:site")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_works_as_well_as_it_can(dtype: torch.dtype) -> None:
    exact = ExactPosteriorEM(mixture).fit(X.float(), torch.float32).params["mu"]
    pyro.clear_param_store()
    em = ExactPosteriorEM(mixture)
    x = X.to(dtype)
    result = em.fit(x, dtype)
    assert result.params["mu"].dtype == dtype
    torch.testing.assert_close(result.params["mu"].float(), exact, rtol=0.05, atol=0.1)
    assert float(result.standard_errors()["mu"][0]) == pytest.approx(0.2, abs=0.1)
    assert em.posterior(x, dtype).sample(3, seed=0)["z"].shape == (3, len(x))
    assert em.predictive(x, dtype, num_samples=2)["x"].shape == (2, len(x))
    assert float(em.step(x, dtype)) > 0


@pytest.mark.filterwarnings("ignore:site")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_by_gradient_and_where_torch_has_no_algebra(dtype: torch.dtype) -> None:
    result = ExactPosteriorEM(curved).fit(X.to(dtype), dtype, max_steps=3)
    assert bool(result.params["a"].isfinite().all())
    with pytest.raises(ModelError, match=r"not implemented for(.|\n)*use float32 or float64"):
        ExactPosteriorEM(full).fit(torch.ones(3, 2, dtype=dtype), dtype)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("call", ["fit", "posterior", "plan", "step", "elbo"])
def test_data_without_numbers(call: str, guided: bool) -> None:
    em = ExactPosteriorEM(drawn, AutoNormal) if guided else ExactPosteriorEM(mixture)
    with pytest.raises(DataError, match=r"argument 'x': it is on the device 'meta'"):
        getattr(em, call)(X.to("meta"))


@pytest.mark.parametrize("guided", [False, True])
def test_sparse_observations(guided: bool) -> None:
    em = ExactPosteriorEM(drawn, AutoNormal) if guided else ExactPosteriorEM(mixture)
    words = r"site 'x': its observed value is a sparse tensor(.|\n)*to_dense\(\)"
    with pytest.raises(DataError, match=words):
        em.fit(X.to_sparse())


def test_sparse_covariates_are_the_models_own_matter() -> None:
    def regression(x: Tensor, w: Tensor) -> None:
        b = pyro.param("b", torch.zeros(2, 1))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(torch.sparse.mm(w, b)[:, 0], 1.0), obs=x)

    w = torch.stack([torch.ones(len(X)), X], -1)
    one = ExactPosteriorEM(regression).fit(X, w.to_sparse())
    pyro.clear_param_store()
    two = ExactPosteriorEM(regression).fit(X, w)
    assert one.log_evidence == pytest.approx(two.log_evidence, abs=1e-3)


PARAMETERS: dict[str, tuple[Any, str]] = {
    "sparse": ((None, "sparse"), "parameter 'mu': its initial value is a sparse tensor"),
    "meta": ((None, "meta"), "parameter 'mu': it is on the device 'meta'"),
    "complex": ((torch.complex64,), "parameter 'mu': its initial value is a complex tensor"),
    "integer": ((torch.int64,), "floating point value"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_parameters_of_another_kind(case: str) -> None:
    args, words = PARAMETERS[case]
    with pytest.raises(ModelError, match=words):
        ExactPosteriorEM(mixture).fit(X, *args)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors() -> None:
    x = torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(DataError, match=r"argument 'x': it is a nested tensor(.|\n)*pad"):
        ExactPosteriorEM(mixture).fit(x)


def test_a_number_in_double_precision_times_data_in_single_precision() -> None:
    """A tensor without dimensions takes the precision of what it multiplies."""
    w = torch.linspace(0.5, 1.5, 18)

    def scaled(x: Tensor, dtype: torch.dtype) -> None:
        r = pyro.param("r", tensor(0.8, dtype=dtype), constraint=constraints.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(tensor([0.3, 0.7])))
            pyro.sample("x", dist.Normal(tensor([0.0, 3.0])[z], r * w), obs=x)

    found = []
    for dtype in (torch.float32, torch.float64):
        pyro.clear_param_store()
        result = ExactPosteriorEM(scaled).fit(X, dtype, max_steps=3, tol=0)
        found.append([*result.history, float(result.params["r"])])
    assert found[1] == pytest.approx(found[0], rel=1e-6)
