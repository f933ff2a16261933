"""Chains of equal steps, all steps together, against the contraction and a sum over all paths."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

from pyro_em import DataError, ExactPosteriorEM, Posterior
from pyro_em.posteriors.answers import discrete_faces
from pyro_em.posteriors.enumeration import contraction_of, run_contraction
from pyro_em.posteriors.messages.steps import best_path, step_cells, steps_of
from pyro_em.posteriors.messages.viterbi import viterbi

A = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)
LEFT_TO_RIGHT = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.8, 0.2], [0.0, 0.0, 1.0]], dtype=A.dtype)
PI = torch.tensor([0.2, 0.5, 0.3], dtype=A.dtype)
MU = torch.tensor([-1.0, 0.5, 2.0], dtype=A.dtype)
GENERATOR = torch.Generator().manual_seed(2)
X = torch.randn(7, generator=GENERATOR, dtype=A.dtype)
XS = torch.randn(4, 7, generator=GENERATOR, dtype=A.dtype)


def chain(x: Tensor, matrix: Tensor = A) -> None:
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        p = matrix[z]


def left_to_right(x: Tensor) -> None:
    chain(x, LEFT_TO_RIGHT)


def padded(x: Tensor) -> None:
    lengths = torch.tensor([7, 4, 1, 2])
    with pyro.plate("sequences", len(x)):
        p = PI
        for t in pyro.markov(range(x.shape[1])):
            with poutine.mask(mask=t < lengths):
                z = pyro.sample(f"z_{t}", dist.Categorical(p))
                pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[:, t])
                p = A[z]


def crossed(x: Tensor) -> None:
    """Latents in two plates of three, with the third between them and inside of them."""
    a, b, c = (pyro.plate(n, s, dim=d) for n, s, d in (("a", 2, -3), ("b", 4, -1), ("c", 2, -2)))
    p = PI
    for t in pyro.markov(range(5)):
        with a, b:
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            if t != 3:
                with c:
                    scale = torch.tensor([0.5, 0.9], dtype=A.dtype)[:, None]
                    pyro.sample(f"x_{t}", dist.Normal(MU[z], scale), obs=x[:, t])
            p = A[z]


def below_no_plate(x: Tensor) -> None:
    p = PI
    for t in pyro.markov(range(x.shape[1])):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        with pyro.plate(f"rows_{t}", len(x)):
            pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[:, t])
        p = A[z]


def two_emissions(x: Tensor) -> None:
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        if t in (1, 2, 5):
            pyro.sample(f"y_{t}", dist.Poisson((0.5 * MU[z]).exp()), obs=torch.tensor(float(t)))
        pyro.sample(f"free_{t}", dist.Normal(0.0, 1.0), obs=x[t])
        p = A[z]


def reads_two(x: Tensor) -> None:
    """What is seen depends on both states of a step: no equal transitions, but a path all the same."""
    before = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(PI if before is None else A[before]))
        loc = MU[z] if before is None else MU[z] - 0.5 * MU[before]
        pyro.sample(f"x_{t}", dist.Normal(loc, 0.8), obs=x[t])
        before = z


def changing(x: Tensor) -> None:
    p = PI
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(p))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        w = torch.sigmoid(x[t])
        p = w * A[z] + (1 - w) / 3


def pairs(x: Tensor) -> None:
    """A field: unnormalised tables between neighbours, in this order and in the other."""
    before = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(PI))
        pyro.sample(f"x_{t}", dist.Normal(MU[z], 0.8), obs=x[t])
        if before is not None:
            pyro.factor(f"f_{t}", 40 * A.T[z, before])
        before = z


MODELS = {
    "chain": (chain, X),
    "left to right": (left_to_right, X),
    "padded": (padded, XS),
    "crossed": (crossed, XS),
    "below no plate": (below_no_plate, XS),
    "two emissions": (two_emissions, X),
    "reads two": (reads_two, X),
    "changing": (changing, X),
    "pairs": (pairs, X),
}


def by_contraction(q: Posterior) -> tuple[float, list[Tensor], dict[str, Tensor]]:
    """Evidence, cells and mode, one latent after the other."""
    e_step = run_contraction(q.graph, contraction_of(q.graph), q.tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(discrete_faces, "best_path", lambda *_: None)
        mode = q.mode()
    return float(e_step.log_evidence), e_step.cells, mode


@pytest.mark.parametrize("name", MODELS)
def test_all_steps_together_are_the_contraction(name: str) -> None:
    model, x = MODELS[name]
    q = ExactPosteriorEM(model).posterior(x)
    evidence, cells, mode = by_contraction(q)
    together = step_cells(q.graph, q.tables)
    assert together is not None
    assert float(together.log_evidence) == pytest.approx(evidence, rel=1e-13)
    for ours, theirs in zip(together.cells, cells, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert best_path(q.graph, q.tables) is not None
    for site, value in q.mode().items():
        assert torch.equal(value, mode[site])


def test_pointwise_evidence_of_sequences() -> None:
    q = ExactPosteriorEM(padded).posterior(XS)
    alone = [
        ExactPosteriorEM(chain).posterior(XS[n, :length]).log_evidence
        for n, length in enumerate((7, 4, 1, 2))
    ]
    assert q.pointwise is not None
    torch.testing.assert_close(q.pointwise, torch.tensor(alone, dtype=A.dtype), rtol=1e-12, atol=0)


def test_the_path_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    log_l = torch.randn(5, 3, 2, generator=generator, dtype=A.dtype)
    log_A = torch.randn(4, 3, 2, 2, generator=generator, dtype=A.dtype)
    log_A[2, 1, 0, 1] = -torch.inf
    path = viterbi(log_l, log_A)
    for b in range(3):
        scores = {
            z: sum(float(log_l[t, b, z[t]]) for t in range(5))
            + sum(float(log_A[t, b, z[t], z[t + 1]]) for t in range(4))
            for z in itertools.product((0, 1), repeat=5)
        }
        assert tuple(path[:, b].tolist()) == max(scores, key=scores.__getitem__)


@pytest.mark.parametrize("way", ["compiled", "by steps"])
@pytest.mark.parametrize("alike", [True, False])
def test_of_equal_paths_the_first_state_is_taken_from_the_end_on(
    way: str, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole numbers, so that many paths are equally good; each state is chosen by plain loops."""
    if way == "by steps":
        monkeypatch.setattr("pyro_em.posteriors.messages.viterbi.compiles", lambda *_: False)
    T, B, K, generator = 90, 2, 3, torch.Generator().manual_seed(0)
    log_l = torch.randint(-2, 1, (T, B, K), generator=generator).to(A.dtype)
    log_l[torch.rand(log_l.shape, generator=generator) < 0.2] = -torch.inf
    log_A = torch.randint(-1, 1, (1 if alike else T - 1, 1, K, K), generator=generator).to(A.dtype)
    log_A = log_A.expand(T - 1, 1, K, K)
    found = viterbi(log_l, log_A).tolist()
    for b in range(B):
        best = [log_l[0, b].tolist()]
        for own, rows in zip(log_l[1:, b].tolist(), log_A[:, 0].tolist(), strict=True):
            ends = [max(best[-1][i] + rows[i][j] for i in range(K)) for j in range(K)]
            best.append([e + x for e, x in zip(ends, own, strict=True)])
        state = best[-1].index(max(best[-1]))
        for t in range(T - 1, 0, -1):
            assert found[t][b] == state
            scores = [best[t - 1][i] + float(log_A[t - 1, 0, i, state]) for i in range(K)]
            state = scores.index(max(scores))
        assert found[0][b] == state


