"""HalfNormal, Chi2 and Pareto mixtures on the kernel of rows, against EM by scipy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from scipy.optimize import brentq
from scipy.special import digamma
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ClosedForm, ExactPosteriorEM, PyroEMWarning
from pyro_em.updates.update import NewtonOnSums

Array = NDArray[np.float64]

START = torch.tensor([1.0, 4.0], dtype=torch.float64)
LEAST = torch.tensor(0.5, dtype=torch.float64)


def _chi2(x: Array, r: Array) -> Array:
    target = (r * np.log(x / 2)).sum(1) / r.sum(1)
    return np.array(
        [2 * brentq(lambda h, t=t: digamma(h) - t, 1e-6, 1e6, xtol=1e-14) for t in target]
    )


def _pareto_shape(x: Array, r: Array) -> Array:
    return r.sum(1) / (r * np.log(x / float(LEAST))).sum(1)


CASES: dict[str, tuple[Callable[[Tensor, Tensor], dist.TorchDistribution], ...]] = {
    "HalfNormal": (
        lambda a, z: dist.HalfNormal(a[z]),
        lambda x, a: stats.halfnorm.logpdf(x, scale=a),
        lambda x, r: np.sqrt((r * x**2).sum(1) / r.sum(1)),
    ),
    "Chi2": (
        lambda a, z: dist.Chi2(a[z]),
        lambda x, a: stats.chi2.logpdf(x, a),
        _chi2,
    ),
    "Pareto": (
        lambda a, z: dist.Pareto(LEAST, a[z]),
        lambda x, a: stats.pareto.logpdf(x, a, scale=float(LEAST)),
        _pareto_shape,
    ),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("name", CASES)
def test_steps_of_scipy(name: str) -> None:
    emission, log_density, maximiser = CASES[name]

    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]).double(), constraint=C.simplex)
        a = pyro.param("a", START.clone(), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", emission(a, z), obs=x)

    torch.manual_seed(0)
    x = 0.5 + dist.Exponential(0.5).sample((50,)).double()
    pyro.clear_param_store()
    em = ExactPosteriorEM(model)
    plan = em.plan(x)
    result = em.fit(x, max_steps=3, tol=0)
    assert plan.kernel == "mixture"
    update = NewtonOnSums if name == "Chi2" else ClosedForm
    assert isinstance(plan.updates["a"].update, update)

    w, a, data, history = np.array([0.4, 0.6]), START.numpy(), x.numpy(), []
    for _ in range(3):
        joint = np.log(w)[:, None] + log_density(data, a[:, None])
        evidence = np.logaddexp(*joint)
        history.append(evidence.sum())
        r = np.exp(joint - evidence)
        w, a = r.mean(1), maximiser(data, r)
    assert list(result.history) == pytest.approx(history, rel=1e-12)
    np.testing.assert_allclose(result.params["a"].numpy(), a, rtol=1e-10)


def test_a_scale_that_is_a_parameter_is_no_constant_of_sums() -> None:
    """Its gradient is not lost: the shape follows in closed form, and the evidence rises."""

    def model(x: Tensor) -> None:
        s = pyro.param("s", torch.tensor(0.3).double(), constraint=C.positive)
        a = pyro.param("a", torch.tensor(2.0).double(), constraint=C.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Pareto(s, a), obs=x)

    pyro.clear_param_store()
    x = torch.tensor([0.6, 0.9, 2.0, 5.0], dtype=torch.float64)
    em = ExactPosteriorEM(model)
    with pytest.warns(PyroEMWarning, match="support of site 'x'"):
        result = em.fit(x, max_steps=2, tol=0)
    assert 0.3 < float(result.params["s"]) <= 0.6
    assert list(result.history) == sorted(result.history)
