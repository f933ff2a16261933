"""The quick handlers say what Pyro's own say, and what is looked at costs no more than it must."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.markov_messenger import MarkovMessenger
from torch import Tensor

from pyro_em import ExactPosteriorEM
from pyro_em.tracing.allocation import Overspent
from pyro_em.tracing.calls import CallLog
from pyro_em.tracing.capture import ParameterCapture
from pyro_em.tracing.dependences import Reading
from pyro_em.tracing.lean import EnumTrace, LeanTrace, WatchingTrace
from pyro_em.tracing.operations import OperationLog
from pyro_em.tracing.sparing import SpendLittle

K = torch.tensor([[0.7, 0.3], [0.2, 0.8]])
PARALLEL = {"enumerate": "parallel"}


def latent(name: str, before: Any) -> Tensor:
    return pyro.sample(name, dist.Categorical(K[before]), infer=PARALLEL)


def plain_chain() -> None:
    z: Any = 0
    for t in pyro.markov(range(5)):
        z = latent(f"z_{t}", z)
        pyro.sample(f"x_{t}", dist.Normal(z.double(), 1.0), obs=torch.tensor(0.5))


def of_second_order() -> None:
    y: Any = 0
    z: Any = 0
    for t in pyro.markov(range(6), history=2):
        y, z = z, latent(f"z_{t}", torch.minimum(torch.as_tensor(y), torch.as_tensor(z)))


def nested() -> None:
    w: Any = 0
    with pyro.plate("rows", 3, dim=-1):
        for i in pyro.markov(range(3)):
            w = latent(f"w_{i}", w)
            z: Any = w
            for t in pyro.markov(range(3)):
                z = latent(f"z_{i}_{t}", z)


def branching() -> None:
    top = latent("top", 0)
    context = pyro.markov(history=1, keep=True)
    with context:
        a = latent("a", top)
        for i in range(3):
            with context:
                latent(f"b_{i}", a)


def two_side_by_side() -> None:
    g = latent("g", 0)
    for name in ("u", "v"):
        z: Any = g
        for t in pyro.markov(range(3)):
            z = latent(f"{name}_{t}", z)
            with pyro.plate(f"{name}_plate_{t}", 2, dim=-1):
                pyro.sample(f"x_{name}_{t}", dist.Categorical(K[z]), obs=torch.zeros(2))


def of_other_kinds() -> None:
    """Values that are not those of a Categorical along a dimension of its own, and one that is seen."""
    a = pyro.sample("a", dist.Categorical(K), infer={**PARALLEL, "expand": True})
    b = pyro.sample("b", dist.Bernoulli(0.5 + 0.1 * a), infer=PARALLEL)
    c = pyro.sample("c", dist.Categorical(K[b.long()]), infer=PARALLEL)
    with pyro.plate("rows", 2, dim=-1):
        pyro.sample("d", dist.Categorical(torch.ones(4)[c.unsqueeze(-1) + torch.arange(3)]))
        e = pyro.sample("e", dist.OneHotCategorical(K[c]), infer=PARALLEL)
        pyro.sample("f", dist.Categorical(K[e[..., 0].long()]), obs=torch.tensor([0, 1]))
        pyro.sample("g", dist.Categorical(K[c]).mask(c > 0), infer=PARALLEL)


MODELS = [plain_chain, of_second_order, nested, branching, two_side_by_side, of_other_kinds]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.__name__)
def test_dimensions_and_scopes_are_those_of_pyro(model: Callable[[], None]) -> None:
    torch.manual_seed(0)
    with poutine.trace() as own, poutine.enum(first_available_dim=-2):
        model()
    torch.manual_seed(0)
    with EnumTrace(first_available_dim=-2) as lean:
        model()
    assert list(own.trace.nodes) == list(lean.trace.nodes)
    for name, site in own.trace.nodes.items():
        other = lean.trace.nodes[name]
        assert {k: v for k, v in site.items() if k not in ("infer", "fn", "value")} == {
            k: v for k, v in other.items() if k not in ("infer", "fn", "value")
        }
        assert torch.equal(site["value"], other["value"])
        assert _is_whole_support(site) == _is_whole_support(other), name
        one, two = dict(site["infer"]), dict(other["infer"])
        assert dict(one.pop("_markov_scope", {})) == dict(two.pop("_markov_scope", {})), name
        assert one == two, name


def test_a_context_of_many_runs_counts_scopes_where_they_are_asked_for() -> None:
    context = pyro.markov()

    def model() -> None:
        z: Any = 0
        with ExitStack() as steps:
            for t in range(3):
                steps.enter_context(context)
                z = latent(f"z_{t}", z)

    def scopes(trace: Any) -> list[dict[str, int]]:
        with trace as found:
            model()
        sites = (found.trace.nodes[f"z_{t}"] for t in range(3))
        return [dict(site["infer"].get("_markov_scope", {})) for site in sites]

    own = scopes(poutine.trace())
    assert own[1:] == [{"z_0": 1}, {"z_1": 1}]
    assert not any(scopes(LeanTrace())[1:])
    assert type(context) is MarkovMessenger
    with poutine.enum(first_available_dim=-1):
        assert scopes(LeanTrace()) == own
    assert scopes(EnumTrace(first_available_dim=-1)) == own
    assert scopes(poutine.trace()) == own


def test_a_loop_with_an_intervention_is_that_of_the_mutilated_model() -> None:
    x = torch.tensor([0, 1, 1, 0, 1])

    def model() -> None:
        E = pyro.param("E", torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
        z: Any = 0
        for t in pyro.markov(range(5)):
            z = latent(f"z_{t}", z)
            pyro.sample(f"x_{t}", dist.Categorical(E[z]), obs=x[t])

    pyro.clear_param_store()
    em = ExactPosteriorEM(poutine.do(model, data={"z_2": torch.tensor(1)}))
    em.plan()
    found, E, total = em.score(), pyro.param("E").detach(), torch.zeros(())
    for z in itertools.product((0, 1), repeat=5):
        path = zip((0, *z), z, range(5), strict=False)
        steps = [E[b, x[t]] * (K[a, b] if t != 2 else 1.0) for a, b, t in path]
        total += torch.stack(steps).prod() * (z[2] == 1)
    assert float(found) == pytest.approx(float(total.log()), rel=1e-5)


def _is_whole_support(site: Any) -> bool:
    """Whether a Categorical knows its values at once."""
    return getattr(site["value"], "_pyro_categorical_support", None) == id(site["fn"])


def test_a_value_that_the_model_writes_is_its_own() -> None:
    with EnumTrace(first_available_dim=-1) as lean:
        for i in range(3):
            z = latent(f"z_{i}", 0)
            if i == 1:
                z += 5
    values = [lean.trace.nodes[f"z_{i}"]["value"].reshape(-1).tolist() for i in range(3)]
    assert values == [[0, 1], [5, 6], [0, 1]]


@pytest.mark.parametrize("kind", [OperationLog, CallLog])
def test_values_of_steps_are_noted_alike_and_told_apart_by_their_form(kind: Any) -> None:
    def notes(*sizes: int) -> Any:
        log = kind([], Reading(lambda: None, (), {}))
        tracer = EnumTrace(-1, capture=ParameterCapture(log=log))
        tracer.aside, tracer.made = tracer.capture.aside, log.make  # type: ignore[union-attr]
        with log.noting(10**6), tracer:
            for i, size in enumerate(sizes):
                probs = torch.ones(size)
                z = pyro.sample(f"z_{i}", dist.Categorical(probs), infer=PARALLEL)
                (z + 1)
        assert log.reading is not None
        assert not log.reading.finished(()).memory  # values are none of what the model reads
        assert kind is OperationLog or log.is_complete
        return log.finished()

    assert notes(3, 3) == notes(3, 3) != notes(3, 2)
    assert not any("arange" in str(note[0]) or "clone" in str(note[0]) for note in notes(3, 3))


def test_nothing_of_pyro_is_changed_outside_a_run() -> None:
    before = MarkovMessenger._pyro_sample, MarkovMessenger._process_message
    with LeanTrace():
        plain_chain()
    assert before == (MarkovMessenger._pyro_sample, MarkovMessenger._process_message)
    assert type(pyro.markov()) is MarkovMessenger


def test_a_name_twice_is_refused() -> None:
    with pytest.raises(RuntimeError, match="Multiple sample sites named 'a'"), LeanTrace():
        latent("a", 0)
        latent("a", 0)


def test_only_what_is_done_with_large_latents_is_counted() -> None:
    def model(rows: int) -> None:
        torch.zeros(10_000).add(1.0)  # costs the same with and without numbers of latents
        with pyro.plate("n", rows):
            z = pyro.sample("z", dist.Categorical(K[0]))
        torch.zeros(2, 1000)[z]

    for rows in (255, 10_000):
        modes = torch._C._len_torch_dispatch_stack()
        try:
            with WatchingTrace() as tracer, SpendLittle(2**17) as tracer.at_large:
                model(rows)
            spent = False
        except Overspent:
            spent = True
        assert spent == (rows > 255)
        assert torch._C._len_torch_dispatch_stack() == modes


def test_many_views_of_one_tensor_are_one_memory() -> None:
    x = torch.arange(4000.0, dtype=torch.float64)
    rows = list(x.reshape(1000, 4)[:, :3].unbind(0))
    reading = Reading(lambda: None, (), {})
    log = OperationLog([], reading)
    for row in rows:
        log(torch.ops.aten.sum.default, (row,), {})
    found = reading.finished(())
    assert len(found.memory) < 50
    assert not found.is_written()
    x.numpy()[4 * 990] = -1.0
    assert found.is_written()


def test_a_distribution_may_have_an_attribute_called_size() -> None:
    class Sized(dist.Normal):
        size = torch.zeros(2)

    with WatchingTrace() as tracer:
        pyro.sample("x", Sized(0.0, 1.0), obs=torch.tensor(0.5))
    assert list(tracer.trace.nodes) == ["x"] and not tracer.empty


def test_weights_of_many_rows_are_held_once_for_all_sites_that_share_them() -> None:
    """Handlers multiply a scale anew at each site; what differs stays what it is."""
    weights = torch.rand(2**16, generator=torch.Generator().manual_seed(0)) + 0.5

    def model() -> None:
        with pyro.plate("n", len(weights)):
            with poutine.scale(scale=weights):
                pyro.sample("a", dist.Normal(0.0, 1.0))
                pyro.sample("b", dist.Normal(0.0, 1.0), obs=weights)
            with poutine.scale(scale=2 * weights):
                pyro.sample("c", dist.Normal(0.0, 1.0), obs=weights)

    trace = LeanTrace()
    trace.follow(model, (), {})
    a, b, c = (trace.trace.nodes[name]["scale"] for name in "abc")
    own = poutine.trace(model).get_trace().nodes
    assert a is b and c is not b
    assert all(torch.equal(own[name]["scale"], s) for name, s in zip("abc", (a, b, c), strict=True))
