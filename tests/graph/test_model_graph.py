"""``em.plan(...).graph`` against networkx, against brute-force tables, and for fields."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import nullcontext

import networkx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM, UsageError
from pyro_em.graph.independence import ModelGraph


def random_dag(seed: int, size: int = 6, p: float = 0.4) -> networkx.DiGraph:
    """A random DAG whose nodes s0, …, are in no particular order of their numbers."""
    g = np.random.default_rng(seed)
    order = [f"s{i}" for i in g.permutation(size)]
    dag = networkx.DiGraph()
    dag.add_nodes_from(order)
    dag.add_edges_from((a, b) for a, b in itertools.combinations(order, 2) if g.random() < p)
    return dag


def tables_of(dag: networkx.DiGraph, seed: int) -> dict[str, Tensor]:
    """p(node = 1 | parents), indexed by the parents' values."""
    g = torch.Generator().manual_seed(seed)
    return {n: 0.1 + 0.8 * torch.rand((2,) * dag.in_degree(n), generator=g) for n in dag}


def network_model(dag: networkx.DiGraph, seed: int, rows: int = 0) -> Callable[..., None]:
    """The DAG as a binary network in Pyro; about a half of its nodes are observed."""
    tables = tables_of(dag, seed)
    g = np.random.default_rng(seed + 1000)
    observed = {n for n in dag if g.random() < 0.5}

    def model() -> None:
        values: dict[str, Tensor] = {}
        with pyro.plate("rows", rows) if rows else nullcontext():
            for n in networkx.topological_sort(dag):
                p = tables[n][tuple(values[parent] for parent in dag.predecessors(n))]
                data = torch.ones((rows,) if rows else ()) if n in observed else None
                values[n] = pyro.sample(n, dist.Bernoulli(p), obs=data).long()

    model.observed = observed  # type: ignore[attr-defined]
    return model


def graph_of(model: Callable[..., None], *args: object) -> ModelGraph:
    """What the plan says."""
    return ExactPosteriorEM(model).plan(*args).graph


def questions(nodes: list[str], seed: int, n: int = 40) -> Iterator[tuple[str, str, set[str]]]:
    """Random pairs and random sets given."""
    g = np.random.default_rng(seed)
    for _ in range(n):
        a, b, *rest = g.permutation(nodes)
        yield str(a), str(b), {str(v) for v in rest if g.random() < 0.45}


def joint_of(dag: networkx.DiGraph, seed: int) -> tuple[list[str], np.ndarray]:
    """The whole joint table, axes in sorted order of nodes."""
    nodes = sorted(dag)
    tables = tables_of(dag, seed)
    joint = np.ones((2,) * len(nodes))
    for state in itertools.product((0, 1), repeat=len(nodes)):
        value = dict(zip(nodes, state, strict=True))
        for n in nodes:
            one = float(tables[n][tuple(value[parent] for parent in dag.predecessors(n))])
            joint[state] *= one if value[n] else 1 - one
    return nodes, joint


def dependence(nodes: list[str], joint: np.ndarray, a: str, b: str, given: set[str]) -> float:
    """max |p(a, b, c) p(c) − p(a, c) p(b, c)| over all values."""
    keep = [a, b, *sorted(given)]
    drop = tuple(i for i, n in enumerate(nodes) if n not in keep)
    left = [n for n in nodes if n in keep]
    table = joint.sum(axis=drop).transpose([left.index(n) for n in keep])
    c = table.sum((0, 1), keepdims=True)
    return float(
        np.abs(table * c - table.sum(0, keepdims=True) * table.sum(1, keepdims=True)).max()
    )


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("rows", [0, 3])
def test_edges_blankets_and_separations_of_random_networks(seed: int, rows: int) -> None:
    """Against the DAG that the model was written from, and networkx's own d-separation."""
    dag = random_dag(seed)
    model = network_model(dag, seed, rows)
    graph = graph_of(model)
    assert set(graph) == set(dag)
    assert set(graph.edges) == set(dag.edges)
    assert {n for n, o in graph.nodes(data="observed") if o} == model.observed  # type: ignore[attr-defined]
    assert set(dict(graph.nodes(data="kind")).values()) == {"site"}
    for n in dag:
        spouses = {p for child in dag.successors(n) for p in dag.predecessors(child)}
        expected = (set(dag.predecessors(n)) | set(dag.successors(n)) | spouses) - {n}
        assert graph.markov_blanket(n) == expected
    for a, b, given in questions(sorted(dag), seed):
        assert graph.is_separated(a, b, given) == networkx.is_d_separator(dag, {a}, {b}, given)


def test_questions_have_both_answers() -> None:
    """Else the comparison above could not fail."""
    answers = [
        networkx.is_d_separator(dag, {a}, {b}, given)
        for seed in range(12)
        for dag in [random_dag(seed)]
        for a, b, given in questions(sorted(dag), seed)
    ]
    assert 0.2 < np.mean(answers) < 0.8


