"""Shapes and derivatives without sympy are torch's own."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_em.tracing.turns import Alone
from pyro_em.tracing.without_sympy import broadcast_shapes, pull_back

SHAPE = st.lists(st.sampled_from([1, 2, 3, 0]), max_size=4).map(tuple)


@settings(max_examples=60)
@given(st.lists(SHAPE, max_size=3))
def test_shapes_broadcast_as_torchs(shapes) -> None:
    try:
        expected = torch.broadcast_shapes(*shapes)
    except RuntimeError:
        with pytest.raises(RuntimeError, match="broadcast"):
            broadcast_shapes(*shapes)
    else:
        assert broadcast_shapes(*shapes) == expected
        assert isinstance(broadcast_shapes(*shapes), torch.Size)


def test_whatever_is_no_shape_is_torchs() -> None:
    assert broadcast_shapes(3, (2, 1)) == torch.broadcast_shapes(3, (2, 1))
    for wrong in ((-1,), "ab"):
        for function in (torch.broadcast_shapes, broadcast_shapes):
            with pytest.raises((RuntimeError, ValueError, TypeError)):
                function((2,), wrong)


def test_torch_is_as_it_was_after_a_call() -> None:
    before = torch.broadcast_shapes
    with pytest.raises(ValueError, match="broken off"), Alone("a"):
        with Alone("b"):
            assert torch.broadcast_shapes is broadcast_shapes
        assert torch.broadcast_shapes is broadcast_shapes
        raise ValueError("broken off")
    assert torch.broadcast_shapes is before


def test_products_with_jacobians_are_those_of_autograd() -> None:
    x = torch.randn(3, requires_grad=True)
    y, v = x.exp() * x.sum(), torch.randn(3, requires_grad=True)
    (expected,) = torch.autograd.grad(y, x, v, create_graph=True)
    found = pull_back(y, x, v, create_graph=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        pull_back(found, v, torch.ones(3)), torch.autograd.grad(expected.sum(), v)[0]
    )
    assert pull_back(y, torch.ones(1, requires_grad=True), v, allow_unused=True) is None
    with pytest.raises(RuntimeError, match="not have been used"):
        pull_back(y, torch.ones(1, requires_grad=True), v)
