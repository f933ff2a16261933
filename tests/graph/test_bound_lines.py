"""How parameters reach loadings: as they stand, and in programs that only look so."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, Gradient, LeastSquares
from pyro_em.plan.program import Program

ROWS, D, Q = 30, 4, 2


@pytest.fixture(autouse=True)
def start_clean(clean: None) -> Iterator[None]:
    """Each case begins with an empty param store, in double precision."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def data(rows: int = ROWS, width: int = D, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, generator=g) @ torch.randn(2, width, generator=g) + torch.randn(
        rows, width, generator=g
    )


def start(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Loadings = Callable[[Tensor, Tensor], Tensor]
LOWER = torch.ones(D, Q).tril()

LOADINGS: dict[str, Loadings] = {
    "as they stand": lambda W, V: W,
    "transposed": lambda W, V: W.T.reshape(Q, D).T,
    "some zero": lambda W, V: W * LOWER,
    "some known": lambda W, V: W * LOWER + torch.ones(D, Q).triu(1),
    "two parameters": lambda W, V: torch.cat([W[:2], V[2:]]),
    "negative": lambda W, V: -W,
    "doubled": lambda W, V: 2 * W,
    "summed": lambda W, V: W + V,
    "permuted": lambda W, V: W.flip(0)[:, [1, 0]],
    "shared": lambda W, V: W[[0, 0, 1, 1]],
    "of no use": lambda W, V: W + 0 * V,
}
NOT_BOUND: dict[str, Loadings] = {
    "looks like W": lambda W, V: W + V - V.detach(),
    "clamped far away": lambda W, V: W.clamp(max=10.0),
    "another far away": lambda W, V: torch.where(W < 10, W, W**2),
    "positive": lambda W, V: (W / 10).exp(),
}


def factors(loadings: Loadings) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        W, V = pyro.param("W", start(D, Q)), pyro.param("V", start(D, Q, seed=2))
        mu = pyro.param("mu", torch.zeros(D))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(Q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ loadings(W, V).T + mu, 0.8).to_event(1), obs=x)

    return model


def dense(x: Tensor, W: Tensor, mu: Tensor) -> float:
    covariance = W @ W.T + 0.64 * torch.eye(len(W))
    return float(dist.MultivariateNormal(mu, covariance).log_prob(x).sum())


@pytest.mark.parametrize("how", list(LOADINGS))
def test_loadings_are_solved_for_whatever_they_are_made_of(how: str) -> None:
    """A fixed point of the steps is a maximum of the likelihood: its gradient vanishes."""
    x, loadings = data(), LOADINGS[how]
    em = ExactPosteriorEM(factors(loadings))
    assert isinstance(em.plan(x).updates["W"].update, LeastSquares)
    result = em.fit(x, max_steps=60, tol=1e-9, acceleration="squarem")
    values = {n: v.clone().requires_grad_() for n, v in result.params.items()}
    W = loadings(values["W"], values["V"])
    covariance = W @ W.T + 0.64 * torch.eye(D)
    likelihood = dist.MultivariateNormal(values["mu"], covariance).log_prob(x).sum()
    assert result.log_evidence == pytest.approx(likelihood.item(), rel=1e-11)
    likelihood.backward()
    for name, value in values.items():
        if value.grad is not None:
            assert value.grad.abs().max().item() < 0.05, name


@pytest.mark.parametrize("how", list(NOT_BOUND))
def test_loadings_that_only_look_like_parameters_are_left_to_the_gradient(how: str) -> None:
    x, loadings = data(), NOT_BOUND[how]
    em = ExactPosteriorEM(factors(loadings))
    assert isinstance(em.plan(x).updates["W"].update, Gradient)
    pyro.get_param_store()["W"] = 12 + start(D, Q, seed=3)
    W = loadings(pyro.param("W"), pyro.param("V")).detach()
    assert em.score(x) == pytest.approx(dense(x, W, pyro.param("mu").detach()), rel=1e-9)


def test_large_loadings_are_bound_without_their_jacobian() -> None:
    """8,320 loadings: ∂a/∂θ of such a matrix would have 69 million cells."""
    width, q = 260, 32
    x = data(300, width)

    def model(x: Tensor) -> None:
        W = pyro.param("W", start(width, q))
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(q), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(h @ W.T, 0.8).to_event(1), obs=x)

    program = ExactPosteriorEM(model)._session.look((x,), {})
    assert isinstance(program, Program)
    assert isinstance(program.updates["W"].update, LeastSquares)
    assert program.lines["x"].reads[0].coefficient.how == "selection"
    assert program.log_evidence() == pytest.approx(
        dense(x, pyro.param("W").detach(), torch.zeros(width)), rel=1e-10
    )
