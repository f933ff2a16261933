"""Chains whose steps differ: messages against contraction, from the same tables.

Contractions are held against brute force elsewhere; here sizes are such that both can be done.
"""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyro_em import ExactPosteriorEM
from pyro_em.posteriors.contraction import maximum
from pyro_em.posteriors.enumeration import run_contraction
from pyro_em.posteriors.messages import varying
from pyro_em.posteriors.messages.steps import best_path, step_cells, steps_of


def random_chain(T, K, B, D, seed, *, homogeneous=False, zeros=0.0):
    """A chain whose transitions and observations differ from step to step."""
    generator = torch.Generator().manual_seed(seed)

    def table(*shape):
        out = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
        dead = torch.rand(shape, generator=generator) < zeros
        dead[..., 0] = False
        return torch.where(dead, 0.0, out)

    first, A = table(K), table(1 if homogeneous else T, K, K)
    means = torch.randn(T, K, generator=generator, dtype=torch.float64)
    x = torch.randn(T, max(B, 1), max(D, 1), generator=generator, dtype=torch.float64)
    seen = torch.rand(T, max(B, 1), generator=generator) < 0.8

    def model():
        sequences = pyro.plate("sequences", B, dim=-1) if B else None
        items = pyro.plate("items", D, dim=-2) if D else None
        pyro.sample("apart", dist.Normal(0.0, 1.0), obs=torch.tensor(0.3, dtype=torch.float64))
        z = None
        with sequences if sequences is not None else nullcontext():
            for t in pyro.markov(range(T)):
                p = first if z is None else A[t % len(A)][z]
                z = pyro.sample(f"z_{t}", dist.Categorical(p))
                value = x[t].T if D else x[t, :, 0]
                value = value if B else value[..., 0]
                mask = seen[t] if B else seen[t, 0]
                with pyro.poutine.mask(mask=mask):
                    if items is None:
                        pyro.sample(f"x_{t}", dist.Normal(means[t][z], 1.0), obs=value)
                    else:
                        with items:
                            pyro.sample(f"x_{t}", dist.Normal(means[t][z], 1.0), obs=value)

    return model


def both(model):
    program = ExactPosteriorEM(model)._session.look((), {}, look_only=True)
    graph, tables = program.graph, program.evaluate().tables
    assert steps_of(graph) is not None
    return graph, tables, program.contraction


def assert_same(found, expected):
    assert found is not None
    assert float(found.log_evidence) == pytest.approx(float(expected.log_evidence), abs=1e-9)
    for a, b in zip(found.cells, expected.cells, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    by_dims = lambda e: {d: sum(t for f, t in e.terms if f == d) for d, _ in e.terms}  # noqa: E731
    a, b = by_dims(found), by_dims(expected)
    assert a.keys() == b.keys()
    for dims in a:
        torch.testing.assert_close(a[dims], b[dims], rtol=0, atol=1e-9)


def assert_most_probable(graph, plan, tables, path):
    """A path is as probable as any: with all else ruled out the evidence is the largest term."""
    state = dict(zip(graph.latents, path, strict=True))
    held = []
    for group, table in zip(graph.groups, tables, strict=True):
        table = table.clone()
        for i, dims in enumerate(group.dims):
            for d, name in enumerate(dims):
                if name in state:
                    values = torch.arange(graph.latents[name].size)
                    shape = [1] * len(dims)
                    shape[d] = len(values)
                    own = [
                        graph.dim_size(p) if p in graph.latents[name].plates else 1
                        for p in dims[: group.n_plates]
                    ]
                    chosen = state[name].reshape(*own, *(1,) * (len(dims) - group.n_plates))
                    table[i] = torch.where(values.reshape(shape) == chosen, table[i], -math.inf)
        held.append(table)
    largest = run_contraction(graph, plan, tables, ring=maximum).log_evidence
    own = run_contraction(graph, plan, held).log_evidence
    assert float(own) == pytest.approx(float(largest), abs=1e-9)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    T=st.integers(3, 9),
    K=st.integers(2, 4),
    B=st.integers(0, 3),
    D=st.sampled_from([0, 2]),
    seed=st.integers(0, 10**6),
    homogeneous=st.booleans(),
    zeros=st.sampled_from([0.0, 0.3]),
    short=st.booleans(),
)
def test_random_chains(T, K, B, D, seed, homogeneous, zeros, short):
    model = random_chain(T, K, B, D if B else 0, seed, homogeneous=homogeneous, zeros=zeros)
    graph, tables, plan = both(model)
    before, varying._SHORT = varying._SHORT, 64 if short else 1
    try:
        assert_same(step_cells(graph, tables), run_contraction(graph, plan, tables))
        found = best_path(graph, tables)
    finally:
        varying._SHORT = before
    assert_most_probable(graph, plan, tables, found)


