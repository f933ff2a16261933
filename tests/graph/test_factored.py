"""Jacobians of many rows are held without their zeros, and are those of autograd."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.graph.bindings.autograd import bind
from pyro_em.graph.bindings.jacobian import Jacobian
from pyro_em.graph.bindings.useful import Useful
from pyro_em.plan.program import Program
from tests.benchmarks.regressions import logistic, logistic_data, logistic_steps

N, K, D = 6000, 4, 4
X = torch.randn(N, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = torch.arange(K).unsqueeze(-1)
W = torch.randn(K, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
FREE = torch.linspace(-1, 1, K, dtype=torch.float64)

Parts = Mapping[str, Tensor]

# The argument of parameters, and how many numbers of each row its Jacobians may hold.
LINES: dict[str, tuple[Callable[[Parts], Tensor], int]] = {
    "own": (lambda p: (X * p["w"][Z]).sum(-1), D),
    "with an intercept": (lambda p: p["a"][Z] + (X * p["w"][Z]).sum(-1), D),
    "some own, some shared": (
        lambda p: X @ p["w"][0] + (X[:, :2] * p["w"][1:][Z % 3, :2]).sum(-1),
        3 * D,
    ),
    "own covariates": (lambda p: (X * Z.unsqueeze(-1) * p["w"][Z]).sum(-1), K * D),
}


@pytest.mark.parametrize("name", LINES)
def test_jacobians_without_zeros_are_those_of_autograd(name: str) -> None:
    line, most = LINES[name]
    leaves = {"w": W.clone().requires_grad_(), "a": FREE.clone().requires_grad_()}
    eta = line(leaves).T  # rows first
    found = bind(eta, leaves, Useful(affine=True), plates=1)
    assert found.jacobians is not None
    held = 0
    for param, own in found.jacobians.items():
        rows = torch.tensor([0, 17, N - 1])
        dense = torch.autograd.functional.jacobian(
            lambda t, param=param: line({**leaves, param: t}).T[rows], leaves[param].detach()
        )
        assert torch.allclose(own.dense[rows], dense.flatten(2), atol=1e-12)
        assert torch.equal(own.reached(), (own.dense != 0).flatten(0, -2).any(0))
        held += own.value.untyped_storage().nbytes() // own.value.element_size()
    assert held <= most * N + 64
    assert torch.allclose(found.evaluate(leaves), eta, atol=1e-12)


def test_cells_that_differ_keep_their_own_columns() -> None:
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 7, 1, 2, generator=generator).expand(1, 7, 3, 2)
    index = torch.tensor([[0, 4], [3, 1], [2, 5]]).reshape(1, 1, 3, 2).expand(1, 7, 3, 2)
    own, theta = Jacobian(value, index, 6), torch.randn(6, generator=generator)
    expected = torch.stack([value[0, :, 0] @ theta[i] for i in index[0, 0]], -1)
    assert torch.allclose((own @ theta)[0], expected)
    assert torch.allclose((own.dense @ theta)[0], expected)
    where = torch.zeros(1, 7, 3, dtype=torch.bool)
    where[0, 2, 1] = True
    assert own.reached(where).tolist() == [False, True, False, True, False, False]
    doubled = own.times(torch.arange(7.0).reshape(1, 7, 1))
    assert torch.allclose(doubled.dense, own.dense * torch.arange(7.0).reshape(1, 7, 1, 1))


def test_a_mixture_of_many_logistic_regressions_takes_the_steps_of_numpy() -> None:
    x, y, start = logistic_data(8000, 4, 4)
    pyro.clear_param_store()
    em = ExactPosteriorEM(logistic)
    result = em.fit(x, y, start, max_steps=3, tol=0)
    even = torch.full((4,), 0.25, dtype=torch.float64).numpy()
    evidence, w = logistic_steps(x.numpy(), y.numpy(), even, start.numpy(), 3)
    assert torch.allclose(pyro.param("w"), torch.as_tensor(w), rtol=1e-6, atol=1e-7)
    assert list(result.history) == pytest.approx(evidence, rel=1e-10)
    program = em._ready((x, y, start), {})
    assert isinstance(program, Program)
    (slopes,) = [
        b.jacobians for g in program.graph.groups for b in g.bindings.values() if b.jacobians
    ]
    assert slopes["w"].value.untyped_storage().nbytes() == x.untyped_storage().nbytes()


def test_gates_of_many_rows_take_the_same_step_with_and_without_a_kernel() -> None:
    x, y, _ = logistic_data(6000, 3, 3)

    def model(x: Tensor, y: Tensor) -> None:
        v = pyro.param("v", 0.3 * W[:3, :4].clone())
        p = pyro.param("p", FREE[1:].clone().abs().clamp(0.1, 0.9), constraint=C.unit_interval)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(logits=x @ v.T))
            pyro.sample("y", dist.Bernoulli(p[z]), obs=y)

    found = {}
    for how in ("kernel", "tables"):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        if how == "kernel":
            assert em.plan(x, y).kernel == "mixture"
            em.fit(x, y, max_steps=2, tol=0)
        else:
            for _ in range(2):
                em.step(x, y)
        found[how] = pyro.param("v").detach().clone()
    off = found["kernel"] - found["tables"]
    assert torch.allclose(off, off.mean(0, keepdim=True).expand_as(off), atol=1e-6)
