"""Steps of equal form are laid out together: a step that is another one is seen as before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints as C

from pyro_em import DataError, ExactPosteriorEM, ModelError, PyroEMWarning
from pyro_em.graph import layout, trace
from pyro_em.graph.bindings.binding import Binding
from pyro_em.graph.factors import FactorGraph
from pyro_em.graph.findings import agreement
from pyro_em.graph.findings.examination import examine
from pyro_em.graph.trace import trace_graph

T, ODD = 7, 4
X = torch.tensor([0.4, 1.1, 0.2, 2.0, 0.7, 1.5, 0.9], dtype=torch.float64)
Step = Callable[[int, Tensor, Any], None]


def normal(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[z], 1.0), obs=X[t])


def another_family(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.StudentT(5.0, p.mu[z], 1.0), obs=X[t])


def another_parameter(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.nu[z], 1.0), obs=X[t])


def a_mask(t: int, z: Tensor, p: Any) -> None:
    with poutine.mask(mask=torch.tensor(False)):
        normal(t, z, p)


def a_scale(t: int, z: Tensor, p: Any) -> None:
    with poutine.scale(scale=1.0):
        pyro.sample(f"x_{t}", dist.Normal(p.mu[z], 1.0).mask(torch.tensor(True)), obs=X[t])


def another_expression(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[1 - z], 1.0), obs=X[t])


def another_constant(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[z], 2.0), obs=X[t])


def a_constant_argument(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu.detach()[z], 1.0), obs=X[t])


def a_map(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.nu[z].exp(), 1.0), obs=X[t])


def an_opaque_step(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[z].sin() + 1.0, 1.0), obs=X[t])


def regression(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[z] + p.nu[z] * X[t - 1], 1.0), obs=X[t])


def an_event(t: int, z: Tensor, p: Any) -> None:
    two = torch.stack([p.mu[z], p.mu[z]], -1)
    pyro.sample(f"x_{t}", dist.Normal(two, 1.0).to_event(1), obs=X[t - 1 : t + 1])


def a_plate(t: int, z: Tensor, p: Any) -> None:
    with pyro.plate(f"rows_{t}", 3, dim=-1):
        pyro.sample(f"x_{t}", dist.Normal(p.mu[z], 1.0), obs=X[t - 2 : t + 1])


def two_steps_back(t: int, z: Tensor, p: Any) -> None:
    pyro.sample(f"x_{t}", dist.Normal(p.mu[(z + p.last) % 2], 1.0), obs=X[t])


STEPS = [
    normal,
    another_family,
    another_parameter,
    a_mask,
    a_scale,
    another_expression,
    another_constant,
    a_constant_argument,
    a_map,
    an_opaque_step,
    regression,
    an_event,
    a_plate,
    two_steps_back,
]


class Parameters:
    def __init__(self, equal: bool) -> None:
        # Where all elements are equal, values do not tell one expression from another.
        start = torch.ones(2) if equal else torch.tensor([0.0, 1.5])
        self.A = pyro.param("A", torch.tensor([[0.7, 0.3], [0.4, 0.6]]), constraint=C.simplex)
        self.mu = pyro.param("mu", start.double())
        self.nu = pyro.param("nu", start.double() if equal else torch.tensor([0.3, -0.2]).double())
        self.last: Any = None


def chain(odd: Step, equal: bool = False, first: int | None = None) -> Callable[[], None]:
    def model() -> None:
        p = Parameters(equal)
        z: Any = 0
        for t in pyro.markov(range(T)):
            p.last = z
            z = pyro.sample(f"z_{t}", dist.Categorical(p.A.double()[z]))
            (odd if t == ODD else normal)(t, z, p)

    return model


def graph_of(model: Callable[[], None], together: bool) -> FactorGraph:
    structure, problems = examine(model, (), {})
    assert not problems
    with pytest.MonkeyPatch.context() as patch:
        if not together:
            for module in (trace, layout, agreement):
                patch.setattr(module, "FEW", 10**9)
        return trace_graph(model, (), {}, structure, looked=structure.looked)


def log_evidence(model: Callable[[], None]) -> Tensor:
    """By the sum over all sequences of states, which an outer plate tells apart."""
    states = torch.cartesian_prod(*[torch.arange(2)] * T)

    def with_all() -> None:
        with pyro.plate("sequences of states", len(states), dim=-2):
            model()

    data = {f"z_{t}": states[:, t, None] for t in range(T)}
    trace = poutine.trace(poutine.condition(with_all, data)).get_trace()
    trace.compute_log_prob()
    sites = [site for name, site in trace.nodes.items() if name[:2] in ("z_", "x_")]
    assert len(sites) == 2 * T
    log_p = [site["log_prob"].expand(len(states), -1).sum(-1) for site in sites]
    return torch.stack(log_p).sum(0).logsumexp(0).detach()


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("odd", STEPS, ids=lambda s: s.__name__)
def test_layouts_together_are_those_of_each_step(odd: Step, equal: bool) -> None:
    model = chain(odd, equal)
    one, other = graph_of(model, True), graph_of(model, False)
    assert [g.members for g in one.groups] == [g.members for g in other.groups]
    assert len(one.groups) < T
    values = {n: p.value() + torch.rand(p.leaf.shape) for n, p in one.parameters.items()}
    for a, b in zip(one.groups, other.groups, strict=True):
        assert (a.dims, a.sizes, a.scale, a.edges) == (b.dims, b.sizes, b.scale, b.edges)
        assert (a.n_plates, a.event_dims, a.observed) == (b.n_plates, b.event_dims, b.observed)
        assert a.family is b.family and a.is_static == b.is_static
        assert torch.equal(a.value, b.value) and a.value.dtype == b.value.dtype
        assert a.arguments.keys() == b.arguments.keys()
        for name, argument in a.arguments.items():
            assert torch.equal(argument, b.arguments[name])
            bound, expected = a.bindings[name], b.bindings[name]
            assert (bound.how, bound.params, bound.normalise, bound.reason) == (
                expected.how,
                expected.params,
                expected.normalise,
                expected.reason,
            )
            assert torch.equal(bound.constant, expected.constant)
            if bound.is_static:
                assert torch.equal(bound.evaluate(values), expected.evaluate(values))
    for name, latent in one.latents.items():
        assert latent.name == name and latent.plates == other.latents[name].plates
        assert torch.equal(latent.support, other.latents[name].support)


@pytest.mark.parametrize("odd", STEPS, ids=lambda s: s.__name__)
def test_the_evidence_is_that_of_the_model(odd: Step) -> None:
    model = chain(odd)
    expected = log_evidence(model)
    found = ExactPosteriorEM(model).posterior().log_evidence
    assert found == pytest.approx(float(expected), abs=1e-9)


@pytest.mark.parametrize("odd", [another_expression, another_parameter, a_mask, regression])
def test_a_fit_is_that_of_the_model(odd: Step) -> None:
    model = chain(odd, True)
    result = ExactPosteriorEM(model).fit(max_steps=3, tol=0, progress=False)
    assert result.log_evidence == pytest.approx(float(log_evidence(model)), abs=1e-8)


def test_numbers_at_one_step_are_looked_at() -> None:
    for bad, text in ((-1.0, "outside the support"), (torch.nan, "are NaN|is NaN|NaN")):
        y = X.clone()
        y[ODD] = bad

        def model(y: Tensor) -> None:
            rate = pyro.param("rate", torch.tensor([0.5, 2.0]).double(), constraint=C.positive)
            z: Any = 0
            for t in pyro.markov(range(T)):
                z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2).double()[z] / 2))
                pyro.sample(f"x_{t}", dist.Exponential(rate[z]), obs=y[t])

        with pytest.raises(DataError, match=text) as error:
            ExactPosteriorEM(model).posterior(y)
        assert f"x_{ODD}" in str(error.value) and f"x_{ODD - 1}" not in str(error.value)


def test_an_argument_outside_its_constraint_at_one_step_is_refused() -> None:
    scale = torch.ones(T)
    scale[ODD] = -1.0

    def model() -> None:
        mu = pyro.param("mu", torch.zeros(2))
        z: Any = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2)[z] / 2))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], scale[t]), obs=X[t].float())

    with pytest.raises(ModelError, match="scale"):
        ExactPosteriorEM(model).plan()


def test_another_support_at_one_step() -> None:
    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.0, 2.0]).double())
        z: Any = 0
        for t in pyro.markov(range(T)):
            k = 3 if t == ODD else 2
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(3, k).double()[z] / k))
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0), obs=X[t])

    expected = torch.zeros((), dtype=torch.float64)
    for t in range(T):
        k = 3 if t == ODD else 2
        densities = dist.Normal(torch.arange(k).double(), 1.0).log_prob(X[t])
        expected = expected + densities.logsumexp(0) - torch.tensor(float(k)).double().log()
    posterior = ExactPosteriorEM(model).posterior()
    assert posterior.log_evidence == pytest.approx(float(expected), abs=1e-9)
    assert posterior.probs(f"z_{ODD}").shape == (3,)


def test_one_step_that_is_another_model_when_enumerated_is_refused() -> None:
    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.5]).double())
        z: Any = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2).double()[z] / 2))
            loc = mu[z] if t != ODD else mu[z] * (z.sort().values * 0 + z.numel())
            pyro.sample(f"x_{t}", dist.Normal(loc, 1.0), obs=X[t])

    with pytest.raises(ModelError, match=f"x_{ODD}"):
        ExactPosteriorEM(model).posterior()


def test_a_branch_at_one_step_is_not_compiled() -> None:
    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.5]).double())
        z: Any = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2).double()[z] / 2))
            shift = float(mu[0].detach()) if t == ODD else 0.0
            pyro.sample(f"x_{t}", dist.Normal(mu[z], 1.0 + shift**2), obs=X[t])

    assert not ExactPosteriorEM(model).plan().compiled


def test_one_step_that_changes_after_the_first_m_step_is_noticed() -> None:
    y = X + 4.0

    def model() -> None:
        mu = pyro.param("mu", torch.tensor([0.0, 1.5]).double())
        z: Any = 0
        for t in pyro.markov(range(T)):
            z = pyro.sample(f"z_{t}", dist.Categorical(torch.ones(2, 2).double()[z] / 2))
            has_moved = t == ODD and float(mu[1].detach()) > 3.0
            pyro.sample(f"x_{t}", dist.Normal(mu[z] + (1.0 if has_moved else 0.0), 1.0), obs=y[t])

    with pytest.warns(PyroEMWarning, match=f"x_{ODD}"):
        result = ExactPosteriorEM(model).fit(max_steps=3, tol=0, progress=False)
    assert result.log_evidence == pytest.approx(float(log_evidence(model)), abs=1e-8)


def test_what_is_equal_at_all_steps_is_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (trace, layout):
        monkeypatch.setattr(module, "FEW", 2)
    graph = graph_of(chain(normal), True)
    values = {n: (p.value() + 0.1).requires_grad_() for n, p in graph.parameters.items()}
    for group in graph.groups:
        n = len(group.members)
        if n == 1:
            continue
        for name, binding in group.bindings.items():
            assert group.arguments[name].stride(0) == 0
            assert binding.constant.stride(0) == 0
            found = binding.evaluate(values)
            assert found.shape == group.arguments[name].shape
            if not binding.params:
                continue
            each = torch.stack([_member(binding, i).evaluate(values) for i in range(n)])
            weights = torch.rand(found.shape)
            assert torch.equal(found, each)
            one = torch.autograd.grad((found * weights).sum(), values[binding.params[0]])
            other = torch.autograd.grad((each * weights).sum(), values[binding.params[0]])
            assert torch.allclose(one[0], other[0])


def _member(binding: Binding, i: int) -> Binding:
    """The binding of one member."""
    parts = tuple(replace(s, index=s.index[i].clone()) for s in binding.selections)
    return replace(binding, constant=binding.constant[i].clone(), selections=parts)
