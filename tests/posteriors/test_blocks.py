"""Blocks of latents against the joint table; blocks inside blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import ExactPosteriorEM
from pyro_em.densities.tying import collapsed
from pyro_em.errors import Finding
from pyro_em.graph.factors import FactorGraph
from pyro_em.posteriors.block import Block, Component, Values, components_of
from pyro_em.posteriors.chains.chain import Chain
from pyro_em.posteriors.contracted import Contraction, contraction_around
from pyro_em.posteriors.mixtures.mixture import Mixture
from pyro_em.testing import check_block
from pyro_em.testing.blocks import joint_table
from pyro_em.tracing.missing import WithMissing
from pyro_em.tracing.parameters import values_of
from pyro_em.updates.expectations.statistics import Expectation, Key, group_sums

DTYPES = (torch.float64, torch.float32)


def tensor(*numbers: float, dtype: torch.dtype) -> Tensor:
    return torch.tensor(numbers, dtype=dtype)


# ------------------------------------------------------------------ models


def normals(x: Tensor, ok: Tensor | None = None) -> None:
    w = pyro.param("w", tensor(0.3, 0.7, dtype=x.dtype), constraint=C.simplex)
    mu = pyro.param("mu", tensor(-1.0, 1.5, dtype=x.dtype))
    sigma = pyro.param("sigma", tensor(0.8, 1.1, dtype=x.dtype), constraint=C.positive)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        fn = dist.Normal(mu[z], sigma[z])
        pyro.sample("x", fn if ok is None else fn.mask(ok), obs=x)


def vectors(x: Tensor) -> None:
    D = x.shape[1]
    w = pyro.param("w", tensor(0.5, 0.5, dtype=x.dtype), constraint=C.simplex)
    mu = pyro.param("mu", torch.stack([x[0] - 0.3, x[1] + 0.2]))
    S = pyro.param("S", torch.eye(D, dtype=x.dtype).repeat(2, 1, 1) * 4, C.positive_definite)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.MultivariateNormal(mu[z], S[z]), obs=x)


def symbols(x: Tensor) -> None:
    w = pyro.param("w", torch.tensor([0.2, 0.3, 0.5]), constraint=C.simplex)
    E = pyro.param(
        "E", torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.3, 0.3, 0.4]]), C.simplex
    )
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Categorical(E[z]), obs=x)


def regression(u: Tensor, y: Tensor) -> None:
    a = pyro.param("a", tensor(0.0, 0.5, dtype=y.dtype))
    b = pyro.param("b", tensor(1.0, -1.0, dtype=y.dtype))
    with pyro.plate("n", len(y)):
        z = pyro.sample("z", dist.Categorical(tensor(0.4, 0.6, dtype=y.dtype)))
        pyro.sample("y", dist.Normal(a[z] + b[z] * u, 0.7), obs=y)


def steps(x: Tensor, ok: Tensor | None = None) -> None:
    pi = pyro.param("pi", tensor(0.6, 0.4, dtype=x.dtype), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=x.dtype), constraint=C.simplex)
    mu = pyro.param("mu", tensor(-1.0, 1.0, dtype=x.dtype))
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
        fn = dist.Normal(mu[z], 1.0)
        pyro.sample(f"x_{t}", fn if ok is None else fn.mask(ok[t]), obs=x[t])


def sequences(x: Tensor) -> None:
    pi = pyro.param("pi", torch.tensor([0.6, 0.4]), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=C.simplex)
    E = pyro.param("E", torch.tensor([[0.7, 0.3], [0.1, 0.9]]), constraint=C.simplex)
    with pyro.plate("sequences", len(x)):
        z = None
        for t in pyro.markov(range(x.shape[1])):
            z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
            pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[:, t])


def two_per_row(x: Tensor) -> None:
    w = pyro.param("w", tensor(0.3, 0.7, dtype=x.dtype), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=x.dtype), C.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [0.5, 2.0]], dtype=x.dtype))
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        h = pyro.sample("h", dist.Categorical(A[z]))
        pyro.sample("x", dist.Normal(mu[z, h], 1.0), obs=x)


def nested_plates(x: Tensor) -> None:
    w = pyro.param("w", tensor(0.3, 0.7, dtype=x.dtype), constraint=C.simplex)
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.4, 0.6]], dtype=x.dtype), C.simplex)
    mu = pyro.param("mu", tensor(-1.0, 1.0, dtype=x.dtype))
    with pyro.plate("groups", x.shape[1], dim=-1):
        z = pyro.sample("z", dist.Categorical(w))
        with pyro.plate("rows", x.shape[0], dim=-2):
            h = pyro.sample("h", dist.Categorical(A[z]))
            pyro.sample("x", dist.Normal(mu[h], 1.0), obs=x)


# ------------------------------------------------------------------ the shipped blocks


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Mixture, Contraction])
def test_mixtures(kind: type[Block], dtype: torch.dtype) -> None:
    x = tensor(-1.3, 0.2, 2.5, 2.5, -0.6, 1.8, dtype=dtype)
    check_block(kind, normals, x)
    check_block(kind, normals, x, torch.arange(6) % 4 != 2)
    torch.manual_seed(1)
    check_block(kind, vectors, torch.randn(8, 2, dtype=dtype))
    check_block(kind, regression, x.roll(2), x)


def beside_the_rows(x: Tensor, inside: bool) -> None:
    """Sites that read no latent: in the rows' plate, and outside it."""
    w = pyro.param("w", torch.tensor([0.3, 0.7]).double(), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([-1.0, 1.5]).double())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0), obs=x)
        pyro.sample("u", dist.Normal(mu[0], 2.0), obs=x.flip(0))
    if not inside:
        pyro.sample("c", dist.Categorical(w), obs=torch.tensor(1))


