"""Figures of series hold the moments, intervals and errors that they were given."""

from __future__ import annotations

import math
from collections.abc import Iterator

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from pyro_em import ExactPosteriorEM, UsageError, plotting

Z = 1.959963984540054


@pytest.fixture(autouse=True)
def new() -> Iterator[None]:
    matplotlib.use("Agg")
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
    pyplot.close("all")


def model(y: Tensor) -> None:
    h = torch.zeros(y.shape[1:])
    for t in pyro.markov(range(len(y))):
        h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0).to_event(y.dim() - 1))
        pyro.sample(f"y_{t}", dist.Normal(h, 0.5).to_event(y.dim() - 1), obs=y[t])


def series(*shape: int) -> Tensor:
    return torch.tensor(np.random.default_rng(0).normal(size=shape)).cumsum(0)


def ends(ax, i: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """The lowest and highest point of a band at each of its places."""
    points = ax.collections[i].get_paths()[0].vertices
    at = np.unique(points[:, 0])
    inside = [points[points[:, 0] == a, 1] for a in at]
    return np.array([p.min() for p in inside]), np.array([p.max() for p in inside])


def test_a_path_has_its_mean_and_its_band() -> None:
    y = series(5)
    q = ExactPosteriorEM(model).posterior(y)
    times = [1900.0, 1901, 1902, 1903, 1904]
    ax = plotting.path(q, site="h_*", data=y, times=times, label="level")
    points, line = ax.get_lines()
    assert points.get_ydata().tolist() == y.tolist() and line.get_xdata().tolist() == times
    assert line.get_ydata().tolist() == q.mean("h_*").tolist()
    low, high = ends(ax)
    half = Z * q.covariance("h_*").sqrt().numpy()
    assert high - low == pytest.approx(2 * half)
    found = plotting.path(q.filtered("h_*"), ax, level=0.5)
    assert found is ax
    assert ax.get_lines()[2].get_ydata().tolist() == q.filtered("h_*").mean.tolist()
    low, high = ends(ax, 1)
    half = 0.6744897501960817 * q.filtered("h_*").stddev.numpy()
    assert high - low == pytest.approx(2 * half)


def test_vectors_have_a_path_for_each_entry() -> None:
    y = series(5, 2)
    q = ExactPosteriorEM(model).posterior(y)
    ax = plotting.path(q, site="h_*", label="level")
    assert [line.get_label() for line in ax.get_lines()] == ["level 1", "level 2"]
    assert ax.get_lines()[1].get_ydata().tolist() == q.mean("h_*")[:, 1].tolist()
    with pytest.raises(UsageError, match="the lengths disagree"):
        plotting.path(q, site="h_*", data=y[:3])
    with pytest.raises(UsageError, match="does not say which"):
        plotting.path(q)
    with pytest.raises(UsageError, match="neither a posterior nor"):
        plotting.path(y)
    with pytest.raises(UsageError, match="T, D"):
        plotting.path(dist.Normal(torch.zeros(3, 2, 2), 1.0))


def test_a_forecast_is_a_fan_for_each_run_of_steps() -> None:
    y = torch.cat([series(4), torch.full((3,), math.nan)])
    y[1] = math.nan
    found = ExactPosteriorEM(model).forecast(y, seed=0)
    times = torch.arange(7) + 2000
    ax = plotting.forecast(found, site="y_*", data=y, times=times, levels=(0.5,))
    points, alone, fan = ax.get_lines()
    assert np.isnan(points.get_ydata()).tolist() == y.isnan().tolist()
    assert alone.get_xdata().tolist() == [2001] and fan.get_xdata().tolist() == [2004, 2005, 2006]
    assert fan.get_ydata().tolist() == found.means["y_*"][1:].tolist()
    low, high = ends(ax, 2)
    assert low == pytest.approx(found.lower["y_*"][1:].numpy())
    assert high == pytest.approx(found.upper["y_*"][1:].numpy())
    low, high = ends(ax, 3)
    assert high == pytest.approx(found.draws["y_*"][1:].quantile(0.75, 1).numpy())
    with pytest.raises(UsageError, match="is no forecast"):
        plotting.forecast(y, site="y_*")
    with pytest.raises(UsageError, match="the lengths disagree"):
        plotting.forecast(found, site="y_*", times=times[:3])


def test_of_vectors_one_entry_is_foretold() -> None:
    y = torch.cat([series(3, 2), torch.full((2, 2), math.nan)])
    found = ExactPosteriorEM(model).forecast(y, num_samples=50, seed=0)
    ax = plotting.forecast(found, site="y_*", entry=1, data=y)
    assert ax.get_lines()[1].get_ydata().tolist() == found.means["y_*"][:, 1].tolist()
    with pytest.raises(UsageError, match="H"):
        plotting.forecast(found, site="y_*")


def test_errors_are_drawn_where_there_are_data() -> None:
    y = series(6)
    y[2] = math.nan
    q = ExactPosteriorEM(model, missing="nan").posterior(y)
    ax = plotting.prediction_errors(q, site="y_*")
    errors = q.prediction_errors("y_*")
    assert ax.get_lines()[0].get_xdata().tolist() == [0, 1, 3, 4, 5]
    assert ax.get_lines()[0].get_ydata().tolist() == errors[~errors.isnan()].tolist()
    assert ax.get_lines()[1].get_ydata() == pytest.approx([-Z, -Z])
    assert plotting.prediction_errors(errors, ax, level=0.5) is ax
    with pytest.raises(UsageError, match="errors has shape"):
        plotting.prediction_errors(errors.reshape(2, 3))
    with pytest.raises(UsageError, match="level"):
        plotting.prediction_errors(errors, level=1.5)
