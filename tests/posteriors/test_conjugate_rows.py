"""Conjugate latents on sums over rows, against the steps through tables of all rows."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

import pyro_em.posteriors.conjugates.conjugate_slices as conjugate_slices
from pyro_em import ExactPosteriorEM
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.fitting.steps.em_on_sums import on_sums
from pyro_em.plan.program import Program

N = 90

Model = Callable[[], None]


def positive(name: str, *value: float) -> Tensor:
    start = torch.tensor(value if len(value) > 1 else value[0], dtype=torch.float64)
    return pyro.param(name, start, constraint=constraints.positive)


def rate(shape: float = 1.2) -> Tensor:
    return pyro.sample("rate", dist.Gamma(positive("a", shape), positive("b", 0.7)))


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.poisson(3 * torch.rand(N, generator=(g := torch.Generator().manual_seed(0))), g)


@pytest.fixture(scope="module")
def y() -> Tensor:
    return torch.randn(N, 2, generator=torch.Generator().manual_seed(1)).double()


def counts(x: Tensor, y: Tensor) -> Model:
    def model() -> None:
        with pyro.plate("rows", N):
            pyro.sample("x", dist.Poisson(rate()), obs=x)

    return model


def weighed_and_masked(x: Tensor, y: Tensor) -> Model:
    units, seen = y[:, 0].exp(), y[:, 1] < 1
    weights = 1 + torch.arange(N) % 3

    def model() -> None:
        with pyro.plate("rows", N), poutine.scale(scale=weights.double()):
            here = rate()
            with poutine.mask(mask=seen):
                pyro.sample("x", dist.Poisson(here * units), obs=x.double())
            pyro.sample("wait", dist.Exponential(here), obs=units)

    return model


def of_groups(x: Tensor, y: Tensor) -> Model:
    group = torch.arange(N).flip(0) * 7 % 10

    def model() -> None:
        with pyro.plate("groups", 10):
            here = rate()
        with pyro.plate("rows", N):
            pyro.sample("x", dist.Poisson(here[group]), obs=x)

    return model


def in_plates(x: Tensor, y: Tensor) -> Model:
    times = x.reshape(N // 3, 3)

    def model() -> None:
        with pyro.plate("litters", N // 3, dim=-2):
            alpha = positive("a", 1.5), positive("b", 2.0)
            p = pyro.sample("p", dist.Beta(*alpha))
            with pyro.plate("each", 3, dim=-1):
                pyro.sample("x", dist.Binomial(6.0, p), obs=times)

    return model


def precisions(x: Tensor, y: Tensor) -> Model:
    def model() -> None:
        with pyro.plate("rows", N):
            variance = pyro.sample("v", dist.InverseGamma(positive("a", 3.0), positive("b", 2.0)))
            pyro.sample("y", dist.Normal(0.5, variance.sqrt()), obs=y[:, 0])

    return model


def simplexes(x: Tensor, y: Tensor) -> Model:
    shares = torch.stack([x, x.flip(0), x.roll(1)], -1).double()
    value = torch.where(shares.sum(-1, keepdim=True) > 0, shares, torch.ones(3).double())

    def model() -> None:
        with pyro.plate("rows", N):
            theta = pyro.sample("theta", dist.Dirichlet(positive("a", 1.0, 2.0, 3.0)))
            pyro.sample("x", dist.Multinomial(50, theta, validate_args=False), obs=value)

    return model


def halves(x: Tensor, y: Tensor) -> Model:
    """Numbers of events that are not whole, of which each row has its own."""
    parts = 0.3 + y[:, 0].abs()

    def model() -> None:
        with pyro.plate("rows", N):
            pyro.sample("x", dist.Gamma(parts, rate()), obs=1 + x.double())

    return model


def matrices(x: Tensor, y: Tensor) -> Model:
    def model() -> None:
        V = pyro.param("V", torch.eye(2).double(), constraint=constraints.positive_definite)
        with pyro.plate("rows", N):
            L = pyro.sample("L", dist.Wishart(torch.tensor(4.0).double(), V))
            pyro.sample("y", dist.MultivariateNormal(y.new_zeros(2), precision_matrix=L), obs=y)

    return model


def tails(x: Tensor, y: Tensor) -> Model:
    """Student's t by its scales; two rows share one, some are masked, and rows have weights."""
    seen, weights = x.reshape(N // 2, 2) < 3, 1 + torch.arange(N // 2) % 3

    def model() -> None:
        nu, s = positive("nu", 4.0), positive("s", 1.5)
        m = pyro.param("m", torch.tensor(0.3).double())
        with (
            pyro.plate("rows", N // 2, dim=-2),
            poutine.scale(scale=weights.double().unsqueeze(-1)),
        ):
            w = pyro.sample("w", dist.Gamma(nu / 2, nu / 2))
            with pyro.plate("each", 2, dim=-1), poutine.mask(mask=seen):
                value = y[:, 0].reshape(N // 2, 2)
                pyro.sample("y", dist.Normal(m, s * w.rsqrt()), obs=value)

    return model


def robust_regression(x: Tensor, y: Tensor) -> Model:
    """Covariates and known factors of the spread differ between rows; a second site is fixed."""
    z, units = torch.stack([torch.ones(N), x], -1).double(), y[:, 1].exp()

    def model() -> None:
        beta = pyro.param("beta", torch.zeros(2).double())
        with pyro.plate("rows", N):
            v = pyro.sample("v", dist.InverseGamma(positive("a", 2.0), positive("b", 2.0)))
            spread = positive("s", 0.8) * units * v.sqrt()
            pyro.sample("y", dist.Normal(z @ beta, spread), obs=y[:, 0])

    return model


@pytest.mark.filterwarnings("ignore:Singular sample detected")
@pytest.mark.parametrize(
    "make",
    [
        counts,
        weighed_and_masked,
        of_groups,
        in_plates,
        precisions,
        simplexes,
        halves,
        matrices,
        tails,
        robust_regression,
    ],
)
def test_steps_on_sums_over_rows_are_those_through_tables(
    make: Callable[[Tensor, Tensor], Model],
    x: Tensor,
    y: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conjugate_slices, "MANY_ROWS", 32)  # several slices, not all of one length
    program = ExactPosteriorEM(make(x, y))._ready((), {})
    assert isinstance(program, Program) and program.kernel.name == "conjugate"
    quick, sound = on_sums(program), ByTracing(program)
    assert quick is not None
    one, two = quick.e_step(), sound.e_step()
    for _ in range(2):
        assert one.objective == pytest.approx(two.objective, rel=1e-12)
        one, bound = quick.step(one)
        two, expected = sound.step(two)
        assert bound == pytest.approx(expected, rel=1e-12)
    assert one.objective == pytest.approx(two.objective, rel=1e-12)
    for name, value in one.values.items():
        torch.testing.assert_close(value, two.values[name], rtol=1e-12, atol=0)


def test_the_posterior_of_a_fit_on_sums_is_that_of_each_row(x: Tensor, y: Tensor) -> None:
    em = ExactPosteriorEM(counts(x, y))
    result = em.fit(max_steps=2, tol=0.0)
    a, b = (pyro.param(n).detach() for n in "ab")
    torch.testing.assert_close(result.posterior.mean("rate"), (a + x.double()) / (b + 1))
    torch.testing.assert_close(em.posterior().mean("rate"), (a + x.double()) / (b + 1))
