"""Point estimates: conjugate priors against an optimiser, the log prior apart from the evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.infer.autoguide import AutoDelta
from pyro.infer.autoguide.initialization import init_to_value
from scipy.optimize import minimize
from torch import Tensor
from torch.distributions import biject_to, constraints

from pyro_em import (
    ClosedForm,
    DegenerateError,
    EMStatus,
    ExactPosteriorEM,
    Fixed,
    Gradient,
    LeastSquares,
)

K = 2
W = torch.tensor([0.6, 0.4], dtype=torch.float64)
X = torch.tensor([-2.1, -1.9, -2.4, 0.1, 1.8, 2.2, 2.9, 1.4, -1.0, 2.0], dtype=torch.float64)


def tensor(*values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------ one M-step, one prior


@dataclass(frozen=True)
class Case:
    """A mixture of two known weights; one point-estimated `theta` with a leading dimension K."""

    prior: Callable[[], Any]  # batch shape () or (K,)
    emission: Callable[[Tensor, Tensor], Any]  # theta, z -> distribution
    start: Tensor
    data: Tensor
    update: type = ClosedForm
    says: str = ""


COUNTS = tensor(0, 1, 3, 7, 2, 0, 5, 9)
TIMES = tensor(0.1, 0.4, 2.5, 0.2, 5.0, 1.5, 0.05)
BITS = tensor(0, 1, 1, 0, 1, 1, 1)
TRIALS = tensor(1, 9, 8, 2, 10, 0)
LABELS = torch.tensor([0, 2, 2, 1, 0, 2, 2])
MULTI = tensor([3, 1, 1], [0, 4, 1], [2, 2, 1], [0, 0, 5])
VECTORS = torch.stack([X, X.flip(0).sin()], -1)
DESIGN = torch.stack([torch.ones(10, dtype=torch.float64), torch.linspace(-1, 1, 10).double()], -1)
A = tensor([2.0, 3.0, 1.5])
ROWS = tensor([0.2, 0.3, 0.5], [0.5, 0.25, 0.25])
POSITIVE = tensor(0.7, 2.5)
COV = tensor([1.0, 0.3], [0.3, 2.0])

CASES = {
    "dirichlet categorical": Case(
        lambda: dist.Dirichlet(A), lambda t, z: dist.Categorical(t[z]), ROWS, LABELS
    ),
    "dirichlet one hot": Case(
        lambda: dist.Dirichlet(A),
        lambda t, z: dist.OneHotCategorical(t[z]),
        ROWS,
        torch.nn.functional.one_hot(LABELS, 3).double(),
    ),
    "dirichlet multinomial": Case(
        lambda: dist.Dirichlet(A), lambda t, z: dist.Multinomial(5, t[z]), ROWS, MULTI
    ),
    "beta bernoulli": Case(
        lambda: dist.Beta(2.0, tensor(3.0, 1.5)),
        lambda t, z: dist.Bernoulli(t[z]),
        tensor(0.3, 0.8),
        BITS,
    ),
    "beta binomial": Case(
        lambda: dist.Beta(tensor(2.0), 3.0),
        lambda t, z: dist.Binomial(10, t[z]),
        tensor(0.3, 0.8),
        TRIALS,
    ),
    "beta geometric": Case(
        lambda: dist.Beta(tensor(2.0), 3.0),
        lambda t, z: dist.Geometric(t[z]),
        tensor(0.3, 0.8),
        COUNTS,
    ),
    "gamma poisson": Case(
        lambda: dist.Gamma(tensor(2.0, 3.0), 0.5),
        lambda t, z: dist.Poisson(t[z]),
        POSITIVE,
        COUNTS,
    ),
    "gamma poisson exposure": Case(
        lambda: dist.Gamma(tensor(2.0), 0.5),
        lambda t, z: dist.Poisson(t[z] * torch.arange(1, 9)),
        POSITIVE,
        COUNTS,
    ),
    "gamma exponential": Case(
        lambda: dist.Gamma(tensor(2.0), 0.5),
        lambda t, z: dist.Exponential(t[z]),
        POSITIVE,
        TIMES,
    ),
    "exponential poisson": Case(
        lambda: dist.Exponential(tensor(0.5)), lambda t, z: dist.Poisson(t[z]), POSITIVE, COUNTS
    ),
    "exponential exponential": Case(
        lambda: dist.Exponential(tensor(0.5, 2.0)),
        lambda t, z: dist.Exponential(t[z]),
        POSITIVE,
        TIMES,
    ),
    "normal normal": Case(
        lambda: dist.Normal(tensor(1.0, -3.0), 0.5),
        lambda t, z: dist.Normal(t[z], tensor(0.8, 1.3)[z]),
        tensor(-1.0, 1.0),
        X,
    ),
    "normal lognormal": Case(
        lambda: dist.Normal(tensor(1.0), 0.5),
        lambda t, z: dist.LogNormal(t[z], 0.7),
        tensor(-1.0, 1.0),
        TIMES,
    ),
    "normal known factor": Case(
        lambda: dist.Normal(tensor(1.0), 0.5),
        lambda t, z: dist.Normal(t[z] * DESIGN[:, 1], 1.0),
        tensor(-1.0, 1.0),
        X,
        update=object,
    ),
    "normal vector": Case(
        lambda: dist.Normal(tensor([1.0, 0.0], [-1.0, 2.0]), tensor(0.5, 2.0)).to_event(1),
        lambda t, z: dist.Normal(t[z], tensor(0.5, 1.5)).to_event(1),
        VECTORS[:2],
        VECTORS,
    ),
    "normal vector mvn": Case(
        lambda: dist.Normal(tensor([1.0, 0.0], [-1.0, 2.0]), tensor(0.5, 2.0)).to_event(1),
        lambda t, z: dist.MultivariateNormal(t[z], COV),
        VECTORS[:2],
        VECTORS,
    ),
    "mvn mvn": Case(
        lambda: dist.MultivariateNormal(tensor(1.0, 0.0), COV / 3),
        lambda t, z: dist.MultivariateNormal(t[z], torch.stack([COV, COV.inverse()])[z]),
        VECTORS[:2],
        VECTORS,
    ),
    "mvn precision mvn": Case(
        lambda: dist.MultivariateNormal(tensor(1.0, 0.0), precision_matrix=COV),
        lambda t, z: dist.MultivariateNormal(t[z], COV),
        VECTORS[:2],
        VECTORS,
    ),
    "mvn tril mvn": Case(
        lambda: dist.MultivariateNormal(tensor(1.0, 0.0), scale_tril=torch.linalg.cholesky(COV)),
        lambda t, z: dist.MultivariateNormal(t[z], scale_tril=torch.linalg.cholesky(COV)),
        VECTORS[:2],
        VECTORS,
    ),
    "mvn normal": Case(
        lambda: dist.MultivariateNormal(tensor(1.0, 0.0), COV),
        lambda t, z: dist.Normal(t[z], 0.7).to_event(1),
        VECTORS[:2],
        VECTORS,
        Gradient,
        "MultivariateNormal prior is not conjugate",
    ),
    "inverse gamma sqrt": Case(
        lambda: dist.InverseGamma(tensor(2.0, 3.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z].sqrt()),
        POSITIVE,
        X,
    ),
    "inverse gamma sqrt first": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], torch.sqrt(t)[z]),
        POSITIVE,
        X,
    ),
    "inverse gamma half": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z] ** 0.5),
        POSITIVE,
        X,
    ),
    "inverse gamma sqrt times known": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z].sqrt() * torch.arange(1, 11)),
        POSITIVE,
        X,
        update=object,
    ),
    "inverse gamma sqrt of known times": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], (t[z] * torch.arange(1, 11)).sqrt()),
        POSITIVE,
        X,
        update=object,
    ),
    "inverse gamma lognormal": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.LogNormal(tensor(-1.0, 1.0)[z], t[z].sqrt()),
        POSITIVE,
        TIMES,
    ),
    "gamma rsqrt": Case(
        lambda: dist.Gamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z].rsqrt()),
        POSITIVE,
        X,
    ),
    "gamma power": Case(
        lambda: dist.Gamma(tensor(2.0, 0.7), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z] ** -0.5),
        POSITIVE,
        X,
    ),
    "gamma one over sqrt": Case(
        lambda: dist.Gamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], 1 / t[z].sqrt()),
        POSITIVE,
        X,
    ),
    "gamma sqrt of one over": Case(
        lambda: dist.Gamma(tensor(2.0), 1.5),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], (1 / t[z]).sqrt()),
        POSITIVE,
        X,
    ),
    "inverse gamma laplace": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.5),
        lambda t, z: dist.Laplace(tensor(-1.0, 1.0)[z], t[z]),
        POSITIVE,
        X,
    ),
    "uniform bernoulli": Case(
        lambda: dist.Uniform(tensor(0.0), 0.7),
        lambda t, z: dist.Bernoulli(t[z]),
        tensor(0.3, 0.5),
        BITS,
        update=object,
    ),
    "uniform mean": Case(
        lambda: dist.Uniform(tensor(-1.0), 4.0),
        lambda t, z: dist.Normal(t[z], 1.0),
        tensor(-0.5, 1.0),
        X,
        update=object,
    ),
    "uniform scale": Case(
        lambda: dist.Uniform(tensor(0.25), 0.75),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z]),
        tensor(0.5, 0.6),
        X,
        update=object,
    ),
    "uniform poisson": Case(
        lambda: dist.Uniform(tensor(0.0), 5.0),
        lambda t, z: dist.Poisson(t[z]),
        POSITIVE,
        COUNTS,
        update=object,
    ),
    "uniform laplace scale": Case(
        lambda: dist.Uniform(tensor(0.1), 9.0),
        lambda t, z: dist.Laplace(tensor(-1.0, 1.0)[z], t[z]),
        POSITIVE,
        X,
        update=object,
    ),
    "ridge": Case(
        lambda: dist.Normal(tensor(0.5, -0.5), tensor(0.3, 2.0)).to_event(1),
        lambda t, z: dist.Normal((t[z] * DESIGN).sum(-1), tensor(0.8, 1.3)[z]),
        tensor([-1.0, 0.0], [1.0, 0.5]),
        X,
        LeastSquares,
    ),
    "ridge gamma": Case(
        lambda: dist.Gamma(tensor(2.0, 2.0), 1.0).to_event(1),
        lambda t, z: dist.Normal((t[z] * DESIGN).sum(-1), tensor(0.8, 1.3)[z]),
        tensor([1.0, 0.1], [1.0, 0.5]),
        X,
        Gradient,
        "bounds Normal.loc",
    ),
    "laplace prior": Case(
        lambda: dist.StudentT(tensor(4.0), 0.0, 1.0),
        lambda t, z: dist.Normal(t[z], 1.0),
        tensor(-1.0, 1.0),
        X,
        Gradient,
        "StudentT prior is not conjugate to a mean",
    ),
    "lognormal scale": Case(
        lambda: dist.LogNormal(tensor(0.0), 1.0),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z]),
        POSITIVE,
        X,
        Gradient,
        "LogNormal prior is not conjugate to a scale",
    ),
    "inverse gamma on the scale itself": Case(
        lambda: dist.InverseGamma(tensor(2.0), 1.0),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z]),
        POSITIVE,
        X,
        Gradient,
        "InverseGamma prior is not conjugate to a scale",
    ),
    "gamma on a variance": Case(
        lambda: dist.Gamma(tensor(2.0), 1.0),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z].sqrt()),
        POSITIVE,
        X,
        Gradient,
        "Gamma prior is not conjugate to a scale",
    ),
    "normal on log rate": Case(
        lambda: dist.Normal(tensor(0.0), 1.0),
        lambda t, z: dist.Poisson(t[z].exp()),
        tensor(-0.5, 1.0),
        COUNTS,
        Gradient,
        "Normal prior is not conjugate to a rate",
    ),
    "normal on logits": Case(
        lambda: dist.Normal(tensor(0.0), 1.0),
        lambda t, z: dist.Bernoulli(logits=t[z]),
        tensor(-0.5, 1.0),
        BITS,
        Gradient,
        "Normal prior is not conjugate to a probability",
    ),
}


def prior_of(case: Case) -> Any:
    prior = case.prior()
    return prior if prior.batch_shape else prior.expand([K])


def in_plate(case: Case) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("components", K):
            theta = pyro.sample("theta", case.prior())
        emit(case, theta, x)

    return model


def as_event(case: Case) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        prior = prior_of(case)
        emit(case, pyro.sample("theta", prior.to_event(1)), x)

    return model


def scaled(case: Case) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with poutine.scale(scale=2.5), pyro.plate("components", K):
            theta = pyro.sample("theta", case.prior())
        emit(case, theta, x)

    return model


def masked(case: Case) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        on = poutine.mask(mask=torch.tensor([True, False]))
        with pyro.plate("components", K), on:
            theta = pyro.sample("theta", case.prior())
        emit(case, theta, x)

    return model


def emit(case: Case, theta: Tensor, x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(W))
        pyro.sample("x", case.emission(theta, z), obs=x)


FORMS = {"plate": in_plate, "event": as_event, "scale": scaled, "mask": masked}
PRIOR_WEIGHT = {"plate": tensor(1.0, 1.0), "scale": tensor(2.5, 2.5), "mask": tensor(1.0, 0.0)}


def joint(case: Case, theta: Tensor) -> Tensor:
    """log p(x_n, z = k | theta). # (N, K)"""
    n = len(case.data)
    with pyro.validation_enabled(False), poutine.block():
        columns = [
            case.emission(theta, torch.full((n,), k)).log_prob(case.data) + W[k].log()
            for k in range(K)
        ]
    return torch.stack(columns, -1)


