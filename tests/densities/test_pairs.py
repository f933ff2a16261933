"""Products of pairs of features beside numpy, and the order in which they stand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pyro_em.densities import pairs
from pyro_em.densities.pairs import products, unfolding, upper_pairs, with_products


@pytest.mark.parametrize("few", [0, pairs._FEW])
@pytest.mark.parametrize("D", [1, 2, 3, 4, 7, 8])
def test_each_pair_once_in_one_order(D: int, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "_FEW", few)
    wide = torch.arange(1.0, 5 * D + 1, dtype=torch.float64).reshape(D, 5)
    device = wide.device
    for x in (wide, wide[:, 1:4], wide.reshape(5, D).T):
        i, j = (t.numpy() for t in upper_pairs(D, device))
        expected = x.numpy()[i] * x.numpy()[j]
        np.testing.assert_array_equal(products(x).numpy(), expected)
        both = with_products(x)
        np.testing.assert_array_equal(both.numpy(), np.concatenate([x.numpy(), expected]))
        assert both.is_contiguous()
    assert (i <= j).all() and len(set(zip(i, j, strict=True))) == len(i) == D * (D + 1) // 2
    square = np.zeros((D, D))
    square[i, j] = square[j, i] = np.arange(len(i))
    np.testing.assert_array_equal(unfolding(D, device).reshape(D, D).numpy(), square)
