"""Runs that confirm a fit with Gaussian latents find whatever is otherwise in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, PyroEMWarning, vectorized_markov

Y = torch.from_numpy(np.random.default_rng(0).normal(size=10).cumsum())


def counting(otherwise: str, after: float) -> tuple[Callable[[Tensor], None], list[int]]:
    """A local level that does something else from some run on, and how often it has run."""
    runs = [0]

    def model(y: Tensor) -> None:
        runs[0] += 1
        q = pyro.param("q", lambda: torch.tensor(1.0), constraint=constraints.positive)
        r = pyro.param("r", lambda: torch.tensor(1.0), constraint=constraints.positive)
        now = otherwise if runs[0] > after else ""
        h = None
        for t in vectorized_markov("time", len(y)):
            mean = torch.tensor(0.0) if h is None else h
            mean = 0.9 * mean if now == "a coefficient" else mean
            mean = mean + 0.1 if now == "an offset" else mean
            h = pyro.sample(f"h_{t}", dist.Normal(mean, q * (1.1 if now == "a spread" else 1.0)))
            seen = y[t] + 0.1 if now == "what is observed" else y[t]
            pyro.sample(f"y_{t}", dist.Normal(h, r), obs=seen)

    return model, runs


def fitted(model: Callable[[Tensor], None]) -> EMResult:
    pyro.clear_param_store()
    result = ExactPosteriorEM(model).fit(Y, max_steps=2, tol=0)
    assert isinstance(result, EMResult)
    return result


@pytest.mark.parametrize("what", ["a coefficient", "an offset", "a spread", "what is observed"])
def test_a_change_between_steps_is_told_and_the_model_is_run_at_each_step(what: str) -> None:
    model, runs = counting("", np.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted(model)
    changing, _ = counting(what, runs[0] - 1)  # in the last run, which confirms the last step
    with pytest.warns(PyroEMWarning, match="computed from the parameters"):
        fitted(changing)
