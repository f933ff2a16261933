"""Initial values outside their constraint: Pyro moves them in silence, here they are named."""

from __future__ import annotations

import warnings
from typing import Any

import numpy
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import Tensor, tensor
from torch.distributions import constraints

from pyro_em import DataError, ExactPosteriorEM, ModelError, PyroEMError, PyroEMWarning

X = tensor([0.0, 0.1, 0.3, 1.0, 1.2], dtype=torch.float64)
PAIRS = tensor([[0.0, 1.0], [1.0, 0.5], [0.3, 0.2], [2.0, 1.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> None:
    """Each case begins with an empty param store."""


def weights(x: Tensor, start: Any) -> None:
    w = pyro.param("w", start, constraint=constraints.simplex)
    mu = torch.arange(float(w.shape[-1]))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def transitions(x: Tensor, start: Any) -> None:
    a, z = pyro.param("A", start, constraint=constraints.simplex), 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(a[z]))
        pyro.sample(f"x_{t}", dist.Normal(z * 1.0, 1.0), obs=x[t])


def scaled(x: Tensor, start: Any, constraint: Any = constraints.positive) -> None:
    s = pyro.param("s", start, constraint=constraint)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.Normal(0.0, s), obs=x)


def located(x: Tensor, start: Any, constraint: Any = constraints.real) -> None:
    m = pyro.param("m", start, constraint=constraint)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(torch.ones(2) / 2))
        pyro.sample("x", dist.Normal(m.expand(2)[z], 1.0), obs=x)


def matrix(x: Tensor, start: Any, constraint: Any, argument: str = "scale_tril") -> None:
    s = pyro.param("S", start, constraint=constraint)
    with pyro.plate("n", len(x)):
        pyro.sample("x", dist.MultivariateNormal(torch.zeros(2), **{argument: s}), obs=x)


def fit(model: Any, *args: Any) -> Any:
    return ExactPosteriorEM(model).fit(*args, max_steps=2)


