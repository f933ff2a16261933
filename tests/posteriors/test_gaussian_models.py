"""Models with Gaussian latents against their dense joint, and published numbers."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
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

# Davies (1949): yields of six batches of dyestuff, five preparations each.
DYESTUFF = """
    1545 1440 1440 1520 1580 1540 1555 1490 1560 1495 1595 1550 1605 1510 1560 1445 1440 1595 1465 1545
    1595 1630 1515 1635 1625 1520 1455 1450 1480 1445
"""

# Flow of the Nile at Aswan in 10^8 cubic metres, 1871 … 1970; Durbin and Koopman (2012).
NILE = """
    1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100
    1210 1150 1250 1260 1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456
    824 702 1120 1100 832 764 821 768 845 864 862 698 845 744 796 1040 759 781 865 845 944 984 897 822
    1010 771 676 649 846 812 742 801 1040 860 874 848 890 744 749 838 1050 918 986 797 923 975 815 1020
    906 901 1170 912 746 919 718 714 740
"""


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
    if not names:
        return {}
    value = objective(model, joint, leaves)
    if not value.requires_grad:
        return {}
    found = torch.autograd.grad(value, [leaves[n] for n in names], allow_unused=True)
    return {n: g for n, g in zip(names, found, strict=True) if g is not None}


@pytest.mark.parametrize("seed", range(27))
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
    # As em.plan() shows them, without another reading of the model.
    if any(isinstance(u.update, Gradient) for u in em._session.program.updates.values()):
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


def test_dyestuff_goes_no_slower_than_the_published_way() -> None:
    """Plain EM enters its steps at these values; the maximum has a closed form."""
    y = torch.tensor([float(v) for v in DYESTUFF.split()])
    batch = torch.arange(6).repeat_interleave(5)

    def model() -> None:
        mu = pyro.param("mu", torch.tensor(1500.0))
        between, within = (
            pyro.param(n, torch.tensor(50.0), constraint=CONSTRAINTS["positive"])
            for n in ("between", "within")
        )
        with pyro.plate("batches", 6):
            u = pyro.sample("u", dist.Normal(0.0, between))
        with pyro.plate("rows", 30):
            pyro.sample("y", dist.Normal(mu + u[batch], within), obs=y)

    result = ExactPosteriorEM(model).fit(tol=1e-11, max_steps=400)
    plain = [-164.704957900, -164.427148444, -164.203185646]
    assert result.history[0] == pytest.approx(plain[0], abs=1e-9)
    assert all(ours >= theirs - 1e-9 for ours, theirs in zip(result.history, plain, strict=False))
    assert result.log_evidence == pytest.approx(-163.663529941, abs=1e-8)
    found = [float(result.params[n]) for n in ("mu", "between", "within")]
    assert found == pytest.approx([1527.5, 1388.333333**0.5, 2451.25**0.5], rel=1e-4)


def test_a_local_level_as_a_loop_has_the_published_smoother() -> None:
    """The Nile at known variances: evidence and smoothed levels of a Kalman smoother."""
    y = [float(v) for v in NILE.split()]

    def model() -> None:
        level = pyro.sample("level_0", dist.Normal(1000.0, 100.0))
        for t, flow in enumerate(y):
            if t:
                level = pyro.sample(f"level_{t}", dist.Normal(level, 1469.1**0.5))
            pyro.sample(f"flow_{t}", dist.Normal(level, 15099.0**0.5), obs=torch.tensor(flow))

    q = ExactPosteriorEM(model).posterior()
    assert q.log_evidence == pytest.approx(-638.683446992, abs=1e-8)
    levels = [q.mean(f"level_{t}").item() for t in (0, 49, 99)]
    assert levels == pytest.approx([1079.5802894964, 834.7632512506, 798.3702926084], abs=1e-8)