def with_a_prior(x: Tensor) -> None:
    """Rows, some of them equal, whose weights have a prior."""
    w = pyro.sample("w", dist.Dirichlet(torch.tensor([2.0, 3.0])))
    E = pyro.param("E", torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.3, 0.5]]), constraint=C.simplex)
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Categorical(E[z]), obs=x)


@pytest.mark.parametrize("kind", [Mixture, Contraction])
def test_what_is_known_beside_the_rows(kind: type[Block]) -> None:
    x = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64)
    check_block(kind, beside_the_rows, x, True)
    check_block(kind, beside_the_rows, x, False)


@pytest.mark.parametrize("kind", [Mixture, Contraction])
def test_priors_are_no_part_of_the_evidence(kind: type[Block]) -> None:
    check_block(kind, with_a_prior, torch.tensor([0, 1, 1, 1, 2, 0]), guide="map")


@pytest.mark.parametrize("scaled", [False, True])
def test_rows_one_by_one_are_those_of_the_contraction(scaled: bool) -> None:
    """Rows of unequal weights, masked entries, and a row that is impossible."""
    x = torch.tensor([0, 1, 1, 1, 2, 3])
    scale = torch.tensor([1.0, 2.0, 0.5, 3.0, 1.0, 1.0]) if scaled else 1.0

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.3, 0.7]), constraint=C.simplex)
        E = torch.tensor([[0.7, 0.2, 0.1, 0.0], [0.2, 0.3, 0.5, 0.0]])
        E = pyro.param("E", E, constraint=C.simplex)
        with pyro.plate("n", len(x)), pyro.poutine.scale(scale=scale):
            z = pyro.sample("z", dist.Categorical(w))
            pyro.sample("x", dist.Categorical(E[z]), obs=x)
            fn = dist.Bernoulli(torch.tensor([0.2, 0.9])[z]).mask(torch.arange(6) % 3 != 0)
            pyro.sample("y", fn, obs=torch.ones(6))

    program, graph, values = prepared(model)
    whole = component(program, graph, values, ("z",))
    one, other = Mixture.match(whole), Contraction.match(whole)
    assert not isinstance(one, Finding) and not isinstance(other, Finding)
    assert one.dims == other.dims == ("n",)
    table = other.table(values)
    torch.testing.assert_close(one.table(values), table)
    assert table[-1] == -torch.inf
    weights = torch.tensor([0.5, 2.0, 1.0, 0.25, 3.0, 0.0], dtype=torch.float64)
    a, b = one.expect(values, weights), other.expect(values, weights)
    for g, named in b.sums.items():
        for name, total in named.items():
            torch.testing.assert_close(a.sums[g][name], total, msg=f"{name} of {g}")
    assert a.log_evidence == pytest.approx(float((table * weights)[:-1].sum()))
    assert "contraction" not in vars(one)  # it was not asked