def test_what_floats_cannot_hold_goes_through_logarithms() -> None:
    """States that exclude each other for 900 nats, and a step that only the unlikely one explains."""

    def model(x: Tensor) -> None:
        p = PI
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Normal(40 * MU[z], 1.0), obs=x[t])
            p = LEFT_TO_RIGHT[z]

    x = torch.tensor([80.0, 80.0, -40.0, 20.0, 20.0], dtype=A.dtype)
    q = ExactPosteriorEM(model).posterior(x)
    assert step_cells(q.graph, q.tables) is None
    evidence, _, mode = by_contraction(q)
    assert q.log_evidence == pytest.approx(evidence, rel=1e-13)
    assert q.mode() == mode


def test_impossible_data_are_named() -> None:
    def model(x: Tensor) -> None:
        p = torch.tensor([0.0, 0.0, 1.0], dtype=A.dtype)
        B = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.0, 1.0]], dtype=A.dtype)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            pyro.sample(f"x_{t}", dist.Categorical(B[z]), obs=x[t])
            p = LEFT_TO_RIGHT[z]

    with pytest.raises(DataError, match=r"site 'x_2'(.|\n)*impossible"):
        ExactPosteriorEM(model).posterior(torch.tensor([1, 1, 0, 1]))


def test_what_is_no_chain_is_none() -> None:
    def tree(x: Tensor) -> None:
        z = pyro.sample("z_0", dist.Categorical(PI))
        for t in range(1, len(x)):
            w = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
            pyro.sample(f"x_{t}", dist.Normal(MU[w], 1.0), obs=x[t])

    def apart(x: Tensor) -> None:
        for t in range(len(x)):
            w = pyro.sample(f"z_{t}", dist.Categorical(PI))
            pyro.sample(f"x_{t}", dist.Normal(MU[w], 1.0), obs=x[t])

    def weighted(x: Tensor) -> None:
        with poutine.scale(scale=2.0):
            chain(x)

    for model in (tree, apart, weighted):
        assert steps_of(ExactPosteriorEM(model).posterior(X[:4]).graph) is None
    assert steps_of(ExactPosteriorEM(chain).posterior(X[:2]).graph) is None
