"""Chains of product states and of changing moves: against the joint table, the contraction, peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_em import Chunks, ExactPosteriorEM
from pyro_em.densities.tying import collapsed
from pyro_em.errors import Finding
from pyro_em.posteriors.block import Component
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.chains.step_chain import StepChain
from pyro_em.posteriors.messages import forward_backward
from pyro_em.testing import check_block
from pyro_em.tracing.parameters import parameters_at, values_of
from tests.graph.vectorized_models import LOOPS, Loop, data, real, simplex
from tests.posteriors.random_step_chains import RandomSteps

X, XS = data(5, seed=4), data(4, 2, seed=5)
U, US = torch.tensor([0, 1, 1, 0, 1]), torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]])


def regimes(loop: Loop, x: Tensor, u: Tensor) -> None:
    """A known input chooses the transitions."""
    pi, A, mu = simplex("pi", 2), simplex("A", 2, 2, 2), real("mu", 2)
    z = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else Vindex(A)[u[t], z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def in_a_plate(loop: Loop, x: Tensor, u: Tensor) -> None:
    """Each sequence has inputs of its own, for what is seen too."""
    A, E = simplex("A", 2, 2, 2), simplex("E", 2, 2, 3)
    z = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            z = pyro.sample(
                f"z_{t}", dist.Categorical(A[0, 0] if z is None else Vindex(A)[u[t], z])
            )
            symbol = (x[t].abs() * 2).long().clamp(max=2)
            pyro.sample(f"x_{t}", dist.Categorical(Vindex(E)[u[t], z]), obs=symbol)


def two_chains(loop: Loop, x: Tensor) -> None:
    A, B, mu = simplex("A", 2, 2), simplex("B", 3, 3, seed=4), real("mu", 2, 3)
    z = w = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(B[1] if w is None else B[w]))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(mu)[z, w], 1.0), obs=x[t])


def coupled(loop: Loop, x: Tensor) -> None:
    """Each of two latents reads both of the step before; one form of beginning for both."""
    A, B = simplex("A", 2, 2, 2), simplex("B", 2, 2, 2, seed=4)
    mu, E = real("mu", 2), simplex("E", 2, 3)
    pi = torch.tensor([0.5, 0.5], dtype=x.dtype)
    z = w = None
    for t in loop("time", len(x)):
        a = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else Vindex(A)[z, w]))
        w = pyro.sample(f"w_{t}", dist.Categorical(pi if z is None else Vindex(B)[z, w]))
        z = a
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])
        pyro.sample(f"y_{t}", dist.Categorical(E[w]), obs=(x[t].abs() * 2).long().clamp(max=2))


def layers(loop: Loop, x: Tensor) -> None:
    A, B, E = simplex("A", 2, 2), simplex("B", 2, 2, 2, seed=4), simplex("E", 2, 2, 3)
    z = w = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        w = pyro.sample(f"w_{t}", dist.Categorical(A[z] if w is None else Vindex(B)[z, w]))
        seen = dist.Categorical(Vindex(E)[z, w])
        pyro.sample(f"y_{t}", seen, obs=(x[t].abs() * 2).long().clamp(max=2))


def reads_both_ends(loop: Loop, x: Tensor) -> None:
    """What is seen depends on the state before, too."""
    A, mu = simplex("A", 2, 2), real("mu", 2, 2)
    z = None
    for t in loop("time", len(x)):
        n = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        loc = mu[0][n] if z is None else Vindex(mu)[z, n]
        pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[t])
        z = n


def second_order(loop: Loop, x: Tensor) -> None:
    A, first, mu = simplex("A", 2, 2, 2), simplex("first", 2, 2, seed=4), real("mu", 2)
    z = y = None
    for t in loop("time", len(x), history=2):
        p = first[0] if z is None else first[z] if y is None else Vindex(A)[y, z]
        y, z = z, pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def mixtures(loop: Loop, x: Tensor) -> None:
    """A latent of each step that is not carried on."""
    A, W, mu = simplex("A", 2, 2), simplex("W", 2, 3, seed=4), real("mu", 2, 3)
    z = None
    for t in loop("time", len(x)):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        m = pyro.sample(f"m_{t}", dist.Categorical(W[z]))
        pyro.sample(f"x_{t}", dist.Normal(Vindex(mu)[z, m], 1.0), obs=x[t])


def ragged(loop: Loop, x: Tensor, u: Tensor) -> None:
    """Sequences of unequal lengths, with inputs and a local latent."""
    A, W, mu = simplex("A", 2, 2, 2), simplex("W", 2, 2, seed=4), real("mu", 2, 2)
    lengths = torch.tensor([4, 2])
    z = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            with poutine.mask(mask=t < lengths):
                p = A[0, 0] if z is None else Vindex(A)[u[t], z]
                z = pyro.sample(f"z_{t}", dist.Categorical(p))
                m = pyro.sample(f"m_{t}", dist.Categorical(W[z]))
                pyro.sample(f"x_{t}", dist.Normal(Vindex(mu)[z, m], 1.0), obs=x[t])


def weighted(loop: Loop, x: Tensor, u: Tensor) -> None:
    A, mu, w = simplex("A", 2, 2, 2), real("mu", 2), torch.tensor([2.0, 0.5], dtype=x.dtype)
    z = None
    with pyro.plate("rows", x.shape[1]), poutine.scale(scale=w):
        for t in loop("time", len(x)):
            p = A[0, 0] if z is None else Vindex(A)[u[t], z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


def equal_moves(loop: Loop, x: Tensor) -> None:
    """A homogeneous chain with weights."""
    A, mu, w = simplex("A", 2, 2), real("mu", 2), torch.tensor([2.0, 0.5], dtype=x.dtype)
    z = None
    with pyro.plate("rows", x.shape[1]), poutine.scale(scale=w):
        for t in loop("time", len(x)):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


MODELS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "regimes": (regimes, (X, U)),
    "in a plate": (in_a_plate, (XS[:3], US)),
    "two chains": (two_chains, (X[:4],)),
    "coupled": (coupled, (X[:4],)),
    "layers": (layers, (X[:4],)),
    "reads both ends": (reads_both_ends, (X,)),
    "second order": (second_order, (X,)),
    "mixtures": (mixtures, (X[:4],)),
}
MODELS_OF_LOOPS = [(model, (LOOPS["loop"], *args)) for model, args in MODELS.values()]


@pytest.mark.parametrize("name", MODELS)
def test_against_the_joint_table(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_backward, "_FEW", 0)
    model, args = MODELS[name]
    check_block(StepChain, model, LOOPS["vectorised"], *args)


def of_block(
    kind: type[StepChain] | type[Chain], model: Callable[..., None], *args: Any
) -> tuple[float, dict[str, Tensor], float, dict[str, Tensor]]:
    """Evidence and parameters after the M-step, of a block and of tables of all cells."""
    program = ExactPosteriorEM(model)._ready(args, {})
    graph, values = program.graph, values_of(program.graph.parameters)
    block = kind.match(Component(collapsed(graph), program.updates, values, tuple(graph.latents)))
    assert not isinstance(block, Finding), block
    found = block.expect(values)
    after, _ = block.theta.m_step(block.theta.enter(values), found)
    q = program.posterior(program.evaluate())
    with parameters_at(graph.parameters, values):
        program.m_step(q.counts, program.evaluate())
        expected = values_of(graph.parameters)
    assert q.log_evidence is not None
    return found.log_evidence, block.theta.values(after), q.log_evidence, expected


@pytest.mark.parametrize("loop", LOOPS.values())
def test_against_tables_where_steps_do_not_all_count(loop: Loop) -> None:
    for kind, model, args in (
        (StepChain, ragged, (loop, XS, US)),
        (StepChain, weighted, (loop, XS, US)),
        (Chain, equal_moves, (loop, XS)),
        *((StepChain, *rest) for rest in MODELS_OF_LOOPS if loop is LOOPS["loop"]),
    ):
        pyro.clear_param_store()
        evidence, got, log_evidence, expected = of_block(kind, model, *args)
        assert evidence == pytest.approx(log_evidence, rel=1e-12)
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seed", [4, 8, 49, 183, 191])
def test_random_chains_against_tables(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds with masks of one site alone, weights, three latents, inputs, a longer history."""
    monkeypatch.setattr(forward_backward, "_FEW", 0)
    evidence, got, log_evidence, expected = of_block(StepChain, RandomSteps(seed), LOOPS["loop"])
    assert evidence == pytest.approx(log_evidence, rel=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-10)


