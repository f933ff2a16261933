"""Masks at any level of an event, against plain Pyro summed over all assignments."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints

from pyro_em import DataError, DegenerateError, ExactPosteriorEM, Gradient, ModelError

K = 2
D = (2, 3)  # of an event with two dimensions; the last alone of one with one


@dataclass(frozen=True)
class Kind:
    """A distribution of one element: parameters (constraint, event, at a random start), and build."""

    params: dict[str, tuple[Any, tuple[int, ...], Callable[[Tensor], Tensor]]]
    build: Callable[..., Any]
    garbage: float = math.nan
    smooth: bool = True
    slope: float = 1e-6  # what may be left of it after an M-step
    endless: bool = False  # whether an M-step may have no maximum


def _softmax(t: Tensor) -> Tensor:
    return t.softmax(-1)


REAL = (constraints.real, (), lambda t: t)
POSITIVE = (constraints.positive, (), lambda t: 0.5 + t.abs())
UNIT = (constraints.unit_interval, (), torch.sigmoid)
SIMPLEX = (constraints.simplex, (3,), _softmax)
VECTOR = (constraints.positive, (3,), lambda t: 0.5 + t.abs())
KINDS = {
    "Normal": Kind({"loc": REAL, "scale": POSITIVE}, dist.Normal),
    "Normal, infinite": Kind({"loc": REAL}, lambda loc: dist.Normal(loc, 1.3), math.inf),
    "LogNormal": Kind({"loc": REAL, "scale": POSITIVE}, dist.LogNormal, -1.0),
    "Laplace": Kind({"loc": REAL, "scale": POSITIVE}, dist.Laplace, smooth=False),
    "Exponential": Kind({"rate": POSITIVE}, dist.Exponential),
    "Gamma": Kind({"rate": POSITIVE}, lambda rate: dist.Gamma(2.0, rate), -3.0),
    "Poisson": Kind({"rate": POSITIVE}, dist.Poisson),
    "Bernoulli": Kind({"probs": UNIT}, dist.Bernoulli),
    "Bernoulli, odd": Kind({"probs": UNIT}, dist.Bernoulli, 7.0),
    "Geometric": Kind({"probs": UNIT}, dist.Geometric, -1.0),
    "Binomial": Kind({"probs": UNIT}, lambda probs: dist.Binomial(4, probs), 99.0),
    "Categorical": Kind({"probs": SIMPLEX}, dist.Categorical, -1),
    "OneHot": Kind({"probs": SIMPLEX}, dist.OneHotCategorical),
    "Multinomial": Kind({"probs": SIMPLEX}, lambda probs: dist.Multinomial(5, probs)),
    "MultivariateNormal": Kind(
        {"loc": (constraints.real, (2,), lambda t: t)},
        lambda loc: dist.MultivariateNormal(loc, torch.tensor([[1.0, 0.4], [0.4, 0.8]])),
    ),
    # No closed form is known of these.
    "StudentT": Kind({"loc": REAL}, lambda loc: dist.StudentT(4.0, loc, 1.0), endless=True),
    "Beta": Kind({"a": POSITIVE}, lambda a: dist.Beta(a, 2.0), slope=1e-4),
    "VonMises": Kind({"loc": REAL}, lambda loc: dist.VonMises(loc, 2.0), slope=1e-4),
    # Its concentrations may rise without end.
    "Dirichlet": Kind({"a": VECTOR}, lambda a: dist.Dirichlet(a), smooth=False, endless=True),
}
SHAPES = ("no latent", "mixture", "one class", "chain")


@dataclass(frozen=True)
class Case:
    """A model, its data with nonsense where they are masked, and the same data without it."""

    kind: Kind
    shape: str
    events: int
    masks: tuple[Any, ...]  # below everything, between two to_event, above, poutine
    start: dict[str, Tensor]
    data: Tensor
    filled: Tensor
    curved: bool

    @property
    def rows(self) -> int:
        """Of one plate."""
        return 2 if self.shape == "chain" else 3

    def model(self, data: Tensor) -> None:
        params = {
            name: pyro.param(name, self.start[name].clone(), constraint=constraint)
            for name, (constraint, _, _) in self.kind.params.items()
        }
        if self.curved:  # no closed form
            params = {n: p * (1 + 0 * p.square()) for n, p in params.items()}
        pi = pyro.param("pi", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        A = pyro.param("A", torch.tensor([[0.8, 0.2], [0.3, 0.7]]), constraint=constraints.simplex)
        z = pyro.sample("z", dist.Categorical(pi)) if self.shape == "one class" else None
        with pyro.plate("rows", self.rows):
            if self.shape == "mixture":
                z = pyro.sample("z", dist.Categorical(pi))
            if self.shape != "chain":
                self.observe("x", params, z, data, self.masks)
                return
            for t in pyro.markov(range(2)):
                z = pyro.sample(f"z_{t}", dist.Categorical(pi if z is None else A[z]))
                now = tuple(m[t] if isinstance(m, Tensor) else m for m in self.masks)
                self.observe(f"x_{t}", params, z, data[t], now)

    def observe(self, name: str, params: Any, z: Any, data: Tensor, masks: Any) -> None:
        index = 0 if z is None else z
        fn = self.kind.build(**{n: p[index] for n, p in params.items()})
        below, between, above, outside = masks
        if below is not None:
            fn = fn.mask(below)
        if self.events == 2:
            fn = fn.to_event(1)
            if between is not None:
                fn = fn.mask(between)
        fn = fn.to_event(1)
        if above is not None:
            fn = fn.mask(above)
        if outside is None:
            pyro.sample(name, fn, obs=data)
            return
        with poutine.mask(mask=outside):
            pyro.sample(name, fn, obs=data)

    def log_joint(self) -> Tensor:
        """Plain Pyro's log joint for every assignment of the latents."""
        names = {"no latent": [], "mixture": ["z"], "one class": ["z"]}.get(
            self.shape, ["z_0", "z_1"]
        )
        size = () if self.shape == "one class" else (self.rows,)
        cells = math.prod(size) * len(names)
        flat = torch.tensor(list(itertools.product(range(K), repeat=cells)), dtype=torch.long)
        # Assignments are one more dimension, on the left of the plate.
        values = flat.reshape(len(flat), len(names), *(size or (1,)))
        given = dict(zip(names, values.unbind(1), strict=True))
        trace = poutine.trace(poutine.condition(self.model, given)).get_trace(self.filled)
        trace.compute_log_prob()
        out = torch.zeros(len(values))
        for name in trace.observation_nodes:
            out = out + trace.nodes[name]["log_prob"].sum(-1)
        return out


