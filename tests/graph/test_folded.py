"""Sites of a run that is over: in little memory, and the same sites all the same."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_em import ExactPosteriorEM
from pyro_em.graph.findings.folded import Folded, without_graphs
from pyro_em.graph.forms import forms_of
from pyro_em.tracing.runs import plain_run, provenance_run
from pyro_em.tracing.sites import factors_in, tensors_of

STEPS = 70


def chain(x: Tensor) -> None:
    A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
    mean = pyro.param("mean", torch.tensor([[-1.0, 0.0], [1.0, 2.0]]))
    z: Any = 0
    for t in pyro.markov(range(len(x))):
        z = pyro.sample(f"z_{t}", dist.Categorical(A[z]))
        pyro.sample(f"x_{t}", dist.Normal(mean[z], 1.0).to_event(1), obs=x[t])
    pyro.sample("last", dist.Bernoulli(0.5), obs=torch.tensor(1.0))


def sites() -> dict[str, dict[str, Any]]:
    x = torch.randn(STEPS, 2)
    plain = plain_run(chain, (x,), {}, keep_random_state=True)
    return factors_in(plain.sites)


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    held = [
        (s["value"], s["fn"].base_dist.loc if s["name"][0] == "x" else s["fn"].probs)
        for s in (a, b)
    ]
    return a["name"] == b["name"] and all(map(torch.equal, *held))


def test_folded_sites_are_the_sites() -> None:
    own = sites()
    folded = Folded(own)
    assert list(folded) == list(own)
    assert folded.forms == forms_of(own)
    assert all(same(folded[n], own[n]) for n in own)
    assert all(torch.equal(folded.value(n), own[n]["value"]) for n in own)
    assert all(type(folded[n]["fn"]) is type(own[n]["fn"]) for n in own)
    assert torch.equal(
        folded["x_3"]["fn"].log_prob(own["x_3"]["value"]),
        own["x_3"]["fn"].log_prob(own["x_3"]["value"]),
    )


def test_folded_sites_carry_no_tags() -> None:
    x = torch.randn(STEPS, 2)
    plain = plain_run(chain, (x,), {}, keep_random_state=True)
    tagged = provenance_run(chain, (x,), {}, plain)
    folded = Folded(factors_in(tagged.sites))
    for name in ("z_9", "x_9"):
        held = [folded[name]["value"], *tensors_of(folded[name]["fn"])]
        assert {type(t) for t in held} == {Tensor}
        assert torch.equal(folded[name]["value"], plain.sites[name]["value"])


def test_folded_sites_hold_on_to_none_of_their_run() -> None:
    own = sites()
    held = [weakref.ref(s["fn"]) for n, s in own.items() if n != "last"]
    folded = Folded(own)
    del own
    assert not any(ref() for ref in held)
    assert len(folded) == 2 * STEPS + 1


def test_what_stays_of_sites_without_graphs_is_their_numbers() -> None:
    own = sites()
    before = {n: s["fn"] for n, s in own.items()}
    bare = without_graphs(own)
    assert all(same(bare[n], own[n]) for n in own)
    assert not any(t.requires_grad for s in bare.values() for t in tensors_of(s["fn"]))
    assert all(own[n]["fn"] is fn for n, fn in before.items())  # what the user may hold
    assert any(t.requires_grad for t in tensors_of(own["z_9"]["fn"]))


def test_runs_of_a_long_chain_do_not_keep_the_distributions_of_the_ones_before() -> None:
    held: list[Any] = []
    alive: list[int] = []

    def watched(x: Tensor) -> None:
        alive.append(sum(ref() is not None for ref in held))
        A = pyro.param("A", torch.tensor([[0.9, 0.1], [0.2, 0.8]]))
        z: Any = 0
        for t in pyro.markov(range(len(x))):
            fn = dist.Categorical(A[z])
            held.append(weakref.ref(fn))
            z = pyro.sample(f"z_{t}", fn)
            pyro.sample(f"x_{t}", dist.Bernoulli(0.2 + 0.6 * z), obs=x[t])

    pyro.clear_param_store()
    ExactPosteriorEM(watched).plan(torch.arange(float(STEPS)) % 2)
    # Plain, with tags, enumerated, at other values: distributions with graphs live in their own run.
    assert len(alive) >= 4
    assert max(alive) < STEPS
