"""Point estimates: conjugate priors against an optimiser, the log prior apart from the evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
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
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


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
A = tensor(2.0, 3.0, 1.5)
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
    "beta expanded vector": Case(
        lambda: dist.Beta(2.0, 3.0).expand([2]).to_event(1),
        lambda t, z: dist.Bernoulli(t[z]).to_event(1),
        tensor([0.3, 0.8], [0.6, 0.4]),
        torch.stack([BITS, BITS.flip(0)], -1),
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
    "normal expanded mvn": Case(
        lambda: dist.Normal(0.5, 2.0).expand([2]).to_event(1),
        lambda t, z: dist.MultivariateNormal(t[z], COV),
        VECTORS[:2],
        VECTORS,
    ),
    "normal half expanded mvn": Case(
        lambda: dist.Normal(0.5, tensor(0.5, 2.0)).to_event(1),
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
    "gamma rsqrt expanded vector": Case(
        lambda: dist.Gamma(2.0, 1.5).expand([2]).to_event(1),
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z, None], t[z].rsqrt()).to_event(1),
        tensor([0.7, 2.5], [1.0, 1.5]),
        VECTORS,
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
        lambda t, z: dist.Normal(tensor(-1.0, 1.0)[z], t[z].reciprocal().sqrt()),
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
    "ridge expanded": Case(
        lambda: dist.Normal(0.5, 0.3).expand([2]).to_event(1),
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
    "student prior": Case(
        lambda: dist.StudentT(tensor(4.0), 0.0, 1.0),
        lambda t, z: dist.Normal(t[z], 1.0),
        tensor(-1.0, 1.0),
        X,
        Gradient,
        "its StudentT prior is not conjugate to a mean",
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
    start = init_to_value(values={"theta": case.start.clone()})
    return ExactPosteriorEM(FORMS[form](case), lambda model: AutoDelta(model, init_loc_fn=start))


def expected_joint(case: Case, form: str, theta: Tensor, r: Tensor) -> Tensor:
    weight = PRIOR_WEIGHT.get(form, PRIOR_WEIGHT["plate"])
    log_prior = (weight * prior_of(case).log_prob(theta)).sum()
    return (r * joint(case, theta)).sum() + log_prior


SOME = (
    "dirichlet one hot",
    "normal expanded mvn",
    "gamma poisson",
    "normal normal",
    "gamma rsqrt",
    "mvn mvn",
    "ridge",
)
ALL_FORMS = [(n, f) for n in CASES for f in FORMS if f == "scale" or n in SOME]


@pytest.mark.parametrize(("name", "form"), ALL_FORMS)
def test_an_m_step_with_a_prior_is_the_maximiser(name: str, form: str) -> None:
    case = CASES[name]
    em = estimated(case, form)
    r = joint(case, case.start).softmax(-1)
    torch.testing.assert_close(em.posterior(case.data).probs("z"), r, rtol=1e-9, atol=1e-12)
    em.step(case.data)
    # As em.plan() shows it, without another reading of the model.
    update = em._session.program.plan().updates["AutoDelta.theta"]
    if form != "mask":  # a prior that counts on some rows only: by gradient
        assert isinstance(update.update, case.update), update
        assert case.says in update.reason, update
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
    assert mine >= -best.fun - 1e-7
    found = to(torch.tensor(best.x).reshape(shape))
    torch.testing.assert_close(theta, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(CASES))
def test_the_objective_of_a_fit_is_monotone_and_its_parts_agree(name: str) -> None:
    case = CASES[name]
    em = estimated(case, "plate")
    result = em.fit(case.data, tol=0, max_steps=4)
    assert result.status is not EMStatus.FELL
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-9 * max(1, abs(path[0]))
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
    if not name.startswith("uniform"):  # Pyro's density of a uniform prior ends before its edge
        program = config_enumerate(in_plate(case))
        loss = TraceEnum_ELBO(max_plate_nesting=1).loss(program, em.guide, case.data)
        assert -loss == pytest.approx(result.elbo, rel=1e-9, abs=1e-8)
        assert em.evaluate_loss(case.data) == pytest.approx(loss, rel=1e-9, abs=1e-8)


# ------------------------------------------------------------------ whole models


def start_at(**values: Tensor) -> Callable[[Any], AutoDelta]:
    kept = {n: v.clone() for n, v in values.items()}
    # AutoDelta's parameters share memory with what the function returns: a clone for each.
    return lambda model: AutoDelta(model, init_loc_fn=lambda site: kept[site["name"]].clone())


def mixture(x: Tensor) -> None:
    w = pyro.sample("w", dist.Dirichlet(tensor(3.0, 2.0)))
    tau = pyro.sample("tau", dist.Gamma(tensor(2.0), 1.0))
    with pyro.plate("components", K):
        mu = pyro.sample("mu", dist.Normal(tensor(0.0), 3.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], tau.rsqrt()), obs=x)


START = {"w": tensor(0.5, 0.5), "mu": tensor(-1.0, 1.0), "tau": tensor(1.0)}


def mixture_log_prior(w: Tensor, mu: Tensor, tau: Tensor) -> Tensor:
    return (
        dist.Dirichlet(tensor(3.0, 2.0)).log_prob(w)
        + dist.Normal(tensor(0.0), 3.0).log_prob(mu).sum()
        + dist.Gamma(tensor(2.0), 1.0).log_prob(tau)
    )


def mixture_evidence(w: Tensor, mu: Tensor, tau: Tensor, x: Tensor) -> Tensor:
    rows = w.log() + dist.Normal(mu, tau.rsqrt()).log_prob(x[:, None])
    return rows.logsumexp(-1).sum()


def hand_written(x: Tensor) -> None:
    w = pyro.param("a", START["w"].clone(), constraint=constraints.simplex)
    mu = pyro.param("b", START["mu"].clone())
    tau = pyro.param("c", START["tau"].clone(), constraint=constraints.positive)
    pyro.sample("w", dist.Delta(w).to_event(1))
    pyro.sample("tau", dist.Delta(tau))
    with pyro.plate("components", K):
        pyro.sample("mu", dist.Delta(mu))


def hand_written_event_dim(x: Tensor) -> None:
    w = pyro.param("a", START["w"].clone(), constraint=constraints.simplex)
    mu = pyro.param("b", START["mu"].clone())
    tau = pyro.param("c", START["tau"].clone(), constraint=constraints.positive)
    pyro.sample("w", dist.Delta(w, event_dim=1))
    pyro.sample("tau", dist.Delta(tau))
    with pyro.plate("components", K):
        pyro.sample("mu", dist.Delta(mu))


def test_guides_of_one_meaning_give_one_fit() -> None:
    blocked = poutine.block(mixture, hide=["z"])
    guides: dict[str, Any] = {
        "factory": start_at(**START),
        "by hand": hand_written,
        "event_dim": hand_written_event_dim,
        "built": AutoDelta(
            blocked,
            init_loc_fn=init_to_value(values={n: v.clone() for n, v in START.items()}),
        ),
    }
    paths = {}
    for name, guide in guides.items():
        pyro.clear_param_store()
        em = ExactPosteriorEM(mixture, guide)
        result = em.fit(X, max_steps=15, tol=0)
        kinds = {type(u.update) for u in result.plan.updates.values()}
        assert kinds == {ClosedForm}, (name, result.plan)
        assert result.plan.compiled
        paths[name] = list(result.history)
        mu = result.params["mu"]
        value = mixture_evidence(result.params["w"], mu, result.params["tau"], X)
        assert result.log_evidence == pytest.approx(float(value), abs=1e-9)
    for path in paths.values():
        np.testing.assert_allclose(path, paths["factory"], rtol=1e-10)


def test_the_fit_ends_at_a_stationary_point_of_evidence_plus_prior() -> None:
    result = ExactPosteriorEM(mixture, start_at(**START)).fit(X, max_steps=500, tol=0)
    w, mu, tau = (result.params[n].clone().requires_grad_() for n in ("w", "mu", "tau"))
    value = mixture_evidence(w, mu, tau, X) + mixture_log_prior(w, mu, tau)
    gw, gmu, gtau = torch.autograd.grad(value, (w, mu, tau))
    torch.testing.assert_close(gmu, torch.zeros(2), atol=1e-7, rtol=0)
    torch.testing.assert_close(gtau, torch.tensor(0.0), atol=1e-7, rtol=0)
    torch.testing.assert_close(gw[0], gw[1], atol=1e-6, rtol=0)
    assert list(result.history)[-1] == pytest.approx(float(value), abs=1e-9)


def test_bic_does_not_know_the_prior() -> None:
    result = ExactPosteriorEM(mixture, start_at(**START)).fit(X)
    assert result.num_free_parameters == 4
    assert result.bic == pytest.approx(-2 * result.log_evidence + 4 * math.log(10))
    assert result.aic == pytest.approx(-2 * result.log_evidence + 8)
    assert "log prior" in str(result)


def test_map_finds_what_a_start_finds() -> None:
    result = ExactPosteriorEM(mixture, "map").fit(X, num_restarts=5, seed=1, tol=1e-8)
    other = ExactPosteriorEM(mixture, start_at(**START))
    pyro.clear_param_store()
    assert result.elbo >= other.fit(X, tol=1e-8).elbo - 1e-6


def test_float32() -> None:
    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.tensor([3.0, 2.0], dtype=torch.float32)))
        zero = torch.tensor(0.0, dtype=torch.float32)
        with pyro.plate("components", K):
            mu = pyro.sample("mu", dist.Normal(zero, zero + 3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], zero + 1), obs=x)

    start = start_at(w=START["w"].float(), mu=START["mu"].float())
    result = ExactPosteriorEM(model, start).fit(X.float())
    assert result.converged and result.params["mu"].dtype == torch.float32
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) > -1e-4


def test_save_load_and_reset(tmp_path: Any) -> None:
    em = ExactPosteriorEM(mixture, start_at(**START))
    result = em.fit(X, max_steps=4, tol=0)
    em.save(tmp_path / "map.pt")
    for early in (False, True):
        pyro.clear_param_store()
        again = ExactPosteriorEM(mixture, start_at(**START))
        if early:
            again.load(tmp_path / "map.pt")
            again.plan(X)
        else:
            again.plan(X)
            again.load(tmp_path / "map.pt")
        assert again.elbo(X).value == pytest.approx(result.elbo, abs=1e-10)
        assert float(again.guide.median()["tau"]) == pytest.approx(float(result.params["tau"]))
    em = ExactPosteriorEM(mixture, start_at(**START))
    pyro.clear_param_store()
    first = em.fit(X, max_steps=4, tol=0)
    em.reset()
    second = em.fit(X, max_steps=4, tol=0)
    np.testing.assert_allclose(list(first.history), list(second.history), rtol=1e-12)


def test_reset_of_a_guide_that_the_user_built() -> None:
    values = {n: v.clone() for n, v in START.items()}
    guide = AutoDelta(
        poutine.block(mixture, hide=["z"]), init_loc_fn=lambda site: values[site["name"]].clone()
    )
    em = ExactPosteriorEM(mixture, guide)
    first = em.fit(X, max_steps=4, tol=0)
    em.reset()
    second = em.fit(X, max_steps=4, tol=0)
    np.testing.assert_allclose(list(first.history), list(second.history), rtol=1e-12)
    torch.testing.assert_close(guide.median()["mu"], second.params["mu"])


def test_the_guide_shows_what_was_fitted() -> None:
    em = ExactPosteriorEM(mixture, start_at(**START))
    result = em.fit(X)
    for name in ("w", "mu", "tau"):
        torch.testing.assert_close(em.guide.median()[name], result.params[name])
        torch.testing.assert_close(result.params[name], result.params[f"AutoDelta.{name}"])
    with pytest.raises(KeyError):
        result.params["nothing"]


def test_standard_errors_with_a_prior_are_finite_and_the_inverse_curvature() -> None:
    result = ExactPosteriorEM(mixture, start_at(**START)).fit(X, max_steps=300, tol=0)
    errors = result.standard_errors()
    mu = result.params["mu"]
    w, tau = result.params["w"], result.params["tau"]
    point = torch.cat([w[:1], mu, tau.reshape(1)])

    def evidence(p: Tensor) -> Tensor:
        weights = torch.stack([p[0], 1 - p[0]])
        return mixture_evidence(weights, p[1:3], p[3], X)

    def posterior(p: Tensor) -> Tensor:
        weights = torch.stack([p[0], 1 - p[0]])
        return evidence(p) + mixture_log_prior(weights, p[1:3], p[3])

    curvature = [
        torch.autograd.functional.hessian(f, point).neg().inverse().diagonal().sqrt()
        for f in (evidence, posterior)
    ]
    got = errors["AutoDelta.mu"]
    close = [torch.allclose(got, c[1:3], rtol=1e-3) for c in curvature]
    assert any(close), (got, curvature)


# ------------------------------------------------------------------ priors with a mode on the edge


def weights_only(alpha: float) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        with pyro.plate("rows", 2):
            w = pyro.sample("w", dist.Dirichlet(torch.full((3,), alpha, dtype=torch.float64)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.Categorical(w[z]), obs=x)

    return model


NO_TWO = torch.tensor([0, 1, 1, 0, 1])


def test_dirichlet_below_one_on_an_empty_value() -> None:
    start = tensor([0.2, 0.3, 0.5], [0.5, 0.25, 0.25])
    em = ExactPosteriorEM(weights_only(0.5), start_at(w=start))
    with pytest.raises(DegenerateError) as caught:
        em.step(NO_TWO)
    text = str(caught.value)
    for word in ("'w'", "component 0, value 2", "-0.5", "Dirichlet", "at least one", "pyro.param"):
        assert word in text, text
    torch.testing.assert_close(pyro.param("AutoDelta.w").detach(), start)
    with pytest.warns(UserWarning, match="posterior mode is on the boundary"):
        result = em.fit(NO_TWO)
    assert result.status is EMStatus.DEGENERATE and not result.converged
    assert math.isfinite(result.elbo) and bool(torch.isfinite(result.params["w"]).all())
    torch.testing.assert_close(result.params["w"], start)


def test_dirichlet_of_one_is_maximum_likelihood_with_exact_zeros() -> None:
    start = tensor([0.2, 0.3, 0.5], [0.5, 0.25, 0.25])
    result = ExactPosteriorEM(weights_only(1.0), start_at(w=start)).fit(NO_TWO, max_steps=8, tol=0)

    def plain(x: Tensor) -> None:
        w = pyro.param("w", start.clone(), constraint=constraints.simplex)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.Categorical(w[z]), obs=x)

    other = ExactPosteriorEM(plain).fit(NO_TWO, max_steps=8, tol=0)
    torch.testing.assert_close(result.params["w"], other.params["w"], rtol=1e-12, atol=0)
    assert bool((result.params["w"][:, 2] == 0).all())
    assert result.log_evidence == pytest.approx(other.log_evidence, abs=1e-10)
    assert result.log_prior == pytest.approx(2 * math.log(2))


def test_beta_below_one_without_successes() -> None:
    def model(x: Tensor) -> None:
        p = pyro.sample("p", dist.Beta(tensor(0.1), 0.9))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Bernoulli(p), obs=x)

    em = ExactPosteriorEM(model, start_at(p=tensor(0.3)))
    with pytest.raises(DegenerateError, match=r"(?s)'p'.*its only component.*Beta"):
        em.step(torch.zeros(5))
    assert float(pyro.param("AutoDelta.p")) == pytest.approx(0.3)
    assert math.isfinite(em.elbo(torch.zeros(5)).value)


@pytest.mark.parametrize("emission", [dist.Poisson, dist.Exponential])
def test_gamma_below_one_without_counts(emission: Any) -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("components", 2):
            rate = pyro.sample("rate", dist.Gamma(tensor(0.5), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", emission(rate[1]), obs=x)

    em = ExactPosteriorEM(model, start_at(rate=tensor(0.3, 0.4)))
    with pytest.raises(DegenerateError, match=r"(?s)'rate'.*component 0.*Gamma"):
        em.step(torch.zeros(5))
    torch.testing.assert_close(pyro.param("AutoDelta.rate").detach(), tensor(0.3, 0.4))


@pytest.mark.parametrize("prior", [dist.Gamma(1.0, 1.0), dist.Exponential(1.0)])
def test_a_rate_without_counts_under_a_flat_start(prior: Any) -> None:
    def model(x: Tensor) -> None:
        rate = pyro.sample("rate", prior)
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Poisson(rate), obs=x)

    em = ExactPosteriorEM(model, start_at(rate=tensor(0.3)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = em.fit(torch.zeros(5))
    assert math.isfinite(result.elbo)
    assert float(result.params["rate"]) < 1e-6
    assert result.elbo == pytest.approx(0.0, abs=1e-5)


def test_an_unbounded_prior_climbed_by_gradient_is_said() -> None:
    def model(x: torch.Tensor) -> None:
        p = pyro.sample("p", dist.Beta(a, a))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Bernoulli(0.5 + p / 2), obs=x)

    a = tensor(0.5)
    assert "site 'p': its Beta prior has a concentration below one" in str(
        ExactPosteriorEM(model, "map").plan(torch.ones(4))
    )
    a = tensor(1.5)
    assert "below one" not in str(ExactPosteriorEM(model, "map").plan(torch.ones(4)))


def test_a_collapsing_spread_under_a_gradient_does_not_crash() -> None:
    """A trial point at which torch refuses the prior's value is a bad one, not the end."""

    def model(x: torch.Tensor) -> None:
        s = pyro.sample("s", dist.HalfNormal(tensor(1.0)))
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(0.0, s), obs=x)

    result = ExactPosteriorEM(model, "map").fit(torch.zeros(6, dtype=torch.float64))
    assert bool(torch.isfinite(result.params["AutoDelta.s"]))