def _elements(case_masks: tuple[Any, ...], events: int, lead: tuple[int, ...]) -> Tensor:
    """Which elements any mask hides. # (*lead, *D)"""
    shape = (*lead, *D[2 - events :])
    seen = torch.ones(shape, dtype=torch.bool)
    for mask, own in zip(case_masks, (events, events - 1, 0, 0), strict=True):
        if mask is not None:
            mask = torch.as_tensor(mask)
            outer = events - own if mask.dim() else 0
            seen = seen & mask.reshape(mask.shape + (1,) * outer)
    return seen


@st.composite
def cases(draw: Any, name: str) -> Case:
    kind = KINDS[name]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    shape, events = draw(st.sampled_from(SHAPES)), draw(st.integers(1, 2))
    steps, rows = ((2,), 2) if shape == "chain" else ((), 3)
    last = D[2 - events :]

    def mask(own: int) -> Any:
        how = draw(st.sampled_from(["none", "none", "full", "full", "last", "rows", "python"]))
        if how == "none" or own < 0:
            return None
        if how == "python":
            return draw(st.booleans())
        full = [*steps, rows, *last[:own]]
        if how == "last" and own:  # one for all rows
            full[len(steps)] = 1
        if how == "rows":  # one for all elements
            full[len(steps) + 1 :] = [1] * own
        return torch.rand(full, generator=generator) > 0.35

    masks = (mask(events), mask(events - 1) if events == 2 else None, mask(0), mask(0))
    if isinstance(masks[3], bool):
        masks = (*masks[:3], None)
    start = {
        n: at(torch.randn(K, *last, *event, generator=generator).double())
        for n, (_, event, at) in kind.params.items()
    }
    with torch.random.fork_rng():
        torch.manual_seed(draw(st.integers(0, 10_000)))
        fn = kind.build(**{n: p[torch.randint(K, (*steps, rows))] for n, p in start.items()})
        filled = fn.sample()
    seen = _elements(masks, events, (*steps, rows))
    seen = seen.expand(filled.shape[: seen.dim()])
    data = filled.clone()
    data[~seen] = kind.garbage
    return Case(kind, shape, events, masks, start, data, filled, draw(st.integers(0, 3)) == 0)