@pytest.mark.parametrize("seed", range(6))
def test_separation_is_independence_in_the_joint_table(seed: int) -> None:
    """Separated: independent to rounding; not separated: dependent, for tables drawn at random."""
    dag = random_dag(seed, size=5)
    graph = graph_of(network_model(dag, seed))
    nodes, joint = joint_of(dag, seed)
    assert joint.sum() == pytest.approx(1.0)
    for a, b in itertools.combinations(nodes, 2):
        rest = [n for n in nodes if n not in (a, b)]
        for r in range(len(rest) + 1):
            for given in itertools.combinations(rest, r):
                size = dependence(nodes, joint, a, b, set(given))
                if graph.is_separated(a, b, given):
                    assert size < 1e-15
                else:
                    assert size > 1e-12
    for n in nodes:  # the blanket shields, and is what shields
        blanket = graph.markov_blanket(n)
        for other in set(nodes) - blanket - {n}:
            assert dependence(nodes, joint, n, other, blanket) < 1e-15
        for member in blanket:
            assert dependence(nodes, joint, n, member, blanket - {member}) > 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_fields_separate_as_the_undirected_graph(seed: int) -> None:
    """Pairs and triples: separated where removing what is given leaves no path."""
    g = np.random.default_rng(seed)
    nodes = [f"v{i}" for i in range(6)]
    pairs = [c for c in itertools.combinations(range(6), 2) if g.random() < 0.3]
    cliques = [*pairs, tuple(int(i) for i in g.choice(6, 3, replace=False))]
    tables = [torch.as_tensor(g.standard_normal((2,) * len(c))) for c in cliques]

    def field() -> None:
        v = [pyro.sample(n, dist.Categorical(torch.ones(2))) for n in nodes]
        for i, (clique, table) in enumerate(zip(cliques, tables, strict=True)):
            pyro.factor(f"psi{i}", table[tuple(v[j] for j in clique)])

    graph = graph_of(field)
    undirected = networkx.Graph()
    undirected.add_nodes_from(nodes)
    for clique in cliques:
        undirected.add_edges_from(
            (nodes[i], nodes[j]) for i, j in itertools.combinations(clique, 2)
        )
    assert {n for n, k in graph.nodes(data="kind") if k == "factor"} == {
        f"psi{i}" for i in range(len(cliques))
    }
    for n in nodes:
        assert graph.markov_blanket(n) == set(undirected[n])
    for a, b, given in questions(nodes, seed):
        left = undirected.subgraph(set(nodes) - given)
        assert graph.is_separated(a, b, given) != networkx.has_path(left, a, b)


def test_the_four_cycle_has_no_marginal_independence() -> None:
    """Opposite corners are independent given both others, and given nothing less."""

    def field() -> None:
        v = [pyro.sample(n, dist.Categorical(torch.ones(2))) for n in "abcd"]
        for i in range(4):
            pyro.factor(f"f{i}", torch.eye(2)[v[i], v[(i + 1) % 4]])

    graph = graph_of(field)
    assert graph.is_separated("a", "c", ["b", "d"])
    assert graph.is_separated("b", "d", ["a", "c"])
    assert not graph.is_separated("a", "c", ["b"])
    assert not graph.is_separated("a", "c")


def test_a_name_as_a_string_is_one_site() -> None:
    """given="rain" is the site, not its letters."""
    graph = ModelGraph([("sun", "rain"), ("rain", "wet")])
    assert graph.is_separated("sun", "wet", "rain")


def test_obs_mask_sites_appear_once() -> None:
    """Observed in part: one node, under the user's name, with the edges of both parts."""

    def model(x: Tensor, known: Tensor) -> None:
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5))
            y = pyro.sample("y", dist.Bernoulli(0.2 + 0.6 * z), obs=x, obs_mask=known)
            pyro.sample("w", dist.Normal(y, 1.0), obs=x)

    graph = graph_of(model, torch.tensor([0.0, 1.0]), torch.tensor([True, False]))
    assert set(graph) == {"z", "y", "w"}
    assert set(graph.edges) == {("z", "y"), ("y", "w")}
    assert graph.markov_blanket("y") == {"z", "w"}
    assert graph.is_separated("z", "w", ["y"])
    assert not graph.is_separated("z", "w")


def test_chains_have_their_steps_as_nodes() -> None:
    """A hidden Markov chain of four steps: past and future are independent given the present."""

    def hmm(x: Tensor) -> None:
        A = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        z = torch.tensor(0)
        for t in pyro.markov(range(len(x))):
            z = pyro.sample(f"z{t}", dist.Categorical(A[z]))
            pyro.sample(f"x{t}", dist.Normal(z.to(x.dtype), 1.0), obs=x[t])

    graph = graph_of(hmm, torch.zeros(4))
    assert graph.markov_blanket("z1") == {"z0", "z2", "x1"}
    assert graph.is_separated("z0", "z3", ["z2"])
    assert not graph.is_separated("x0", "x3", ["x1", "x2"])


def test_latents_of_a_guide_are_nodes_too() -> None:
    """The graph is the model's, whatever the routes are."""

    def model(x: Tensor) -> None:
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        with pyro.plate("rows", len(x)):
            z = pyro.sample("z", dist.Categorical(torch.ones(2)))
            pyro.sample("x", dist.Normal(z.to(x.dtype), scale), obs=x)

    graph = ExactPosteriorEM(model, "map").plan(torch.tensor([0.0, 1.0])).graph
    assert set(graph.edges) == {("scale", "x"), ("z", "x")}
    assert not graph.is_separated("scale", "z", ["x"])
    assert graph.is_separated("scale", "z")


def test_refusals_are_sentences() -> None:
    """Unknown names are named, with what there is; a site given itself is no question."""
    graph = ModelGraph([("sun", "rain"), ("rain", "wet")])
    unknown = "the model's graph has no such site; it has: 'sun', 'rain', 'wet'"
    with pytest.raises(UsageError, match=unknown):
        graph.markov_blanket("snow")
    with pytest.raises(UsageError, match="site 'snow'"):
        graph.is_separated("sun", "wet", ["snow"])
    with pytest.raises(UsageError, match="site 'snow'"):
        graph.is_separated("snow", "wet")
    with pytest.raises(UsageError, match="'sun' and 'sun' must differ"):
        graph.is_separated("sun", "sun")
    with pytest.raises(UsageError, match=r"outside given=\['sun'\]"):
        graph.is_separated("sun", "wet", ["sun"])