def test_a_weight_is_so_many_sequences() -> None:
    """Weights of two and three against sequences that are there so many times."""
    x, u = data(6, 2, seed=8), torch.tensor([[0, 1]] * 6)

    def model(x: Tensor, u: Tensor, w: Tensor) -> None:
        A, mu = simplex("A", 2, 2, 2), real("mu", 2)
        z = None
        with pyro.plate("rows", x.shape[1]), poutine.scale(scale=w):
            for t in pyro.markov(range(len(x))):
                p = A[0, 0] if z is None else Vindex(A)[u[t], z]
                z = pyro.sample(f"z_{t}", dist.Categorical(p))
                pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])

    fits = []
    often = torch.tensor([2, 3])
    for args in (
        (x, u, often.double()),
        (x.repeat_interleave(often, 1), u.repeat_interleave(often, 1), torch.ones(5)),
    ):
        pyro.clear_param_store()
        em = ExactPosteriorEM(model)
        assert em.plan(*args).kernel == "chain"
        fits.append(em.fit(*args, max_steps=4, tol=0))
    assert fits[0].log_evidence == pytest.approx(fits[1].log_evidence, rel=1e-12)
    for name, value in fits[0].params.items():
        torch.testing.assert_close(value, fits[1].params[name], rtol=1e-10, atol=0)


