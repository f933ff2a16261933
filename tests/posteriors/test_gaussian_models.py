"""Models with Gaussian latents against their dense joint, and published numbers."""

from __future__ import annotations

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import transform_to

from pyro_em import ExactPosteriorEM, Gradient
from tests.posteriors.gaussian_models import (
    CONSTRAINTS,
    DenseJoint,
    GaussianModel,
    Values,
    dense_joint,
    expected_log_joint,
    random_gaussian_model,
)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    torch.set_default_dtype(torch.float32)


def unconstrained() -> Values:
    return {n: u.detach().clone() for n, u in pyro.get_param_store()._params.items()}


def objective(model: GaussianModel, joint: DenseJoint, at: Values) -> Tensor:
    """E_q[log p(x, h; θ)] for the posterior of a dense joint and θ from unconstrained values."""
    model.at = {n: transform_to(CONSTRAINTS[model.parameters[n][0]])(u) for n, u in at.items()}
    try:
        return expected_log_joint(joint, model.log_joint)
    finally:
        model.at = {}


def slopes(model: GaussianModel, joint: DenseJoint, at: Values, names: list[str]) -> Values:
    """The gradient of the objective in some parameters."""
    leaves = {n: u.clone().requires_grad_() for n, u in at.items()}
    value = objective(model, joint, leaves)
    if not names or not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("seed", range(36))
def test_a_random_program_has_evidence_and_m_step_of_its_dense_joint(seed: int) -> None:
    """All that means are made of is at its joint maximum, then all spreads are."""
    model = random_gaussian_model(seed)
    joint = dense_joint(model.shapes(), model.log_joint)
    em = ExactPosteriorEM(model)
    q = em.posterior()
    right = joint.log_evidence
    assert q.log_evidence == pytest.approx(right, rel=1e-9, abs=1e-9), model
    old = unconstrained()
    em.m_step(q)
    new = unconstrained()
    with torch.no_grad():
        before, after = objective(model, joint, old), objective(model, joint, new)
    size = 1e-6 * max(1.0, abs(float(after)))
    assert after >= before - 1e-9 * max(1.0, abs(float(before))), model
    if any(isinstance(u.update, Gradient) for u in em.plan().updates.values()):
        return  # these parameters move last
    means = [n for n in new if n in model.means]
    spreads = [n for n in new if n not in model.means]
    half = {n: u if n in means else old[n] for n, u in new.items()}
    for at, names in ((half, means), (new, spreads)):
        for name, slope in slopes(model, joint, at, names).items():
            assert slope.abs().max() < size, (name, slope, model)


@pytest.mark.parametrize("seed", range(0, 36, 6))
def test_the_evidence_of_a_random_program_never_falls(seed: int) -> None:
    model = random_gaussian_model(seed)
    result = ExactPosteriorEM(model).fit(max_steps=8, tol=0)
    path = torch.tensor([*result.history, result.log_evidence])
    assert (path.diff() >= -1e-9 * path[1:].abs().clamp(min=1)).all(), model
    joint = dense_joint(model.shapes(), model.log_joint)
    assert result.log_evidence == pytest.approx(joint.log_evidence, rel=1e-9, abs=1e-9), model