@pytest.mark.filterwarnings("ignore:.*no observation had any weight")
@pytest.mark.parametrize("name", KINDS)
def test_evidence_and_step_are_those_of_plain_pyro(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "VonMises":  # plain Pyro's own Bessel function has seven digits
        bessel = "torch.distributions.von_mises._log_modified_bessel_fn"
        monkeypatch.setattr(bessel, lambda x, order=0: torch.special.i0e(x).log() + x)

    @settings(max_examples=5, deadline=None, database=None, phases=[Phase.generate])
    @given(cases(name))
    def check(case: Case) -> None:
        with pyro.get_param_store().scope():
            _check(case)

    check()


def _check(case: Case) -> None:
    joint = case.log_joint().detach()
    expected = float(joint.logsumexp(0))
    # Where no maximum is asked for below, a few iterations do: they rise, too.
    few = case.curved or case.kind.endless
    updates = dict.fromkeys(case.kind.params, Gradient(steps=3)) if few else None
    em = ExactPosteriorEM(case.model, updates=updates)
    terms = em.elbo(case.data)
    assert terms.log_evidence == pytest.approx(expected, rel=1e-9, abs=1e-9)
    weights = joint.softmax(0)
    try:
        em.step(case.data)
    except DegenerateError as error:  # a single value is left for a spread
        assert "collapses" in str(error)
        return
    stepped = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    after = case.log_joint()
    assert float(after.detach().logsumexp(0)) >= expected - 1e-9 * max(1.0, abs(expected))
    if case.curved:
        return
    if case.kind.smooth:  # the expected log joint has no slope where it is maximal
        leaves = [pyro.param(n).unconstrained() for n in case.kind.params]
        objective = (weights * after).sum()
        found = torch.autograd.grad(objective, leaves, allow_unused=True)
        for slope in found:
            if slope is not None:  # NaN at a rate of zero
                assert float(slope.nan_to_num().abs().max()) < case.kind.slope
    pyro.clear_param_store()
    em = ExactPosteriorEM(case.model, updates=updates)
    result = em.fit(case.data, max_steps=1, tol=0)
    for name, value in stepped.items():
        torch.testing.assert_close(result.params[name], value)


def _cells(n: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    """Data, the same with NaN where they are masked, and the mask: a row is masked whole."""
    generator = torch.Generator().manual_seed(n * 10 + d)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    seen = torch.rand(n, d, generator=generator) > 0.3
    seen[0] = n == 1
    return x, torch.where(seen, x, math.nan), seen


def _diagonal_mixture(x: Tensor, seen: Tensor) -> None:
    d = x.shape[-1]
    w = pyro.param("w", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    mu = pyro.param("mu", torch.stack([torch.zeros(d), torch.ones(d)]).double())
    with pyro.plate("n", len(x)):
        z = pyro.sample("z", dist.Categorical(w))
        pyro.sample("x", dist.Normal(mu[z], 1.0).mask(seen).to_event(1), obs=x)


@pytest.mark.filterwarnings("ignore:.*no observation had any weight")
@pytest.mark.parametrize(("n", "d"), [(12, 3), (3, 3), (1, 3), (5, 1), (2, 2), (1, 1)])
def test_missing_cells_of_a_diagonal_mixture(n: int, d: int) -> None:
    x, nan, seen = _cells(n, d)
    w, mu = torch.tensor([0.4, 0.6]).double(), torch.stack([torch.zeros(d), torch.ones(d)]).double()
    for _ in range(4):
        each = dist.Normal(mu, 1.0).log_prob(x[:, None]) * seen[:, None]
        joint = each.sum(-1) + w.log()
        evidence = float(joint.logsumexp(-1).sum())
        r = joint.softmax(-1)
        weights = r[:, :, None] * seen[:, None]
        w, before = r.mean(0), mu
        mu = (weights * x[:, None]).sum(0) / weights.sum(0)
        mu = torch.where(weights.sum(0) > 0, mu, before)
    result = ExactPosteriorEM(_diagonal_mixture).fit(nan, seen, max_steps=4, tol=0)
    assert result.history[3] == pytest.approx(evidence, rel=1e-12)
    torch.testing.assert_close(result.params["w"].double(), w, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(result.params["mu"], mu, rtol=1e-6, atol=1e-7)


def test_least_squares_with_a_mask_per_entry() -> None:
    x, nan, seen = _cells(8, 4)
    t = torch.linspace(-1, 1, 4).double()

    def model(x: Tensor, seen: Tensor) -> None:
        a, b = (pyro.param(n, torch.zeros((), dtype=torch.float64)) for n in "ab")
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(a + b * t, 1.0).mask(seen).to_event(1), obs=x)

    result = ExactPosteriorEM(model).fit(nan, seen)
    X = torch.stack([torch.ones(8, 4)[seen].double(), t.expand(8, 4)[seen]], 1)
    expected = torch.linalg.lstsq(X, x[seen].unsqueeze(1)).solution.squeeze(1)
    torch.testing.assert_close(torch.stack([result.params[n] for n in "ab"]), expected)
    errors = torch.linalg.inv(X.T @ X).diagonal().sqrt()
    found = result.standard_errors()
    assert float(found["a"]) == pytest.approx(float(errors[0]))
    assert float(found["b"]) == pytest.approx(float(errors[1]))


def test_a_prior_with_a_mask_per_element() -> None:
    x, nan, seen = _cells(9, 3)
    believed = torch.tensor([True, False, True])

    def model(x: Tensor, seen: Tensor) -> None:
        prior = dist.Normal(torch.zeros(3).double(), 2.0).mask(believed).to_event(1)
        mu = pyro.sample("mu", prior)
        with pyro.plate("n", len(x)):
            pyro.sample("x", dist.Normal(mu, 1.0).mask(seen).to_event(1), obs=x)

    result = ExactPosteriorEM(model, guide="map").fit(nan, seen)
    expected = (x * seen).sum(0) / (seen.sum(0) + 0.25 * believed)
    torch.testing.assert_close(result.params["AutoDelta.mu"], expected)


def test_missing_cells_below_a_guide() -> None:
    x, nan, seen = _cells(6, 3)

    def model(x: Tensor, seen: Tensor) -> None:
        W = pyro.param("W", torch.tensor([1.0, 0.5, -1.0]).double())
        with pyro.plate("n", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros((), dtype=torch.float64), 1.0))
            fn = dist.Normal(h.unsqueeze(-1) * W, 1.0)
            pyro.sample("x", fn.mask(seen).to_event(1), obs=x)

    def guide(x: Tensor, seen: Tensor) -> None:  # the posterior
        W = torch.tensor([1.0, 0.5, -1.0]) * seen
        precision = 1 + W.square().sum(-1)
        with pyro.plate("n", len(x)):
            mean = (W * torch.where(seen, x, 0.0)).sum(-1) / precision
            pyro.sample("h", dist.Normal(mean, precision.rsqrt()))

    W = torch.tensor([1.0, 0.5, -1.0])
    evidence = 0.0
    for row, there in zip(x, seen, strict=True):
        if bool(there.any()):
            cov = torch.outer(W[there], W[there]) + torch.eye(int(there.sum())).double()
            zero = torch.zeros(int(there.sum())).double()
            evidence += float(dist.MultivariateNormal(zero, cov).log_prob(row[there]))
    optim = pyro.optim.Adam({"lr": 0.01})
    em = ExactPosteriorEM(model, guide, optim, strategy="guide")
    # The bound of the exact posterior does not vary from draw to draw, NaN or not.
    assert em.elbo(nan, seen).log_evidence == pytest.approx(evidence, abs=1e-6)
    assert float(em.elbo(nan, seen, num_particles=400).value) == pytest.approx(evidence, abs=0.15)
    em.step(nan, seen)
    assert bool(torch.isfinite(pyro.param("W")).all())


def test_masked_values_that_are_possible_are_still_read() -> None:
    """A value that is masked where it is observed may be read further on."""
    x = torch.tensor([0.5, 2.0, -1.0]).double()
    seen = torch.tensor([True, False, True])

    def model(x: Tensor) -> None:
        b = pyro.param("b", torch.tensor(0.3).double())
        h = pyro.sample("h", dist.Normal(torch.tensor(0.0).double(), 1.0))
        with pyro.plate("n", 3):
            with poutine.mask(mask=seen):
                y = pyro.sample("y", dist.Normal(h, 1.0), obs=x)
            pyro.sample("t", dist.Normal(b * y, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("h", dist.Normal(torch.tensor(0.0).double(), 1e-6))

    em = ExactPosteriorEM(model, guide, pyro.optim.Adam({"lr": 0.01}), strategy="guide")
    expected = (
        dist.Normal(0.0, 1.0).log_prob(x[seen]).sum() + dist.Normal(0.3 * x, 1.0).log_prob(x).sum()
    )
    terms = em.elbo(x)
    assert float(terms.reconstruction) == pytest.approx(float(expected), abs=1e-4)


OUT_OF_THE_WAY = {
    "one-hot": lambda: dist.OneHotCategorical(torch.ones(3) / 3),
    "one-hot, straight through": lambda: dist.OneHotCategoricalStraightThrough(torch.ones(3) / 3),
    "counts": lambda: dist.Multinomial(5, torch.ones(3) / 3),
    "correlations": lambda: dist.LKJCholesky(3),
    "sphere": lambda: dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.0])),
    "intervals": lambda: dist.Uniform(
        torch.tensor([2.0, 7.0, 9.0]), torch.tensor([3.0, 8.0, 10.0])
    ),
    "point": lambda: dist.Delta(torch.tensor(4.0)),
    "half line": lambda: dist.Pareto(torch.tensor(3.0), torch.tensor(2.0)),
    "matrices": lambda: dist.Wishart(torch.tensor(4.0), torch.eye(3)),
    "simplex": lambda: dist.Dirichlet(torch.ones(3)),
    "counts of several sizes": lambda: dist.Binomial(torch.tensor([3.0, 9.0, 1.0]), probs=0.3),
    "mixture": lambda: dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2) / 2), dist.Uniform(torch.tensor([2.0, 3.0]), 6.0)
    ),
}