def test_independent_chains_are_the_chain_of_all_pairs() -> None:
    """Two chains of 2 and 3 states, at each step against hmmlearn's six with A ⊗ B held."""
    hmm = pytest.importorskip("hmmlearn.hmm")
    x = data(60, seed=9)
    em = ExactPosteriorEM(two_chains)
    before = em.evaluate_loss(LOOPS["vectorised"], x)
    values = {n: pyro.param(n).detach().clone() for n in ("A", "B", "mu")}
    result = em.fit(LOOPS["vectorised"], x, max_steps=1, tol=0)
    peer = hmm.GaussianHMM(6, "spherical", params="m", init_params="", n_iter=1, tol=-np.inf)
    peer.startprob_ = torch.kron(values["A"][0], values["B"][1]).numpy()
    peer.transmat_ = torch.kron(values["A"], values["B"]).numpy()
    peer.means_ = values["mu"].reshape(6, 1).numpy()
    peer.covars_ = np.ones(6)
    peer.means_weight, peer.means_prior = 0, 0
    assert -before == pytest.approx(peer.score(x.numpy()[:, None]), rel=1e-10)
    peer.fit(x.numpy()[:, None])
    mu = result.params["mu"].reshape(6, 1)
    torch.testing.assert_close(mu, torch.from_numpy(peer.means_), rtol=1e-8, atol=1e-10)


def test_what_is_no_such_chain_says_why() -> None:
    def nested(x: Tensor) -> None:
        A = simplex("A", 2, 2)
        z = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            with pyro.plate(f"items_{t}", 2):
                h = pyro.sample(f"h_{t}", dist.Categorical(A[z]))
                pyro.sample(f"x_{t}", dist.Normal(h.double(), 1.0), obs=x[t].expand(2))

    def once(x: Tensor) -> None:
        A = simplex("A", 2, 2, 2)
        c = pyro.sample("c", dist.Categorical(A[0, 0]))
        z = 0
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(Vindex(A)[c, z]))
            pyro.sample(f"x_{t}", dist.Normal(z.double(), 1.0), obs=x[t])

    said = []
    for model in (nested, once):
        pyro.clear_param_store()
        plan = ExactPosteriorEM(model).plan(X)
        assert plan.kernel == "contraction"
        said.append(plan.kernel_reason)
    assert "different plates" in said[0] and "no steps of a chain" in said[1]


def gated(loop: Loop, x: Tensor, u: Tensor) -> None:
    """Transitions by logits that are linear in a covariate; each sequence has its own."""
    b, W, mu = real("b", 2, 2), real("W", 2, 2, seed=6), real("mu", 2)
    z = None
    with pyro.plate("rows", x.shape[1]):
        for t in loop("time", len(x)):
            logits = b[0] if z is None else b[z] + W[z] * u[t].unsqueeze(-1)
            z = pyro.sample(f"z_{t}", dist.Categorical(logits=logits))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=x[t])


@pytest.mark.parametrize("loop", LOOPS.values())
def test_coefficients_of_transitions_from_sums_of_each_step(loop: Loop) -> None:
    x, u = data(12, 2, seed=11), data(12, 2, seed=12)
    evidence, got, log_evidence, expected = of_block(StepChain, gated, loop, x, u)
    assert evidence == pytest.approx(log_evidence, rel=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("steps_of", [gated, in_a_plate])
def test_sums_of_each_row_are_not_those_of_a_part(steps_of: Callable[..., None]) -> None:
    """Sequences in chunks, whose arguments differ from row to row: tables take the steps."""
    x, u = data(5, 4, seed=11).T.contiguous(), torch.arange(20).reshape(4, 5) % 3 % 2

    def model(x: Tensor, u: Tensor) -> None:
        steps_of(LOOPS["loop"], x.T, u.T)

    found = []
    for args in ((x, u), (Chunks(x, u, rows=2),)):
        pyro.clear_param_store()
        found.append(ExactPosteriorEM(model).fit(*args, max_steps=2, tol=0))
    assert found[0].log_evidence == pytest.approx(found[1].log_evidence, rel=1e-9)
    for name, value in found[0].params.items():
        one, other = value, found[1].params[name]
        if name in "bW":  # of each row of logits its differences count
            one, other = one[:, 1] - one[:, 0], other[:, 1] - other[:, 0]
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
