"""Smoothing of chains against sums over all paths, and against scaling at every step in numpy."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pyro_em.posteriors.messages import forward_backward
from pyro_em.posteriors.messages.forward_backward import smooth, wants_lanes

Found = tuple[Tensor, Tensor, Tensor]
Way = Callable[..., Found]


def lanes(likelihood: Tensor) -> Tensor:
    """The same numbers with sequences as the last dimension in memory."""
    return likelihood.permute(2, 1, 0).contiguous().permute(2, 1, 0)


def by_torch(way: Callable[..., forward_backward._Messages], every: int | None = None) -> Way:
    """One way of torch alone, whatever the sizes."""

    def found(likelihood: Tensor, A: Tensor, weight: Tensor | None = None) -> Found:
        largest = A.sum(-1).amax()
        how = {} if every is None else {"every": every}
        messages = way(likelihood.permute(1, 2, 0), A / largest, **how)
        gamma, xi = messages.smoothed(likelihood, A / largest, weight)
        B, T, _ = likelihood.shape
        return gamma, xi, messages.log_evidence() + B * (T - 1) * largest.log()

    return found


def as_on_a_gpu(way: Way) -> Way:
    """The same with torch's operations, as tensors elsewhere need them."""

    def found(likelihood: Tensor, A: Tensor, weight: Tensor | None = None) -> Found:
        elsewhere = forward_backward._tiny_operations(torch.device("meta"), A.shape[0], 1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forward_backward, "_tiny_operations", lambda *_: elsewhere)
            return way(likelihood, A, weight)

    return found


def without_numba(likelihood: Tensor, A: Tensor, weight: Tensor | None = None) -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_backward, "_HAS_NUMBA", False)
        return smooth(likelihood, A, weight)