@pytest.mark.filterwarnings("ignore:Singular sample")
@pytest.mark.parametrize("how", ["no row", "one row", "a bool"])
@pytest.mark.parametrize("kind", OUT_OF_THE_WAY)
def test_any_support_may_be_masked(kind: str, how: str) -> None:
    fn = OUT_OF_THE_WAY[kind]()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = fn.expand([3]).sample()
    seen = torch.tensor([False, how == "one row", False])
    nan = torch.where(seen.reshape(3, *(1,) * fn.event_dim), x, math.nan)

    def model(x: Tensor) -> None:
        q = pyro.param("q", torch.tensor([0.3, 0.7]), constraint=constraints.simplex)
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(q))
            with poutine.mask(mask=False if how == "a bool" else seen):
                pyro.sample("x", fn, obs=x)
            pyro.sample("y", dist.Normal(z.float(), 1.0), obs=torch.tensor([0.1, 1.0, 0.4]))

    y = torch.tensor([0.1, 1.0, 0.4]).double()
    joint = torch.tensor([0.3, 0.7]).double().log() + dist.Normal(
        torch.arange(2.0).double(), 1.0
    ).log_prob(y[:, None])
    expected = float(joint.logsumexp(-1).sum())
    if how == "one row":
        expected += float(fn.expand([3]).log_prob(x)[1])
    assert ExactPosteriorEM(model).elbo(nan).log_evidence == pytest.approx(expected, abs=1e-5)


