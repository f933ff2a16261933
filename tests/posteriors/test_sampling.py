"""Draws from the posterior against the joint table, cell by cell."""

from __future__ import annotations

import math
import time

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pyro.ops.indexing import Vindex
from torch import Tensor

from pyro_em import ExactPosteriorEM, MonteCarlo
from pyro_em.posteriors import sampling
from pyro_em.posteriors.sampling import cumulative_rows, levels_of, pick
from tests.brute_force import random_network
from tests.posteriors.random_models import random_model

DRAWS = 5000


def agree(codes: Tensor, truth: Tensor) -> None:
    """A chi-square test whose bound six standard deviations of the statistic reach beyond."""
    n = len(codes)
    counts = torch.bincount(codes, minlength=len(truth)).double()
    assert float(counts[truth == 0].sum()) == 0
    often = truth * n >= 5
    expected = torch.cat([truth[often] * n, truth[~often].sum()[None] * n])
    seen = torch.cat([counts[often], counts[~often].sum()[None]])
    assert float(seen[-1]) <= float(expected[-1]) + 6 * math.sqrt(float(expected[-1])) + 6
    statistic = float((seen - expected).square()[:-1].div(expected[:-1]).sum())
    df = int(often.sum())
    assert statistic < df + 6 * math.sqrt(2 * df) + 6


@hypothesis_settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_draws_of_random_networks(seed: int) -> None:
    network = random_network(seed, zeros=True, tiny=False)
    joint = torch.tensor(network.joint())
    assume(float(joint.sum()) > 0)
    draws = ExactPosteriorEM(network.model).posterior().sample(DRAWS, seed=seed)
    codes = torch.zeros(DRAWS, dtype=torch.long)
    for i in network.latents:
        codes = codes * network.sizes[i] + draws[f"v{i}"]
    agree(codes, (joint / joint.sum()).reshape(-1))


@hypothesis_settings(max_examples=25)
@given(seed=st.integers(0, 10**6))
def test_draws_of_random_models(seed: int) -> None:
    """Plates, chains, masks, latents observed in part: the joint draw, not only its marginals."""
    model, _, assignments = random_model(seed)
    assume(not model.weighted)
    posterior = model.log_joint(assignments).softmax(0)
    draws = ExactPosteriorEM(model).posterior().sample(DRAWS, seed=seed)
    truth, codes = torch.zeros(len(posterior), dtype=torch.long), torch.zeros(DRAWS).long()
    for name, z in model.latents.items():
        drawn = draws[name].long().reshape(DRAWS, *model.shape(z.plates))
        assert draws[name].dtype == z.dtype
        for known in (~z.free).nonzero().tolist():
            if z.site != name:  # what was observed is part of every draw
                at = (..., *known)
                assert bool((drawn[at] == model.get(name).reshape(z.free.shape)[at].long()).all())
        for cell in z.free.nonzero().tolist():
            at = (slice(None), *cell)
            codes = codes * z.size + drawn[at]
            truth = truth * z.size + assignments[z.site].long()[at]
    table = torch.zeros(len(posterior)).index_add(0, truth, posterior)
    agree(codes, table)


def two_latents_per_row_and_one_above() -> None:
    g = pyro.sample("g", dist.Categorical(torch.tensor([0.4, 0.6])))
    with pyro.plate("columns", 2, dim=-1):
        pyro.sample("c", dist.Bernoulli(torch.tensor([0.3, 0.6])[g]))
        with pyro.plate("rows", 2, dim=-2):
            a = pyro.sample("a", dist.Categorical(torch.tensor([[0.5, 0.5], [0.1, 0.9]])[g]))
            b = pyro.sample("b", dist.OneHotCategorical(torch.eye(3)[a] * 0.4 + 0.2))
            loc = a + (b * torch.arange(3.0)).sum(-1)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([[0.1, 1.0], [2.0, 0.3]]))


