"""Where fits with Gaussian latents end: criteria, boundaries, sizes that are out of the ordinary."""

from __future__ import annotations

import math

import mpmath
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sklearn.datasets import load_iris, load_wine
from torch import Tensor
from torch.distributions import constraints

from pyro_em import Chunks, ClosedForm, EMStatus, ExactPosteriorEM, PyroEMWarning

IRIS = torch.tensor(load_iris().data)
WINE = torch.tensor(load_wine().data)
# Box and Tiao (1973), table 5.1.4: simulated yields of six batches that do not differ.
DYESTUFF2 = """
    7.298 3.846 2.434 9.566 7.990 5.220 6.556 0.608 11.788 -0.892 0.110 10.386 13.434 5.510 8.166
    2.212 4.852 7.092 9.288 4.980 0.282 9.014 4.458 9.446 7.198 1.722 4.782 8.106 0.758 3.758
"""
YIELD = torch.tensor([float(y) for y in DYESTUFF2.split()], dtype=torch.float64)
BATCH = torch.arange(6).repeat_interleave(5)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def analysis(x: Tensor, W0: Tensor) -> None:
    D, q = W0.shape
    W = pyro.param("W", W0)
    mu = pyro.param("mu", x.mean(0))
    s = pyro.param("s", torch.ones(D, dtype=x.dtype), constraint=constraints.positive)
    with pyro.plate("rows", len(x)):
        h = pyro.sample("h", dist.Normal(torch.zeros(q, dtype=x.dtype), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(h @ W.T + mu, s).to_event(1), obs=x)


def intercepts(y: Tensor, group: Tensor, groups: int, mean: float = 5.0) -> None:
    mu = pyro.param("mu", y.new_tensor(mean))
    between = pyro.param("between", y.new_tensor(2.0), constraint=constraints.positive)
    within = pyro.param("within", y.new_tensor(3.0), constraint=constraints.positive)
    with pyro.plate("groups", groups):
        u = pyro.sample("u", dist.Normal(y.new_zeros(()), between))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(mu + u[group], within), obs=y)


def loadings(D: int, q: int) -> Tensor:
    return torch.randn(D, q, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_bic_counts_what_data_determine_and_the_rows_of_observations() -> None:
    """13 x 3 loadings: 3 rotations. 4 x 2: two factors are more than four variables determine."""
    result = ExactPosteriorEM(analysis).fit(WINE, loadings(13, 3), max_steps=1)
    assert (result.num_free_parameters, result.num_rows) == (13 + 13 + 36, 178)
    assert any("'W' in 3 directions" in note for note in result.plan.notes)
    pyro.clear_param_store()
    result = ExactPosteriorEM(analysis).fit(IRIS, loadings(4, 2), max_steps=1)
    assert result.num_free_parameters == 4 + 10
    pyro.clear_param_store()
    result = ExactPosteriorEM(intercepts).fit(YIELD, BATCH, 6, max_steps=1)
    assert (result.num_free_parameters, result.num_rows) == (3, 30)
    assert result.bic == pytest.approx(-2 * result.log_evidence + 3 * math.log(30))


def test_rows_count_where_they_are_seen_and_as_they_are_weighted() -> None:
    def masked(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, s))
            with poutine.mask(mask=torch.arange(len(x)) < 20), poutine.scale(scale=0 * x + 2):
                pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def chain(x: Tensor) -> None:
        s, z = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive), 0.0
        for t in range(len(x)):
            z = pyro.sample(f"z_{t}", dist.Normal(z, s))
            pyro.sample(f"x_{t}", dist.Normal(z, 1.0), obs=x[t])

    assert ExactPosteriorEM(masked).fit(YIELD, max_steps=1).num_rows == 40
    pyro.clear_param_store()
    assert ExactPosteriorEM(chain).fit(YIELD[:7], max_steps=1).num_rows == 7


