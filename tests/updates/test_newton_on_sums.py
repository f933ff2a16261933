"""Newton steps on sums: against known roots, another update of the same maximum, and without one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import digamma
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, DegenerateError, ExactPosteriorEM, Gradient, Newton, PyroEMError
from pyro_em.updates.linear_cells.blocks import Problem
from pyro_em.updates.update import NewtonOnSums

Emission = Callable[[Tensor], dist.TorchDistribution]


def positive(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64), constraint=C.positive)


def mixture(x: Tensor, emission: Emission, K: int = 2) -> None:
    w = pyro.param("w", torch.full((K,), 1 / K, dtype=torch.float64), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", emission(z), obs=x)


def gammas(x: Tensor) -> None:
    mixture(x, lambda z: dist.Gamma(positive("a", 1.0, 2.0)[z], positive("b", 1.0, 0.5)[z]))


def two_gammas(n: int = 60) -> Tensor:
    torch.manual_seed(0)
    shape, rate = torch.tensor([3.0, 9.0]).double(), torch.tensor([2.0, 1.0]).double()
    return dist.Gamma(shape, rate).sample((n,)).reshape(-1)


def two_points(shape: float) -> list[float]:
    """Two numbers whose mean and mean logarithm are those of a Gamma of this shape: fitted exactly.

    With m ± d: log mean − mean log = −½ log(1 − d²) = log α − ψ(α).
    """
    below = math.exp(-2 * (math.log(shape) - float(digamma(shape))))  # 1 − d²
    small = below / (1 + math.sqrt(1 - below))  # 1 − d, which does not cancel
    return [3.0 * small, 3.0 * (2 - small)]


def test_shapes_from_tiny_to_huge() -> None:
    """Each component from the same start, by its two data."""
    shapes = [3e-3, 0.05, 1.0, 40.0, 1e4, 1e6]
    x = torch.tensor([two_points(s) for s in shapes], dtype=torch.float64).reshape(-1)
    K = len(shapes)

    def model(x: Tensor) -> None:
        a, b = positive("a", *[1.0] * K), positive("b", *[1.0] * K)
        mixture(x, lambda z: dist.Gamma(a[z], b[z]), K)

    em = ExactPosteriorEM(model, updates={"a": Newton()})
    assert isinstance(em.plan(x).updates["a"].update, NewtonOnSums)
    em.m_step({"z": torch.eye(K, dtype=torch.float64).repeat_interleave(2, 0)}, x)
    a, b = pyro.param("a").detach(), pyro.param("b").detach()
    for found, ratio, shape in zip(a, a / b, shapes, strict=True):
        # A shape is as precise as the difference of logarithms is, about 1 / 2 α.
        assert float(found) == pytest.approx(shape, rel=1e-10 + 1e-14 * shape)
        assert float(ratio) == pytest.approx(3.0, rel=1e-12)


def _real(name: str, *values: float) -> Tensor:
    return pyro.param(name, torch.tensor(values, dtype=torch.float64))


VARIANTS: dict[str, Emission] = {
    "one shape": lambda z: dist.Gamma(positive("a", 1.5)[0], positive("b", 1.0, 0.5)[z]),
    "logarithms and a scale": lambda z: dist.Gamma(
        _real("a", 0.0, 0.7)[z].exp(), 2 / positive("b", 1.0, 2.0)[z]
    ),
    "a constant beside": lambda z: dist.Gamma(
        torch.stack([torch.ones(()).double(), positive("a", 2.0)[0]])[z],
        positive("b", 1.0, 0.5)[z],
    ),
    "one parameter twice": lambda z: dist.Beta(
        positive("a", 1.0, 2.0)[z], positive("a", 1.0, 2.0)[z]
    ),
    "an interval": lambda z: dist.Gamma(
        pyro.param("a", torch.tensor([1.0, 2.0]).double(), constraint=C.interval(0.5, 4.0))[z],
        positive("b", 1.0, 0.5)[z],
    ),
    "angles": lambda z: dist.VonMises(_real("a", 0.0, 1.0)[z], positive("b", 1.0, 2.0)[z]),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_steps_as_by_gradients(variant: str) -> None:
    """On sums in the kernel, and by L-BFGS with Newton steps on the data through tables."""
    x = two_gammas(20)
    x = x / 20 if "twice" in variant else x.remainder(6.0) - 3 if variant == "angles" else x

    def model(x: Tensor) -> None:
        mixture(x, VARIANTS[variant])

    found = []
    for updates in ({}, {"[ab]": Gradient()}):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model, updates=updates)
        assert em.plan(x).kernel == ("contraction" if updates else "mixture")
        result = em.fit(x, max_steps=3, tol=0)
        found.append((result.history, result.params))
    (ours, values), (theirs, others) = found
    assert ours == pytest.approx(theirs, rel=1e-10)
    for name, value in values.items():
        torch.testing.assert_close(value, others[name], rtol=1e-7, atol=1e-7)


def test_chunks_are_all_of_the_data() -> None:
    x = two_gammas()
    whole = ExactPosteriorEM(gammas).fit(x, max_steps=4, tol=0)
    pyro.clear_param_store()
    parts = ExactPosteriorEM(gammas).fit(Chunks(x, rows=50), max_steps=4, tol=0)
    assert parts.history == pytest.approx(whole.history, rel=1e-12)


def test_an_end_of_the_support_is_named_with_its_row() -> None:
    x = two_gammas()
    x[17] = 0.0
    em = ExactPosteriorEM(gammas)
    with pytest.raises(PyroEMError, match=r"n = 17.*edge of the support of Gamma"):
        em.step(x)

    def betas(x: Tensor) -> None:
        mixture(x, lambda z: dist.Beta(positive("a", 1.0, 2.0)[z], positive("c", 1.0, 3.0)[z]))

    y = torch.linspace(0.05, 0.9, 40).double()
    y[5] = 1.0
    with pytest.raises(PyroEMError, match=r"n = 5"):
        ExactPosteriorEM(betas).step(y)

    def with_a_point(x: Tensor) -> None:  # a density that is finite there needs nothing
        shape = torch.tensor([1.0, 3.0]).double()
        mixture(x, lambda z: dist.Gamma(shape[z], positive("b", 1.0, 0.5)[z]))

    assert math.isfinite(ExactPosteriorEM(with_a_point).fit(x, max_steps=3).log_evidence)


def test_equal_rows_and_no_rows() -> None:
    """A component of equal rows has no maximum; one without rows keeps its parameters."""
    x = two_gammas(5)
    x[:4] = 2.5
    q = torch.zeros(10, 2, dtype=torch.float64)
    q[:4, 1] = 1.0
    q[4:, 0] = 1.0
    em = ExactPosteriorEM(gammas)
    with pytest.raises(
        DegenerateError, match="component 1: the expected log joint rises without end"
    ):
        em.m_step({"z": q}, x)
    assert pyro.param("a").tolist() == [1.0, 2.0]
    q[:] = torch.tensor([1.0, 0.0])
    em.m_step({"z": q}, x)
    assert pyro.param("a")[1] == 2.0 and pyro.param("b")[1] == 0.5 and pyro.param("a")[0] != 1.0


def test_steps_after_each_batch() -> None:
    x = two_gammas()[torch.randperm(120, generator=torch.Generator().manual_seed(0))]
    best = ExactPosteriorEM(gammas).fit(x, max_steps=60, tol=1e-3).log_evidence
    pyro.clear_param_store()
    em = ExactPosteriorEM(gammas)
    em.fit(Chunks(x, rows=40), online="incremental", num_epochs=20)
    assert em.score(x) == pytest.approx(best, abs=0.05)


def test_a_block_of_too_many_numbers_climbs_by_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(x: Tensor, tied: bool) -> None:
        b = positive("b", 1.0)[0] if tied else positive("b", *[1.0] * 300)
        mixture(x, lambda z: dist.Gamma(positive("a", *[1.0] * 300)[z], b if tied else b[z]), 300)

    monkeypatch.setattr("pyro_em.updates.decisions.together._LARGEST", 2**12)
    for tied, update in ((False, NewtonOnSums), (True, Gradient)):
        pyro.clear_param_store()
        plan = ExactPosteriorEM(model).plan(two_gammas(2), tied)
        assert isinstance(plan.updates["a"].update, update)


CONCENTRATIONS = ((1.0, 2.0, 0.5), (4.0, 1.0, 3.0))

MAXIMA: dict[str, Emission] = {
    "Gamma": lambda z: dist.Gamma(positive("a", 1.0, 2.0)[z], positive("b", 1.0, 0.5)[z]),
    "InverseGamma": lambda z: dist.InverseGamma(
        positive("a", 1.0, 2.0)[z], positive("b", 1.0, 0.5)[z]
    ),
    "Beta": lambda z: dist.Beta(positive("a", 1.0, 2.0)[z], positive("b", 1.0, 0.5)[z]),
    "Dirichlet": lambda z: dist.Dirichlet(positive("a", *CONCENTRATIONS)[z]),
    "StudentT": lambda z: dist.StudentT(
        positive("a", 3.0, 9.0)[z], positive("b", 1.0, 2.5)[z], positive("s", 1.0, 0.5)[z]
    ),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_without_a_search_is_the_one_that_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        torch.manual_seed(1)
        x = MAXIMA[name](torch.arange(200) % 2).sample().detach()
    found, told = [], []
    at_once = Problem.maximum

    def noted(self: Problem, u: Tensor) -> Tensor | None:
        told.append(at_once(self, u))
        return told[-1]

    for way in (noted, lambda self, u: None):
        monkeypatch.setattr(Problem, "maximum", way)
        pyro.clear_param_store()
        result = ExactPosteriorEM(mixture).fit(x, MAXIMA[name], max_steps=3, tol=0)
        found.append(torch.cat([v.reshape(-1) for _, v in sorted(result.params.items())]))
    assert told and all(t is not None for t in told)
    assert torch.allclose(found[0], found[1], rtol=1e-8)


def test_the_half_of_a_parameter_is_a_factor_in_float32_too() -> None:
    """Gamma(ν/2, ν/2) beside a Normal is a Student-t whose ν is found from sums over rows."""
    torch.manual_seed(3)
    y = dist.StudentT(3.0).sample((30,)).double()
    after = []
    for x in (y, y.float()):

        def model(x: Tensor) -> None:
            nu = pyro.param("nu", x.new_tensor(5.0), constraint=C.positive)
            s = pyro.param("s", x.new_tensor(1.0), constraint=C.positive)
            with pyro.plate("n", len(x)):
                u = pyro.sample("u", dist.Gamma(nu / 2, nu / 2))
                pyro.sample("x", dist.Normal(x.new_zeros(()), s / u.sqrt()), obs=x)

        pyro.clear_param_store()
        result = ExactPosteriorEM(model).fit(x, max_steps=3, tol=0, progress=False)
        assert result.params["nu"].dtype == x.dtype
        after.append(result.params["nu"].double())
    assert after[1] == pytest.approx(float(after[0]), rel=1e-4)