def oracle_of_two_latents() -> dict[tuple[int, ...], float]:
    """p(g, c, a[0,0], b[0,0] | x): the other cells are summed one by one."""
    x = [[0.1, 1.0], [2.0, 0.3]]
    pa, pb = [[0.5, 0.5], [0.1, 0.9]], torch.eye(3)[:2] * 0.4 + 0.2
    pb = (pb / pb.sum(-1, keepdim=True)).tolist()

    def cell(g: int, a: int, b: int, x: float) -> float:
        return pa[g][a] * pb[a][b] * math.exp(-0.5 * (x - a - b) ** 2)

    out = {}
    for g, a, b in np.ndindex(2, 2, 3):
        p = (0.4, 0.6)[g] * cell(g, a, b, x[0][0])
        for other in (x[0][1], x[1][0], x[1][1]):
            p *= sum(cell(g, i, j, other) for i, j in np.ndindex(2, 3))
        for c in np.ndindex(2, 2):
            rate = (0.3, 0.6)[g]
            out[(g, *c, a, b)] = p * math.prod(rate if i else 1 - rate for i in c)
    total = sum(out.values())
    return {k: v / total for k, v in out.items()}


@pytest.mark.parametrize("portion", [None, 4 * 777])
def test_nested_plates_with_two_latents_per_row(
    portion: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in portions: what is kept at once stays bounded, and no draw is lost."""
    if portion is not None:
        monkeypatch.setattr(sampling, "AT_ONCE", portion)
    draws = ExactPosteriorEM(two_latents_per_row_and_one_above).posterior().sample(DRAWS, seed=3)
    assert {k: tuple(v.shape) for k, v in draws.items()} == {
        "g": (DRAWS,),
        "c": (DRAWS, 2),
        "a": (DRAWS, 2, 2),
        "b": (DRAWS, 2, 2, 3),
    }
    assert bool((draws["b"].sum(-1) == 1).all())
    truth = oracle_of_two_latents()
    keys = list(truth)
    parts = (draws["g"], draws["c"][:, 0], draws["c"][:, 1], draws["a"][:, 0, 0])
    cells = torch.stack([p.long() for p in (*parts, draws["b"][:, 0, 0].argmax(-1))], -1)
    place = {k: i for i, k in enumerate(keys)}
    codes = torch.tensor([place[tuple(row)] for row in cells.tolist()])
    agree(codes, torch.tensor([truth[k] for k in keys]))


def crossed() -> None:
    rows, columns = pyro.plate("rows", 2, dim=-2), pyro.plate("columns", 3, dim=-1)
    with rows:
        r = pyro.sample("r", dist.Categorical(torch.tensor([0.3, 0.7])))
    with columns:
        c = pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    with rows:
        pyro.sample("x", dist.Normal(r.double(), 1.0), obs=torch.tensor([[0.2], [1.4]]))
    with columns:
        pyro.sample("y", dist.Normal(c.double(), 1.0), obs=torch.tensor([0.2, 1.4, 2.2]))


def test_two_components_of_latents_are_drawn_independently() -> None:
    q = ExactPosteriorEM(crossed).posterior()
    draws = q.sample(DRAWS, seed=0)
    assert draws["r"].shape == (DRAWS, 2, 1)
    assert draws["c"].shape == (DRAWS, 3)
    codes, truth = torch.zeros(DRAWS).long(), torch.ones(1)
    parts = [(draws["r"][:, i, 0], q.probs("r")[i, 0]) for i in range(2)]
    parts += [(draws["c"][:, i], q.probs("c")[i]) for i in range(3)]
    for drawn, p in parts:
        codes = codes * len(p) + drawn
        truth = (truth[:, None] * p).reshape(-1)
    agree(codes, truth)


TRANSITION = torch.tensor([[0.7, 0.3, 0.0], [0.0, 0.7, 0.3], [0.3, 0.0, 0.7]])


def chain(x: Tensor) -> None:
    z: Tensor | int = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z{t}", dist.Categorical(TRANSITION.to(x.dtype)[z]))
        pyro.sample(f"x{t}", dist.Normal(torch.arange(3.0, dtype=x.dtype)[z], 1.0), obs=x[t])


def second_order(x: Tensor) -> None:
    table = torch.stack([TRANSITION, TRANSITION.roll(1, 0), TRANSITION.flip(0)])
    before: Tensor | int = 0
    z: Tensor | int = 0
    for t in pyro.markov(range(len(x)), history=2):
        new = pyro.sample(f"z{t}", dist.Categorical(Vindex(table)[before, z]))
        pyro.sample(f"x{t}", dist.Normal(new.double(), 1.0), obs=x[t])
        before, z = z, new


@pytest.mark.parametrize(
    ("model", "dtype"),
    [(chain, torch.float32), (chain, torch.float64), (second_order, torch.float64)],
)
def test_whole_paths_of_a_chain(model, dtype: torch.dtype) -> None:
    """Every path of five steps has its frequency; a forbidden one is never drawn."""
    torch.set_default_dtype(dtype)
    x = torch.tensor([0.1, 1.5, 1.2, 2.2, 0.4], dtype=dtype)
    transition, log_p = TRANSITION.double(), {}
    table = torch.stack([transition, transition.roll(1, 0), transition.flip(0)])
    for path in np.ndindex(3, 3, 3, 3, 3):
        before, z, total = 0, 0, 0.0
        for t, new in enumerate(path):
            p = float(transition[z, new] if model is chain else table[before, z, new])
            total += (math.log(p) if p else -math.inf) - 0.5 * (float(x[t]) - new) ** 2
            before, z = z, new
        log_p[path] = total
    truth = torch.tensor(list(log_p.values()), dtype=torch.float64).softmax(0)
    draws = ExactPosteriorEM(model).posterior(x).sample(20_000, seed=5)
    codes = torch.zeros(20_000).long()
    for t in range(5):
        codes = codes * 3 + draws[f"z{t}"]
    agree(codes, truth)


def test_few_draws_of_many_sequences_follow_the_joint_of_each() -> None:
    """Two draws of 4,000 sequences make the rows that they meet; structural zeros are never met."""
    x, start = torch.tensor([0.1, 1.5, 1.2]), torch.tensor([0.0, 0.4, 0.6])

    def model(x: Tensor) -> None:
        z = None
        with pyro.plate("sequences", 4000):
            for t in pyro.markov(range(3)):
                probs = start if z is None else TRANSITION[z]
                z = pyro.sample(f"z{t}", dist.Categorical(probs))
                pyro.sample(f"x{t}", dist.Normal(z.double(), 1.0), obs=x[t].expand(4000))

    likelihood = (-0.5 * (x[:, None] - torch.arange(3.0)) ** 2).exp()
    first = start * likelihood[0]
    both = first[:, None] * TRANSITION * likelihood[1]
    truth = both[..., None] * TRANSITION * likelihood[2]
    draws = ExactPosteriorEM(model).posterior(x).sample(2, seed=0)
    assert draws["z0"].shape == (2, 4000)
    codes = (draws["z0"] * 3 + draws["z1"]) * 3 + draws["z2"]
    agree(codes.flatten(), (truth / truth.sum()).flatten().double())
    assert not torch.equal(codes[0], codes[1])


def test_many_draws_of_a_chain_take_no_time() -> None:
    q = ExactPosteriorEM(chain).posterior(torch.tensor([0.1, 1.5, 1.2, 2.2, 0.4]))
    before = time.process_time()
    draws = q.sample(100_000, seed=0)
    assert time.process_time() - before < 1.0
    assert draws["z4"].shape == (100_000,)


def test_a_long_chain() -> None:
    """Hundreds of steps: each pair of neighbours as often as its joint says, on average."""
    torch.manual_seed(1)
    x = torch.randint(0, 3, (400,)) + torch.randn(400)
    q = ExactPosteriorEM(chain).posterior(x)
    draws = q.sample(300, seed=2)
    z = torch.stack([draws[f"z{t}"] for t in range(400)], -1)
    allowed = TRANSITION[z[:, :-1], z[:, 1:]] > 0
    assert bool(allowed.all())
    deviations = []
    for t in range(0, 399, 20):
        pair = torch.bincount(z[:, t] * 3 + z[:, t + 1], minlength=9) / 300
        p = q.joint(f"z{t}", f"z{t + 1}").reshape(-1)
        used = p > 0.02
        deviations.append((pair - p)[used] / (p * (1 - p) / 300).clamp(min=1e-12).sqrt()[used])
    z_scores = torch.cat(deviations)
    assert float(z_scores.abs().max()) < 4.5
    assert 0.7 < float(z_scores.square().mean()) < 1.4


def weighted(weights: Tensor | None) -> None:
    scale = torch.ones(2) if weights is None else weights
    with pyro.plate("n", 2), pyro.poutine.scale(scale=scale):
        a = pyro.sample("a", dist.Categorical(torch.tensor([0.3, 0.7])))
        b = pyro.sample("b", dist.Categorical(torch.tensor([[0.2, 0.8], [0.5, 0.5]])[a]))
        loc = torch.tensor([[0.0, 1.0], [2.0, 3.0]])[a, b]
        pyro.sample("x", dist.Normal(loc, 1.0), obs=torch.tensor([0.5, 2.0]))


def test_a_weight_counts_a_row_and_does_not_sharpen_it() -> None:
    plain = ExactPosteriorEM(weighted).posterior(None)
    heavy = ExactPosteriorEM(weighted).posterior(torch.tensor([2.0, 7.0]))
    one, two = (q.sample(50, seed=1) for q in (plain, heavy))
    assert all(torch.equal(one[n], two[n]) for n in one)
    truth = plain.joint("a", "b")
    draws = heavy.sample(DRAWS, seed=0)
    for row in range(2):
        agree(draws["a"][:, row] * 2 + draws["b"][:, row], truth[row].reshape(-1))


def test_counts_of_draws_are_those_of_the_joint() -> None:
    """What a Monte Carlo E-step hands to the M-step: every factor's cells, scaled."""
    weights = torch.tensor([2.0, 7.0])
    exact = ExactPosteriorEM(weighted).posterior(weights)
    drawn = ExactPosteriorEM(weighted, strategy=MonteCarlo(DRAWS)).posterior(weights)
    for p, mean, count, mass in zip(
        exact.cells, drawn.cells, drawn.counts, exact.counts, strict=True
    ):
        error = 5 * (p * (1 - p) / DRAWS).sqrt() + 1e-9
        assert bool(((mean - p).abs() <= error).all())
        assert bool(((count - mass).abs() <= 7 * error).all())
        # Draws are whole: DRAWS times a frequency is a count.
        torch.testing.assert_close((mean * DRAWS).round(), mean * DRAWS)


def test_seeds() -> None:
    q = ExactPosteriorEM(two_latents_per_row_and_one_above).posterior()
    state = torch.get_rng_state()
    one, two, other = q.sample(20, seed=1), q.sample(20, seed=1), q.sample(20, seed=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[n], two[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)
    q.sample(20)
    assert not torch.equal(torch.get_rng_state(), state)


def test_a_product_that_a_user_gives() -> None:
    em = ExactPosteriorEM(weighted, strategy=MonteCarlo(3))
    q = em.posterior(None)
    assert not q.exact
    draws = q.sample(2000, seed=0)
    p = q.probs("a")
    for row in range(2):
        agree(draws["a"][:, row], p[row])


def test_an_element_of_weight_zero_is_never_picked() -> None:
    """At the ends, in runs, and where the level falls on a boundary."""
    weights = torch.tensor([0.0, 0.0, 1e-300, 0.0, 3.0, 0.0, 0.0, 1.0, 0.0])
    rows = torch.zeros(100_000, dtype=torch.long)
    levels = levels_of(rows.shape, rows.device, None)
    drawn = pick(cumulative_rows(weights)[None], rows, levels)
    assert set(drawn.tolist()) == {4, 7}
    agree(drawn, weights / weights.sum() * (weights > 1e-200))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1000])