def test_directions_that_only_a_sum_determines() -> None:
    def model(x: Tensor) -> None:
        a, b = (
            pyro.param(n, torch.tensor(1.0), constraint=constraints.positive) for n in ("a", "b")
        )
        with pyro.plate("rows", len(x)):
            h = pyro.sample("h", dist.Normal(0.0, a))
            pyro.sample("x", dist.Normal(h, b), obs=x)

    result = ExactPosteriorEM(model).fit(YIELD, max_steps=2)
    assert result.num_free_parameters == 1
    assert any("'a' and 'b' in 1 direction" in note for note in result.plan.notes)


def test_loadings_of_zero_are_named() -> None:
    with pytest.warns(PyroEMWarning, match="'W': the loadings of 'h' are zero, a stationary point"):
        result = ExactPosteriorEM(analysis).fit(IRIS, torch.zeros(4, 1))
    assert result.status is EMStatus.SYMMETRIC and not result.converged
    pyro.clear_param_store()
    half = torch.cat([loadings(4, 1), torch.zeros(4, 1)], 1)
    with pytest.warns(PyroEMWarning, match="'W'.*zero for 1 of its coordinates"):
        ExactPosteriorEM(analysis).fit(IRIS, half, max_steps=2)


def test_a_variance_that_vanishes_is_noted() -> None:
    """Batches that do not differ: the maximum is that of one Normal."""
    result = ExactPosteriorEM(intercepts).fit(YIELD, BATCH, 6, max_steps=40)
    best = dist.Normal(YIELD.mean(), YIELD.std(unbiased=False)).log_prob(YIELD).sum().item()
    assert best - 0.2 < result.log_evidence <= best + 1e-9
    assert any("'between'" in note and "boundary" in note for note in result.plan.notes)
    pyro.clear_param_store()
    result = ExactPosteriorEM(intercepts).fit(YIELD + 10 * BATCH, BATCH, 6, max_steps=20)
    assert not any("boundary" in note for note in result.plan.notes)


def test_a_singular_covariance_of_latents_is_a_boundary_and_no_collapse() -> None:
    """Slopes and intercepts of batches that do not differ."""
    X = torch.stack([torch.ones(30), torch.arange(30.0) % 5], -1)

    def model() -> None:
        beta = pyro.param("beta", torch.zeros(2))
        L = pyro.param("L", torch.eye(2), constraint=constraints.lower_cholesky)
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("groups", 6):
            u = pyro.sample("u", dist.MultivariateNormal(torch.zeros(2), scale_tril=L))
        with pyro.plate("rows", 30):
            pyro.sample("y", dist.Normal(X @ beta + (X * u[BATCH]).sum(-1), s), obs=YIELD)

    result = ExactPosteriorEM(model).fit(max_steps=120)
    assert result.converged
    path = torch.tensor([*result.history, result.log_evidence])
    assert path.diff().min() > -1e-9
    line = torch.linalg.lstsq(X, YIELD).solution
    plain = dist.Normal(X @ line, (YIELD - X @ line).std(unbiased=False)).log_prob(YIELD).sum()
    assert result.log_evidence == pytest.approx(plain.item(), abs=1e-2)
    assert any("'L'" in note and "singular, at the boundary" in note for note in result.plan.notes)


def test_a_heywood_case_is_noted_and_a_floor_ends_it() -> None:
    start = loadings(4, 1)
    result = ExactPosteriorEM(analysis).fit(IRIS, start, max_steps=60, acceleration="squarem")
    assert any("Heywood" in note and "'s'[2]" in note for note in result.plan.notes)
    pyro.clear_param_store()
    floored = ExactPosteriorEM(analysis, updates={"s": ClosedForm(floor=0.2)})
    result = floored.fit(IRIS, start, max_steps=30)
    assert result.params["s"].min() >= 0.2
    assert not any("Heywood" in note for note in result.plan.notes)


