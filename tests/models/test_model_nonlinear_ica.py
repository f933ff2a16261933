"""Nonlinear ICA: the sum over states against a forward algorithm, MCC, recovery and its failure."""

from __future__ import annotations

import math
from itertools import permutations
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import norm
from torch import Tensor

from models import nonlinear_ica as nica
from pyro_em import ExactPosteriorEM
from tests.mains import run_main

pytestmark = pytest.mark.slow


def forward(s: np.ndarray, store: dict[str, np.ndarray]) -> float:
    """Log p(s) of all sequences by the forward recursion in NumPy. # s: (N, T, 2)"""
    e = norm(store["mu"], store["sigma"]).logpdf(s[:, :, None, :]).sum(-1)
    alpha = np.log(store["pi"]) + e[:, 0]
    for t in range(1, s.shape[1]):
        alpha = logsumexp(alpha[:, :, None] + np.log(store["A"]), axis=1) + e[:, t]
    return float(logsumexp(alpha, axis=1).sum())


def unbent(s: np.ndarray, f: nica.Mixing) -> np.ndarray:
    """f(s) in NumPy, from the weights. # (..., 2) -> (..., 2)"""
    part = {name: value.detach().numpy() for name, value in f.named_parameters()}
    a, b = np.moveaxis(s @ np.linalg.inv(part["turn"]).T, -1, 0)
    for i in range(len(f.g)):
        first, second = part[f"g.{i}.0.weight"][:, 0], part[f"g.{i}.2.weight"][0]
        g = np.tanh(a[..., None] * first + part[f"g.{i}.0.bias"]) @ second
        a, b = b + g + part[f"g.{i}.2.bias"], a
    return np.stack([a, b], -1) @ np.linalg.inv(part["unmix"]).T + part["centre"]


def bound_at(ica: nica.NonlinearICA, x: Tensor, s: Tensor) -> float:
    """The drawn bound of a guide that always draws ``s``: log Σ_c p(x, s, c)."""

    def always(x: Tensor) -> None:
        with pyro.plate("sequences", len(x)):
            for t in range(x.shape[1]):
                pyro.sample(f"s_{t}", dist.Delta(s[:, t], event_dim=1))

    return ExactPosteriorEM(ica.model, always).elbo(x).value


@pytest.fixture
def somewhere() -> tuple[Tensor, nica.NonlinearICA]:
    """Parameters and networks that are no special point, in the param store."""
    x = nica.load_data(seed=3, N=12, T=5).x
    ica = nica.NonlinearICA()
    with torch.no_grad():
        for value in ica.parameters():
            value += 0.3 * torch.randn_like(value)
    pyro.param("pi", torch.rand(6).softmax(0), constraint=dist.constraints.simplex)
    pyro.param("A", torch.randn(6, 6).softmax(1), constraint=dist.constraints.simplex)
    pyro.param("mu", torch.randn(6, 2))
    pyro.param("sigma", 0.2 + torch.rand(6, 2), constraint=dist.constraints.positive)
    pyro.param("v", torch.tensor([0.2, 0.4]), constraint=dist.constraints.positive)
    return x, ica


def test_the_bound_at_fixed_sources_is_a_forward_algorithm(
    somewhere: tuple[Tensor, nica.NonlinearICA],
) -> None:
    x, ica = somewhere
    s = torch.randn_like(x)
    ours = bound_at(ica, x, s)
    store = {k: v.detach().numpy() for k, v in pyro.get_param_store().items()}
    p_x = norm(unbent(s.numpy(), ica.f), store["v"]).logpdf(x.numpy()).sum()
    assert ours == pytest.approx(forward(s.numpy(), store) + p_x, abs=1e-6)


def test_the_guide_inverts_the_mixing_and_its_spread_is_the_turned_one(
    somewhere: tuple[Tensor, nica.NonlinearICA],
) -> None:
    x, ica = somewhere
    ica.frame.copy_(nica.rotation(0.6))
    s = ica.sources(x)
    np.testing.assert_allclose(unbent(s.numpy(), ica.f), x.numpy(), atol=1e-8)
    q = pyro.poutine.trace(ica.guide).get_trace(x).nodes["s_2"]["fn"]
    log_a, log_b, slope = ica.spread(x[:, 2]).detach().numpy().T
    turn = ica.frame.numpy()
    for n in range(len(x)):
        M = turn @ np.array(
            [[np.exp(log_a[n]), 0], [slope[n] * np.exp(log_b[n]), np.exp(log_b[n])]]
        )
        own = q.covariance_matrix[n].detach().numpy()
        np.testing.assert_allclose(own, M @ M.T, atol=1e-10)
        np.testing.assert_allclose(q.loc[n].detach().numpy(), s[n, 2].numpy(), atol=1e-12)


