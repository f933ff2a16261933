"""What the data do not identify has no standard error in any unit; all else has the right one."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.fitting.results.result import EMResult

X = torch.cat([torch.linspace(-3.5, -0.4, 30), torch.linspace(0.8, 3.1, 25)]).double()
UNITS = [1e-6, 1.0, 1e6]


def fitted(model: Callable[..., None], tol: float = 1e-10) -> EMResult:
    return ExactPosteriorEM(model).fit(X, tol=tol, max_steps=400, progress=False)


@pytest.mark.parametrize("tol", [1e-3, 1e-10])
@pytest.mark.parametrize("order", [[0, 0, 1], [0, 1, 0], [1, 0, 0]])
def test_components_that_are_alike_have_no_shares_of_their_own(
    order: list[int], tol: float
) -> None:
    """A flat direction of a softmax: only the sum of two weights is known."""

    def model(x: Tensor) -> None:
        start = torch.tensor([0.2, 0.3])[order] + 0.1
        w = pyro.param("w", start / start.sum(), constraint=C.simplex)
        loc = torch.tensor([-2.0, 2.0])[order]
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], 1.0), obs=x)

    errors = fitted(model, tol).standard_errors()
    alike = torch.tensor(order) == 0
    assert errors["w"][alike].isnan().all()
    assert any("not identified" in n and "'w'" in n for n in errors.notes)
    # The other weight is that of two components: the square root of its inverse information.
    p = float(fitted(model).params["w"][~alike])
    near = torch.exp(dist.Normal(2.0, 1.0).log_prob(X))
    far = torch.exp(dist.Normal(-2.0, 1.0).log_prob(X))
    information = (((near - far) / (p * near + (1 - p) * far)) ** 2).sum()
    assert float(errors["w"][~alike]) == pytest.approx(float(information) ** -0.5, rel=0.05)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("other", UNITS)
def test_a_sum_of_two_is_not_two_numbers(unit: float, other: float) -> None:
    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.1 * unit))
        b = pyro.param("b", torch.tensor(0.2 * other))
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(a / unit + b / other, s), obs=x)

    errors = fitted(model).standard_errors()
    assert math.isnan(errors["a"]) and math.isnan(errors["b"])
    s = float(X.std(correction=0))
    assert float(errors["s"]) == pytest.approx(s / math.sqrt(2 * len(X)), rel=1e-6)
    assert any("not identified" in n and "'a', 'b'" in n for n in errors.notes)


@pytest.mark.parametrize("unit", UNITS)
def test_a_number_that_cancels_is_not_identified(unit: float) -> None:
    def model(x: Tensor) -> None:
        a = pyro.param("a", torch.tensor(0.1 * unit))
        u = pyro.param("u", torch.tensor([0.3, -0.2, 0.1]) * unit)
        v = pyro.param("v", torch.tensor(2.0 * unit))
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.softmax(u / unit, -1)))
            pyro.sample("x", dist.Normal(a / unit + 0 * z + 0 * v, 1.0), obs=x)

    errors = fitted(model).standard_errors()
    assert float(errors["a"]) == pytest.approx(unit / math.sqrt(len(X)), rel=1e-6)
    assert errors["u"].isnan().all() and math.isnan(errors["v"])
    assert any("not identified" in n and "'u', 'v'" in n for n in errors.notes)
    assert not any("positive definite" in n for n in errors.notes)


@pytest.mark.parametrize("unit", UNITS)
def test_what_is_identified_keeps_its_error_in_every_unit(unit: float) -> None:
    """A mixture, a slope in another unit: against finite differences of the evidence."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([-1.5, 2.0]) * unit)
        s = pyro.param("s", torch.tensor(1.0), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z] / unit, s), obs=x)

    result = fitted(model, 1e-12)
    w, mu, s = (result.params[n] for n in ("w", "mu", "s"))
    at = torch.tensor([float(w[0]), *(mu / unit).tolist(), float(s)])

    def evidence(t: Tensor) -> float:
        log_w = torch.stack([t[0].log(), (1 - t[0]).log()])
        return float((log_w + dist.Normal(t[1:3], t[3]).log_prob(X[:, None])).logsumexp(-1).sum())

    step, eye = 1e-4, torch.eye(4)
    hessian = torch.tensor(
        [
            [
                sum(
                    i * j * evidence(at + step * (i * eye[r] + j * eye[c]))
                    for i in (-1, 1)
                    for j in (-1, 1)
                )
                / (4 * step**2)
                for c in range(4)
            ]
            for r in range(4)
        ]
    )
    expected = torch.linalg.inv(-hessian).diagonal().sqrt()
    errors = result.standard_errors()
    assert errors.notes == ()
    found = torch.tensor([errors["w"][0], *(errors["mu"] / unit).tolist(), errors["s"]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0.0)
    assert float(errors["w"][1]) == pytest.approx(float(errors["w"][0]))


def test_a_weakly_identified_number_still_has_an_error() -> None:
    """Components that overlap nearly wholly: little information, and all of it is used."""

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.5, 0.5]), constraint=C.simplex)
        loc = torch.tensor([float(X.mean()) - 1e-2, float(X.mean()) + 1e-2])
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(loc[z], 2.0), obs=x)

    errors = ExactPosteriorEM(model).fit(X, max_steps=5, progress=False).standard_errors()
    scores = 2e-2 * (X - X.mean()) / 4  # of the first weight, to first order
    assert float(errors["w"][0]) == pytest.approx(float((scores**2).sum()) ** -0.5, rel=0.02)