@pytest.mark.parametrize("shared", [False, True])
def test_sequences_one_by_one_are_those_of_the_contraction(shared: bool) -> None:
    """Masked steps, and a factor outside of the sequences, which none of them can have for itself."""
    x = torch.tensor([[0.3, -1.0, 2.0, 0.4], [1.0, 0.1, -0.2, 1.9], [0.0, 2.2, 1.0, -1.3]])
    seen = torch.tensor([[True, False, True, True], [True] * 4, [True, True, True, False]])

    def model() -> None:
        A = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
        A = pyro.param("A", A, constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.5]))
        if shared:
            pyro.sample("beside", dist.Normal(mu[0], 1.0), obs=torch.tensor(0.3))
        with pyro.plate("n", len(x)):
            z = None
            for t in pyro.markov(range(x.shape[1])):
                z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
                fn = dist.Normal(mu[z], 1.0).mask(seen[:, t])
                pyro.sample(f"x_{t}", fn, obs=x[:, t])

    program, graph, values = prepared(model)
    whole = component(program, graph, values, tuple(graph.latents))
    one, other = Chain.match(whole), Contraction.match(whole)
    assert not isinstance(one, Finding) and not isinstance(other, Finding)
    assert one.dims == other.dims == (() if shared else ("n",))
    table = other.table(values)
    torch.testing.assert_close(one.table(values), table)
    weights = 0.5 + torch.arange(table.numel(), dtype=torch.float64).reshape(table.shape)
    a, b = one.expect(values, weights), other.expect(values, weights)
    assert a.sums.keys() == b.sums.keys()
    for g, named in b.sums.items():
        for name, total in named.items():
            torch.testing.assert_close(a.sums[g][name], total, msg=f"{name} of {g}")
    assert a.log_evidence == pytest.approx(b.log_evidence)
    assert "contraction" not in vars(one)  # it was not asked


@pytest.mark.parametrize("kind", [Mixture, Contraction])
@pytest.mark.parametrize("x", [[0, 1, 1, 2], [1]])
def test_symbols_and_a_single_row(kind: type[Block], x: list[int]) -> None:
    check_block(kind, symbols, torch.tensor(x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [Chain, Contraction])
def test_chains(kind: type[Block], dtype: torch.dtype) -> None:
    x = tensor(-1.3, 0.2, 0.9, 2.5, -0.5, dtype=dtype)
    check_block(kind, steps, x)
    check_block(kind, steps, x, torch.tensor([True, False, True, True, False]))


def of_vectors(x: Tensor, kind: str, chain: bool) -> None:
    """Two states; a mixture of the rows, or a chain of them."""
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=x.dtype), C.simplex)
    mu = pyro.param("mu", torch.tensor([[0.0, 1.0, 2.0], [1.0, -1.0, 0.0]], dtype=x.dtype))
    if kind == "MultivariateNormal":
        s = 2 * torch.eye(3, dtype=x.dtype).repeat(2, 1, 1) + 1
        s = pyro.param("s", s, constraint=C.positive_definite)
    else:
        s = pyro.param("s", torch.ones(2, 3, dtype=x.dtype), constraint=C.positive)

    def of(z: Tensor) -> Any:
        if kind == "MultivariateNormal":
            return dist.MultivariateNormal(mu[z], s[z])
        return dist.Normal(mu[z], s[z]).to_event(1)

    if not chain:
        with pyro.plate("n", len(x)):
            pyro.sample("x", of(pyro.sample("z", dist.Categorical(A[0]))), obs=x)
        return
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        pyro.sample(f"x_{t}", of(z), obs=x[t])