@pytest.mark.parametrize("B", [0, 2])
def test_long_chains_go_by_blocks(B):
    graph, tables, plan = both(random_chain(131, 3, B, 0, 7))
    assert_same(step_cells(graph, tables), run_contraction(graph, plan, tables))
    assert_most_probable(graph, plan, tables, best_path(graph, tables))


def test_ties_give_one_path():
    """All paths are equally probable: any one, but one."""

    def model():
        z = 0
        for t in pyro.markov(range(70)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.full((2, 2), 0.5)[z]))
            # Neighbours must agree: states that are chosen step by step may not.
            pyro.sample(f"x_{t}", dist.Bernoulli(0.5), obs=torch.tensor(1.0))

    def agreeing():
        z = None
        for t in pyro.markov(range(70)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.eye(2)[z] if t else torch.ones(2) / 2))

    mode = ExactPosteriorEM(agreeing).posterior().mode()["z_*"]
    assert len(mode.unique()) == 1
    assert ExactPosteriorEM(model).posterior().mode()["z_*"].shape == (70,)


def test_masses_that_nearly_underflow_are_left_to_logarithms():
    """A likelihood that speaks for the state that the steps before had ruled out."""

    def model(x):
        z = None
        for t in pyro.markov(range(4)):
            p = torch.tensor([0.5, 0.5]) if z is None else torch.eye(2)[z]
            z = pyro.sample(f"z_{t}", dist.Categorical(p))
            loc = torch.tensor([-40.0, 40.0], dtype=torch.float64)[z]
            pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=x[t])

    x = torch.tensor([-40.0, 0.0, 40.0, 41.0], dtype=torch.float64)
    graph, tables, _plan = both(lambda: model(x))
    assert step_cells(graph, tables) is None
    q = ExactPosteriorEM(model).posterior(x)
    paths = torch.stack(
        [dist.Normal(m, 1.0).log_prob(x).sum() + math.log(0.5) for m in (-40.0, 40.0)]
    )
    assert q.log_evidence == pytest.approx(float(paths.logsumexp(0)), abs=1e-6)
    torch.testing.assert_close(q.probs("z_2").double(), paths.softmax(0))


def categorical(name, *parents):
    """A latent of two values that reads others."""
    table = torch.rand((2,) * (len(parents) + 1), generator=torch.Generator().manual_seed(3))
    return pyro.sample(name, dist.Categorical((table + 0.1)[parents]))


def second_order():
    a = categorical("a")
    b = categorical("b", a)
    categorical("c", a, b)


def tree():
    a = categorical("a")
    categorical("b", a), categorical("c", a)


def two_chains():
    for name in "ab":
        z = categorical(f"{name}_0")
        for t in range(1, 3):
            z = categorical(f"{name}_{t}", z)


def weighted():
    with pyro.poutine.scale(scale=2.0):
        categorical("c", categorical("b", categorical("a")))


@pytest.mark.parametrize("model", [second_order, tree, two_chains, weighted])
def test_what_is_no_chain(model):
    program = ExactPosteriorEM(model, max_enumeration=2**20)._session.look((), {}, look_only=True)
    assert steps_of(program.graph) is None