def test_one_hot_symbols_at_the_masked_end_of_a_chain() -> None:
    hot = torch.nn.functional.one_hot(torch.tensor([[0, 1, 0], [1, 0, 0]]), 2).double()
    seen = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.where(seen.unsqueeze(-1), hot, math.nan)
    A = torch.tensor([[0.8, 0.2], [0.3, 0.7]]).double()
    B = torch.tensor([[0.9, 0.1], [0.4, 0.6]]).double()
    start = torch.tensor([0.5, 0.5]).double()

    def model(x: Tensor) -> None:
        p = pyro.param("B", B.clone(), constraint=constraints.simplex)
        with pyro.plate("sequences", 2):
            z: Any = None
            for t in pyro.markov(range(3)):
                with poutine.mask(mask=seen[:, t]):
                    z = pyro.sample(f"z_{t}", dist.Categorical(start if z is None else A[z]))
                    pyro.sample(f"x_{t}", dist.OneHotCategorical(p[z]), obs=x[:, t])

    expected = 0.0
    for symbols, there in zip(hot.argmax(-1), seen, strict=True):
        a = start * B[:, symbols[0]]
        for t in range(1, int(there.sum())):
            a = (a @ A) * B[:, symbols[t]]
        expected += math.log(float(a.sum()))
    em = ExactPosteriorEM(model)
    assert em.elbo(x).log_evidence == pytest.approx(expected)
    result = em.fit(x, max_steps=3, tol=0)
    assert result.history[0] == pytest.approx(expected)
    assert result.log_evidence is not None
    assert result.log_evidence > expected


