"""Which unknowns belong together, against scipy's connected components, and without scipy."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pyro_em.posteriors.gaussians.block_search import components
from pyro_em.posteriors.gaussians.gaussian_layout import BlockLayout
from pyro_em.posteriors.gaussians.site_forms import SiteForm


def _pairs(how: str, n: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    if how == "path":
        return np.arange(n - 1), np.arange(1, n)
    if how == "path, shuffled":
        order = rng.permutation(n)
        return order[:-1], order[1:]
    if how == "star":
        return np.full(n - 1, 7), np.arange(n - 1)
    links = {"few": n // 3, "some": n, "none": 0}[how]
    return rng.integers(0, n, links), rng.integers(0, n, links)


@pytest.mark.parametrize("how", ["path", "path, shuffled", "star", "few", "some", "none"])
@pytest.mark.parametrize("n", [8, 20_000])
def test_components_are_those_of_scipy(how: str, n: int) -> None:
    a, b = _pairs(how, n)
    links = coo_matrix((np.ones(len(a), np.int8), (a, b)), shape=(n, n))
    _, label = connected_components(links, directed=False)
    np.testing.assert_array_equal(components([[a, b]], n), label)


def test_gaussian_latents_need_no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no requirement of the library."""
    for name in ("scipy", "scipy.sparse", "scipy.sparse.csgraph"):
        monkeypatch.setitem(sys.modules, name, None)
    layout = BlockLayout.of([SiteForm("u", rows=3, width=2, is_latent=True)])
    assert (layout.blocks, layout.largest) == (3, 2)