def test_a_uniform_prior_clips_below_its_upper_end() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Uniform(tensor(5.0), 6.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ExactPosteriorEM(model, start_at(mu=tensor(5.5))).fit(X + 20)
    assert result.converged, result
    assert float(result.params["mu"]) == pytest.approx(6.0)


def test_a_row_that_only_its_prior_knows_goes_to_the_prior_mode() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", dist.Normal(tensor(0.0), 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu[(x > 0).long()], 1.0), obs=x)

    result = ExactPosteriorEM(model, start_at(mu=tensor(-1.0, 1.0, 5.0))).fit(X)
    assert float(result.params["mu"][2]) == pytest.approx(0.0, abs=1e-8)


def test_an_empty_component_goes_to_the_prior_mode() -> None:
    def model(x: Tensor) -> None:
        w = tensor(1.0, 0.0)
        with pyro.plate("components", 2):
            mu = pyro.sample("mu", dist.Normal(tensor(0.5), 1.0))
            var = pyro.sample("var", dist.InverseGamma(tensor(3.0), 2.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(mu[z], var[z].sqrt()), obs=x)

    start = start_at(mu=tensor(-1.0, 4.0), var=tensor(1.0, 9.0))
    result = ExactPosteriorEM(model, start).fit(X)
    assert float(result.params["mu"][1]) == pytest.approx(0.5)
    assert float(result.params["var"][1]) == pytest.approx(2 / 4)


# ------------------------------------------------------------------ priors upon priors


def parts_agree(em: ExactPosteriorEM, model: Any, x: Tensor, nesting: int = 1) -> None:
    """Pyro's loss, the split of the bound, and the gap."""
    terms = em.elbo(x)
    loss = TraceEnum_ELBO(max_plate_nesting=nesting).loss(config_enumerate(model), em.guide, x)
    assert terms.value == pytest.approx(-loss, rel=1e-9, abs=1e-8)
    assert terms.gap == pytest.approx(0, abs=1e-8)
    assert terms.reconstruction is not None and terms.kl is not None
    split = terms.reconstruction - terms.kl + terms.log_prior
    assert terms.value == pytest.approx(split, abs=1e-8)


def test_hyperparameters_are_point_estimates_too() -> None:
    def model(x: Tensor) -> None:
        m = pyro.sample("m", dist.Normal(tensor(0.0), 2.0))
        s = pyro.sample("s", dist.LogNormal(tensor(0.0), 0.25))
        with pyro.plate("components", K):
            mu = pyro.sample("mu", dist.Normal(m, s))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    start = start_at(m=tensor(0.0), s=tensor(1.0), mu=tensor(-1.0, 1.0))
    em = ExactPosteriorEM(model, start)
    result = em.fit(X, max_steps=30)
    assert "hyperparameter of 'mu'" in result.plan.updates["AutoDelta.m"].reason
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-9 * abs(path[0])
    parts_agree(em, model, X)
    mu, m, s = (result.params[n] for n in ("mu", "m", "s"))
    by_hand = (
        dist.Normal(m, s).log_prob(mu).sum()
        + dist.Normal(tensor(0.0), 2.0).log_prob(m)
        + dist.LogNormal(tensor(0.0), 0.25).log_prob(s)
    )
    assert result.log_prior == pytest.approx(float(by_hand), abs=1e-9)


def test_a_hyperparameter_that_is_a_plain_parameter() -> None:
    def model(x: Tensor) -> None:
        m = pyro.param("m", tensor(0.3))
        with pyro.plate("components", K):
            mu = pyro.sample("mu", dist.Normal(m, 1.0))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)

    em = ExactPosteriorEM(model, start_at(mu=tensor(-1.0, 1.0)))
    result = em.fit(X, tol=1e-10)
    assert float(result.params["m"]) == pytest.approx(float(result.params["mu"].mean()), abs=1e-4)
    parts_agree(em, model, X)


def test_a_prior_that_depends_on_a_summed_latent() -> None:
    def model(x: Tensor) -> None:
        m = tensor(-2.0, 2.0)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            h = pyro.sample("h", dist.Normal(m[z], 0.5))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    em = ExactPosteriorEM(model, start_at(h=torch.zeros(10)))
    result = em.fit(X, max_steps=60)
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-9 * abs(path[0])
    h = result.params["h"]
    prior = (W.log() + dist.Normal(tensor(-2.0, 2.0), 0.5).log_prob(h[:, None])).logsumexp(-1)
    likelihood = dist.Normal(h, 1.0).log_prob(X)
    assert result.elbo == pytest.approx(float((prior + likelihood).sum()), abs=1e-8)
    assert result.log_prior == pytest.approx(float(prior.sum()), abs=1e-8)
    assert result.log_evidence == pytest.approx(float(likelihood.sum()), abs=1e-8)
    parts_agree(em, model, X)


def test_local_point_estimates() -> None:
    def model(x: Tensor) -> None:
        a = pyro.param("a", tensor(0.5), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(tensor(0.0), 1.0))
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(h + 2 * z, a + 0.5), obs=x)

    em = ExactPosteriorEM(model, "map")
    result = em.fit(X, max_steps=40)
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-8 * abs(path[0])
    parts_agree(em, model, X)
    assert result.params["h"].shape == (10,)
    pointwise = em.elbo(X).pointwise
    if pointwise is not None:
        assert float(pointwise.sum()) == pytest.approx(result.log_evidence, abs=1e-8)