def test_what_all_parts_say_is_noted() -> None:
    """Batches of the first chunk that differ, and those of all others that do not."""

    def model(y: Tensor) -> None:
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        u = pyro.param("u", torch.tensor(0.5), constraint=constraints.positive)
        with pyro.plate("batches", len(y), dim=-2):
            h = pyro.sample("h", dist.Normal(0.0, u))
            with pyro.plate("times", y.shape[1], dim=-1):
                pyro.sample("y", dist.Normal(h, s), obs=y)

    noise = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    alike = noise - noise.mean(1, keepdim=True)
    apart = torch.cat([alike[:3] + torch.tensor([[-2.0], [0.0], [2.0]]), alike[3:]])
    for y, is_noted in ((alike, True), (apart, False)):
        pyro.clear_param_store()
        chunks = Chunks(y, rows=3)
        result = ExactPosteriorEM(model).fit(chunks, max_steps=5, progress=False)
        assert any("'u'" in note and "boundary" in note for note in result.plan.notes) == is_noted
    # The noise of the third coordinate is nothing beside the variance of all rows.
    start = loadings(4, 1)
    order = IRIS[:, 2].argsort()
    pyro.clear_param_store()
    whole = ExactPosteriorEM(analysis).fit(IRIS, start, max_steps=60, acceleration="squarem")
    pyro.clear_param_store()
    chunks = Chunks(IRIS[order], rows=50)
    parted = ExactPosteriorEM(analysis).fit(chunks, start, max_steps=60, acceleration="squarem")
    noted = [[n for n in r.plan.notes if "Heywood" in n] for r in (whole, parted)]
    assert noted[0] == noted[1] and len(noted[0]) == 1


@pytest.mark.parametrize(
    ("group", "groups"), [(BATCH, 9), (0 * BATCH, 1), (torch.arange(30), 30)], ids=str
)
def test_empty_groups_one_group_and_groups_of_one(group: Tensor, groups: int) -> None:
    result = ExactPosteriorEM(intercepts).fit(YIELD, group, groups, max_steps=6, tol=0)
    mu, between, within = (result.params[n] for n in ("mu", "between", "within"))
    same = (group[:, None] == group[None]).to(torch.float64)
    whole = dist.MultivariateNormal(mu.expand(30), between**2 * same + within**2 * torch.eye(30))
    assert result.log_evidence == pytest.approx(whole.log_prob(YIELD).item(), rel=1e-11)
    path = torch.tensor([*result.history, result.log_evidence])
    assert path.diff().min() > -1e-11


def test_one_row_has_no_noise_and_is_rolled_back() -> None:
    with pytest.warns(PyroEMWarning, match="'s'.*its variance collapses"):
        result = ExactPosteriorEM(analysis).fit(IRIS[:1], loadings(4, 1), max_steps=5)
    assert result.status is EMStatus.DEGENERATE and math.isfinite(result.log_evidence)


def test_single_precision() -> None:
    fine = ExactPosteriorEM(analysis).fit(IRIS, loadings(4, 1), max_steps=5, tol=0)
    pyro.clear_param_store()
    x = IRIS.float()
    result = ExactPosteriorEM(analysis).fit(x, loadings(4, 1).float(), max_steps=5, tol=0)
    assert {p.dtype for p in result.params.values()} == {torch.float32}
    assert result.log_evidence == pytest.approx(fine.log_evidence, rel=1e-5)


def test_little_noise_far_from_zero() -> None:
    """Noise of 1e-6 about 1e6, against sixty digits."""
    y = 1e6 + torch.tensor([-1.0, 0.5, 2.0])[BATCH[:15] % 3] + 1e-6 * YIELD[:15]

    def model() -> None:
        with pyro.plate("groups", 3):
            u = pyro.sample("u", dist.Normal(0.0, 1.0))
        with pyro.plate("rows", 15):
            pyro.sample("y", dist.Normal(1e6 + u[BATCH[:15] % 3], 1e-6), obs=y)

    found = ExactPosteriorEM(model).posterior().log_evidence
    with mpmath.workdps(60):
        right = mpmath.mpf(0)
        noise = mpmath.mpf(1e-6) ** 2
        for g in range(3):
            r = [mpmath.mpf(v) - 10**6 for v in y[BATCH[:15] % 3 == g].tolist()]
            n = len(r)
            square = sum(v**2 for v in r) / noise - sum(r) ** 2 / (noise * (noise + n))
            right -= (square + n * mpmath.log(2 * mpmath.pi) + mpmath.log(noise + n)) / 2
            right -= (n - 1) * mpmath.log(noise) / 2
    # The data themselves hold ten digits behind the point: nats differ by their rounding over noise.
    assert found == pytest.approx(float(right), abs=1e-6)
