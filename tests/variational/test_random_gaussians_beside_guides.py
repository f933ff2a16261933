"""Random linear-Gaussian programs beside a guide, against the integral that their Hessian gives.

Given what is drawn, f(h) = log p(x, h, u) is quadratic in h, so that at any h

    log ∫ exp f = f + ½ ∇fᵀ H⁻¹ ∇f + ½ d log 2π − ½ log|H|,     H = −∇²f,

which is differentiable in parameters and draws by autograd alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_em import TraceExact_ELBO

pytestmark = pytest.mark.filterwarnings("ignore::pyro_em.errors.PyroEMWarning")


@pytest.fixture(autouse=True)
def in_double() -> Iterator[None]:
    """Double precision, and an empty param store."""
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def positive(name: str, value: float) -> Tensor:
    return pyro.param(name, torch.tensor(value), constraint=constraints.positive)


def guide(y: Tensor) -> None:
    for n in "sc":
        pyro.sample(
            n, dist.LogNormal(pyro.param(f"l{n}", torch.tensor(0.1)), positive(f"q{n}", 0.3))
        )


class Program:
    """Latents of four kinds that read each other, and rows that read them.

    Coefficients are constants, parameters (some of them zero) and functions of draws.
    """

    def __init__(self, seed: int) -> None:
        choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        self.rows, self.groups = choose.choice([3, 6]), choose.choice([2, 3])
        self.group = torch.randint(self.groups, (self.rows,), generator=generator)
        self.x, self.y, self.weights = normal(self.rows, 3), normal(self.rows), normal(3, 2)
        self.x[0, 0] = 0.0
        self.kinds = [choose.choice(["number", "vector"]) for _ in range(choose.randint(1, 3))]
        self.plated = [choose.random() < 0.5 for _ in self.kinds]
        self.parents = [[j for j in range(i) if choose.random() < 0.6] for i in range(3)]
        self.reads = [i for i in range(len(self.kinds)) if choose.random() < 0.8] or [0]
        self.start = [0.0 if choose.random() < 0.3 else float(normal()) for _ in range(4)]
        self.coefficients = [choose.randrange(5) for _ in range(40)]

    def __call__(self, y: Tensor) -> None:
        p = [pyro.param(f"p{i}", torch.tensor(v)) for i, v in enumerate(self.start)]
        noise = positive("noise", 0.8)
        s, c = pyro.sample("s", dist.Gamma(2.0, 2.0)), pyro.sample("c", dist.Gamma(3.0, 2.0))
        given = [p[0], p[1] * s, torch.tensor(1.3), s / (1 + c), p[2].exp() * c - p[3]]
        each = (given[k] for k in self.coefficients)
        groups, seen = pyro.plate("groups", self.groups), list[Tensor]()
        for i, kind in enumerate(self.kinds):
            loc, scale = next(each), next(each) ** 2 + 0.3
            for j in self.parents[i]:
                if self.plated[i] or not self.plated[j]:
                    loc = loc + next(each) * seen[j]
            if kind == "vector":
                loc = (loc * torch.ones(self.groups if self.plated[i] else ())).unsqueeze(-1)
                fn = dist.Normal(loc * torch.ones(2), scale).to_event(1)
            else:
                fn = dist.Normal(loc, scale)
            if self.plated[i]:
                with groups:
                    h = pyro.sample(f"h{i}", fn)
            else:
                h = pyro.sample(f"h{i}", fn)
            seen.append((h * self.weights[i]).sum(-1) if kind == "vector" else h)
        with pyro.plate("rows", self.rows):
            loc = next(each) * self.x[:, 1]
            for m, i in enumerate(self.reads):
                h = seen[i][self.group] if self.plated[i] else seen[i]
                loc = loc + next(each) * self.x[:, m] * h
            pyro.sample("y", dist.Normal(loc, noise * (0.5 + s * c)), obs=y)


def integrated(program: Program, seed: int) -> Tensor:
    """−ELBO at one draw of the guide, with its gradient."""
    pyro.set_rng_seed(seed)
    drawn = poutine.trace(guide).get_trace(program.y)
    at_draw = poutine.replay(program, drawn)
    sites = poutine.trace(at_draw).get_trace(program.y).nodes
    shapes = {n: sites[n]["value"].shape for n in sites if n.startswith("h")}
    sizes = [s.numel() for s in shapes.values()]

    def log_joint(flat: Tensor) -> Tensor:
        parts = zip(shapes, flat.split(sizes), strict=True)
        values = {n: part.reshape(shapes[n]) for n, part in parts}
        run: Callable[..., Any] = poutine.condition(at_draw, values)
        return poutine.trace(run).get_trace(program.y).log_prob_sum()

    h = torch.zeros(sum(sizes), requires_grad=True)
    f = log_joint(h)
    (slope,) = torch.autograd.grad(f, h, create_graph=True)
    rows = [torch.autograd.grad(d, h, create_graph=True)[0] for d in slope]
    curvature = -torch.stack(rows)
    total = f + 0.5 * slope @ torch.linalg.solve(curvature, slope)
    total = total + 0.5 * len(h) * math.log(2 * math.pi) - 0.5 * torch.logdet(curvature)
    return drawn.log_prob_sum() - total


@pytest.mark.parametrize("seed", range(6))
def test_a_random_program_beside_a_guide(seed: int) -> None:
    program, loss = Program(seed), TraceExact_ELBO()
    loss.loss(program, guide, program.y)
    store = pyro.get_param_store()._params
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(program, guide, program.y)
    gradients = {n: p.grad for n, p in store.items()}
    for p in store.values():
        p.grad = None
    by_hand = integrated(program, seed)
    by_hand.backward()
    assert value == pytest.approx(float(by_hand.detach()), rel=1e-9, abs=1e-9)
    for name, p in store.items():
        want = torch.zeros_like(p) if p.grad is None else p.grad
        got = torch.zeros_like(p) if gradients[name] is None else gradients[name]
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-8), name
