"""Arguments that are computed of parameters alone: steps on kernels, against EM in numpy.

Maximum likelihood does not depend on how a model is parametrised: where a function of parameters
reaches every value, the M-step of its result is that of a parameter in its place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import Chunks, ExactPosteriorEM, vectorized_markov
from pyro_em.tracing.tape import Recorder

K, STEPS = 3, 5
WAYS = ("sticks", "order", "steps", "network", "tanh")
NET = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)).double()
RUNS: list[str] = []


def _weights(way: str) -> Tensor:
    if way != "sticks":
        return pyro.param("w", torch.full((K,), 1 / K).double(), constraint=C.simplex)
    half = torch.tensor([1 / 3, 1 / 2]).double()
    broken = pyro.param("sticks", half, constraint=C.unit_interval)
    one = torch.ones(1).double()
    return torch.cat([broken, one]) * torch.cat([one, (1 - broken).cumprod(0)])


def _means(way: str) -> Tensor:
    if way == "order":
        first = pyro.param("first", torch.tensor(-2.0).double())
        gaps = pyro.param("gaps", torch.full((K - 1,), 2.0).double().log())
        return torch.cat([first.reshape(1), first + gaps.exp().cumsum(0)])
    if way == "steps":  # affine in parameters, which a constraint bounds
        steps = pyro.param("steps", torch.full((K,), 2.0).double(), constraint=C.positive)
        return steps.cumsum(0) - 4
    if way == "network":
        pyro.module("net", NET)
        return NET(pyro.param("code", torch.linspace(-1, 1, 2 * K).double().reshape(K, 2)))[:, 0]
    if way == "tanh":
        return 8 * torch.tanh(
            pyro.param("t", (torch.tensor([-2.0, 0.0, 2.0]) / 8).double().atanh())
        )
    return pyro.param("mu", torch.tensor([-2.0, 0.0, 2.0]).double())


def mixture(x: Tensor, way: str) -> None:
    RUNS.append(way)
    w, mu = _weights(way), _means(way)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w.to(x.dtype)))
        pyro.sample("x", dist.Normal(mu.to(x.dtype)[z], 1.0), obs=x)


def _rows(N: int = 200) -> Tensor:
    z = torch.arange(N) % K
    noise = torch.randn(N, generator=torch.Generator().manual_seed(0)).double()
    return 3.0 * (z - 1) + noise * (0.5 + 0.3 * z)


def textbook(x: np.ndarray, mu: np.ndarray) -> list[float]:
    """The evidence entering each step of EM of a mixture of Normals."""
    w, found = np.full(K, 1 / K), []
    for _ in range(STEPS):
        log = np.log(w) - 0.5 * np.log(2 * np.pi) - 0.5 * (x[:, None] - mu) ** 2
        total = np.logaddexp.reduce(log, 1)
        found.append(total.sum())
        r = np.exp(log - total[:, None])
        n = r.sum(0)
        w, mu = n / len(x), (r * x[:, None]).sum(0) / n
    return found


@pytest.mark.parametrize("way", WAYS)
def test_steps_are_those_of_the_textbook(way: str) -> None:
    x = _rows()
    with torch.no_grad():
        torch.manual_seed(3)
        for layer in (NET[0], NET[2]):
            layer.reset_parameters()
        mu = _means(way).detach()
    pyro.clear_param_store()
    em = ExactPosteriorEM(lambda x: mixture(x, way))
    plan = em.plan(x)
    assert (plan.kernel, plan.kernel_reason) == ("mixture", None)
    RUNS.clear()
    result = em.fit(x, max_steps=STEPS, tol=0, progress=False)
    few = len(RUNS)
    np.testing.assert_allclose(list(result.history), textbook(x.numpy(), mu.numpy()), rtol=1e-8)
    RUNS.clear()
    em.fit(x, max_steps=3 * STEPS, tol=0, progress=False)
    assert len(RUNS) <= few  # steps do not run the model


def test_chunks_take_the_same_steps() -> None:
    x = _rows()
    found = []
    for data in (x, Chunks(x, rows=64)):
        pyro.clear_param_store()
        em = ExactPosteriorEM(lambda x: mixture(x, "order"))
        found.append(list(em.fit(data, max_steps=STEPS, tol=0, progress=False).history))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-10)


def test_float32() -> None:
    x = _rows()
    em = ExactPosteriorEM(lambda x: mixture(x, "sticks"))
    found = list(em.fit(x.float(), max_steps=STEPS, tol=0, progress=False).history)
    np.testing.assert_allclose(found, textbook(x.numpy(), np.array([-2.0, 0, 2])), rtol=1e-5)


def _ring(stay: Tensor) -> Tensor:
    """Moves to the next of three states, or none: other moves are impossible."""
    return torch.diag(stay) + torch.diag(1 - stay).roll(1, 1)


def chain(y: Tensor, loop: Callable[[int], Any], inside: bool) -> None:
    stay = pyro.param("stay", torch.tensor([0.5, 0.6, 0.7]).double(), constraint=C.unit_interval)
    A, z = _ring(stay), torch.tensor(0)
    mu = torch.tensor([-2.0, 0.0, 2.0]).double()
    for t in loop(len(y)):
        A = _ring(stay) if inside else A
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"y_{t}", dist.Normal(mu[z], 1.0), obs=y[t])


def baum_welch(y: np.ndarray) -> list[float]:
    """The evidence entering each step, whose M-step is the share of moves that stay."""
    stay, found = np.array([0.5, 0.6, 0.7]), []
    dens = np.exp(-0.5 * (y[:, None] - np.array([-2.0, 0, 2])) ** 2) / np.sqrt(2 * np.pi)
    for _ in range(STEPS):
        A = np.diag(stay) + np.roll(np.diag(1 - stay), 1, 1)
        alpha, beta = [A[0] * dens[0]], [np.ones(3)]
        for d in dens[1:]:
            alpha.append(alpha[-1] @ A * d)
        for d in dens[:0:-1]:
            beta.append(A @ (d * beta[-1]))
        beta = beta[::-1]
        evidence = alpha[-1].sum()
        found.append(np.log(evidence))
        moves = np.zeros((3, 3))
        moves[0] += alpha[0] * beta[0] / evidence  # z_0 follows state 0
        for t in range(1, len(y)):
            moves += alpha[t - 1][:, None] * A * dens[t] * beta[t] / evidence
        stay = np.diag(moves) / moves.sum(1)
    return found


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("loop", ["markov", "vectorized"])
def test_chains_with_impossible_moves(loop: str, inside: bool) -> None:
    """Members of a group that read the same are computed once, wherever the model computes them."""
    y = _rows(24)
    loops: dict[str, Callable[[int], Any]] = {
        "markov": lambda T: pyro.markov(range(T)),
        "vectorized": lambda T: vectorized_markov("t", T),
    }
    em = ExactPosteriorEM(lambda y: chain(y, loops[loop], inside))
    assert em.plan(y).kernel == "chain"
    result = em.fit(y, max_steps=STEPS, tol=0, progress=False)
    np.testing.assert_allclose(list(result.history), baum_welch(y.numpy()), rtol=1e-9)


def test_what_is_not_read_is_no_parameter() -> None:
    def model(x: Tensor) -> None:
        d = pyro.param("d", torch.full((5,), 0.1).double())
        w = pyro.param("w", torch.full((K,), 1 / K).double(), constraint=C.simplex)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Normal(d.sinh().cumsum(0)[:3][z], 1.0), obs=x)

    result = ExactPosteriorEM(model).fit(_rows(), max_steps=2, progress=False)
    assert result.num_free_parameters == 2 + 3


def test_a_changed_number_is_seen() -> None:
    x, size = _rows(), [8.0]

    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.tensor([-0.3, 0.0, 0.3]).double())
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K).double()))
            pyro.sample("x", dist.Normal((size[0] * torch.tanh(t))[z], 1.0), obs=x)

    em = ExactPosteriorEM(model)
    em.fit(x, max_steps=2, progress=False)
    size[0] = 4.0
    kept = em.fit(x, max_steps=2, progress=False).history[0]
    at = 4 * torch.tanh(pyro.param("t").detach())
    log = dist.Normal(at, 1.0).log_prob(x[:, None]) - torch.tensor(3.0).log()
    assert kept != pytest.approx(float(log.logsumexp(1).sum()), abs=1e-9)  # t has moved since
    pyro.get_param_store()["t"] = torch.tensor([-0.3, 0.0, 0.3]).double()
    at = 4 * torch.tanh(torch.tensor([-0.3, 0.0, 0.3]).double())
    log = dist.Normal(at, 1.0).log_prob(x[:, None]) - torch.tensor(3.0).log()
    assert em.score(x) == pytest.approx(float(log.logsumexp(1).sum()), abs=1e-9)
    first = em.fit(x, max_steps=1, progress=False).history[0]
    assert first == pytest.approx(float(log.logsumexp(1).sum()), abs=1e-9)


def test_models_that_decide_by_a_parameter_are_run() -> None:
    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.tensor([-0.3, 0.1, 0.3]).double())
        high = torch.tanh(t) if float(t[0]) > -1 else 2 * torch.sin(t)
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K).double()))
            pyro.sample("x", dist.Normal((8 * high)[z], 1.0), obs=x)

    em = ExactPosteriorEM(model)
    assert em.plan(_rows()).kernel == "contraction"
    history = list(em.fit(_rows(), max_steps=4, tol=0, progress=False).history)
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(history))


def test_random_numbers_are_no_function_of_parameters() -> None:
    def model(x: Tensor) -> None:
        t = pyro.param("t", torch.tensor([-0.3, 0.1, 0.3]).double())
        with pyro.plate("n", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(K).double()))
            pyro.sample("x", dist.Normal((torch.tanh(t) + torch.rand(K).double())[z], 1.0), obs=x)

    plan = ExactPosteriorEM(model).plan(_rows())
    assert plan.kernel == "contraction"
    assert not plan.compiled


def test_of_a_stack_one_element_is_computed() -> None:
    a = torch.rand(3, requires_grad=True)
    recorder = Recorder({"a": a}, ())
    with recorder:
        parts = [a * i for i in range(4)]
        made = {"one": torch.stack(parts)[2], "other": torch.stack(parts, 1)[2]}
    tape = recorder.tape(made)
    assert tape is not None
    short = tape.through_stacks()
    assert len(short.only(["one"]).operations) == 1
    at = torch.rand(3)
    for key, wanted in (("one", 2 * at), ("other", at[2] * torch.arange(4))):
        torch.testing.assert_close(short.only([key])({"a": at})[key], wanted)