def test_every_number_of_values(size: int) -> None:
    weights = torch.rand(2, size)
    rows = torch.arange(2).repeat(40_000)
    levels = levels_of(rows.shape, rows.device, torch.Generator().manual_seed(size))
    drawn = pick(cumulative_rows(weights), rows, levels)
    for row in range(2):
        agree(drawn[rows == row], weights[row] / weights[row].sum())


def test_gaussian_latents_that_nothing_observed_reads_are_drawn_with_those_above_them() -> None:
    """h | v ~ N(μ_v, 1) and k | h ~ N(2 h, 1), and a discrete latent v without data of its own."""
    mu = torch.tensor([-5.0, 5.0])

    def model(x: Tensor) -> None:
        with pyro.plate("N", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.tensor([0.3, 0.7])))
            v = pyro.sample("v", dist.Categorical(torch.tensor([[0.2, 0.8], [0.9, 0.1]])[z]))
            h = pyro.sample("h", dist.Normal(mu[v], 1.0))
            pyro.sample("k", dist.Normal(2 * h, 1.0))
            pyro.sample("x", dist.Normal(mu[z], 5.0), obs=x)

    q = ExactPosteriorEM(model).posterior(torch.tensor([-1.0, 2.0]))
    draws = q.sample(20_000, seed=0)
    h, k, v = (draws[n].double() for n in ("h", "k", "v"))
    error = 4 / math.sqrt(20_000)  # standard errors of a mean of numbers of unit spread
    assert (h - mu.double()[v.long()]).mean(0).abs().max() < error
    assert (h - mu.double()[v.long()]).square().mean(0).sub(1).abs().max() < 1.5 * error
    assert (k - 2 * h).mean(0).abs().max() < error
    assert (k - 2 * h).square().mean(0).sub(1).abs().max() < 1.5 * error
    assert torch.allclose(v.mean(0), q.probs("v")[:, 1].double(), atol=error)
    best = q.mode()
    assert torch.equal(best["h"], mu[best["v"]]) and torch.equal(best["k"], 2 * best["h"])


def test_draws_of_a_chain_go_on_where_the_data_end() -> None:
    """The steps after the last observation have the covariance of a random walk."""

    def model(y: Tensor) -> None:
        h = torch.tensor(0.0)
        for t in pyro.markov(range(len(y))):
            h = pyro.sample(f"h_{t}", dist.Normal(h, 1.0))
            pyro.sample(f"y_{t}", dist.Normal(h, 1.0), obs=y[t])

    y = torch.tensor([0.5, 1.0, torch.nan, torch.nan])
    q = ExactPosteriorEM(model, missing="nan").posterior(y)
    h = q.sample(20_000, seed=0)["h_*"].double()
    spread = (
        torch.tensor(
            [
                [2.0, 1.0, 1.0, 1.0],
                [1.0, 3.0, 3.0, 3.0],
                [1.0, 3.0, 8.0, 8.0],
                [1.0, 3.0, 8.0, 13.0],
            ]
        )
        / 5
    )  # of the first two: the inverse of [[3, −1], [−1, 2]]
    assert torch.allclose(torch.cov(h), spread.double(), atol=0.06)
    assert torch.allclose(h.mean(1), q.mean("h_*").double(), atol=0.05)
    assert q.mode()["h_*"].shape == (4,)