def told(model: Any, *args: Any) -> list[str]:
    """The warnings of a first look."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ExactPosteriorEM(model).plan(*args)
    return [str(w.message) for w in caught if issubclass(w.category, PyroEMWarning)]


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("start", [[0.5, 0.9], [0.5, 0.6], [1.0, 1.0], [1, 1], [0.2, 0.2, 0.2]])
def test_a_simplex_that_does_not_sum_to_one(start: list[float], lazy: bool) -> None:
    w = tensor(start)
    (text,) = told(weights, X, (lambda: w) if lazy else w)
    assert f"parameter 'w': its initial value sums to {sum(start):.4g}, not to 1" in text
    assert "divide" in text
    assert pyro.param("w").sum().item() == pytest.approx(1.0)


def test_it_is_told_at_the_users_line() -> None:
    with pytest.warns(PyroEMWarning, match="its initial value sums to") as caught:
        fit(weights, X, tensor([0.5, 0.9]))
    assert {w.filename for w in caught} == {__file__}


def test_the_row_of_a_transition_matrix_is_named() -> None:
    (text,) = told(transitions, X[:3], tensor([[0.5, 0.5], [0.9, 0.9]]))
    assert "parameter 'A'" in text and "1 of 2 rows" in text and "row 1 sums to 1.8" in text


def test_rounding_is_no_finding() -> None:
    for start in (
        tensor([1 / 3, 1 / 3, 1 / 3], dtype=torch.float32),
        tensor([0.333, 0.333, 0.333]),
        torch.ones(1000, dtype=torch.float32) / 1000,
        tensor([0.0, 1.0]),
        torch.softmax(torch.linspace(-8, 8, 50, dtype=torch.float32), -1),
    ):
        pyro.clear_param_store()
        assert told(weights, X.to(start.dtype), start) == []
    for value in (1e-30, 1.0, 1e30):
        pyro.clear_param_store()
        assert told(scaled, X, tensor(value)) == []
        pyro.clear_param_store()
        assert told(scaled, X, tensor(value), dist.constraints.softplus_positive) == []
    pyro.clear_param_store()
    start = torch.cov(PAIRS.T)
    assert told(matrix, PAIRS, start, constraints.positive_definite, "covariance_matrix") == []


def test_what_is_in_the_store_needs_no_initial_value() -> None:
    pyro.param("w", tensor([0.5, 0.5]), constraint=constraints.simplex)
    assert told(weights, X, tensor([0.5, 0.9])) == []


MOVED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "unit interval": (
        located,
        (X, tensor(2.0), constraints.unit_interval),
        "'m' | Interval | 2 was given | between 0 and 1",
    ),
    "interval": (located, (X, tensor(7.0), constraints.interval(0.0, 5.0)), "'m' | 5 where 7 was"),
    "asymmetric": (
        matrix,
        (
            PAIRS,
            tensor([[1.0, 0.5], [0.0, 1.0]]),
            constraints.positive_definite,
            "covariance_matrix",
        ),
        "'S' | PositiveDefinite | 0.5 was given at index (0, 1) | symmetric",
    ),
    "covariance as factor": (
        matrix,
        (PAIRS, tensor([[1.0, 0.5], [0.5, 1.0]]), constraints.lower_cholesky),
        "'S' | LowerCholesky | torch.linalg.cholesky",
    ),
    "correlation": (
        matrix,
        (PAIRS, tensor([[1.0, 0.0], [0.9, 0.9]]), constraints.corr_cholesky),
        "'S' | CorrCholesky | 0.9 was given | torch.linalg.cholesky",
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_a_value_that_pyro_moves_is_named(case: str) -> None:
    model, args, words = MOVED[case]
    (text,) = told(model, *args)
    assert [w for w in words.split(" | ") if w not in text] == [], text


REFUSED: dict[str, tuple[Any, tuple[Any, ...], str]] = {
    "negative": (scaled, (X, tensor(-1.0)), "'s' | GreaterThan | given is -1 | above 0"),
    "zero": (scaled, (X, tensor(0.0)), "'s' | GreaterThan | given is 0 | above 0"),
    "negative weight": (weights, (X, tensor([-0.5, 1.5])), "'w' | Simplex | [-0.5, 1.5] | sum to"),
    "no weight": (weights, (X, tensor([0.0, 0.0])), "'w' | Simplex | [0, 0]"),
    "falling": (
        located,
        (X, tensor([1.0, 0.0]), dist.constraints.ordered_vector),
        "'m' | OrderedVector | .sort()",
    ),
    "indefinite": (
        matrix,
        (PAIRS, tensor([[1.0, 2.0], [2.0, 1.0]]), constraints.positive_definite),
        "'S' | PositiveDefinite | [[1, 2], [2, 1]]",
    ),
    "negative factor": (
        matrix,
        (PAIRS, tensor([[-1.0, 0.0], [0.3, 1.0]]), constraints.lower_cholesky),
        "'S' | LowerCholesky | cholesky",
    ),
    "NaN": (located, (X, tensor([0.0, torch.nan])), "'m' | 1 of 2 numbers is NaN"),
    "number": (located, (X, 7.0), "'m' | of type float, not a tensor | as_tensor"),
    "list": (located, (X, [7.0, 8.0]), "'m' | of type list, not a tensor"),
    "array": (lambda x: located(x, numpy.ones(2)), (X,), "'m' | of type ndarray, not a tensor"),
    "function": (located, (X, lambda: 7.0), "'m' | of type float, not a tensor"),
    "integers": (located, (X, tensor([0, 1])), "floating point"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_start_from_which_nothing_moves_is_refused_and_forgotten(case: str) -> None:
    model, args, words = REFUSED[case]
    with pytest.raises(PyroEMError) as caught:
        fit(model, *args)
    assert type(caught.value) in (ModelError, DataError)
    text = str(caught.value)
    assert [w for w in words.split(" | ") if w not in text] == [], text
    assert list(pyro.get_param_store().keys()) == [], "a second call would meet the bad start"


def test_a_guide_is_looked_at_too() -> None:
    def model(x: Tensor) -> None:
        h = pyro.sample("h", dist.Beta(2.0, 2.0))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        m = pyro.param("m", tensor(3.0), constraint=constraints.unit_interval)
        pyro.sample("h", dist.Delta(m))

    with pytest.warns(PyroEMWarning, match="parameter 'm': its initial value is outside"):
        ExactPosteriorEM(model, guide).plan(X)


def test_a_module_keeps_what_it_holds() -> None:
    class Model(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def forward(self, x: Tensor) -> None:
            loc = self.net(x[:, None])[:, 0]
            s = pyro.param("s", tensor(-1.0), constraint=constraints.positive)
            with pyro.plate("n", len(x)):
                pyro.sample("x", dist.Normal(loc, s), obs=x)

    with pytest.raises(ModelError, match="parameter 's': its initial value is outside"):
        fit(Model(), X)
    assert "s" not in pyro.get_param_store()