@pytest.mark.parametrize("kind", ["MultivariateNormal", "Normal"])
def test_rows_with_missing_entries(kind: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    x[torch.rand(6, 3, generator=g) < 0.25] = torch.nan
    x[2] = torch.nan
    check_block(Mixture, WithMissing(of_vectors), x, kind, False, states=1)
    check_block(Chain, WithMissing(of_vectors), x, kind, True, states=1)


@pytest.mark.parametrize("kind", [Chain, Contraction])
@pytest.mark.parametrize("x", [[[0, 1, 1], [1, 0, 0]], [[0, 1, 1]]])
def test_sequences_of_symbols(kind: type[Block], x: list[list[int]]) -> None:
    check_block(kind, sequences, torch.tensor(x))


@pytest.mark.parametrize("kind", [Chain, Contraction])
@pytest.mark.parametrize("varies", ["steps", "sequences", "both", "neither"])
def test_covariates_of_several_sequences(kind: type[Block], varies: str) -> None:
    y = torch.tensor([[-1.3, 0.2], [0.9, 2.5], [0.4, -0.7]], dtype=torch.float64)
    u = y.roll(1, 0).roll(1, 1)
    u = {"steps": u[:, :1], "sequences": u[:1], "both": u, "neither": u[:1, :1]}[varies]
    u = u.expand(3, -1)

    def model() -> None:
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double(), C.simplex)
        a = pyro.param("a", tensor(-1.0, 1.0, dtype=y.dtype))
        b = pyro.param("b", tensor(0.2, 0.5, dtype=y.dtype))
        z = None
        with pyro.plate("sequences", 2):
            for t in range(3):
                w = tensor(0.4, 0.6, dtype=y.dtype) if z is None else A[z]
                z = pyro.sample(f"z_{t}", dist.Categorical(w))
                slope = b[z] if varies != "neither" else 0.0
                pyro.sample(f"y_{t}", dist.Normal(a[z] + slope * u[t], 1.0), obs=y[t])

    check_block(kind, model)


@pytest.mark.parametrize("dtype", DTYPES)
def test_contractions(dtype: torch.dtype) -> None:
    x = tensor(-1.3, 0.2, 0.9, dtype=dtype)
    check_block(Contraction, two_per_row, x)
    check_block(Contraction, nested_plates, torch.stack([x, x + 1], 1)[:2])


def test_a_wrong_block_fails_the_suite() -> None:
    class Short(Mixture):
        """Forgets a row."""

        def e_step(self, at: Any) -> Expectation:
            found = super().e_step(at)
            return Expectation(found.log_evidence * (1 + 1e-6), found.sums)

    class Light(Mixture):
        """Loses a thousandth of the sums of one group."""

        def e_step(self, at: Any) -> Expectation:
            found = super().e_step(at)
            sums = {
                k: {n: s * (1.001 if n == "mass" else 1.0) for n, s in named.items()}
                for k, named in found.sums.items()
            }
            return Expectation(found.log_evidence, sums)

    x = torch.tensor([-1.3, 0.2, 0.9, 2.5, -0.6, -2.0, 1.8], dtype=torch.float64)
    with pytest.raises(AssertionError, match="log evidence"):
        check_block(Short, normals, x)
    with pytest.raises(AssertionError, match="M-step of"):
        check_block(Light, normals, x)
    with pytest.raises(AssertionError, match="does not match"):
        check_block(Chain, normals, x)


def test_wrong_cells_and_weights_fail_the_suite() -> None:
    class Turned(Contraction):
        """A table whose rows are interchanged."""

        def table(self, values: Values) -> Tensor:
            return super().table(values).flip(0)

    class Even(Contraction):
        """Weighs every cell by the mean of the weights."""

        def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
            even = None if weights is None else weights.mean() * torch.ones_like(weights)
            return super().expect(values, even)

    class Astray(Contraction):
        """Weighs other cells than those it was asked to."""

        def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
            return super().expect(values, None if weights is None else weights.flip(0))

    class Blunt(Contraction):
        """Takes the mean of the weights for its sums."""

        def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
            found = super().expect(values, weights)
            if weights is None:
                return found
            even = super().expect(values, weights.mean() * torch.ones_like(weights))
            return Expectation(found.log_evidence, even.sums, even.references)

    class Short(Contraction):
        """Leaves out the sums of a group."""

        def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
            found = super().expect(values, weights)
            sums = dict(list(found.sums.items())[:-1])
            return Expectation(found.log_evidence, sums, found.references)

    x = torch.tensor([-1.3, 0.2, 0.9, 2.5, -0.6], dtype=torch.float64)
    for kind, words in (
        (Turned, "a cell of the table is off"),
        (Even, "of the table alone is off"),
        (Astray, "of the table alone is off"),
        (Blunt, "'count' of 'z' is off"),
        (Short, "are missing"),
    ):
        with pytest.raises(AssertionError, match=words):
            check_block(kind, normals, x)