def estimated(case: Case, form: str) -> ExactPosteriorEM:
    start = init_to_value(values={"theta": case.start})
    return ExactPosteriorEM(FORMS[form](case), lambda model: AutoDelta(model, init_loc_fn=start))


def expected_joint(case: Case, form: str, theta: Tensor, r: Tensor) -> Tensor:
    weight = PRIOR_WEIGHT.get(form, PRIOR_WEIGHT["plate"])
    log_prior = (weight * prior_of(case).log_prob(theta)).sum()
    return (r * joint(case, theta)).sum() + log_prior


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("name", list(CASES))
def test_an_m_step_with_a_prior_is_the_maximiser(name: str, form: str) -> None:
    case = CASES[name]
    em = estimated(case, form)
    plan = em.plan(case.data)
    update = plan.updates["AutoDelta.theta"]
    assert isinstance(update.update, case.update), update
    assert case.says in update.reason, update
    r = joint(case, case.start).softmax(-1)
    torch.testing.assert_close(em.posterior(case.data).probs("z"), r, rtol=1e-9, atol=1e-12)
    em.step(case.data)
    theta = pyro.param("AutoDelta.theta").detach().clone()
    to = biject_to(prior_of(case).support)
    shape = to.inv(case.start).shape

    def loss(u: np.ndarray) -> tuple[float, np.ndarray]:
        point = torch.tensor(u).reshape(shape).requires_grad_()
        value = -expected_joint(case, form, to(point), r)
        (gradient,) = torch.autograd.grad(value, point)
        return float(value), gradient.reshape(-1).numpy()

    best = minimize(
        loss,
        to.inv(case.start).reshape(-1).numpy(),
        jac=True,
        method="BFGS",
        options={"gtol": 1e-9, "maxiter": 500},
    )
    mine = float(expected_joint(case, form, theta, r))
    assert mine >= -best.fun - 1e-7, (mine, -best.fun, theta, to(torch.tensor(best.x)))
    found = to(torch.tensor(best.x).reshape(shape))
    torch.testing.assert_close(theta, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CASES))
