"""What BIC counts: rows that were seen, numbers that the data can tell."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule
from torch import Tensor
from torch.distributions import constraints

from pyro_em import ExactPosteriorEM, UsageError, vectorized_markov

X = torch.tensor([0.1, 0.2, 3.0, 3.3, -0.4, 2.7, 2.9, 0.0])
SEEN = torch.tensor([True, True, True, True, False, True, False, True])


def _mixture(x: Tensor, seen: Any, K: int = 2, w: Tensor | None = None, scale: Any = None) -> None:
    start = torch.ones(K) / K if w is None else w
    w = pyro.param("w", start.clone(), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.arange(float(K)) * 3)
    with pyro.plate("n", len(x)), poutine.scale(scale=1.0 if scale is None else scale):
        z = pyro.sample("z", dist.Categorical(w))
        with poutine.mask(mask=seen):
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)


def test_rows_that_are_masked_whole_do_not_count() -> None:
    result = ExactPosteriorEM(_mixture).fit(X, SEEN, max_steps=3, tol=0)
    assert result.num_rows == 6
    assert result.num_free_parameters == 3
    assert result.log_evidence is not None
    assert result.bic == pytest.approx(-2 * result.log_evidence + 3 * math.log(6))
    short = ExactPosteriorEM(_mixture).fit(X[SEEN], True, max_steps=3, tol=0)
    assert "N = 6" in str(result)
    assert short.num_rows == 6


def test_weighted_rows_keep_their_weights() -> None:
    weights = torch.arange(1.0, 9.0)
    result = ExactPosteriorEM(_mixture).fit(X, SEEN, scale=weights, max_steps=2, tol=0)
    assert result.num_rows == float(weights[SEEN].sum())


@pytest.mark.parametrize("how", ["cells", "obs_mask", "two sites"])
def test_a_row_counts_if_anything_in_it_is_seen(how: str) -> None:
    x = torch.stack([X, -X], -1)
    seen = torch.stack([SEEN, torch.tensor([True] * 4 + [True, False, False, False])], -1)

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(2))
        with pyro.plate("n", len(x)):
            if how == "cells":
                pyro.sample("x", dist.Normal(mu, 1.0).mask(seen).to_event(1), obs=x)
                return
            for d in range(2):
                if how == "obs_mask":
                    pyro.sample(f"x{d}", dist.Normal(mu[d], 1.0), obs=x[:, d], obs_mask=seen[:, d])
                else:
                    pyro.sample(f"x{d}", dist.Normal(mu[d], 1.0).mask(seen[:, d]), obs=x[:, d])

    result = ExactPosteriorEM(model).fit(x)
    assert result.num_rows == 7
    assert result.num_free_parameters == 2


def test_turns_of_a_loop_that_are_masked_do_not_count() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        for i in pyro.plate("n", len(x)):
            z = pyro.sample(f"z_{i}", dist.Categorical(torch.tensor([0.5, 0.5])))
            pyro.sample(f"x_{i}", dist.Normal(mu[z], 1.0).mask(bool(SEEN[i])), obs=x[i])

    assert ExactPosteriorEM(model).fit(X, max_steps=2, tol=0).num_rows == 6


def test_sequences_without_a_step_do_not_count() -> None:
    lengths = torch.tensor([3, 0, 2, 1])
    A = torch.tensor([[0.8, 0.2], [0.3, 0.7]])

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        with pyro.plate("sequences", 4):
            z: Any = None
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=t < lengths):
                    z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
                    pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[:, t])

    result = ExactPosteriorEM(model).fit(X[:4, None].expand(4, 3) + 0.1, max_steps=2, tol=0)
    assert result.num_rows == 3


@pytest.mark.filterwarnings("ignore:.*no observation had any weight")
def test_a_component_that_is_a_structural_zero_has_no_parameters() -> None:
    w = torch.tensor([0.5, 0.0, 0.5])
    result = ExactPosteriorEM(_mixture).fit(X, True, 3, w, max_steps=2, tol=0)
    assert result.num_free_parameters == 1 + 2
    full = ExactPosteriorEM(_mixture)
    pyro.clear_param_store()
    assert full.fit(X, True, 3, max_steps=2, tol=0).num_free_parameters == 2 + 3


@pytest.mark.filterwarnings("ignore:.*no observation had any weight")
def test_states_that_no_path_reaches_have_no_parameters() -> None:
    """State 2 is never entered: its row of transitions and its mean are not read."""
    start = torch.tensor([0.5, 0.5, 0.0])
    table = torch.tensor([[0.7, 0.3, 0.0], [0.4, 0.6, 0.0], [0.2, 0.3, 0.5]])

    def model(x: Tensor) -> None:
        A = pyro.param("A", table.clone(), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 3.0, 6.0]))
        z: Any = None
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    result = ExactPosteriorEM(model).fit(X, max_steps=2, tol=0)
    assert result.num_free_parameters == 2 + 2


@pytest.mark.filterwarnings("ignore:.*no observation had any weight")
@pytest.mark.parametrize("kind", ["selection", "map", "affine", "opaque", "no family"])
def test_elements_that_are_never_indexed_do_not_count(kind: str) -> None:
    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0, 6.0, 9.0]))
        pyro.param("unused", torch.zeros(5))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.5, 0.5])))
            if kind == "selection":
                fn: Any = dist.Normal(mu[z], 1.0)
            elif kind == "map":
                fn = dist.Normal((mu / 5).exp()[z], 1.0)
            elif kind == "affine":
                fn = dist.Normal(mu[z] + 2 * mu[0], 1.0)
            elif kind == "opaque":
                fn = dist.Normal((mu * mu.cos())[z], 1.0)
            else:
                fn = dist.StudentT(4.0, mu[z], 1.0)
            pyro.sample("x", fn, obs=x)

    assert ExactPosteriorEM(model).fit(X, max_steps=2, tol=0).num_free_parameters == 2


def test_features_that_are_never_seen_have_no_parameters() -> None:
    x = torch.stack([X, X, X], -1)
    seen = torch.ones(8, 3, dtype=torch.bool)
    seen[:, 1] = False

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.zeros(3))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).mask(seen).to_event(1), obs=x)

    with pytest.warns(match="no observation had any weight"):
        result = ExactPosteriorEM(model).fit(x, max_steps=2, tol=0)
    assert result.num_free_parameters == 2
    assert result.num_rows == 8


def test_a_network_counts_whole() -> None:
    class Network(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Sequential(
                torch.nn.Linear(1, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1)
            )

        def forward(self, x: Tensor, y: Tensor) -> None:
            pyro.module("net", self.net)
            with pyro.plate("n", len(x)):
                pyro.sample("y", dist.Normal(self.net(x[:, None]).squeeze(-1), 1.0), obs=y)

    result = ExactPosteriorEM(Network()).fit(X.double(), X.double() + 1, max_steps=1, tol=0)
    assert result.num_free_parameters == 10


@pytest.mark.parametrize("loop", ["loop", "over indices"])
def test_steps_of_one_series_are_counted(loop: str) -> None:
    """One series of states: N counts its observed steps, and any other N can be stated."""
    seen = torch.tensor([True] * 5 + [False] + [True] * 2)

    def model(x: Tensor) -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 3.0]))
        A, z = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), 0
        steps = vectorized_markov("t", 8) if loop == "over indices" else pyro.markov(range(8))
        for t in steps:
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0).mask(seen[t]), obs=x[t])

    result = ExactPosteriorEM(model).fit(X, max_steps=2, tol=0)
    found, stated = result.criteria(), result.criteria(n=100)
    assert result.num_rows == found.n == 7 and "N counts the steps of one series" in str(result)
    assert found.bic == result.bic == pytest.approx(found.aic + 2 * (math.log(7) - 2))
    assert stated.bic == pytest.approx(stated.aic + 2 * (math.log(100) - 2))
    assert found.entropy == pytest.approx(result.posterior.entropy())
    assert found.icl == result.icl == pytest.approx(found.bic + 2 * found.entropy)
    with pytest.raises(UsageError, match="n=0 is no number of rows"):
        result.criteria(n=0)


def test_what_is_counted_late_is_the_count_of_the_fit():
    """p is counted when it is asked for: neither data nor parameters of then enter."""

    def model(x):
        w = pyro.param("w", torch.tensor([0.5, 0.5, 0.0]), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([0.0, 3.0, 6.0]))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.linspace(-1, 4, 20)
    fits = [ExactPosteriorEM(model).fit(x, max_steps=2, progress=False) for _ in range(2)]
    early = fits[0].num_free_parameters
    x.fill_(torch.nan)
    with torch.no_grad():
        pyro.get_param_store()._params["w"].fill_(0.0)
        pyro.get_param_store()._params["mu"].fill_(torch.nan)
    pyro.clear_param_store()
    assert early == 3  # two weights that are free to sum to one, two means: the third is not read
    assert fits[1].num_free_parameters == early