# ------------------------------------------------------------------ blocks inside blocks


@dataclass(frozen=True, eq=False)
class TwoStates:
    """A latent of two states per row, summed by hand under what it reads: a double for the tests."""

    graph: FactorGraph
    latents: tuple[str, ...]
    scope: tuple[str, ...]
    own: tuple[int, ...]
    name: str = "two states"

    @classmethod
    def match(cls, component: Component) -> Self | Finding:
        (latent,) = component.latents
        if component.graph.latents[latent].size != 2:
            return Finding(f"site '{latent}'", "it has not two states")
        own = [g for g, group in enumerate(component.graph.groups) if latent in group.dims[0]]
        return cls(component.graph, component.latents, component.scope, tuple(own))

    @property
    def dims(self) -> tuple[str, ...]:
        return (*self.graph.latents[self.latents[0]].plates, *self.scope)

    def _logs(self, values: Values) -> dict[int, Tensor]:
        """# per group (*plates, K_scope or 1, 2)"""
        out = {}
        for g in self.own:
            table = self.graph.groups[g].log_density_at(values)[0].double()
            dims = self.graph.groups[g].dims[0]
            assert dims[-1] == self.latents[0]
            out[g] = table if self.scope[0] in dims else table.unsqueeze(-2)
        return out

    def table(self, values: Values) -> Tensor:
        logs = self._logs(values)
        a = sum(t[..., 0] for t in logs.values())
        b = sum(t[..., 1] for t in logs.values())
        return torch.logaddexp(a, b)  # type: ignore[arg-type]

    def expect(self, values: Values, weights: Tensor | None = None) -> Expectation:
        logs, table = self._logs(values), self.table(values)
        weights = torch.ones_like(table) if weights is None else weights
        posterior = (sum(logs.values()) - table.unsqueeze(-1)).exp() * weights.unsqueeze(-1)  # type: ignore[union-attr]
        sums: dict[Key, Any] = {}
        for g in self.own:
            group = self.graph.groups[g]
            cells = posterior if self.scope[0] in group.dims[0] else posterior.sum(-2)
            arguments = {n: a.detach() for n, a in group.evaluate_arguments(values).items()}
            sums[g] = group_sums(group, cells.unsqueeze(0), arguments)
        return Expectation(float((table * weights).sum()), sums)


def emissions_under_a_state(x: Tensor) -> None:
    """A chain whose emissions have a hidden cause of their own."""
    A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.4, 0.6]]), constraint=C.simplex)
    B = pyro.param("B", torch.tensor([[0.9, 0.1], [0.25, 0.75]]), constraint=C.simplex)
    mu = pyro.param("mu", torch.tensor([[-1.0, 0.0], [0.5, 2.0]]))
    z = None
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[0] if z is None else A[z]))
        h = pyro.sample(f"h_{t}", dist.Categorical(B[z]))
        pyro.sample(f"x_{t}", dist.Normal(mu[z, h], 1.0), obs=x[t])


def prepared(model: Callable[..., None], *args: Any) -> tuple[Any, FactorGraph, dict[str, Tensor]]:
    program = ExactPosteriorEM(model)._ready(args, {})
    return program, collapsed(program.graph), values_of(program.graph.parameters)


def component(
    program: Any, graph: FactorGraph, values: Values, latents: tuple[str, ...], *scope: str
) -> Component:
    return Component(graph, program.updates, values, latents, scope)