def test_only_without_states_may_the_sources_be_turned(
    somewhere: tuple[Tensor, nica.NonlinearICA],
) -> None:
    x, ica = somewhere
    iid = nica.NonlinearICA(1)
    iid.f, s, R = ica.f, torch.randn_like(x), nica.rotation(math.pi / 4)
    before = [bound_at(iid, x, s), bound_at(ica, x, s)]
    with torch.no_grad():
        ica.f.turn.copy_(R @ ica.f.turn)
    after = [bound_at(iid, x, s @ R.T), bound_at(ica, x, s @ R.T)]
    assert after[0] == pytest.approx(before[0], abs=1e-8)
    assert abs(after[1] - before[1]) > 1


def test_mcc_undoes_order_sign_and_scale_but_no_rotation() -> None:
    s = torch.randn(50_000, 3)
    changed = s[:, [2, 0, 1]] * torch.tensor([-3.0, 0.5, -1.0]) + 4
    back, score = nica.aligned(changed, s)
    assert score == pytest.approx(1.0, abs=1e-12)
    torch.testing.assert_close(back, nica.standard(s), atol=1e-10, rtol=0)
    turned = nica.standard(s[:, :2]) @ nica.rotation(math.pi / 4).T
    assert nica.aligned(turned, s[:, :2])[1] == pytest.approx(0.5**0.5, abs=0.01)


def test_mcc_is_the_best_matching_by_brute_force() -> None:
    for _ in range(5):
        a, b = torch.randn(40, 4), torch.randn(40, 4)
        r = np.abs(np.corrcoef(b.numpy().T, a.numpy().T)[:4, 4:])
        best = max(np.mean([r[i, j] for i, j in enumerate(p)]) for p in permutations(range(4)))
        assert nica.aligned(a, b)[1] == pytest.approx(best, abs=1e-12)


def test_no_linear_map_is_better_than_the_best_one() -> None:
    data = nica.load_data(0, N=50)
    best = nica.aligned(nica.best_linear(data.x, data.s), data.s)[1]
    flat, s = data.x.reshape(-1, 2).numpy(), data.s.reshape(-1, 2).numpy()
    design = np.column_stack([flat, np.ones(len(flat))])
    fitted = design @ np.linalg.lstsq(design, s, rcond=None)[0]
    by_hand = np.mean([np.corrcoef(fitted[:, d], s[:, d])[0, 1] for d in range(2)])
    assert best == pytest.approx(by_hand, abs=1e-10)
    others = [nica.aligned(data.x @ torch.randn(2, 2), data.s)[1] for _ in range(200)]
    assert max(others) < best


def test_the_data_are_the_same_in_both_precisions() -> None:
    wide = nica.load_data(1, N=20)
    torch.set_default_dtype(torch.float32)
    narrow = nica.load_data(1, N=20)
    assert narrow.x.dtype == torch.float32
    torch.testing.assert_close(narrow.x, wide.x.float())
    assert torch.equal(narrow.c, wide.c)


def test_states_recover_what_no_linear_map_can() -> None:
    data = nica.load_data(2, N=200)
    ica, _ = nica.fit(data.x, steps=(80, 80), seed=2)
    found = nica.aligned(ica.sources(data.x), data.s)[1]
    linear = nica.aligned(nica.best_linear(data.x, data.s), data.s)[1]
    assert 1 - found < 0.5 * (1 - linear)
    assert found > nica.aligned(nica.linear_ica(data.x), data.s)[1] + 0.04


def test_without_states_two_starts_differ_and_the_bound_does_not_tell() -> None:
    data = nica.load_data(1, C=1)
    bounds, answers = nica.two_starts(data, 40, seed=1)
    assert abs(bounds[0][0] - bounds[1][0]) < 0.02  # nats per observation
    scores = [nica.aligned(answer, data.s)[1] for answer in answers]
    assert abs(scores[0] - scores[1]) > 0.1
    assert nica.aligned(*answers)[1] < 0.8


def test_main_runs_in_single_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    torch.set_default_dtype(torch.float32)
    short = ["--seeds", "0", "--steps", "5", "5", "--iid-steps", "5", "-N", "60"]
    printed = run_main(nica, monkeypatch, capsys, tmp_path, *short)
    assert "with each other" in printed
    assert "c_0 … c_7 (8 sites)  Categorical (6)  sequences  enumerate" in printed