def test_a_latent_vector_with_a_mask_is_refused_by_name() -> None:
    def model() -> None:
        with pyro.plate("n", 2):
            seen = torch.tensor([[True, False], [True, True]])
            z = pyro.sample("z", dist.Bernoulli(torch.full((2,), 0.5)).mask(seen).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=torch.zeros(2, 2))

    with pytest.raises(ModelError, match=r"'z'[\s\S]*vector of Bernoulli values"):
        ExactPosteriorEM(model).posterior()


def test_unmasked_nan_is_still_named() -> None:
    x, _, seen = _cells(4, 3)
    x[3, int(seen[3].nonzero()[0])] = math.nan
    with pytest.raises(DataError, match="1 of 12 observed values are NaN"):
        ExactPosteriorEM(_diagonal_mixture).posterior(x, seen)


@pytest.mark.parametrize("name", ["Normal, infinite", "Bernoulli", "Poisson", "Categorical"])
def test_compiled_chains_with_a_mask_per_element(name: str) -> None:
    """Four steps of five sequences, some of which end early, against the forward algorithm."""
    kind, steps, n, d = KINDS[name], 4, 5, 2
    generator = torch.Generator().manual_seed(1)
    (param, (constraint, event, at)), *_ = kind.params.items()
    start = at(torch.randn(K, d, *event, generator=generator))
    seen = torch.rand(steps, n, d, generator=generator) > 0.3
    length = torch.tensor([4, 3, 2, 4, 1])
    A0, first = torch.tensor([[0.8, 0.2], [0.3, 0.7]]), torch.tensor([0.4, 0.6])
    x = kind.build(start[torch.randint(K, (steps, n), generator=generator)]).sample()
    data = x.clone()
    data[~seen] = kind.garbage

    def model(x: Tensor) -> None:
        own = pyro.param(param, start.clone(), constraint=constraint)
        A = pyro.param("A", A0.clone(), constraint=constraints.simplex)
        with pyro.plate("sequences", n):
            z: Any = None
            for t in pyro.markov(range(steps)):
                with poutine.mask(mask=t < length):
                    z = pyro.sample(f"z_{t}", dist.Categorical(first if z is None else A[z]))
                    fn = kind.build(own[z]).mask(seen[t]).to_event(1)
                    pyro.sample(f"x_{t}", fn, obs=x[t])

    def evidence(own: Tensor, A: Tensor) -> float:
        each = kind.build(own).log_prob(x.reshape(steps, n, 1, d, *x.shape[3:]))
        table = torch.where(seen[:, :, None], each, 0.0).sum(-1)
        table = table * (torch.arange(steps)[:, None] < length)[..., None]
        a = first.log() + table[0]
        for t in range(1, steps):
            a = (a.unsqueeze(-1) + A.log()).logsumexp(-2) + table[t]
        return float(a.logsumexp(-1).sum())

    em = ExactPosteriorEM(model)
    result = em.fit(data, max_steps=3, tol=0)
    assert em.plan(data).compiled
    assert result.history[0] == pytest.approx(evidence(start, A0), rel=1e-12)
    fitted = evidence(result.params[param], result.params["A"])
    assert result.log_evidence == pytest.approx(fitted, rel=1e-10)
    pyro.clear_param_store()
    full = ExactPosteriorEM(model)
    for _ in range(3):
        full.step(data)
    for name_, value in result.params.items():
        torch.testing.assert_close(pyro.param(name_).detach(), value)