@pytest.mark.parametrize("inside", [TwoStates, Contraction])
def test_a_block_inside_a_block_is_the_whole(inside: type[Block]) -> None:
    x = torch.tensor([-1.3, 0.2, 0.9])
    program, graph, values = prepared(two_per_row, x)
    inner = inside.match(component(program, graph, values, ("h",), "z"))
    assert not isinstance(inner, Finding)
    assert inner.dims == ("n", "z") and inner.table(values).shape == (3, 2)
    whole = component(program, graph, values, tuple(graph.latents))
    outer = contraction_around(whole, [inner])
    assert not isinstance(outer, Finding) and outer.latents == ("z",)
    joint = joint_table(program)
    found = outer.expect(values)
    assert found.log_evidence == pytest.approx(joint.log_evidence, abs=1e-5)
    flat = Contraction.match(whole)
    assert not isinstance(flat, Finding)
    expected = flat.expect(values)
    assert set(found.sums) == set(expected.sums) == set(range(len(graph.groups)))
    for g, named in expected.sums.items():
        for name, total in named.items():
            torch.testing.assert_close(found.sums[g][name], total, rtol=1e-5, atol=1e-5)
    marginal = outer.marginals(values)["z"]
    own, i = program.graph.group_of("z")
    cells = joint.cells[list(program.graph.groups).index(own)][i]
    torch.testing.assert_close(marginal, cells, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inside", [TwoStates, Contraction])
def test_weights_of_the_scope_reach_the_sums_inside(inside: type[Block]) -> None:
    x = torch.tensor([-1.3, 0.2, 0.9])
    program, graph, values = prepared(two_per_row, x)
    inner = inside.match(component(program, graph, values, ("h",), "z"))
    assert not isinstance(inner, Finding)
    weights = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.25, 0.75]], dtype=torch.float64)
    found = inner.expect(values, weights)
    assert found.log_evidence == pytest.approx(float((inner.table(values) * weights).sum()))
    g = next(g for g, group in enumerate(graph.groups) if group.members == ("x",))
    assert float(found.sums[g]["weight"].sum()) == pytest.approx(3.0, rel=1e-6)


def test_blocks_inside_a_chain() -> None:
    x = torch.tensor([-1.3, 0.2, 0.9, -0.2])
    program, graph, values = prepared(emissions_under_a_state, x)
    inner = []
    for t in range(len(x)):
        found = Contraction.match(component(program, graph, values, (f"h_{t}",), f"z_{t}"))
        assert not isinstance(found, Finding)
        inner.append(found)
    whole = component(program, graph, values, tuple(graph.latents))
    outer = contraction_around(whole, inner)
    assert not isinstance(outer, Finding) and outer.latents == tuple(f"z_{t}" for t in range(4))
    flat = Contraction.match(whole)
    assert not isinstance(flat, Finding)
    a, b = outer.expect(values), flat.expect(values)
    assert a.log_evidence == pytest.approx(joint_table(program).log_evidence, abs=1e-5)
    for g, named in b.sums.items():
        for name, total in named.items():
            torch.testing.assert_close(a.sums[g][name], total, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_table_is_the_score() -> None:
    x = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64)
    program, graph, values = prepared(two_per_row, x)
    block = Contraction.match(component(program, graph, values, tuple(graph.latents)))
    assert not isinstance(block, Finding)

    def evidence(mu: Tensor) -> Tensor:
        return block.table({**values, "mu": mu}).sum()

    assert torch.autograd.gradcheck(evidence, values["mu"].clone().requires_grad_())


# ------------------------------------------------------------------ components


def test_components_share_no_factor() -> None:
    def model(x: Tensor) -> None:
        w = pyro.param("w", torch.ones(2) / 2, constraint=C.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]))
        with pyro.plate("n", len(x)):
            a = pyro.sample("a", dist.Categorical(w))
            b = pyro.sample("b", dist.Categorical(w))
            c = pyro.sample("c", dist.Bernoulli(mu[b].sigmoid()))
            pyro.sample("x", dist.Normal(mu[a], 1.0), obs=x)
            pyro.sample("y", dist.Normal(mu[c.long()], 1.0), obs=x)

    em = ExactPosteriorEM(model)
    program = em._ready((torch.randn(5),), {})
    assert components_of(program.graph) == (("a",), ("b", "c"))  # type: ignore[union-attr]
    plan = em.plan(torch.randn(5))
    assert plan.kernel == {("a",): "contraction", ("b", "c"): "contraction"}
    assert set(plan.kernel_reason) == set(plan.kernel)  # type: ignore[arg-type]
