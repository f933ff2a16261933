"""Arguments in which parameters meet: against scipy's maxima, and steps without sums."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import optimize, stats
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, Fixed, Gradient
from pyro_em.updates.linear_cells.blocks import Problem
from pyro_em.updates.update import ClosedForm, NewtonOnSums, Update

Emission = Callable[[Tensor], dist.TorchDistribution]


def positive(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64), constraint=C.positive)


def bounded(name: str, constraint: C.Constraint, *values: float | list[float]) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64), constraint=constraint)


def gamma(z: Tensor) -> dist.TorchDistribution:
    shape = positive("a", 1.0, 2.0)[z]
    return dist.Gamma(shape, shape / positive("m", 1.0, 4.0)[z])


def one_shape(z: Tensor) -> dist.TorchDistribution:
    shape = positive("a", 1.5)[0]
    return dist.Gamma(shape, shape / positive("m", 1.0, 4.0)[z])


def inverse_gamma(z: Tensor) -> dist.TorchDistribution:
    shape = bounded("a", C.greater_than(1.0), 2.0, 3.0)[z]
    return dist.InverseGamma(shape, (shape - 1) * positive("m", 1.0, 4.0)[z])


def beta(z: Tensor) -> dist.TorchDistribution:
    mean, size = bounded("m", C.unit_interval, 0.3, 0.6)[z], positive("k", 2.0, 5.0)[z]
    return dist.Beta(mean * size, (1 - mean) * size)


def log_odds(z: Tensor) -> dist.TorchDistribution:
    r, mean = positive("r", 1.0, 2.0)[z], positive("m", 1.0, 4.0)[z]
    return dist.NegativeBinomial(total_count=r, logits=mean.log() - r.log())


def shares(z: Tensor) -> dist.TorchDistribution:
    r, mean = positive("r", 1.0, 2.0)[z], positive("m", 1.0, 4.0)[z]
    return dist.NegativeBinomial(total_count=r, probs=mean / (mean + r))


def gamma_poisson(z: Tensor) -> dist.TorchDistribution:
    r = positive("r", 1.0, 2.0)[z]
    return dist.GammaPoisson(r, r / positive("m", 1.0, 4.0)[z])


def log_normal(z: Tensor) -> dist.TorchDistribution:
    scale = positive("s", 0.5, 0.6)[z]
    return dist.LogNormal(positive("m", 1.0, 4.0)[z].log() - scale**2 / 2, scale)


def direction(z: Tensor) -> dist.TorchDistribution:
    share = bounded("t", C.simplex, [0.2, 0.3, 0.5], [0.5, 0.3, 0.2])
    return dist.Dirichlet(positive("c", 5.0)[0] * share[z])


def variation(z: Tensor) -> dist.TorchDistribution:
    mean = positive("m", 1.0, 4.0)[z]
    return dist.Normal(mean, positive("c", 0.5)[0] * mean)


def positive_data(n: int = 20) -> Tensor:
    torch.manual_seed(0)
    shape, rate = torch.tensor([3.0, 9.0]).double(), torch.tensor([3.0, 1.5]).double()
    return dist.Gamma(shape, rate).sample((n,)).reshape(-1)


def counts(n: int = 20) -> Tensor:
    torch.manual_seed(1)
    return dist.Poisson(positive_data(n)).sample()


def shares_of_three() -> Tensor:
    x = torch.stack([positive_data(10), counts(10) + 0.5, positive_data(10).flip(0)], -1)
    return x / x.sum(-1, keepdim=True)


def model(x: Tensor, emission: Emission, apart: bool = False) -> None:
    """A mixture; where ``apart``, with weights of rows and a mask."""
    w = pyro.param("w", torch.full((2,), 0.5, dtype=torch.float64), constraint=C.simplex)
    scale = torch.linspace(0.2, 2.0, len(x)).double() if apart else 1.0
    with pyro.plate("n", len(x)), pyro.poutine.scale(scale=scale):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.poutine.mask(mask=torch.arange(len(x)) % 7 > 0 if apart else True):
            pyro.sample("x", emission(z), obs=x)


def chain(x: Tensor, emission: Emission) -> None:
    A = bounded("A", C.simplex, 0.8, 0.2)
    z = torch.tensor(0)
    for t in pyro.markov(range(len(x))):
        own = torch.stack([A, A.flip(-1)])[z]
        z = pyro.sample(f"z{t}", dist.Categorical(own), infer={"enumerate": "parallel"})
        pyro.sample(f"x{t}", emission(z), obs=x[t])


@dataclass(frozen=True)
class Case:
    """An emission by its mean, its data, and scipy's density in the parameters of its family."""

    emission: Emission
    x: Tensor
    log_density: Callable[[np.ndarray, float, float], np.ndarray]


def _negative_binomial(x: np.ndarray, r: float, odds: float) -> np.ndarray:
    return stats.nbinom.logpmf(x, r, 1 / (1 + odds))  # type: ignore[no-any-return]