def test_repeated_rows_with_a_mask_per_element_and_weights() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(2, (60, 3), generator=generator).double()
    seen = torch.rand(60, 3, generator=generator) > 0.3
    weights = torch.randint(1, 4, (60,), generator=generator).double()
    p = torch.tensor([[0.2, 0.5, 0.7], [0.6, 0.3, 0.4]])
    w = torch.tensor([0.5, 0.5])

    def model(x: Tensor) -> None:
        own = pyro.param("p", p.clone(), constraint=constraints.unit_interval)
        pi = pyro.param("w", w.clone(), constraint=constraints.simplex)
        with pyro.plate("n", 60), poutine.scale(scale=weights):
            z = pyro.sample("z", dist.Categorical(pi))
            pyro.sample("x", dist.Bernoulli(own[z]).mask(seen).to_event(1), obs=x)

    result = ExactPosteriorEM(model).fit(torch.where(seen, x, math.nan), max_steps=5, tol=0)
    now, pi = p, w
    for entering in result.history:
        each = torch.where(seen[:, None], dist.Bernoulli(now).log_prob(x[:, None]), 0.0).sum(-1)
        joint = each + pi.log()
        assert entering == pytest.approx(float((weights * joint.logsumexp(-1)).sum()), rel=1e-10)
        r = joint.softmax(-1) * weights[:, None]
        cells = r[:, :, None] * seen[:, None]
        now, pi = (cells * x[:, None]).sum(0) / cells.sum(0), r.sum(0) / r.sum()
    torch.testing.assert_close(result.params["p"], now)
    torch.testing.assert_close(result.params["w"], pi)
    assert result.num_rows == float(weights[seen.any(-1)].sum())


def test_a_mask_below_to_event_that_changes_between_steps_is_seen() -> None:
    x, nan, seen = _cells(12, 3)
    em, mask = ExactPosteriorEM(_diagonal_mixture), seen.clone()
    for step in em.steps(nan, mask):
        if step.index == 1:
            entering = step.elbo
            break
        mask[3] = False
        params = {n: v.clone() for n, v in step.params.items()}
    each = dist.Normal(params["mu"], 1.0).log_prob(x[:, None])
    each = torch.where(mask[:, None], each, 0.0).sum(-1)
    expected = float((each + params["w"].log()).logsumexp(-1).sum())
    assert entering == pytest.approx(expected, rel=1e-6)


def test_a_mask_of_rows_below_to_event_is_told_where_to_go() -> None:
    x, _, _ = _cells(6, 3)
    with pytest.raises(ModelError, match=r"mask does not fit[\s\S]*\.to_event\(1\)\.mask\(rows\)"):
        ExactPosteriorEM(_diagonal_mixture).posterior(x, torch.ones(6, dtype=torch.bool))


def test_factors_are_masked_like_observations() -> None:
    """Censored rows: log Σ_k w_k S((c − μ_k) / s), with S a normal's upper tail."""
    y, censored = torch.tensor([0.2, 1.5, 0.9]).double(), torch.tensor([False, True, False])

    def model() -> None:
        w = pyro.param("w", torch.tensor([0.4, 0.6]).double(), constraint=constraints.simplex)
        mu = pyro.param("mu", torch.tensor([-1.0, 1.0]).double())
        with pyro.plate("n", 3):
            z = pyro.sample("z", dist.Categorical(w))
            with poutine.mask(mask=~censored):
                pyro.sample("y", dist.Normal(mu[z], 1.0), obs=y)
            with poutine.mask(mask=censored):
                pyro.factor("tail", torch.special.log_ndtr(mu[z] - y))

    w, mu = torch.tensor([0.4, 0.6]).double(), torch.tensor([-1.0, 1.0]).double()
    seen = dist.Normal(mu, 1.0).log_prob(y[:, None])
    each = torch.where(censored[:, None], torch.special.log_ndtr(mu - y[:, None]), seen)
    em = ExactPosteriorEM(model)
    expected = float((each + w.log()).logsumexp(-1).sum())
    assert em.posterior().log_evidence == pytest.approx(expected, rel=1e-12)
    assert em.fit(max_steps=2, tol=0).history.after_m_step[0] > expected