def with_numba(likelihood: Tensor, A: Tensor, weight: Tensor | None = None) -> Found:
    if not forward_backward._HAS_NUMBA:
        pytest.skip("numba is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward_backward, "_FEW", 0)
        return smooth(likelihood, A, weight)


def in_lanes(likelihood: Tensor, A: Tensor, weight: Tensor | None = None) -> Found:
    """Numba's loop over sequences, of any number."""
    if not forward_backward._HAS_NUMBA:
        pytest.skip("numba is not installed")
    from pyro_em.posteriors.messages.numba_chain import smooth_lanes

    gamma, xi = torch.empty_like(lanes(likelihood).permute(2, 1, 0)), torch.empty_like(A)
    weight = torch.ones(1, 1) if weight is None else weight.T.contiguous()
    often = torch.ones(len(likelihood), dtype=A.dtype)
    arrays = (lanes(likelihood).permute(2, 1, 0), A, weight, often, gamma, xi)
    evidence = smooth_lanes(*(t.numpy() for t in arrays))
    return gamma.permute(2, 1, 0), xi, torch.tensor(evidence)


WAYS: dict[str, Way] = {
    "numba": with_numba,
    "numba, lanes": in_lanes,
    "torch": without_numba,
    "one loop": by_torch(forward_backward._one_loop),
    "one loop, normalised at every step": by_torch(forward_backward._one_loop, 1),
    "two levels": by_torch(forward_backward._two_levels),
    "one loop, as on a GPU": as_on_a_gpu(by_torch(forward_backward._one_loop)),
    "two levels, as on a GPU": as_on_a_gpu(by_torch(forward_backward._two_levels)),
}


SHAPES = [(1, 200, 4), (3, 97, 2), (40, 33, 3), (9, 17, 5), (1, 16, 2), (1, 18, 9), (300, 20, 2)]
SHAPES += [(2, 400, 8), (1, 300, 17), (17, 50, 20)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Iterator[Way]:
    yield WAYS[request.param]


def by_paths(likelihood: np.ndarray, A: np.ndarray, weight: np.ndarray) -> tuple:
    """Marginals, weighted transitions and evidence by summing over all paths."""
    B, T, K = likelihood.shape
    gamma, xi, log_evidence = np.zeros((B, T, K)), np.zeros((K, K)), 0.0
    for b in range(B):
        pairs, evidence = np.zeros((T - 1, K, K)), 0.0
        for path in itertools.product(range(K), repeat=T):
            p = likelihood[b, 0, path[0]]
            for t in range(1, T):
                p = p * A[path[t - 1], path[t]] * likelihood[b, t, path[t]]
            evidence += p
            for t in range(T):
                gamma[b, t, path[t]] += p
            for t in range(1, T):
                pairs[t - 1, path[t - 1], path[t]] += p
        gamma[b] /= evidence
        xi += (pairs / evidence * weight[b, :, None, None]).sum(0)
        log_evidence += np.log(evidence)
    return gamma, xi, log_evidence


def by_steps(likelihood: np.ndarray, A: np.ndarray, weight: np.ndarray) -> tuple:
    """The same in log space, step by step. # weight (B, T - 1)"""
    B, T, K = likelihood.shape
    with np.errstate(divide="ignore"):
        log_l, log_a = np.log(likelihood), np.log(A)
    alpha, beta = np.zeros((T, B, K)), np.zeros((T, B, K))
    alpha[0] = log_l[:, 0]
    for t in range(1, T):
        step = alpha[t - 1][:, :, None] + log_a
        alpha[t] = np.logaddexp.reduce(step, 1) + log_l[:, t]
    for t in range(T - 1, 0, -1):
        beta[t - 1] = np.logaddexp.reduce(log_a + (log_l[:, t] + beta[t])[:, None], 2)
    evidence = np.logaddexp.reduce(alpha[-1], -1)
    xi = np.zeros((K, K))
    for t in range(1, T):
        pair = alpha[t - 1][:, :, None] + log_a + (log_l[:, t] + beta[t])[:, None]
        xi += (np.exp(pair - evidence[:, None, None]) * weight[:, t - 1, None, None]).sum(0)
    return np.exp(alpha + beta - evidence[:, None]).transpose(1, 0, 2), xi, evidence.sum()


def assert_close(found: Found, expected: tuple, T: int, weight: np.ndarray) -> None:
    gamma, xi, log_evidence = found
    np.testing.assert_allclose(gamma.sum(-1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(gamma, expected[0], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(xi, expected[1], rtol=1e-9, atol=1e-12)
    assert float(xi.sum()) == pytest.approx(np.broadcast_to(weight, (len(gamma), T - 1)).sum())
    assert log_evidence.dtype == torch.float64 and log_evidence.ndim == 0
    assert float(log_evidence) == pytest.approx(expected[2], rel=1e-11, abs=1e-11)


def case(B: int, T: int, K: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    likelihood = torch.rand(B, T, K, generator=generator, dtype=torch.float64) ** 3
    A = torch.rand(K, K, generator=generator, dtype=torch.float64)
    return likelihood / likelihood.amax(-1, keepdim=True), A


@pytest.mark.parametrize("T", [2, 3, 5, 7])
@pytest.mark.parametrize("layout", [Tensor.contiguous, lanes])
def test_against_all_paths(way: Way, T: int, layout: Callable[[Tensor], Tensor]) -> None:
    likelihood, A = case(2, T, 3)
    A[0, 1] = 0.0
    weight = torch.rand(2, T - 1)
    expected = by_paths(likelihood.numpy(), A.numpy(), weight.numpy())
    found = way(layout(likelihood), A, weight)
    assert_close(found, expected, T, weight.numpy())


def test_the_reference_against_all_paths() -> None:
    likelihood, A = (t.numpy() for t in case(2, 6, 3))
    weight = np.random.default_rng(0).random((2, 5))
    for one, other in zip(
        by_steps(likelihood, A, weight), by_paths(likelihood, A, weight), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [Tensor.contiguous, lanes])
def test_against_log_space(
    way: Way, shape: tuple[int, ...], layout: Callable[[Tensor], Tensor]
) -> None:
    likelihood, A = case(*shape)
    weight = np.ones((shape[0], shape[1] - 1))
    expected = by_steps(likelihood.numpy(), A.numpy(), weight)
    assert_close(way(layout(likelihood), A), expected, shape[1], weight)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 12), T=st.integers(2, 60), K=st.integers(2, 12))
def test_random_shapes(seed: int, B: int, T: int, K: int) -> None:
    likelihood, A = case(B, T, K, seed)
    shape = [(B, T - 1), (1, T - 1), (B, 1), (1, 1)][seed % 4]
    weight = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    full = weight.expand(B, T - 1).numpy()
    expected = by_steps(likelihood.numpy(), A.numpy(), full)
    for way in WAYS.values():
        assert_close(way(likelihood, A, weight), expected, T, full)


def test_in_blocks(way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where α and β are combined in several blocks of steps."""
    monkeypatch.setattr(forward_backward, "_BLOCK", 1)
    for shape in [(2, 32, 3), (5, 49, 2)]:
        likelihood, A = case(*shape)
        for weight in (torch.rand(shape[0], shape[1] - 1), torch.rand(1, 1)):
            full = weight.expand(shape[0], shape[1] - 1).numpy()
            expected = by_steps(likelihood.numpy(), A.numpy(), full)
            assert_close(way(likelihood, A, weight), expected, shape[1], full)


@pytest.mark.parametrize("name", ["_one_loop", "_two_levels"])
def test_all_stays_on_one_device(name: str) -> None:
    """A tensor made elsewhere would be refused."""
    likelihood, A = (t.to("meta") for t in case(3, 50, 4))
    messages = getattr(forward_backward, name)(likelihood.permute(1, 2, 0), A)
    found = [*messages.smoothed(likelihood, A, None), messages.log_evidence(), messages.are_kept()]
    assert {t.device.type for t in found} == {"meta"}


def left_to_right(T: int) -> tuple[Tensor, Tensor]:
    """Four states in a row, seen exactly where the third begins; two sequences."""
    A = torch.tensor(
        [[0.7, 0.3, 0, 0], [0, 0.8, 0.2, 0], [0, 0, 0.9, 0.1], [0, 0, 0, 1.0]], dtype=torch.float64
    )
    likelihood = case(2, T, 4)[0]
    likelihood[:, 0] = torch.tensor([1.0, 0, 0, 0])
    likelihood[:, T // 2] = torch.tensor([0, 0, 1.0, 0])
    return likelihood, A


def informative(T: int) -> tuple[Tensor, Tensor]:
    """Each step all but says its state, transitions are rare: the mass falls at most steps."""
    A = torch.full((3, 3), 1e-20, dtype=torch.float64).fill_diagonal_(1.0)
    states = torch.randint(0, 3, (2, T), generator=torch.Generator().manual_seed(1))
    likelihood = torch.full((2, T, 3), 1e-100, dtype=torch.float64)
    return likelihood.scatter_(2, states.unsqueeze(-1), 1.0), A


@pytest.mark.parametrize("make", [left_to_right, informative])
@pytest.mark.parametrize("T", [5, 40, 130])
@pytest.mark.parametrize("name", WAYS)
def test_zeros_and_certainties(
    name: str, make: Callable[[int], tuple[Tensor, Tensor]], T: int
) -> None:
    """Where normalising at few steps underflows, the messages say so and `smooth` is right."""
    likelihood, A = make(T)
    rare = {
        "one loop": forward_backward._one_loop,
        "two levels": forward_backward._two_levels,
    }.get(name.removesuffix(", as on a GPU"))
    kept = rare is None or bool(rare(likelihood.permute(1, 2, 0), A).are_kept())
    assert kept or make is informative
    assert rare is None or make is left_to_right or not (kept and T == 130)
    if kept:
        weight = np.ones((2, T - 1))
        expected = by_steps(likelihood.numpy(), A.numpy(), weight)
        assert_close(WAYS[name](likelihood, A), expected, T, weight)


@pytest.mark.parametrize("wrong", ["tiny", "impossible", "not a number"])
@pytest.mark.parametrize("shape", [(1, 40, 3), (1, 2, 2), (30, 20, 3)])
def test_a_step_that_cannot_be_trusted_gives_no_evidence(
    way: Way, wrong: str, shape: tuple[int, int, int]
) -> None:
    B, T, _ = shape
    likelihood, A = case(*shape)
    A /= A.sum(-1, keepdim=True)
    t, b = T // 2, B - 1
    A[:, 0] *= 1e-100 if wrong == "tiny" else 0.0
    likelihood[b, t] = 1e-60 if wrong == "tiny" else 0.0
    likelihood[b, t, 0] = 1.0
    if wrong == "tiny":
        likelihood[b, t, 1:] = 1e-160
        A[:, 0] *= 1e-60
    if wrong == "not a number":
        likelihood[b, t] = torch.nan
    assert torch.isnan(way(likelihood, A)[2])


def test_the_layout_is_kept() -> None:
    likelihood, A = case(40, 30, 3)
    for numba in {forward_backward._HAS_NUMBA, False}:
        run = smooth if numba else without_numba
        assert run(likelihood, A)[0].is_contiguous()
        assert run(lanes(likelihood), A)[0].permute(2, 1, 0).is_contiguous()
        assert run(likelihood[:, :, [0, 1]][:, ::2], A[:2, :2])[0].shape == (40, 15, 2)


def test_few_sequences_want_no_lanes() -> None:
    assert wants_lanes(100, 5, torch.device("cpu"))
    assert not wants_lanes(1, 10, torch.device("cpu"))


def test_large_steps_keep_torchs_threads() -> None:
    cpu = torch.device("cpu")
    for K in (4, 20):
        assert forward_backward._tiny_operations(cpu, K, 2**12 // K - 1)[1] is np.multiply
        assert forward_backward._tiny_operations(cpu, K, 2**12 // K + 1)[1] is torch.mul