CASES = {
    "Gamma": Case(gamma, positive_data(), lambda x, a, b: stats.gamma.logpdf(x, a, scale=1 / b)),
    "InverseGamma": Case(
        inverse_gamma, positive_data(), lambda x, a, b: stats.invgamma.logpdf(x, a, scale=b)
    ),
    "Beta": Case(beta, positive_data() / 20, lambda x, a, b: stats.beta.logpdf(x, a, b)),
    "logits": Case(log_odds, counts(), _negative_binomial),
    "probs": Case(shares, counts(), _negative_binomial),
    "GammaPoisson": Case(gamma_poisson, counts(), _negative_binomial),
    "LogNormal": Case(
        log_normal, positive_data(), lambda x, m, s: stats.lognorm.logpdf(x, s, scale=m)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_maximum_is_that_of_the_own_parameters(name: str) -> None:
    """A one-to-one map of two parameters changes no maximum: scipy finds it in those of the family."""
    case, N = CASES[name], len(CASES[name].x)
    q = torch.rand(N, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    q = q / q.sum(-1, keepdim=True)
    em = ExactPosteriorEM(model)
    updates = em.plan(case.x, case.emission).updates
    assert all(isinstance(u.update, NewtonOnSums) for n, u in updates.items() if n != "w")
    em.m_step({"z": q}, case.x, case.emission)
    with torch.no_grad():
        ours = (q * case.emission(torch.arange(2)).log_prob(case.x.unsqueeze(-1))).sum(0)
    for k in range(2):
        weight, x = q[:, k].numpy(), case.x.numpy()

        def loss(u: np.ndarray, weight: np.ndarray = weight, x: np.ndarray = x) -> float:
            return -float(weight @ case.log_density(x, *np.exp(u)))

        tight = {"xatol": 1e-7, "fatol": 1e-11}
        best = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options=tight)
        assert float(ours[k]) == pytest.approx(-best.fun, rel=1e-9)


@pytest.mark.parametrize("name", ["Gamma", "InverseGamma", "Beta"])
def test_a_maximum_without_a_search_is_the_one_that_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, found, told = CASES[name], [], []
    at_once = Problem.maximum

    def noted(self: Problem, u: Tensor) -> Tensor | None:
        told.append(at_once(self, u))
        return told[-1]

    for way in (noted, lambda self, u: None):
        monkeypatch.setattr(Problem, "maximum", way)
        pyro.clear_param_store()
        result = ExactPosteriorEM(model).fit(case.x, case.emission, max_steps=3, tol=0)
        found.append(torch.cat([v.reshape(-1) for _, v in sorted(result.params.items())]))
    assert told[-1] is not None
    assert torch.allclose(found[0], found[1], rtol=1e-8)


WAYS: dict[str, tuple[Emission, Tensor, dict[str, Update], bool]] = {
    "one shape": (one_shape, positive_data(), {}, False),
    "one variation": (variation, positive_data(), {}, False),
    "weights and a mask": (beta, positive_data() / 20, {}, True),
    "a point of a simplex": (direction, shares_of_three(), {}, False),
    "a fixed size": (shares, counts(), {"r": Fixed()}, True),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_steps_as_by_gradients(way: str) -> None:
    """On sums in the kernel, and by L-BFGS: through tables, where sums do not tell the density."""
    emission, x, fixed, apart = WAYS[way]
    found = []
    for wish in ({}, {"[!w]": Gradient()}):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, updates={**wish, **fixed})
        through_tables = bool(wish) and emission is not variation
        kernel = em.plan(x, emission, apart).kernel
        assert kernel == ("contraction" if through_tables else "mixture")
        found.append(list(em.fit(x, emission, apart, max_steps=3, tol=0).history))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert min(np.diff(found[0])) > 0


def test_chains_and_chunks() -> None:
    x = counts(3)
    found = []
    for wish in ({}, {"*": Gradient()}):
        pyro.clear_param_store()
        em = ExactPosteriorEM(chain, updates=wish)
        assert (em.plan(x, log_odds).kernel == "chain") == (not wish)
        found.append(list(em.fit(x, log_odds, max_steps=3, tol=0).history))
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    x, found = counts() + 1.0, []
    for data in (x, Chunks(x, rows=17)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(lambda x: model(x, variation))
        found.append(list(em.fit(data, max_steps=3, tol=0).history))
    assert found[0] == pytest.approx(found[1], rel=1e-12)


def test_what_cannot_be_solved_for_together_keeps_what_it_had() -> None:
    """Numbers of each row, and functions that are not known, climb; a mean beside is a closed form."""
    x = positive_data()
    each = torch.linspace(1.0, 2.0, len(x)).double()

    def by_row(z: Tensor) -> dist.TorchDistribution:
        scale = positive("s", 0.5, 0.6)[z] * positive("c", 1.0)[0] * each
        return dist.Normal(positive("m", 1.0, 4.0)[z], scale)

    def unknown(z: Tensor) -> dist.TorchDistribution:
        shape = positive("a", 1.0, 2.0)[z]
        return dist.Gamma(shape, shape / positive("m", 1.0, 4.0)[z].atan())

    updates = ExactPosteriorEM(model).plan(x, by_row).updates
    assert [type(updates[n].update) for n in "msc"] == [ClosedForm, Gradient, Gradient]
    assert "differs from row to row" in updates["c"].reason
    pyro.clear_param_store()
    updates = ExactPosteriorEM(model).plan(x, unknown).updates
    assert [type(updates[n].update) for n in "am"] == [Gradient, Gradient]


def test_a_number_that_the_graph_does_not_show_is_found_out() -> None:
    """A detached part moves with the parameter: a run elsewhere tells."""
    x = positive_data()

    def detached(z: Tensor) -> dist.TorchDistribution:
        shape = positive("a", 1.0, 2.0)[z]
        return dist.Gamma(shape, shape / (positive("m", 1.0, 4.0)[z] + shape.detach()))

    updates = ExactPosteriorEM(model).plan(x, detached).updates
    assert [type(updates[n].update) for n in "am"] == [Gradient, Gradient]
