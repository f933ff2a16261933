"""Figures of Gaussian latents hold the posterior's own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot
from torch import Tensor

from pyro_em import ExactPosteriorEM, UsageError, plotting


@pytest.fixture(autouse=True)
def nothing_global() -> Iterator[None]:
    matplotlib.use("Agg")
    before = dict(matplotlib.rcParams)
    yield
    pyplot.close("all")
    assert dict(matplotlib.rcParams) == before


Y = torch.tensor([2.0, -1.0, 0.5, 3.0])


def effects(y: Tensor) -> None:
    with pyro.plate("groups", 4):
        u = pyro.sample("u", dist.Normal(y.new_zeros(()), 1.0))
        v = pyro.sample("v", dist.Normal(y.new_zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(u, 1.0), obs=y)
        pyro.sample("w", dist.Normal(v.sum(-1), 1.0), obs=y)
        pyro.sample("x", dist.Normal(z, 1.0), obs=y)


def test_a_caterpillar_has_means_in_order_and_their_intervals() -> None:
    q = ExactPosteriorEM(effects).posterior(Y)
    ax = plotting.caterpillar(q, site="u", level=0.5)
    (container,) = ax.containers
    line, _, (bars,) = container.lines
    np.testing.assert_allclose(line.get_xdata(), np.sort(Y.numpy() / 2), rtol=1e-6)
    widths = [segment[1, 0] - segment[0, 0] for segment in bars.get_segments()]
    np.testing.assert_allclose(widths, 2 * 0.6744897501960817 * np.sqrt(0.5), rtol=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["1", "2", "0", "3"]
    names = ["a", "b", "c", "d"]
    ax = plotting.caterpillar(q, site="v", coordinate=1, labels=names, ordered=False)
    (container,) = ax.containers
    np.testing.assert_allclose(container.lines[0].get_xdata(), Y.numpy() / 3, rtol=1e-6)
    assert [t.get_text() for t in ax.get_yticklabels()] == names


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"site": "z"}, "'z' is a discrete latent"),
        ({"site": "v"}, "'v' is a vector of 2 numbers"),
        ({"site": "u", "level": 2.0}, "level=2.0"),
        ({"site": "u", "labels": ["a"]}, "4 elements, 1 labels"),
    ],
)
def test_what_makes_no_caterpillar_is_refused(how: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plotting.caterpillar(ExactPosteriorEM(effects).posterior(Y), **how)
    with pytest.raises(UsageError, match="no posterior with Gaussian latents"):
        plotting.caterpillar(Y, site="u")  # type: ignore[arg-type]


def test_figures_of_states_refuse_gaussian_latents() -> None:
    q = ExactPosteriorEM(effects).posterior(Y)
    for draw in (
        lambda: plotting.responsibilities(torch.zeros(4, 2), q, site="u"),
        lambda: plotting.state_probs(q, site="u"),
        lambda: plotting.state_sequence(Y, q, site="u"),
    ):
        with pytest.raises(UsageError, match="'u' is a Gaussian latent"):
            draw()


def test_loadings_are_drawn_white_at_zero() -> None:
    w = torch.tensor([[1.0, -2.0], [0.0, 0.5], [0.3, 0.0]])
    ax = plotting.loadings(w, rows=["a", "b", "c"])
    (image,) = ax.get_images()
    assert np.array_equal(np.asarray(image.get_array()), w.numpy())
    assert image.get_clim() == (-2.0, 2.0)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b", "c"]
    plotting.loadings(torch.zeros(2, 1))
    with pytest.raises(UsageError, match="1 columns, 2 in the weights"):
        plotting.loadings(w, columns=["one"])
    with pytest.raises(UsageError, match="not \\(D, q\\)"):
        plotting.loadings(w[0])
