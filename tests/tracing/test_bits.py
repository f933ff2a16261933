"""What images of bits cost in one compiled pass, against the same in double precision."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_em import ExactPosteriorEM
from pyro_em.tracing import bits
from pyro_em.tracing.bits import is_compiled, lost_bits

pytest.importorskip("numba")

ROWS, SIZE = 128, 1024


def images(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits and bits, as many as a compiled loop takes."""
    g = torch.Generator().manual_seed(seed)
    logits = 6 * torch.randn(ROWS, SIZE, generator=g, dtype=torch.float32)
    return logits, (torch.rand(ROWS, SIZE, generator=g) < 0.3).float()


def cost_of(logits: Tensor, x: Tensor, event_dim: int = 1) -> Tensor:
    with pyro.validation_enabled(False):
        found = lost_bits(dist.Bernoulli(logits=logits).to_event(event_dim), x)
    assert found is not None and found[1] == 0
    return found[0]


def test_cost_and_slope_are_those_of_double_precision() -> None:
    logits, x = images()
    logits[0, :8] = torch.tensor([0.0, -0.0, 88.0, -88.0, 110.0, -110.0, 1e-30, -1e-5])
    logits[1] = torch.where(x[1] == 1, 25.0, -25.0)  # all foretold: what is lost is 1e-8 in all
    logits.requires_grad_()
    assert is_compiled(logits, x)
    cost = cost_of(logits, x)
    exact = logits.detach().double().requires_grad_()
    each = softplus((1 - 2 * x.double()) * exact, threshold=1e3)
    torch.testing.assert_close(cost.double(), each.sum(-1), rtol=3e-6, atol=0.0)
    for weight in (torch.tensor(1.0), torch.linspace(-2, 3, ROWS)):
        (mine,) = torch.autograd.grad((weight * cost).sum(), logits, retain_graph=True)
        (theirs,) = torch.autograd.grad(
            (weight.double() * each.sum(-1)).sum(), exact, retain_graph=True
        )
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-6, atol=4e-7)
    (once,) = torch.autograd.grad(cost.sum(), logits, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * cost.sum(), logits)
    assert torch.equal(twice, 2 * once)


def test_each_bit_costs_what_it_does_to_the_last_digits() -> None:
    from pyro_em.tracing.numba_bits import bits_lost

    logits = torch.linspace(-80, 80, 40_001, dtype=torch.float32).unsqueeze(-1)
    x, slope, cost = (
        (logits > 0).float(),
        torch.empty_like(logits),
        torch.empty(len(logits)).float(),
    )
    bits_lost(*(t.numpy() for t in (logits.contiguous(), x, slope, cost)))
    exact = (-logits.double().abs()).exp().log1p().squeeze(-1)
    off = ((cost - exact) / exact).abs()
    assert float(off.max()) < 4e-6  # of the exponent
    for near, bound in ((1.0, 2.2e-7), (0.05, 1.2e-7)):
        assert float(off[logits.squeeze(-1).abs() < near].max()) < bound


def test_any_shape_of_an_image_and_second_derivatives() -> None:
    logits, x = (t.reshape(2, 64, 32, 32) for t in images(1))
    logits.requires_grad_()
    cost = cost_of(logits, x, 2)
    assert cost.shape == (2, 64)
    direction = torch.randn(logits.shape, dtype=torch.float32)
    (first,) = torch.autograd.grad(cost.sum(), logits, create_graph=True)
    (second,) = torch.autograd.grad((first * direction).sum(), logits)
    p = logits.detach().sigmoid()
    torch.testing.assert_close(second, p * (1 - p) * direction, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    logits, x = images()
    logits[3, 5] = broken
    x[3, 5] = float(broken < 0)
    cost = cost_of(logits.requires_grad_(), x)
    assert not torch.isfinite(cost[3])
    assert int(torch.isfinite(cost).sum()) == ROWS - 1


def test_few_bits_doubles_and_transposed_ones_take_torchs_way() -> None:
    logits, x = images()
    logits.requires_grad_()
    assert is_compiled(logits, x)
    assert not is_compiled(logits.detach(), x)
    assert not is_compiled(logits[1:], x[1:])
    assert not is_compiled(logits.double(), x.double())
    assert not is_compiled(logits.T, x.T)
    with torch.no_grad():
        assert not is_compiled(logits, x)


def test_steps_of_a_network_are_the_same_to_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five losses, and parameters that have moved as without the loop."""
    x = images()[1]
    found = []
    for few in (bits._FEW, 2**30):
        monkeypatch.setattr(bits, "_FEW", few)
        pyro.clear_param_store()
        torch.manual_seed(0)
        down, up = torch.nn.Linear(SIZE, 2).float(), torch.nn.Linear(1, SIZE).float()

        def model(x: Tensor, up: torch.nn.Module = up) -> None:
            pyro.module("up", up)
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=up(h)).to_event(1), obs=x)

        def guide(x: Tensor, down: torch.nn.Module = down) -> None:
            pyro.module("down", down)
            out = down(x)
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Normal(out[:, :1], out[:, 1:].exp()).to_event(1))

        em = ExactPosteriorEM(model, guide, lambda p: torch.optim.SGD(p, lr=1e-5))
        losses = [em.step(x) for _ in range(5)]
        found.append((torch.tensor(losses), up.weight.detach().clone()))
    for mine, theirs in zip(*found, strict=True):
        assert not torch.equal(mine, theirs)  # the loop was taken
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
