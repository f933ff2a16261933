"""Shapes, strides and dtypes of shadows are those of the same operations on numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM
from pyro_em.tracing import allocation, runs
from pyro_em.tracing.allocation import Shadows
from pyro_em.tracing.shadow_shapes import shadow_from

A, V, Z = torch.rand(6, 5, 4).double() + 1, torch.rand(4), torch.randint(3, (6, 1))
PD = torch.eye(4).expand(6, 4, 4)

KNOWN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "arithmetic": lambda a, v, z, m: a * v + 2 - v / 3,
    "an integer and a number": lambda a, v, z, m: z * 2.5,
    "a number that has no dimensions": lambda a, v, z, m: v * torch.tensor(2.0).double(),
    "powers": lambda a, v, z, m: 2 ** (a**2),
    "where": lambda a, v, z, m: torch.where(z.unsqueeze(-1) > 1, a, v),
    "comparisons": lambda a, v, z, m: (a > v) & (z.unsqueeze(-1) >= 0),
    "all of a row": lambda a, v, z, m: (a > v).all(-1),
    "sums": lambda a, v, z, m: a.sum(-1).sum((0, 1), keepdim=True),
    "sums of integers": lambda a, v, z, m: z.sum(),
    "means and products": lambda a, v, z, m: a.mean((0, -1)) + a.prod(1).mean(),
    "logsumexp": lambda a, v, z, m: a.logsumexp((0, 1)),
    "softmax": lambda a, v, z, m: a.softmax(-1) + a.log_softmax(1),
    "special functions": lambda a, v, z, m: a.lgamma() + torch.xlogy(v, a) + a.clamp(min=0.5),
    "a look-up": lambda a, v, z, m: a[z],
    "two look-ups": lambda a, v, z, m: a[z, z.mT],
    "a look-up of columns": lambda a, v, z, m: a[:, z],
    "in the middle": lambda a, v, z, m: a[:, z.squeeze(-1)],
    "gather": lambda a, v, z, m: a.gather(1, z.unsqueeze(-1)),
    "stacks": lambda a, v, z, m: torch.stack([a, a + v], -1),
    "joined": lambda a, v, z, m: torch.cat([a, a[:, :2]], -2),
    "products": lambda a, v, z, m: (a @ torch.ones(4, 2).double())[0] @ a.new_ones(2, 7),
    "stacks of products": lambda a, v, z, m: a @ a.mT.contiguous(),
    "by a vector": lambda a, v, z, m: a[0] @ v.double(),
    "like another": lambda a, v, z, m: torch.zeros_like(a) + torch.full_like(v, 2),
    "other dtypes": lambda a, v, z, m: a.float() + z.unsqueeze(-1).to(torch.float16),
    "Cholesky": lambda a, v, z, m: torch.linalg.cholesky_ex(m).L,
    "cumulated": lambda a, v, z, m: z.cumsum(0) + (z > 1).cumsum(0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_a_shadow_is_laid_out_as_the_numbers_are(name: str) -> None:
    expected = KNOWN[name](A, V, Z, PD)
    with pytest.MonkeyPatch.context() as patch, Shadows() as shadows:
        patch.setattr(allocation, "shadow_from", _required)
        found = KNOWN[name](
            *(shadows.instead_of(t, t.shape) for t in (A, V, Z)), _expanded(shadows)
        )
    assert found.is_meta
    assert (found.shape, found.stride()) == (expected.shape, expected.stride())
    assert found.dtype == expected.dtype


def _expanded(shadows: Shadows) -> Tensor:
    return shadows.instead_of(PD, (1, 4, 4)).expand(PD.shape)


CHEAP = [torch.ops.aten._unsafe_view.default]  # which torch does in C++


def _required(func: Any, args: Any, kwargs: Any) -> Any:
    """What the file finds, which no operation but a view may do without."""
    out = shadow_from(func, args, kwargs)
    assert out is not None or func.is_view or func in CHEAP, func
    return out


def test_what_torch_lays_out_in_another_order_is_left_to_it() -> None:
    columns = torch.empty(6, 4, 5, device="meta").mT
    z = torch.empty(6, 1, dtype=torch.int64, device="meta")
    mask = torch.empty(6, dtype=torch.bool, device="meta")
    aten = torch.ops.aten
    assert shadow_from(aten.mul.Tensor, [columns, columns], {}) is None
    assert shadow_from(aten.index.Tensor, [columns.mT, [z, None, z]], {}) is None
    assert shadow_from(aten.index.Tensor, [columns.mT, [mask]], {}) is None
    assert shadow_from(aten.rand_like.default, [columns], {}) is None
    assert shadow_from(aten.mul_.Tensor, [z, z], {}) is None


def test_planning_many_rows_asks_nothing_of_torch() -> None:
    """Torch's own functions for shadows import its compilers."""

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.param("w", torch.zeros(3, 2).double())
        S = pyro.param("S", torch.eye(2).double().repeat(3, 1, 1))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(3) / 3))
            pyro.sample("x", dist.MultivariateNormal(w[z], S[z]), obs=x)
            pyro.sample("y", dist.Bernoulli(logits=(x * w[z]).sum(-1)), obs=y)

    asked = []

    def noted(func: Any, args: Any, kwargs: Any) -> Any:
        out = _required(func, args, kwargs)
        asked.append(func)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "_PLAIN_BYTES", -1)
        patch.setattr("pyro_em.tracing.lean._LARGE", 1)
        patch.setattr(allocation, "shadow_from", noted)
        ExactPosteriorEM(model).plan(torch.randn(30, 2).double(), torch.ones(30))
    assert torch.ops.aten.linalg_cholesky_ex.default in asked
