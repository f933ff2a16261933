"""What this library assumes of Pyro's internals; each test fails when Pyro changes it."""

from __future__ import annotations

import weakref

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.ops.provenance import get_provenance, track_provenance
from torch.distributions import constraints

from pyro_em.tracing import capture as capturing
from pyro_em.tracing.lean import LeanTrace


def test_enumerated_sites_say_their_dimension_and_id() -> None:
    def model():
        with pyro.plate("n", 2):
            pyro.sample("z", dist.Categorical(torch.ones(3) / 3), infer={"enumerate": "parallel"})

    trace = poutine.trace(poutine.enum(model, first_available_dim=-2)).get_trace()
    infer = trace.nodes["z"]["infer"]
    assert infer["_enumerate_dim"] == -2
    assert infer["_dim_to_id"] == {-2: 0}
    assert trace.nodes["z"]["value"].shape == (3, 1)


def test_markov_recycles_dimensions_but_not_ids() -> None:
    def model():
        z = torch.tensor(0)
        for t in pyro.markov(range(4)):
            z = pyro.sample(
                f"z{t}", dist.Categorical(torch.ones(2, 2)[z] / 2), infer={"enumerate": "parallel"}
            )

    trace = poutine.trace(poutine.enum(model, first_available_dim=-1)).get_trace()
    infers = [trace.nodes[f"z{t}"]["infer"] for t in range(4)]
    assert [i["_enumerate_dim"] for i in infers] == [-1, -2, -1, -2]
    assert [i["_dim_to_id"][i["_enumerate_dim"]] for i in infers] == [0, 1, 2, 3]


def test_a_param_message_carries_name_constraint_and_unconstrained_leaf() -> None:
    def model():
        return pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)

    capture = capturing.ParameterCapture()
    with LeanTrace(capture):
        value = model()
    p = capture.parameters["p"]
    store = pyro.get_param_store()
    assert p.unconstrained is store._params["p"] and p.constraint is store._constraints["p"]
    assert value is p.leaf and value.requires_grad and value.grad_fn is None
    assert isinstance(store["p"].unconstrained, weakref.ref)


def test_provenance_passes_through_distributions() -> None:
    z = track_provenance(torch.tensor(1), frozenset({"z"}))
    fn = dist.Categorical(torch.eye(2)[z].clamp(0.1, 0.9)).expand([3])
    assert get_provenance(fn.probs) == {"z"}
    assert get_provenance(dist.Normal(torch.zeros(2)[z], 1.0).to_event(0).loc) == {"z"}


def test_obs_mask_makes_three_sites() -> None:
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0), obs_mask=torch.tensor(True))

    names = poutine.trace(model).get_trace().nodes
    assert {"x_observed", "x_unobserved", "x"} <= set(names)
    assert names["x"]["infer"].get("_deterministic")


def test_expanded_arguments_have_stride_zero() -> None:
    fn = dist.MultivariateNormal(torch.zeros(3, 1, 2), torch.eye(2).repeat(3, 1, 1, 1)).expand(
        [3, 5]
    )
    assert fn.loc.stride(1) == 0 and fn.covariance_matrix.stride(1) == 0
    assert dist.Categorical(torch.ones(3, 1, 4) / 4).expand([3, 5]).probs.stride(1) == 0
