"""Elementwise functions of several parameters: as they are read, and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.binding import joined
from pyro_em.graph.bindings.expression import UNARY, Expression, Jet, leaf, number
from pyro_em.graph.bindings.useful import Useful

Made = Callable[[Tensor, Tensor], Tensor]

Z = torch.tensor([[0], [2], [1]])

READ: dict[str, Made] = {
    "a quotient": lambda a, m: a[Z] / m[Z],
    "a constant in a factor": lambda a, m: (1 - m[Z]) * a[Z],
    "constants inside and out": lambda a, m: 2 * a[Z] / (m[Z] + a[Z] + 3) - 0.25,
    "a sum whose constant is deep": lambda a, m: (m[Z] - 1.5) + a[Z].log(),
    "a tensor of constants": lambda a, m: torch.tensor([[1.0], [2.0], [4.0]]) * a[Z] * m[Z],
    "powers and a shift": lambda a, m: m.log()[Z] - (a**2 / 2)[Z],
    "one of all": lambda a, m: a[0] * m.unsqueeze(-1).expand(3, 2),
    "a column of a stack": lambda a, m: torch.stack([a * m, m], -1)[:, 0],
    "a mean of a Weibull": lambda a, m: m / torch.lgamma(1 + 1 / a).exp(),
    "divided by": lambda a, m: torch.ones(3) / (a * m.sigmoid()),
}


@pytest.mark.parametrize("name", READ)
def test_expressions_are_read(name: str) -> None:
    leaves = {
        "a": torch.tensor([0.5, 1.5, 2.5], requires_grad=True),
        "m": torch.tensor([0.2, 0.7, 0.4], requires_grad=True),
    }
    binding = bind(READ[name](*leaves.values()), leaves, Useful(composite=True))
    assert binding.how == "composite"
    moved = {n: t.detach() * 1.3 + 0.1 for n, t in leaves.items()}
    wanted = READ[name](*moved.values())
    torch.testing.assert_close(binding.evaluate(moved), wanted)
    two = joined([binding, binding], torch.stack).mapped(lambda t: t[:1])
    torch.testing.assert_close(two.evaluate(moved)[0], wanted)


def test_other_functions_are_not() -> None:
    a, m = (torch.rand(3, requires_grad=True) for _ in range(2))
    for made in (a / m.relu(), a @ m * a, a * m.cumsum(0), torch.stack([a * m, a])[:, 1:].flip(0)):
        assert bind(made, {"a": a, "m": m}, Useful(composite=True)).how == "opaque"


@pytest.mark.parametrize("name", [*UNARY, "power"])
def test_jets_are_derivatives(name: str) -> None:
    """Against autograd, of each function inside products, sums and quotients."""
    x, y = leaf(0), leaf(1)
    inner = Expression("div", (Expression("mul", (x, x)), Expression("add", (y, number(0.5)))))
    outer = Expression(name, (inner,), -1.5)
    made = Expression("sub", (Expression("mul", (outer, y)), x))

    def value(u: Tensor) -> Tensor:
        found = made.evaluate([u[0], u[1]], [])
        assert isinstance(found, Tensor)
        return found

    at = torch.tensor([0.8, 1.1], dtype=torch.float64)
    jets = [Jet(at[i], {i: 1.0}, {}) for i in range(2)]
    found, first, second = made.jet(jets, []).dense(2, at[0])
    torch.testing.assert_close(found, value(at))
    torch.testing.assert_close(first, torch.autograd.functional.jacobian(value, at))
    torch.testing.assert_close(second, torch.autograd.functional.hessian(value, at))
