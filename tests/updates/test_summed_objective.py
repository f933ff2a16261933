"""Covariances that are sums, and climbs on sums over the data: equal to climbs over the data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.fitting.steps.em_map import ByTracing
from pyro_em.graph.factors import Group
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.m_step import MStepState

_DRAWN = torch.Generator().manual_seed(4)
LOADINGS = torch.randn(2, 4, 1, generator=_DRAWN, dtype=torch.float64)
FACTOR = torch.randn(300, 1, generator=_DRAWN, dtype=torch.float64)
X = FACTOR @ LOADINGS[0].mT + torch.randn(300, 4, generator=_DRAWN, dtype=torch.float64)
EYE = torch.eye(4, dtype=torch.float64)
Covariance = Callable[[Tensor, Tensor, Tensor], Tensor]
COVARIANCES: dict[str, Covariance] = {
    "selected": lambda W, psi, z: (W @ W.mT + torch.diag_embed(psi))[z],
    "of selected": lambda W, psi, z: W[z] @ W[z].mT + torch.diag_embed(psi[z] ** 2),
    "with a constant": lambda W, psi, z: 0.1 * EYE + psi[z][..., :1, None] * EYE + (W @ W.mT)[z],
    "one beside several": lambda W, psi, z: torch.diag(psi[0]) + W[z] @ W[z].mT,
}


def em_of(covariance: Covariance) -> Callable[[Tensor], None]:
    def model(x: Tensor) -> None:
        weights = torch.tensor([0.4, 0.6], dtype=torch.float64)
        w = pyro.param("w", weights, constraint=C.simplex)
        m = pyro.param("m", x[:2].clone())
        W = pyro.param("W", LOADINGS.clone())
        psi = pyro.param("psi", torch.ones(2, 4, dtype=torch.float64), constraint=C.positive)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.MultivariateNormal(m[z], covariance(W, psi, z)), obs=x)

    return model


@pytest.mark.parametrize("case", COVARIANCES)
def test_the_objective_and_its_derivatives(case: str) -> None:
    with pyro.get_param_store().scope():
        program: Any = ExactPosteriorEM(em_of(COVARIANCES[case]))._ready((X,), {})
        assert program.compiled
        q, evaluation = program.posterior(), program.evaluate()
        on_sums = program.data_sums(q.counts, evaluation, MStepState())
        plain = program.data_sums(q.counts, evaluation, MStepState())
        plain.compiled = False
        moved = [program.graph.parameters[n] for n in ("W", "psi")]
        values = values_of(program.graph.parameters)
        generator = torch.Generator().manual_seed(1)
        for name in ("W", "psi", "m"):
            noise = torch.rand(values[name].shape, generator=generator, dtype=torch.float64)
            values[name] = values[name] + 0.3 * noise
        groups = range(len(program.graph.groups))
        a, b = (s.derivatives(values, moved, groups, 2) for s in (on_sums, plain))
    assert float(a.value) == pytest.approx(float(b.value), rel=1e-12)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-9, atol=1e-8)
    torch.testing.assert_close(a.hessian, b.hessian, rtol=1e-8, atol=1e-7)


def test_a_climb_does_not_go_through_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    before = Group.log_density

    def watched(self: Group, *args: Any) -> Tensor:
        seen.append(self.members[0])
        return before(self, *args)

    with pyro.get_param_store().scope():
        program = ExactPosteriorEM(em_of(COVARIANCES["selected"]))._ready((X,), {})
        steps = ByTracing(program)
        point, _ = steps.step(steps.e_step(), 0)
        monkeypatch.setattr(Group, "log_density", watched)
        steps.step(point, 1)
    assert 0 < seen.count("x") < 8  # a climb alone asks some twenty times


def test_one_component_is_factor_analysis() -> None:
    """The evidence of the maximum, against numpy's EM for the latent written out."""

    def model(x: Tensor) -> None:
        m = pyro.param("m", x.mean(0))
        W = pyro.param("W", LOADINGS[0].clone())
        psi = pyro.param("psi", torch.ones(4, dtype=torch.float64), constraint=C.positive)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.MultivariateNormal(m, W @ W.T + torch.diag(psi)), obs=x)

    S, W, psi = np.cov(X.numpy().T, bias=True), LOADINGS[0].numpy(), np.ones(4)
    for _ in range(3000):
        B = W.T @ np.linalg.inv(W @ W.T + np.diag(psi))
        W = S @ B.T @ np.linalg.inv(np.eye(1) - B @ W + B @ S @ B.T)
        psi = np.diag(S - W @ B @ S).copy()
    cov = W @ W.T + np.diag(psi)
    each = np.linalg.slogdet(2 * np.pi * cov)[1] + np.trace(np.linalg.solve(cov, S))
    with pyro.get_param_store().scope():
        result = ExactPosteriorEM(model).fit(X, max_steps=4, tol=0, progress=False)
    assert result.log_evidence == pytest.approx(-0.5 * len(X) * each, abs=1e-5)