def test_the_objective_of_a_fit_is_monotone_and_its_parts_agree(name: str) -> None:
    case = CASES[name]
    em = estimated(case, "plate")
    result = em.fit(case.data, tol=1e-8, max_steps=60)
    assert result.status is not EMStatus.FELL
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in zip(path, path[1:], strict=False)) >= -1e-9 * max(1, abs(path[0]))
    theta = result.params["theta"]
    torch.testing.assert_close(theta, result.params["AutoDelta.theta"], rtol=0, atol=0)
    log_prior = float(prior_of(case).log_prob(theta).sum())
    rows = joint(case, theta).logsumexp(-1)
    assert result.log_prior == pytest.approx(log_prior, abs=1e-8)
    assert result.log_evidence == pytest.approx(float(rows.sum()), abs=1e-8)
    assert result.elbo == pytest.approx(float(rows.sum()) + log_prior, abs=1e-8)
    p, n = result.num_free_parameters, len(case.data)
    assert result.num_rows == n
    assert result.bic == pytest.approx(-2 * result.log_evidence + p * math.log(n))
    terms = em.elbo(case.data)
    assert terms.value - terms.log_prior == pytest.approx(terms.log_evidence, abs=1e-9)
    assert terms.gap == pytest.approx(0, abs=1e-9)
    assert terms.log_prior == pytest.approx(log_prior, abs=1e-8)
    assert terms.reconstruction is not None and terms.kl is not None
    split = terms.reconstruction - terms.kl + terms.log_prior
    assert terms.value == pytest.approx(split, abs=1e-8)
    r = joint(case, theta).softmax(-1)
    kl = float((r * (r.clamp(min=1e-300).log() - W.log())).sum())
    assert terms.kl == pytest.approx(kl, abs=1e-8)
    assert terms.pointwise is not None
    torch.testing.assert_close(terms.pointwise, rows, rtol=1e-9, atol=1e-9)


INTERIOR = [n for n in CASES if not n.startswith("uniform")]


@pytest.mark.parametrize("name", INTERIOR)
def test_pyro_says_the_same(name: str) -> None:
    case = CASES[name]
    em = estimated(case, "plate")
    result = em.fit(case.data, max_steps=3, tol=0)
    pyro_loss = TraceEnum_ELBO(max_plate_nesting=1).loss(
        config_enumerate(in_plate(case)), em.guide, case.data
    )
    assert -pyro_loss == pytest.approx(result.elbo, rel=1e-9, abs=1e-8)
    assert em.evaluate_loss(case.data) == pytest.approx(pyro_loss, rel=1e-9, abs=1e-8)
