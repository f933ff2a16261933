"""What ArviZ is handed, by stand-ins for its two interfaces (0.23.4 and arviz-base 0.8.2, whose objects
were looked at by hand), and draws of parameters by the moments that they are to have."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor
from torch.distributions import constraints

from pyro_em import EMResult, ExactPosteriorEM, UsageError
from pyro_em.fitting.results.asymptotic import asymptotic_draws
from pyro_em.fitting.results.inference_data import as_inference_data, inference_groups

D64 = torch.float64
TABLE = pd.DataFrame(
    np.random.default_rng(1).normal(size=(40, 2)) + np.repeat([[-2.0], [2.0]], 20, 0),
    columns=["a", "b"],
)


def mixture(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.5, 0.5], dtype=D64), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [1.0, 0.0]], dtype=D64))
    s = pyro.param("s", torch.ones(2, dtype=D64), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], s).to_event(1), obs=x)


@pytest.fixture(scope="module")
def fitted() -> EMResult:
    with pyro.get_param_store().scope():
        return ExactPosteriorEM(mixture).fit(TABLE, tol=1e-9)


def of_version_0(
    posterior=None,
    *,
    log_likelihood=None,
    observed_data=None,
    constant_data=None,
    coords=None,
    dims=None,
    attrs=None,
):
    groups = {
        "posterior": posterior,
        "log_likelihood": log_likelihood,
        "observed_data": observed_data,
        "constant_data": constant_data,
    }
    return {k: v for k, v in groups.items() if v is not None}, coords, dims


def of_version_1(data, *, name=None, coords=None, dims=None, attrs=None):
    assert set(attrs) == {"/"}
    return data, coords, dims


@pytest.mark.parametrize("convert", [of_version_0, of_version_1])
def test_groups_have_the_dimensions_of_plates_and_axes(fitted: EMResult, convert) -> None:
    labels = {"component": ["low", "high"], "rows": [f"r{i}" for i in range(40)]}
    found = inference_groups(fitted, 6, "estimates", 0, labels)
    groups, coords, dims = as_inference_data(found, convert)
    assert groups["posterior"]["z"].shape == (1, 6, 40) and dims["z"] == ["rows"]
    assert dims["mu"] == ["component", "feature"] and dims["x"] == ["rows", "feature"]
    assert coords["feature"] == ["a", "b"] and coords["component"] == ["low", "high"]
    assert coords["rows"][:2] == ["r0", "r1"]
    np.testing.assert_array_equal(groups["observed_data"]["x"], TABLE.to_numpy())
    p = {k: v.numpy() for k, v in fitted.params.items()}
    by_hand = np.log(
        sum(
            w * st.norm(mu, p["s"]).pdf(TABLE.to_numpy()).prod(1)
            for w, mu in zip(p["w"], p["mu"], strict=True)
        )
    )
    rows = groups["log_likelihood"]["log_evidence"]
    assert dims["log_evidence"] == ["rows"] and rows.shape == (1, 6, 40)
    np.testing.assert_allclose(rows[0, 3], by_hand, rtol=1e-10)
    assert "summed and integrated" in found.attrs["log_likelihood"]


def test_parameters_are_drawn_with_the_moments_of_their_estimates(fitted: EMResult) -> None:
    errors = fitted.standard_errors()
    draws = asymptotic_draws(fitted.params, fitted.forms, errors, 20_000, seed=0)
    flat = torch.cat([draws[n].reshape(20_000, -1) for n in errors], -1)
    spread = flat.std(0) / torch.cat([errors[n].reshape(-1) for n in errors])
    np.testing.assert_allclose(spread, 1.0, rtol=0, atol=0.06)
    theirs = errors.covariance / (s := errors.covariance.diagonal().sqrt()) / s.unsqueeze(-1)
    np.testing.assert_allclose(torch.corrcoef(flat.mT), theirs, rtol=0, atol=0.04)
    assert bool((draws["s"] > 0).all())
    np.testing.assert_allclose(draws["w"].sum(-1), 1.0)


def test_each_draw_of_parameters_has_its_own_evidence_and_latents(fitted: EMResult) -> None:
    before = fitted.log_evidence
    groups = inference_groups(fitted, 5, "draws", 0, None).groups
    assert set(groups) == {"posterior", "observed_data", "log_likelihood"}
    mu, rows = groups["posterior"]["mu"], groups["log_likelihood"]["log_evidence"]
    assert mu.shape == (1, 5, 2, 2) and groups["posterior"]["z"].shape == (1, 5, 40)
    drawn = {n: torch.from_numpy(groups["posterior"][n][0, 2]) for n in fitted.params}
    at = fitted.posterior_at(drawn)
    np.testing.assert_allclose(rows[0, 2], at.evidence_per_row)
    assert at.log_evidence < before == fitted.log_evidence


def test_steps_of_a_chain_are_one_variable_and_gaps_are_nan() -> None:
    def chain(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0, dtype=D64), constraint=constraints.positive)
        h = 0.0
        for t in pyro.markov(range(len(x))):
            h = pyro.sample(f"h_{t}", dist.Normal(h, s))
            pyro.sample(f"x_{t}", dist.Normal(h, 1.0), obs=x[t])

    x = torch.tensor([0.5, torch.nan, 1.5], dtype=D64)
    result = ExactPosteriorEM(chain, missing="nan").fit(x, max_steps=2)
    found = inference_groups(result, 4, "estimates", 0, None)
    assert found.groups["posterior"]["h"].shape == (1, 4, 3) and found.dims["h"] == ["h_step"]
    assert found.coords["h_step"] == [0, 1, 2]
    np.testing.assert_array_equal(found.groups["observed_data"]["x"], x.numpy())
    assert "log_likelihood" not in found.groups  # one series is one row


def test_what_cannot_be_handed_over_is_said(fitted: EMResult, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setitem(sys.modules, "arviz_base", None)
    with pytest.raises(UsageError, match="pip install arviz"):
        fitted.to_inference_data(2)
    with pytest.raises(UsageError, match="'mcmc' is neither 'estimates' nor 'draws'"):
        fitted.to_inference_data(2, parameters="mcmc")
    with pytest.raises(UsageError, match="the data came in parts"):
        replace(fitted, is_parted=True).to_inference_data(2)
    guided = ExactPosteriorEM(lines, AutoNormal, strategy="guide").fit(TABLE["a"], max_steps=2)
    found = inference_groups(guided, 3, "estimates", 0, None)
    assert found.groups["posterior"]["level"].shape == (1, 3)


def lines(x: Tensor) -> None:
    level = pyro.sample("level", dist.Normal(torch.zeros((), dtype=D64), 1.0))
    with pyro.plate("rows", len(x)):
        pyro.sample("x", dist.StudentT(4.0, level, 1.0), obs=x)
