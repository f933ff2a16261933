"""Few components in Python's numbers: numpy's coefficients, and the M-step that tensors make."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities.components import Owned
from pyro_em.errors import Handover
from pyro_em.posteriors.mixtures.mixture import Mixture


def model(x: Tensor, K: int) -> None:
    """Full covariances. # x: (N, D)"""
    w = pyro.param("w", x.new_ones(K) / K, constraint=C.simplex)
    mu = pyro.param("mu", x[:K].clone())
    cov = torch.cov(x.T).reshape(x.shape[1], -1).repeat(K, 1, 1)
    S = pyro.param("S", cov, constraint=C.positive_definite)
    with pyro.plate("rows", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def made(D: int, K: int) -> tuple[Mixture, Owned, dict[str, Tensor]]:
    """A kernel, its components and parameter values."""
    pyro.clear_param_store()
    g = torch.Generator().manual_seed(10 * D + K)
    mix = torch.randn(D, D, generator=g).double()
    x = torch.randn(80, D, generator=g).double() @ mix + torch.arange(80).remainder(K)[:, None]
    block = ExactPosteriorEM(model)._session.look((x, K), {}).kernel.block  # type: ignore[union-attr]
    assert isinstance(block, Mixture)
    (owned,) = block.theta.owned.values()
    assert isinstance(owned, Owned)
    return block, owned, {n: pyro.param(n).detach() for n in ("w", "mu", "S")}


def tensors_alone(owned: Owned) -> Owned:
    """The same components, which are always solved by tensors."""
    out = replace(owned)
    vars(out)["_small"] = None
    return out


@pytest.mark.parametrize(("D", "K"), [(1, 3), (2, 2), (2, 5), (3, 2)])
def test_components_and_their_m_step_are_those_of_tensors(D: int, K: int) -> None:
    block, owned, values = made(D, K)
    assert owned._small is not None
    plain = tensors_alone(owned)
    here, there = owned.enter(values), plain.enter(values)
    assert torch.allclose(here.root, there.root, rtol=1e-13)
    at = block.theta.enter(values)
    expectation = block.e_step(at)
    (sums,) = (s for key, s in expectation.sums.items() if isinstance(key, int))
    found, gain = owned.m_step(here, sums["moments"], sums["mass"])
    expected, rise = plain.m_step(there, sums["moments"], sums["mass"])
    assert gain == pytest.approx(float(rise), rel=1e-10)
    for ours, theirs in ((here, there), (found, expected)):
        for name in ("mu", "root", "spread"):
            assert torch.allclose(
                getattr(ours, name), getattr(theirs, name), rtol=1e-11, atol=1e-13
            )
        for name in ("linear", "constant"):
            own, other = getattr(ours.prepared, name), getattr(theirs.prepared, name)
            assert torch.allclose(own, other, rtol=1e-10, atol=1e-12)
        assert ours.prepared.size == pytest.approx(theirs.prepared.size, rel=1e-11)


def test_coefficients_are_numpys_log_density() -> None:
    _, owned, values = made(2, 2)
    mean, cov = values["mu"].numpy(), values["S"].numpy()
    x = owned.rule.centre.numpy() + np.array([[0.3, -1.2], [2.0, 0.5]])
    p = owned.enter(values).prepared
    d = torch.as_tensor(x - owned.rule.centre.numpy())
    i, j = owned.rule.upper
    features = torch.cat([d, d[:, i] * d[:, j]], 1)
    assert p.linear is not None
    ours = p.constant + p.linear @ features.T
    for k in range(2):
        r = x - mean[k]
        quadratic = np.einsum("ni,ij,nj->n", r, np.linalg.inv(cov[k]), r)
        theirs = -0.5 * quadratic - 0.5 * np.linalg.slogdet(cov[k])[1] - math.log(2 * math.pi)
        assert ours[k].numpy() == pytest.approx(theirs, rel=1e-12)


def test_what_is_near_a_collapse_or_too_narrow_is_left_to_others() -> None:
    block, owned, values = made(2, 2)
    small, here = owned._small, owned.enter(values)
    assert small is not None and here.prepared.wide is not None
    (sums,) = (s for k, s in block.e_step(block.theta.enter(values)).sums.items() if k != "natural")
    moments, mass = sums["moments"], sums["mass"]
    for empty in (mass * torch.tensor([1.0, 0.0]).double(), mass * math.nan):
        with pytest.raises(Handover):
            owned.m_step(here, moments, empty)
    flat = moments.clone()
    flat[0, 2:] = torch.stack([flat[0, a] * flat[0, b] for a, b in small.pairs]) / mass[0]
    with pytest.raises(Handover):
        owned.m_step(here, flat, mass)
    with pytest.raises(Handover):
        owned.enter({**values, "S": -values["S"]})
    narrow = {**values, "S": 1e-9 * values["S"]}
    assert small.at(here.mu, narrow["S"]) is None
    assert owned.enter(narrow).prepared.white is not None