def test_one_parameter_with_a_prior_at_two_sites() -> None:
    def model(x: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(tensor(1.0), 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0), obs=x)
            pyro.sample("y", dist.Normal(mu, 2.0), obs=x + 1)

    em = ExactPosteriorEM(model, start_at(mu=tensor(0.0)))
    assert isinstance(em.plan(X).updates["AutoDelta.mu"].update, ClosedForm)
    em.step(X)
    top = 1 / 0.25 + X.sum() + (X + 1).sum() / 4
    assert float(pyro.param("AutoDelta.mu")) == pytest.approx(float(top / (4 + 10 + 2.5)))


def test_priors_of_two_sites_in_one_stack() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(tensor(-1.0), 1.0))
        b = pyro.sample("b", dist.Normal(tensor(2.0), 0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(W))
            pyro.sample("x", dist.Normal(torch.stack([a, b])[z], 1.0), obs=x)

    em = ExactPosteriorEM(model, start_at(a=tensor(-1.0), b=tensor(1.0)))
    r = (W.log() + dist.Normal(tensor(-1.0, 1.0), 1.0).log_prob(X[:, None])).softmax(-1)
    em.step(X)
    a = (-1 + (r[:, 0] * X).sum()) / (1 + r[:, 0].sum())
    b = (8 + (r[:, 1] * X).sum()) / (4 + r[:, 1].sum())
    assert float(pyro.param("AutoDelta.a")) == pytest.approx(float(a))
    assert float(pyro.param("AutoDelta.b")) == pytest.approx(float(b))
    parts_agree(em, model, X)


def test_many_sites_of_one_form() -> None:
    def model(x: Tensor) -> None:
        p = [pyro.sample(f"p{i}", dist.Beta(tensor(2.0), 3.0)) for i in range(3)]
        with pyro.plate("data", len(x)):
            for i in range(3):
                pyro.sample(f"x{i}", dist.Bernoulli(p[i]), obs=(x > i - 1).double())

    em = ExactPosteriorEM(model, "map")
    result = em.fit(X)
    for i in range(3):
        n = float((i - 1 < X).sum())
        assert float(result.params[f"p{i}"]) == pytest.approx((n + 1) / (10 + 3))
    parts_agree(em, model, X)


def test_coefficients_and_intercept_in_one_ridge() -> None:
    def model(x: Tensor) -> None:
        a = pyro.sample("a", dist.Normal(tensor(0.5), 2.0))
        b = pyro.sample("b", dist.Normal(torch.zeros(2), tensor(0.3, 1.0)).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(a + DESIGN @ b, 0.8), obs=x)

    em = ExactPosteriorEM(model, start_at(a=tensor(0.0), b=tensor(1.0, 1.0)))
    em.step(X)
    full = torch.cat([torch.ones(10, 1), DESIGN], 1)
    precision = tensor(1 / 4, 1 / 0.09, 1.0)
    gram = full.T @ full / 0.64 + torch.diag(precision)
    best = torch.linalg.solve(gram, full.T @ X / 0.64 + precision * tensor(0.5, 0.0, 0.0))
    assert float(pyro.param("AutoDelta.a")) == pytest.approx(float(best[0]))
    torch.testing.assert_close(pyro.param("AutoDelta.b").detach(), best[1:])


def test_a_hidden_markov_model_with_priors() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("states", K):
            trans = pyro.sample("trans", dist.Dirichlet(tensor(4.0, 2.0)))
            mu = pyro.sample("mu", dist.Normal(tensor(0.0), 3.0))
        z: Any = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(trans[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    start = start_at(trans=tensor([0.6, 0.4], [0.3, 0.7]), mu=tensor(-1.0, 1.0))
    em = ExactPosteriorEM(model, start)
    assert {type(u.update) for u in em.plan(X).updates.values()} == {ClosedForm}
    result = em.fit(X, max_steps=30)
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-9 * abs(path[0])
    parts_agree(em, model, X, nesting=1)


def test_fixed_and_gradient_by_wish_agree_with_the_closed_form() -> None:
    closed = ExactPosteriorEM(mixture, start_at(**START)).fit(X, max_steps=200, tol=1e-10)
    pyro.clear_param_store()
    by_gradient = ExactPosteriorEM(
        mixture, start_at(**START), updates={"AutoDelta.*": Gradient()}
    ).fit(X, max_steps=200, tol=1e-10)
    assert by_gradient.elbo == pytest.approx(closed.elbo, abs=1e-6)
    pyro.clear_param_store()
    fixed = ExactPosteriorEM(mixture, start_at(**START), updates={"*mu": Fixed()}).fit(X)
    torch.testing.assert_close(fixed.params["mu"], START["mu"])


# ------------------------------------------------------------------ random models


@pytest.mark.slow
@settings(max_examples=15)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(1, 12),
    k=st.integers(1, 4),
    family=st.sampled_from(["normal", "poisson", "bernoulli", "exponential", "categorical"]),
    concentration=st.floats(1.05, 6.0),
)
def test_random_models_are_monotone_and_agree_with_pyro(
    seed: int, n: int, k: int, family: str, concentration: float
) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    rate = torch.rand(k) + 0.5
    data = {
        "normal": torch.randn(n) * 3,
        "poisson": torch.poisson(torch.full((n,), 3.0)),
        "bernoulli": torch.rand(n).round(),
        "exponential": torch.rand(n) * 4 + 0.01,
        "categorical": torch.randint(3, (n,)),
    }[family]

    def model(x: Tensor) -> None:
        w = pyro.sample("w", dist.Dirichlet(torch.full((k,), concentration)))
        with pyro.plate("components", k):
            if family == "normal":
                mu = pyro.sample("mu", dist.Normal(rate, 2.0))
                var = pyro.sample("var", dist.InverseGamma(concentration, rate))
                made: Any = lambda z: dist.Normal(mu[z], var[z].sqrt())  # noqa: E731
            elif family in ("poisson", "exponential"):
                lam = pyro.sample("lam", dist.Gamma(concentration, rate))
                kind = dist.Poisson if family == "poisson" else dist.Exponential
                made = lambda z: kind(lam[z])  # noqa: E731
            elif family == "bernoulli":
                p = pyro.sample("p", dist.Beta(concentration, 1 + rate))
                made = lambda z: dist.Bernoulli(p[z])  # noqa: E731
            else:
                q = pyro.sample("q", dist.Dirichlet(torch.full((3,), concentration)))
                made = lambda z: dist.Categorical(q[z])  # noqa: E731
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", made(z), obs=x)

    em = ExactPosteriorEM(model, "map")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = em.fit(data, max_steps=15, tol=0)
    assert {type(u.update) for u in result.plan.updates.values()} == {ClosedForm}
    assert result.status is EMStatus.MAX_STEPS, result
    path = [*result.history, result.elbo]
    assert min(b - a for a, b in pairwise(path)) >= -1e-9 * max(1, abs(path[0]))
    halves = result.history.after_m_step
    assert all(b >= a - 1e-9 * max(1, abs(a)) for a, b in zip(path, halves, strict=False))
    parts_agree(em, model, data)
